"""Stroke width and place of a figure: read off and changed.

A stroke of width w and length l has area w * l and an outline of about 2 * l, so width = 2 * area / outline. It is read
off content (`tone.take_out`), where it knows nothing of levels. The place is the centre of mass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.nuisance.thickness import dilate, erode
from gen_invariance.translator.redraw.congeal import move_by

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
    content: Tensor, log_width: Tensor, *, extract_figure: Callable[[Tensor], Tensor], least_kept: float = 0.3
) -> Tensor:
    """Content (B, C, H, W) dilated or eroded until the figure has that log stroke width (B,).

    Between whole pixels the two neighbouring results are blended. An erosion that would leave less than `least_kept` of
    the figure's area is not taken: thin strokes would break.
    """
    if not len(content):
        return content
    tried = torch.stack([dilate(content, side) if side > 0 else erode(content, -side) for side in SIDES])
    figures = extract_figure(tried.flatten(0, 1))
    widths = read_width(figures).unflatten(0, (len(SIDES), len(content)))
    area = figures.sum((1, 2, 3)).unflatten(0, (len(SIDES), len(content)))
    broken = area < least_kept * area[SIDES.index(1)]
    # Wider operations never give a smaller reading here, so the wanted width lies between two neighbours.
    widths = widths.masked_fill(broken, float("-inf")).cummax(0).values
    upper = (widths < log_width).sum(0).clamp(max=len(SIDES) - 1)
    lower = (upper - 1).clamp(min=0)
    rows = torch.arange(len(content), device=content.device)
    low, high = widths[lower, rows], widths[upper, rows]
    share = ((log_width - low) / (high - low)).clamp(0, 1)
    share = torch.where(low.isfinite() & (high > low), share, 1.0)[:, None, None, None]
    return torch.lerp(tried[lower, rows], tried[upper, rows], share)


def read_place(figures: Tensor) -> Tensor:
    """Centre of mass of figures (B, 1, H, W): x, y as shares of the sides from the centre, (B, 2); 0 where empty."""
    mass = figures.sum((1, 2, 3)).clamp(min=1e-6)
    centre = []
    for axes, size in (((1, 2), figures.shape[3]), ((1, 3), figures.shape[2])):
        share = (torch.arange(size, device=figures.device, dtype=figures.dtype) + 0.5) / size - 0.5
        centre.append((figures.sum(axes) * share).sum(1) / mass)
    return torch.stack(centre, dim=1)


def move_to_centre(figures: Tensor, place: Tensor) -> Tensor:
    """Figures moved so that the point `place` (B, 2) comes to the centre; bilinear, zeros outside."""
    still = torch.eye(2, device=figures.device, dtype=figures.dtype).expand(len(figures), 2, 2)
    return move_by(figures, still, source=place)
