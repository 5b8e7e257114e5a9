"""Nuisances that change pixel values and move nothing."""

from __future__ import annotations

from typing import Annotated

import torch
from kornia.enhance import adjust_brightness, adjust_gamma
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from gen_invariance.nuisance.protocol import Draw, apply_in_float32, draw_to, uniform, whole
from gen_invariance.settings import settings_class


@settings_class("background")
class Background:
    """Every pixel that is exactly 0 becomes one level, drawn for the image (K49-BG-LT, Zhou et al. 2022).

    Example:
        >>> import torch
        >>> from gen_invariance import Background
        >>> images, nuisance = torch.rand(2, 1, 8, 8), Background(levels=10)
        >>> draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        >>> nuisance.apply(images, draw).shape
        torch.Size([2, 1, 8, 8])
    """

    levels: Annotated[int, Field(ge=1, le=256)] = 100
    """the level is uniform over the integers 0 .. levels - 1, of 255"""

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`level`: int64 (B,), of 255."""
        return {"level": whole(self.levels, (shape[0],), generator=generator)}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Fill the exact zeros of each image; a colour pixel counts as background when all its channels are 0."""
        level = draw_to(draw, images)["level"].to(images.dtype).div(255).view(-1, 1, 1, 1)
        # 1 on empty ground, 0 where something is drawn, as numbers: choosing by truth values takes ten times as long on
        # a CPU.
        ground = torch.eq(images.detach(), 0, out=torch.empty_like(images))
        if images.shape[1] > 1:
            return torch.addcmul(images, ground.amin(dim=1, keepdim=True), level)
        return ground.mul_(level).add_(images)


@settings_class("lighting")
class Lighting:
    """Brightness, contrast and gamma, in that order: y = (contrast * (x + brightness)) ** gamma, clamped to [0, 1].

    Example:
        >>> import torch
        >>> from gen_invariance import Lighting
        >>> images, nuisance = torch.rand(2, 1, 8, 8), Lighting(brightness=0.1)
        >>> draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        >>> nuisance.apply(images, draw).shape
        torch.Size([2, 1, 8, 8])
    """

    brightness: NonNegativeFloat = 0.2
    """added, uniform in [-brightness, brightness); pixel units of [0, 1]"""
    contrast: Annotated[float, Field(ge=1)] = 1.5
    """factor, log-uniform in [1 / contrast, contrast), so 1 means none"""
    gamma: Annotated[float, Field(ge=1)] = 1.5
    """exponent, log-uniform in [1 / gamma, gamma), so 1 means none"""

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`brightness`, `contrast`, `gamma`: float32 (B,)."""
        count = shape[0]
        return {
            "brightness": uniform(count, -self.brightness, self.brightness, generator=generator),
            "contrast": self.contrast ** uniform(count, -1, 1, generator=generator),
            "gamma": self.gamma ** uniform(count, -1, 1, generator=generator),
        }

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Relight each image with its own three numbers."""
        return apply_in_float32(self._relight, images, draw)

    def _relight(self, images: Tensor, draw: Draw) -> Tensor:
        lit = adjust_brightness(images, draw["brightness"], clip_output=True)
        # Gain and gamma in one kornia call: (c x) ** g = c ** g * x ** g, and the clamp at 1 commutes.
        return adjust_gamma(lit, gamma=draw["gamma"], gain=draw["contrast"] ** draw["gamma"])
