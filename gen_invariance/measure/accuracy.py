"""Accuracy by class, its balanced mean, and its mean over many-, medium- and few-shot classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen_invariance.data.images import check_axes, check_labels
from gen_invariance.errors import ShapeError
from gen_invariance.measure.predict import as_predict, predict_logits


@dataclass(frozen=True)
class AccuracyScores:
    """What `measure_accuracy` found.

    Attributes:
        accuracy: float64 (K,), share of each class's images that are named right; NaN for a class without images.
        count: int64 (K,), images of each class.
        micro: share of all images that are named right.
    """

    accuracy: Tensor
    count: Tensor
    micro: float

    @property
    def balanced(self) -> float:
        """Mean of the class accuracies over the classes that have images."""
        return mean_over(self.accuracy)

    def group_means(self, groups: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean class accuracy of each group of classes, bool (K,); NaN for an empty group."""
        return {name: mean_over(self.accuracy[classes.cpu()]) for name, classes in groups.items()}


def measure_accuracy(
    model: Callable[[Tensor], Any],
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    batch_size: int | None = None,
) -> AccuracyScores:
    """Accuracy of `model` by class.

    Args:
        model: any torch model (measured in eval mode, on its own device) or callable, images to logits.
        images: float (N, C, H, W) in [0, 1], or uint8.
        labels: int64 (N,).
        num_classes: K; None takes the number of logits.
        batch_size: images at a time; None is 512, of small images on a GPU more.

    Raises:
        ShapeError: no images, or labels that do not fit them.
        RangeError: a label that is no class, or a model that answers NaN.

    Example:
        >>> import torch
        >>> from gen_invariance import measure_accuracy
        >>> def model(images):  # dark images are of class 0
        ...     light = images.mean(dim=(1, 2, 3))
        ...     return torch.stack([1 - light, light], dim=1)
        >>> images, labels = torch.linspace(0, 1, 10).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(10) // 5
        >>> measure_accuracy(model, images, labels).balanced
        1.0
    """
    labels = check_measured(images, labels)
    with as_predict(model) as predict:
        logits = predict_logits(predict, images, batch_size=batch_size)
    return score_predictions(logits.argmax(1), labels, num_classes or logits.shape[1])


def check_measured(images: Any, labels: Any) -> Tensor:
    """`labels` of the `images` that are to be measured, as a tensor on the CPU; lists and arrays are taken, too.

    Raises:
        ShapeError: images that are no (N, C, H, W), or labels that are no whole numbers (N,).
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise ShapeError(f"measure: images must be a tensor (N, C, H, W), got {got}")
    check_axes(images, where="measure")
    try:
        labels = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"measure: labels must be numbers, got a {type(labels).__name__} of something else") from error
    if labels.shape != images.shape[:1]:
        raise ShapeError(f"measure: {len(images)} images but labels of shape {tuple(labels.shape)}")
    return check_labels(labels)


def score_predictions(predicted: Tensor, labels: Tensor, num_classes: int) -> AccuracyScores:
    """Accuracy of the classes `predicted`, int64 (N,), for `labels`, int64 (N,)."""
    right = predicted.cpu() == labels.cpu()
    accuracy, count = mean_by_class(right, labels, num_classes)
    return AccuracyScores(accuracy, count, float(right.double().mean()))


def mean_over(values: Tensor) -> float:
    """Mean of the entries of `values` that are not NaN; NaN if there are none."""
    return float(values.nanmean()) if len(values) else float("nan")


def mean_by_class(values: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean of `values` (N,) over the rows of each class, float64 (K,), and the counts, int64 (K,), on the CPU.

    NaN and count 0 where a class has no rows.

    Raises:
        RangeError: a label outside [0, K).
    """
    labels = check_labels(labels, num_classes)
    count = torch.bincount(labels, minlength=num_classes)
    total = torch.bincount(labels, weights=values.cpu().double(), minlength=num_classes)
    return total / count, count  # 0 / 0 is the NaN that an empty class gets
