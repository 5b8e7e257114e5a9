import math

import numpy as np
import pytest
from scipy import stats

from gen_invariance.order.analysis import along
from gen_invariance.order.bootstrap import CellBounds
from gen_invariance.order.relation import subset_order
from gen_invariance.order.sets import class_pairs

NAMES = "abcd"
SUBSETS = [(), (0, 1), (0, 2), (0, 1, 2), (0, 1, 2, 3)]
LOW, HIGH = 0.6, 0.95
#            01    02    03    12    13    23
SEPARATED = [
    [0, 0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0, 1],
    [0, 1, 0, 0, 0, 0],
    [1, 1, 0, 1, 0, 1],
    [1, 1, 1, 0, 1, 1],
]


@pytest.fixture
def order():
    estimate = np.where(SEPARATED, HIGH, LOW)
    bounds = CellBounds(estimate, estimate - 0.01, estimate + 0.01, 0.05, "none", 4)
    return subset_order(bounds, subsets=SUBSETS, pairs=class_pairs(4), class_names=NAMES, threshold=0.9)


ACCURACY = np.array([[0.3, 0.5, 0.45, 0.6, 0.9], [0.3, 0.5, 0.47, 0.4, 0.9], [0.3, 0.53, 0.46, 0.45, 0.9]])


def test_gains_at_covers(order):
    gains = {(g.below, g.above): g for g in along.cover_gains(order, ACCURACY, images=np.array([0, 20, 20, 30, 40]))}
    assert set(gains) == {
        ((), (0, 1)),
        ((0, 1), (0, 1, 2)),
        ((0, 2), (0, 1, 2)),
        ((0, 1), (0, 1, 2, 3)),
        ((0, 2), (0, 1, 2, 3)),
    }
    step = gains[(0, 1), (0, 1, 2)]
    difference = ACCURACY[:, 3] - ACCURACY[:, 1]
    assert step.gain == pytest.approx(difference.mean())
    low, high = stats.ttest_1samp(difference, 0).confidence_interval()
    assert step.half_width == pytest.approx((high - low) / 2)
    assert (step.pairs_gained, step.classes_added, step.images_added, step.certain) == (2, 1, 10, True)
    assert step.gain_per_image == pytest.approx(difference.mean() / 10)
    assert math.isnan(along.cover_gains(order, ACCURACY[:1], images=np.zeros(5))[0].half_width)
    assert math.isnan(along.cover_gains(order, ACCURACY, images=np.zeros(5))[0].gain_per_image)


def test_chain_fits(order):
    fits = {fit.chain: fit for fit in along.chain_fits(order, ACCURACY, target=(0, 1))}
    assert set(fits) == {
        ((), (0, 1), (0, 1, 2)),
        ((), (0, 1), (0, 1, 2, 3)),
        ((0, 2), (0, 1, 2)),
        ((0, 2), (0, 1, 2, 3)),
    }
    falling = fits[(), (0, 1), (0, 1, 2)]
    assert falling.violations == 0.5
    assert falling.isotonic_r2 < 1
    assert falling.sufficient == (0, 1)
    rising = fits[(), (0, 1), (0, 1, 2, 3)]
    assert rising.violations == 0
    assert rising.isotonic_r2 == pytest.approx(1)
    assert along.chain_fits(order, ACCURACY * np.nan, target=(0, 1)) == []


def test_against_the_start(order):
    found = {entry.subset: entry for entry in along.against_start(order)}
    assert (found[0, 2].gained, found[0, 2].lost, found[0, 2].harmful) == (1, 1, "certain")
    assert (found[0, 1].gained, found[0, 1].lost, found[0, 1].harmful) == (1, 0, "no")


def test_nested_subsets(order):
    found = along.nested_subsets(order)
    assert ((0, 1), (0, 1, 2)) in found["obey"]
    assert found["disobey"] == [((0, 1, 2), (0, 1, 2, 3))]
    assert found["refuted"] == [((0, 1, 2), (0, 1, 2, 3))]
    assert found["edges_not_nested"] == 0


def test_seen_half_and_unseen(order):
    seen = along.seen_half_unseen(order)
    tables = {"seen": [], "half_seen": [], "unseen": []}
    for subset, row in zip(SUBSETS[1:], SEPARATED[1:], strict=True):
        for (i, j), value in zip(class_pairs(4).tolist(), row, strict=True):
            key = ("unseen", "half_seen", "seen")[(i in subset) + (j in subset)]
            tables[key].append(HIGH if value else LOW)
    assert seen == pytest.approx({key: np.mean(values) for key, values in tables.items()})


def test_correlations_with_accuracy(order):
    expected = stats.spearmanr(np.sum(SEPARATED, axis=1), ACCURACY.mean(0)).statistic
    assert along.separated_against_accuracy(order, ACCURACY) == pytest.approx(expected)
    assert math.isnan(along.separated_against_accuracy(order, ACCURACY * 0))
    good = np.eye(4, dtype=bool)
    good[3] = True
    good[3, 2] = False
    assert along.agreement_with_accuracy(order, good) == pytest.approx(along.roc_auc_score(*_shares(good)))
    assert math.isnan(along.agreement_with_accuracy(order, np.ones((4, 4), dtype=bool)))


def _shares(good):
    truth, share = [], []
    for b in range(4):
        inside = [p for p, (i, j) in enumerate(class_pairs(4).tolist()) if {i, j} <= set(SUBSETS[b + 1])]
        for a in range(4):
            if a != b:
                truth.append(good[a, b])
                share.append(np.mean([SEPARATED[a + 1][p] for p in inside]))
    return truth, share


def test_invariance_along_the_order(order):
    ekld = np.ones((3, 5, 4))
    ekld[:, 3, 3] = 0.5  # (0, 1, 2) is above (0, 1) and (0, 2); only class 3 is unseen by both
    found = along.invariance_along(order, ekld)
    assert found.steps == 2
    assert found.more_invariant == 1
    assert found.mean_change == pytest.approx(math.log(0.5))
    assert found.seed_half_width == pytest.approx(0)
    assert found.spearman < 0
    nothing = along.invariance_along(order, np.full((3, 5, 4), np.nan))
    assert math.isnan(nothing.mean_change)
