"""Simultaneous bounds for every (subset, pair) cell, from seeds and a shared test set.

Two things move a measured separability: the training seed (variance s^2 / R) and the finite test set that all
seeds and subsets share (about q (1 - q) / N a class, which more seeds do not shrink). The crossed bootstrap resamples
seeds and, independently, test samples within their class: it gives the joint distribution of the largest standardised
deviation over all cells, and the frequency of order edges. The width of a single cell comes from variance components
with moderated seed variances (Smyth 2004) and Student quantiles, since five seeds say little about their own tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.order.separability import unpack_hits
from gen_invariance.order.sets import class_pairs
from gen_invariance.order.settings import Simultaneous
from gen_invariance.stats import draw_rows

_BLOCK_BYTES = 256 * 2**20
_EDGE_DRAWS = 200


@dataclass(frozen=True)
class CellBounds:
    """Estimate and two-sided bounds of each cell's separability; arrays are float64 (n, P) in [0, 1].

    Attributes:
        estimate: mean over seeds.
        lower, upper: bounds at simultaneous level 1 - alpha (or cell-wise when `simultaneous` is "none").
        alpha: 1 - level.
        simultaneous: how the level was shared among the cells.
        seeds: R. With 1 the bounds know of the test samples only.
    """

    estimate: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    alpha: float
    simultaneous: str
    seeds: int


@dataclass(frozen=True)
class Resamples:
    """Scores of every seed and, of a bootstrap, how they vary.

    Attributes:
        scores: float64 (R, n, P), each seed's balanced two-class accuracy.
        sample_variance: of the seed mean due to the finite test set, broadcastable to (n, P).
        sample_freedom: degrees of freedom behind it, broadcastable to (n, P).
        largest: float64 (B,), largest |standardised deviation| over all cells in each resample; None without any.
        draws: float32 (E, n, P), the first resampled seed means, for edge frequencies.
    """

    scores: np.ndarray
    sample_variance: Any = 0.0
    sample_freedom: Any = np.inf
    largest: np.ndarray | None = None
    draws: np.ndarray | None = None

    def of_pairs(self, columns: np.ndarray) -> Resamples:
        """What a bootstrap gave for some of the pairs only; `largest` stays that over all of them."""
        return Resamples(
            self.scores[:, :, columns],
            self.sample_variance[:, columns],
            self.sample_freedom[columns],
            self.largest,
            self.draws[:, :, columns],
        )


def crossed_bootstrap(
    packed: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    resamples: int = 2000,
    edge_draws: int = _EDGE_DRAWS,
    generator: torch.Generator,
) -> Resamples:
    """Resample seeds and, independently, test samples within class.

    Args:
        packed: uint8 (R, n, M, ceil(K / 8)), `pack_hits` of every seed and subset.
        labels: int64 (M,), test labels; every class needs at least one sample.
        num_classes: K.
        resamples: B.
        edge_draws: how many resampled tables to keep.
        generator: CPU generator.
    """
    if packed.ndim != 4 or packed.shape[2] != len(labels):
        raise ShapeError(f"hits are {packed.shape} for {len(labels)} labels; expected (R, n, M, ceil(K / 8))")
    seeds, count = packed.shape[:2]
    pairs = class_pairs(num_classes)
    rows = [torch.from_numpy(np.flatnonzero(labels == label)) for label in range(num_classes)]
    seed_weights = _resample_weights(seeds, resamples, generator)
    row_weights = [_resample_weights(len(row), resamples, generator) for row in rows]

    scores = np.empty((seeds, count, len(pairs)))
    variance = np.empty((count, len(pairs)))
    largest = torch.zeros(resamples)
    draws = np.empty((min(edge_draws, resamples), count, len(pairs)), dtype=np.float32)
    width = max(1, int(_BLOCK_BYTES // (4 * resamples * num_classes**2)))
    for start in range(0, count, width):
        block = slice(start, min(start + width, count))
        hits = torch.from_numpy(unpack_hits(packed[:, block], num_classes))
        right, side_variance, resampled = _class_accuracy(hits, rows, seed_weights, row_weights)
        column = 0
        # One class at a time: its pairs with all later classes are contiguous in memory and stay in the cache.
        for label in range(num_classes - 1):
            columns = slice(column, column + num_classes - label - 1)
            column = columns.stop
            later = slice(label + 1, None)
            pair_right = (right[label, later] + right[later, label]) / 2  # (p, R, s)
            pair_variance = (side_variance[label, later] + side_variance[later, label]) / 4  # (p, s)
            scores[:, block, columns] = pair_right.permute(1, 2, 0).numpy()
            variance[block, columns] = pair_variance.T.numpy()
            table = resampled[label, later] + resampled[later, label]  # (p, s, B), twice the pair's accuracy
            draws[:, block, columns] = table[..., : len(draws)].permute(2, 1, 0).numpy() / 2
            table.sub_(2 * pair_right.mean(dim=1)[..., None])
            spread = torch.linalg.vector_norm(table, dim=2, keepdim=True) / len(largest) ** 0.5
            spread[spread < 1e-6] = torch.inf  # a cell that never varies is never the largest deviation
            low, high = table.div_(spread).flatten(0, 1).aminmax(dim=0)
            largest = torch.maximum(largest, torch.maximum(high, -low))
    sizes = np.array([len(row) for row in rows], dtype=float)
    freedom = np.maximum(sizes[pairs[:, 0]] + sizes[pairs[:, 1]] - 2, 1)
    return Resamples(scores, variance, freedom, largest.numpy(), draws)


def _resample_weights(size: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Share of each of `size` items in each bootstrap draw, float32 (B, size), rows summing to 1."""
    drawn = torch.from_numpy(draw_rows(size, resamples=resamples, generator=generator)[:, 0])
    return torch.zeros(resamples, size).scatter_add_(1, drawn, torch.full(drawn.shape, 1.0 / size))


