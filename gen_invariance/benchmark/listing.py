"""The list of all benchmarks: whether their data is there, and about how much work a cell of them is."""

from __future__ import annotations

from pathlib import Path

from gen_invariance.benchmark.registry import Benchmark, benchmark_names, read_every_benchmark
from gen_invariance.data.split import compute_class_sizes
from gen_invariance.errors import SettingsError

_PIXELS_A_SECOND = {"small_conv": 7e5, "resnet20": 2.5e5, "resnet32": 1.5e5}
"""Pixels trained on in a second by one core of a server CPU; measured at 28x28, right within a factor of three."""

_FORWARD = 3.5  # times as fast as training
_SIDES = {"digits": 16, "cifar10": 32, "cifar100": 32, "gtsrb": 32, "devanagari": 32}
_PHOTO, _CHARACTER = 64, 28


def format_list(starts: str | tuple[str, ...] = "", *, data_root: Path | str | None = None) -> list[str]:
    """A table of the benchmarks whose names start so: where their data is, and about how long a cell takes.

    Raises:
        SettingsError: there is none.
    """
    lines, summaries = [f"{'benchmark':28} {'a cell, about':>14}  data"], set()
    for benchmark in read_every_benchmark(data_root=data_root):
        if not benchmark.name.startswith(starts):
            continue
        if benchmark.summary not in summaries:
            summaries.add(benchmark.summary)
            lines += ["", benchmark.summary]
        duration = _format_duration(estimate_seconds(benchmark))
        lines.append(f"{benchmark.name:28} {duration:>14}  {_describe_data(benchmark)}")
    if not summaries:
        raise SettingsError(f"no benchmark starts with {starts!r}; choose {', '.join(benchmark_names())}")
    return [*lines, "", "A cell is one training and its measurement; times are for one CPU core, without the stage."]


def _describe_data(benchmark: Benchmark) -> str:
    missing = benchmark.missing()
    if not missing:
        return "found"
    where = f" in {benchmark.task.path}" if benchmark.task.path else ""
    more = " ..." if len(missing) > 2 else ""
    return f"lacks {', '.join(missing[:2])}{more}{where}"


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(round(seconds), 1)} s"


def count_training_images(benchmark: Benchmark) -> int | None:
    """Training images of a benchmark by its settings; None where that depends on the data."""
    task = benchmark.task
    if benchmark.images is not None:
        return benchmark.images
    if task.profile == "none" or task.largest is None or benchmark.classes is None:
        return None
    try:
        sizes = compute_class_sizes(task, benchmark.classes, largest=task.largest)
    except SettingsError:
        return None
    return int(sizes.sum())


def estimate_seconds(benchmark: Benchmark) -> float | None:
    """About how long a cell takes on one CPU core, without the stage; None where the data decides."""
    images, rate = count_training_images(benchmark), _PIXELS_A_SECOND.get(benchmark.classifier.backbone)
    if images is None or rate is None:
        return None
    default = _CHARACTER if benchmark.task.nuisance != "identity" else _PHOTO
    side = benchmark.task.image_size or _SIDES.get(benchmark.task.source, default)
    per_class = benchmark.measure.invariance_images or 100
    translated = per_class * (benchmark.classes or 0) * (benchmark.measure.draws + 1)
    return side**2 * (images * benchmark.training.epochs + translated / _FORWARD) / rate
