"""How good a predictor of the order is: rank correlations, within size too, concordance, edges and regret.

Most of what a score seems to know is the size of the subset. Every correlation is therefore given within subsets of
equal size as well, and `size` is always in the table.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from gen_invariance.errors import ShapeError
from gen_invariance.order.preorder import Preorder
from gen_invariance.stats import draw_rows, percentile_interval

Correlation = Callable[[np.ndarray, np.ndarray], float]


def kendall(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b of the finite values; NaN with fewer than two of them or a constant side."""
    return _correlation(stats.kendalltau, first, second)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of the finite values; NaN with fewer than two of them or a constant side."""
    return _correlation(stats.spearmanr, first, second)


def _correlation(kind: Callable, first: np.ndarray, second: np.ndarray) -> float:
    keep = np.isfinite(first) & np.isfinite(second)
    if len(np.unique(first[keep])) < 2 or len(np.unique(second[keep])) < 2:
        return math.nan
    return float(kind(first[keep], second[keep]).statistic)


def mean_within(correlation: Correlation, first: np.ndarray, second: np.ndarray, sizes: np.ndarray) -> float:
    """Mean of a correlation within each size, weighted by the number of pairs; NaN when no size has a defined one."""
    total, weight = 0.0, 0.0
    for size in np.unique(sizes):
        rows = sizes == size
        value = correlation(first[rows], second[rows])
        if math.isfinite(value):
            pairs = math.comb(int(rows.sum()), 2)
            total += value * pairs
            weight += pairs
    return total / weight if weight else math.nan


def concordance(predicted: np.ndarray, relation: Preorder) -> float:
    """P(s(A) < s(B) | A strictly below B), ties one half; NaN without a comparable pair; 1 for a linear extension."""
    low, high = np.argwhere(relation.strict).T
    gap = predicted[high] - predicted[low]
    gap = gap[np.isfinite(gap)]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean()) if len(gap) else math.nan


def regret(predicted: np.ndarray, truth: np.ndarray, *, top: int) -> tuple[float, float]:
    """Best truth minus the best among the `top` predicted, and that over (best - median); NaN when all undefined."""
    keep = np.isfinite(predicted) & np.isfinite(truth)
    if not keep.any():
        return math.nan, math.nan
    predicted, truth = predicted[keep], truth[keep]
    first = np.argsort(-predicted, kind="stable")[:top]
    lost = float(truth.max() - truth[first].max())
    spread = float(truth.max() - np.median(truth))
    if spread > 0:
        return lost, lost / spread
    return lost, 0.0 if lost == 0 else math.nan


def score_predictor(
    predicted: np.ndarray,
    truth: np.ndarray,
    *,
    sizes: np.ndarray,
    relation: Preorder,
    generator: torch.Generator,
    resamples: int = 200,
) -> dict[str, float]:
    """Compare a predictor with the truth, both (R, n) over seeds and subsets; the start is left out by the caller.

    Args:
        predicted: larger means better expected.
        truth: accuracy on the target.
        sizes: (n,) classes of each subset.
        relation: order of the n subsets, for the concordance.
        generator: for the bootstrap over subsets and seeds.
        resamples: draws of it.

    Returns:
        NaN where a figure is not defined (a constant predictor has no correlation): `tau`, Kendall's tau-b;
        `weighted_tau`, Vigna's, which stresses the top; `tau_within_size`; `concordance`; `tau_low`, `tau_high`,
        `within_low`, `within_high`, 95 % bootstrap intervals; `regret@1`, `regret@3`, best accuracy minus that of
        the best of the predictor's first choices, and `normalised_regret@1`, over (best - median).

    Raises:
        ShapeError: shapes differ.
    """
    if predicted.shape != truth.shape or predicted.ndim != 2 or truth.shape[1] != len(sizes):
        raise ShapeError(
            f"predictor {predicted.shape}, truth {truth.shape} and sizes {sizes.shape} must be (R, n), (n,)"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a subset without any finite value stays NaN
        guess, real = np.nanmean(predicted, axis=0), np.nanmean(truth, axis=0)
        taus, withins = _bootstrap(predicted, truth, sizes, generator=generator, resamples=resamples)
    keep = np.isfinite(guess) & np.isfinite(real)
    tau, within = kendall(guess, real), mean_within(kendall, guess, real, sizes)
    tau_interval, within_interval = percentile_interval(0.0, taus), percentile_interval(0.0, withins)
    first, third = regret(guess, real, top=1), regret(guess, real, top=3)
    return {
        "tau": tau,
        "weighted_tau": float(stats.weightedtau(guess[keep], real[keep]).statistic) if keep.sum() > 1 else math.nan,
        "tau_within_size": within,
        "concordance": concordance(guess, relation),
        "tau_low": tau_interval.low,
        "tau_high": tau_interval.high,
        "within_low": within_interval.low,
        "within_high": within_interval.high,
        "regret@1": first[0],
        "regret@3": third[0],
        "normalised_regret@1": first[1],
    }


def _bootstrap(
    predicted: np.ndarray, truth: np.ndarray, sizes: np.ndarray, *, generator: torch.Generator, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """tau-b and its within-size mean in each resample of seeds and subsets, (B,) each, all resamples at once."""
    seeds, count = truth.shape
    rows = draw_rows(seeds, resamples=resamples, generator=generator).transpose(0, 2, 1)
    columns = draw_rows(count, resamples=resamples, generator=generator)
    guess, real = (np.nanmean(table[rows, columns], axis=1) for table in (predicted, truth))
    signs = [np.sign(values[:, :, None] - values[:, None, :]) for values in (guess, real)]
    unusable = ~np.isfinite(signs[0] + signs[1])
    first, second = (np.where(unusable, 0, sign) for sign in signs)
    drawn = sizes[columns[:, 0]]
    total, weight = np.zeros(resamples), np.zeros(resamples)
    for size in np.unique(sizes):
        inside = (drawn[:, :, None] == size) & (drawn[:, None, :] == size)
        tau = _tau_b(first * inside, second * inside)
        members = (drawn == size).sum(axis=1)
        pairs = np.where(np.isfinite(tau), members * (members - 1) / 2, 0)
        total += np.nan_to_num(tau) * pairs
        weight += pairs
    within = np.divide(total, weight, out=np.full(resamples, np.nan), where=weight > 0)
    return _tau_b(first, second), within


def _tau_b(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Kendall's tau-b from signs of differences, (B, n, n) each; NaN where one side is constant."""
    spread = np.sqrt(np.square(first).sum(axis=(1, 2)) * np.square(second).sum(axis=(1, 2)))
    product = (first * second).sum(axis=(1, 2))
    return np.divide(product, spread, out=np.full(len(product), np.nan), where=spread > 0)


