"""A learned distribution over a given family of kornia operations: rotation, scale, gain and bias.

The family is given by hand; how wide each operation swings is learned, from head classes only, by an adversary: a
translated image must look like an untouched one, and a bonus on the widths makes them as wide as the adversary lets
them be. After LieGAN (Yang et al., ICML 2023) and Augerino (Benton et al., NeurIPS 2020).

    T(x) = clamp(gain * warp(x; degrees, scale) + bias),   each parameter = width * u,  u ~ U(-1, 1)

Where the adversary cannot tell, or the bonus outweighs it, a width grows to its limit, whatever the images hold. So a
width that ends there is looked at once more (`SpatialObjective.conclude`): it stays if a small network cannot tell
images so changed from untouched ones either, as with digits that stand at every angle; else it is not identified, the
operation is left out, and verdicts say "do not use".

This form draws independently of the image. A nuisance that is limited and already present in the image therefore
comes out too narrow: the image carries its own draw, and T(T0 x) is a convolution of the two.
"""

from __future__ import annotations

import gen_invariance.torchvision_guard  # noqa: F401  (first: diffusers leads to torchvision)

# isort: split
import math
from collections.abc import Mapping
from typing import Any

import torch

# diffusers reloads a model only if its module holds these very names.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from kornia import augmentation
from kornia.augmentation import AugmentationSequential
from kornia.filters import gaussian_blur2d
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from gen_invariance.data.images import ImageData, check_images
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Draw, draw_to, uniform
from gen_invariance.settings import Fraction, Halvings, Width, settings_class
from gen_invariance.translator.objective import PatchDiscriminator, least_squares
from gen_invariance.translator.quality.discern import MOST, tell_apart
from gen_invariance.translator.quality.verdict import describe_unidentified
from gen_invariance.translator.redraw.congeal import move_by, pose_matrix

CAPS = {"rotation": 180.0, "scale": math.log(1.6), "gain": math.log(2.0), "bias": 0.4}
"""Largest width of each operation: degrees, log factor, log factor, pixel units of [0, 1]."""

AT_LIMIT = 0.97
"""A width of this share of its cap or more counts as at its limit."""

ALIKE = 0.6
"""An operation at its limit stays if the area under the ROC curve is surely below; 0.5 is no difference at all."""

UNITS = {"rotation": "degrees", "scale": "factor", "gain": "factor", "bias": "pixel units"}


