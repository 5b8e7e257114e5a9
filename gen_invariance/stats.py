"""Intervals, paired tests, Holm's correction and resampling.

Everything here is a pure function of arrays (numpy, or torch tensors, which are copied to the CPU). Missing values
are NaN: they are left out and counted, never taken for zero. Where a figure cannot be known (one seed has no
spread) the answer is NaN, not an exception.

References: Student 1908 (intervals of a mean), Fisher 1935 (flipped signs of paired differences), Holm 1979 (several
tests at once), Efron 1979 (percentile bootstrap), Shao and Wu 1989 (half-samples).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.run import named_generator

_EXACT_UP_TO = 12  # 2**12 sign patterns of paired differences are enumerated; above that they are drawn
_DRAWN_FLIPS = 10_000
_NORMAL_95 = 1.96
_BLOCK = 2**22  # numbers in memory at once while rows are resampled

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
class Estimate:
    """A figure and its interval over resampled data; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


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
    check_level(level)
    mean, half_width, count, _ = _student(to_floats(values), level)
    return MeanInterval(_plain(mean), _plain(half_width), _plain(count))


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> PairedDifference:
    """Mean of `a - b` over the last axis (..., R), pairs with a NaN left out.

    The t-test assumes normal differences. The second p-value does not: it is the share of all 2**n ways to flip the
    signs of the differences that give a mean at least as far from zero, exact up to n = 12 pairs, over 10,000
    drawn flips (always the same ones) above. It cannot fall below 2 / 2**n: .25 for three pairs, .0625 for five.
    Differences that are all alike have no spread: their half-width is 0, and the t-test's p is 0 (1 when they are all
    zero).

    Args:
        a: figures of one method, one for each seed.
        b: figures of the other on the same seeds, same shape.
        level: confidence of the interval, in (0, 1).

    Raises:
        ShapeError: `a` and `b` differ in shape.
        SettingsError: `level` outside (0, 1).
    """
    check_level(level)
    first, second = to_floats(a), to_floats(b)
    if first.shape != second.shape:
        raise ShapeError(f"pairs need equal shapes, got {first.shape} and {second.shape}; align them by seed first")
    differences = first - second
    mean, half_width, count, standard_error = _student(differences, level)
    with np.errstate(divide="ignore", invalid="ignore"):
        t_value = np.abs(mean) / standard_error
        t_p_value = 2 * stdtr(np.maximum(count - 1, 1), -t_value)
    t_p_value = np.where((standard_error == 0) & (mean == 0), 1.0, t_p_value)
    flipped = np.full(mean.shape, np.nan)
    if mean.size:
        flipped = np.apply_along_axis(_sign_flip_p_value, -1, differences)
    return PairedDifference(*map(_plain, (mean, half_width, count, t_p_value, flipped)))


def least_p_value(pairs: int) -> float:
    """The smallest two-sided p that flipped signs of so many pairs can give (see `paired_difference`); NaN for none.

    >>> least_p_value(5), least_p_value(3)
    (0.0625, 0.25)
    """
    if pairs < 1:
        return float("nan")
    return max(2.0 ** (1 - pairs), 1 / (_DRAWN_FLIPS + 1) if pairs > _EXACT_UP_TO else 0.0)


