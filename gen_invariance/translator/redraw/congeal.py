"""Joint alignment of classes with a density of poses that all of them share.

Every image of a class is brought to the class's template by the pose (rotation, scale) that fits best, the template is
the mean of the aligned images, and so on in turn: congealing. What makes it work on small and symmetric classes is that
the density of poses is class-agnostic, so it is pooled over classes and used as the prior of each image's pose. After
Miller, Matsakis and Viola: "Learning from one example through shared densities on transforms" (CVPR 2000); here by
expectation-maximisation on a grid of poses.

    q_i(pose) ~ p(pose - shift_c) exp(sharpness * correlation(undo(x_i, pose), template_c))

The pose of a class's template is free; `shift_c` fixes it so that the class's histogram of angles fits the pooled one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.nuisance.warp import warp


def pose_matrix(poses: Tensor) -> Tensor:
    """What poses (B, 3) - degrees, log scale, slope - do to points, (B, 2, 2): they lean, then grow, then turn.

    Points are x to the right and y down in pixels; positive angles turn counter-clockwise, a slope of 1 leans to the
    right by a pixel for each pixel of height.
    """
    degrees, log_scale, slope = poses.unbind(1)
    radians = torch.deg2rad(degrees)
    cosine, sine, zero, one = radians.cos(), radians.sin(), torch.zeros_like(slope), torch.ones_like(slope)
    turn = torch.stack([cosine, sine, -sine, cosine], dim=1).unflatten(1, (2, 2))
    lean = torch.stack([one, -slope, zero, one], dim=1).unflatten(1, (2, 2))
    return log_scale.exp()[:, None, None] * turn @ lean


def move_by(
    images: Tensor,
    matrix: Tensor,
    *,
    source: Tensor | None = None,
    target: Tensor | None = None,
    mode: str = "bilinear",
) -> Tensor:
    """Images (B, C, H, W) moved by a linear map (B, 2, 2) that takes the point `source` to the point `target`.

    Points (B, 2) are x, y as shares of the sides, from the centre; None is the centre. Zeros outside, differentiable.
    `mode` "bicubic" blurs less, which counts for images that were moved before, and overshoots a little.
    """
    count, _, height, width = images.shape
    size = torch.stack([torch.full_like(matrix[0, 0, 0], side) for side in (width, height)])
    middle = (size - 1) / 2
    start, end = (middle.expand(count, 2) if point is None else middle + point * size for point in (source, target))
    shift = end - (matrix @ start[:, :, None]).squeeze(2)
    full = torch.cat([matrix, shift[:, :, None]], dim=2)
    return warp(images, full, mode=mode)


@dataclass(frozen=True)
class PoseGrid:
    """The poses that are tried: every angle with every scale and every slope.

    Attributes:
        step: degrees between angles; they cover the circle.
        scales: factors, ascending, 1 among them.
        slopes: of the shear, ascending, 0 among them; alone it leaves shears out.
    """

    step: float = 7.5
    scales: tuple[float, ...] = (0.85, 1.0, 1.18)
    slopes: tuple[float, ...] = (0.0,)

    @property
    def angles(self) -> Tensor:
        """Degrees, (A,), from -180."""
        return torch.arange(-180.0, 180.0, self.step)

    @property
    def upright(self) -> int:
        """Index of the pose that changes nothing."""
        angle_and_scale = len(self.angles) // 2 * len(self.scales) + self.scales.index(1.0)
        return angle_and_scale * len(self.slopes) + self.slopes.index(0.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of angles, scales and slopes."""
        return len(self.angles), len(self.scales), len(self.slopes)

    def undone(self, images: Tensor) -> Tensor:
        """Each image with each pose undone, standardised: (N, C, H, W) to (N, A * S * L, C * H * W) of unit norm."""
        count, channels, height, width = images.shape
        values = (self.angles, torch.tensor(self.scales).log(), torch.tensor(self.slopes))
        poses = torch.cartesian_prod(*values).to(images)
        # A pose moves all images alike, so images are channels of one picture and each pose is computed once.
        picture = images.reshape(1, count * channels, height, width).expand(len(poses), -1, -1, -1)
        turned = move_by(picture, torch.linalg.inv(pose_matrix(poses)))
        flat = turned.unflatten(1, (count, channels)).flatten(2).transpose(0, 1)
        return F.normalize(flat - flat.mean(2, keepdim=True), dim=2).contiguous()


@dataclass(frozen=True)
class Congealed:
    """What `congeal` found.

    Attributes:
        poses: of each image, one tensor (N_c, 3) for each class: degrees in [-180, 180) relative to the class's
            upright, log scale and slope relative to the class's mean.
        density: probability of each angle of the grid, (A,), shared by the classes.
        concentration: mean resultant length of the density, in [0, 1]; 0 where every angle is as likely.
    """

    poses: list[Tensor]
    density: Tensor
    concentration: float


