"""What translated images are measured by, against slow loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import polynomial_kernel as sklearn_polynomial

from gen_invariance.errors import DataError, ShapeError
from gen_invariance.translator.quality.measures import (
    between_class_share,
    copy_ratio,
    describe_change,
    kernel_distance,
    kolmogorov_distance,
    neighbour_scores,
    polynomial_kernel,
    resultant_length,
    spread_of_draws,
    spread_within_classes,
)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def distance(a, b):
    return math.dist(a.double().tolist(), b.double().tolist())


def test_the_kernel_is_that_of_sklearn():
    a, b = normal(7, 5), normal(9, 5, seed=1)
    assert torch.allclose(polynomial_kernel(a, b), torch.from_numpy(sklearn_polynomial(a.double(), b.double())))


def test_kernel_distance_equals_its_double_sum():
    real, fake = normal(6, 3), normal(8, 3, seed=1) + 0.5

    def kernel(a, b):
        return (float(a.double() @ b.double()) / 3 + 1) ** 3

    within = [
        sum(kernel(a, b) for a, b in itertools.permutations(rows, 2)) / (len(rows) * (len(rows) - 1))
        for rows in (real, fake)
    ]
    across = sum(kernel(a, b) for a in real for b in fake) / 48
    assert kernel_distance(real, fake) == pytest.approx(sum(within) - 2 * across, rel=1e-9)


def test_kernel_distance_is_about_zero_for_one_distribution_and_grows_with_a_shift():
    same = [kernel_distance(normal(50, 4, seed=k), normal(50, 4, seed=100 + k)) for k in range(40)]
    assert abs(sum(same) / 40) < 0.05 < kernel_distance(normal(50, 4), normal(50, 4, seed=1) + 1)
    assert min(same) < 0 < max(same)  # unbiased, so of both signs
    with pytest.raises(DataError, match="two images a side"):
        kernel_distance(normal(1, 4), normal(5, 4))


@pytest.mark.parametrize("neighbours", [1, 3])
def test_neighbour_scores_equal_a_slow_loop(neighbours):
    real, fake = normal(11, 2), normal(13, 2, seed=1) + 1.2

    def radius(rows, k):
        return sorted(distance(rows[k], other) for other in rows)[neighbours]

    def holds(rows, k, point):
        return distance(rows[k], point) <= radius(rows, k)

    found = neighbour_scores(real, fake, neighbours=neighbours)
    held = [[holds(real, n, point) for n in range(11)] for point in fake]
    assert found.precision.tolist() == [float(any(row)) for row in held]
    assert found.density.tolist() == pytest.approx([sum(row) / neighbours for row in held])
    assert found.recall.tolist() == [float(any(holds(fake, m, point) for m in range(13))) for point in real]
    assert found.coverage.tolist() == [float(any(row[n] for row in held)) for n in range(11)]
    assert 0 < found.precision.mean() < 1
    assert found.density.unique().numel() > 2


def test_neighbour_scores_need_more_images_than_neighbours():
    with pytest.raises(DataError, match="more than 5 images"):
        neighbour_scores(normal(5, 2), normal(9, 2), neighbours=5)


def test_copy_ratio_equals_a_slow_loop():
    bank, own = normal(12, 4), torch.tensor([3, -1, 0, 7, 5])
    fake = normal(5, 4, seed=1)
    fake[4] = bank[2]  # a copy of another image
    bank[7] = bank[9] + 0.01
    fake[3] = bank[9] + 0.2  # near the twin of its own source, so the twin's nearest is the source

    expected = []
    for point, source in zip(fake, own.tolist(), strict=True):
        others = [n for n in range(12) if n != source]
        nearest = min(others, key=lambda n: distance(point, bank[n]))
        between = min(distance(bank[nearest], bank[n]) for n in others if n != nearest)
        expected.append(distance(point, bank[nearest]) / between)
    assert copy_ratio(fake, bank, own).tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[4] == 0


def test_copy_ratio_counts_copies_of_twins_and_not_an_image_itself():
    bank = normal(10, 4)
    bank[1] = bank[0]
    assert copy_ratio(bank[:1], bank, torch.tensor([-1])) == 0  # twins: 0 / 0 is a copy
    assert copy_ratio(bank[5:6], bank, torch.tensor([5])) > 0.5  # its own source does not count
    with pytest.raises(DataError, match="at least 3"):
        copy_ratio(bank, bank[:2], torch.zeros(10, dtype=torch.int64))


def test_spreads_equal_slow_loops():
    draws, labels = normal(3, 4, 5), torch.tensor([0, 1, 0, 1])
    pairs = list(itertools.combinations(range(3), 2))
    slow = [sum(distance(draws[s, n], draws[t, n]) for s, t in pairs) / 3 / 5**0.5 for n in range(4)]
    assert spread_of_draws(draws).tolist() == pytest.approx(slow)
    within = (distance(draws[0, 0], draws[0, 2]) + distance(draws[0, 1], draws[0, 3])) / 2 / 5**0.5
    assert spread_within_classes(draws[0], labels) == pytest.approx(within)
    assert math.isnan(spread_within_classes(draws[0], torch.arange(4)))
    with pytest.raises(ShapeError, match="two draws"):
        spread_of_draws(draws[:1])


def test_resultant_length_of_frozen_opposite_and_spread_angles():
    angles = torch.tensor([[30.0] * 4, [0, 180, 90, 270], [0, 90, 0, 90]])
    assert resultant_length(angles).tolist() == pytest.approx([1, 0, 2**-0.5], abs=1e-6)


def test_between_class_share_equals_a_slow_loop():
    styles, labels = normal(9, 2), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 5])
    styles[3:5] += 2
    rows = range(8)  # the class of one row is left out
    total = sum(distance(styles[a], styles[b]) for a, b in itertools.permutations(rows, 2)) / 56
    within = 0
    for label in (0, 1, 2):
        own = [n for n in rows if labels[n] == label]
        pairs = list(itertools.permutations(own, 2))
        within += len(own) / 8 * sum(distance(styles[a], styles[b]) for a, b in pairs) / len(pairs)
    assert between_class_share(styles, labels) == pytest.approx(1 - within / total)


def test_between_class_share_is_centred_on_zero_and_one_where_classes_fix_the_style():
    labels = torch.arange(60) % 3
    alike = [between_class_share(normal(60, 4, seed=k), labels) for k in range(60)]
    assert abs(sum(alike) / 60) < 0.004
    assert between_class_share(labels[:, None].float(), labels) == 1
    assert between_class_share(torch.zeros(60, 2), labels) == 0
    assert math.isnan(between_class_share(normal(60, 4), torch.zeros(60, dtype=torch.int64)))


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.lists(st.floats(-3, 3), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_kolmogorov_distance_is_the_largest_gap_of_the_distribution_functions(first, second):
    found = kolmogorov_distance(torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64))
    gaps = [
        abs(sum(value <= point for value in first) / len(first) - sum(value <= point for value in second) / len(second))
        for point in first + second
    ]
    assert found == pytest.approx(max(gaps), abs=1e-9)


def test_changes_are_read_off_the_images():
    images = torch.zeros(6, 1, 15, 15)
    for n in range(6):
        images[n, 0, 5 : 10 + n % 3, 6 : 8 + n % 2] = 0.5 + 0.05 * n
    names = dict(zip(("level", "contrast", "sharpness", "x", "y", "size", "plus", "cross"), range(8), strict=True))
    assert torch.equal(describe_change(images, images), torch.zeros(6, 8, dtype=torch.float64))
    assert (describe_change(images, images.roll(2, 3))[:, names["x"]] > 0).all()
    assert (describe_change(images, images.roll(-2, 2))[:, names["y"]] < 0).all()
    lighter = describe_change(images, images + 0.1)
    assert (lighter[:, names["level"]] > 0).all()
    assert lighter[:, 3:].abs().max() < 1e-3  # nothing moved
    turned = describe_change(images, images.transpose(2, 3))
    assert (turned[:, names["plus"]] > 0).all()  # upright strokes lie down
