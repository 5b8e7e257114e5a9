"""Any torch model or callable as a `Predict`: its device, dtype, mode and way of answering are seen to here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gen_invariance.errors import ShapeError
from gen_invariance.measure.accuracy import Predict
from gen_invariance.measure.fusion import folded

_CPU_PIXELS, _FEWEST_IMAGES = 25_000, 8
"""What goes through a network at once on a CPU: the activations of more leave its caches (docs/performance.md)."""


@contextmanager
def as_predict(model: Callable[[Tensor], Any], *, fold: bool = False) -> Iterator[Predict]:
    """`model` as images to logits, while the block lasts.

    A module is put in eval mode and gets back the mode of each of its parts afterwards. Images go to its device and
    floating-point dtype, and logits come back to the images' device. Answers may be logits or an object that holds
    `.logits` (as those of the transformers library do).

    Args:
        model: a module or any other callable.
        fold: ask a copy of a module whose batch norms are folded (`folding`): for many questions to one network.

    Raises:
        ShapeError: the answer holds no logits (B, K).
    """
    if not isinstance(model, nn.Module):
        yield lambda images: _logits(model(images), len(images))
        return
    modes = {part: part.training for part in model.modules()}
    example = next((value for value in model.parameters() if value.is_floating_point()), None)
    model.eval()
    asked: list[nn.Module] = [] if fold else [model]

    def predict(images: Tensor) -> Tensor:
        given = images if example is None else images.to(example)
        if not asked:
            asked.append(folded(model, given[:16]))
        answers = [_logits(asked[0](part), len(part)) for part in given.split(_at_once(given))]
        return torch.cat(answers).to(images.device)

    try:
        yield predict
    finally:
        for part, training in modes.items():
            part.training = training


def _at_once(images: Tensor) -> int:
    """How many of `images` (B, C, H, W) are asked about together; their answers do not depend on it."""
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
    return torch.as_tensor(logits)
