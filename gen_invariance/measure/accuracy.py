"""Accuracy by class, its balanced mean, and its mean over many-, medium- and few-shot classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_invariance.data.images import ImageData, to_float
from gen_invariance.errors import RangeError, ShapeError

Predict = Callable[[Tensor], Tensor]
"""Images float (B, C, H, W) in [0, 1] to logits (B, K); a model in eval mode, for instance."""


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
        return {name: mean_over(self.accuracy[chosen.cpu()]) for name, chosen in groups.items()}


def mean_over(values: Tensor) -> float:
    """Mean of the entries of `values` that are not NaN; NaN if there are none."""
    return float(values.nanmean()) if len(values) else float("nan")


@torch.no_grad()
def logits_of(predict: Predict, images: Tensor, *, batch_size: int = 512) -> Tensor:
    """Logits float32 (N, K), on the device of `images`, computed `batch_size` images at a time.

    Args:
        predict: images to logits.
        images: float (N, C, H, W) in [0, 1], or uint8.
        batch_size: images at a time; bounds the memory and changes nothing else (up to float rounding).

    Raises:
        ShapeError: there are no images, or `predict` does not return one row of logits for each image.
        RangeError: a logit is NaN.
    """
    if not len(images):
        raise ShapeError("nothing to predict: the set holds no images")
    parts = [predict(to_float(chunk)).float() for chunk in images.split(batch_size)]
    logits = torch.cat(parts)
    if logits.ndim != 2 or len(logits) != len(images):
        raise ShapeError(f"predict must return logits (B, K), got {tuple(logits.shape)} for {len(images)} images")
    return refuse_nan(logits)


def refuse_nan(logits: Tensor) -> Tensor:
    """`logits` (B, K), or `RangeError` if one is NaN: rows of NaN all look alike and would pass as invariant."""
    broken = int(logits.isnan().any(1).sum())
    if broken:
        raise RangeError(
            f"the model answers NaN for {broken} of {len(logits)} images; it diverged in training, or its input is "
            "broken"
        )
    return logits


def mean_by_class(values: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean of `values` (N,) over the rows of each class, float64 (K,), and the counts, int64 (K,), on the CPU.

    NaN and count 0 where a class has no rows.

    Raises:
        RangeError: a label outside [0, K).
    """
    labels = labels.cpu()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise RangeError(f"labels must lie in [0, {num_classes}), got [{int(labels.min())}, {int(labels.max())}]")
    count = torch.bincount(labels, minlength=num_classes)
    total = torch.bincount(labels, weights=values.double().cpu(), minlength=num_classes)
    return total / count, count  # 0 / 0 is the NaN that an empty class gets


def measure_accuracy(predict: Predict, data: ImageData, *, batch_size: int = 512) -> AccuracyScores:
    """Accuracy of `predict` on `data`.

    Args:
        predict: images to logits; put the model in eval mode first.
        data: test images.
        batch_size: images at a time.
    """
    right = logits_of(predict, data.images, batch_size=batch_size).argmax(1) == data.labels
    accuracy, count = mean_by_class(right, data.labels, data.num_classes)
    return AccuracyScores(accuracy, count, float(right.double().mean()))