class SpatialTranslator(ModelMixin, ConfigMixin):
    """The translator; also a nuisance. It has one number to learn for each operation: its width.

    Args:
        channels: 1 or 3.
        operations: which of rotation, scale, gain, bias the family holds.
        start: width at the start, as a share of the operation's cap.
        not_identified: written by a fit: operations that it left out because the images did not decide their widths,
            each with area under the ROC curve and its interval, see `quality.discern.tell_apart`.

    Raises:
        SettingsError: an unknown operation, or an empty family.

    Example:
        >>> import torch
        >>> from gen_invariance import SpatialTranslator
        >>> images, nuisance = torch.rand(2, 1, 8, 8), SpatialTranslator(1, start=0.3)
        >>> draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        >>> nuisance.apply(images, draw).shape
        torch.Size([2, 1, 8, 8])
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 1,
        operations: tuple[str, ...] = ("rotation", "scale", "gain", "bias"),
        start: Fraction = 0.1,
        not_identified: Mapping[str, tuple[float, float, float]] | None = None,
    ) -> None:
        super().__init__()
        if not operations or set(operations) - set(CAPS) or len(set(operations)) < len(operations):
            raise SettingsError(
                f"spatial translator: operations must be some of {', '.join(CAPS)}, each once, got {operations}"
            )
        if not not_identified:  # configs, and digests of them, are those of versions without it
            self._internal_dict = FrozenDict({k: v for k, v in self.config.items() if k != "not_identified"})
        self.width_shares = nn.Parameter(torch.full((len(operations),), float(start)))
        self.register_buffer("caps", torch.tensor([CAPS[name] for name in operations]))

    any_size = True
    """Its operations are degrees, factors and levels, so pictures may have any size."""

    @property
    def not_identified(self) -> dict[str, tuple[float, float, float]]:
        """Operations that the fit left out, with area under the ROC curve and its interval."""
        return dict(self.config.get("not_identified") or {})

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the family's operations, in the order of the draw."""
        return tuple(self.config.operations)

    def shares(self) -> Tensor:
        """Width of each operation as a share of its cap, (P,) in [0, 1]."""
        return self.width_shares.clamp(0, 1)

    def widths(self) -> dict[str, float]:
        """Learned half-width of each operation in its own unit (log factor for scale and gain)."""
        values = (self.shares() * self.caps).tolist()
        return dict(zip(self.operations, values, strict=True))

    @property
    def unidentified(self) -> str:
        """A sentence on the operations that the fit could not decide, which `assess` refuses; "" for none."""
        return describe_unidentified(self.not_identified)

    def describe(self) -> str:
        """The learned distribution in words, a line for each operation."""
        left_out = self.not_identified
        lines = []
        for name, width in self.widths().items():
            if name in left_out:
                area = "AUC {:.2f} [{:.2f}, {:.2f}]".format(*left_out[name])
                lines.append(
                    f"{name}: not identified, left out (grew to its limit, which the images do not hold: {area})"
                )
                continue
            low, high = (math.exp(-width), math.exp(width)) if UNITS[name] == "factor" else (-width, width)
            lines.append(f"{name}: uniform in [{low:.3g}, {high:.3g}] {UNITS[name]}")
        return "\n".join(lines)

    def to_kornia(self) -> AugmentationSequential:
        """The learned family as plain kornia operations, without this package: to look at, or to use elsewhere.

        They have the same ranges, order, centre and interpolation, but kornia draws factors (scale, gain) uniformly
        and not log-uniformly, so half of them lie above 1.11 for scale and 1.25 for gain where a width is at its
        cap, and above 1 here. Kornia draws from the global random state. `KorniaNuisance` has the exact draws.

        Raises:
            SettingsError: the translator does nothing yet, all widths are 0.
        """
        steps = [getattr(augmentation, name)(**options) for name, options in self._kornia_steps()]
        return AugmentationSequential(*steps, data_keys=["input"])

    def kornia_code(self) -> str:
        """`to_kornia` as a Python text to paste; it needs nothing but kornia."""
        lines = ["import kornia.augmentation as K", "", "augment = K.AugmentationSequential("]
        for name, options in self._kornia_steps():
            given = ", ".join(f"{option}={value!r}" for option, value in options.items())
            lines.append(f"    K.{name}({given}),")
        return "\n".join([*lines, '    data_keys=["input"],', ")"]) + "\n"

    def _kornia_steps(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and options of kornia's operations, with ranges rounded to what a reader wants to see."""
        widths = {name: round(width, 6) for name, width in self.widths().items()}
        factors = {name: (round(math.exp(-width), 6), round(math.exp(width), 6)) for name, width in widths.items()}
        steps: list[tuple[str, dict[str, Any]]] = []
        if widths.get("rotation") or widths.get("scale"):
            turn = widths.get("rotation", 0.0)
            grow = {"scale": factors["scale"]} if widths.get("scale") else {}
            steps.append(("RandomAffine", {"degrees": (-turn, turn), **grow, "align_corners": True, "p": 1.0}))
        if widths.get("gain"):  # kornia's contrast is a factor on pixels
            steps.append(("RandomContrast", {"contrast": factors["gain"], "clip_output": False, "p": 1.0}))
        if widths.get("bias"):  # kornia's brightness is a shift, 1 shifts by 0
            shifts = (round(1 - widths["bias"], 6), round(1 + widths["bias"], 6))
            steps.append(("RandomBrightness", {"brightness": shifts, "clip_output": False, "p": 1.0}))
        if widths.get("gain") or widths.get("bias"):  # a shift by 0 that cuts to [0, 1], once and at the end
            steps.append(("RandomBrightness", {"brightness": (1.0, 1.0), "p": 1.0}))
        if not steps:
            why = self.unidentified.rstrip(".") or "fit it first"
            raise SettingsError(f"the spatial translator does nothing: all its widths are 0; {why}")
        return steps

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`u`: float32 (B, P), uniform in [-1, 1), one column for each operation."""
        numbers = uniform(shape[0] * len(self.operations), -1, 1, generator=generator)
        return {"u": numbers.view(shape[0], len(self.operations))}

    def read_parameters(self, draw: Draw) -> dict[str, Tensor]:
        """What a draw does, in readable units: degrees, factors, pixel units; each (B,)."""
        # Angles stay in float32 in a network of half precision: bfloat16 would round 180 degrees to a whole one.
        values = draw["u"].to(self.caps.device).float() * self.shares().float() * self.caps.float()
        columns = dict(zip(self.operations, values.unbind(1), strict=True))
        return {name: value.exp() if UNITS[name] == "factor" else value for name, value in columns.items()}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Transform each image by its own parameters; same shape, dtype, device and range."""
        check_images(images, channels=self.config.channels, where="spatial translator")
        if not len(images):
            return images.clone()
        values = self.read_parameters(draw_to(draw, images))
        result = images.float()
        if "rotation" in values or "scale" in values:  # the family may lack one of the two
            zero, one = result.new_zeros(len(result)), result.new_ones(len(result))
            poses = torch.stack([values.get("rotation", zero), values.get("scale", one).log(), zero], dim=1)
            result = move_by(result, pose_matrix(poses))
        if "gain" in values:
            result = result * values["gain"].view(-1, 1, 1, 1)
        if "bias" in values:
            result = result + values["bias"].view(-1, 1, 1, 1)
        return result.clamp(0, 1).to(images.dtype)


@settings_class("translator.objective")
class SpatialSettings:
    """What fitting minimises, and how fast."""

    bonus: NonNegativeFloat = 0.1
    """Weight of the summed width shares; larger makes wider, also where the data hold no nuisance."""
    learning_rate: PositiveFloat = 2e-2
    """Of the widths."""
    discriminator_learning_rate: PositiveFloat = 1e-3
    """Of the adversary."""
    noise: NonNegativeFloat = 0.03
    """Standard deviation of the noise on the adversary's inputs, pixel units of [0, 1]."""
    discriminator_width: Width = 32
    """Channels of the adversary's first layer."""
    discriminator_layers: Halvings = 3
    """Stride-2 layers of the adversary."""


class SpatialObjective:
    """What fitting minimises: LSGAN on the marginal of translated images, and a bonus on the widths.

    Both inputs of the discriminator are blurred and get a little noise, so that the blur of interpolation gives
    nothing away. The bonus also sets the false width that appears when the data hold no nuisance, so report that
    control beside a result. See `objective.Objective` for the methods.

    Args:
        translator: the distribution to learn.
        settings: None for the defaults.
    """

    average_decay = None

    def __init__(self, translator: SpatialTranslator, settings: SpatialSettings | None = None) -> None:
        self.translator, self.settings = translator, settings or SpatialSettings()
        self.discriminator = PatchDiscriminator(
            translator.config.channels,
            width=self.settings.discriminator_width,
            layers=self.settings.discriminator_layers,
        )
        self._rates = {
            "translator": self.settings.learning_rate,
            "discriminator": self.settings.discriminator_learning_rate,
        }
        self.optimizers = {
            "translator": torch.optim.Adam(translator.parameters(), lr=self._rates["translator"], betas=(0.5, 0.99)),
            "discriminator": torch.optim.Adam(
                self.discriminator.parameters(), lr=self._rates["discriminator"], betas=(0.5, 0.99), fused=True
            ),
        }

    def compute_learning_rates(self, step: int, steps: int) -> dict[str, float]:
        """Constant."""
        return self._rates

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """The translator's draw, and `noise` (B, 2, C, H, W) for the adversary's inputs."""
        draw = self.translator.sample(shape, generator=generator)
        count, *image = shape
        return {**draw, "noise": torch.randn(count, 2, *image, generator=generator)}

    def forward(self, images: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Translate the batch once; both sides are blurred and noised for the adversary."""
        with torch.no_grad():  # projected gradient: a sigmoid would freeze a width that came near 0
            self.translator.width_shares.clamp_(0, 1)
        fake = self.translator.apply(images, draw)
        noise = self.settings.noise * draw["noise"]
        return {"real": _blur(images) + noise[:, 0], "fake": _blur(fake) + noise[:, 1]}

    def discriminator_terms(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """LSGAN, the discriminator's side."""
        return {"discriminator": self.discriminator.loss(out["real"], out["fake"])}

    def translator_terms(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fool the discriminator; be wide."""
        return {
            "adversarial": least_squares(self.discriminator(out["fake"]), 1.0),
            "width_bonus": -self.settings.bonus * self.translator.shares().sum(),
        }

    @torch.no_grad()
    def conclude(self, data: ImageData, rows: Tensor, *, generator: torch.Generator) -> bool:
        """After the last step: leave out the operations at their limits that the images do not hold.

        Args:
            data: the training set.
            rows: int64 (N,), those of the fit.
            generator: CPU generator of all that is drawn.

        Returns:
            Whether the translator was changed.
        """
        translator = self.translator
        rows = rows[torch.randperm(len(rows), generator=generator)[:MOST]]
        groups = None if data.groups is None else data.groups.cpu()[rows]
        left_out = {}
        for number, (name, share) in enumerate(zip(translator.operations, translator.shares().tolist(), strict=True)):
            if share < AT_LIMIT:
                continue
            alone = SpatialTranslator(translator.config.channels, operations=(name,), start=share).to(data.device)
            area = tell_apart(alone.requires_grad_(False), data.float_images(rows), generator=generator, groups=groups)
            if not area.high < ALIKE:
                left_out[name] = (area.value, area.low, area.high)
                translator.width_shares[number] = 0.0
        if left_out:
            translator.register_to_config(not_identified=left_out)
        return bool(left_out)


def _blur(images: Tensor) -> Tensor:
    return gaussian_blur2d(images, (3, 3), (1.0, 1.0))
