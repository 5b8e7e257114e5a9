"""Accuracy by class against a loop over rows."""

import math

import pytest
import torch
from oracles import slow_accuracy

from gen_invariance.data.images import ImageData
from gen_invariance.errors import RangeError, ShapeError
from gen_invariance.measure.accuracy import AccuracyScores, mean_by_class, mean_over, measure_accuracy
from gen_invariance.measure.predict import fill_device, predict_logits


def some_data(count=100, classes=5, empty=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.randint(classes - 1, (count,), generator=generator)
    labels += labels >= empty  # class `empty` has no image
    return ImageData(images, labels, tuple("abcde"[:classes]))


def linear(classes=5):
    weight = torch.randn(36, classes, generator=torch.Generator().manual_seed(1))
    return lambda images: (images.flatten(1) - 0.5) @ weight


@pytest.mark.parametrize("batch_size", [1, 7, 100, 1000])
def test_accuracy_equals_the_loop(batch_size):
    data, predict = some_data(), linear()
    scores = measure_accuracy(predict, data.images, data.labels, batch_size=batch_size)
    expected, count = slow_accuracy(predict(data.float_images()), data.labels, 5)
    assert scores.accuracy.tolist() == pytest.approx(expected, nan_ok=True)
    assert scores.count.tolist() == count
    assert count[3] == 0
    assert math.isnan(scores.accuracy[3])
    present = [value for value in expected if not math.isnan(value)]
    assert scores.balanced == pytest.approx(sum(present) / 4)
    assert scores.micro == pytest.approx(sum(a * n for a, n in zip(expected, count, strict=True) if n) / 100)


@pytest.mark.parametrize(("side", "number"), [(28, 2048), (32, 2048), (64, 682), (224, 512)])
def test_small_images_fill_another_device_and_large_ones_its_memory_as_before(side, number):
    assert fill_device(torch.empty(1, 3, side, side, device="meta")) == number
    assert fill_device(torch.empty(1, 3, side, side)) == 512


def test_perfect_and_hopeless():
    data = some_data(empty=4)
    one_hot = torch.nn.functional.one_hot(data.labels, 5).float()
    answers = iter([one_hot, -one_hot])
    assert measure_accuracy(lambda _: next(answers), data.images, data.labels).accuracy.nanmean() == 1
    assert measure_accuracy(lambda _: next(answers), data.images, data.labels).micro == 0


def test_group_means_leave_empty_classes_out():
    scores = AccuracyScores(torch.tensor([0.2, 0.4, float("nan")]), torch.tensor([5, 5, 0]), 0.3)
    groups = {"many": torch.tensor([True, False, False]), "medium": torch.tensor([False, True, True])}
    groups["few"] = torch.tensor([False, False, False])
    means = scores.group_means(groups)
    assert means["many"] == pytest.approx(0.2)
    assert means["medium"] == pytest.approx(0.4)
    assert math.isnan(means["few"])
    assert math.isnan(mean_over(torch.tensor([])))
    assert math.isnan(mean_over(torch.tensor([float("nan")])))


def test_uint8_and_float_images_give_the_same_logits():
    data = some_data()
    torch.testing.assert_close(predict_logits(linear(), data.images), predict_logits(linear(), data.float_images()))


def test_images_are_not_changed_and_no_graph_is_kept():
    data, weight = some_data(), torch.randn(36, 5, requires_grad=True)
    before = data.images.clone()
    logits = predict_logits(lambda images: images.mul_(2).flatten(1) @ weight, data.images)
    assert not logits.requires_grad
    assert torch.equal(data.images, before)


def test_mean_by_class_has_nan_and_zero_for_empty_classes():
    mean, count = mean_by_class(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([2, 2, 0]), 4)
    assert count.tolist() == [1, 0, 2, 0]
    assert mean.dtype == torch.float64
    assert mean.tolist() == pytest.approx([10, math.nan, 2, math.nan], nan_ok=True)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_the_classes(label):
    with pytest.raises(RangeError, match=r"labels must lie in \[0, 4\)"):
        mean_by_class(torch.ones(2), torch.tensor([0, label]), 4)


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (lambda images: images, r"logits \(B, K\)"),
        (lambda images: torch.zeros(len(images) + 1, 5), r"logits \(B, K\)"),
        (lambda images: torch.zeros(len(images)), r"logits \(B, K\)"),
    ],
)
def test_predictions_of_another_shape(predict, message):
    data = some_data()
    with pytest.raises(ShapeError, match=message):
        measure_accuracy(predict, data.images, data.labels)


def test_no_images():
    with pytest.raises(ShapeError, match="no images"):
        measure_accuracy(linear(), torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64))


def test_labels_that_do_not_fit():
    data = some_data()
    with pytest.raises(ShapeError, match="100 images but labels"):
        measure_accuracy(linear(), data.images, data.labels[:99])
    with pytest.raises(RangeError, match="labels must lie"):
        measure_accuracy(linear(), data.images, data.labels, num_classes=2)


def test_a_module_is_measured_in_eval_mode_and_its_mode_restored():
    data, model = some_data(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9), torch.nn.Linear(36, 5))
    scores = measure_accuracy(model.double(), data.images, data.labels)
    assert model.training
    expected = measure_accuracy(model.eval(), data.float_images().double(), data.labels)
    torch.testing.assert_close(scores.accuracy, expected.accuracy, equal_nan=True)


def test_nan_logits_are_an_error_and_not_an_accuracy():
    """argmax of a row of NaN is class 0, so a diverged model would score 100 % on it."""

    data = some_data()

    def diverged(images):
        return linear()(images) + torch.where(images.mean((1, 2, 3)) > 0.5, float("nan"), 0.0)[:, None]

    with pytest.raises(RangeError, match="NaN"):
        measure_accuracy(diverged, data.images, data.labels)
