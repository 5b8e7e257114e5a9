"""Nuisances that move pixels."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from kornia.geometry.transform import rotate, translate
from pydantic import Field
from torch import Tensor

from gen_invariance.nuisance.protocol import Draw, apply_in_float32, draw_to, uniform, whole
from gen_invariance.nuisance.warp import turned, warp
from gen_invariance.settings import CountOrZero, Fraction, settings_class


@settings_class("rotation")
class Rotation:
    """Rotation about the image centre, corners filled with 0 (K49-ROT-LT, Zhou et al. 2022).

    Example:
        >>> import torch
        >>> from gen_invariance import Rotation
        >>> images, nuisance = torch.rand(2, 1, 8, 8), Rotation(degrees=30)
        >>> draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        >>> nuisance.apply(images, draw).shape
        torch.Size([2, 1, 8, 8])
    """

    degrees: Annotated[float, Field(ge=0, le=180)] = 180.0
    """angles are uniform in [-degrees, degrees); positive turns counter-clockwise, 180 is every angle"""
    mode: Literal["bicubic", "bilinear"] = "bicubic"
    """bicubic (the benchmark's) or bilinear (faster); bicubic overshoot is clamped"""

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`degrees`: float32 (B,)."""
        return {"degrees": uniform(shape[0], -self.degrees, self.degrees, generator=generator)}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Rotate each image by its own angle."""
        return apply_in_float32(self._rotate, images, draw)

    def _rotate(self, images: Tensor, draw: Draw) -> Tensor:
        if images.device.type == "cpu":
            return rotate(images, draw["degrees"], mode=self.mode, padding_mode="zeros", align_corners=True)
        return warp(images, turned(draw["degrees"], images), mode=self.mode)


@settings_class("translation")
class Translation:
    """Shift by a random part of the side, bilinear, filled with 0.

    Example:
        >>> import torch
        >>> from gen_invariance import Translation
        >>> images, nuisance = torch.rand(2, 1, 8, 8), Translation(share=0.1)
        >>> draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        >>> nuisance.apply(images, draw).shape
        torch.Size([2, 1, 8, 8])
    """

    share: Fraction = 0.15
    """shifts are uniform in [-share, share) of the side, across and down"""

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`across`, `down`: float32 (B,), shares of the side, positive to the right and down."""
        count = shape[0]
        return {name: uniform(count, -self.share, self.share, generator=generator) for name in ("across", "down")}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Shift each image by its own way."""
        return apply_in_float32(self._shift, images, draw)

    def _shift(self, images: Tensor, draw: Draw) -> Tensor:
        height, width = images.shape[-2:]
        way = torch.stack([draw["across"] * width, draw["down"] * height], dim=1)
        if images.device.type == "cpu":
            return translate(images, way, padding_mode="zeros", align_corners=True)
        still = torch.eye(2, device=way.device).expand(len(way), 2, 2)
        return warp(images, torch.cat([still, way[:, :, None]], dim=2))


@settings_class("shear")
class Shear:
    """Lean about the image centre, bicubic, filled with 0.

    Example:
        >>> import torch
        >>> from gen_invariance import Shear
        >>> images, nuisance = torch.rand(2, 1, 8, 8), Shear(slope=0.2)
        >>> draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        >>> nuisance.apply(images, draw).shape
        torch.Size([2, 1, 8, 8])
    """

    slope: Annotated[float, Field(ge=0, le=5)] = 0.5
    """slopes are uniform in [-slope, slope), pixels a pixel; positive leans to the right"""

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`slope`: float32 (B,)."""
        return {"slope": uniform(shape[0], -self.slope, self.slope, generator=generator)}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Shear each image by its own slope."""
        return apply_in_float32(self._shear, images, draw)

    def _shear(self, images: Tensor, draw: Draw) -> Tensor:
        slope, size = draw["slope"], (images.shape[-2], images.shape[-1])
        one, zero = torch.ones_like(slope), torch.zeros_like(slope)
        rows = [one, -slope, slope * (size[0] - 1) / 2, zero, one, zero]
        matrix = torch.stack(rows, dim=1).unflatten(1, (2, 3))
        return warp(images, matrix, mode="bicubic")


@settings_class("crop_flip")
class CropFlip:
    """Random crop of the zero-padded image, and a mirror image half of the time: the plain CIFAR augmentation."""

    padding: CountOrZero = 4
    """zeros on each side, pixels"""
    flip: bool = True
    """whether to mirror"""

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`corner`: int64 (B, 2), row and column of the crop in the padded image; `mirror`: bool (B,)."""
        corner = whole(2 * self.padding + 1, (shape[0], 2), generator=generator)
        mirror = uniform(shape[0], 0, 1, generator=generator) < 0.5 * self.flip
        return {"corner": corner, "mirror": mirror}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Crop and mirror each image, by one gather for the whole batch."""
        draw = draw_to(draw, images)
        count, channels, height, width = images.shape
        padded = F.pad(images, (self.padding,) * 4)
        across = torch.arange(width, device=images.device).expand(count, width)
        across = torch.where(draw["mirror"][:, None], width - 1 - across, across) + draw["corner"][:, 1:]
        down = torch.arange(height, device=images.device) + draw["corner"][:, :1]
        # Flat indices: gathering along one axis takes half the time of indexing by row and column.
        index = (down[:, :, None] * padded.shape[3] + across[:, None, :]).view(count, 1, height * width)
        return padded.flatten(2).gather(2, index.expand(-1, channels, -1)).view(images.shape)
