"""What every nuisance is: a distribution over label-preserving transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gen_invariance.devices import send

Draw = dict[str, Tensor]
"""The random part of a nuisance for one batch: tensors with leading B. The same draw gives the same output."""


@runtime_checkable
class Nuisance(Protocol):
    """Anything that can `sample` a draw and `apply` it; hand-written and learned ones alike.

    `apply` keeps shape, dtype, device and the range [0, 1], leaves its input unchanged, touches no global random
    state, and treats each row on its own.

    Example:
        >>> from gen_invariance import Nuisance, Rotation
        >>> isinstance(Rotation(30), Nuisance)
        True
    """

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """Draw once for each of `shape[0]` images of `shape` = (B, C, H, W); tensors on the generator's device."""
        ...

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Transform float `images` (B, C, H, W) in [0, 1] by `draw`, row by row."""
        ...


@runtime_checkable
class Coded(Nuisance, Protocol):
    """A nuisance in two halves: what depends on the image alone, and what depends on the draw.

    `apply(images, draw)` is `render(encode(images), draw, size)`, so codes of images that come again can be kept.
    """

    def encode(self, images: Tensor) -> Tensor:
        """The code of each of float `images` (B, C, H, W) in [0, 1], leading B."""
        ...

    def render(self, codes: Tensor, draw: Draw, size: tuple[int, int]) -> Tensor:
        """Images (B, C, *size) in [0, 1] from codes and a draw, row by row."""
        ...


def takes_any_size(nuisance: Nuisance) -> bool:
    """Whether `nuisance` does the same to a picture whatever its size in pixels.

    Hand-written ones do; networks where their `any_size` says so, otherwise they know the size they were fitted at;
    compositions where all their parts do.
    """
    if isinstance(nuisance, nn.Module):
        return bool(getattr(nuisance, "any_size", False))
    return all(takes_any_size(part) for part in getattr(nuisance, "nuisances", ()))


def select_rows(draw: Draw, rows: Tensor) -> Draw:
    """The part of `draw` that belongs to `rows`: int64 (M,) or bool (B,)."""
    return {name: value[send(rows, value.device)] for name, value in draw.items()}


def draw_to(draw: Draw, images: Tensor) -> Draw:
    """`draw` on the device of `images`; floating-point parts keep their own precision."""
    return {name: send(value, images.device) for name, value in draw.items()}


def draw_for(nuisance: Nuisance, draw: Draw, images: Tensor) -> Draw:
    """`draw` where `nuisance` wants it to be applied to `images`: there, unless it chooses rows by it.

    Those whose `draw_on_cpu` is set look at a draw to see which rows go through which operation. A GPU would have to be
    waited for; on the CPU it is known already.
    """
    return draw if getattr(nuisance, "draw_on_cpu", False) else draw_to(draw, images)


def whole(high: int, size: tuple[int, ...], *, generator: torch.Generator, low: int = 0) -> Tensor:
    """Whole numbers uniform in [low, high), int64 of `size`, on the generator's device."""
    return torch.randint(low, high, size, generator=generator, device=generator.device)


def normal(*size: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float32 of `size`, on the generator's device."""
    return torch.randn(size, generator=generator, dtype=torch.float32, device=generator.device)


def uniform(count: int, low: float, high: float, *, generator: torch.Generator) -> Tensor:
    """`count` numbers uniform in [low, high), float32 (count,)."""
    return torch.empty(count, dtype=torch.float32, device=generator.device).uniform_(low, high, generator=generator)


def apply_in_float32(function: Callable[[Tensor, Draw], Tensor], images: Tensor, draw: Draw) -> Tensor:
    """`function` of `images` in float32 and their `draw`, clamped to [0, 1], in the dtype of `images`."""
    if not len(images):
        return images.clone()
    return function(images.float(), draw_to(draw, images)).clamp_(0, 1).to(images.dtype)
