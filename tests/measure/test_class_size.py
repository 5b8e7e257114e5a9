import numpy as np
import pytest
import torch
from scipy import stats

from gen_invariance.errors import RangeError, ShapeError
from gen_invariance.measure.class_size import class_size_association
from gen_invariance.run import named_generator


def noise(*shape, seed=0):
    return torch.randn(shape, generator=named_generator(seed, "statistics"), dtype=torch.float64).numpy()


def associate(counts, values, **settings):
    return class_size_association(counts, values, generator=named_generator(0, "a"), **{"resamples": 300, **settings})


def test_slope_and_rank_correlation_are_scipys_ties_included():
    counts = np.array([[500, 200, 200, 50, 20, 5], [5, 20, 500, 200, 50, 200]])
    values = np.round(noise(2, 6), 1) - np.log10(counts)
    found = associate(counts, values)
    line = stats.linregress(np.log10(counts).ravel(), values.ravel())
    assert (found.slope.value, found.intercept) == pytest.approx((line.slope, line.intercept))
    assert found.spearman.value == pytest.approx(stats.spearmanr(counts.ravel(), values.ravel()).statistic)
    assert (found.used, found.dropped) == (12, 0)


def test_missing_classes_are_dropped_and_counted():
    counts = np.array([100, 50, 20, 10, 5, 0])
    values = np.array([0.1, np.nan, 0.5, 0.4, 1.0, 3.0])
    found, kept = associate(counts, values), [0, 2, 3, 4]
    assert (found.used, found.dropped) == (4, 2)
    assert found.slope.value == pytest.approx(stats.linregress(np.log10(counts[kept]), values[kept]).slope)
    assert found.spearman.value == pytest.approx(stats.spearmanr(counts[kept], values[kept]).statistic)


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
    assert found.slope.value == pytest.approx(slope, nan_ok=True)
    assert found.spearman.value == pytest.approx(spearman, nan_ok=True)
    assert np.isnan([found.spearman.low, found.spearman.high]).all()


def test_identical_values_in_every_class_leave_no_slope_from_rounding():
    found = associate(np.geomspace(5000, 50, 10), np.full(10, 0.1 + 0.2))
    assert abs(found.slope.high) < 1e-12
    assert np.isnan(found.spearman.value)


def test_bad_class_sizes_are_refused():
    with pytest.raises(ShapeError, match="do not fit"):
        associate([1, 2, 3], [1.0, 2.0])
    with pytest.raises(RangeError, match="must not be negative"):
        associate([1, -2], [1.0, 2.0])
