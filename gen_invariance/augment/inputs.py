"""What a stage is given, in the forms it works on: batches in either layout, labels of several kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gen_invariance.data.images import check_pixels, to_float
from gen_invariance.errors import RangeError, ShapeError

LAYOUTS = ("channels_first", "channels_last")
"""Where batches have their channels."""


def as_images(images: Tensor, *, layout: str) -> Tensor:
    """`images` as floating point (B, C, H, W) in [0, 1]; 8-bit pixels are divided by 255, others keep their dtype.

    A (B, C, H, W) tensor in torch's channels_last *memory format* is still (B, C, H, W), and stays in it.
    """
    if not isinstance(images, Tensor):
        raise ShapeError(
            f"stage: expected a tensor (B, C, H, W), got a {type(images).__name__}; stack images of one size and "
            "convert them"
        )
    if images.ndim != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ShapeError(
            f"stage: expected images (B, C, H, W), floating point in [0, 1] or uint8, got {images.dtype} "
            f"{tuple(images.shape)}; stack the images of a batch and convert them"
        )
    channel_axis, other_axis = (1, 3) if layout == "channels_first" else (3, 1)
    if images.shape[channel_axis] not in (1, 3) and images.shape[other_axis] in (1, 3):
        other = LAYOUTS[1 - LAYOUTS.index(layout)]
        raise ShapeError(
            f"stage: images {tuple(images.shape)} seem to lie {other}; build the stage with layout={other!r} or "
            "permute them"
        )
    if layout == "channels_last":
        images = images.permute(0, 3, 1, 2)
    check_pixels(images, where="stage")
    return to_float(images)


def as_labels(labels: Any) -> Tensor:
    """`labels` as a tensor; lists and arrays are taken, too."""
    try:
        return labels if isinstance(labels, Tensor) else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"stage: labels must be numbers, got a {type(labels).__name__} of something else") from error


def row_probability(labels: Tensor, probability: Tensor, *, count: int) -> Tensor:
    """The probability of each of `count` rows, float32 (B,), on the CPU; of a soft label the mean over its classes."""
    classes = len(probability)
    if labels.is_floating_point():
        if labels.shape != (count, classes):
            raise ShapeError(
                f"stage: soft labels must be ({count}, {classes}), one column for each class of the policy, got "
                f"{tuple(labels.shape)}"
            )
        weights = labels.to("cpu", torch.float32)
        if not bool((weights >= 0).all()):
            raise RangeError("stage: a soft label is negative or NaN; give shares of classes")
        return (weights @ probability).clamp(max=1)
    if labels.shape != (count,) or labels.is_complex():
        raise ShapeError(
            f"stage: expected whole numbers ({count},) or soft labels ({count}, {classes}) as labels, got "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
    labels = labels.to("cpu", torch.int64)
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise RangeError(
            f"stage: labels must lie in [0, {classes}), got [{int(labels.min())}, {int(labels.max())}]; "
            "the policy needs the count of every class"
        )
    return probability[labels]
