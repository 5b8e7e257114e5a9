"""The list of all benchmarks: whether their data is there, and about how much work cells and fits of them are."""

from __future__ import annotations

from pathlib import Path

from gen_invariance.benchmark.registry import Benchmark, benchmark_names, read_every_benchmark
from gen_invariance.data.split import compute_class_sizes
from gen_invariance.errors import SettingsError
from gen_invariance.settings import read_settings
from gen_invariance.translator.settings import FitSettings

_PIXELS_A_SECOND = {"small_conv": 7e5, "resnet20": 2.5e5, "resnet32": 1.5e5}
"""Pixels trained on in a second by one core of a server CPU; measured at 28x28, right within a factor of three."""

_PIXELS_FITTED_A_SECOND = {
    "redraw": 1e6,
    "spatial": 5e5,
    "flow": 1.1e5,
    "munit_small": 7e4,
    "munit": 7e3,
}
"""The same for fitting a translator; measured at 32x32 in colour. Translators of other names are not priced."""

_FOR_A_GPU = 3600
"""Seconds of one core from which on a fit is said to need a GPU."""

_FORWARD = 3.5  # times as fast as training
_SIDES = {"digits": 16, "cifar10": 32, "cifar100": 32, "gtsrb": 32, "devanagari": 32}
_PHOTO, _CHARACTER = 64, 28


def format_list(starts: str | tuple[str, ...] = "", *, data_root: Path | str | None = None) -> list[str]:
    """A table of the benchmarks whose names start so: where their data is, and how long a cell and a fit take, about.

    Raises:
        SettingsError: there is none.
    """
    heads = "".join(f"{name:>12}" for name in _PIXELS_FITTED_A_SECOND)
    lines, summaries = [f"{'benchmark':28}{'a cell':>12}{heads}  data"], set()
    for benchmark in read_every_benchmark(data_root=data_root):
        if not benchmark.name.startswith(starts):
            continue
        if benchmark.summary not in summaries:
            summaries.add(benchmark.summary)
            lines += ["", benchmark.summary]
        fits = (_format_fit(estimate_fit_seconds(benchmark, name)) for name in _PIXELS_FITTED_A_SECOND)
        times = "".join(f"{time:>12}" for time in (_format_duration(estimate_seconds(benchmark)), *fits))
        lines.append(f"{benchmark.name:28}{times}  {_describe_data(benchmark)}")
    if not summaries:
        raise SettingsError(f"no benchmark starts with {starts!r}; choose {', '.join(benchmark_names())}")
    return [
        *lines,
        "",
        "A cell is one training and its measurement, without the stage. The other columns are fits of translators,",
        "one for each class order. Times are about those of one CPU core; GPU: more than an hour of it.",
        "fit_options.munit.steps=... changes how long a fit is.",
    ]


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


def _format_fit(seconds: float) -> str:
    return "GPU" if seconds > _FOR_A_GPU else _format_duration(seconds)


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
    per_class = benchmark.measure.invariance_images or 100
    translated = per_class * (benchmark.classes or 0) * (benchmark.measure.draws + 1)
    return _find_side(benchmark) ** 2 * (images * benchmark.training.epochs + translated / _FORWARD) / rate


def estimate_fit_seconds(benchmark: Benchmark, choice: str) -> float:
    """About how long `benchmark` takes to fit the translator of the file `choice` once on one CPU core."""
    loop = read_settings(FitSettings, {**benchmark.fit, **benchmark.fits.get(choice, {})}, "fit")
    return _find_side(benchmark) ** 2 * loop.steps * loop.batch_size / _PIXELS_FITTED_A_SECOND[choice]


def _find_side(benchmark: Benchmark) -> int:
    """Pixels of a side of its images; a guess where only the data know."""
    default = _CHARACTER if benchmark.task.nuisance != "identity" else _PHOTO
    return benchmark.task.image_size or _SIDES.get(benchmark.task.source, default)
