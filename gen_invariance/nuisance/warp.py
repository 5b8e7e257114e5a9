"""Images moved by a linear map, one for each; on a GPU without asking it for anything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kornia.geometry.transform import warp_affine
from torch import Tensor


def warp(images: Tensor, matrix: Tensor, *, mode: str = "bilinear") -> Tensor:
    """`images` (B, C, H, W) moved by `matrix` (B, 2, 3), which takes a point x, y in pixels to where it goes.

    Zeros outside; differentiable in both. `mode` is "bilinear", "bicubic" or "nearest". On a CPU kornia does it. It
    inverts matrices by linear algebra, for which a GPU has to be waited for.
    """
    if images.device.type == "cpu":
        size = (images.shape[-2], images.shape[-1])
        return warp_affine(images, matrix, size, mode=mode, padding_mode="zeros", align_corners=True)
    return warp_written_out(images, matrix, mode=mode)


def warp_written_out(images: Tensor, matrix: Tensor, *, mode: str = "bilinear") -> Tensor:
    """As `warp`, the inverse written out; the two differ by about 5e-6."""
    height, width = images.shape[-2:]
    inverse = _written_out_inverse(matrix[:, :, :2])
    # From pixels p to -1 ... 1 and back: n = 2 p / (side - 1) - 1.
    half = torch.stack([torch.full_like(matrix[:, 0, 0], (side - 1) / 2) for side in (width, height)], dim=1)
    scaled = inverse * half[:, None, :] / half[:, :, None].clamp(min=0.5)
    start = (inverse @ (half - matrix[:, :, 2])[:, :, None]).squeeze(2) / half.clamp(min=0.5) - 1
    grid = F.affine_grid(torch.cat([scaled, start[:, :, None]], dim=2), list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=True)


def turned(degrees: Tensor, images: Tensor) -> Tensor:
    """The matrices (B, 2, 3) that turn `images` about their centre, counter-clockwise on the screen."""
    radians = torch.deg2rad(degrees).to(images.dtype)
    cosine, sine = radians.cos(), radians.sin()
    turn = torch.stack([cosine, sine, -sine, cosine], dim=1).unflatten(1, (2, 2))
    middle = torch.stack([torch.full_like(cosine, (side - 1) / 2) for side in images.shape[-1:-3:-1]], dim=1)
    shift = middle - (turn @ middle[:, :, None]).squeeze(2)
    return torch.cat([turn, shift[:, :, None]], dim=2)


def inverse_2x2(matrix: Tensor) -> Tensor:
    """The inverses of `matrix` (B, 2, 2); on a CPU by linear algebra, elsewhere written out, see `warp`."""
    return torch.linalg.inv(matrix) if matrix.device.type == "cpu" else _written_out_inverse(matrix)


def _written_out_inverse(matrix: Tensor) -> Tensor:
    (a, b), (c, d) = (row.unbind(1) for row in matrix.unbind(1))
    adjugate = torch.stack([d, -b, -c, a], dim=1).unflatten(1, (2, 2))
    return adjugate / (a * d - b * c)[:, None, None]
