"""The stroke width of a figure, read off and changed.

A stroke of width w and length l has area w * l and an outline of about 2 * l, so width = 2 * area / outline. It is read
off content (`tone.take_out`), where it knows nothing of levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.nuisance.thickness import dilate, erode

SIDES = (-4, -3, -2, 1, 2, 3, 4)
"""Operations tried: erosion by a square of that side where negative, dilation where positive, 1 for neither."""


def read_width(content: Tensor) -> Tensor:
    """Log stroke width of each figure in pixels, (B,), from content (B, 1, H, W) in [0, 1]."""
    area = content.sum((1, 2, 3))
    padded = F.pad(content, (0, 1, 0, 1))
    across = (padded[..., :-1, 1:] - padded[..., :-1, :-1]).square()
    down = (padded[..., 1:, :-1] - padded[..., :-1, :-1]).square()
    outline = (across + down + 1e-12).sqrt().sum((1, 2, 3))
    return (2 * area / outline).clamp(min=0.1).log()


def match_width(
    content: Tensor, log_width: Tensor, *, figure_of: Callable[[Tensor], Tensor], least_kept: float = 0.3
) -> Tensor:
    """Content (B, C, H, W) dilated or eroded to the stroke width (B,) of the figure, as near as whole pixels come.

    An erosion that would leave less than `least_kept` of the figure's area is not taken: thin strokes would break.
    """
    if not len(content):
        return content
    tried = torch.stack([dilate(content, side) if side > 0 else erode(content, -side) for side in SIDES])
    figures = figure_of(tried.flatten(0, 1))
    widths = read_width(figures).unflatten(0, (len(SIDES), len(content)))
    area = figures.sum((1, 2, 3)).unflatten(0, (len(SIDES), len(content)))
    broken = area < least_kept * area[SIDES.index(1)]
    off = (widths - log_width).abs().masked_fill(broken, float("inf"))
    # Where nothing fits, as in an empty image, the figure stays as it is.
    off[SIDES.index(1)] = torch.nan_to_num(off[SIDES.index(1)], nan=0.0, posinf=1e6)
    return tried[off.argmin(0), torch.arange(len(content), device=content.device)]
