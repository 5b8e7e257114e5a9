"""What fitting a flow translator minimises: flow matching from the content view, and small style codes."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gen_invariance.nuisance.protocol import Draw
from gen_invariance.settings import Fraction, settings_class
from gen_invariance.translator.flow.model import FlowTranslator
from gen_invariance.translator.flow.view import content_view, sample_view


@settings_class("translator.objective")
class FlowSettings:
    """What fitting minimises, and how."""

    learning_rate: PositiveFloat = 2e-3
    """Of Adam at its highest; it rises over the first twentieth of the steps, then falls to 0 by a cosine."""
    code_weight: NonNegativeFloat = 0.01
    """Weight of the mean squared style code, which keeps codes near 0."""
    code_noise: NonNegativeFloat = 0.1
    """Standard deviation of the noise on the style codes while fitting; limits what a code can hold."""
    average: Fraction = 0.995
    """Largest decay of the moving average of the weights, which is what is kept; it rises to it."""


class FlowObjective:
    """The flow-matching loss of a translator, for `fit.fit_objective`; see `objective.Objective` for the methods.

    Args:
        translator: untrained.
        settings: None for the defaults.
    """

    discriminator = None

    def __init__(self, translator: FlowTranslator, settings: FlowSettings | None = None) -> None:
        self.translator, self.settings = translator, settings or FlowSettings()
        adam = torch.optim.Adam(translator.parameters(), lr=self.settings.learning_rate, fused=True)
        self.optimizers = {"translator": adam}

    def average_decay(self, updates: int) -> float:
        """Rises to `average` as in diffusers' `EMAModel` with warm-up, power 2/3."""
        return min(self.settings.average, 1 - (1 + updates) ** (-2 / 3))

    def compute_learning_rates(self, step: int, steps: int) -> dict[str, float]:
        """Up in a line over the first twentieth of `steps`, then down to 0 by a cosine."""
        highest, warmup = self.settings.learning_rate, max(steps // 20, 1)
        if step < warmup:
            return {"translator": highest * (step + 1) / warmup}
        share = (step - warmup) / max(steps - warmup, 1)
        return {"translator": highest * 0.5 * (1 + math.cos(math.pi * share))}

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """All randomness of one step for images of `shape` = (B, C, H, W).

        `noise` (B, 2, C, H, W) of the image and of the view, `time` (B,) in (0, 1], `code` (B, S) noise on the style,
        `mirror` and `shift` (B, 2) of the copy that the style is read off, and what `sample_view` gives.
        """
        count, *image = shape
        return {
            "noise": torch.randn(count, 2, *image, generator=generator),
            "time": 1 - torch.rand(count, generator=generator),
            "code": torch.randn(count, self.translator.config.style_dim, generator=generator),
            "mirror": torch.rand(count, 2, generator=generator) < 0.5,
            "shift": torch.randint(max(image), (count, 2), generator=generator),
            **sample_view(shape, generator=generator),
        }

    def forward(self, images: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Style code, expected end of the path, and the image it should be, in [-1, 1]."""
        translator, config, noise = self.translator, self.translator.config, draw["noise"]
        code = translator.style(scramble(images, draw["mirror"], draw["shift"]))
        style = code + self.settings.code_noise * draw["code"]
        view = content_view(images, removes=config.removes, draw=draw) + config.view_noise * noise[:, 1]
        target, time = images * 2 - 1, draw["time"]
        along = torch.lerp(target, noise[:, 0], time.view(-1, 1, 1, 1))
        return {"code": code, "end": translator.end(along, time, view, style), "target": target}

    def discriminator_terms(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """None: there is no adversary."""
        return {}

    def translator_terms(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Flow matching (see `flow.model`), and the size of the style codes."""
        return {
            "end": (out["end"] - out["target"]).square().mean(),
            "code": self.settings.code_weight * out["code"].square().mean(),
        }


def scramble(images: Tensor, mirror: Tensor, shift: Tensor) -> Tensor:
    """Copies of images (B, C, H, W) that keep the style but not the shape's place.

    They are mirrored along height and width, `mirror` bool (B, 2), and shifted round the borders by `shift` int64
    (B, 2) pixels.
    """
    for axis, size in ((2, images.shape[2]), (3, images.shape[3])):
        position = torch.arange(size, device=images.device)
        sign = 1 - 2 * mirror[:, axis - 2, None].to(position)
        index = (sign * position + shift[:, axis - 2, None]) % size
        index = index[:, None, :, None] if axis == 2 else index[:, None, None, :]
        images = images.gather(axis, index.expand_as(images))
    return images
