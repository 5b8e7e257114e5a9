"""Several operations as one nuisance: RandAugment and TrivialAugment, the plain baselines, and a mix of our own.

RandAugment and TrivialAugment take operations from one list, with the ranges of their papers' public versions.
Equalising follows PIL, which leaves images of fewer than 256 pixels as they are. Each image draws its own operations
and strengths, so a row does not depend on its batch; rows that drew the same operation run together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from kornia import enhance
from pydantic import Field
from torch import Tensor

from gen_invariance.data.images import check_images
from gen_invariance.devices import send
from gen_invariance.nuisance.compose import Compose
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Background, Lighting
from gen_invariance.nuisance.protocol import Draw
from gen_invariance.nuisance.thickness import Thickness
from gen_invariance.settings import Depth, settings_class

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "colour",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""What the two policies choose from, each with probability 1/14; a draw holds positions in this list."""

_STEPS = 30  # strengths are whole steps 0..30, as in both papers

_GEOMETRIC = frozenset(("shear_x", "shear_y", "translate_x", "translate_y", "rotate"))
_ENHANCING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": enhance.adjust_brightness_accumulative,
    "colour": enhance.adjust_saturation_with_gray_subtraction,
    "contrast": enhance.adjust_contrast_with_mean_subtraction,
    "sharpness": enhance.sharpness,
}


def _ranges(*, shear: float, translate: float, rotate: float, enhance: float, posterize: float) -> Mapping[str, float]:
    """The strength of each operation at the last step.

    A fraction of the side for translations, degrees for rotation, bits taken away for posterize, otherwise a factor.
    """
    return {
        **dict.fromkeys(("shear_x", "shear_y"), shear),
        **dict.fromkeys(("translate_x", "translate_y"), translate),
        "rotate": rotate,
        **dict.fromkeys(_ENHANCING, enhance),
        "posterize": posterize,
    }


class _Policy:
    """Up to `num_ops` operations of `OPERATIONS` one after the other; subclasses draw them."""

    num_ops: int
    ranges: ClassVar[Mapping[str, float]]
    draw_on_cpu = True

    def _steps(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """Draw for `shape` = (B, C, H, W).

        Returns:
            `operation`, int64 (B, num_ops), positions in `OPERATIONS`; `step`, int64 (B, num_ops) in 0..30; and `sign`,
            float32 (B, num_ops), -1 or 1, the direction of operations that have two.
        """
        size = (shape[0], self.num_ops)
        where: dict[str, Any] = {"generator": generator, "device": generator.device}
        return {
            "operation": torch.randint(len(OPERATIONS), size, **where),
            "step": self._steps(size, generator),
            "sign": torch.randint(2, size, **where).float() * 2 - 1,
        }

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Transform `images`, float (B, C, H, W) in [0, 1], by `draw`; colour leaves one-channel images as they are."""
        check_images(images, where=type(self).__name__)
        draw = {name: value.cpu() for name, value in draw.items()}  # what is done to whom is decided on the CPU
        result = images.float().clone()  # histograms and warps want full precision
        for turn in range(draw["operation"].shape[1]):
            operation, strength = draw["operation"][:, turn], draw["step"][:, turn].float() / _STEPS
            for number, name in enumerate(OPERATIONS):
                rows = (operation == number).nonzero()[:, 0]
                if name != "identity" and len(rows):
                    given = (rows, strength[rows], draw["sign"][rows, turn])
                    there, amount, sign = (send(value, images.device) for value in given)
                    result[there] = self._operate(name, result[there], amount, sign)
        return result.clamp_(0, 1).to(images.dtype)

    def _operate(self, name: str, images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
        """Run one operation; `strength` (M,) in [0, 1] of its range, `sign` (M,)."""
        if name in _GEOMETRIC:
            return _warp(name, images, sign * strength * self.ranges[name])
        if name in _ENHANCING:
            if name == "colour" and images.shape[1] == 1:
                return images
            if name == "sharpness" and min(images.shape[-2:]) < 3:  # its filter leaves the border as it is
                return images
            return _ENHANCING[name](images, 1 + sign * strength * self.ranges[name])
        if name == "posterize":
            return enhance.posterize(images, 8 - (strength * self.ranges[name]).round().long())
        if name == "solarize":
            # At strength 0 the threshold is 1, which only white pixels reach.
            return enhance.solarize(images, 1 - strength)
        return enhance.equalize(images) if name == "equalize" else _autocontrast(images)


@settings_class("randaugment")
class RandAugment(_Policy):
    """`num_ops` operations, all of strength `magnitude` of 30.

    Reference: Cubuk, Zoph, Shlens, Le, "RandAugment: practical automated data augmentation with a reduced search
    space", 2020, section 3.

    >>> policy = RandAugment()
    >>> draw = policy.sample((4, 1, 16, 16), generator=torch.Generator())
    >>> policy.apply(torch.rand(4, 1, 16, 16), draw).shape
    torch.Size([4, 1, 16, 16])
    """

    num_ops: Depth = 2
    """operations on each image"""
    magnitude: Annotated[int, Field(ge=0, le=_STEPS)] = 9
    """strength of each, of 30"""

    ranges: ClassVar[Mapping[str, float]] = _ranges(shear=0.3, translate=150 / 331, rotate=30, enhance=0.9, posterize=4)

    def _steps(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        return torch.full(size, self.magnitude, device=generator.device)


class TrivialAugment(_Policy):
    """One operation of a strength drawn uniformly, over the wide ranges; it has nothing to tune.

    Translations reach the whole side at strength 1, as 32 pixels do on the paper's 32-pixel images.
    Reference: Müller, Hutter, "TrivialAugment: tuning-free yet state-of-the-art data augmentation", 2021, section 3.

    Example:
        >>> import torch
        >>> from gen_invariance import TrivialAugment
        >>> images, nuisance = torch.rand(2, 1, 8, 8), TrivialAugment()
        >>> draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        >>> nuisance.apply(images, draw).shape
        torch.Size([2, 1, 8, 8])
    """

    num_ops = 1
    ranges = _ranges(shear=0.99, translate=1, rotate=135, enhance=0.99, posterize=6)

    def _steps(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        return torch.randint(_STEPS + 1, size, generator=generator, device=generator.device)


def _warp(name: str, images: Tensor, amount: Tensor) -> Tensor:
    """Shear about the upper left corner, translate or rotate about the centre; bilinear, zeros outside.

    `amount` (M,) is the slope (input x = output x + slope * y), the fraction of the side (positive to the right and
    down), or degrees (positive counter-clockwise).
    """
    height, width = images.shape[-2:]
    theta = torch.eye(2, 3, dtype=images.dtype, device=images.device)  # output to input, sides from -1 to 1
    theta = theta.repeat(len(images), 1, 1)
    if name == "rotate":
        angle = torch.deg2rad(amount)
        theta[:, 0, 0] = theta[:, 1, 1] = angle.cos()
        theta[:, 0, 1], theta[:, 1, 0] = -angle.sin() * height / width, angle.sin() * width / height
    elif name == "shear_x":
        theta[:, 0, 1] = theta[:, 0, 2] = amount * height / width
    elif name == "shear_y":
        theta[:, 1, 0] = theta[:, 1, 2] = amount * width / height
    else:
        theta[:, 0 if name == "translate_x" else 1, 2] = -2 * amount
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of each image to [0, 1]; constant channels stay as they are."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-12), images)


def mix(*, degrees: float = 45.0) -> Compose:
    """Stroke width, rotation, lighting and background together."""
    return Compose([Thickness(), Rotation(degrees), Lighting(), Background()])
