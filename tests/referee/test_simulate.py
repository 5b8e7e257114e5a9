"""Simulated tails: what is trained on, what is held back, and that no group is on both sides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError
from gen_invariance.referee.settings import RefereeSettings
from gen_invariance.referee.simulate import find_large_classes, simulate_tail

QUICK = RefereeSettings()
sizes = st.lists(st.integers(1, 60), min_size=2, max_size=9)


def data_of(counts, groups=None):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return ImageData(images, labels, tuple(map(str, range(len(counts)))), "set", groups)


def tails(data, number):
    """The split, or None where the set is refused for a reason that `find_large_classes` or the groups give."""
    try:
        return simulate_tail(data, QUICK, number=number, seed=3)
    except DataError:
        return None


@settings(max_examples=60, deadline=None)
@given(counts=sizes, number=st.integers(1, 4))
def test_a_split_is_disjoint_and_leaves_the_tail_alone(counts, number):
    data = data_of(counts)
    tail = tails(data, number)
    if tail is None:
        assert sum(count >= 8 for count in counts) < 2
        return
    assert not set(tail.train_rows.tolist()) & set(tail.score_rows.tolist())
    trained = torch.bincount(data.labels[tail.train_rows], minlength=len(counts))
    scored = torch.bincount(data.labels[tail.score_rows], minlength=len(counts))
    large = set(find_large_classes(data, QUICK).tolist())
    small = [count for label, count in enumerate(counts) if label not in large]
    cut = set(tail.cut.tolist())
    assert set(tail.scored.tolist()) == large == set(scored.nonzero().flatten().tolist())
    assert cut < large
    assert int(scored.max()) <= QUICK.score_images
    for label, count in enumerate(counts):
        if label not in large:
            assert trained[label] == count
        elif label in cut and small:
            assert int(trained[label]) in {*small, count - int(scored[label])}
            assert 1 <= trained[label] <= max(small)
        else:
            assert 1 <= trained[label] < count
            assert trained[label] + scored[label] <= count


grouped = st.lists(
    st.tuples(st.integers(2, 8), st.integers(1, 12)), min_size=3, max_size=7
)  # groups of a class, images of a group


@settings(max_examples=60, deadline=None)
@given(classes=grouped, number=st.integers(1, 4), shared=st.booleans())
def test_no_group_is_on_both_sides(classes, number, shared):
    counts = [groups * images for groups, images in classes]
    groups = torch.cat([torch.arange(n).repeat_interleave(m) + 100 * c for c, (n, m) in enumerate(classes)])
    if shared:  # a patient shows several classes
        groups = groups % 100
    data = data_of(counts, groups)
    tail = tails(data, number)
    if tail is None:
        return
    assert not set(groups[tail.train_rows].tolist()) & set(groups[tail.score_rows].tolist())
    assert set(data.labels[tail.train_rows].tolist()) == set(range(len(counts)))  # every class stays in training
    assert set(data.labels[tail.score_rows].tolist()) == set(tail.scored.tolist())


def test_groups_of_one_class_give_a_split():
    groups = torch.arange(6 * 8).repeat_interleave(5)  # 6 classes of 8 tracks of 5 images
    data = data_of([40] * 6, groups)
    assert tails(data, 1) is not None


def test_a_pair_of_splits_cuts_every_large_class_once():
    data = data_of([100, 90, 80, 70, 60, 50, 9, 8, 7, 6, 5, 4])
    first, second, third = (set(tails(data, number).cut.tolist()) for number in (1, 2, 3))
    assert first | second == set(range(6))
    assert not first & second
    assert len(third) == 3


def test_cut_sizes_are_spread_over_those_of_the_tail():
    data = data_of([200] * 8 + [80, 40, 20, 10, 8, 6, 4, 2])
    tail = tails(data, 1)
    trained = torch.bincount(data.labels[tail.train_rows], minlength=16)[tail.cut].sort().values
    quarters = [(2, 4), (6, 8), (10, 20), (40, 80)]
    assert all(int(size) in quarter for size, quarter in zip(trained, quarters, strict=True))


def test_balanced_classes_are_held_back_from_and_not_cut():
    data = data_of([50] * 6)
    trained = torch.bincount(data.labels[tails(data, 1).train_rows], minlength=6)
    assert int(trained.min()) == 40  # ten of fifty are held back


@pytest.mark.parametrize("counts", [[7, 7, 7], [500, 3, 2]])
def test_too_few_images_are_refused(counts):
    with pytest.raises(DataError, match="too few images to choose an augmentation by"):
        simulate_tail(data_of(counts), QUICK, number=1)


def test_a_class_of_one_group_cannot_be_parted():
    data = data_of([30, 30, 30], torch.tensor([0] * 30 + [1] * 30 + [2] * 15 + [3] * 15))
    with pytest.raises(DataError, match="1 class"):
        simulate_tail(data, QUICK, number=1)
