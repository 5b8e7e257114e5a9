"""Calibration, other priors and confusion, against torchmetrics, Bayes' rule on known densities, and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as sklearn_confusion

from gen_invariance.errors import RangeError, ShapeError
from gen_invariance.measure.calibration import (
    adjust_to_prior,
    calibration_by_group,
    calibration_error,
    confusion_matrix,
    estimate_prior,
    most_confused,
)


def random_probabilities(generator, rows=200, classes=5):
    return (2 * torch.randn(rows, classes, generator=generator)).softmax(1)


def test_calibration_error_is_that_of_torchmetrics(generator):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    probabilities, labels = random_probabilities(generator), torch.randint(5, (200,), generator=generator)
    for bins in (1, 10, 15):
        expected = functional.multiclass_calibration_error(probabilities, labels, num_classes=5, n_bins=bins)
        assert calibration_error(probabilities, labels, bins=bins) == pytest.approx(float(expected), abs=1e-6)


def test_groups_are_those_of_the_true_class(generator):
    probabilities, labels = random_probabilities(generator), torch.randint(4, (200,), generator=generator)
    groups = {"many": torch.tensor([1, 0, 0, 1, 0]).bool(), "few": torch.tensor([0, 0, 0, 0, 1]).bool()}
    rows = [row for row, label in enumerate(labels.tolist()) if label in (0, 3)]
    found = calibration_by_group(probabilities, labels, groups)
    assert found == {"many": calibration_error(probabilities[rows], labels[rows])}  # nobody is of class 4
    assert math.isnan(calibration_error(probabilities[:0], labels[:0]))


def gaussians(prior, count, seed):
    """Samples of two unit Gaussians at -1 and 1, and the posterior under equal priors."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < prior[1]).astype(int)
    x = rng.normal(2.0 * labels - 1)
    second = 1 / (1 + np.exp(-2 * x))
    return torch.tensor(np.stack([1 - second, second], 1)), torch.tensor(labels), x


def test_adjusted_probabilities_are_the_posterior_under_the_other_prior():
    probabilities, _, x = gaussians((0.5, 0.5), 100, 0)
    adjusted = adjust_to_prior(probabilities, trained=torch.tensor([1.0, 1.0]), deployed=torch.tensor([9.0, 1.0]))
    expected = 0.1 * np.exp(-((x - 1) ** 2) / 2)
    expected = expected / (expected + 0.9 * np.exp(-((x + 1) ** 2) / 2))
    assert torch.allclose(adjusted[:, 1], torch.tensor(expected), atol=1e-9)


def test_the_prior_of_images_is_found_from_the_answers():
    probabilities, labels, _ = gaussians((0.85, 0.15), 20_000, 1)
    found = estimate_prior(probabilities, trained=torch.tensor([1.0, 1.0]))
    assert abs(float(found[1]) - float(labels.double().mean())) < 0.01
    assert float(probabilities.mean(0)[1]) > 0.2  # which the plain mean misses


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_laws_of_priors(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    probabilities = random_probabilities(generator, 20, classes).double()
    first, second = (torch.rand(classes, generator=generator).double() + 0.05 for _ in range(2))
    same = adjust_to_prior(probabilities, trained=first, deployed=3 * first)
    assert torch.allclose(same, probabilities, atol=1e-6)  # rows of float32 sum to one up to rounding
    there = adjust_to_prior(probabilities, trained=first, deployed=second)
    assert torch.allclose(there.sum(1), torch.ones(20).double())
    back = adjust_to_prior(there, trained=second, deployed=first)
    assert torch.allclose(back, same, atol=1e-9)


def test_classes_that_do_not_occur_are_never_named():
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    adjusted = adjust_to_prior(probabilities, trained=torch.ones(3), deployed=torch.tensor([0.0, 1.0, 0.0]))
    assert adjusted.tolist() == [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]


def test_bad_input():
    with pytest.raises(RangeError, match="sum to 1"):
        calibration_error(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
    with pytest.raises(ShapeError, match="one for each row"):
        calibration_error(torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]))
    with pytest.raises(RangeError, match="prior trained"):
        adjust_to_prior(torch.tensor([[0.5, 0.5]]), trained=torch.tensor([0.0, 1.0]), deployed=torch.ones(2))
    with pytest.raises(ShapeError, match="prior deployed"):
        adjust_to_prior(torch.tensor([[0.5, 0.5]]), trained=torch.ones(2), deployed=torch.ones(3))


def test_confusion_is_that_of_scikit_learn(generator):
    labels, predicted = torch.randint(6, (2, 300), generator=generator)
    found = confusion_matrix(predicted, labels, 7)
    assert found.tolist() == sklearn_confusion(labels.numpy(), predicted.numpy(), labels=range(7)).tolist()
    pairs = most_confused(found, most=5)
    shares = [pair.share for pair in pairs]
    assert shares == sorted(shares, reverse=True)
    assert all(pair.label != pair.predicted for pair in pairs)
    assert pairs[0].share == max(
        float(found[row, column]) / float(found[row].sum()) for row in range(6) for column in range(6) if row != column
    )
    assert most_confused(torch.eye(3).long()) == []
