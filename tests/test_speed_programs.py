"""The programs that measure speed: ratios are within a round, and quality decides when a fit is as good."""

import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return pytest.importorskip


def test_ratios_are_taken_within_a_round_to_the_variant_that_is_named(program):
    speed = program("benchmark_speed")
    variants = [
        speed.Variant("recipe", "plain"),
        speed.Variant("ours", "same"),
        speed.Variant("with", "changed", against="ours", cost=True),
    ]
    # The second round ran on a machine half as fast, which no ratio may show.
    rows = speed.rows_of("path", variants, [[4.0, 8.0, 4.0], [2.0, 4.0, 1.0], [3.0, 6.0, 1.0]])
    assert [row["ratio"] for row in rows] == [None, [2.0, 2.0, 4.0], [1.0, 1.5, 1.5]]
    assert [row["against"] for row in rows] == [None, "recipe", "ours"]
    assert [row["ms"] for row in rows] == [4000.0, 2000.0, 3000.0]


def test_the_first_round_warms_up_and_units_are_divided_by(program):
    speed = program("benchmark_speed")
    taken = iter([100.0, 6.0, 9.0])
    device = speed.torch.device("cpu")
    variant = speed.Variant("ours", "same", seconds=lambda: next(taken), units=3)
    assert speed.measure([variant], rounds=2, device=device) == [[2.0, 3.0]]


def test_a_fit_counts_from_where_all_figures_are_as_good_as_the_recipes_last(program, tmp_path):
    fitting = program("compare_fitting")
    good = {"accuracy_kept": 0.9, "kernel_distance": 0.1, "coverage": 0.9, "diversity": 0.5}
    looks = [
        {"arm": "recipe", "seconds": 100.0, "step": 50, **good, "diversity": 0.6},
        {"arm": "small", "seconds": 1.0, "step": 1, **good, "coverage": 0.8},  # one figure short
        {"arm": "small", "seconds": 2.0, "step": 2, **good},  # less diverse
        {"arm": "small", "seconds": 5.0, "step": 5, **good, "diversity": 0.7},
        {"arm": "munit", "seconds": 9.0, "step": 9, **good, "kernel_distance": 0.2},
    ]
    file = tmp_path / "fitting-0.jsonl"
    file.write_text("".join(json.dumps(look) + "\n" for look in looks))
    assert fitting.summary(file).splitlines() == [
        "recipe: 100 s, 50 steps, diversity 0.60",
        "small: 2.0 s, 2 steps, diversity 0.50",
        "small: as diverse: 5.0 s, 5 steps, diversity 0.70",
    ]
