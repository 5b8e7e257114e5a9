"""Pure measures of how good translations are: tensors in, numbers out; no network, no file, no class names.

Features and pixels come as float matrices, one row an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.errors import DataError, ShapeError

_BLOCK = 1 << 24  # entries of a distance matrix at a time
_EQUAL = 1e-6  # distances below this are rounding


def polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    """(x . y / D + 1)^3 of all pairs, float64 (N, M): the kernel of KID (Binkowski et al. 2018, section 4)."""
    return (first.double() @ second.double().T / first.shape[1] + 1) ** 3


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of `real` (N, D) and `fake` (M, D); about 0 for one distribution.

    Gretton et al. 2012, equation 3, with the cubic kernel of KID. It can be slightly negative.
    """
    if min(len(real), len(fake)) < 2:
        raise DataError(f"a kernel distance needs two images a side, got {len(real)} and {len(fake)}; give more images")
    return float(unread_kernel_distance(real, fake))


def unread_kernel_distance(real: Tensor, fake: Tensor) -> Tensor:
    """`kernel_distance` as a tensor () where the features are, for who takes many and reads them together."""
    within = []
    for rows in (real, fake):
        kernel = polynomial_kernel(rows, rows)
        within.append((kernel.sum() - kernel.diagonal().sum()) / (len(rows) * (len(rows) - 1)))
    return within[0] + within[1] - 2 * polynomial_kernel(real, fake).mean()


@dataclass(frozen=True)
class NeighbourScores:
    """Whose ball holds whom, by image; their means are precision, density, recall and coverage.

    Attributes:
        precision: (M,), 1 where a fake lies in the ball of any real image.
        density: (M,), how many real balls hold the fake, divided by k.
        recall: (N,), 1 where a real image lies in the ball of any fake.
        coverage: (N,), 1 where the ball of a real image holds any fake.
    """

    precision: Tensor
    density: Tensor
    recall: Tensor
    coverage: Tensor


def neighbour_scores(real: Tensor, fake: Tensor, *, neighbours: int = 5) -> NeighbourScores:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), image by image.

    From features `real` (N, D) and `fake` (M, D). The ball of an image reaches to its k-th nearest other image of its
    own side, border included.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise DataError(
            f"neighbour scores with {neighbours} neighbours need more than {neighbours} images a side, "
            f"got {len(real)} and {len(fake)}; give more images"
        )
    radius_real, radius_fake = (_distances(rows, rows).kthvalue(neighbours + 1, dim=1).values for rows in (real, fake))
    distance = _distances(real, fake)
    in_real = distance <= radius_real[:, None]
    return NeighbourScores(
        precision=in_real.any(0).double(),
        density=in_real.sum(0).double() / neighbours,
        recall=(distance <= radius_fake[None, :]).any(1).double(),
        coverage=in_real.any(1).double(),
    )


