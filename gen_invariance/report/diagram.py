"""Hasse diagrams of a subset order: matplotlib (SVG, PNG), DOT and text; graphviz is not needed.

Nodes are groups of subsets that separate the same pairs. Height is the number of separated pairs, with crowded
levels pulled apart (the axis says which level is which). A solid line is a certain cover; a dashed line is a cover
of the estimated order that is not certain yet. The number on a line says how many pairs are gained.
"""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gen_invariance.files import atomic_write, write_text
from gen_invariance.order.preorder import Preorder
from gen_invariance.order.relation import SubsetOrder
from gen_invariance.order.sets import START
from gen_invariance.report.layout import Layout, lay_out

_INK, _SOFT = "#1b2a41", "#8a97a8"  # certain lines and text, dashed lines
_FILL, _START = "#e8f1fa", "#fdeccf"  # boxes; that of the start
_NUMBERED = 45  # with more lines than this only certain ones carry their number
_DETAILED = 60  # beyond this many nodes labels shrink to the number of classes


class Edge(NamedTuple):
    """A line of the diagram: node numbers, pairs that `above` separates and `below` does not, whether it is certain."""

    below: int
    above: int
    gained: int
    certain: bool


@dataclass(frozen=True)
class Hasse:
    """A diagram ready to draw.

    Attributes:
        members: for each node, indices of its subsets.
        labels: for each node, its text.
        levels: separated pairs of each node.
        edges: over nodes, sorted.
    """

    members: list[tuple[int, ...]]
    labels: list[str]
    levels: list[int]
    edges: list[Edge]


def hasse(order: SubsetOrder) -> Hasse:
    """Nodes and cover edges of `order`, certain covers and the estimated covers that are not certain."""
    members = order.estimated.classes()
    first = [group[0] for group in members]
    separated = order.separated[first]
    # A group is certainly below another when every member is; groups of equal members keep this transitive.
    certain = np.array([[order.certain.leq[np.ix_(a, b)].all() for b in members] for a in members], dtype=bool)
    np.fill_diagonal(certain, True)
    merged = Preorder(certain, height=separated.sum(axis=1))
    solid = set(nx.transitive_reduction(nx.from_numpy_array(merged.strict, create_using=nx.DiGraph)).edges)
    likely = {(first.index(a), first.index(b)) for a, b in order.estimated.covers()}
    dashed = {edge for edge in likely if not certain[edge]}
    edges = []
    for below, above in solid | dashed:
        gained = int((separated[above] & ~separated[below]).sum())
        edges.append(Edge(below, above, gained, (below, above) in solid))
    labels = ["\n".join(order.name(order.subsets[i]) for i in group) for group in members]
    return Hasse(members, labels, separated.sum(axis=1).tolist(), sorted(edges))


def diagram_text(order: SubsetOrder) -> str:
    """The diagram for a terminal: top level first; `^` names certain covers, `?` undecided ones."""
    drawn = hasse(order)
    above: dict[int, list[str]] = {node: [] for node in range(len(drawn.members))}
    for edge in drawn.edges:
        label = drawn.labels[edge.above].replace("\n", " = ")
        above[edge.below].append(f"    {'^' if edge.certain else '?'} +{edge.gained} {label}")
    lines = [_headline(order)]
    for node in sorted(above, key=lambda n: (-drawn.levels[n], n)):
        label = drawn.labels[node].replace("\n", " = ")
        lines += [f"{drawn.levels[node]:>5}  {label}", *above[node]]
    return "\n".join([*lines, *(f"note: {note}" for note in order.notes)]) + "\n"


def _headline(order: SubsetOrder) -> str:
    tau = order.threshold
    level = f"{tau.min():.2f}" if tau.size and tau.min() == tau.max() else "relative"
    counts = order.counts()
    return (
        f"{len(order)} subsets, {len(order.pairs)} pairs, threshold {level}, mode {order.mode}, head {order.head}: "
        f"{counts['certain']} certain, {counts['refuted']} refuted, {counts['undecided']} undecided"
    )


def diagram_dot(order: SubsetOrder) -> str:
    """The diagram in the DOT language."""
    drawn = hasse(order)
    lines = ["digraph order {", "  rankdir=BT;", '  node [shape=box, style="rounded,filled", fillcolor="#e8f1fa"];']
    for node, label in enumerate(drawn.labels):
        quoted = label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        lines.append(f'  n{node} [label="{quoted}\\n{drawn.levels[node]}"];')
    for edge in drawn.edges:
        style = "solid" if edge.certain else "dashed"
        lines.append(f'  n{edge.below} -> n{edge.above} [label="+{edge.gained}", style={style}];')
    for level in sorted(set(drawn.levels)):
        same = "; ".join(f"n{node}" for node, at in enumerate(drawn.levels) if at == level)
        lines.append(f"  {{rank=same; {same}}}")
    return "\n".join([*lines, "}"]) + "\n"


