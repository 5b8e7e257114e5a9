"""Flow matching from a content view: the image is drawn again from what the nuisance leaves, in another image's style.

The network sees a view of the image that holds nothing the nuisance may change (`flow.view`), and a style: a few
numbers that an encoder reads off an image. Fitting asks for nothing but images (no pairs, labels or adversary): from
its own view, its own style and noise the image has to come back,

    x_t = (1 - t) x + t e,    v(x_t, t, view(x), style(x)) ~ e - x,    e ~ N(0, I)

(conditional flow matching on straight paths: Lipman et al., "Flow matching for generative modeling", ICLR 2023,
equation 23, with time reversed; Liu et al., "Flow straight and fast", ICLR 2023). The network's output is the end of
the path, v = (x_t - end) / t: a small network learns an image sooner than noise, and the last step leaves no noise.

A translation takes the style of another image, one of a bank of styles of head-class images, and integrates from noise
at t = 1 to t = 0 in a few steps.
"""

from __future__ import annotations

import gen_invariance.torchvision_guard  # noqa: F401  (first: diffusers leads to torchvision)

# isort: split
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.nn.functional as F

# diffusers reloads a model only if its module holds these very names.
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from gen_invariance.data.images import ImageData, check_images
from gen_invariance.devices import check_network
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Draw, draw_to, normal, whole
from gen_invariance.settings import Fraction, Halvings, Rows, Side, Width, check_options
from gen_invariance.translator.flow.view import check_removes, content_view
from gen_invariance.translator.objective import check_side

_TIMES = 1000  # the network's clock: t in (0, 1] is shown as t * 1000


