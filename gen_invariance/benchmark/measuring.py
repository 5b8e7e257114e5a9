"""Measure a classifier that `train` left in a run folder, and put several measured runs on one page."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from gen_invariance.benchmark.records import RecordWriter, load_records, provenance, write_csv
from gen_invariance.benchmark.suite import ClassifierSettings, build_model, records_of
from gen_invariance.benchmark.task import Prepared, Task, prepare
from gen_invariance.classifier.backbones import Classifier
from gen_invariance.data.images import ImageData
from gen_invariance.errors import (
    CheckpointError,
    DataError,
    DataNotFoundError,
    SettingsError,
    first_line,
    is_out_of_memory,
)
from gen_invariance.measure.accuracy import AccuracyScores, mean_over, measure_accuracy
from gen_invariance.measure.invariance import InvarianceScores, measure_invariance
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import MISFITS, Run, config_digest, named_generator, write_json
from gen_invariance.settings import settings_of

if TYPE_CHECKING:
    from gen_invariance.benchmark.report import Figure
    from gen_invariance.translator.munit import MunitTranslator
    from gen_invariance.translator.spatial import SpatialTranslator


@dataclass(frozen=True)
class Measured:
    """What `measure_run` found, and where it is written.

    Attributes:
        accuracy, invariance: by class.
        prepared: the data of the run.
        path: folder of the written figures.
        nuisance: what was measured against.
    """

    accuracy: AccuracyScores
    invariance: InvarianceScores
    prepared: Prepared
    path: Path
    nuisance: str


def open_run(folder: Path | str, *, device: torch.device | str = "cpu") -> tuple[Classifier, Prepared, Task, Run]:
    """The classifier of a finished or stopped training run, in eval mode, and the data it was trained on.

    Raises:
        DataNotFoundError: no run folder there.
        CheckpointError: not a training run, or its checkpoints are damaged.
    """
    folder = Path(folder)
    about_path = folder / "run.json"
    if not about_path.is_file():
        raise DataNotFoundError(f"{folder} is not a run folder (no run.json); give the folder that train wrote")
    try:
        about = json.loads(about_path.read_text(encoding="utf-8"))
        kind, seed, config = about["kind"], about["seed"], about["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{about_path} is damaged ({error}); train again") from error
    if kind != "train":
        raise CheckpointError(
            f"{folder} holds a '{kind}' run, not a trained classifier; give a folder that train wrote"
        )
    run = Run(folder, kind="train", seed=seed, config=config, resume=True)
    try:
        task = settings_of(Task, config["data"], "data")
        classifier = settings_of(ClassifierSettings, config["classifier"], "classifier")
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise CheckpointError(
            f"{about_path} does not hold the settings of a training run of this version ({error}); train again"
        ) from error
    prepared = prepare(task, seed=seed).to(device)
    model = build_model(replace(classifier, weights=None), prepared.train, seed=seed)  # the checkpoint has its own
    state = run.load_latest()
    if state is None:
        raise CheckpointError(
            f"{folder} holds no intact checkpoint; resume the training: gen-invariance train ... resume=true"
        )
    try:
        model.load_state_dict(state["model"])
    except MISFITS as error:
        raise CheckpointError(f"the checkpoint in {folder} does not fit its settings ({first_line(error)})") from error
    return model.to(device).eval(), prepared, task, run


def measure_run(
    folder: Path | str,
    *,
    nuisance: str = "data",
    nuisance_options: Mapping[str, Any] | None = None,
    translator: Path | str | None = None,
    split: str = "test",
    draws: int = 20,
    batch_size: int = 512,
    seed: int = 0,
    device: torch.device | str = "cpu",
    method: str | None = None,
) -> Measured:
    """Accuracy and invariance by class of the classifier in `folder`.

    Writes `folder`/measures/<nuisance>/: figures.json and classes.csv, and appends records to `folder`/records.

    Args:
        folder: run folder that `train` wrote.
        nuisance: "data" (what acted on the images, here on the images as they were before), a hand-written one by
            name, or "translator".
        nuisance_options: of a hand-written one.
        translator: folder of a fitted translator, for "translator".
        split: "test" or "validation".
        draws: transformations of each image.
        batch_size: images at a time.
        seed: of the draws.
        device: where to compute.
        method: name in the records; None takes the stage's nuisance.

    Raises:
        SettingsError: an unknown split or nuisance, or "translator" without a folder.
        DataError: the split is empty.
    """
    if split not in ("test", "validation"):
        raise SettingsError(f"split must be test or validation, got {split!r}")
    if draws < 1 or batch_size < 1:
        raise SettingsError(f"draws and batch_size must be at least 1, got {draws} and {batch_size}")
    started = time.perf_counter()
    model, prepared, task, run = open_run(folder, device=device)
    chosen = chosen_nuisance(nuisance, nuisance_options or {}, translator, prepared, device)
    data: ImageData = getattr(prepared, split)
    if not len(data):
        raise DataError(
            f"the run in {folder} has no {split} images; train with data.validation_fraction=0.2 or measure test"
        )

    def measure(batch_size: int) -> tuple[AccuracyScores, InvarianceScores]:
        accuracy = measure_accuracy(model, data, batch_size=batch_size)
        invariance = measure_invariance(
            model,
            data.images,
            data.labels,
            chosen,
            originals=prepared.originals(split).images if nuisance == "data" else None,
            num_classes=data.num_classes,
            draws=draws,
            batch_size=batch_size,
            generator=named_generator(seed, "measure"),
        )
        return accuracy, invariance

    accuracy, invariance = _with_less_memory(measure, batch_size)
    path = run.path / "measures" / nuisance
    measured = Measured(accuracy, invariance, prepared, path, nuisance)
    _write(measured, run, task, method=method, split=split, draws=draws, seconds=time.perf_counter() - started)
    return measured


def _with_less_memory(
    measure: Callable[[int], tuple[AccuracyScores, InvarianceScores]], batch_size: int
) -> tuple[AccuracyScores, InvarianceScores]:
    """`measure(batch_size)`, with half of it as long as the memory does not suffice: figures do not depend on it."""
    while True:
        try:
            return measure(batch_size)
        except (MemoryError, RuntimeError) as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
        batch_size //= 2
        warnings.warn(f"out of memory; measuring with batch_size={batch_size} instead", stacklevel=3)


def chosen_nuisance(
    name: str, options: Mapping[str, Any], translator: Path | str | None, prepared: Prepared, device: torch.device | str
) -> Nuisance:
    """What to measure invariance against: "data", "translator" (of that folder), or a hand-written one by name.

    Raises:
        SettingsError: an unknown name or option, or "translator" without a folder.
        CheckpointError: a folder that holds no translator for these images.
    """
    if name == "data":
        return prepared.nuisance
    if name != "translator":
        return build_nuisance(name, **options)
    if translator is None:
        raise SettingsError("nuisance=translator needs translator=FOLDER, a folder that fit wrote")
    from gen_invariance.translator.load import load_translator

    loaded = load_translator(translator)
    require_channels(loaded, prepared, translator)
    return loaded.to(device)


def require_channels(translator: MunitTranslator | SpatialTranslator, prepared: Prepared, folder: Path | str) -> None:
    """Raise `CheckpointError` unless the translator of `folder` takes images of as many channels as the data's."""
    got, expected = translator.config.channels, prepared.train.images.shape[1]
    if got != expected:
        raise CheckpointError(
            f"the translator in {folder} was fitted on images of {got} channel(s), the data has {expected}; "
            "fit one on this data"
        )