def draw_diagram(order: SubsetOrder, *, title: str = "Subset order") -> Figure:
    """The diagram as a matplotlib figure that is not tied to any window."""
    drawn = hasse(order)
    detailed = len(drawn.members) <= _DETAILED
    layout = lay_out(drawn.levels, [(edge.below, edge.above) for edge in drawn.edges], widest=7 if detailed else 24)
    left, right = layout.span
    width = (1.7 if detailed else 0.7) * (max(right - left, 1.0) + 1)
    height = 0.95 * (layout.y.max() + 1) + 1.4
    figure = Figure(figsize=(float(np.clip(width, 6.0, 40.0)), float(np.clip(height, 4.0, 60.0))))
    axes = figure.add_subplot()
    _draw_edges(axes, drawn, layout, detailed=detailed)
    for node, label in enumerate(_node_labels(order, drawn, detailed=detailed)):
        has_start = START in [order.subsets[index] for index in drawn.members[node]]
        fill = _START if has_start else _FILL
        box = {"boxstyle": "round,pad=0.35", "facecolor": fill, "edgecolor": _INK, "linewidth": 0.7}
        style = {"fontsize": 7 if detailed else 5, "ha": "center", "va": "center", "zorder": 3}
        axes.text(layout.x[node], layout.y[node], label, bbox=box, **style)
    _dress(axes, layout, pairs=len(order.pairs))
    axes.set_title(title + "\n" + textwrap.fill(_headline(order) + "; dashed: undecided", 90), fontsize=9)
    figure.tight_layout()
    return figure


def _draw_edges(axes: Axes, drawn: Hasse, layout: Layout, *, detailed: bool) -> None:
    few = len(drawn.edges) <= _NUMBERED
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    for index, edge in enumerate(drawn.edges):
        x, y = layout.routes[index]
        color, dashes = (_INK, "-") if edge.certain else (_SOFT, (0, (4, 3)))
        axes.plot(x, y, linewidth=1.1, zorder=1, color=color, linestyle=dashes)
        if detailed and (few or edge.certain):
            part = (index * 2) % (len(x) - 1)  # numbers of neighbouring lines stand in different rows
            spot = np.mean(x[part : part + 2]), np.mean(y[part : part + 2])
            style = {"fontsize": 6.5, "color": _INK, "ha": "center", "va": "center", "zorder": 2}
            axes.text(*spot, f"+{edge.gained}", bbox=box, **style)


def _dress(axes: Axes, layout: Layout, *, pairs: int) -> None:
    left, right = layout.span
    axes.set_xlim(left - 0.7, right + 0.7)
    axes.set_ylim(layout.y.min() - 0.6, layout.y.max() + 0.6)
    axes.set_yticks(list(layout.ticks), list(layout.ticks.values()), fontsize=8)
    axes.set_xticks([])
    axes.set_ylabel(f"separated pairs, of {pairs}")
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _node_labels(order: SubsetOrder, drawn: Hasse, *, detailed: bool) -> list[str]:
    if not detailed:
        return ["/".join(str(len(order.subsets[i])) for i in group[:2]) for group in drawn.members]
    labels = []
    for group, level in zip(drawn.members, drawn.levels, strict=True):
        names = [order.name(order.subsets[i]) for i in group[:3]]
        more = [f"and {len(group) - 3} more"] if len(group) > 3 else []
        wrapped = [textwrap.fill(name, 24, break_long_words=False) for name in names]
        labels.append("\n".join([*wrapped, *more, f"{level} pairs"]))
    return labels


def render(figure: Figure, kind: str) -> bytes:
    """`figure` as "png" or "svg" bytes; equal figures give equal bytes."""
    buffer = io.BytesIO()
    extra = {"metadata": {"Date": None}} if kind == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "gen_invariance"}):
        figure.savefig(buffer, format=kind, dpi=150, **extra)
    return buffer.getvalue()


def write_diagram(folder: Path | str, order: SubsetOrder, *, title: str = "Subset order") -> dict[str, Path]:
    """Write order.svg, .png, .dot and .txt into `folder`; the paths by suffix."""
    folder = Path(folder)
    figure = draw_diagram(order, title=title)
    paths = {suffix: folder / f"order.{suffix}" for suffix in ("svg", "png", "dot", "txt")}
    for suffix in ("svg", "png"):
        with atomic_write(paths[suffix]) as temporary:
            temporary.write_bytes(render(figure, suffix))
    write_text(paths["dot"], diagram_dot(order))
    write_text(paths["txt"], diagram_text(order))
    return paths