class StyleReader(nn.Module):
    """What may change, as a few numbers: means over places of small features, not normalised."""

    def __init__(self, channels: int, width: int, style_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
        )
        self.last = nn.Linear(2 * width, style_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to style codes (B, S)."""
        return self.last(self.layers(x).mean((2, 3)))


class FlowTranslator(ModelMixin, ConfigMixin):
    """The translator; also a nuisance.

    Args:
        channels: 1 or 3.
        removes: what the content view leaves out beyond brightness and contrast, see `flow.view.REMOVABLE`. What it
            leaves in cannot be changed by the translator.
        style_dim: length of the style code; short, so that it cannot hold what the image shows.
        width: channels of the first block; doubled by the second.
        levels: resolutions of the network; `choose_levels` tells how many suit a size.
        patch: squares of this side become channels first, which makes the network faster by its square.
        view_noise: standard deviation of the noise on the view, which is standardised: hides fine detail.
        bank_size: styles kept.
        steps: Euler steps of a translation, unless `apply` is given another number.
        strength: of a translation, unless `apply` is given another one.

    Raises:
        SettingsError: an unknown thing to remove, no step, or a strength outside [0, 1].
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 1,
        removes: tuple[str, ...] = ("tone", "sign"),
        style_dim: Width = 6,
        width: Width = 32,
        levels: Halvings = 2,
        patch: Side = 2,
        view_noise: NonNegativeFloat = 0.3,
        bank_size: Rows = 1024,
        steps: Annotated[int, Field(ge=1, le=1000)] = 2,
        strength: Fraction = 1.0,
    ) -> None:
        super().__init__()
        check_removes(removes)
        _check_steps(steps, strength)
        self.style_reader = StyleReader(channels, width // 2, style_dim)
        self.style_embedding = nn.Linear(style_dim, 4 * width)
        self.network = UNet2DModel(
            in_channels=2 * channels * patch**2,
            out_channels=channels * patch**2,
            block_out_channels=tuple(width * min(2**level, 2) for level in range(levels)),
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=8,
            add_attention=False,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        )
        self.register_buffer("bank", torch.zeros(bank_size, style_dim))

    def style(self, images: Tensor) -> Tensor:
        """Style codes (B, S) of images (B, C, H, W) in [0, 1]."""
        return self.style_reader(images.to(self.dtype) * 2 - 1)

    def velocity(self, x: Tensor, time: Tensor, view: Tensor, style: Tensor) -> Tensor:
        """dx/dt at `x` (B, C, H, W) and `time` (B,) in (0, 1], given content views like `x` and styles (B, S)."""
        return (x - self.end(x, time, view, style)) / time.view(-1, 1, 1, 1)

    def end(self, x: Tensor, time: Tensor, view: Tensor, style: Tensor) -> Tensor:
        """Where the path through `x` at `time` is expected to end, (B, C, H, W), about [-1, 1]; see `velocity`."""
        patch = self.config.patch
        seen = F.pixel_unshuffle(torch.cat([x, view], dim=1), patch)
        end = self.network(seen, time * _TIMES, class_labels=self.style_embedding(style)).sample
        return F.pixel_shuffle(end, patch)

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`style`: int64 (B,), rows of the bank; `noise`: float32 (B, 2, C, H, W), the flow's start and the view's."""
        count, *image = shape
        return {
            "style": whole(self.config.bank_size, (count,), generator=generator),
            "noise": normal(count, 2, *image, generator=generator),
        }

    def apply(self, images: Tensor, draw: Draw, *, strength: float | None = None, steps: int | None = None) -> Tensor:
        """Each image again in the drawn style; same shape, dtype, device and range.

        Args:
            images: float (B, C, H, W) in [0, 1].
            draw: of `sample`, for images of this size.
            strength: s in [0, 1]. The flow starts at t = s from (1 - s) x + s e, in a style between the image's own
                and the drawn one; 0 gives the image itself. None takes the config's.
            steps: Euler steps; None takes the config's.

        Raises:
            SettingsError: no step, or a strength outside [0, 1].
        """
        check_images(images, channels=self.config.channels, where="flow translator")
        strength = self.config.strength if strength is None else strength
        steps = self.config.steps if steps is None else steps
        _check_steps(steps, strength)
        if not len(images) or strength == 0:
            return images.clone()
        draw = draw_to(draw, images)
        source, height, width = images.to(self.dtype), *images.shape[-2:]
        noise = draw["noise"].to(self.dtype)
        style = self.bank[draw["style"]]
        if strength < 1:
            style = torch.lerp(self.style(source), style, strength)
        view = content_view(source, removes=self.config.removes) + self.config.view_noise * noise[:, 1]
        view = self._padded(view)
        start = self._padded(torch.lerp(source * 2 - 1, noise[:, 0], strength))

        def velocity(x: Tensor, time: float) -> Tensor:
            return self.velocity(x, x.new_full((len(x),), time), view, style)

        end = integrate(velocity, start, start=strength, steps=steps)
        return (end[..., :height, :width] * 0.5 + 0.5).clamp(0, 1).to(images.dtype)

    def _padded(self, x: Tensor) -> Tensor:
        """`x` with sides that the network can halve, continued by reflection."""
        multiple = self.config.patch * 2 ** (self.config.levels - 1)
        height, width = (-size % multiple for size in x.shape[-2:])
        check_side(x, levels=multiple.bit_length() - 1, where="flow translator")
        return F.pad(x, (0, width, 0, height), mode="reflect") if height or width else x


def integrate(velocity: Callable[[Tensor, float], Tensor], x: Tensor, *, start: float = 1.0, steps: int = 2) -> Tensor:
    """Euler's method for dx/dt = velocity(x, t) from t = `start` down to 0 in `steps` equal steps."""
    times = [start * (steps - step) / steps for step in range(steps + 1)]
    for time, following in pairwise(times):
        x = x + (following - time) * velocity(x, time)
    return x


def choose_levels(size: int, *, patch: int) -> int:
    """How many resolutions suit images of side `size`: the coarsest is 4 to 8 pixels wide; 2 to 4."""
    return min(max((size // patch // 4).bit_length(), 2), 4)


def build_flow(data: ImageData, network: Mapping[str, Any]) -> FlowTranslator:
    """An untrained translator for images like those of `data`; levels that are not given suit their size."""
    given = {name: value for name, value in network.items() if value is not None}
    options = check_options(FlowTranslator, given, "translator.network")
    if "levels" not in options:
        options["levels"] = choose_levels(min(data.images.shape[2:]), patch=options.get("patch", 2))
    make = partial(FlowTranslator, channels=data.images.shape[1], **options)
    check_network(make, "a translator")
    return make()


def _check_steps(steps: int, strength: float) -> None:
    if steps < 1 or not 0 <= strength <= 1:
        raise SettingsError(
            f"flow translator: steps must be at least 1 and strength in [0, 1], got {steps} and {strength}"
        )
