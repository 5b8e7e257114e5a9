import itertools
import math

import numpy as np
import pytest
import torch

from gen_invariance.errors import ShapeError
from gen_invariance.order.analysis.sensitivity import edge_frequency, split_half_stability, sweep_threshold
from gen_invariance.order.bootstrap import CellBounds

HALF = np.full(3, 0.9)


def strict(separated):
    n = len(separated)
    return {
        (a, b)
        for a in range(n)
        for b in range(n)
        if set(np.flatnonzero(separated[a])) < set(np.flatnonzero(separated[b]))
    }


def test_split_half_against_a_loop_over_all_halves():
    scores = np.random.default_rng(0).uniform(0.8, 1, (4, 6, 3))
    expected = []
    for half in itertools.combinations(range(4), 2):
        rest = [s for s in range(4) if s not in half]
        one, two = (strict(scores[list(part)].mean(0) >= HALF) for part in (half, rest))
        expected.append(len(one & two) / len(one | two) if one | two else 1.0)
    assert split_half_stability(scores, HALF, generator=torch.Generator()) == pytest.approx(np.mean(expected))


def test_equal_seeds_are_perfectly_stable_and_one_seed_says_nothing():
    one = np.random.default_rng(0).uniform(0.8, 1, (1, 6, 3))
    assert split_half_stability(np.repeat(one, 9, axis=0), HALF, generator=torch.Generator()) == 1
    assert math.isnan(split_half_stability(one, HALF, generator=torch.Generator()))
    with pytest.raises(ShapeError):
        split_half_stability(one[0], HALF, generator=torch.Generator())


def test_edge_frequency_counts_draws():
    draws = np.zeros((4, 2, 3), dtype=np.float32)
    draws[:, 1] = 1
    draws[0, 0] = 1
    draws[0, 1] = 0
    frequency = edge_frequency(draws, HALF)
    assert frequency.tolist() == [[1.0, 0.75], [0.25, 1.0]]


def test_persistence_is_a_share_of_thresholds():
    estimate = np.array([[0.75, 0.75, 0.9], [0.8, 0.8, 0.8]])
    bounds = CellBounds(estimate, estimate, estimate, 0.05, "none", 5)
    sweep = sweep_threshold(bounds, low=0.605, high=0.995, steps=40)
    above = (sweep.thresholds > 0.8) & (sweep.thresholds <= 0.9)
    assert sweep.persistence[0, 1] == pytest.approx(1 - above.mean())
    between = (sweep.thresholds > 0.75) & (sweep.thresholds <= 0.8)
    assert sweep.persistence[1, 0] == pytest.approx(1 - between.mean())
    assert sweep.classes[0] == 1
    assert sweep.edges[np.argmax(above)] == 1
    assert np.array_equal(sweep.persistence, sweep.certain_persistence)
