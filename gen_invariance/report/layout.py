"""Where the nodes and lines of a layered diagram go (after Sugiyama, Tagawa and Toda, 1981).

Lines that pass a row get an invisible waypoint in it, rows are ordered by the mean position of their neighbours, and
positions within a row solve a least-squares problem under minimal distances (isotonic regression), which keeps long
lines nearly straight and off the boxes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from sklearn.isotonic import isotonic_regression

_BOX, _LINE = 1.0, 0.11
_SWEEPS = 12
_MOST_WAYPOINTS = 6000


@dataclass(frozen=True)
class Layout:
    """Positions in units of one box width and one row height.

    Attributes:
        x, y: of each node, float (n,).
        routes: for each edge, the x and y of its corners, bottom first.
        ticks: height of each level's (lowest) row to the level's number.
    """

    x: np.ndarray
    y: np.ndarray
    routes: list[tuple[list[float], list[float]]]
    ticks: dict[float, str]

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest x of any node or line."""
        corners = [x for across, _ in self.routes for x in across]
        return min([*self.x, *corners]), max([*self.x, *corners])


def lay_out(levels: list[int], edges: list[tuple[int, int]], *, widest: int) -> Layout:
    """Place nodes with integer `levels` and `edges` (below, above); rows hold at most `widest` boxes.

    Distances between levels show compressed, and never less than one row; a level with too many nodes is stacked.
    """
    rows, heights, ticks = _make_rows(levels, widest=widest)
    row_of = {node: index for index, row in enumerate(rows) for node in row}
    total = sum(row_of[high] - row_of[low] - 1 for low, high in edges)
    paths = _add_waypoints(rows, row_of, edges, direct=total > _MOST_WAYPOINTS, first=len(levels))
    count = max(max(row) for row in rows) + 1
    row_of = {node: index for index, row in enumerate(rows) for node in row}
    below, above = _neighbours(paths, count)
    real = len(levels)
    x = np.zeros(count)
    for row in rows:
        x[row] = np.arange(len(row)) - (len(row) - 1) / 2
    for sweep in range(_SWEEPS):
        upward = sweep % 2 == 0
        for row in rows if upward else rows[::-1]:
            near = below if upward else above
            row.sort(key=lambda node: (x[near[node]].mean() if near[node] else x[node], node))
            _space(row, x, real, near)
    both = {node: below[node] + above[node] for node in range(count)}
    for _ in range(_SWEEPS):
        for row in rows:
            _space(row, x, real, both)
    y = np.array([heights[row_of[node]] for node in range(count)])
    routes = [([float(x[node]) for node in path], [float(y[node]) for node in path]) for path in paths]
    return Layout(x[:real], y[:real], routes, ticks)


def _make_rows(levels: list[int], *, widest: int) -> tuple[list[list[int]], list[float], dict[float, str]]:
    rows: list[list[int]] = []
    heights: list[float] = []
    ticks: dict[float, str] = {}
    height, previous = 0.0, None
    for level in sorted(set(levels)):
        height += 0.0 if previous is None else 1.0 + 0.25 * float(np.log1p(level - previous - 1))
        ticks[height] = str(level)
        nodes = [node for node, at in enumerate(levels) if at == level]
        for shift, start in enumerate(range(0, len(nodes), widest)):
            height += 0.8 * (shift > 0)
            rows.append(nodes[start : start + widest])
            heights.append(height)
        previous = level
    return rows, heights, ticks


def _add_waypoints(
    rows: list[list[int]], row_of: dict[int, int], edges: list[tuple[int, int]], *, direct: bool, first: int
) -> list[list[int]]:
    """Append waypoints to `rows`; each edge's path of nodes. With `direct`, too large a diagram, none are made."""
    paths, fresh = [], first
    for low, high in edges:
        between = [] if direct else range(row_of[low] + 1, row_of[high])
        path = [low]
        for index in between:
            rows[index].append(fresh)
            path.append(fresh)
            fresh += 1
        paths.append([*path, high])
    return paths


def _neighbours(paths: list[list[int]], count: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    below: dict[int, list[int]] = {node: [] for node in range(count)}
    above: dict[int, list[int]] = {node: [] for node in range(count)}
    for path in paths:
        for low, high in itertools.pairwise(path):
            below[high].append(low)
            above[low].append(high)
    return below, above


def _space(row: list[int], x: np.ndarray, real: int, near: dict[int, list[int]]) -> None:
    """Move the nodes of `row` as near to their neighbours' mean as order and minimal distances allow."""
    half = np.array([_BOX if node < real else _LINE for node in row]) / 2
    offset = np.concatenate([[0.0], np.cumsum(half[1:] + half[:-1])])
    wanted = np.array([np.mean(x[near[node]]) if near[node] else x[node] for node in row])
    weight = np.array([1.0 if node < real else 4.0 for node in row])
    x[row] = isotonic_regression(wanted - offset, sample_weight=weight) + offset
