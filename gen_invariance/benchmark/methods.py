"""Long-tail methods by the names people use, and their comparison with and without the stage.

A method is a file of `configs/method`: what it changes about plain cross-entropy training. The command line composes
the same files (`gen-invariance train method=ldam_drw`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from gen_invariance.classifier.train import TrainSettings
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.build import ClassifierSettings, StageSettings
from gen_invariance.experiment.cell import CellInputs, MeasureSettings, Method, cell_digest, run_cell
from gen_invariance.experiment.task import Prepared, Task, prepare
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.records import Cell, RecordWriter, finished_cells, load_records
from gen_invariance.report.metrics import metric_info, progress_line
from gen_invariance.run import Run
from gen_invariance.settings import settings_of
from gen_invariance.stats import paired_difference

LEARNED, TRUE = " + stage", " + true nuisance"
"""What the names of arms with the stage end in: a learned nuisance, or the one in the data (a reference)."""


def read_method(name: str, folder: Path | str) -> dict[str, Any]:
    """What the method `name` sets: "classifier" and "training" (mappings) and "augmentation", parents included.

    Raises:
        SettingsError: no such file in `folder`.
    """
    path = Path(folder) / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in Path(folder).glob("*.yaml") if file.stem != "none")
        raise SettingsError(f"no method {name!r}; choose {', '.join(known)}")
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    merged: dict[str, Any] = {"classifier": {}, "training": {}, "augmentation": "none"}
    for parent in own.pop("defaults", ["_self_"]):
        layer = own if parent == "_self_" else read_method(parent, folder)
        merged = {
            key: {**value, **layer.get(key, {})} if isinstance(value, dict) else layer.get(key, value)
            for key, value in merged.items()
        }
    return merged


def build_method(
    name: str,
    folder: Path | str,
    *,
    classifier: ClassifierSettings,
    training: TrainSettings,
    stage: StageSettings | None = None,
) -> Method:
    """The arm `name`, with the stage if one is given: `classifier` and `training` with what the method changes.

    Raises:
        SettingsError: an unknown method, or a file with an unknown setting.
    """
    changes = read_method(name, folder)
    stage = stage or StageSettings()
    ending = {"none": "", "true": TRUE}.get(stage.nuisance, LEARNED)
    return Method(
        name + ending,
        stage,
        settings_of(TrainSettings, {**asdict(training), **changes["training"]}, f"method {name}: training"),
        settings_of(ClassifierSettings, {**asdict(classifier), **changes["classifier"]}, f"method {name}: classifier"),
        "spatial" if "translator" in stage.nuisance else None,
        changes["augmentation"],
    )


@dataclass(frozen=True)
class Comparison:
    """A grid of methods on one task.

    Attributes:
        task: the long-tailed set.
        methods: the arms.
        seeds: how many; each draws its own class order, images, nuisance and initial weights.
        draws: transformations of each test image for eKLD.
        fit_steps: of the spatial translator that arms with a learned stage share, one a seed.
    """

    task: Task
    methods: tuple[Method, ...]
    seeds: int = 3
    draws: int = 3
    fit_steps: int = 300

    def digests(self) -> set[str]:
        """Configuration digests of all cells."""
        return {cell_digest(self.task, method, draws=self.draws) for method in self.methods}

    def missing(self, out: Path | str) -> Iterable[tuple[int, list[Method]]]:
        """For each seed the arms of which `out` holds no finished cell."""
        done = finished_cells(Path(out) / "records")
        for seed in range(self.seeds):
            left = [
                method
                for method in self.methods
                if Cell(self.task.name, cell_digest(self.task, method, draws=self.draws), method.name, seed) not in done
            ]
            if left:
                yield seed, left


def run_comparison(
    comparison: Comparison, out: Path | str, *, say: Callable[[str], None] = lambda line: None
) -> pd.DataFrame:
    """Run the cells that `out` lacks, one after the other, and return the records of this comparison."""
    out, task = Path(out), comparison.task
    writer = RecordWriter(out / "records")
    for seed, methods in list(comparison.missing(out)):
        prepared = prepare(task, seed=seed)
        needs_fit = any(method.translator for method in methods)
        translator = _fitted(comparison, prepared, out / "fits" / str(seed), seed=seed) if needs_fit else None
        for method in methods:
            folder = out / "cells" / f"{method.name.replace(' ', '').replace('+', '-')}-{seed}"
            inputs = CellInputs(prepared, translator=translator if method.translator else None)
            measure = MeasureSettings(draws=comparison.draws, invariance_images=None)
            records = run_cell(task, method, inputs, seed=seed, folder=folder, measure=measure)
            writer.write_cell(records)
            totals = {record.metric: record.value for record in records if record.class_index is None}
            say(f"seed {seed}, {method.name}: {progress_line(totals)}, {totals['train_seconds']:.0f} s")
    frame = load_records(out / "records")
    return frame[frame["config_digest"].isin(comparison.digests())]


def _fitted(comparison: Comparison, prepared: Prepared, folder: Path, *, seed: int) -> Nuisance:
    """The spatial translator of `seed`, fitted on head classes; a fit that was stopped goes on."""
    from gen_invariance.translator.fit import fit_translator
    from gen_invariance.translator.fit_settings import FitSettings

    loop = FitSettings(steps=comparison.fit_steps, batch_size=64, sample_every=10**9)
    config = {"task": comparison.task.identity(), "steps": comparison.fit_steps}
    with Run.open(folder, kind="fit", seed=seed, config=config, resume=True) as run:
        return fit_translator("spatial", prepared.train, loop, out=run, progress=False)


def in_order(frame: pd.DataFrame, methods: Iterable[Method]) -> pd.DataFrame:
    """Records with the methods in the order of `methods`, whatever order they were measured in."""
    place = {method.name: number for number, method in enumerate(methods)}
    return frame.iloc[frame["method"].map(place).argsort(kind="stable")].reset_index(drop=True)


def stage_table(frame: pd.DataFrame) -> str:
    """Each method without -> with the stage, as Markdown: means over seeds, and the paired difference with interval."""
    names = ("balanced_accuracy", "many_accuracy", "few_accuracy", "mean_ekld", "train_seconds")
    names = [name for name in names if name in set(frame["metric"])]
    totals = frame[frame["class_index"].isna() & frame["metric"].isin(names)]
    values = totals.set_index(["method", "metric", "seed"])["value"].unstack()
    head = [
        part for name in names for part in (metric_info(name).title, *(["difference"] if name != names[-1] else []))
    ]
    lines = [f"| Method | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for method in dict.fromkeys(frame["method"]):
        if (method + LEARNED, names[0]) not in values.index:
            continue
        cells = [method.replace("_", r"\_")]
        for name in names:
            info, plain, staged = metric_info(name), values.loc[(method, name)], values.loc[(method + LEARNED, name)]
            cells.append(f"{info.show(plain.mean())} → {info.show(staged.mean())}")
            if name != names[-1]:
                gap = paired_difference(staged, plain)
                shown = f"{gap.mean * info.scale:+.{info.decimals}f} ± {gap.half_width * info.scale:.{info.decimals}f}"
                cells.append(shown.replace("-", "−"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_stage(
    names: Iterable[str], folder: Path | str, *, stage: StageSettings, reference: str | None = None, **common: Any
) -> tuple[Method, ...]:
    """Each method of `names` without and with `stage`; for `reference` also with the true nuisance."""
    methods = []
    for name in names:
        methods.append(build_method(name, folder, **common))
        methods.append(build_method(name, folder, stage=stage, **common))
        if name == reference:
            methods.append(build_method(name, folder, stage=replace(stage, nuisance="true"), **common))
    return tuple(methods)
