"""How the object of a photograph lies in its frame: a small homography, as eight numbers.

A pose is a vector of the Lie algebra of homographies, so that half of it is half the way (`exp(strength * pose)`), its
negative undoes it, and small poses add. Coordinates are isotropic: x to the right and y down from the centre, in
halves of the shorter side, so a pose means the same at every size. A pose says where each pixel of the result is taken
from; what would come from outside is the reflection of the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("across", "down", "scale", "turn", "stretch", "slant", "keystone across", "keystone down")
"""What the eight numbers are: shifts in half sides, log scale, radians, log stretch of x against y, slant in half sides
a half side (symmetric), and how fast the scale grows across and down, a half side."""

_GENERATORS = torch.tensor(
    [
        [[0, 0, 1], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 1], [0, 0, 0]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 0]],
        [[0, -1, 0], [1, 0, 0], [0, 0, 0]],
        [[1, 0, 0], [0, -1, 0], [0, 0, 0]],
        [[0, 1, 0], [1, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 0], [1, 0, 0]],
        [[0, 0, 0], [0, 0, 0], [0, 1, 0]],
    ],
    dtype=torch.float32,
)
LIMITS = torch.tensor([0.4, 0.4, 0.4, 0.6, 0.25, 0.25, 0.2, 0.2])
"""Beyond these an object may leave the frame or its meaning: shifts of a fifth of the side, scales of .67 to 1.5, turns
of 34 degrees. Readings beyond are failures of the reading."""

AROUND = torch.tensor([0.2, 0.2, 0.15, 0.21, 0.05, 0.1, 0.04, 0.04])
"""Half widths of what is drawn around an image whose pose cannot be read: shifts of a tenth of the side, scales of .86
to 1.16, turns of 12 degrees, slants of .1. Set by hand on traffic signs."""


def draw_around(count: int, *, generator: torch.Generator) -> Tensor:
    """Poses (count, 8), uniform within `AROUND`, on the CPU."""
    return AROUND * (2 * torch.rand(count, len(NAMES), generator=generator) - 1)


def pose_to_matrix(poses: Tensor) -> Tensor:
    """Homographies (B, 3, 3) of poses (B, 8): from places in the result to places in the image."""
    return torch.linalg.matrix_exp(torch.einsum("bk,kij->bij", poses, _GENERATORS.to(poses)))


def pixel_places(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Isotropic coordinates of the columns (W,) and of the rows (H,)."""
    height, width = size
    shorter = min(size)
    across = (torch.arange(width, device=device) + 0.5 - width / 2) * 2 / shorter
    down = (torch.arange(height, device=device) + 0.5 - height / 2) * 2 / shorter
    return across, down


def sampling_grid(poses: Tensor, size: tuple[int, int]) -> Tensor:
    """Where each pixel comes from, (B, H, W, 2), as `grid_sample` wants it (without aligned corners)."""
    height, width = size
    matrix = pose_to_matrix(poses)
    across, down = pixel_places(size, poses.device)
    # matrix @ (x, y, 1) without a tensor of points: columns and rows are added by broadcasting.
    places = (
        matrix[:, :, 0, None, None] * across[None, None, None, :]
        + matrix[:, :, 1, None, None] * down[None, None, :, None]
        + matrix[:, :, 2, None, None]
    )
    places = places[:, :2] / places[:, 2:].clamp(min=0.1)
    shares = poses.new_tensor([min(size) / width, min(size) / height])
    return places.permute(0, 2, 3, 1) * shares


def move_photo(images: Tensor, poses: Tensor, *, mode: str = "bicubic") -> Tensor:
    """Images (B, C, H, W) moved by `poses` (B, 8), reflected at their borders; may overshoot their range a little."""
    grid = sampling_grid(poses, (images.shape[2], images.shape[3]))
    return F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)


def describe_poses(poses: Tensor) -> dict[str, Tensor]:
    """What poses (B, 8) do to an image, in readable units: shares of the shorter side, a factor, degrees, a slope."""
    across, down, scale, turn, _, slant, _, _ = poses.unbind(1)
    return {
        "shift across": -across / 2,
        "shift down": -down / 2,
        "scale": (-scale).exp(),
        "turn": torch.rad2deg(turn),
        "slant": -slant,
    }
