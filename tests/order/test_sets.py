import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.errors import SettingsError
from gen_invariance.order import sets

NAMES = ("cat", "cow", "dog", "fox", "hen")


def test_names_and_indices_give_the_same_sorted_tuples():
    assert sets.canonical_subsets([["dog", "cat"], [4, 1]], class_names=NAMES) == ((0, 2), (1, 4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no class subset"),
        ([["cat"]], "at least 2"),
        ([["cat", "cat"]], "twice"),
        ([["cat", "dog"], ["dog", "cat"]], "given twice"),
        ([["cat", "emu"]], "unknown class 'emu'"),
        ([[0, 5]], "unknown class 5"),
        ([[0, -1]], "unknown class -1"),
    ],
)
def test_bad_subsets_are_refused_in_one_line(given, message):
    with pytest.raises(SettingsError, match=message) as caught:
        sets.canonical_subsets(given, class_names=NAMES)
    assert "\n" not in str(caught.value)


def test_a_single_class_is_allowed_only_when_asked_for():
    assert sets.canonical_subsets([[3]], class_names=NAMES, smallest=1) == ((3,),)


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 7), st.data())
def test_random_subsets_are_distinct_in_range_and_repeatable(classes, data):
    low = data.draw(st.integers(2, classes))
    high = data.draw(st.integers(low, classes))
    most = sum(math.comb(classes, k) for k in range(low, high + 1))
    count = data.draw(st.integers(1, most))
    draw = [
        sets.random_subsets(classes, count, sizes=(low, high), generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    ]
    assert draw[0] == draw[1]
    assert len(set(draw[0])) == count
    assert all(low <= len(s) <= high and s == tuple(sorted(set(s))) for s in draw[0])


def test_more_subsets_than_exist_are_refused():
    with pytest.raises(SettingsError, match="there are 10"):
        sets.random_subsets(5, 11, sizes=(2, 2), generator=torch.Generator())


def test_full_lattice_counts_and_limit():
    assert len(sets.all_subsets(5)) == 2**5 - 5 - 1
    with pytest.raises(SettingsError, match="full lattice"):
        sets.all_subsets(13)
    with pytest.raises(SettingsError, match="too many"):
        sets.subsets_of_size(40, 20)


def test_prefixes_follow_class_sizes_with_ties_by_index():
    counts = [10, 50, 10, 3]
    assert sets.prefix_subsets(counts, end="head", sizes=[2, 3]) == ((0, 1), (0, 1, 2))
    assert sets.prefix_subsets(counts, end="tail", sizes=[2, 3]) == ((0, 3), (0, 2, 3))
    with pytest.raises(SettingsError, match="prefix sizes"):
        sets.prefix_subsets(counts, end="head", sizes=[5])
    with pytest.raises(SettingsError, match="'head' or 'tail'"):
        sets.prefix_subsets(counts, end="middle", sizes=[2])


def test_pairs_and_masks_match_itertools():
    pairs = sets.class_pairs(6)
    assert [tuple(p) for p in pairs] == list(itertools.combinations(range(6), 2))
    chosen = {tuple(p) for p in pairs[sets.pair_mask((1, 3, 4), pairs)]}
    assert chosen == set(itertools.combinations((1, 3, 4), 2))
    assert sets.class_pairs(1).shape == (0, 2)
    assert not np.any(sets.pair_mask((), pairs))


def test_names_of_subsets():
    assert sets.subset_name((), NAMES) == "start"
    assert sets.subset_name((0, 3), NAMES) == "{cat, fox}"
    assert sets.subset_name((0, 3)) == "{0, 3}"
