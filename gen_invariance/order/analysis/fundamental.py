"""Fundamental sets: the fewest subsets whose backbones together separate every separable pair.

After the fundamental pairs and fundamental number F(C) of Baena, Drumetz and Gripon (2024). Finding F is set cover:
greedy always, exact by integer programming up to about 60 sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from gen_invariance.errors import ShapeError

EXACT_SOURCES = 60


@dataclass(frozen=True)
class FundamentalSet:
    """A least (or greedy) family that covers all separable pairs.

    Attributes:
        members: indices of the chosen subsets, ascending.
        exact: whether no smaller family exists.
        essential: subsets that alone separate some pair; every cover holds them.
        uncovered: pairs that nobody separates, indices.
        lower, upper: the general bounds ceil(log2 K) and K (K - 1) / 2 on F when all pairs are separable and each
            model is one cut; None when some pair is not separable.
    """

    members: tuple[int, ...]
    exact: bool
    essential: tuple[int, ...]
    uncovered: tuple[int, ...]
    lower: int | None
    upper: int | None

    @property
    def number(self) -> int:
        """F: how many subsets are needed."""
        return len(self.members)


def fundamental_set(separated: np.ndarray, *, num_classes: int) -> FundamentalSet:
    """Cover all pairs that any row of `separated`, bool (n, P), has.

    The log2 bound holds when each model is a single cut (head "own"). Backbones with a fitted head separate more
    than one cut can, so F may then be smaller, down to 1.
    """
    if separated.ndim != 2:
        raise ShapeError(f"separated pairs are {separated.shape}, expected bool (subsets, pairs)")
    counts = separated.sum(axis=0)
    wanted = separated[:, counts > 0]
    essential = np.flatnonzero((wanted & (wanted.sum(axis=0) == 1)).any(axis=1))
    exact = len(separated) <= EXACT_SOURCES
    members = _exact(wanted) if exact and wanted.size else _greedy(wanted)
    everything = bool((counts > 0).all()) and num_classes >= 2
    return FundamentalSet(
        members=tuple(members),
        exact=exact,
        essential=tuple(essential.tolist()),
        uncovered=tuple(np.flatnonzero(counts == 0).tolist()),
        lower=math.ceil(math.log2(num_classes)) if everything else None,
        upper=math.comb(num_classes, 2) if everything else None,
    )


def _greedy(wanted: np.ndarray) -> list[int]:
    """Always take the subset with most uncovered pairs: at most ln P + 1 times too many."""
    left = np.ones(wanted.shape[1], dtype=bool)
    members: list[int] = []
    while left.any():
        best = int((wanted & left).sum(axis=1).argmax())
        members.append(best)
        left &= ~wanted[best]
    return sorted(members)


def _exact(wanted: np.ndarray) -> list[int]:
    columns = np.unique(wanted, axis=1)
    solved = milp(
        np.ones(len(wanted)),
        constraints=LinearConstraint(columns.T.astype(float), lb=1),
        integrality=np.ones(len(wanted)),
        bounds=Bounds(0, 1),
    )
    return np.flatnonzero(solved.x > 0.5).tolist()
