"""Nuisances that move pixels."""

from __future__ import annotations

import torch
from kornia.geometry.transform import rotate
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
