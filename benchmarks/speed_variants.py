"""One way to do the work of a hot path, and the images that all paths work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.run import named_generator


@dataclass
class Variant:
    """One way to do a path's work.

    Attributes:
        name: in the table.
        kind: "plain", "same" (mathematics, outputs compared), or "changed" (training or settings).
        run: does `units` of work, `repeats` times a measurement.
        unit: what one unit is.
        goal: of the ratio, in words.
        against: the variant that ratios are to; None takes the path's first.
        cost: the ratio is this over the other, not the other over this.
        difference: largest difference to the plain outputs, computed once.
        seconds: measures itself, in place of `run`.
        note: below the table.
    """

    name: str
    kind: str
    run: Callable[[], object] = lambda: None
    units: float = 1
    repeats: int = 1
    unit: str = "step"
    goal: str = ""
    against: str | None = None
    cost: bool = False
    difference: Callable[[], float] | None = None
    seconds: Callable[[], float] | None = None
    note: str = ""


SMALL = {"width": 16, "residual_blocks": 2}
BATCH, CLASSES = 128, 10


def pictures(count: int, channels: int = 1, size: int = 28) -> Tensor:
    """uint8 images of which half of the pixels are 0, as ink on an empty ground has."""
    images = torch.randint(256, (count, channels, size, size), generator=named_generator(0, "pixels"))
    return (images * (torch.rand(images.shape, generator=named_generator(0, "ground")) < 0.5)).to(torch.uint8)


def stored(count: int, device: torch.device, channels: int = 1, size: int = 28) -> ImageData:
    names = tuple(map(str, range(CLASSES)))
    return ImageData(pictures(count, channels, size), torch.arange(count) % CLASSES, names).to(device)
