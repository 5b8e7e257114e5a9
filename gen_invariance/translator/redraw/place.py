"""The place of a figure: its centre of mass, read off and moved to the middle."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_invariance.translator.redraw.congeal import move_by


def read_place(figures: Tensor) -> Tensor:
    """Centre of mass of figures (B, 1, H, W): x, y as shares of the sides from the centre, (B, 2); 0 where empty."""
    mass = figures.sum((1, 2, 3)).clamp(min=1e-6)
    found = []
    for axes, size in (((1, 2), figures.shape[3]), ((1, 3), figures.shape[2])):
        share = (torch.arange(size, device=figures.device, dtype=figures.dtype) + 0.5) / size - 0.5
        found.append((figures.sum(axes) * share).sum(1) / mass)
    return torch.stack(found, dim=1)


def to_the_centre(figures: Tensor, place: Tensor) -> Tensor:
    """Figures moved so that the point `place` (B, 2) comes to the centre; bilinear, zeros outside."""
    still = torch.eye(2, device=figures.device, dtype=figures.dtype).expand(len(figures), 2, 2)
    return move_by(figures, still, source=place)
