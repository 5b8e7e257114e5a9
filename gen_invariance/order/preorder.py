"""A finite preorder as a plain object: its classes, covers, extremes, chains and linear extensions.

Condensation gives the classes of equivalent elements, transitive reduction the covers (the edges of a Hasse
diagram), both by networkx.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from gen_invariance.errors import SettingsError, ShapeError


class Preorder:
    """Elements 0..n-1 and a reflexive, transitive relation.

    Args:
        leq: bool (n, n); `leq[a, b]` says a is below or equivalent to b.
        height: (n,) numbers that rank elements for ties in `linear_extension`, for example separated pairs.

    Raises:
        ShapeError: not square.
        SettingsError: not reflexive or not transitive (close it first, on purpose).
    """

    def __init__(self, leq: np.ndarray, *, height: np.ndarray | None = None) -> None:
        leq = np.asarray(leq, dtype=bool)
        if leq.ndim != 2 or leq.shape[0] != leq.shape[1]:
            raise ShapeError(f"a relation is a square bool array, got {leq.shape}")
        if not leq.diagonal().all():
            raise SettingsError("the relation is not reflexive; set its diagonal to True")
        through = leq.astype(np.float32) @ leq.astype(np.float32) > 0
        if (through & ~leq).any():
            a, b = np.argwhere(through & ~leq)[0]
            raise SettingsError(f"the relation is not transitive: {a} reaches {b} in two steps but not in one")
        self.leq = leq
        self.height = np.zeros(len(leq)) if height is None else np.asarray(height, dtype=float)

    def __len__(self) -> int:
        return len(self.leq)

    @property
    def strict(self) -> np.ndarray:
        """A strictly below b, bool (n, n)."""
        return self.leq & ~self.leq.T

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Classes as nodes (attribute `members`, sorted), covers as edges: the Hasse diagram."""
        relation = self.leq & ~np.eye(len(self), dtype=bool)  # a self-loop would make the graph cyclic
        condensed = nx.condensation(nx.from_numpy_array(relation, create_using=nx.DiGraph))
        covers = nx.transitive_reduction(condensed)  # returns a graph without attributes
        order = sorted(condensed, key=lambda node: self._key(condensed.nodes[node]["members"]))
        number = {node: index for index, node in enumerate(order)}
        diagram = nx.DiGraph()
        for node in order:
            diagram.add_node(number[node], members=tuple(sorted(condensed.nodes[node]["members"])))
        diagram.add_edges_from(sorted((number[a], number[b]) for a, b in covers.edges))
        return diagram

    def _key(self, members: set[int] | tuple[int, ...]) -> tuple[float, int]:
        return float(self.height[min(members)]), min(members)

    def classes(self) -> list[tuple[int, ...]]:
        """Equivalent elements together, each class sorted, classes by (height, smallest member)."""
        return [self.graph.nodes[node]["members"] for node in self.graph]

    def _representatives(self) -> list[int]:
        """The smallest member of each class."""
        return [members[0] for members in self.classes()]

    def covers(self) -> list[tuple[int, int]]:
        """Hasse edges between classes, as (smallest member below, smallest member above)."""
        first = self._representatives()
        return sorted((first[a], first[b]) for a, b in self.graph.edges)

    def maximal(self) -> list[int]:
        """Elements with nothing strictly above them."""
        return np.flatnonzero(~self.strict.any(axis=1)).tolist()

    def minimal(self) -> list[int]:
        """Elements with nothing strictly below them."""
        return np.flatnonzero(~self.strict.any(axis=0)).tolist()

    def longest_chain(self) -> list[int]:
        """A chain with as many classes as any, smallest members, bottom first."""
        first = self._representatives()
        return [first[node] for node in nx.dag_longest_path(self.graph)]

    def chains(self, *, limit: int = 100) -> list[list[int]]:
        """Maximal chains (smallest members, bottom first), at most `limit`: their number can be exponential."""
        first = self._representatives()
        bottoms = [node for node, degree in self.graph.in_degree if degree == 0]
        tops = [node for node, degree in self.graph.out_degree if degree == 0]
        paths = itertools.chain.from_iterable(nx.all_simple_paths(self.graph, node, tops) for node in bottoms)
        return [[first[node] for node in path] for path in itertools.islice(paths, limit)]

    def width(self) -> int:
        """Classes in the largest antichain, by Dilworth: classes minus a maximum matching of the strict order."""
        first = self._representatives()
        matching = maximum_bipartite_matching(csr_array(self.strict[np.ix_(first, first)]))
        return len(first) - int((matching >= 0).sum())

    def linear_extension(self) -> list[int]:
        """One canonical total order of all elements that respects the relation, ties by (height, index)."""
        return self._extension(lambda node: self._key(self.graph.nodes[node]["members"]))

    def random_extension(self, *, generator: torch.Generator) -> list[int]:
        """A random total order that respects the relation; not uniform over all of them."""
        keys = torch.rand(len(self.graph), generator=generator).tolist()
        return self._extension(lambda node: keys[node])

    def _extension(self, key: Callable[[int], Any]) -> list[int]:
        ranked = nx.lexicographical_topological_sort(self.graph, key=key)
        return [member for node in ranked for member in self.graph.nodes[node]["members"]]
