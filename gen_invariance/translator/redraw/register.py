"""How one photograph has to be moved to lie like another of its class.

Pairs of images are registered by Gauss-Newton on the correlation of a robust feature, coarse to fine: the
inverse-compositional form of Lucas and Kanade (Baker and Matthews, "Lucas-Kanade 20 years on", IJCV 2004), with the
illumination of both images taken out as in the enhanced correlation coefficient (Evangelidis and Psarakis, PAMI 2008).
The feature is luminance less its local mean over its local deviation, within a window that leaves the border out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.translator.redraw.geometry import LIMITS, NAMES, move_photo, pixel_places

SIDES = (16, 32)
"""Pixels of the shorter side at which pairs are registered, coarse to fine."""

_ROUNDS = 8  # of Gauss-Newton at each size
_PAIRS = 512  # registered at most, half as many of different classes
_PRIOR = 0.02  # how much correlation a pose at half of its limits costs, so that nothing drifts where nothing is seen


def to_features(images: Tensor, side: int) -> Tensor:
    """Robust features (B, 1, S, S') of float images (B, C, H, W), S' and S in the proportions of the images."""
    height, width = images.shape[2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    light = images.mean(1, keepdim=True)
    if size != (height, width):
        light = F.interpolate(light, size=size, mode="bilinear", antialias=True)
    wide = side // 4 * 2 + 1
    mean = _box(light, wide)
    deviation = (_box(light.square(), wide) - mean.square()).clamp(min=0).sqrt()
    return (light - mean) / (deviation + 0.03)


def _box(images: Tensor, width: int) -> Tensor:
    return F.avg_pool2d(F.pad(images, (width // 2,) * 4, mode="reflect"), width, stride=1)


def _window(size: tuple[int, int], device: torch.device) -> Tensor:
    """Weights (H * W,) that sum to 1: full in the middle, nothing at the border."""
    across, down = pixel_places(size, device)
    weight = _bell(down / down.abs().max())[:, None] * _bell(across / across.abs().max())[None, :]
    return (weight / weight.sum()).flatten()


def _bell(places: Tensor) -> Tensor:
    return (1.25 * torch.cos(places * torch.pi / 2)).clamp(0, 1)


@torch.no_grad()
def register(moving: Tensor, fixed: Tensor, *, rounds: int = _ROUNDS) -> tuple[Tensor, Tensor, Tensor]:
    """Poses that bring images to others, and how alike they were and are.

    Args:
        moving: float (B, C, H, W) in [0, 1].
        fixed: as many of the same size.
        rounds: of Gauss-Newton at each of `SIDES`.

    Returns:
        Poses (B, 8) for `geometry.move_photo`, correlation before (B,), correlation after (B,).
    """
    poses = torch.zeros(len(moving), len(NAMES), device=moving.device)
    before = after = torch.zeros(len(moving), device=moving.device)
    for number, side in enumerate(SIDES):
        start, target = to_features(moving, side), to_features(fixed, side)
        poses, after = _descend(start, target, poses, rounds)
        if number == len(SIDES) - 1:
            window = _window((start.shape[2], start.shape[3]), start.device)
            before = (_standardise(start, window) * _standardise(target, window) * window).sum(1)
    return poses, before, after


def _descend(moving: Tensor, fixed: Tensor, poses: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """The best poses met on the way and their correlations."""
    window = _window((fixed.shape[2], fixed.shape[3]), fixed.device)
    target = _standardise(fixed, window)
    steepest = _steepest(fixed, target, window)
    weighted = steepest * window
    prior = _PRIOR / (LIMITS / 2).square().to(poses)
    hessian = weighted @ steepest.transpose(1, 2) + torch.diag(prior)
    best, best_value, best_score = poses, None, None
    for _ in range(rounds + 1):
        seen = _standardise(move_photo(moving, poses, mode="bilinear"), window)
        value = (seen * target * window).sum(1)
        score = value - (prior * poses.square()).sum(1) / 2
        if best_score is None or best_value is None:
            best_value, best_score = value, score
        else:
            better = score > best_score
            best = torch.where(better[:, None], poses, best)
            best_value, best_score = torch.where(better, value, best_value), torch.where(better, score, best_score)
        residual = seen - value[:, None] * target
        slope = (weighted @ residual[:, :, None]).squeeze(2) + prior * poses
        poses = poses - torch.linalg.solve(hessian, slope)
        poses = torch.maximum(torch.minimum(poses, LIMITS.to(poses)), -LIMITS.to(poses))
    assert best_value is not None  # noqa: S101  (the loop runs at least once)
    return best, best_value


def _standardise(images: Tensor, window: Tensor) -> Tensor:
    """Pixels (B, H * W) of mean 0 and variance 1 under the window."""
    flat = images.flatten(1)
    flat = flat - (flat * window).sum(1, keepdim=True)
    return flat / ((flat.square() * window).sum(1, keepdim=True) + 1e-8).sqrt()


def _steepest(fixed: Tensor, target: Tensor, window: Tensor) -> Tensor:
    """How the standardised `fixed` changes with each of the eight numbers, (B, 8, H * W), light and contrast aside."""
    across, down = pixel_places((fixed.shape[2], fixed.shape[3]), fixed.device)
    step = across[1] - across[0]
    padded = F.pad(target.view_as(fixed), (1, 1, 1, 1), mode="replicate")
    slope_x = ((padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / (2 * step))[:, 0]
    slope_y = ((padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / (2 * step))[:, 0]
    x, y = across[None, None, :], down[None, :, None]
    radial = slope_x * x + slope_y * y
    changes = [
        slope_x, slope_y, radial, slope_y * x - slope_x * y, slope_x * x - slope_y * y, slope_x * y + slope_y * x,
        -radial * x, -radial * y,
    ]  # fmt: skip
    stacked = torch.stack(changes, dim=1).flatten(2)
    stacked = stacked - (stacked * window).sum(2, keepdim=True)
    return stacked - (stacked * target[:, None] * window).sum(2, keepdim=True) * target[:, None]


@dataclass(frozen=True)
class Aligned:
    """What registering images of the same classes gave.

    Attributes:
        poses: (B, 8), one for each image asked about: how another image of its class has to be moved to lie like it;
            where they could not be aligned, that of another image, of its class where there is one.
        share: of the pairs that agree better, once registered, than 95 % of pairs of different classes; .05 by chance.
        gains: mean correlation before and after, of pairs of a class and of pairs of different classes.
        found: how many pairs were aligned.
    """

    poses: Tensor
    share: float
    gains: dict[str, float]
    found: int


def read_geometry(
    images: Tensor, labels: Tensor, groups: Tensor | None, *, rows: Tensor, generator: torch.Generator
) -> Aligned:
    """Relative poses of images of one class, and whether there is anything in them.

    Args:
        images: float (N, C, H, W) in [0, 1], small; the images to choose from.
        labels: int64 (N,).
        groups: int64 (N,), or None; pairs of different groups show more than pairs of one.
        rows: int64 (B,), the images to which another one is brought.
        generator: picks the other ones, on the CPU.
    """
    asked, rows = rows, rows[:_PAIRS]
    other, paired = _pick_partners(labels, groups, rows, generator, same=True)
    stranger, strange = _pick_partners(labels, None, rows[: _PAIRS // 2], generator, same=False)
    poses, before, after = _register_rows(images, other[paired], rows[paired])
    if not len(poses) or not bool(strange.any()):
        return Aligned(torch.zeros(len(asked), len(NAMES)), 0.0, {}, 0)
    _, null_before, null_after = _register_rows(images, stranger[strange], rows[: len(stranger)][strange])
    aligned = after > null_after.quantile(0.95)
    aligned_share = float(aligned.float().mean())
    aligned &= (poses.abs() < 0.999 * LIMITS.to(poses)).all(1)
    gains = {
        "same class before": before.mean(), "same class after": after.mean(),
        "other class before": null_before.mean(), "other class after": null_after.mean(),
    }  # fmt: skip
    found = torch.zeros(len(asked), dtype=torch.bool)
    found[paired.nonzero()[:, 0]] = aligned.cpu()
    every = torch.zeros(len(asked), len(NAMES))
    every[paired.nonzero()[:, 0]] = poses.cpu()
    _lend(every, found, labels[asked].cpu(), generator)
    return Aligned(every, aligned_share, {name: float(value) for name, value in gains.items()}, int(found.sum()))


def _register_rows(images: Tensor, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = [register(images[a], images[b]) for a, b in zip(moving.split(256), fixed.split(256), strict=True)]
    if not parts:
        return torch.zeros(0, len(NAMES)), torch.zeros(0), torch.zeros(0)
    poses, before, after = (torch.cat(each) for each in zip(*parts, strict=True))
    return poses, before, after


def _pick_partners(
    labels: Tensor, groups: Tensor | None, rows: Tensor, generator: torch.Generator, *, same: bool
) -> tuple[Tensor, Tensor]:
    """Another image for each of `rows`, of its class and another group or of another class, and where there is one."""
    labels = labels.cpu()
    group = torch.arange(len(labels)) if groups is None else groups.cpu()
    partners, there = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows), dtype=torch.bool)
    for number, row in enumerate(rows.tolist()):
        alike = labels == labels[row]
        eligible = ((alike & (group != group[row])) if same else ~alike).nonzero()[:, 0]
        if len(eligible):
            partners[number] = eligible[torch.randint(len(eligible), (1,), generator=generator)]
            there[number] = True
    return partners, there


def _lend(poses: Tensor, found: Tensor, labels: Tensor, generator: torch.Generator) -> None:
    """Give the rows that are not `found` the pose of one that is, of the same class where there is one."""
    for row in (~found).nonzero()[:, 0].tolist():
        lenders = (found & (labels == labels[row])).nonzero()[:, 0]
        lenders = lenders if len(lenders) else found.nonzero()[:, 0]
        if len(lenders):
            poses[row] = poses[lenders[torch.randint(len(lenders), (1,), generator=generator)]]
        else:
            poses[row] = 0
