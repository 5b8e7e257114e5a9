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

import matplotlib
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gen_invariance.files import atomic_write, write_text
from gen_invariance.order.preorder import Preorder
from gen_invariance.order.relation import SubsetOrder
from gen_invariance.report.layout import Layout, lay_out

_INK, _SOFT, _FILL, _START = "#1b2a41", "#8a97a8", "#e8f1fa", "#fdeccf"
_NUMBERED = 45  # with more lines than this only certain ones carry their number
_DETAILED = 60  # beyond this many nodes labels shrink to the number of classes


@dataclass(frozen=True)
class Hasse:
    """A diagram ready to draw.

    Attributes:
        members: for each node, indices of its subsets.
        labels: for each node, its text.
        levels: separated pairs of each node.
        edges: (below, above, pairs gained, certain) over nodes.
    """

    members: list[tuple[int, ...]]
    labels: list[str]
    levels: list[int]
    edges: list[tuple[int, int, int, bool]]


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
    place = {member: node for node, member in enumerate(first)}
    likely = {(place[a], place[b]) for a, b in order.estimated.covers()}
    dashed = {edge for edge in likely if not certain[edge]}
    gained = {(a, b): int((separated[b] & ~separated[a]).sum()) for a, b in solid | dashed}
    edges = sorted([(a, b, gained[a, b], True) for a, b in solid] + [(a, b, gained[a, b], False) for a, b in dashed])
    labels = ["\n".join(order.name(order.subsets[i]) for i in group) for group in members]
    return Hasse(members, labels, separated.sum(axis=1).tolist(), edges)


def diagram_text(order: SubsetOrder) -> str:
    """The diagram for a terminal: top level first; `^` names certain covers, `?` undecided ones."""
    drawn = hasse(order)
    above: dict[int, list[str]] = {node: [] for node in range(len(drawn.members))}
    for low, high, gain, certain in drawn.edges:
        label = drawn.labels[high].replace("\n", " = ")
        above[low].append(f"    {'^' if certain else '?'} +{gain} {label}")
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
    for low, high, gain, certain in drawn.edges:
        lines.append(f'  n{low} -> n{high} [label="+{gain}", style={"solid" if certain else "dashed"}];')
    for level in sorted(set(drawn.levels)):
        same = "; ".join(f"n{node}" for node, at in enumerate(drawn.levels) if at == level)
        lines.append(f"  {{rank=same; {same}}}")
    return "\n".join([*lines, "}"]) + "\n"


def draw_diagram(order: SubsetOrder, *, title: str = "Subset order") -> Figure:
    """The diagram as a matplotlib figure that is not tied to any window."""
    drawn = hasse(order)
    detailed = len(drawn.members) <= _DETAILED
    placed = lay_out(drawn.levels, [(low, high) for low, high, *_ in drawn.edges], widest=7 if detailed else 24)
    left, right = placed.span
    reach = max(right - left, 1.0) + 1
    size = (
        float(np.clip((1.7 if detailed else 0.7) * reach, 6.0, 40.0)),
        float(np.clip(0.95 * (placed.y.max() + 1) + 1.4, 4.0, 60.0)),
    )
    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    labelled = detailed and len(drawn.edges) <= _NUMBERED
    for number, ((_, _, gain, certain), (across, up)) in enumerate(zip(drawn.edges, placed.routes, strict=True)):
        line = {"color": _INK, "linestyle": "-"} if certain else {"color": _SOFT, "linestyle": (0, (4, 3))}
        axes.plot(across, up, linewidth=1.1, zorder=1, **line)
        if labelled or (detailed and certain):
            middle = 1 + (number * 2) % (len(across) - 1)  # numbers of neighbouring lines in different rows
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
            spot = (across[middle - 1] + across[middle]) / 2, (up[middle - 1] + up[middle]) / 2
            axes.text(*spot, f"+{gain}", fontsize=6.5, color=_INK, ha="center", va="center", zorder=2, bbox=box)
    for node, label in enumerate(_node_labels(order, drawn, detailed=detailed)):
        start = () in [order.subsets[i] for i in drawn.members[node]]
        box = {"boxstyle": "round,pad=0.35", "facecolor": _START if start else _FILL, "edgecolor": _INK}
        size = 7 if detailed else 5
        at = placed.x[node], placed.y[node]
        axes.text(*at, label, fontsize=size, ha="center", va="center", zorder=3, bbox={**box, "linewidth": 0.7})
    _dress(axes, placed, pairs=len(order.pairs))
    axes.set_title(title + "\n" + textwrap.fill(_headline(order) + "; dashed: undecided", 90), fontsize=9)
    figure.tight_layout()
    return figure


def _dress(axes: Axes, placed: Layout, *, pairs: int) -> None:
    left, right = placed.span
    axes.set_xlim(left - 0.7, right + 0.7)
    axes.set_ylim(placed.y.min() - 0.6, placed.y.max() + 0.6)
    axes.set_yticks(list(placed.ticks), list(placed.ticks.values()), fontsize=8)
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