@torch.no_grad()
def congeal(
    classes: Sequence[Tensor],
    *,
    generator: torch.Generator,
    grid: PoseGrid | None = None,
    density: Tensor | None = None,
    sharpness: float = 30.0,
    starts: int = 8,
    rounds: int = 25,
) -> Congealed:
    """Align the images (N_c, C, H, W) of each class, and learn the shared density of their angles.

    Args:
        classes: images of one size; 16 to 32 pixels are enough.
        generator: picks the images that templates start from.
        grid: poses to try.
        density: (A,), fixed; None learns it. Fix one learned on large classes to align small ones.
        sharpness: how strongly a better correlation with the template counts.
        starts: templates tried for each class: the mean image, and single images.
        rounds: of expectation-maximisation over all classes.
    """
    grid = grid or PoseGrid()
    variants = [grid.undone(images) for images in classes]
    templates = [_first_template(posed, grid, sharpness, starts, generator) for posed in variants]
    angles, others = len(grid.angles), len(grid.scales) * len(grid.slopes)
    learned = density is None
    shared = torch.full((angles,), 1 / angles) if learned else density
    shifts = [0] * len(classes)
    sizes = torch.tensor([float(len(images)) for images in classes])
    posteriors: list[Tensor] = []
    for round_ in range(rounds):
        posteriors = []
        for label, posed in enumerate(variants):
            # In the first round nothing is known of the shifts, so nothing is assumed of the density either.
            prior = shared.roll(shifts[label]) if round_ else torch.full((angles,), 1 / angles)
            posterior = (sharpness * (posed @ templates[label]) + prior.log().repeat_interleave(others)).softmax(1)
            templates[label] = F.normalize(torch.einsum("ng,ngd->d", posterior, posed), dim=0)
            posteriors.append(posterior.unflatten(1, grid.shape))
        histograms = torch.stack([_smooth(posterior.sum((2, 3)).mean(0), grid.step) for posterior in posteriors])
        pooled, shifts = _agree(histograms, sizes, grid, target=None if learned else shared)
        if learned:
            shared = 0.95 * pooled + 0.05 / angles
    return _read_out(posteriors, shifts, shared, grid)


def _first_template(
    variants: Tensor, grid: PoseGrid, sharpness: float, starts: int, generator: torch.Generator
) -> Tensor:
    """The best of several congealings of one class alone: its mean image and single images as first templates."""
    upright, flat = variants[:, grid.upright], variants.flatten(0, 1)
    chosen = torch.randint(len(variants), (starts - 1,), generator=generator)
    templates = torch.cat([F.normalize(upright.mean(0, keepdim=True), dim=1), upright[chosen]])

    def agreement() -> Tensor:
        """Of every image in every pose with every template, (N, G, starts)."""
        return sharpness * (flat @ templates.T).unflatten(0, variants.shape[:2])

    for _ in range(10):
        posterior = agreement().softmax(1).flatten(0, 1)
        templates = F.normalize(posterior.T @ flat, dim=1)
    return templates[agreement().logsumexp(1).mean(0).argmax()]


def _smooth(histogram: Tensor, step: float, width: float = 8.0) -> Tensor:
    """Circular histogram (A,) blurred by a Gaussian of `width` degrees."""
    count = len(histogram)
    kernel = torch.exp(-0.5 * ((torch.arange(count) - count // 2) * step / width) ** 2).roll(-(count // 2))
    blurred = torch.fft.irfft(torch.fft.rfft(histogram) * torch.fft.rfft(kernel / kernel.sum()), n=count)
    return blurred.clamp(min=0) / blurred.clamp(min=0).sum()


def _agree(histograms: Tensor, sizes: Tensor, grid: PoseGrid, *, target: Tensor | None) -> tuple[Tensor, list[int]]:
    """The pooled histogram, centred, and the shift of each class that makes its own fit it (or fit `target`)."""
    pooled = target if target is not None else histograms[histograms.square().sum(1).argmax()]
    shifts: list[int] = []
    for _ in range(4 if target is None else 1):
        # Circular cross-correlation of every class with the pooled histogram, all shifts at once.
        spectrum = torch.fft.rfft(histograms) * torch.fft.rfft(pooled).conj()
        shifts = torch.fft.irfft(spectrum, n=histograms.shape[1]).argmax(1).tolist()
        if target is None:
            moved = [histogram.roll(-shift) for histogram, shift in zip(histograms, shifts, strict=True)]
            pooled = (torch.stack(moved) * sizes[:, None]).sum(0) / sizes.sum()
    if target is not None:
        return pooled, shifts
    centre = round(math.degrees(_circular_mean(grid.angles, pooled)[0]) / grid.step)
    return pooled.roll(-centre), [(shift + centre) % len(pooled) for shift in shifts]


def _circular_mean(degrees: Tensor, weights: Tensor) -> tuple[float, float]:
    """Mean angle in radians, and resultant length in [0, 1]."""
    radians = torch.deg2rad(degrees)
    x, y = float((weights * radians.cos()).sum()), float((weights * radians.sin()).sum())
    return math.atan2(y, x), math.hypot(x, y) / float(weights.sum())


def _read_out(posteriors: list[Tensor], shifts: list[int], shared: Tensor, grid: PoseGrid) -> Congealed:
    poses = []
    for posterior, shift in zip(posteriors, shifts, strict=True):
        best = grid.angles[posterior.sum((2, 3)).argmax(1)]
        degrees = (best - shift * grid.step + 180) % 360 - 180
        log_scale = posterior.sum((1, 3)) @ torch.tensor(grid.scales).log()
        slope = posterior.sum((1, 2)) @ torch.tensor(grid.slopes)
        poses.append(torch.stack([degrees, log_scale - log_scale.mean(), slope - slope.mean()], dim=1))
    return Congealed(poses, shared, _circular_mean(grid.angles, shared)[1])
