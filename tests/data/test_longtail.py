import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.data.longtail import (
    class_groups,
    class_order,
    counts_by_class,
    exponential_counts,
    long_tailed_indices,
    shot_groups,
    split_indices,
    step_counts,
    zipf_counts,
)
from gen_invariance.errors import DataError, RangeError, SettingsError, ShapeError
from gen_invariance.run import named_generator

K49 = [4800, 1200, 533, 300, 192, 133, 97, 75, 59, 48, 39, 33, 28, 24, 21, 18, 16, 14, 13]
K49 += [12, 10, 9, 9, 8, 7, 7, 6, 6] + [5] * 21
PINNED_CHOICE = [0, 5, 9, 11, 13, 14, 15, 26, 33, 35]
PINNED_ORDER = [1, 0, 3, 7, 5, 2, 4, 6]
label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(lambda values: torch.tensor(values))


@pytest.mark.parametrize(
    ("num_classes", "largest", "imbalance", "total"),
    [
        (10, 5000, 100, 12_406),
        (10, 5000, 50, 13_996),
        (10, 5000, 10, 20_431),
        (100, 500, 100, 10_847),
        (100, 500, 50, 12_608),
        (100, 500, 10, 19_573),
        (200, 500, 100, 21_549),
    ],
)
def test_exponential_counts_have_the_published_totals(num_classes, largest, imbalance, total):
    counts = exponential_counts(num_classes, largest=largest, imbalance=imbalance)
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == total


def test_exponential_counts_are_the_published_list_of_cifar10():
    published = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert exponential_counts(10, largest=5000, imbalance=100).tolist() == published


def test_zipf_counts_are_those_of_k49():
    counts = zipf_counts(49, largest=4800, power=2.0, smallest=5)
    assert counts.tolist() == K49
    assert int(counts.sum()) == 7_822
    assert int(zipf_counts(49, largest=4800, power=1.02, smallest=5).sum()) == 20_771


@pytest.mark.parametrize("largest", range(1, 200))
def test_last_class_is_not_lost_to_floats(largest):
    # 49 * (1 / 49) is 0.999..., which truncates to 0.
    assert exponential_counts(2, largest=largest, imbalance=largest).tolist() == [largest, 1]
    assert step_counts(2, largest=largest, imbalance=largest).tolist() == [largest, 1]
    assert zipf_counts(largest, largest=largest, power=1.0)[-1] == 1


