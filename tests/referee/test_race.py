"""Gains and their intervals against plain loops, and who goes on to the next round."""

import math

import numpy as np
import pytest
from scipy import stats

from gen_invariance.referee.race import (
    PRIOR_WEIGHT,
    USUAL,
    Table,
    find_gain,
    find_reference,
    find_survivors,
    rank_candidates,
)


def make_table(seed=0, splits=3, names=("none", "a", "b"), rates=(0.5, 0.6, 0.9), images=60):
    random = np.random.default_rng(seed)
    labels = {split: np.sort(random.integers(0, 5, images)) for split in range(1, splits + 1)}
    figures = {
        name: {split: random.random(images) < rate for split in labels} for name, rate in zip(names, rates, strict=True)
    }
    return Table(figures, labels)


def slow_balanced(right, labels):
    classes = sorted(set(labels.tolist()))
    return (
        100
        * sum(
            sum(bool(r) for r, label in zip(right, labels, strict=True) if label == c) / (labels == c).sum()
            for c in classes
        )
        / len(classes)
    )


def slow_image_variance(one, other, labels):
    classes = sorted(set(labels.tolist()))
    total = 0.0
    for c in classes:
        steps = [float(x) - float(y) for x, y, label in zip(one, other, labels, strict=True) if label == c]
        mean = sum(steps) / len(steps)
        total += sum((step - mean) ** 2 for step in steps) / (len(steps) - 1) / len(steps)
    return 1e4 * total / len(classes) ** 2


def test_gain_against_loops():
    table = make_table()
    gain = find_gain(table, "b", "a", level=0.9)
    differences = {
        name: [
            slow_balanced(table.figures[name][s], table.labels[s])
            - slow_balanced(table.figures["a"][s], table.labels[s])
            for s in (1, 2, 3)
        ]
        for name in ("none", "b")
    }
    floor = np.mean(
        [slow_image_variance(table.figures["b"][s], table.figures["a"][s], table.labels[s]) for s in (1, 2, 3)]
    )
    prior = max(np.mean([np.var(each, ddof=1) for each in differences.values()]), floor)
    freedom = 2 + PRIOR_WEIGHT
    variance = (2 * np.var(differences["b"], ddof=1) + PRIOR_WEIGHT * prior) / freedom
    half = stats.t.ppf(0.95, freedom) * math.sqrt(variance / 3)
    assert gain.points == pytest.approx(np.mean(differences["b"]))
    assert (gain.low, gain.high) == pytest.approx((gain.points - half, gain.points + half))
    assert (gain.against, gain.splits) == ("a", 3)


def test_one_split_takes_twice_the_variance_of_the_images():
    table = make_table(splits=1, names=("none", "a"), rates=(0.5, 0.6))
    gain = find_gain(table, "a", "none", level=0.95)
    variance = 2 * slow_image_variance(table.figures["a"][1], table.figures["none"][1], table.labels[1])
    half = stats.t.ppf(0.975, PRIOR_WEIGHT) * math.sqrt(variance)
    assert gain.high - gain.points == pytest.approx(half)


def test_intervals_hold_what_they_promise():
    """Two candidates that are equally good: about 95 of 100 intervals hold 0."""
    tables = [make_table(seed, names=("none", "a", "b"), rates=(0.7, 0.7, 0.7), splits=4) for seed in range(300)]
    hit = [gain.low <= 0 <= gain.high for gain in (find_gain(table, "a", "none", level=0.95) for table in tables)]
    assert 0.92 <= np.mean(hit) <= 0.995


def test_a_candidate_that_was_dropped_is_ranked_by_the_splits_it_has():
    table = make_table(rates=(0.5, 0.3, 0.9), splits=4)
    table.figures["a"] = {split: table.figures["a"][split] for split in (1, 2)}
    assert rank_candidates(table) == ["b", "none", "a"]
    assert find_gain(table, "a", "b", level=0.95).splits == 2


def test_the_better_third_goes_on_with_the_best_of_either_kind():
    names = ("none", "g1", "g2", "l1", "l2", "l3")
    table = make_table(names=names, rates=(0.1, 0.3, 0.2, 0.95, 0.85, 0.75), images=400)
    alive = list(names)
    kept = find_survivors(table, alive, lambda name: name.startswith("l"))
    assert kept == ["g1", "l1", "l2"]
    assert find_survivors(table, kept, lambda name: name.startswith("l")) == ["g1", "l1", "l2"]  # two at least
    assert find_survivors(table, ["g1", "l1"], lambda name: name.startswith("l")) == ["g1", "l1"]


def test_the_usual_augmentation_is_used_unless_another_is_clearly_ahead():
    """By hand: on one split the standard error is that of the images, twice in variance."""
    names, plain = ("none", USUAL, "learned"), ("none", USUAL)
    near = make_table(4, splits=1, names=names, rates=(0.55, 0.5, 0.9))
    error = math.sqrt(2 * slow_image_variance(near.figures["none"][1], near.figures[USUAL][1], near.labels[1]))
    ahead = near.differences("none", USUAL)[0]
    assert 0 < ahead < error
    assert find_reference(near, plain) == USUAL
    far = make_table(splits=4, names=names, rates=(0.8, 0.4, 0.9))
    assert find_reference(far, plain) == "none"
    assert find_reference(far, ("none",)) == "none"
    worse = make_table(splits=4, names=names, rates=(0.4, 0.8, 0.9))
    assert find_reference(worse, plain) == USUAL
    assert set(find_survivors(near, names, lambda name: name == "learned")) == set(names)
