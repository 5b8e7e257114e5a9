"""How much work a cell of a benchmark is, known without looking at its images."""

from __future__ import annotations

from gen_invariance.benchmark.registry import Benchmark
from gen_invariance.data.repeated import class_sizes
from gen_invariance.errors import SettingsError

_PIXELS_A_SECOND = {"small_conv": 7e5, "resnet20": 2.5e5, "resnet32": 1.5e5}
"""Pixels trained on in a second by one core of a server CPU; measured at 28x28, right within a factor of three."""

_FORWARD = 3.5  # times as fast as training
_SIDES = {"digits": 16, "cifar10": 32, "cifar100": 32, "gtsrb": 32, "devanagari": 32}
_PHOTO, _CHARACTER = 64, 28


def training_images(benchmark: Benchmark) -> int | None:
    """Training images of a benchmark by its settings; None where that depends on the data."""
    task = benchmark.task
    if benchmark.images is not None:
        return benchmark.images
    if task.profile == "none" or task.largest is None or benchmark.classes is None:
        return None
    try:
        sizes = class_sizes(
            task.profile, benchmark.classes, largest=task.largest, imbalance=task.imbalance, power=task.power,
            smallest=task.smallest,
        )  # fmt: skip
    except SettingsError:
        return None
    return int(sizes.sum())


def estimated_seconds(benchmark: Benchmark) -> float | None:
    """About how long a cell takes on one CPU core, without the stage; None where the data decides."""
    images, rate = training_images(benchmark), _PIXELS_A_SECOND.get(benchmark.classifier.backbone)
    if images is None or rate is None:
        return None
    default = _CHARACTER if benchmark.task.nuisance != "identity" else _PHOTO
    side = benchmark.task.image_size or _SIDES.get(benchmark.task.source, default)
    per_class = benchmark.measure.invariance_images or 100
    moved = per_class * (benchmark.classes or 0) * (benchmark.measure.draws + 1)
    return side**2 * (images * benchmark.training.epochs + moved / _FORWARD) / rate
