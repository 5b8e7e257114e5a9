"""Whether probabilities can be believed: calibration by shot group, other class priors, which classes are confused.

All take probabilities or predictions, so they hold for any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_invariance.data.images import check_labels
from gen_invariance.errors import RangeError, SettingsError, ShapeError

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""


def calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = BINS) -> float:
    """Expected calibration error of the likeliest class, in [0, 1]; NaN without images.

    Images are put into `bins` equally wide bins of their confidence; the error is the mean distance of a bin's
    confidence to its accuracy, weighted by its images (Guo et al. 2017, equation 3). 0 is calibrated.

    Args:
        probabilities: float (N, K), rows sum to one.
        labels: int64 (N,).
        bins: how many.

    Raises:
        ShapeError: labels that do not fit.
        RangeError: rows that are no probabilities.

    Example:
        >>> sure = torch.tensor([[0.75, 0.25]] * 4)
        >>> calibration_error(sure, torch.tensor([0, 0, 0, 1])), calibration_error(sure, torch.tensor([0, 0, 1, 1]))
        (0.0, 0.25)
    """
    probabilities, labels = check_probabilities(probabilities), torch.as_tensor(labels).cpu()
    if labels.shape != probabilities.shape[:1]:
        raise ShapeError(f"labels must be ({len(probabilities)},), got {tuple(labels.shape)}; one for each row")
    if not len(labels):
        return float("nan")
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    # Bins are open below: (0, 1/bins], ..., so that a confidence of exactly 1 is in the last one.
    which = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, which, confidence - right)
    return float(gap.abs().sum() / len(labels))


def calibration_by_group(probabilities: Tensor, labels: Tensor, groups: Mapping[str, Tensor]) -> dict[str, float]:
    """The calibration error over the images of each group of classes; groups without images are left out.

    Args:
        probabilities: float (N, K).
        labels: int64 (N,).
        groups: of each group the classes in it, bool (K,); such as many-, medium- and few-shot ones.
    """
    labels = check_labels(labels.cpu())
    rows = {name: members.cpu()[labels] for name, members in groups.items()}
    return {name: calibration_error(probabilities.cpu()[at], labels[at]) for name, at in rows.items() if at.any()}


def check_probabilities(probabilities: Tensor) -> Tensor:
    """`probabilities` (N, K) as float64 on the CPU, or an error where rows are no probabilities."""
    if not isinstance(probabilities, Tensor) or probabilities.ndim != 2 or not probabilities.is_floating_point():
        got = tuple(probabilities.shape) if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise ShapeError(f"probabilities must be float (N, K), got {got}; take the softmax of logits")
    values = probabilities.detach().cpu().double()
    if not ((values >= 0).all() and torch.allclose(values.sum(1), torch.ones(()).double(), atol=1e-3)):
        raise RangeError("rows of probabilities must be at least 0 and sum to 1; take the softmax of logits")
    return values


# ---- other priors


def adjust_to_prior(probabilities: Tensor, *, trained: Tensor, deployed: Tensor) -> Tensor:
    """Probabilities for images whose classes are as common as `deployed` says, float64 (N, K).

    By Bayes' rule p'(y|x) is proportional to p(y|x) deployed(y) / trained(y), where images of a class look the same as
    in training (Saerens et al. 2002, equation 2.4). Log odds of two classes move by the same amount for every image.

    Args:
        probabilities: float (N, K), of a model under the prior `trained`.
        trained: float (K,), positive; how common classes are to the model. Uniform for balanced sampling and balanced
            losses, the class counts of the training images for plain cross-entropy.
        deployed: float (K,), not negative; how common they are where the model is used. Neither need sum to one.

    Raises:
        ShapeError: priors of another length.
        RangeError: a prior that is negative, not finite, or (trained) zero.
    """
    values = check_probabilities(probabilities)
    priors = {"trained": torch.as_tensor(trained).double(), "deployed": torch.as_tensor(deployed).double()}
    for name, prior in priors.items():
        if prior.shape != values.shape[1:]:
            raise ShapeError(f"the prior {name} must be ({values.shape[1]},), got {tuple(prior.shape)}")
        positive = (prior > 0).all() if name == "trained" else (prior >= 0).all() and prior.sum() > 0
        if not (torch.isfinite(prior).all() and positive):
            raise RangeError(f"the prior {name} must hold finite shares, not negative and not all zero")
    weighed = values * (priors["deployed"] / priors["trained"])
    total = weighed.sum(1, keepdim=True)
    # An image that only impossible classes explain keeps what the prior says of the others.
    fallback = (priors["deployed"] / priors["deployed"].sum()).expand_as(values)
    return torch.where(total > 0, weighed / total.clamp_min(torch.finfo(torch.float64).tiny), fallback)


def estimate_prior(probabilities: Tensor, *, trained: Tensor, rounds: int = 200, tolerance: float = 1e-6) -> Tensor:
    """How common the classes are among these images, float64 (K,), found from the model's answers alone.

    Expectation maximisation of Saerens et al. 2002, section 2.2: probabilities are adjusted to the present estimate,
    and their mean is the next one, from `trained` on, until no class moves by more than `tolerance`.

    Args:
        probabilities: float (N, K), of a calibrated model under the prior `trained`.
        trained: float (K,), positive.
        rounds: at most.
        tolerance: see above.
    """
    prior = torch.as_tensor(trained).double() / torch.as_tensor(trained).double().sum()
    for _ in range(rounds):
        after = adjust_to_prior(probabilities, trained=trained, deployed=prior).mean(0)
        moved, prior = float((after - prior).abs().max()), after
        if moved <= tolerance:
            break
    return prior


# ---- confusion


@dataclass(frozen=True)
class ConfusedPair:
    """Images of one class that are taken for another.

    Attributes:
        label, predicted: the two classes.
        images: of `label` that are named `predicted`.
        share: of the images of `label`.
    """

    label: int
    predicted: int
    images: int
    share: float


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Of each class (row) how many images are taken for each class (column), int64 (K, K), on the CPU.

    Args:
        predicted: int64 (N,).
        labels: int64 (N,).
        num_classes: K.

    Raises:
        RangeError: a label or prediction that is no class.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    labels, predicted = check_labels(labels.cpu(), num_classes), check_labels(predicted.cpu(), num_classes)
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


def most_confused(confusion: Tensor, *, most: int = 20) -> list[ConfusedPair]:
    """The pairs with the largest share of a class's images, then with the most images; those without one are left out.

    Args:
        confusion: from `confusion_matrix`.
        most: pairs at most.
    """
    if most < 1:
        raise SettingsError(f"most must be at least 1, got {most}")
    totals = confusion.sum(1).tolist()
    rows, columns = (confusion - confusion.diag().diag()).nonzero(as_tuple=True)
    found = [
        ConfusedPair(row, column, int(confusion[row, column]), int(confusion[row, column]) / totals[row])
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    return sorted(found, key=lambda pair: (-pair.share, -pair.images, pair.label, pair.predicted))[:most]
