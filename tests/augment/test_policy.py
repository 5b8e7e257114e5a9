"""Probability by class size, against closed forms written out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.augment.policy import auto, hard_cutoff, linear_ramp, policy
from gen_invariance.errors import SettingsError

COUNTS = torch.tensor([500, 100, 60, 20, 5])


def test_linear_ramp_is_the_formula_of_the_paper():
    """max((T - n_c) / (T - n_min), 0) with T = 100 and n_min = 5."""
    expected = torch.tensor([0, 0, 40 / 95, 80 / 95, 1])
    torch.testing.assert_close(linear_ramp(COUNTS, threshold=100), expected)
    torch.testing.assert_close(linear_ramp(COUNTS, threshold=100, maximum=0.5), expected / 2)


@pytest.mark.parametrize("threshold", [5, 4.9, 1, 0, -10])
def test_nobody_is_below_a_threshold_at_or_under_the_smallest_class(threshold):
    """The bare formula divides by zero at T = n_min, and exceeds 1 below it."""
    assert linear_ramp(COUNTS, threshold=threshold).tolist() == [0, 0, 0, 0, 0]


counts = st.lists(st.integers(0, 5000), min_size=1, max_size=20).map(torch.tensor)


@settings(max_examples=100, deadline=None)
@given(counts=counts, threshold=st.floats(-5, 6000), maximum=st.floats(0, 1))
def test_linear_ramp_laws(counts, threshold, maximum):
    table = linear_ramp(counts, threshold=threshold, maximum=maximum)
    assert table.dtype == torch.float32
    assert table.shape == counts.shape
    smallest = min((n for n in counts.tolist() if n), default=0)
    for n, value in zip(counts.tolist(), table.tolist(), strict=True):
        if n == 0 or threshold <= smallest:
            assert value == 0
        else:
            expected = maximum * max((threshold - n) / (threshold - smallest), 0)
            assert value == pytest.approx(expected, abs=1e-6)
        assert 0 <= value <= maximum + 1e-7


def test_hard_cutoff_includes_the_cutoff_and_no_empty_class():
    table = hard_cutoff(torch.tensor([0, 19, 20, 21]), cutoff=20, probability=0.5)
    assert table.tolist() == [0, 0.5, 0.5, 0]


def test_auto_is_a_ramp_to_the_mean_of_the_classes_that_exist():
    table = auto(torch.tensor([0, 10, 30, 80]))  # mean 40
    torch.testing.assert_close(table, torch.tensor([0, 0.5, 0.5 * 10 / 30, 0]))
    assert auto(torch.tensor([0, 10, 30, 80]), maximum=1.0)[1] == 1


@pytest.mark.parametrize("counts", [[7, 7, 7], [0, 0], [3], [0, 9, 0]])
def test_auto_gives_nothing_where_there_is_no_tail(counts):
    assert auto(torch.tensor(counts)).tolist() == [0] * len(counts)


def test_everywhere_means_every_class_with_images():
    assert policy("everywhere", torch.tensor([0, 1, 9000]), probability=0.25).tolist() == [0, 0.25, 0.25]


def test_policy_passes_its_options_on():
    assert torch.equal(
        policy("linear_ramp", COUNTS, threshold=50, maximum=0.3), linear_ramp(COUNTS, threshold=50, maximum=0.3)
    )
    assert torch.equal(policy("hard_cutoff", COUNTS, cutoff=60), hard_cutoff(COUNTS, cutoff=60))
    assert torch.equal(policy("auto", COUNTS), auto(COUNTS))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ramp", {}, "unknown policy 'ramp'; choose one of linear_ramp, hard_cutoff, auto, head, everywhere, curve"),
        ("auto", {"treshold": 3}, "policy auto.*treshold"),
        ("linear_ramp", {}, "policy linear_ramp.*threshold"),
        ("linear_ramp", {"threshold": 50, "maximum": 1.1}, "maximum must lie in"),
        ("hard_cutoff", {"cutoff": 50, "probability": -0.1}, "probability must lie in"),
        ("hard_cutoff", {"cutoff": 50, "probability": float("nan")}, "probability must"),
        ("head", {"probability": 2.0}, "probability must lie in"),
        ("curve", {"sizes": [1, 2]}, "policy curve needs policy_options.probabilities"),
        ("curve", {"sizes": [2, 1], "probabilities": [0, 1]}, "sizes must ascend"),
        ("curve", {"sizes": [1, 2], "probabilities": [0.5]}, "one probability each"),
        ("curve", {"sizes": [1, 2], "probabilities": [0, 1.5]}, "probabilities must lie in"),
    ],
)
def test_bad_policies_are_named(name, options, message):
    with pytest.raises(SettingsError, match=message):
        policy(name, COUNTS, **options)
