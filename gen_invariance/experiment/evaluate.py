"""Measure a classifier that `train` left in a run folder."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

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
from gen_invariance.experiment.cell import ClassifierSettings, StageSettings, build_model, records_of
from gen_invariance.experiment.task import Prepared, Task, prepare
from gen_invariance.experiment.translated import given_share, stage_label
from gen_invariance.files import write_json
from gen_invariance.measure.accuracy import AccuracyScores, mean_over, measure_accuracy
from gen_invariance.measure.invariance import InvarianceScores, measure_invariance
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.nuisance.compose import is_identity
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.records import RecordWriter, provenance, write_csv
from gen_invariance.run import MISFITS, Run, config_digest, named_generator
from gen_invariance.settings import settings_of

if TYPE_CHECKING:
    from gen_invariance.translator.munit.model import MunitTranslator
    from gen_invariance.translator.spatial import SpatialTranslator


@dataclass(frozen=True)
class Measured:
    """What `measure_run` found, and where it is written.

    Attributes:
        accuracy: by class.
        invariance: by class; None where the nuisance is the identity, under which there is nothing to measure.
        prepared: the data of the run.
        path: folder of the written figures.
        nuisance: what was measured against.
        why: how that was chosen.
    """

    accuracy: AccuracyScores
    invariance: InvarianceScores | None
    prepared: Prepared
    path: Path
    nuisance: str
    why: str = ""


@dataclass(frozen=True)
class Against:
    """What invariance is measured against.

    Attributes:
        name: "data", "translator", or a hand-written one; names the folder of the figures.
        nuisance: itself.
        label: its name in records.
        why: how it was chosen, for a terminal.
    """

    name: str
    nuisance: Nuisance
    label: str
    why: str


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
    nuisance: str = "auto",
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
            name, "translator", or "auto": "data" where something acted on the images, else the translator that the
            run's stage used, else "lighting". Under the identity there is accuracy alone.
        nuisance_options: of a hand-written one.
        translator: folder of a fitted translator, for "translator".
        split: "test" or "validation".
        draws: transformations of each image.
        batch_size: images at a time.
        seed: of the draws.
        device: where to compute.
        method: name in the records; None takes the stage's nuisance.

    Raises:
        SettingsError: an unknown split or nuisance, "translator" without a folder, or options of "auto".
        DataError: the split is empty.
    """
    if split not in ("test", "validation"):
        raise SettingsError(f"split must be test or validation, got {split!r}")
    if draws < 1 or batch_size < 1:
        raise SettingsError(f"draws and batch_size must be at least 1, got {draws} and {batch_size}")
    started = time.perf_counter()
    model, prepared, task, run = open_run(folder, device=device)
    chosen = _against(nuisance, nuisance_options or {}, translator, prepared, device=device, run=run)
    data: ImageData = getattr(prepared, split)
    if not len(data):
        raise DataError(
            f"the run in {folder} has no {split} images; train with data.validation_fraction=0.2 or measure test"
        )

    def measure(batch_size: int) -> tuple[AccuracyScores, InvarianceScores | None]:
        accuracy = measure_accuracy(
            model, data.images, data.labels, num_classes=data.num_classes, batch_size=batch_size
        )
        if is_identity(chosen.nuisance):
            return accuracy, None
        invariance = measure_invariance(
            model,
            data.images,
            data.labels,
            chosen.nuisance,
            originals=prepared.originals(split).images if chosen.name == "data" else None,
            num_classes=data.num_classes,
            draws=draws,
            batch_size=batch_size,
            generator=named_generator(seed, "measure"),
        )
        return accuracy, invariance

    accuracy, invariance = _with_less_memory(measure, batch_size)
    path = run.path / "measures" / chosen.name
    measured = Measured(accuracy, invariance, prepared, path, chosen.label, chosen.why)
    _write(measured, run, task, method=method, split=split, draws=draws, seconds=time.perf_counter() - started)
    return measured


def _with_less_memory(
    measure: Callable[[int], tuple[AccuracyScores, InvarianceScores | None]], batch_size: int
) -> tuple[AccuracyScores, InvarianceScores | None]:
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
    from gen_invariance.translator.io import load_translator

    loaded = load_translator(translator)
    require_channels(loaded, prepared, translator)
    return loaded.to(device)


