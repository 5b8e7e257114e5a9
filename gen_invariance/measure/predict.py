"""Logits of any torch model or callable; its device, dtype, mode and kind of output are handled here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gen_invariance.data.images import to_float
from gen_invariance.errors import RangeError, ShapeError
from gen_invariance.measure.fusion import fuse_batch_norms

Predict = Callable[[Tensor], Tensor]
"""Images float (B, C, H, W) in [0, 1] to logits (B, K)."""

_CPU_PIXELS, _FEWEST_IMAGES = 25_000, 8
"""What goes through a network at once on a CPU: the activations of more leave its caches (docs/performance.md)."""
_FEW, _MANY, _VALUES = 512, 2048, 2**23


@contextmanager
def as_predict(model: Callable[[Tensor], Any], *, fuse: bool = False) -> Iterator[Predict]:
    """`model` as images to logits, while the block lasts.

    A module is put in eval mode, and the mode of each of its parts is restored afterwards. Images go to its device and
    floating-point dtype, and logits come back to the images' device. A model may return logits or an object that holds
    `.logits` (as those of the transformers library do).

    Args:
        model: a module or any other callable.
        fuse: predict by a copy of a module whose batch norms are fused (`fusion`), which pays for many images.

    Raises:
        ShapeError: the model returns no logits (B, K).
    """
    if not isinstance(model, nn.Module):
        yield lambda images: _logits(model(images), len(images))
        return
    modes = {part: part.training for part in model.modules()}
    example = next((value for value in model.parameters() if value.is_floating_point()), None)
    model.eval()
    fused: list[nn.Module] = [] if fuse else [model]

    def predict(images: Tensor) -> Tensor:
        given = images if example is None else images.to(example)
        if not fused:
            fused.append(fuse_batch_norms(model, given[:16]))
        answers = [_logits(fused[0](part), len(part)) for part in given.split(_images_at_once(given))]
        return torch.cat(answers).to(images.device)

    try:
        yield predict
    finally:
        for part, training in modes.items():
            part.training = training


def _images_at_once(images: Tensor) -> int:
    """How many of `images` (B, C, H, W) go through a network together; their logits do not depend on it."""
    if images.device.type != "cpu":
        return max(1, len(images))
    return max(_FEWEST_IMAGES, _CPU_PIXELS // max(1, images.shape[-1] * images.shape[-2]))


def _logits(answer: Any, count: int) -> Tensor:
    logits = getattr(answer, "logits", answer)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(answer).__name__
        raise ShapeError(
            f"the model must return logits (B, K), or an object with .logits, got {got} for {count} images"
        )
    return logits


def fill_device(images: Tensor) -> int:
    """How many of `images` (N, C, H, W) are measured at a time: 512, and of small ones on a GPU up to 2,048."""
    if images.device.type == "cpu":
        return _FEW
    return max(_FEW, min(_MANY, _VALUES // max(1, images[:1].numel())))


@torch.no_grad()
def predict_logits(predict: Predict, images: Tensor, *, batch_size: int | None = None) -> Tensor:
    """Logits float32 (N, K), on the device of `images`, computed `batch_size` images at a time.

    Args:
        predict: images to logits, see `as_predict`.
        images: float (N, C, H, W) in [0, 1], or uint8.
        batch_size: images at a time; bounds the memory and changes nothing else (up to float rounding). None is
            `fill_device`.

    Raises:
        ShapeError: there are no images.
        RangeError: a logit is NaN.
    """
    if not len(images):
        raise ShapeError("nothing to predict: the set holds no images")
    parts = [predict(to_float(chunk)).float() for chunk in images.split(batch_size or fill_device(images))]
    return refuse_nan(torch.cat(parts))


def refuse_nan(logits: Tensor) -> Tensor:
    """`logits` (B, K), or `RangeError` if one is NaN: rows of NaN all look alike and would pass as invariant."""
    refuse_broken(logits.isnan().any(1))
    return logits


def refuse_broken(broken: Tensor) -> None:
    """Raise `RangeError` if an answer is `broken`, bool (B,)."""
    number = int(broken.sum())
    if number:
        raise RangeError(
            f"the model answers NaN for {number} of {len(broken)} images; it diverged in training, or its input is "
            "broken"
        )
