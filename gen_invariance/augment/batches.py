"""What the stage accepts: batches as loops of all kinds hand them over, checked before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from gen_invariance.data.images import to_float
from gen_invariance.errors import RangeError, SettingsError, ShapeError

LAYOUTS = ("channels_first", "channels_last")
_SLACK = 0.1  # bicubic resizing and added noise overshoot [0, 1] a little; normalised or 8-bit pixels by far more


def check_layout(layout: str) -> None:
    """Raise `SettingsError` unless `layout` is one of `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise SettingsError(f"stage: layout must be {' or '.join(LAYOUTS)}, got {layout!r}")


def as_images(images: Tensor, *, layout: str) -> Tensor:
    """`images` as floating point (B, C, H, W); 8-bit pixels are divided by 255, floating point keeps its dtype.

    Args:
        images: floating point or uint8, (B, C, H, W), or (B, H, W, C) where `layout` is "channels_last". A
            (B, C, H, W) tensor in torch's channels_last *memory format* is still (B, C, H, W), and stays in it.
        layout: order of the axes.

    Raises:
        ShapeError: another dtype, other axes, or pictures that lie in the other layout.
    """
    if images.ndim != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ShapeError(
            f"stage: expected images (B, C, H, W), floating point in [0, 1] or uint8, got {images.dtype} "
            f"{tuple(images.shape)}; stack the images of a batch and convert them"
        )
    here, there = (1, 3) if layout == "channels_first" else (3, 1)
    if images.shape[here] not in (1, 3) and images.shape[there] in (1, 3):
        other = LAYOUTS[1 - LAYOUTS.index(layout)]
        raise ShapeError(
            f"stage: images {tuple(images.shape)} seem to lie {other}; build the stage with layout={other!r} or "
            "permute them"
        )
    if layout == "channels_last":
        images = images.permute(0, 3, 1, 2)
    return to_float(images)


def check_range(images: Tensor) -> None:
    """Raise unless the pixels lie about in [0, 1]; reads the tensor, so not for every step.

    Raises:
        RangeError: normalised, 8-bit, or non-finite pixels.
    """
    if not images.numel():
        return
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise RangeError(
            f"stage: pixels must lie in [0, 1], got [{low:.3g}, {high:.3g}]; call the stage before Normalize, and "
            "divide 8-bit pixels by 255"
        )


def row_probability(labels: Tensor, probability: Tensor, *, count: int) -> Tensor:
    """The probability of each row, float32 (B,), on the CPU.

    Args:
        labels: whole numbers (B,), or soft labels (B, K), floating point and not negative, as mixup and label
            smoothing make them: their row's probability is the mean over classes, weighted by the label.
        probability: float32 (K,).
        count: B.

    Raises:
        ShapeError: labels that fit neither the images nor the classes.
        RangeError: a class number outside [0, K), or a negative or NaN soft label.
    """
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
    numbers = labels.to("cpu", torch.int64)
    if count and not 0 <= int(numbers.min()) <= int(numbers.max()) < classes:
        raise RangeError(
            f"stage: labels must lie in [0, {classes}), got [{int(numbers.min())}, {int(numbers.max())}]; "
            "the policy needs the count of every class"
        )
    return probability[numbers]
