"""How good a predictor of the order is: rank correlations, within size too, concordance, edges and regret.

Most of what a score seems to know is the size of the subset. Every correlation is therefore given within subsets of
equal size as well, and `size` is always in the table.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import stats

from gen_invariance.errors import ShapeError
from gen_invariance.order.preorder import Preorder


@dataclass(frozen=True)
class PredictorScore:
    """One predictor against the truth; NaN where it is not defined (a constant predictor has no correlation).

    Attributes:
        tau: Kendall's tau-b with the true accuracy.
        weighted_tau: Vigna's weighted tau, which stresses the top.
        tau_within_size: mean of tau-b within subsets of equal size, weighted by their pairs.
        concordance: share of strictly ordered pairs that the predictor ranks alike, ties one half.
        regret: best accuracy minus that of the predictor's first choice, then of its best among the top 3.
        normalised_regret: `regret` over (best - median).
        tau_low, tau_high: bootstrap interval of `tau` over subsets and seeds.
        within_low, within_high: the same of `tau_within_size`.
    """

    tau: float
    weighted_tau: float
    tau_within_size: float
    concordance: float
    regret: tuple[float, float]
    normalised_regret: tuple[float, float]
    tau_low: float
    tau_high: float
    within_low: float
    within_high: float

    def row(self) -> dict[str, float]:
        """Flat numbers for a table."""
        flat = {key: value for key, value in asdict(self).items() if not isinstance(value, tuple)}
        return flat | {
            "regret@1": self.regret[0],
            "regret@3": self.regret[1],
            "normalised_regret@1": self.normalised_regret[0],
        }


def kendall(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Kendall's tau-b; NaN with fewer than two finite values or a constant side."""
    keep = np.isfinite(predicted) & np.isfinite(truth)
    if keep.sum() < 2:
        return float("nan")
    return float(stats.kendalltau(predicted[keep], truth[keep]).statistic)


def kendall_within(predicted: np.ndarray, truth: np.ndarray, sizes: np.ndarray) -> float:
    """Mean of tau-b within each size, weighted by the number of pairs; NaN when no size has a defined one."""
    total, weight = 0.0, 0.0
    for size in np.unique(sizes):
        rows = sizes == size
        tau = kendall(predicted[rows], truth[rows])
        if np.isfinite(tau):
            pairs = rows.sum() * (rows.sum() - 1) / 2
            total, weight = total + tau * pairs, weight + pairs
    return total / weight if weight else float("nan")


def concordance(predicted: np.ndarray, relation: Preorder) -> float:
    """P(s(A) < s(B) | A strictly below B), ties one half; NaN without a comparable pair; 1 for a linear extension."""
    low, high = np.argwhere(relation.strict).T
    keep = np.isfinite(predicted[low]) & np.isfinite(predicted[high])
    if not keep.any():
        return float("nan")
    gap = predicted[high[keep]] - predicted[low[keep]]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def regret(predicted: np.ndarray, truth: np.ndarray, *, top: int) -> tuple[float, float]:
    """Best truth minus the best among the `top` predicted, and that over (best - median); NaN when all undefined."""
    keep = np.isfinite(predicted) & np.isfinite(truth)
    if not keep.any():
        return float("nan"), float("nan")
    predicted, truth = predicted[keep], truth[keep]
    chosen = np.argsort(-predicted, kind="stable")[:top]
    lost = float(truth.max() - truth[chosen].max())
    spread = float(truth.max() - np.median(truth))
    return lost, lost / spread if spread > 0 else (0.0 if lost == 0 else float("nan"))


def score_predictor(
    predicted: np.ndarray,
    truth: np.ndarray,
    *,
    sizes: np.ndarray,
    relation: Preorder,
    generator: torch.Generator,
    resamples: int = 200,
    level: float = 0.95,
) -> PredictorScore:
    """Compare a predictor with the truth, both (R, n) over seeds and subsets; the start is left out by the caller.

    Args:
        predicted: larger means better expected.
        truth: accuracy on the target.
        sizes: (n,) classes of each subset.
        relation: order of the n subsets, for the concordance.
        generator: for the bootstrap over subsets and seeds.
        resamples: draws of it.
        level: of the intervals.

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
        tail = [(1 - level) / 2, (1 + level) / 2]
        low, high = np.nanquantile(taus, tail) if np.isfinite(taus).any() else (np.nan, np.nan)
        inner = np.nanquantile(withins, tail) if np.isfinite(withins).any() else (np.nan, np.nan)
    keep = np.isfinite(guess) & np.isfinite(real)
    weighted = stats.weightedtau(guess[keep], real[keep]).statistic if keep.sum() > 1 else np.nan
    first, third = regret(guess, real, top=1), regret(guess, real, top=3)
    return PredictorScore(
        tau=kendall(guess, real),
        weighted_tau=float(weighted),
        tau_within_size=kendall_within(guess, real, sizes),
        concordance=concordance(guess, relation),
        regret=(first[0], third[0]),
        normalised_regret=(first[1], third[1]),
        tau_low=float(low),
        tau_high=float(high),
        within_low=float(inner[0]),
        within_high=float(inner[1]),
    )


def _bootstrap(
    predicted: np.ndarray, truth: np.ndarray, sizes: np.ndarray, *, generator: torch.Generator, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """tau-b and its within-size mean in each resample of seeds and subsets, (B,) each, all resamples at once."""
    seeds, count = truth.shape
    rows = torch.randint(seeds, (resamples, seeds, 1), generator=generator).numpy()
    columns = torch.randint(count, (resamples, 1, count), generator=generator).numpy()
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
        total, weight = total + np.nan_to_num(tau) * pairs, weight + pairs
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
    guessed, real = (set(map(tuple, np.argwhere(relation.strict).tolist())) for relation in (predicted, truth))
    precision, recall, f1 = _f1(guessed, real)
    return EdgeScore(precision, recall, f1, _f1(_all_covers(predicted), _all_covers(truth))[2], len(guessed ^ real))


def _all_covers(relation: Preorder) -> set[tuple[int, int]]:
    """Cover edges between all members, so the choice of a class's representative does not count."""
    group = {members[0]: members for members in relation.classes()}
    return {(a, b) for low, high in relation.covers() for a in group[low] for b in group[high]}


def _f1(guessed: set[tuple[int, int]], real: set[tuple[int, int]]) -> tuple[float, float, float]:
    if not guessed and not real:
        return 1.0, 1.0, 1.0
    shared = len(guessed & real)
    precision = shared / len(guessed) if guessed else 0.0
    recall = shared / len(real) if real else 0.0
    return precision, recall, 2 * shared / (len(guessed) + len(real))
