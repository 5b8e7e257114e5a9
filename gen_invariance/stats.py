"""Intervals, paired tests over seeds, and how a per-class measure moves with class size.

Everything here is a pure function of arrays (numpy, or torch tensors, which are copied to the CPU). Missing values
are NaN: they are left out and counted, never taken for zero. Where a figure cannot be known (one seed has no
spread, a constant has no correlation) the answer is NaN, not an exception.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit
from scipy.stats import rankdata

from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.run import named_generator

_EXACT_UP_TO = 12  # 2**12 sign patterns of paired differences are enumerated; above that they are drawn
_DRAWN_FLIPS = 10_000
_BLOCK = 2**22  # numbers held at once while signs are flipped or rows are resampled

Numbers: TypeAlias = float | NDArray[np.float64]


@dataclass(frozen=True)
class MeanInterval:
    """A mean and its two-sided Student interval, mean ± half_width, over `count` values that are not NaN."""

    mean: Numbers
    half_width: Numbers
    count: Numbers

    @property
    def low(self) -> Numbers:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> Numbers:
        """Upper end of the interval."""
        return self.mean + self.half_width


@dataclass(frozen=True)
class PairedDifference(MeanInterval):
    """Mean of `a - b` over pairs, with the two-sided p-values of the paired t-test and of flipped signs."""

    t_p_value: Numbers
    permutation_p_value: Numbers


@dataclass(frozen=True)
class BootstrapInterval:
    """A statistic of the data and the percentile interval of the same statistic over resampled rows."""

    estimate: float
    low: float
    high: float
    resamples: int  # resamples on which the statistic was defined

    def __str__(self) -> str:
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"


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

    slope: BootstrapInterval
    intercept: float
    spearman: BootstrapInterval
    used: int
    dropped: int
    lines: NDArray[np.float64]


def mean_interval(values: ArrayLike, level: float = 0.95) -> MeanInterval:
    """Mean and Student interval over the last axis of `values` (..., R), NaN left out.

    One value has a mean and a NaN half-width; no value gives NaN and count 0. A vector gives Python floats.

    Raises:
        SettingsError: `level` outside (0, 1).

    Example:
        >>> interval = mean_interval([0.5, 0.6, 0.7])
        >>> round(interval.mean, 3), round(interval.half_width, 3), interval.count
        (0.6, 0.248, 3)
    """
    _check_level(level)
    mean, half_width, count, _ = _student(_array(values), level)
    return MeanInterval(_plain(mean), _plain(half_width), _plain(count))


def paired_difference(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, *, generator: torch.Generator | None = None
) -> PairedDifference:
    """Mean of `a - b` over the last axis (..., R), pairs with a NaN left out.

    The t-test assumes normal differences. The second p-value does not: it is the share of all 2**n ways to flip the
    signs of the differences that give a mean at least as far from zero, exact up to n = 12 pairs, over 10,000
    drawn flips above. It cannot fall below 2 / 2**n: .25 for three pairs, .0625 for five. Differences that are all
    alike have no spread: their half-width is 0, and the t-test's p is 0 (1 when they are all zero).

    Args:
        a: figures of one method, one for each seed.
        b: figures of the other on the same seeds, same shape.
        level: confidence of the interval, in (0, 1).
        generator: draws flips when there are more than 12 pairs; a fixed stream when left out.

    Raises:
        ShapeError: `a` and `b` differ in shape.
        SettingsError: `level` outside (0, 1).
    """
    _check_level(level)
    first, second = _array(a), _array(b)
    if first.shape != second.shape:
        raise ShapeError(f"pairs need equal shapes, got {first.shape} and {second.shape}; align them by seed first")
    differences = first - second
    mean, half_width, count, standard_error = _student(differences, level)
    with np.errstate(divide="ignore", invalid="ignore"):
        t_value = np.abs(mean) / standard_error
        t_p_value = 2 * stdtr(np.maximum(count - 1, 1), -t_value)
    t_p_value = np.where((standard_error == 0) & (mean == 0), 1.0, t_p_value)
    flipped = _sign_flip_p_value(differences.reshape(-1, differences.shape[-1]), generator=generator)
    return PairedDifference(*map(_plain, (mean, half_width, count, t_p_value, flipped.reshape(mean.shape))))


def least_p_value(pairs: int) -> float:
    """The smallest two-sided p that flipped signs of so many pairs can give (see `paired_difference`); NaN for none.

    >>> least_p_value(5), least_p_value(3)
    (0.0625, 0.25)
    """
    if pairs < 1:
        return float("nan")
    return max(2.0 ** (1 - pairs), 1 / (_DRAWN_FLIPS + 1) if pairs > _EXACT_UP_TO else 0.0)


def bootstrap_interval(
    rows: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    generator: torch.Generator,
    resamples: int = 2000,
    level: float = 0.95,
) -> BootstrapInterval:
    """Percentile bootstrap (Efron 1979) of `statistic` over the rows of `rows` (N, ...).

    Args:
        rows: the sample; rows are drawn with replacement.
        statistic: maps a stack of samples (S, N, ...) to one number each, (S,); called on blocks of resamples.
        generator: draws the rows; the same state gives the same interval.
        resamples: how many samples are drawn.
        level: confidence, in (0, 1).

    Raises:
        ShapeError: no row.
        SettingsError: `level` outside (0, 1) or fewer than one resample.
    """
    _check_level(level)
    sample = _array(rows)
    if sample.ndim == 0 or len(sample) == 0:
        raise ShapeError(f"a bootstrap needs at least one row, got shape {sample.shape}; give rows on the first axis")
    drawn = _draw_rows(1, len(sample), resamples=resamples, generator=generator)[:, 0]
    block = max(1, _BLOCK // sample.size)
    pieces = [statistic(sample[drawn[start : start + block]]) for start in range(0, resamples, block)]
    return _percentiles(float(statistic(sample[None])[0]), np.concatenate(pieces), level)


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
    """
    _check_level(level)
    sizes, measured = _stacked(counts, values)
    known = np.isfinite(measured) & (sizes > 0)
    logs = np.log10(np.where(known, sizes, 1))
    measured = np.where(known, measured, np.nan)
    drawn = _draw_rows(*sizes.shape, resamples=resamples, generator=generator)
    block = max(1, _BLOCK // max(sizes.size, 1))
    pieces = [
        _line_and_rank(*_take(logs, measured, drawn[start : start + block])) for start in range(0, resamples, block)
    ]
    lines, ranks = (np.concatenate(column) for column in zip(*pieces, strict=True))
    line, rank = _line_and_rank(logs.reshape(1, -1), measured.reshape(1, -1))
    return ClassSizeAssociation(
        slope=_percentiles(float(line[0, 1]), lines[:, 1], level),
        intercept=float(line[0, 0]),
        spearman=_percentiles(float(rank[0]), ranks, level),
        used=int(known.sum()),
        dropped=int((~known).sum()),
        lines=lines,
    )


def _array(values: Any) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _plain(value: NDArray[Any]) -> Numbers:
    """A zero-dimensional array as a Python number, anything else as it is."""
    return value.item() if np.ndim(value) == 0 else value


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise SettingsError(f"level must lie between 0 and 1, got {level}; 0.95 is the usual choice")


def _student(values: NDArray[np.float64], level: float) -> tuple[NDArray[Any], ...]:
    """Mean, half-width, count and standard error over the last axis, NaN left out."""
    known = np.isfinite(values)
    count = known.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(known, values, 0).sum(axis=-1) / count
        deviations = np.where(known, values - mean[..., None], 0)
        variance = (deviations**2).sum(axis=-1) / (count - 1)
        standard_error = np.where(count > 1, np.sqrt(np.abs(variance) / count), np.nan)
    quantile = stdtrit(np.maximum(count - 1, 1), (1 + level) / 2)
    return mean, quantile * standard_error, count, standard_error


def _sign_flip_p_value(differences: NDArray[np.float64], *, generator: torch.Generator | None) -> NDArray[np.float64]:
    """Two-sided p of every row of (M, R) under flipped signs; a missing pair is a zero, which no flip changes."""
    known = np.isfinite(differences)
    count = known.sum(axis=1)
    # Known pairs first, so that rows with few pairs are enumerated however wide the matrix is.
    order = np.argsort(~known, axis=1, kind="stable")
    packed = np.take_along_axis(np.where(known, differences, 0), order, axis=1)
    p_value = np.full(len(differences), np.nan)
    for rows, signs, added in _sign_patterns(count, generator=generator):
        width = signs.shape[1]
        block = max(1, _BLOCK // len(signs))
        for start in range(0, len(rows), block):
            part = packed[rows[start : start + block], :width]
            observed = np.abs(part.sum(axis=1))
            slack = 1e-12 * np.abs(part).sum(axis=1)  # equal sums may differ in their last bits
            hits = (np.abs(signs @ part.T) >= observed - slack).sum(axis=0)
            p_value[rows[start : start + block]] = (hits + added) / (len(signs) + added)
    return p_value


def _sign_patterns(
    count: NDArray[np.int64], *, generator: torch.Generator | None
) -> list[tuple[NDArray[np.int64], NDArray[np.float64], int]]:
    """Row numbers, sign patterns (P, n), and 1 where patterns are drawn (the observed one then counts as drawn)."""
    few, many = np.flatnonzero((count > 0) & (count <= _EXACT_UP_TO)), np.flatnonzero(count > _EXACT_UP_TO)
    patterns = []
    if len(few):
        width = int(count[few].max())
        bits = np.arange(2**width)[:, None] >> np.arange(width) & 1
        patterns.append((few, 1.0 - 2 * bits, 0))
    if len(many):
        generator = generator or named_generator(0, "sign flips")
        bits = torch.randint(2, (_DRAWN_FLIPS, int(count[many].max())), generator=generator).numpy()
        patterns.append((many, 1.0 - 2 * bits, 1))
    return patterns


def _draw_rows(groups: int, size: int, *, resamples: int, generator: torch.Generator) -> NDArray[np.int64]:
    """Row numbers drawn with replacement, int64 (resamples, groups, size)."""
    if resamples < 1:
        raise SettingsError(f"resamples must be at least 1, got {resamples}; 2000 is the usual choice")
    return torch.randint(max(size, 1), (resamples, groups, size), generator=generator).numpy()


def _stacked(counts: Any, values: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Class sizes and measures, both (R, K)."""
    sizes, measured = np.atleast_2d(_array(counts)), np.atleast_2d(_array(values))
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


def _percentiles(estimate: float, resampled: NDArray[np.float64], level: float) -> BootstrapInterval:
    """Percentile interval over the resamples on which the statistic is defined."""
    defined = resampled[np.isfinite(resampled)]
    if not len(defined) or not np.isfinite(estimate):
        return BootstrapInterval(estimate, float("nan"), float("nan"), 0)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return BootstrapInterval(estimate, float(low), float(high), len(defined))
