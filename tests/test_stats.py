import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.run import named_generator
from gen_invariance.stats import (
    bootstrap_interval,
    bootstrap_ratio,
    half_sample_interval,
    holm_adjusted,
    least_p_value,
    mean_interval,
    paired_difference,
    permutation_p_value,
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=named_generator(seed, "statistics"), dtype=torch.float64).numpy()


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("count", [2, 3, 30])
def test_the_mean_interval_is_scipys(count, level):
    values = noise(count) + 3
    low, high = stats.t.interval(level, count - 1, loc=values.mean(), scale=stats.sem(values))
    interval = mean_interval(torch.from_numpy(values), level)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-12)
    assert interval.count == count


def test_missing_values_are_left_out_row_by_row_and_counted():
    values = np.array([[1.0, 2.0, 4.0], [1.0, np.nan, 2.0], [np.nan, 5.0, np.nan], [np.nan] * 3])
    interval = mean_interval(values)
    assert interval.count.tolist() == [3, 2, 1, 0]
    np.testing.assert_allclose(interval.mean, [7 / 3, 1.5, 5, np.nan])
    assert np.isnan(interval.half_width).tolist() == [False, False, True, True]
    assert interval.half_width[1] == pytest.approx(mean_interval([1.0, 2.0]).half_width)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_outside_its_range_is_refused(level):
    with pytest.raises(SettingsError, match=r"between 0 and 1, got"):
        mean_interval([1.0, 2.0], level)


def test_the_paired_test_is_scipys():
    a, b = noise(8), noise(8, seed=1) + 0.4
    theirs = stats.ttest_rel(a, b)
    ours = paired_difference(a, b)
    assert ours.t_p_value == pytest.approx(theirs.pvalue, rel=1e-10)
    interval = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-10)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_permutation_p_is_that_of_every_sign_pattern(count):
    differences = noise(count) + 0.7
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=count)]
    expected = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)
    assert paired_difference(differences, np.zeros(count)).permutation_p_value == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 3, 5, 12, 13, 20])
def test_no_permutation_p_is_below_its_floor(count):
    """Differences that all point one way have the least p there is; that of drawn flips is at least theirs."""
    found = paired_difference(np.arange(1.0, count + 1), np.zeros(count)).permutation_p_value
    assert found == pytest.approx(least_p_value(count)) if count <= 12 else found >= least_p_value(count)
    assert np.isnan(least_p_value(0))


def test_the_permutation_p_agrees_with_scipys_exact_test():
    differences = noise(10) + 0.3
    theirs = stats.permutation_test(
        (differences,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    ours = paired_difference(differences, np.zeros(10))
    assert ours.permutation_p_value == pytest.approx(theirs.pvalue, abs=1e-12)


def test_many_pairs_are_drawn_and_come_near_the_exact_p():
    a, zero = noise(14) + 0.35, np.zeros(14)
    patterns = np.array(list(itertools.product([1, -1], repeat=14)))
    exact = np.mean(np.abs(patterns @ a) >= abs(a.sum()) - 1e-12)
    p_value = paired_difference(a, zero).permutation_p_value
    assert abs(p_value - exact) < 5 * np.sqrt(exact * (1 - exact) / 10_000)
    assert paired_difference(a, zero).permutation_p_value == p_value


def test_rows_are_tested_one_by_one_and_a_missing_pair_does_not_count():
    a, b = noise(5, 13) + 0.5, noise(5, 13, seed=3)
    a[0, 4:] = np.nan
    b[1, :6] = np.nan
    a[2] = np.nan
    together = paired_difference(a, b)
    for row in (0, 1):
        kept = ~np.isnan(a[row] - b[row])
        alone = paired_difference(a[row][kept], b[row][kept])
        assert together.count[row] == kept.sum() == (4, 7)[row]
        for field in ("mean", "half_width", "t_p_value", "permutation_p_value"):
            assert getattr(together, field)[row] == pytest.approx(getattr(alone, field), rel=1e-12), field
    assert np.isnan(together.permutation_p_value).tolist() == [False, False, True, False, False]
    assert together.count[2] == 0


def test_degenerate_pairs():
    alone = paired_difference([0.5], [0.2])
    assert np.isnan(alone.half_width)
    assert np.isnan(alone.t_p_value)
    assert alone.permutation_p_value == 1
    same = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.half_width, same.t_p_value, same.permutation_p_value) == (0, 0, 1, 1)
    constant = paired_difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert (constant.half_width, constant.t_p_value, constant.permutation_p_value) == (0, 0, 0.25)
    with pytest.raises(ShapeError, match="align them by seed"):
        paired_difference([1.0, 2.0], [1.0])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0.1, 10))
