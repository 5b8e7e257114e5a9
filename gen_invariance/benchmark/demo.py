"""The demonstration: rotated, long-tailed digits, eight ways to train on them, and a report with pictures.

scikit-learn's digits (real handwriting, inside the package) are cut to a long tail and each is turned by a random
angle. Translators learn that nuisance from head classes; the stage gives it to the tail while a classifier trains.
A control without any rotation shows what a fit reports when there is nothing to learn. All of it is one grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd

from gen_invariance.benchmark.arms import Arm
from gen_invariance.benchmark.grid import GridCell, load_grid, run_grid
from gen_invariance.benchmark.registry import Benchmark, TranslatorFit
from gen_invariance.benchmark.settings import DemoSettings
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.errors import RunError
from gen_invariance.experiment.cell import Method
from gen_invariance.experiment.settings import ClassifierSettings, MeasureSettings, StageSettings, Task
from gen_invariance.experiment.task import prepare
from gen_invariance.report.class_figures import class_pictures
from gen_invariance.report.demo_page import DemoFits, draw_fits
from gen_invariance.report.report_page import write_report
from gen_invariance.report.settings import ReportSettings
from gen_invariance.report.size_effect import size_effects
from gen_invariance.run import Run
from gen_invariance.translator.io import load_translator

BASELINE, LEARNED, ORACLE = "DRS", "DRS + learned, spatial", "DRS + true nuisance"
_MUNIT_ARM = "DRS + learned, MUNIT"

ROTATED = Task(
    source="digits", largest=110, imbalance=22, rest_is_test=True, nuisance="rotation",
    nuisance_options={"degrees": 180.0}, many_above=44, few_below=20,
)  # fmt: skip
"""Digits under uniform rotation."""

UPRIGHT = replace(ROTATED, nuisance="identity", nuisance_options={})
"""The control: the same digits, nothing acted on them."""

TRANSLATORS: dict[str, dict[str, Any]] = {
    "spatial": {"network": {}, "objective": {}},
    "munit": {
        "network": {"width": 16, "residual_blocks": 2},
        "objective": {"learning_rate": 5e-4, "discriminator_width": 16, "discriminator_layers": 3},
    },
}
"""Network and objective of what the demonstration fits."""


def run_demo(
    out: Path | str, settings: DemoSettings | None = None, *, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Run what is missing of the demonstration in `out`, write the report, and return its path.

    Args:
        out: folder; a demonstration that was stopped there goes on, with the same settings.
        settings: see `DemoSettings`.
        say: is told what is done and how far it is, a line at a time.

    Raises:
        RunError: a cell or a worker failed.
        SettingsError: `out` holds a demonstration with other settings.
    """
    out, settings = Path(out), settings or DemoSettings()
    identity = {key: value for key, value in asdict(settings).items() if key != "processes"}
    with Run.open(out, kind="demo", config=identity, resume=None):
        cells = make_demo_cells(settings)
        started = perf_counter()
        failed = run_grid(cells, out, processes=settings.processes, say=say)
        if failed:
            raise RunError(f"{len(failed)} cell(s) failed, the first: {failed[0]}; run the same command again to go on")
        say(f"computed in {perf_counter() - started:.0f} s; writing the report")
        return _write_demo_report(cells, out, settings)


def make_demo_cells(settings: DemoSettings) -> list[GridCell]:
    """All cells of the demonstration. A seed is that of class order, images and training at once."""
    arms = make_demo_arms(settings)
    benchmarks = {ROTATED.name: (ROTATED, arms)}
    if settings.control:
        benchmarks[UPRIGHT.name] = (UPRIGHT, [arm for arm in arms if arm.name in (BASELINE, LEARNED)])
    measure = MeasureSettings(draws=settings.draws, invariance_images=None)
    return [
        GridCell(
            Benchmark(name, "demonstration", task, arm.method.classifier, arm.method.training, measure=measure),
            arm,
            order=seed,
            seed=seed,
        )
        for name, (task, own_arms) in benchmarks.items()
        for seed in range(settings.seeds)
        for arm in own_arms
    ]