@given(st.integers(1, 40), st.integers(1, 10_000), st.integers(1, 500), st.integers(1, 100))
def test_exact_zipf_and_step_counts(num_classes, largest, imbalance, smallest):
    smallest = min(smallest, largest)
    exact = [max(largest // rank, smallest) for rank in range(1, num_classes + 1)]
    assert zipf_counts(num_classes, largest=largest, power=1.0, smallest=smallest).tolist() == exact
    imbalance = min(imbalance, largest)
    head = max(1, num_classes // 2)
    stepped = [largest] * head + [math.floor(Fraction(largest, imbalance))] * (num_classes - head)
    assert step_counts(num_classes, largest=largest, imbalance=imbalance).tolist() == stepped


@given(st.integers(1, 60), st.integers(1, 5000), st.floats(1, 300))
def test_exponential_counts_fall_from_largest_to_its_share(num_classes, largest, imbalance):
    imbalance = min(imbalance, float(largest))
    counts = exponential_counts(num_classes, largest=largest, imbalance=imbalance)
    assert counts[0] == largest
    assert (counts[:-1] >= counts[1:]).all()
    assert num_classes == 1 or counts[-1] == math.floor(largest / imbalance * (1 + 1e-9))


@pytest.mark.parametrize(
    "call",
    [
        lambda: exponential_counts(0, largest=5, imbalance=2),
        lambda: exponential_counts(3, largest=0, imbalance=1),
        lambda: exponential_counts(3, largest=5, imbalance=0.5),
        lambda: exponential_counts(3, largest=5, imbalance=math.nan),
        lambda: exponential_counts(3, largest=5, imbalance=6),
        lambda: step_counts(3, largest=5, imbalance=6),
        lambda: step_counts(3, largest=5, imbalance=2, head_share=0),
        lambda: step_counts(3, largest=5, imbalance=2, head_share=1.1),
        lambda: zipf_counts(3, largest=5, power=-1),
        lambda: zipf_counts(3, largest=5, power=1, smallest=0),
        lambda: zipf_counts(3, largest=5, power=1, smallest=6),
    ],
)
def test_impossible_counts_are_refused_in_one_line(call):
    with pytest.raises(SettingsError) as caught:
        call()
    assert "\n" not in str(caught.value)


@given(st.integers(1, 30), st.integers(0, 10))
def test_order_gives_each_class_the_count_of_its_rank(num_classes, seed):
    order = class_order(num_classes, generator=named_generator(seed, "order"))
    by_rank = torch.arange(num_classes, 0, -1)
    counts = counts_by_class(by_rank, order)
    for rank in range(num_classes):
        assert counts[order[rank]] == by_rank[rank]


@given(label_lists, st.integers(0, 5), st.data())
def test_chosen_images_fill_the_counts_without_replacement(labels, seed, data):
    available = torch.bincount(labels, minlength=7)
    counts = torch.tensor([data.draw(st.integers(0, int(n))) for n in available])
    chosen = long_tailed_indices(labels, counts, generator=named_generator(seed))
    assert chosen.dtype == torch.int64
    assert len(set(chosen.tolist())) == len(chosen) == int(counts.sum())
    assert torch.equal(torch.bincount(labels[chosen], minlength=7), counts)
    assert torch.equal(chosen, chosen.sort().values)


@given(label_lists, st.integers(0, 5))
def test_smaller_counts_choose_a_subset(labels, seed):
    available = torch.bincount(labels, minlength=7)
    few = long_tailed_indices(labels, available // 2, generator=named_generator(seed))
    more = long_tailed_indices(labels, (available + 1) // 2, generator=named_generator(seed))
    assert set(few.tolist()) <= set(more.tolist())


def test_each_image_is_chosen_equally_often():
    labels = torch.tensor([0] * 6 + [1] * 3)
    draws = 3000
    hits = torch.zeros(9)
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        hits[long_tailed_indices(labels, torch.tensor([2, 1]), generator=generator)] += 1
    assert (hits / draws - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / draws)


def test_chosen_images_are_the_same_on_every_machine():
    labels = torch.arange(40) % 4
    counts = torch.tensor([1, 4, 2, 3])
    chosen = long_tailed_indices(labels, counts, generator=named_generator(0, "pinned"))
    assert chosen.tolist() == PINNED_CHOICE
    assert class_order(8, generator=named_generator(0, "pinned")).tolist() == PINNED_ORDER


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(DataError, match="class 1 has 1 images, 2 were asked for"):
        long_tailed_indices(torch.tensor([0, 0, 1]), torch.tensor([2, 2]), generator=named_generator(0))


def test_bad_labels_and_counts_are_refused():
    generator = named_generator(0)
    with pytest.raises(RangeError, match="renumber"):
        long_tailed_indices(torch.tensor([0, 3]), torch.tensor([1, 1]), generator=generator)
    with pytest.raises(RangeError, match="counts"):
        long_tailed_indices(torch.tensor([0, 1]), torch.tensor([1, -1]), generator=generator)
    with pytest.raises(ShapeError, match="whole numbers"):
        long_tailed_indices(torch.tensor([0.0, 1.0]), torch.tensor([1, 1]), generator=generator)
    with pytest.raises(RangeError, match="renumber"):
        split_indices(torch.tensor([-1, 1]), fraction=0.5, generator=generator)


@given(label_lists, st.floats(0, 0.99), st.integers(0, 5))
def test_split_parts_every_class(labels, fraction, seed):
    kept, held = split_indices(labels, fraction=fraction, generator=named_generator(seed))
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    for label in labels.unique():
        total, out = int((labels == label).sum()), int((labels[held] == label).sum())
        if fraction == 0 or total == 1:
            assert out == 0
        else:
            assert out == min(max(math.floor(total * fraction + 0.5), 1), total - 1)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_split_refuses_a_fraction_outside_0_to_1(fraction):
    with pytest.raises(SettingsError, match="fraction"):
        split_indices(torch.tensor([0, 1]), fraction=fraction, generator=named_generator(0))


@given(st.lists(st.integers(0, 300), min_size=1), st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=50)
def test_every_class_is_in_exactly_one_group(values, first, second):
    few_below, many_above = min(first, second), max(first, second)
    counts = torch.tensor(values)
    groups = class_groups(counts, many_above=many_above, few_below=few_below)
    assert list(groups) == ["many", "medium", "few"]
    assert (sum(group.long() for group in groups.values()) == 1).all()
    for number, value in enumerate(values):
        expected = "many" if value > many_above else "few" if value < few_below else "medium"
        assert groups[expected][number]


def test_groups_that_overlap_are_refused():
    with pytest.raises(SettingsError, match="overlaps"):
        class_groups(torch.tensor([5]), many_above=10, few_below=12)


@given(
    counts=st.lists(st.integers(1, 400), min_size=2, max_size=60),
    many_above=st.one_of(st.none(), st.integers(0, 300)),
    few_below=st.one_of(st.none(), st.integers(1, 300)),
)
def test_shot_groups_part_the_classes_by_size_and_leave_no_end_empty(counts, many_above, few_below):
    if many_above is not None and few_below is not None and few_below > many_above + 1:
        few_below = many_above + 1
    counts = torch.tensor(counts)
    groups = shot_groups(counts, many_above=many_above, few_below=few_below)
    assert torch.equal(sum(group.long() for group in groups.values()), torch.ones(len(counts), dtype=torch.int64))
    if len(counts.unique()) > 1:
        assert groups["many"].any()
        assert groups["few"].any()
    sizes = {name: counts[group] for name, group in groups.items() if group.any()}
    for larger, smaller in (("many", "medium"), ("medium", "few"), ("many", "few")):
        if larger in sizes and smaller in sizes:
            assert sizes[larger].min() >= sizes[smaller].max()


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        (exponential_counts(10, largest=5000, imbalance=100), (4, 3, 3)),  # CIFAR-10-LT: thirds
        (exponential_counts(100, largest=500, imbalance=100), (35, 35, 30)),  # CIFAR-100-LT: published bounds
        (step_counts(10, largest=5000, imbalance=100), (5, 0, 5)),  # classes of one size stay together
        (zipf_counts(26, largest=480, power=2.0, smallest=5), (2, 2, 22)),
        (torch.full((5,), 7), (0, 0, 5)),  # none of them is small beside another
    ],
)
def test_shot_groups_of_known_sets(counts, sizes):
    bounds = {} if len(counts) != 10 else {"many_above": None, "few_below": None}
    assert tuple(int(group.sum()) for group in shot_groups(counts, **bounds).values()) == sizes