def _write(
    measured: Measured, run: Run, task: Task, *, method: str | None, split: str, draws: int, seconds: float
) -> None:
    training = {**run.config, "measure": {"nuisance": measured.nuisance, "split": split, "draws": draws}}
    common = {
        "benchmark": task.name if measured.nuisance == "data" else f"{task.name} against {measured.nuisance}",
        "method": method or run.config["stage"]["nuisance"],
        "seed": run.seed,
        "config_digest": config_digest(training),
        "data_digest": measured.prepared.train.digest,
        "seconds": seconds,
        **provenance(),
    }
    records = records_of(measured.accuracy, measured.invariance, measured.prepared, extra={}, common=common)
    RecordWriter(run.path / "records").write_cell(records)
    totals = {record.metric: record.value for record in records if record.class_index is None}
    write_json(measured.path / "figures.json", {**totals, "draws": draws, "split": split})
    write_csv(class_frame(measured), measured.path / "classes.csv")


def class_frame(measured: Measured) -> pd.DataFrame:
    """One row a class, largest training count first."""
    train = measured.prepared.train
    groups = measured.prepared.groups
    frame = pd.DataFrame(
        {
            "class": train.class_names,
            "group": [
                next((name for name, chosen in groups.items() if chosen[k]), "") for k in range(train.num_classes)
            ],
            "train_images": train.counts.tolist(),
            "test_images": measured.accuracy.count.tolist(),
            "accuracy": measured.accuracy.accuracy.tolist(),
            "ekld": measured.invariance.ekld.tolist(),
            "ekld_standard_error": measured.invariance.standard_error.tolist(),
            "agreement": measured.invariance.agreement.tolist(),
        }
    )
    return frame.sort_values("train_images", ascending=False, kind="stable", ignore_index=True)


