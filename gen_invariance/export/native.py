"""Results at the size of their source, from translators of any size and from those that know one size only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.errors import ShapeError
from gen_invariance.nuisance.protocol import Nuisance, takes_any_size

LEAST_KEPT = 0.5
"""Correlation of edges before and after, below which a small result says nothing about the large picture."""

_LEAST_NORM = 1e-6
_MOST_ENLARGED = 2**22  # pixels that a smaller picture may be brought to
_MOST_TRANSLATED = 2**26  # pixels that are translated, at some 64 bytes each


def working_size(nuisance: Nuisance, size: tuple[int, int], *, image_size: int | None) -> tuple[int, int]:
    """(height, width) at which a picture of `size` is translated: all of it, whatever the shape.

    Args:
        nuisance: takes any size, knows the size it was fitted at, or has a `largest_side` up to which it works.
        size: height and width of the picture.
        image_size: the shorter side that the nuisance was fitted at; None takes pictures as they are.

    Raises:
        ShapeError: more pixels than fit in memory; a long strip would become a picture of very many.
    """
    height, width = _working_size(nuisance, size, image_size=image_size)
    if height * width > _MOST_TRANSLATED:
        raise ShapeError(f"{width}x{height} pixels are too many; scale it down, or set results=square")
    return height, width


def _working_size(nuisance: Nuisance, size: tuple[int, int], *, image_size: int | None) -> tuple[int, int]:
    if takes_any_size(nuisance):
        return size
    largest = getattr(nuisance, "largest_side", None)
    side = largest or image_size
    if side is None or (largest and min(size) <= largest):
        return size
    scale = side / min(size)
    height, width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    if scale > 1 and height * width > _MOST_ENLARGED:
        raise ShapeError(f"{size[1]}x{size[0]} pixels would be translated at {width}x{height}; crop it")
    return height, width


def translate_native(
    images: Tensor, translate: Callable[[Tensor], Tensor], *, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Results at the size of `images`, and which of them may be used, bool (B,).

    At another `size` what changed there is added to the picture, x + up(T(down(x)) - down(x)): light, colour and
    whatever else is smooth comes over whole, and the picture keeps its sharpness. Something that moved does not: its
    old edges would stay. So a result must keep the edges of its source.

    Args:
        images: float (B, C, H, W) in [0, 1].
        translate: the translator, its draw given.
        size: (height, width) that it works at.
    """
    if tuple(images.shape[2:]) == tuple(size):
        return translate(images), torch.ones(len(images), dtype=torch.bool)
    small = _resize(images, size).clamp(0, 1)
    moved = translate(small)
    large = images + _resize(moved - small, tuple(images.shape[2:]))
    return large.clamp_(0, 1), (edges_kept(small, moved) >= LEAST_KEPT).cpu()


def edges_kept(before: Tensor, after: Tensor) -> Tensor:
    """Correlation over pixels of the strength of edges, (B,); 1 where `before` has none, or hardly any."""
    first, second = (_edges(images).flatten(1) for images in (before, after))
    first, second = (edges - edges.mean(1, keepdim=True) for edges in (first, second))
    norms = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(norms > _LEAST_NORM, (first * second).sum(1) / norms.clamp(min=_LEAST_NORM), 1.0)


def _edges(images: Tensor) -> Tensor:
    """Length of the gradient of the luminance, (B, H, W)."""
    grey = F.pad(images.float().mean(1), (0, 1, 0, 1), mode="replicate")
    across = grey[:, :-1, 1:] - grey[:, :-1, :-1]
    down = grey[:, 1:, :-1] - grey[:, :-1, :-1]
    return (across.square() + down.square()).sqrt()


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
