"""Stroke width: dilation and erosion of light ink on a dark ground."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gen_invariance.nuisance.protocol import Draw, draw_to, uniform, whole
from gen_invariance.settings import Fraction, Side, settings_class

Sides = Annotated[tuple[Side, ...], Field(min_length=1)]


def _slide(images: Tensor, side: int, pick: Callable[[Tensor, Tensor], Tensor], outside: float) -> Tensor:
    """`pick` (max or min) over a side x side window, read at offsets -side // 2 .. side - 1 - side // 2 as OpenCV does.

    A flat square window is separable, so two passes of shifted comparisons are exact, each on windows of up to twice
    the width before. On a CPU they are several times faster than kornia's unfold-based morphology, whose dilation also
    sits one pixel off OpenCV's for even sides.
    """
    before, after = side // 2, side - 1 - side // 2
    for axis, pad in ((-1, (before, after, 0, 0)), (-2, (0, 0, before, after))):
        images, width = F.pad(images, pad, value=outside), 1
        while width < side:
            shift = min(width, side - width)
            left = images.shape[axis] - shift
            images = pick(images.narrow(axis, 0, left), images.narrow(axis, shift, left))
            width += shift
    return images


def dilate(images: Tensor, side: int) -> Tensor:
    """Maximum over a `side` x `side` square; pixels outside the image are ignored. (B, C, H, W) to the same shape."""
    return _slide(images, side, torch.maximum, float("-inf")) if side > 1 else images.clone()


def erode(images: Tensor, side: int) -> Tensor:
    """Minimum over a `side` x `side` square; pixels outside the image are ignored. (B, C, H, W) to the same shape."""
    return _slide(images, side, torch.minimum, float("inf")) if side > 1 else images.clone()


@settings_class("thickness")
class Thickness:
    """Dilate or erode each image by a square of random side (K49-DIL-LT, Zhou et al. 2022).

    Example:
        >>> import torch
        >>> from gen_invariance import Thickness
        >>> images, nuisance = torch.rand(2, 1, 8, 8), Thickness(dilate_probability=0.5)
        >>> draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        >>> nuisance.apply(images, draw).shape
        torch.Size([2, 1, 8, 8])
    """

    dilate_probability: Fraction = 0.6
    """share of images that are dilated; the others are eroded"""
    dilate_sides: Sides = (2, 3, 4)
    """sides in pixels, each equally likely"""
    erode_sides: Sides = (1, 2)
    """sides in pixels, each equally likely; side 1 changes nothing"""

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`dilate`: bool (B,); `side`: int64 (B,), pixels."""
        count = shape[0]
        dilates = uniform(count, 0, 1, generator=generator) < self.dilate_probability
        grown, thinned = (
            torch.tensor(sides, device=generator.device)[whole(len(sides), (count,), generator=generator)]
            for sides in (self.dilate_sides, self.erode_sides)
        )
        return {"dilate": dilates, "side": torch.where(dilates, grown, thinned)}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Dilate or erode each image; rows that share an operation and a side go through it together."""
        if images.device.type != "cpu":
            return self._apply_all(images, draw_to(draw, images))
        result = images.clone()
        dilates, sides = draw["dilate"], draw["side"]
        for grow, operation in ((True, dilate), (False, erode)):
            for side in sides[dilates == grow].unique().tolist():
                rows = ((dilates == grow) & (sides == side)).nonzero().squeeze(1)
                if side > 1:
                    # Whole rows at a time, which indexing in brackets is not.
                    result.index_copy_(0, rows, operation(images.index_select(0, rows), side))
        return result

    def _apply_all(self, images: Tensor, draw: Draw) -> Tensor:
        """As `apply`, every operation on every image: a GPU is quicker at that than at saying which rows need which."""
        result = images
        for grows, operation, sides in ((True, dilate, self.dilate_sides), (False, erode, self.erode_sides)):
            for side in sorted({side for side in sides if side > 1}):
                chosen = (draw["dilate"] == grows) & (draw["side"] == side)
                result = torch.where(chosen[:, None, None, None], operation(images, side), result)
        return result.clone() if result is images else result