@dataclass(frozen=True)
class EdgeScore:
    """Agreement of two relations on the same elements, over strict edges of the closure and of the covers.

    Attributes:
        precision, recall, f1: over all strict edges.
        cover_f1: over cover edges.
        hamming: ordered pairs in which the two strict relations differ.
    """

    precision: float
    recall: float
    f1: float
    cover_f1: float
    hamming: int


def compare_edges(predicted: Preorder, truth: Preorder) -> EdgeScore:
    """Edge scores of a predicted order; 1 when both are empty."""
    if len(predicted) != len(truth):
        raise ShapeError(f"orders have {len(predicted)} and {len(truth)} elements; compare orders of the same subsets")
    guessed, real = predicted.strict, truth.strict
    precision, recall, f1 = _f1(guessed, real)
    cover_f1 = _f1(_all_covers(predicted), _all_covers(truth))[2]
    return EdgeScore(precision, recall, f1, cover_f1, int((guessed ^ real).sum()))


def _all_covers(relation: Preorder) -> np.ndarray:
    """Cover edges between all members, so the choice of a class's representative does not count; bool (n, n)."""
    covers = np.zeros_like(relation.leq)
    for low, high in relation.graph.edges:
        below, above = (relation.graph.nodes[node]["members"] for node in (low, high))
        covers[np.ix_(below, above)] = True
    return covers


def _f1(guessed: np.ndarray, real: np.ndarray) -> tuple[float, float, float]:
    shared, first, second = (int(edges.sum()) for edges in (guessed & real, guessed, real))
    if first + second == 0:
        return 1.0, 1.0, 1.0
    return shared / max(first, 1), shared / max(second, 1), 2 * shared / (first + second)
