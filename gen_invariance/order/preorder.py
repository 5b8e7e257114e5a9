"""A finite preorder as a plain object: its classes, covers, extremes, chains and linear extensions.

Everything that theory knows and libraries do well is left to networkx: condensation gives the classes of
equivalent elements, transitive reduction the covers (the edges of a Hasse diagram). Two of its traps are handled
here: the diagonal is removed first (a self-loop makes a graph cyclic), and attributes that the reduction drops are
not relied on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property

import networkx as nx
import numpy as np
import torch

from gen_invariance.errors import SettingsError, ShapeError


class Preorder:
    """Elements 0..n-1 and a reflexive, transitive relation.

    Args:
        leq: bool (n, n); `leq[a, b]` says a is below or equivalent to b.
        height: (n,) numbers that rank elements for ties in `linear_extension`, for example separated pairs.

    Raises:
        ShapeError: not square. SettingsError: not reflexive or not transitive (close it first, on purpose).
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
        relation = self.leq.copy()
        np.fill_diagonal(relation, False)
        condensed = nx.condensation(nx.from_numpy_array(relation, create_using=nx.DiGraph))
        covers = nx.transitive_reduction(condensed)  # returns a graph without attributes
        order = sorted(condensed, key=lambda node: self._key(condensed.nodes[node]["members"]))
        number = {node: index for index, node in enumerate(order)}
        named = nx.DiGraph()
        for node in order:
            named.add_node(number[node], members=tuple(sorted(condensed.nodes[node]["members"])))
        named.add_edges_from(sorted((number[a], number[b]) for a, b in covers.edges))
        return named

    def _key(self, members: set[int] | tuple[int, ...]) -> tuple[float, int]:
        return float(self.height[min(members)]), min(members)

    def classes(self) -> list[tuple[int, ...]]:
        """Equivalent elements together, each class sorted, classes by (height, smallest member)."""
        return [self.graph.nodes[node]["members"] for node in self.graph]

    def covers(self) -> list[tuple[int, int]]:
        """Hasse edges between classes, as (smallest member below, smallest member above)."""
        first = [members[0] for members in self.classes()]
        return sorted((first[a], first[b]) for a, b in self.graph.edges)

    def maximal(self) -> list[int]:
        """Elements with nothing strictly above them."""
        return np.flatnonzero(~self.strict.any(axis=1)).tolist()

    def minimal(self) -> list[int]:
        """Elements with nothing strictly below them."""
        return np.flatnonzero(~self.strict.any(axis=0)).tolist()

    def longest_chain(self) -> list[int]:
        """A chain with as many classes as any, smallest members, bottom first."""
        first = [members[0] for members in self.classes()]
        return [first[node] for node in nx.dag_longest_path(self.graph)]

    def chains(self, *, limit: int = 100) -> list[list[int]]:
        """Maximal chains (smallest members, bottom first), at most `limit`: their number can be exponential."""
        return list(itertools.islice(self._walk(), limit))

    def _walk(self) -> Iterator[list[int]]:
        first = [members[0] for members in self.classes()]
        stack = [[node] for node in reversed(list(self.graph)) if not self.graph.in_degree(node)]
        while stack:
            path = stack.pop()
            above = sorted(self.graph.successors(path[-1]), reverse=True)
            if not above:
                yield [first[node] for node in path]
            stack.extend([*path, node] for node in above)

    def width(self) -> int:
        """Classes in the largest antichain, by Dilworth: classes minus a maximum matching of the strict order."""
        first = [members[0] for members in self.classes()]
        strict = self.strict[np.ix_(first, first)]
        split = nx.Graph()
        split.add_nodes_from(("below", node) for node in range(len(first)))
        split.add_nodes_from(("above", node) for node in range(len(first)))
        split.add_edges_from((("below", a), ("above", b)) for a, b in np.argwhere(strict).tolist())
        matching = nx.bipartite.hopcroft_karp_matching(split, [("below", node) for node in range(len(first))])
        return len(first) - len(matching) // 2

    def linear_extension(self) -> list[int]:
        """One canonical total order of all elements that respects the relation, ties by (height, index)."""
        ranked = nx.lexicographical_topological_sort(
            self.graph, key=lambda node: self._key(self.graph.nodes[node]["members"])
        )
        return [member for node in ranked for member in self.graph.nodes[node]["members"]]

    def random_extension(self, *, generator: torch.Generator) -> list[int]:
        """A random total order that respects the relation; not uniform over all of them."""
        keys = torch.rand(len(self.graph), generator=generator).tolist()
        ranked = nx.lexicographical_topological_sort(self.graph, key=lambda node: keys[node])
        return [member for node in ranked for member in self.graph.nodes[node]["members"]]

    def is_linear_extension(self, order: list[int]) -> bool:
        """Whether `order` names every element once and never puts one before something strictly below it."""
        if sorted(order) != list(range(len(self))):
            return False
        place = np.argsort(order)
        return not (self.strict & (place[:, None] > place[None, :])).any()
