"""The accuracy relation: is subset A as good on target B as training on B itself?

"A generalises to B" by accuracy, E[T(A, B) - T(B, B)] >= -margin, is a directed graph, not an order: tolerances add
up along a path. It is kept apart from the separability order, tested pair by pair, and closed only on request.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import networkx as nx
import numpy as np
from scipy import stats

from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.stats import holm_adjusted

_WARN_INFLATION, _REFUSE_INFLATION = 0.10, 0.50


@dataclass(frozen=True)
class AccuracyRelation:
    """Non-inferiority of each source on each source's classes; arrays are (n, n), row A, column B.

    Attributes:
        non_inferior: A is as good on B as B, up to the margin (tested, family-wise level alpha); bool.
        inferior: A is worse on B than B by more than the margin (tested); bool. What is neither is undecided.
        difference: mean of T(A, B) - T(B, B) over seeds.
        margin: in accuracy, at least 0.
        alpha: level.
    """

    non_inferior: np.ndarray
    inferior: np.ndarray
    difference: np.ndarray
    margin: float
    alpha: float

    @property
    def graph(self) -> nx.DiGraph:
        """Edges A -> B where A is tested as good on B as B."""
        edges = self.non_inferior & ~np.eye(len(self.non_inferior), dtype=bool)
        return nx.from_numpy_array(edges, create_using=nx.DiGraph)

    @property
    def intransitive(self) -> int:
        """Triples A -> B -> C of different sources without A -> C."""
        edges = nx.to_numpy_array(self.graph)
        paths = edges @ edges
        np.fill_diagonal(paths, 0)
        return int(paths[edges == 0].sum())

    @property
    def closure_inflation(self) -> float:
        """Edges that transitive closure would add, as a share of those tested; 0 when there are none."""
        tested = self.graph.number_of_edges()
        closed = nx.transitive_closure(self.graph, reflexive=None).number_of_edges()
        return (closed - tested) / max(tested, 1)

    def closure(self, *, force: bool = False) -> nx.DiGraph:
        """The transitive closure, with its inflation: warned of above 10 %, refused above 50 % unless forced.

        Raises:
            SettingsError: the closure would add more than half as many edges as were observed.
        """
        inflation = self.closure_inflation
        message = f"closing the accuracy relation adds {inflation:.0%} edges that nobody measured"
        if inflation > _REFUSE_INFLATION and not force:
            raise SettingsError(f"{message}; use the separability order, or force=True")
        if inflation > _WARN_INFLATION:
            warnings.warn(message, stacklevel=2)
        closed = nx.transitive_closure(self.graph, reflexive=None)
        closed.graph["inflation"] = inflation
        return closed


def accuracy_relation(accuracy: np.ndarray, *, margin: float = 0.02, alpha: float = 0.05) -> AccuracyRelation:
    """Test T(A, B) - T(B, B) against -margin with seeds paired, Holm over all n (n - 1) comparisons a side.

    Args:
        accuracy: (R, n, n), accuracy in [0, 1] of source A's backbone on source B's classes; the same seeds for all.
        margin: largest drop that still counts as good, at least 0.
        alpha: family-wise level of each side.

    Raises:
        ShapeError: not (R, n, n) with R >= 2.
    """
    if accuracy.ndim != 3 or accuracy.shape[1] != accuracy.shape[2] or len(accuracy) < 2:
        raise ShapeError(f"accuracy is {accuracy.shape}, expected (R, n, n) with at least two seeds to test")
    seeds, count = accuracy.shape[:2]
    of_itself = np.diagonal(accuracy, axis1=1, axis2=2)
    gap = accuracy - of_itself[:, None, :]
    mean, error = gap.mean(axis=0), gap.std(axis=0, ddof=1) / np.sqrt(seeds)
    shifted = mean + margin
    statistic = np.divide(shifted, error, out=np.sign(shifted) * np.inf, where=error > 0)
    statistic[np.isnan(statistic)] = 0.0  # no spread and exactly at the margin says nothing
    off = ~np.eye(count, dtype=bool)
    non_inferior, inferior = np.eye(count, dtype=bool), np.zeros((count, count), dtype=bool)
    non_inferior[off] = holm_adjusted(stats.t.sf(statistic[off], seeds - 1)) <= alpha
    inferior[off] = holm_adjusted(stats.t.cdf(statistic[off], seeds - 1)) <= alpha
    return AccuracyRelation(non_inferior, inferior, mean, margin, alpha)