def _class_accuracy(
    hits: Tensor, rows: list[Tensor], seed_weights: Tensor, row_weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Accuracy of class i against class c for one block of s subsets.

    Seed and sample weights multiply, so one matrix product a class covers all resamples, subsets and other classes.
    The variance is the larger of the observed one and a binomial one with two successes and two failures added,
    so a class without a single miss does not get a zero-width interval.

    Returns each seed's accuracy (K, K, R, s), the sampling variance of the seed mean (K, K, s), and the seed mean in
    every resample (K, K, s, B); float32.
    """
    seeds, width, _, num_classes = hits.shape
    right = torch.empty(len(rows), num_classes, seeds, width)
    variance = torch.empty(len(rows), num_classes, width)
    resampled = torch.empty(len(rows), num_classes, width, len(seed_weights))
    for label, row in enumerate(rows):
        of_class = hits[:, :, row].permute(3, 1, 0, 2).float()  # (K, s, R, N)
        right[label] = of_class.mean(dim=3).permute(0, 2, 1)
        seed_mean = of_class.mean(dim=2)
        smoothed = (seed_mean.sum(dim=2) + 2) / (len(row) + 4)
        observed = seed_mean.var(dim=2, correction=0) / max(len(row) - 1, 1)
        variance[label] = torch.maximum(observed, smoothed * (1 - smoothed) / (len(row) + 4))
        weights = (seed_weights[:, :, None] * row_weights[label][:, None, :]).flatten(1)
        product = resampled[label].view(num_classes * width, -1)
        torch.mm(of_class.reshape(num_classes * width, -1), weights.T, out=product)
    return right, variance, resampled


def moderated_variance(scores: np.ndarray, *, group: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Seed variance of each cell, shrunk towards that of cells with similar mean, and its degrees of freedom.

    `scores` are (R, n, P) with R >= 2; both results are (n, P). Within each `group` of cells, neighbours in the order
    of their means, the true variances are taken as scaled inverse chi-square; its degrees of freedom come from how
    much more the sample variances scatter than chi-square allows (method of moments).

    Reference: Smyth, "Linear models and empirical Bayes methods", 2004, section 3.
    """
    raw = scores.var(axis=0, ddof=1).ravel()
    freedom = len(scores) - 1
    variance, total = np.empty_like(raw), np.empty_like(raw)
    order = np.argsort(scores.mean(axis=0).ravel(), kind="stable")
    for cells in np.array_split(order, max(1, len(order) // group)):
        mean = raw[cells].mean()
        if len(cells) < 3 or mean <= 0:
            variance[cells], total[cells] = np.maximum(raw[cells], mean), freedom
            continue
        excess = (1 + raw[cells].var(ddof=1) / mean**2) / (1 + 2 / freedom) - 1
        prior = min(4 + 2 / excess if excess > 0 else np.inf, freedom * len(cells))
        scale = mean * (prior - 2) / prior
        variance[cells] = (prior * scale + freedom * raw[cells]) / (prior + freedom)
        total[cells] = prior + freedom
    return variance.reshape(scores.shape[1:]), total.reshape(scores.shape[1:])


def cell_bounds(measured: Resamples, *, alpha: float = 0.05, simultaneous: Simultaneous = "bonferroni") -> CellBounds:
    """Two-sided bounds for the expected score of every cell.

    Args:
        measured: scores of each seed; with one seed only the variance due to the test set counts.
        alpha: chance that any bound is wrong, in (0, 0.5).
        simultaneous: see `Simultaneous`.

    Raises:
        SettingsError: simultaneous "bootstrap" without resamples.
    """
    seeds = len(measured.scores)
    estimate = measured.scores.mean(axis=0)
    sample_variance = np.broadcast_to(np.asarray(measured.sample_variance, dtype=float), estimate.shape)
    sample_freedom = np.broadcast_to(np.asarray(measured.sample_freedom, dtype=float), estimate.shape)
    seed_variance, seed_freedom = np.zeros_like(estimate), np.full_like(estimate, np.inf)
    if seeds > 1:
        seed_variance, seed_freedom = moderated_variance(measured.scores)
        seed_variance = seed_variance / seeds
    total = seed_variance + sample_variance
    # Satterthwaite: a variance made of two parts has the freedom of the part that dominates it.
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = total**2 / (seed_variance**2 / seed_freedom + sample_variance**2 / sample_freedom)
    freedom = np.where(np.isfinite(freedom), freedom, 1e9)

    level = _cell_level(alpha, estimate.size, simultaneous, measured.largest)
    half_width = stats.t.isf(level / 2, freedom) * np.sqrt(total)
    lower, upper = np.clip(estimate - half_width, 0, 1), np.clip(estimate + half_width, 0, 1)
    return CellBounds(estimate, lower, upper, alpha, simultaneous, seeds)


def _cell_level(alpha: float, cells: int, simultaneous: str, largest: np.ndarray | None) -> float:
    if simultaneous == "none":
        return alpha
    if simultaneous == "bonferroni":
        return alpha / cells
    if largest is None:
        raise SettingsError("simultaneous='bootstrap' needs resampled hits; use 'bonferroni' with bare scores")
    return max(alpha / cells, float(2 * stats.norm.sf(np.quantile(largest, 1 - alpha))))
