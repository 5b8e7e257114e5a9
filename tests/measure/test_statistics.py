import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.run import named_generator
from gen_invariance.stats import (
    bootstrap_interval,
    class_size_association,
    least_p_value,
    mean_interval,
    paired_difference,
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
    other = paired_difference(a, zero, generator=named_generator(1, "flips")).permutation_p_value
    assert other != p_value


def test_rows_are_tested_one_by_one_and_a_missing_pair_does_not_count():
    a, b = noise(5, 13) + 0.5, noise(5, 13, seed=3)
    a[0, 4:] = np.nan
    b[1, :6] = np.nan
    a[2] = np.nan
    together = paired_difference(a, b, generator=named_generator(0, "x"))
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


def test_the_bootstrap_interval_of_the_mean_is_near_the_normal_one():
    sample = noise(400) * 2 + 1
    interval = bootstrap_interval(sample, lambda x: x.mean(axis=1), generator=named_generator(0, "b"), resamples=4000)
    half_width = 1.96 * sample.std() / 20
    assert interval.estimate == pytest.approx(sample.mean())
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


def associate(counts, values, **settings):
    return class_size_association(counts, values, generator=named_generator(0, "a"), **{"resamples": 300, **settings})


def test_slope_and_rank_correlation_are_scipys_ties_included():
    counts = np.array([[500, 200, 200, 50, 20, 5], [5, 20, 500, 200, 50, 200]])
    values = np.round(noise(2, 6), 1) - np.log10(counts)
    found = associate(counts, values)
    line = stats.linregress(np.log10(counts).ravel(), values.ravel())
    assert (found.slope.estimate, found.intercept) == pytest.approx((line.slope, line.intercept))
    assert found.spearman.estimate == pytest.approx(stats.spearmanr(counts.ravel(), values.ravel()).statistic)
    assert (found.used, found.dropped) == (12, 0)


def test_missing_classes_are_dropped_and_counted():
    counts = np.array([100, 50, 20, 10, 5, 0])
    values = np.array([0.1, np.nan, 0.5, 0.4, 1.0, 3.0])
    found, kept = associate(counts, values), [0, 2, 3, 4]
    assert (found.used, found.dropped) == (4, 2)
    assert found.slope.estimate == pytest.approx(stats.linregress(np.log10(counts[kept]), values[kept]).slope)
    assert found.spearman.estimate == pytest.approx(stats.spearmanr(counts[kept], values[kept]).statistic)


def test_every_resample_is_the_line_and_rank_of_its_own_rows():
    counts, values = np.array([100, 60, 30, 10, 5]), np.array([0.2, 0.1, np.nan, 0.9, 0.8])
    found = associate(counts, values, resamples=20)
    rows = torch.randint(5, (20, 1, 5), generator=named_generator(0, "a"))[:, 0].numpy()
    for line, drawn in zip(found.lines, rows, strict=True):
        kept = drawn[~np.isnan(values[drawn])]
        x, y = np.log10(counts[kept]), values[kept]
        if len(set(kept)) > 1:
            slope, intercept = np.polyfit(x, y, 1)
            np.testing.assert_allclose(line, [intercept, slope], atol=1e-9)
        else:
            assert np.isnan(line).all()


def test_resampled_classes_keep_the_size_they_have_in_their_own_seed():
    counts = np.array([[100, 60, 30, 10], [5, 20, 80, 40]])
    values = 2 - 0.5 * np.log10(counts)
    found = associate(counts, values, resamples=50)
    np.testing.assert_allclose(found.lines, [[2, -0.5]] * 50)
    assert (found.slope.low, found.spearman.low, found.spearman.high) == pytest.approx((-0.5, -1, -1))


def test_classes_are_resampled_within_their_seed():
    # Seed 0 is flat at 0, seed 1 flat at 10: pooled across seeds the mean level would wander from 5.
    counts = np.array([[100, 50, 20, 10]] * 2)
    values = np.array([[0.0] * 4, [10.0] * 4])
    found = associate(counts, values, resamples=200)
    defined = found.lines[np.isfinite(found.lines[:, 1])]
    rows = torch.randint(4, (200, 2, 4), generator=named_generator(0, "a")).numpy()
    x = np.log10(counts[0])[rows]
    levels = defined[:, 0] + defined[:, 1] * x[np.isfinite(found.lines[:, 1])].mean(axis=(1, 2))
    np.testing.assert_allclose(levels, 5)


def test_the_slope_interval_covers_about_as_often_as_it_says():
    counts = np.geomspace(500, 5, 40)
    covered = 0
    for trial in range(60):
        values = 2 - 0.5 * np.log10(counts) + 0.3 * noise(40, seed=trial)
        interval = class_size_association(counts, values, generator=named_generator(trial, "c"), resamples=300).slope
        covered += interval.low <= -0.5 <= interval.high
    assert 50 <= covered <= 60


@pytest.mark.parametrize(
    ("counts", "values", "slope", "spearman"),
    [
        ([7, 7, 7], [1.0, 2.0, 3.0], np.nan, np.nan),
        ([100, 10, 1], [0.3, 0.3, 0.3], 0.0, np.nan),
        ([100], [1.0], np.nan, np.nan),
        ([100, 10], [np.nan, np.nan], np.nan, np.nan),
        ([], [], np.nan, np.nan),
    ],
)
def test_a_constant_or_empty_side_gives_nan_not_a_crash(counts, values, slope, spearman):
    found = associate(counts, values)
    assert found.slope.estimate == pytest.approx(slope, nan_ok=True)
    assert found.spearman.estimate == pytest.approx(spearman, nan_ok=True)
    assert np.isnan([found.spearman.low, found.spearman.high]).all()


def test_identical_values_in_every_class_leave_no_slope_from_rounding():
    found = associate(np.geomspace(5000, 50, 10), np.full(10, 0.1 + 0.2))
    assert abs(found.slope.high) < 1e-12
    assert np.isnan(found.spearman.estimate)


def test_bad_class_sizes_are_refused():
    with pytest.raises(ShapeError, match="do not fit"):
        associate([1, 2, 3], [1.0, 2.0])
    with pytest.raises(RangeError, match="must not be negative"):
        associate([1, -2], [1.0, 2.0])
