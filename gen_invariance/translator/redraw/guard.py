"""No translation is blank or burnt out: a row that would be goes a smaller step, and in the end stays as it is.

A result is spoilt where its contrast collapses - its deviation is far below both that of the image and that of an
image with the drawn levels - or where most of its pixels leave [0, 1], and more than did in the image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST_CONTRAST = 0.25
"""Deviation of a result, as a share of the smaller of the image's and the drawn one."""
MOST_CLIPPED = 0.5
"""Share of the pixels that may be clipped in some channel; more only where the image itself has more."""
STEPS = (1.0, 0.5, 0.25)
"""Of the way to the drawn readings, tried in turn."""

_CLIPPED = 1e-3  # beyond 0 and 1; interpolation overshoots by less than that where nothing is lost


def measure_contrast(images: Tensor) -> Tensor:
    """Deviation of the pixels of each image about the means of its channels, (B,)."""
    return (images - images.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).sqrt()


def find_spoilt(images: Tensor, results: Tensor, contrast: Tensor) -> Tensor:
    """Which results have lost their contrast or most of their pixels, bool (B,).

    Args:
        images: float (B, C, H, W) in [0, 1].
        results: translations of them that are not clamped yet.
        contrast: deviation that an image with the drawn levels has, (B,).
    """
    clipped = ((results.amin(1) < -_CLIPPED) | (results.amax(1) > 1 + _CLIPPED)).float().mean((1, 2))
    extreme = ((images.amin(1) <= _CLIPPED) | (images.amax(1) >= 1 - _CLIPPED)).float().mean((1, 2))
    least = LEAST_CONTRAST * torch.minimum(measure_contrast(images), contrast)
    # A NaN is spoilt: comparisons with it are false.
    kept = (measure_contrast(results.clamp(0, 1)) >= least) & (clipped <= extreme.clamp(min=MOST_CLIPPED))
    return ~kept


def translate_safely(
    images: Tensor, translate: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]], strength: float
) -> Tensor:
    """Translations in [0, 1] none of which is spoilt.

    Args:
        images: float (B, C, H, W) in [0, 1].
        translate: (images, rows of the batch, strength) to results before they are clamped and contrasts as
            `find_spoilt` wants them.
        strength: of the first step.
    """
    rows = torch.arange(len(images), device=images.device)
    results, contrast = translate(images, rows, strength)
    spoilt = find_spoilt(images, results, contrast)
    results = results.clamp(0, 1)
    if images.device.type != "cpu":
        return _mended_at_once(images, translate, strength, results, spoilt)
    for step in STEPS[1:]:
        if not bool(spoilt.any()):
            return results
        rows = rows[spoilt]
        again, contrast = translate(images[rows], rows, step * strength)
        results[rows] = again.clamp(0, 1)
        spoilt = find_spoilt(images[rows], again, contrast)
    rows = rows[spoilt]
    results[rows] = images[rows]
    return results


def _mended_at_once(
    images: Tensor,
    translate: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]],
    strength: float,
    results: Tensor,
    spoilt: Tensor,
) -> Tensor:
    """All rows go all the steps, and each takes the first that is not spoilt: no GPU is asked which ones are."""
    rows = torch.arange(len(images), device=images.device)
    for step in STEPS[1:]:
        again, contrast = translate(images, rows, step * strength)
        results = torch.where(spoilt[:, None, None, None], again.clamp(0, 1), results)
        spoilt = spoilt & find_spoilt(images, again, contrast)
    return torch.where(spoilt[:, None, None, None], images, results)
