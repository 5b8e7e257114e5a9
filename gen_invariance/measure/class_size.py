"""How a per-class measure moves with class size: a slope and a rank correlation with intervals.

Missing values are NaN: they are left out and counted, never taken for zero. A constant has no correlation: NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from gen_invariance.errors import RangeError, ShapeError
from gen_invariance.stats import Estimate, check_level, draw_rows, percentile_interval, to_floats

_BLOCK = 2**22  # numbers in memory at once while classes are resampled


@dataclass(frozen=True)
class ClassSizeAssociation:
    """How a per-class measure moves with class size.

    Attributes:
        slope: change of the measure for a tenfold class size (least squares on log10 of the size).
        intercept: the fitted measure at class size 1, so a figure can draw the line.
        spearman: rank correlation of class size and measure, in [-1, 1].
        used: classes (over all seeds) that took part.
        dropped: classes left out because their measure is NaN or they have no training image.
        lines: float64 (S, 2), intercept and slope of each resample, for a band around the fitted line.
    """

    slope: Estimate
    intercept: float
    spearman: Estimate
    used: int
    dropped: int
    lines: NDArray[np.float64]


def class_size_association(
    counts: ArrayLike,
    values: ArrayLike,
    *,
    generator: torch.Generator,
    resamples: int = 2000,
    level: float = 0.95,
) -> ClassSizeAssociation:
    """Slope and rank correlation of a per-class measure against log10 class size, with bootstrap intervals.

    Seeds stacked as (R, K) are pooled into one cloud of R*K points; each resample draws K classes with replacement
    within each seed, so no seed's weight changes. The interval therefore speaks of other classes, not of other seeds.

    Args:
        counts: training images of each class, (K,) or (R, K); (K,) is shared by all seeds.
        values: the measure, (K,) or (R, K), any unit; NaN where it is unknown.
        generator: draws the resamples.
        resamples: how many; each gives one line and one correlation.
        level: confidence of the intervals, in (0, 1).

    Raises:
        ShapeError: shapes do not fit.
        RangeError: a negative class size.
        SettingsError: `level` outside (0, 1) or fewer than one resample.

    Example:
        >>> import torch
        >>> from gen_invariance import class_size_association
        >>> counts, ekld = [200, 60, 20, 5], [0.1, 0.2, 0.4, 0.9]
        >>> found = class_size_association(counts, ekld, generator=torch.Generator().manual_seed(0))
        >>> bool(found.slope.value < 0)
        True
    """
    check_level(level)
    sizes, measured = _stacked(counts, values)
    known = np.isfinite(measured) & (sizes > 0)
    logs = np.log10(np.where(known, sizes, 1))
    measured = np.where(known, measured, np.nan)
    drawn = draw_rows(sizes.shape[1], groups=len(sizes), resamples=resamples, generator=generator)
    block = max(1, _BLOCK // max(sizes.size, 1))
    pieces = [
        _line_and_rank(*_take(logs, measured, drawn[start : start + block])) for start in range(0, resamples, block)
    ]
    lines, ranks = (np.concatenate(column) for column in zip(*pieces, strict=True))
    line, rank = _line_and_rank(logs.reshape(1, -1), measured.reshape(1, -1))
    return ClassSizeAssociation(
        slope=percentile_interval(float(line[0, 1]), lines[:, 1], level),
        intercept=float(line[0, 0]),
        spearman=percentile_interval(float(rank[0]), ranks, level),
        used=int(known.sum()),
        dropped=int((~known).sum()),
        lines=lines,
    )


def _stacked(counts: Any, values: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Class sizes and measures, both (R, K)."""
    sizes, measured = np.atleast_2d(to_floats(counts)), np.atleast_2d(to_floats(values))
    if sizes.shape[0] == 1 and sizes.shape[1:] == measured.shape[1:]:
        sizes = np.broadcast_to(sizes, measured.shape)
    if sizes.shape != measured.shape or sizes.ndim != 2:
        raise ShapeError(
            f"class sizes {np.shape(counts)} do not fit measures {np.shape(values)}; give (K,) or (R, K) for both"
        )
    if (sizes < 0).any():
        raise RangeError(f"class sizes must not be negative, got {sizes.min():g}; give numbers of training images")
    return sizes, measured


def _take(
    logs: NDArray[np.float64], measured: NDArray[np.float64], drawn: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Resampled classes of all seeds side by side, (S, R*K) each."""
    seed = np.arange(len(logs))[None, :, None]
    return logs[seed, drawn].reshape(len(drawn), -1), measured[seed, drawn].reshape(len(drawn), -1)


def _line_and_rank(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least-squares (intercept, slope) as (S, 2), and Spearman's correlation (S,), of each row; NaN in `y` left out."""
    weight = np.isfinite(y).astype(np.float64)
    slope, intercept, _ = _regression(x, np.nan_to_num(y), weight)
    # Left-out points get rank NaN in both, so ranks are those of the points that remain.
    ranks_x = np.nan_to_num(rankdata(np.where(weight > 0, x, np.nan), axis=1, nan_policy="omit"))
    ranks_y = np.nan_to_num(rankdata(y, axis=1, nan_policy="omit"))
    _, _, correlation = _regression(ranks_x, ranks_y, weight)
    return np.stack([intercept, slope], axis=1), correlation


def _regression(
    x: NDArray[np.float64], y: NDArray[np.float64], weight: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Slope, intercept and correlation of each row, points of weight 0 left out; NaN where a side is constant."""
    with np.errstate(divide="ignore", invalid="ignore"):
        total = weight.sum(axis=1)
        mean_x, mean_y = (weight * x).sum(axis=1) / total, (weight * y).sum(axis=1) / total
        dx, dy = weight * (x - mean_x[:, None]), weight * (y - mean_y[:, None])
        square_x, square_y = (dx**2).sum(axis=1), (dy**2).sum(axis=1)
        # Rounding leaves crumbs where the exact sum of squares is zero.
        square_x[square_x <= 1e-24 * total * np.maximum(mean_x**2, 1e-300)] = np.nan
        correlation_y = np.where(square_y <= 1e-24 * total * np.maximum(mean_y**2, 1e-300), np.nan, square_y)
        products = (dx * dy).sum(axis=1)
        slope = products / square_x
        return slope, mean_y - slope * mean_x, products / np.sqrt(square_x * correlation_y)