def make_demo_arms(settings: DemoSettings) -> list[Arm]:
    """The arms. All but the first and the one with plain augmentation alone share the stage's balanced stream."""
    training = TrainSettings(
        epochs=settings.epochs,
        batch_size=32,
        schedule="cosine",
        warmup=0.05,
        sampling="delayed",
        second_phase=0.6,
        stage_source="balanced",
        checkpoint_every=settings.epochs,
    )
    loops = {
        "spatial": {"steps": settings.spatial_steps, "batch_size": 64},
        "munit": {"steps": settings.munit_steps, "batch_size": 16},
    }

    def make_arm(name: str, nuisance: str, translator: str | None = None, *, every_row: str = "") -> Arm:
        # The tail: classes below 45 images, half of the rows.
        stage = StageSettings(nuisance, "hard_cutoff", {"cutoff": 44, "probability": 0.5})
        augmentation, options = f"crop_flip{every_row}", {"crop_flip": {"padding": 2}}
        method = Method(name, stage, training, ClassifierSettings("small_conv"), translator, augmentation, options)
        if translator is None:
            return Arm(name, method)
        loop = {**loops[translator], "sample_every": 10**9, "log_every": 25}
        return Arm(name, method, TranslatorFit(translator, translator, **TRANSLATORS[translator], loop=loop))

    return [
        make_arm(BASELINE, "none"),
        make_arm("DRS + balanced stream", "identity"),
        make_arm("DRS + RandAugment, every row", "none", every_row="+randaugment"),
        make_arm("DRS + RandAugment, tail", "randaugment"),
        make_arm(_MUNIT_ARM, "translator", "munit"),
        make_arm(LEARNED, "translator", "spatial"),
        make_arm(f"{LEARNED} + RandAugment, every row", "translator", "spatial", every_row="+randaugment"),
        make_arm(ORACLE, "true"),
    ]


def _write_demo_report(cells: list[GridCell], out: Path, settings: DemoSettings) -> Path:
    frame = load_grid(cells, out)
    rotated = frame[frame["benchmark"] == ROTATED.name]
    fitted = {
        (cell.benchmark.name, cell.arm.name, cell.seed): out / cell.fit_folder
        for cell in cells
        if cell.fit_folder is not None
    }
    prepared = prepare(ROTATED, seed=0)
    seeds = range(settings.seeds)
    fits = DemoFits(
        train=prepared.train,
        groups=prepared.groups,
        true=prepared.nuisance,
        spatial=[load_translator(fitted[ROTATED.name, LEARNED, seed]) for seed in seeds],
        control=[load_translator(fitted[UPRIGHT.name, LEARNED, seed]) for seed in seeds] if settings.control else [],
        munit=load_translator(fitted[ROTATED.name, _MUNIT_ARM, 0]),
    )
    page = ReportSettings(
        title="Giving a learned nuisance to the tail: rotated, long-tailed digits",
        baseline=BASELINE,
        references=(ORACLE,),
    )
    return write_report(
        frame,
        out / "report",
        page,
        pictures=[*draw_fits(fits), *class_pictures(rotated)],
        notes=[*_explain(settings), *_describe_associations(rotated), *_describe_control(frame, settings)],
        command="gen-invariance demo",
    )


def _explain(settings: DemoSettings) -> list[str]:
    return [
        "scikit-learn's digits, each turned once by a random angle, were cut to a long tail of 110 to 5 training "
        "images a class; all other images are test images. Every method trains the same small network for "
        f"{settings.epochs} epochs on crops of the padded image, with class-balanced sampling in the last 40 % of "
        "them (DRS). With the stage, half of the rows of classes below 45 images come from a second, class-balanced "
        "stream, and are left as they are (balanced stream), or given generic augmentation (RandAugment, tail), a "
        "nuisance learned from classes of 20 images or more, or the true rotation (oracle). RandAugment on every row "
        "is what one would do without a stage. "
        f"{settings.seeds} seeds; each draws class order, images, angles and initial weights.",
        "The spatial translator is told the family of transformations by hand (rotation, scale, gain, bias) and "
        "learns only how far each of them swings. With every angle in the data nothing opposes the bonus on the "
        "width, so it runs to its cap of 180 degrees, which is the truth here; a rotation limited to a part of the "
        "circle comes out too narrow, since each image already carries its own angle. MUNIT is told nothing; it is "
        "not known to learn rotation, and is shown whichever way it falls.",
    ]


def _describe_associations(rotated: pd.DataFrame) -> list[str]:
    """Does eKLD still fall with class size?"""
    parts = [
        f"{row.method}: {row.spearman:+.2f} [{row.spearman_low:+.2f}, {row.spearman_high:+.2f}]"
        for row in size_effects(rotated, resamples=2000).itertuples()
    ]
    return ["Rank correlation of class size and eKLD, with 95 % bootstrap intervals over classes: " + "; ".join(parts)]


def _describe_control(frame: pd.DataFrame, settings: DemoSettings) -> list[str]:
    if not settings.control:
        return []
    rows = frame[(frame["benchmark"] == UPRIGHT.name) & (frame["metric"] == "few_accuracy")]
    table = rows.pivot_table(index="seed", columns="method", values="value")
    plain, learned = table[BASELINE], table[LEARNED]
    difference = learned - plain
    return [
        "Control, digits that nobody turned: few-shot accuracy "
        f"{plain.mean():.3f} plain and {learned.mean():.3f} with the widths learned there "
        f"(difference {difference.mean():+.3f}, seeds {', '.join(f'{value:+.3f}' for value in difference)})."
    ]
