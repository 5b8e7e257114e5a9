"""Ways to do one piece of work, timed in turns, and the images that all of them work on."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of this process on a CPU, on the wall behind a GPU's queue."""
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


def measure(variants: list[Variant], *, rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds for one unit of work, one list for each variant; the first round warms up and is dropped.

    Variants take turns, in reverse order every other round, so what else the machine does falls on all of them.
    """
    now, taken = clock(device), [[] for _ in variants]
    for number in range(rounds + 1):
        order = range(len(variants)) if number % 2 else reversed(range(len(variants)))
        for index in order:
            variant = variants[index]
            started = now()
            if variant.seconds is None:
                for _ in range(variant.repeats):
                    variant.run()
                spent = (now() - started) / variant.repeats
            else:
                spent = variant.seconds()
            if number:
                taken[index].append(spent / variant.units)
    return taken


def compare(path: str, variants: list[Variant], taken: list[list[float]]) -> list[dict[str, object]]:
    """A line of results for each variant; ratios to the path's first variant, or to the one it names."""
    rows = []
    for index, variant in enumerate(variants):
        base = next((n for n, other in enumerate(variants) if other.name == variant.against), 0)
        if variant.kind == "plain" and variant.against is None:
            base = index
        ratios = [plain / own for plain, own in zip(taken[base], taken[index], strict=True)]
        if variant.cost:
            ratios = [1 / ratio for ratio in ratios]
        rows.append(
            {
                "path": path,
                "variant": variant.name,
                "kind": variant.kind,
                "against": variants[base].name if index != base else None,
                "ms": 1000 * statistics.median(taken[index]),
                "unit": variant.unit,
                "ratio": [min(ratios), statistics.median(ratios), max(ratios)] if index != base else None,
                "goal": variant.goal,
                "difference": variant.difference() if variant.difference is not None else None,
                "rounds": len(ratios),
                "note": variant.note,
            }
        )
    return rows


@dataclass
class Stopwatch:
    """Wall and processor seconds of each named part of a program."""

    wall: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add what the block takes to `part`."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.wall[part] = self.wall.get(part, 0.0) + time.perf_counter() - wall
        self.processor[part] = self.processor.get(part, 0.0) + time.process_time() - processor

    def lines(self, *, without: str) -> list[str]:
        """A line for each part, and one for all but `without`."""
        total = [sum(value for part, value in kind.items() if part != without) for kind in (self.wall, self.processor)]
        rows = [*((part, self.wall[part], self.processor[part]) for part in self.wall), (f"all but {without}", *total)]
        return [f"{part:26} {wall:6.2f} s, processor {processor:6.2f} s" for part, wall, processor in rows]


def peak_memory() -> float:
    """Gibibytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


SMALL = {"width": 16, "residual_blocks": 2}
BATCH, CLASSES = 128, 10


def pictures(count: int, channels: int = 1, size: int = 28) -> Tensor:
    """uint8 images of which half of the pixels are 0, as ink on an empty ground has."""
    images = torch.randint(256, (count, channels, size, size), generator=named_generator(0, "pixels"))
    return (images * (torch.rand(images.shape, generator=named_generator(0, "ground")) < 0.5)).to(torch.uint8)


def stored(
    count: int, device: torch.device | str = "cpu", channels: int = 1, size: int = 28, classes: int = CLASSES
) -> ImageData:
    """`pictures` with labels that take turns."""
    names = tuple(map(str, range(classes)))
    return ImageData(pictures(count, channels, size), torch.arange(count) % classes, names).to(device)