def _against(
    name: str,
    options: Mapping[str, Any],
    translator: Path | str | None,
    prepared: Prepared,
    *,
    device: torch.device | str,
    run: Run,
) -> Against:
    """What to measure the classifier of `run` against, "auto" resolved; errors as of `chosen_nuisance`."""
    why = "as asked"
    if name == "auto":
        if options:
            raise SettingsError("nuisance_options needs nuisance=NAME, the nuisance that they are options of")
        name, translator, why = _automatic(translator, prepared, run)
    nuisance, label = chosen_nuisance(name, options, translator, prepared, device), name
    if name == "translator":
        from gen_invariance.translator.quality.verdict import weights_digest

        label = (
            f"translator {type(nuisance).__name__.removesuffix('Translator').lower()} {weights_digest(translator)[:6]}"
        )
    return Against(name, nuisance, label, why)


def _automatic(translator: Path | str | None, prepared: Prepared, run: Run) -> tuple[str, Path | str | None, str]:
    """Name of the nuisance, folder of the translator, and why these."""
    if translator is not None:
        return "translator", translator, "translator= names it"
    if not is_identity(prepared.nuisance):
        return "data", None, "it acted on the images"
    folder, used = run.config["stage"].get("translator"), stage_of(run)
    nothing = "nothing acted on the images and the stage used no translator"
    if not folder or "translator" not in used.nuisance or not given_share(used, prepared).classes:
        return "lighting", None, nothing
    if not Path(folder).exists():
        return "lighting", None, f"nothing acted on the images and {folder}, the translator of the stage, is gone"
    return "translator", folder, f"nothing acted on the images and the stage used {folder}"


def stage_of(run: Run) -> StageSettings:
    """The settings of the stage that a training run had.

    Raises:
        CheckpointError: its run.json does not hold them.
    """
    try:
        given = {name: value for name, value in run.config["stage"].items() if name != "translator"}
        return settings_of(StageSettings, given, "stage")
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise CheckpointError(
            f"{run.path / 'run.json'} does not hold the stage of a training run of this version ({error}); train again"
        ) from error


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
    stage = stage_of(run)
    alone = measured.nuisance == "data" or measured.invariance is None
    common = {
        "benchmark": task.name if alone else f"{task.name} against {measured.nuisance}",
        "method": method or stage_label(stage.nuisance, given_share(stage, measured.prepared)),
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
        }
    )
    if (found := measured.invariance) is not None:
        for name, values in (("ekld", found.ekld), ("ekld_standard_error", found.standard_error)):
            frame[name] = values.tolist()
        frame["agreement"] = found.agreement.tolist()
    return frame.sort_values("train_images", ascending=False, kind="stable", ignore_index=True)


def table_of(measured: Measured) -> list[str]:
    """Lines of a table for a terminal."""
    frame, invariance = class_frame(measured), measured.invariance
    further = "" if invariance is None else f" {'eKLD':>9} {'agreement':>9}"
    lines = [f"{'class':20} {'group':6} {'train':>6} {'test':>6} {'accuracy':>9}{further}"]
    for row in frame.itertuples(index=False):
        name = row[0] if len(row[0]) <= 20 else row[0][:17] + "..."
        further = "" if invariance is None else f" {row.ekld:9.4f} {row.agreement:9.4f}"
        lines.append(f"{name:20} {row.group:6} {row.train_images:6d} {row.test_images:6d} {row.accuracy:9.4f}{further}")
    groups = {name: chosen for name, chosen in measured.prepared.groups.items() if chosen.any()}
    means = measured.accuracy.group_means(groups)
    lines += [
        "",
        f"balanced accuracy {measured.accuracy.balanced:.4f}   "
        + "   ".join(f"{name} {value:.4f}" for name, value in means.items()),
    ]
    if invariance is None:
        return [*lines, "no invariance figure: the nuisance is the identity, under which every model has eKLD 0"]
    return [
        *lines,
        f"mean eKLD {mean_over(invariance.ekld):.4f} nats, against {measured.nuisance}, "
        f"{invariance.draws} draws an image",
        f"nuisance {measured.nuisance}: {measured.why}",
    ]
