import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from gen_invariance.order.bootstrap import CellBounds
from gen_invariance.order.relation import subset_order
from gen_invariance.order.sets import class_pairs
from gen_invariance.report.diagram import diagram_dot, diagram_text, draw_diagram, hasse, render, write_diagram
from gen_invariance.report.layout import lay_out


def order_of(estimate, half=0.0, names="abcd", subsets=None):
    estimate = np.asarray(estimate, dtype=float)
    subsets = subsets or [(), (0, 1), (0, 2), (1, 2), (0, 1, 2), (2, 3)][: len(estimate)]
    bounds = CellBounds(estimate, estimate - half, estimate + half, 0.05, "bonferroni", 5)
    return subset_order(bounds, subsets=subsets, pairs=class_pairs(len(names)), class_names=names, threshold=0.9)


@pytest.fixture
def diamond():
    low, high = 0.6, 0.97
    rows = [
        [low] * 6,
        [high] + [low] * 5,
        [low, high] + [low] * 4,
        [low, 0.975] + [low] * 4,
        [high, high, high] + [low] * 3,
    ]
    return order_of(rows)


def test_nodes_edges_and_gains(diamond):
    drawn = hasse(diamond)
    assert drawn.members == [(0,), (1,), (2, 3), (4,)]
    assert drawn.levels == [0, 1, 1, 3]
    assert drawn.edges == [(0, 1, 1, True), (0, 2, 1, True), (1, 3, 2, True), (2, 3, 2, True)]
    assert drawn.labels[2] == "{a, c}\n{b, c}"


def test_undecided_covers_are_dashed_and_certain_jumps_stay():
    estimate = [[0.6] * 6, [0.93] + [0.6] * 5, [0.99, 0.99] + [0.6] * 4]
    half = np.zeros((3, 6))
    half[1, 0] = 0.05
    order = order_of(estimate, half)
    assert hasse(order).edges == [(0, 1, 1, True), (1, 2, 1, True)]
    half[2, 0] = half[1, 0] = 0.2
    half[0] = 0.0
    vague = order_of(estimate, half)
    assert vague.state((0, 1), (0, 2)) == "undecided"
    assert (1, 2, 1, False) in hasse(vague).edges
    assert (0, 1, 1, True) in hasse(vague).edges
    assert (0, 2, 2, True) in hasse(vague).edges, "a certain relation is not hidden behind an undecided cover"


def test_text_and_dot_say_the_same(diamond):
    text, dot = diagram_text(diamond), diagram_dot(diamond)
    assert text.index("{a, b, c}") < text.index("start")
    assert "    3  {a, b, c}" in text
    assert "    ^ +2 {a, b, c}" in text
    assert "    1  {a, c} = {b, c}" in text
    assert dot.count("->") == 4
    assert 'n2 -> n3 [label="+2", style=solid];' in dot


def test_odd_class_names_do_not_break_dot():
    order = order_of([[0.95] * 6], names=['q"uote', "back\\slash", "c", "d"], subsets=[(0, 1)])
    assert 'q\\"uote' in diagram_dot(order)
    assert "back\\\\slash" in diagram_dot(order)


def test_files_are_whole_and_repeatable(diamond, tmp_path):
    paths = write_diagram(tmp_path, diamond)
    assert {p.name for p in tmp_path.iterdir()} == {"order.svg", "order.png", "order.dot", "order.txt"}
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    root = ElementTree.fromstring(paths["svg"].read_text())
    assert root.tag.endswith("svg")
    assert render(draw_diagram(diamond), "svg") == paths["svg"].read_bytes()


def test_layout_has_no_overlap_and_keeps_heights():
    rng = np.random.default_rng(0)
    levels = sorted(rng.integers(0, 9, 30).tolist())
    edges = [(a, b) for a, b in itertools.combinations(range(30), 2) if levels[a] < levels[b] and rng.random() < 0.15]
    placed = lay_out(levels, edges, widest=7)
    for a, b in itertools.combinations(range(30), 2):
        assert abs(placed.x[a] - placed.x[b]) > 0.99 or abs(placed.y[a] - placed.y[b]) > 0.75
        assert levels[a] == levels[b] or (placed.y[a] < placed.y[b]) == (levels[a] < levels[b])
    for (low, high), (across, up) in zip(edges, placed.routes, strict=True):
        assert (across[0], up[0]) == (placed.x[low], placed.y[low])
        assert (across[-1], up[-1]) == (placed.x[high], placed.y[high])
        assert up == sorted(up)


def test_numbers_and_boxes_in_the_figure(diamond):
    words = [text.get_text() for text in draw_diagram(diamond).axes[0].texts]
    assert sum(word.startswith("+") for word in words) == 4
    assert "start\n0 pairs" in words
