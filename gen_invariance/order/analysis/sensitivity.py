"""How far the order depends on the threshold, on the seeds and on the budget.

Sweeping the threshold needs no single value to be defended: an edge's persistence is the share of thresholds at
which it holds, and the edges that hold at all of them are exactly dominance (q_A <= q_B at every pair).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from gen_invariance.errors import ShapeError
from gen_invariance.order.bootstrap import CellBounds
from gen_invariance.order.relation import inclusion


@dataclass(frozen=True)
class Sweep:
    """The estimated and the certain relation over a grid of thresholds.

    Attributes:
        thresholds: float (G,).
        persistence: share of thresholds at which a is below b by the estimates, (n, n).
        certain_persistence: the same for the certain relation.
        edges: strict estimated edges at each threshold, int (G,).
        classes: subsets told apart at each threshold, int (G,).
    """

    thresholds: np.ndarray
    persistence: np.ndarray
    certain_persistence: np.ndarray
    edges: np.ndarray
    classes: np.ndarray


def sweep_threshold(bounds: CellBounds, *, low: float = 0.6, high: float = 0.99, steps: int = 40) -> Sweep:
    """Both relations at `steps` thresholds from `low` to `high`."""
    grid = np.linspace(low, high, steps)
    count = len(bounds.estimate)
    holds, certain = np.zeros((count, count)), np.zeros((count, count))
    edges, classes = [], []
    for tau in grid:
        separated = bounds.estimate >= tau
        leq = inclusion(separated, separated)
        holds += leq
        certain += inclusion(bounds.upper >= tau, bounds.lower >= tau) | np.eye(count, dtype=bool)
        edges.append(int((leq & ~leq.T).sum()))
        classes.append(len(np.unique(separated, axis=0)))
    return Sweep(grid, holds / steps, certain / steps, np.array(edges), np.array(classes))


def edge_frequency(draws: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Share of bootstrap draws, float (E, n, P), in which a's separated pairs are among b's; (n, n)."""
    total = np.zeros((draws.shape[1],) * 2)
    for draw in draws:
        separated = draw >= threshold
        total += inclusion(separated, separated)
    return total / len(draws)


def split_half_stability(
    scores: np.ndarray, threshold: np.ndarray, *, generator: torch.Generator, splits: int = 20
) -> float:
    """Mean Jaccard overlap of strict edges between orders from two halves of the seeds; NaN with one seed.

    Args:
        scores: (R, n, P), one table for each seed.
        threshold: (P,).
        generator: draws the splits when there are more than `splits` of them.
        splits: most splits to average.
    """
    seeds = len(scores)
    if scores.ndim != 3:
        raise ShapeError(f"scores are {scores.shape}, expected (seeds, subsets, pairs)")
    if seeds < 2:
        return math.nan
    if math.comb(seeds, seeds // 2) <= splits:
        halves = [list(half) for half in itertools.combinations(range(seeds), seeds // 2)]
    else:
        halves = [torch.randperm(seeds, generator=generator)[: seeds // 2].tolist() for _ in range(splits)]
    overlaps = []
    for half in halves:
        rest = [seed for seed in range(seeds) if seed not in half][: len(half)]
        first, second = (_strict_edges(scores[part].mean(axis=0) >= threshold) for part in (half, rest))
        union = (first | second).sum()
        overlaps.append((first & second).sum() / union if union else 1.0)
    return float(np.mean(overlaps))


def _strict_edges(separated: np.ndarray) -> np.ndarray:
    leq = inclusion(separated, separated)
    return leq & ~leq.T
