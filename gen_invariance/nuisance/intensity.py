"""Nuisances that change pixel values and move nothing."""

from __future__ import annotations

import torch
from kornia.enhance import adjust_brightness, adjust_gamma
from torch import Tensor

from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Draw, draw_to, uniform


class Background:
    """Every pixel that is exactly 0 becomes one level, drawn for the image (K49-BG-LT, Zhou et al. 2022).

    Args:
        levels: the level is uniform over the integers 0 .. levels - 1, of 255.

    Raises:
        SettingsError: `levels` outside [1, 256].
    """

    def __init__(self, levels: int = 100) -> None:
        if not 1 <= levels <= 256:
            raise SettingsError(f"background: levels must lie in [1, 256], got {levels}")
        self.levels = levels

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`level`: int64 (B,), of 255."""
        return {"level": torch.randint(self.levels, (shape[0],), generator=generator)}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Fill the exact zeros of each image; a colour pixel counts as background when all its channels are 0."""
        level = draw_to(draw, images)["level"].to(images.dtype).div(255).view(-1, 1, 1, 1)
        # 1 on empty ground, 0 where something is drawn, as numbers: choosing by truth values takes ten times as long on
        # a CPU.
        ground = torch.eq(images.detach(), 0, out=torch.empty_like(images))
        if images.shape[1] > 1:
            return torch.addcmul(images, ground.amin(dim=1, keepdim=True), level)
        return ground.mul_(level).add_(images)


class Lighting:
    """Brightness, contrast and gamma, in that order: y = (contrast * (x + brightness)) ** gamma, clamped to [0, 1].

    Args:
        brightness: added, uniform in [-brightness, brightness); pixel units of [0, 1].
        contrast: factor, log-uniform in [1 / contrast, contrast), so 1 means none.
        gamma: exponent, log-uniform in [1 / gamma, gamma), so 1 means none.

    Raises:
        SettingsError: a negative brightness, or a contrast or gamma below 1.
    """

    def __init__(self, *, brightness: float = 0.2, contrast: float = 1.5, gamma: float = 1.5) -> None:
        if brightness < 0 or contrast < 1 or gamma < 1:
            raise SettingsError(
                "lighting: brightness must be at least 0, contrast and gamma at least 1, got "
                f"{brightness}, {contrast}, {gamma}"
            )
        self.brightness, self.contrast, self.gamma = brightness, contrast, gamma

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
        if not len(images):
            return images.clone()
        draw = draw_to(draw, images)
        lit = adjust_brightness(images.float(), draw["brightness"], clip_output=True)
        # Gain and gamma in one kornia call: (c x) ** g = c ** g * x ** g, and the clamp at 1 commutes.
        lit = adjust_gamma(lit, gamma=draw["gamma"], gain=draw["contrast"] ** draw["gamma"])
        return lit.to(images.dtype)
