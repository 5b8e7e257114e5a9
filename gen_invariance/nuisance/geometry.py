"""Nuisances that move pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kornia.geometry.transform import rotate, translate, warp_affine
from torch import Tensor

from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Draw, draw_to, uniform


class Rotation:
    """Rotation about the image centre, corners filled with 0 (K49-ROT-LT, Zhou et al. 2022).

    Args:
        degrees: angles are uniform in [-degrees, degrees); positive turns counter-clockwise. 180 is every angle.
        mode: "bicubic" (the benchmark's) or "bilinear" (faster); bicubic overshoot is clamped.

    Raises:
        SettingsError: `degrees` outside [0, 180] or unknown `mode`.
    """

    def __init__(self, degrees: float = 180.0, *, mode: str = "bicubic") -> None:
        if not 0 <= degrees <= 180:
            raise SettingsError(f"rotation: degrees must lie in [0, 180], got {degrees}")
        if mode not in ("bicubic", "bilinear"):
            raise SettingsError(f"rotation: mode must be bicubic or bilinear, got {mode!r}")
        self.degrees, self.mode = degrees, mode

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`degrees`: float32 (B,)."""
        return {"degrees": uniform(shape[0], -self.degrees, self.degrees, generator=generator)}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Rotate each image by its own angle."""
        if not len(images):
            return images.clone()
        angles = draw_to(draw, images)["degrees"]
        turned = rotate(images.float(), angles, mode=self.mode, padding_mode="zeros", align_corners=True)
        return turned.clamp_(0, 1).to(images.dtype)


class Translation:
    """Shift by a random part of the side, filled with 0.

    Args:
        share: shifts are uniform in [-share, share) of the side, across and down.

    Raises:
        SettingsError: `share` outside [0, 1].
    """

    def __init__(self, share: float = 0.15) -> None:
        if not 0 <= share <= 1:
            raise SettingsError(f"translation: share must lie in [0, 1], got {share}")
        self.share = share

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`across`, `down`: float32 (B,), shares of the side, positive to the right and down."""
        count = shape[0]
        return {name: uniform(count, -self.share, self.share, generator=generator) for name in ("across", "down")}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Shift each image by its own way, bilinear."""
        if not len(images):
            return images.clone()
        draw, (height, width) = draw_to(draw, images), images.shape[-2:]
        way = torch.stack([draw["across"] * width, draw["down"] * height], dim=1)
        moved = translate(images.float(), way, padding_mode="zeros", align_corners=True)
        return moved.clamp_(0, 1).to(images.dtype)


class Shear:
    """Lean about the image centre, filled with 0.

    Args:
        slope: slopes are uniform in [-slope, slope), pixels a pixel; positive leans to the right.

    Raises:
        SettingsError: `slope` outside [0, 5].
    """

    def __init__(self, slope: float = 0.5) -> None:
        if not 0 <= slope <= 5:
            raise SettingsError(f"shear: slope must lie in [0, 5], got {slope}")
        self.slope = slope

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`slope`: float32 (B,)."""
        return {"slope": uniform(shape[0], -self.slope, self.slope, generator=generator)}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Shear each image by its own slope, bicubic."""
        if not len(images):
            return images.clone()
        slope, (height, width) = draw_to(draw, images)["slope"], images.shape[-2:]
        one, zero = torch.ones_like(slope), torch.zeros_like(slope)
        rows = [one, -slope, slope * (height - 1) / 2, zero, one, zero]
        matrix = torch.stack(rows, dim=1).unflatten(1, (2, 3))
        leant = warp_affine(
            images.float(), matrix, (height, width), mode="bicubic", padding_mode="zeros", align_corners=True
        )
        return leant.clamp_(0, 1).to(images.dtype)


class CropFlip:
    """Random crop of the zero-padded image, and a mirror image half of the time: the plain CIFAR augmentation.

    Args:
        padding: zeros on each side, pixels.
        flip: whether to mirror.

    Raises:
        SettingsError: a negative padding.
    """

    def __init__(self, padding: int = 4, *, flip: bool = True) -> None:
        if padding < 0:
            raise SettingsError(f"crop_flip: padding must not be negative, got {padding}")
        self.padding, self.flip = padding, flip

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`corner`: int64 (B, 2), row and column of the crop in the padded image; `mirror`: bool (B,)."""
        corner = torch.randint(2 * self.padding + 1, (shape[0], 2), generator=generator)
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
        # Flat positions: gathering along one axis takes half the time of indexing by row and column.
        place = (down[:, :, None] * padded.shape[3] + across[:, None, :]).view(count, 1, height * width)
        return padded.flatten(2).gather(2, place.expand(-1, channels, -1)).view(images.shape)
