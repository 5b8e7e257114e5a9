"""The programs that measure speed: ratios are within a round, and quality decides when a fit is as good."""

import json

import torch

from benchmarks import fitting, timing


def test_ratios_are_taken_within_a_round_to_the_variant_that_is_named():
    variants = [
        timing.Variant("recipe", "plain"),
        timing.Variant("ours", "same"),
        timing.Variant("with", "changed", against="ours", cost=True),
    ]
    # The second round ran on a machine half as fast, which no ratio may show.
    rows = timing.compare("path", variants, [[4.0, 8.0, 4.0], [2.0, 4.0, 1.0], [3.0, 6.0, 1.0]])
    assert [row["ratio"] for row in rows] == [None, [2.0, 2.0, 4.0], [1.0, 1.5, 1.5]]
    assert [row["against"] for row in rows] == [None, "recipe", "ours"]
    assert [row["ms"] for row in rows] == [4000.0, 2000.0, 3000.0]


def test_the_first_round_warms_up_and_units_are_divided_by():
    taken = iter([100.0, 6.0, 9.0])
    device = torch.device("cpu")
    variant = timing.Variant("ours", "same", seconds=lambda: next(taken), units=3)
    assert timing.measure([variant], rounds=2, device=device) == [[2.0, 3.0]]


def test_a_fit_counts_from_where_all_figures_are_as_good_as_the_recipes_last(tmp_path):
    good = {"accuracy_kept": 0.9, "kernel_distance": 0.1, "coverage": 0.9, "diversity": 0.5}
    looks = [
        {"arm": "truth", **good, "diversity": 0.4},
        {"arm": "recipe", "step": 50, **good, "diversity": 0.6, "few_ekld": 0.5},
        {"arm": "small", "step": 1, **good, "coverage": 0.8},  # one figure short
        {"arm": "small", "step": 2, **good, "diversity": 0.1},  # farther from the truth on the other side
        {"arm": "small", "step": 5, **good, "diversity": 0.25},
        {"arm": "small", "step": 9, **good, "few_ekld": 0.4},
        {"arm": "munit", "step": 9, **good, "kernel_distance": 0.2},
    ]
    trained = {"balanced_accuracy": 0.8, "few_accuracy": 0.7}
    rows = ({"seed": seed, **row, **(trained if "few_ekld" in row else {})} for seed in (0, 1) for row in looks)
    (tmp_path / "fitting.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "costs.json").write_text(json.dumps({"recipe": 2.0, "small": 0.5, "munit": 3.0}))
    lines = fitting.summary(tmp_path).splitlines()
    assert lines[2:6] == [
        "| 0 | truth |  |  |  | 0.90 | 0.10 | 0.90 | 0.40 |",
        "| 0 | recipe | 50 | 100.0 |  | 0.90 | 0.10 | 0.90 | 0.60 |",
        "| 0 | munit | not within 9 |  |  |  |  |  |  |",
        "| 0 | small | 5 | 2.5 | 40.0 | 0.90 | 0.10 | 0.90 | 0.25 |",
    ]
    assert lines[-2:] == [
        "| the recipe's MUNIT | 2 | 80.0 ± 0.0 | 70.0 ± 0.0 | 0.500 ± 0.000 |",
        "| `small`, difference to the recipe's | 2 | +0.0 ± 0.0 | +0.0 ± 0.0 | -0.100 ± 0.000 |",
    ]