def copy_ratio(fake: Tensor, bank: Tensor, sources: Tensor) -> Tensor:
    """How near each fake is to its nearest training image, against how near that image is to another one: (M,).

    d(fake, b) / d(b, b'), b the nearest image of the bank to the fake, b' the nearest other one to b; the fake's own
    source, row `sources` (M,) of the bank or -1, counts in neither. A sharp copy of b gives 0; untouched images give
    about 1. Two equal images in the bank give 0 / 0 for a copy of them; that counts as 0.
    """
    if len(bank) < 3:
        raise DataError(f"near copies need at least 3 training images to compare with, got {len(bank)}")
    sources = sources.to(fake.device)
    between, neighbour = _two_nearest(bank)
    ratios = []
    block = max(1, _BLOCK // len(bank))
    for part, source in zip(fake.split(block), sources.split(block), strict=True):
        distance = _distances(part, bank)
        known = (source >= 0).nonzero()[:, 0]
        distance[known, source[known]] = float("inf")
        nearest, row = distance.min(1)
        others = torch.where(neighbour[row, 0] == source, between[row, 1], between[row, 0])
        ratios.append(torch.where(nearest < _EQUAL, 0.0, nearest / others))
    return torch.cat(ratios) if ratios else fake.new_zeros(0)


def _two_nearest(bank: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N, 2) and rows (N, 2) of the nearest and the second nearest other image of each row of `bank`."""
    values, indices = [], []
    for rows in torch.arange(len(bank), device=bank.device).split(max(1, _BLOCK // len(bank))):
        distance = _distances(bank[rows], bank)
        distance[torch.arange(len(rows)), rows] = float("inf")
        nearest = distance.topk(2, dim=1, largest=False)
        values.append(nearest.values)
        indices.append(nearest.indices)
    return torch.cat(values), torch.cat(indices)


def spread_of_draws(draws: Tensor) -> Tensor:
    """Mean distance between two draws of one image, root mean square over the D entries: (S, N, D) to (N,)."""
    count = len(draws)
    if count < 2:
        raise ShapeError(f"diversity needs at least two draws of each image, got {count}")
    between = _distances(draws.transpose(0, 1), draws.transpose(0, 1)) / draws.shape[2] ** 0.5
    return between.sum((1, 2)).double() / (count * (count - 1))


def spread_within_classes(rows: Tensor, labels: Tensor) -> float:
    """Mean distance, root mean square over the D entries, between two images of one class: (N, D), (N,)."""
    distance = _distances(rows, rows) / rows.shape[1] ** 0.5
    same = labels[:, None] == labels[None, :]
    same.fill_diagonal_(False)
    return float(distance[same].double().mean()) if same.any() else float("nan")


def resultant_length(degrees: Tensor) -> Tensor:
    """|mean of exp(i angle)| over the last axis: 1 for a frozen angle, about 0 for angles all around the circle."""
    angle = torch.deg2rad(degrees.double())
    return torch.hypot(angle.cos().mean(-1), angle.sin().mean(-1))


def between_class_share(styles: Tensor, labels: Tensor) -> float:
    """1 - (mean distance of two rows of one class) / (mean distance of any two rows); 0 if classes are alike.

    Both means leave out a row's distance to itself, so the expected value without any difference is 0 whatever the
    class sizes; 1 means that a class fixes the style. Classes weigh by their rows; those with one row are left out.
    """
    _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
    kept = sizes[classes] > 1
    member = F.one_hot(classes[kept]).double()
    member = member[:, member.sum(0) > 0]
    distance = _distances(styles[kept], styles[kept]).double()
    count = len(distance)
    total = distance.sum() / max(count * (count - 1), 1)
    if member.shape[1] < 2 or float(total) == 0:
        return float("nan") if member.shape[1] < 2 else 0.0
    size = member.sum(0)
    within = ((distance @ member) * member).sum(0) / (size * (size - 1))
    return float(1 - (within * size).sum() / count / total)


def kolmogorov_distance(first: Tensor, second: Tensor) -> float:
    """Largest distance between the empirical distribution functions of two samples, in [0, 1]."""
    from scipy.stats import ks_2samp  # takes half a second that most commands need not wait

    return float(ks_2samp(first.flatten().cpu(), second.flatten().cpu(), method="asymp").statistic)


CHANGES = ("level", "contrast", "sharpness", "place across", "place down", "size", "slant +", "slant ×")
"""What `describe_change` looks at."""


def describe_change(before: Tensor, after: Tensor) -> Tensor:
    """What a translation did to each image (N, C, H, W) in eight readable numbers (N, 8), see `CHANGES`.

    Differences of grey level, contrast, edge strength, centre and spread of the ink, and its orientation (the two
    components of the doubled angle, weighted by how elongated it is), each in standard deviations of what `before` and
    the change show of it together.
    """
    start = _moments(before)
    change = _moments(after) - start
    return change / (start.var(0) + change.var(0)).sqrt().clamp_min(1e-6)


def _moments(images: Tensor) -> Tensor:
    grey = images.double().mean(1)
    height, width = grey.shape[1:]
    level, contrast = grey.mean((1, 2)), grey.std((1, 2))
    sharpness = grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))
    # Ink is what differs from the border's grey, dark or light.
    border = torch.cat([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], 1).median(1).values
    ink = (grey - border[:, None, None]).abs() + 1e-9
    ink = ink / ink.sum((1, 2), keepdim=True)
    across = torch.linspace(-1, 1, width, dtype=ink.dtype, device=ink.device)
    down = torch.linspace(-1, 1, height, dtype=ink.dtype, device=ink.device)
    x, y = (ink.sum(1) * across).sum(1), (ink.sum(2) * down).sum(1)
    off_x, off_y = across - x[:, None], down - y[:, None]
    xx, yy = (ink.sum(1) * off_x**2).sum(1), (ink.sum(2) * off_y**2).sum(1)
    xy = (ink * off_y[:, :, None] * off_x[:, None, :]).sum((1, 2))
    size = (xx + yy).clamp_min(1e-12)
    return torch.stack([level, contrast, sharpness, x, y, size.sqrt(), (xx - yy) / size, 2 * xy / size], 1)


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distances of all rows, float64, so that the fast product form keeps the digits of near copies."""
    return torch.cdist(first.double(), second.double())
