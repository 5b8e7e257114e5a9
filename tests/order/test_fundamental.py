import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.errors import ShapeError
from gen_invariance.order.analysis import fundamental
from gen_invariance.order.sets import class_pairs


def brute_number(separated):
    reachable = separated.any(axis=0)
    for size in range(len(separated) + 1):
        for chosen in itertools.combinations(range(len(separated)), size):
            if (separated[list(chosen)].any(axis=0) == reachable).all():
                return size
    raise AssertionError


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 7), st.integers(1, 10), st.integers(0, 9999), st.floats(0.05, 0.9))
def test_exact_number_cover_and_essential_against_brute_force(count, pairs, seed, share):
    separated = np.random.default_rng(seed).random((count, pairs)) < share
    found = fundamental.fundamental_set(separated, num_classes=5)
    assert found.exact
    assert found.number == brute_number(separated)
    assert (separated[list(found.members)].any(axis=0) == separated.any(axis=0)).all()
    assert set(found.uncovered) == {p for p in range(pairs) if not separated[:, p].any()}
    for a in range(count):
        rest = np.delete(separated, a, axis=0)
        assert (a in found.essential) == bool((separated[a] & ~rest.any(axis=0)).any())
    assert set(found.essential) <= set(found.members)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 9999))
def test_greedy_covers_within_its_factor(count, pairs, seed):
    separated = np.random.default_rng(seed).random((count, pairs)) < 0.4
    members = fundamental._greedy(separated[:, separated.any(axis=0)])
    assert (separated[members].any(axis=0) == separated.any(axis=0)).all()
    assert len(members) <= math.ceil(brute_number(separated) * (math.log(pairs) + 1))


@pytest.mark.parametrize("classes", [3, 4, 5, 6])
def test_bounds_of_f_when_every_model_is_one_cut(classes):
    pairs = class_pairs(classes)
    sides = [s for s in itertools.product([0, 1], repeat=classes) if 0 < sum(s) < classes and s[0] == 0]
    cuts = np.array([[side[i] != side[j] for i, j in pairs] for side in sides])
    found = fundamental.fundamental_set(cuts, num_classes=classes)
    assert found.lower == math.ceil(math.log2(classes))
    assert found.number == found.lower, "with all cuts at hand the least family reaches log2"
    single = np.array([[(i == c) != (j == c) for i, j in pairs] for c in range(classes)])
    one_vs_rest = fundamental.fundamental_set(single, num_classes=classes)
    assert one_vs_rest.number == classes - 1, "n - 1 models of one class against the rest"
    one_pair_each = fundamental.fundamental_set(np.eye(len(pairs), dtype=bool), num_classes=classes)
    assert one_pair_each.number == one_pair_each.upper == math.comb(classes, 2)
    assert len(one_pair_each.essential) == len(pairs)


def test_many_sources_fall_back_to_greedy():
    separated = np.random.default_rng(0).random((fundamental.EXACT_SOURCES + 1, 12)) < 0.3
    found = fundamental.fundamental_set(separated, num_classes=6)
    assert not found.exact
    assert separated[list(found.members)].any(axis=0).sum() == separated.any(axis=0).sum()


def test_nothing_separated_and_bad_shape():
    empty = fundamental.fundamental_set(np.zeros((3, 4), dtype=bool), num_classes=4)
    assert empty.number == 0
    assert empty.lower is None
    with pytest.raises(ShapeError):
        fundamental.fundamental_set(np.zeros(4, dtype=bool), num_classes=4)