def table_of(measured: Measured) -> list[str]:
    """Lines of a table for a terminal."""
    frame = class_frame(measured)
    lines = [f"{'class':20} {'group':6} {'train':>6} {'test':>6} {'accuracy':>9} {'eKLD':>9} {'agreement':>9}"]
    for row in frame.itertuples(index=False):
        name = row[0] if len(row[0]) <= 20 else row[0][:17] + "..."
        lines.append(
            f"{name:20} {row.group:6} {row.train_images:6d} {row.test_images:6d} "
            f"{row.accuracy:9.4f} {row.ekld:9.4f} {row.agreement:9.4f}"
        )
    group_means = measured.accuracy.group_means(measured.prepared.groups)
    lines += [
        "",
        f"balanced accuracy {measured.accuracy.balanced:.4f}   "
        + "   ".join(f"{name} {value:.4f}" for name, value in group_means.items()),
        f"mean eKLD {mean_over(measured.invariance.ekld):.4f} nats, against {measured.nuisance}, "
        f"{measured.invariance.draws} draws an image",
    ]
    return lines


def _records_in(folder: Path) -> pd.DataFrame:
    frame = load_records(folder / "records" if (folder / "records").is_dir() else folder)
    if frame.empty:
        raise DataNotFoundError(f"no records in {folder}; run: gen-invariance measure run={folder}")
    return frame


def report_of(
    folders: Sequence[Path | str], out: Path | str, *, title: str, baseline: str | None, references: Collection[str]
) -> Path:
    """One page over the records of several measured runs.

    Raises:
        DataNotFoundError: a folder without records.
        DataError, SettingsError: records that must not be put together; see `write_report`.
    """
    from gen_invariance.benchmark.report import write_report

    if not folders:
        raise DataNotFoundError("records=[] names no folder; give one or more that measure wrote")
    frame = pd.concat([_records_in(Path(folder)) for folder in folders], ignore_index=True)
    return write_report(
        out,
        title=title,
        frame=frame,
        figures=figures_of(frame),
        command="gen-invariance report",
        baseline=baseline,
        references=references,
    )


def figures_of(frame: pd.DataFrame) -> list[Figure]:
    """Accuracy and invariance by class size, for each benchmark of `frame` that has figures by class."""
    from gen_invariance.benchmark.class_figures import accuracy_by_class, ekld_against_class_size
    from gen_invariance.benchmark.drawing import method_styles
    from gen_invariance.benchmark.report import Figure

    figures = []
    styles = method_styles(frame["method"].unique())
    for benchmark, rows in frame.groupby("benchmark", sort=False):
        for metric, draw, shows in (
            ("accuracy", accuracy_by_class, "Accuracy by class size"),
            ("ekld", ekld_against_class_size, "Invariance by class size"),
        ):
            if rows[rows["metric"] == metric]["value"].notna().any():
                name = f"{shows}: {benchmark}"
                alt = f"{shows} of each method on {benchmark}."
                figures.append(Figure(name, f"{shows}, all seeds.", alt, draw(rows, styles=styles)))
    return figures