def holm_adjusted(p_values: ArrayLike) -> NDArray[np.float64]:
    """P-values multiplied so that all of them together err with the level asked for (Holm 1979); NaN stays NaN.

    Example:
        >>> holm_adjusted([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    values = to_floats(p_values)
    flat = values.ravel().copy()
    known = np.flatnonzero(np.isfinite(flat))
    order = known[np.argsort(flat[known], kind="stable")]
    steps = flat[order] * np.arange(len(order), 0, -1)
    flat[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return flat.reshape(values.shape)


def draw_rows(size: int, *, resamples: int, generator: torch.Generator, groups: int = 1) -> NDArray[np.int64]:
    """Row numbers drawn with replacement, int64 (resamples, groups, size), each in [0, size).

    Raises:
        SettingsError: fewer than one resample.
    """
    if resamples < 1:
        raise SettingsError(f"resamples must be at least 1, got {resamples}; 2000 is the usual choice")
    return torch.randint(max(size, 1), (resamples, groups, size), generator=generator).numpy()


def percentile_interval(value: float, resampled: ArrayLike, level: float = 0.95) -> Estimate:
    """`value` with the percentile interval of the same figure in resamples, (S,); resamples with NaN are left out."""
    drawn = to_floats(resampled)
    defined = drawn[np.isfinite(drawn)]
    if not len(defined) or not np.isfinite(value):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def bootstrap_interval(
    rows: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    generator: torch.Generator,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
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
    check_level(level)
    sample = to_floats(rows)
    if sample.ndim == 0 or len(sample) == 0:
        raise ShapeError(f"a bootstrap needs at least one row, got shape {sample.shape}; give rows on the first axis")
    drawn = draw_rows(len(sample), resamples=resamples, generator=generator)[:, 0]
    block = max(1, _BLOCK // sample.size)
    pieces = [statistic(sample[drawn[start : start + block]]) for start in range(0, resamples, block)]
    return percentile_interval(float(statistic(sample[None])[0]), np.concatenate(pieces), level)


def bootstrap_ratio(
    values: ArrayLike, over: ArrayLike | None = None, *, generator: torch.Generator, resamples: int = 500
) -> Estimate:
    """Mean of `values` (N,), divided by the mean of `over` (N,) if given, with its 95 % bootstrap interval.

    Rows are resampled together. Resamples in which the lower mean is 0 are left out; NaN where the ratio itself is
    not defined, or there is no row.
    """
    upper = to_floats(values)
    lower = np.ones_like(upper) if over is None else to_floats(over)
    if not len(upper):
        return Estimate(float("nan"), float("nan"), float("nan"))

    def ratio(stack: NDArray[np.float64]) -> NDArray[np.float64]:
        means = stack.mean(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = means[:, 0] / means[:, 1]
        return np.where(means[:, 1] == 0, np.nan, ratios)

    return bootstrap_interval(np.stack([upper, lower], axis=1), ratio, generator=generator, resamples=resamples)


def half_sample_interval(
    statistic: Callable[[torch.Tensor], float | torch.Tensor],
    count: int,
    *,
    generator: torch.Generator,
    resamples: int = 100,
) -> Estimate:
    """`statistic` of all rows, with its 95 % normal interval from random halves of the rows (Shao and Wu 1989).

    For statistics of pairs of rows, which a bootstrap would pair with their own copies. The spread of a statistic
    over halves drawn without replacement equals, to first order, the standard error of the whole.

    Args:
        statistic: maps row numbers, int64 (M,), to a number, or to a tensor () that is read when all are there.
        count: N, rows in all.
        generator: CPU generator of the halves.
        resamples: how many halves.
    """
    asked = [torch.arange(count)]
    asked += [torch.randperm(count, generator=generator)[: count // 2] for _ in range(resamples)]
    found = [statistic(rows) for rows in asked]
    numbers = to_floats(torch.stack(found) if isinstance(found[0], torch.Tensor) else found)
    value, drawn = float(numbers[0]), numbers[1:]
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 2 or not np.isfinite(value):
        return Estimate(value, float("nan"), float("nan"))
    half_width = _NORMAL_95 * float(drawn.std())
    return Estimate(value, value - half_width, value + half_width)


def permutation_p_value(
    statistic: Callable[[torch.Tensor], float],
    labels: torch.Tensor,
    *,
    generator: torch.Generator,
    permutations: int = 199,
) -> float:
    """Share of shuffled label vectors (the given one counted in) whose statistic is at least as large."""
    observed = statistic(labels)
    larger = 0
    for _ in range(permutations):
        shuffled = torch.randperm(len(labels), generator=generator).to(labels.device)
        larger += statistic(labels[shuffled]) >= observed
    return (larger + 1) / (permutations + 1)


def to_floats(values: Any) -> NDArray[np.float64]:
    """`values`, numbers or a tensor on any device, as a float64 array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _plain(value: NDArray[Any]) -> Numbers:
    """A zero-dimensional array as a Python number, anything else as it is."""
    return value.item() if np.ndim(value) == 0 else value


def check_level(level: float) -> None:
    """Raise `SettingsError` unless the confidence `level` lies in (0, 1)."""
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


def _sign_flip_p_value(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the mean of `differences` (R,) under flipped signs, NaN left out."""
    known = differences[np.isfinite(differences)]
    count = len(known)
    if count == 0:
        return float("nan")
    if count <= _EXACT_UP_TO:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
    else:
        generator = named_generator(0, "sign flips")
        bits = torch.randint(2, (_DRAWN_FLIPS, count), generator=generator).numpy()
    drawn = int(count > _EXACT_UP_TO)  # where flips are drawn, the observed signs count as one of them
    slack = 1e-12 * np.abs(known).sum()  # equal sums may differ in their last bits
    hits = (np.abs((1.0 - 2 * bits) @ known) >= np.abs(known.sum()) - slack).sum()
    return float(hits + drawn) / (len(bits) + drawn)