def test_paired_difference_laws(differences, scale):
    zero = np.zeros(len(differences))
    forth, back = paired_difference(differences, zero), paired_difference(zero, differences)
    scaled = paired_difference(np.array(differences) * scale, zero)
    assert forth.mean == -back.mean
    assert forth.permutation_p_value == back.permutation_p_value == scaled.permutation_p_value
    assert 2 / 2 ** len(differences) <= forth.permutation_p_value <= 1


def test_holm_by_hand():
    found = holm_adjusted([0.01, math.nan, 0.04, 0.03, 0.005])
    assert found[[0, 2, 3, 4]].tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert math.isnan(found[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_laws(values):
    found = holm_adjusted(values)
    assert (found >= np.array(values) - 1e-12).all()
    assert (found <= 1).all()
    assert (np.diff(found[np.argsort(values, kind="stable")]) >= -1e-12).all()


def test_holm_steps_down_and_stops_at_the_first_failure():
    p = [0.03, 0.001, 0.02, 0.6, 0.013]  # against .05/5, .05/4 = .0125: the second smallest already fails
    for order in itertools.permutations(range(5)):
        assert (holm_adjusted(np.array(p)[list(order)]) <= 0.05).tolist() == [n == 1 for n in order]
    assert (holm_adjusted([0.02, 0.012, 0.04]) <= 0.05).all()
    assert (holm_adjusted([0.04, 0.02]) <= 0.05).all(), "Bonferroni alone would keep only the second"


def test_a_permutation_p_is_small_only_where_labels_matter():
    labels, values = torch.arange(40) % 2, torch.from_numpy(noise(40))

    def p_value(rows):
        def gap(given):
            return float(rows[given == 1].mean() - rows[given == 0].mean())

        return permutation_p_value(gap, labels, generator=named_generator(0, "p"))

    assert p_value(values) > 0.05
    assert p_value(values + 5 * labels) == 1 / 200


def test_bootstrap_ratio_covers_the_truth_as_often_as_it_says():
    hits = 0
    for k in range(150):
        top, below = noise(80, seed=k) + 2, noise(80, seed=1000 + k) * 0.2 + 1
        found = bootstrap_ratio(top, below, generator=named_generator(k, "r"), resamples=200)
        assert found.value == pytest.approx(float(top.mean() / below.mean()))
        hits += found.low <= 2 <= found.high
    assert 132 <= hits <= 149


def test_half_sample_interval_has_the_standard_error_of_a_mean():
    values = torch.from_numpy(noise(400))
    found = half_sample_interval(
        lambda rows: float(values[rows].mean()), 400, generator=named_generator(0, "r"), resamples=400
    )
    assert found.value == pytest.approx(float(values.mean()))
    assert found.high - found.value == pytest.approx(1.96 * float(values.std()) / 20, rel=0.15)


def test_intervals_of_nothing_are_nan():
    assert math.isnan(bootstrap_ratio(torch.zeros(0), generator=named_generator(0, "r")).value)
    assert math.isnan(bootstrap_ratio(torch.ones(5), torch.zeros(5), generator=named_generator(0, "r")).value)


def test_the_bootstrap_interval_of_the_mean_is_near_the_normal_one():
    sample = noise(400) * 2 + 1
    interval = bootstrap_interval(sample, lambda x: x.mean(axis=1), generator=named_generator(0, "b"), resamples=4000)
    half_width = 1.96 * sample.std() / 20
    assert interval.value == pytest.approx(sample.mean())
    assert interval.low == pytest.approx(sample.mean() - half_width, abs=0.08 * half_width)
    assert interval.high == pytest.approx(sample.mean() + half_width, abs=0.08 * half_width)
    again = bootstrap_interval(sample, lambda x: x.mean(axis=1), generator=named_generator(0, "b"), resamples=4000)
    assert again == interval


def test_rows_stay_together_and_blocks_do_not_change_the_bootstrap(monkeypatch):
    pairs = np.stack([np.arange(20.0), 2 * np.arange(20.0)], axis=1)

    def ratio(rows):
        return rows[..., 1].sum(axis=1) / rows[..., 0].sum(axis=1)

    whole = bootstrap_interval(pairs, ratio, generator=named_generator(0, "b"), resamples=50)
    assert (whole.low, whole.high) == (2, 2)
    monkeypatch.setattr("gen_invariance.stats._BLOCK", 100)
    assert bootstrap_interval(pairs, ratio, generator=named_generator(0, "b"), resamples=50) == whole


def test_an_empty_bootstrap_is_refused():
    with pytest.raises(ShapeError, match="at least one row"):
        bootstrap_interval([], lambda x: x.mean(axis=1), generator=named_generator(0, "b"))
    with pytest.raises(SettingsError, match="resamples must be at least 1"):
        bootstrap_interval([1.0], lambda x: x.mean(axis=1), generator=named_generator(0, "b"), resamples=0)
