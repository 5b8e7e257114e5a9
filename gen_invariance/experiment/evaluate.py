"""`measure_run`: accuracy and invariance by class of a classifier that `train` left in a run folder."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.errors import CheckpointError, DataError, RunError, SettingsError
from gen_invariance.experiment.build import compute_translated_share, format_stage_label, require_channels
from gen_invariance.experiment.launch import choose_device
from gen_invariance.experiment.mistakes import write_mistakes
from gen_invariance.experiment.settings import MeasureRun, StageSettings, Task
from gen_invariance.experiment.task import Prepared
from gen_invariance.experiment.trained import open_run
from gen_invariance.files import write_json
from gen_invariance.measure.accuracy import AccuracyScores, mean_over, score_predictions
from gen_invariance.measure.calibration import calibration_by_group, calibration_error
from gen_invariance.measure.invariance import InvarianceScores, measure_invariance
from gen_invariance.measure.predict import as_predict, fill_device, predict_logits
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.nuisance.compose import is_identity
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.records import Record, RecordWriter, provenance, write_csv
from gen_invariance.run import Run, config_digest, named_generator
from gen_invariance.settings import read_settings


@dataclass(frozen=True)
class Reference:
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


@dataclass(frozen=True)
class Measured:
    """What `measure_run` measured, and where it is written.

    Attributes:
        accuracy: by class.
        invariance: by class; None where the nuisance is the identity, under which there is nothing to measure.
        prepared: the data of the run.
        path: folder of the written figures.
        reference: what was measured against.
        split: which images, "test" or "validation".
        probabilities: of each class, float32 (N, K), on the CPU.
    """

    accuracy: AccuracyScores
    invariance: InvarianceScores | None
    prepared: Prepared
    path: Path
    reference: Reference
    split: str
    probabilities: Tensor

    @property
    def data(self) -> ImageData:
        """The images that were measured on."""
        return getattr(self.prepared, self.split)

    @property
    def calibration(self) -> dict[str, float]:
        """Calibration error, of all images and by shot group, by the name of its record."""
        labels, groups = self.data.labels, self.prepared.groups
        by_group = calibration_by_group(self.probabilities, labels, groups)
        whole = {"calibration_error": calibration_error(self.probabilities, labels)}
        return whole | {f"{name}_calibration_error": value for name, value in by_group.items()}


def measure_run(settings: MeasureRun) -> Measured:
    """Accuracy and invariance by class of the classifier in the run folder `settings.run`.

    Writes figures.json, classes.csv, confusion.csv and mistakes.html into RUN/measures/NUISANCE, and appends records to
    RUN/records.

    The nuisance "auto" is "data" (what acted on the images, here on the images as they were before) where something
    acted on them, else the translator that the run's stage used, else "lighting". Under the identity there is accuracy
    alone.

    Raises:
        SettingsError: an unknown nuisance, "translator" without a folder, or options of "auto".
        DataError: the split is empty.
        CheckpointError: the run or the translator is damaged.
        RunError: not even one image at a time fits into the memory.
    """
    started = time.perf_counter()
    device = choose_device(settings.device)
    model, prepared, task, run = open_run(settings.run, device=device, parts=("train", settings.split))
    reference = _choose_reference(settings, prepared, run, device)
    data: ImageData = getattr(prepared, settings.split)
    if not len(data):
        raise DataError(
            f"the run in {settings.run} has no {settings.split} images; train with data.validation_fraction=0.2 or "
            "measure test"
        )
    batch_size = settings.batch_size or fill_device(data.images)

    def halve_batch_size() -> int:
        nonlocal batch_size
        if batch_size == 1:
            raise RunError("out of memory with one image at a time; use a smaller image size or network")
        batch_size //= 2
        warnings.warn(f"out of memory; measuring with batch_size={batch_size} instead", stacklevel=2)
        return batch_size

    @find_executable_batch_size(starting_batch_size=batch_size, reduce_batch_size_fn=halve_batch_size)
    def measure(batch_size: int) -> tuple[Tensor, InvarianceScores | None]:
        with as_predict(model) as predict:
            probabilities = predict_logits(predict, data.images, batch_size=batch_size).softmax(1).cpu()
        if is_identity(reference.nuisance):
            return probabilities, None
        invariance = measure_invariance(
            model,
            data.images,
            data.labels,
            reference.nuisance,
            originals=prepared.originals(settings.split).images if reference.name == "data" else None,
            num_classes=data.num_classes,
            draws=settings.draws,
            batch_size=batch_size,
            generator=named_generator(settings.seed, "measure"),
        )
        return probabilities, invariance

    probabilities, invariance = measure()
    accuracy = score_predictions(probabilities.argmax(1), data.labels, data.num_classes)
    path = run.path / "measures" / reference.name
    measured = Measured(accuracy, invariance, prepared, path, reference, settings.split, probabilities)
    _write(measured, run, task, settings, seconds=time.perf_counter() - started)
    return measured


def resolve_nuisance(
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


def _choose_reference(settings: MeasureRun, prepared: Prepared, run: Run, device: torch.device) -> Reference:
    """What to measure the classifier of `run` against, "auto" resolved; errors as of `resolve_nuisance`."""
    name, translator, why = settings.nuisance, settings.translator, "as asked"
    if name == "auto":
        if settings.nuisance_options:
            raise SettingsError("nuisance_options needs nuisance=NAME, the nuisance that they are options of")
        name, translator, why = _choose_automatically(translator, prepared, run)
    nuisance, label = resolve_nuisance(name, settings.nuisance_options, translator, prepared, device), name
    if name == "translator":
        from gen_invariance.translator.quality.verdict import weights_digest

        kind = type(nuisance).__name__.removesuffix("Translator").lower()
        label = f"translator {kind} {weights_digest(translator)[:6]}"
    return Reference(name, nuisance, label, why)


def _choose_automatically(translator: str | None, prepared: Prepared, run: Run) -> tuple[str, str | None, str]:
    """Name of the nuisance, folder of the translator, and why these."""
    if translator is not None:
        return "translator", translator, "translator= names it"
    if not is_identity(prepared.nuisance):
        return "data", None, "it acted on the images"
    stage, folder = read_stage(run), run.config["stage"].get("translator")
    folder = run.locate(os.path.expanduser(folder)) if isinstance(folder, str) else None
    nothing = "nothing acted on the images and"
    if not folder or "translator" not in stage.nuisance or not compute_translated_share(stage, prepared).classes:
        return "lighting", None, f"{nothing} the stage used no translator"
    if not Path(folder).exists():
        return "lighting", None, f"{nothing} {folder}, the translator of the stage, is gone"
    return "translator", folder, f"{nothing} the stage used {folder}"


def read_stage(run: Run) -> StageSettings:
    """The settings of the stage that a training run had.

    Raises:
        CheckpointError: its run.json does not hold them.
    """
    try:
        values = {name: value for name, value in run.config["stage"].items() if name != "translator"}
        return read_settings(StageSettings, values, "stage")
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise CheckpointError(
            f"{run.path / 'run.json'} does not hold the stage of a training run of this version ({error}); train again"
        ) from error


def _write(measured: Measured, run: Run, task: Task, settings: MeasureRun, *, seconds: float) -> None:
    label, draws = measured.reference.label, {"split": settings.split, "draws": settings.draws}
    stage = read_stage(run)
    alone = label == "data" or measured.invariance is None
    share = compute_translated_share(stage, measured.prepared)
    common = {
        "benchmark": task.name if alone else f"{task.name} against {label}",
        "method": settings.method or format_stage_label(stage.nuisance, share),
        "seed": run.seed,
        "config_digest": config_digest({**run.config, "measure": {"nuisance": label, **draws}}),
        "data_digest": measured.prepared.train.digest,
        "seconds": seconds,
        **provenance(),
    }
    records = make_records(
        measured.accuracy, measured.invariance, measured.prepared, common=common, totals=measured.calibration
    )
    RecordWriter(run.path / "records").write_cell(records)
    totals = {record.metric: record.value for record in records if record.class_index is None}
    write_json(measured.path / "figures.json", {**totals, **draws})
    write_csv(make_class_frame(measured), measured.path / "classes.csv")
    write_mistakes(
        measured.path,
        measured.data,
        measured.probabilities,
        title=f"Mistakes of {run.path.name}",
        names=measured.prepared.file_names(settings.split),
        counts=measured.prepared.train.counts.tolist(),
        groups=measured.prepared.groups,
    )


class NamedClasses(Protocol):
    """What classes are named and counted by, and which are many- and few-shot; such as a `Prepared`."""

    @property
    def train(self) -> ImageData:
        """Training images."""
        ...

    @property
    def groups(self) -> Mapping[str, Tensor]:
        """Of each group the classes in it, bool (K,)."""
        ...


def make_records(
    accuracy: AccuracyScores,
    invariance: InvarianceScores | None,
    prepared: NamedClasses,
    *,
    common: Mapping[str, Any],
    totals: Mapping[str, float] | None = None,
    by_class: Mapping[str, Tensor] | None = None,
) -> list[Record]:
    """Everything measured on one classifier as records: totals, by group, and by class.

    Args:
        accuracy: by class.
        invariance: by class; None where nothing was measured: under the identity every model has eKLD 0.
        prepared: names the classes and groups; a group without classes has no record.
        common: fields that all records share.
        totals: further totals.
        by_class: further figures (K,), each with its mean as "mean_NAME".
    """
    figures = dict(by_class or {})
    if invariance is not None:
        figures = {"ekld": invariance.ekld, "agreement": invariance.agreement, **figures}
    groups = {name: members for name, members in prepared.groups.items() if members.any()}
    group_of = {label: name for name, members in groups.items() for label in members.nonzero().flatten().tolist()}
    all_totals = {
        "balanced_accuracy": accuracy.balanced,
        **{f"{name}_accuracy": value for name, value in accuracy.group_means(groups).items()},
        **{f"mean_{name}": mean_over(values) for name, values in figures.items() if name != "agreement"},
        **(totals or {}),
    }
    if invariance is not None and "few" in groups:
        all_totals["few_ekld"] = mean_over(invariance.ekld[groups["few"]])
    records = [Record(metric=metric, value=value, **common) for metric, value in all_totals.items()]
    counts = prepared.train.counts.tolist()
    for metric, values in {"accuracy": accuracy.accuracy, **figures}.items():
        for label, value in enumerate(values.tolist()):
            records.append(
                Record(
                    metric=metric,
                    value=value,
                    class_name=prepared.train.class_names[label],
                    class_index=label,
                    class_count=counts[label],
                    group=group_of.get(label),
                    **common,
                )
            )
    return records


def make_class_frame(measured: Measured) -> pd.DataFrame:
    """One row a class, largest training count first."""
    train, groups = measured.prepared.train, measured.prepared.groups
    columns: dict[str, Any] = {
        "class": train.class_names,
        "group": [next((name for name, members in groups.items() if members[k]), "") for k in range(train.num_classes)],
        "train_images": train.counts.tolist(),
        "test_images": measured.accuracy.count.tolist(),
        "accuracy": measured.accuracy.accuracy.tolist(),
    }
    if measured.invariance is not None:
        columns["ekld"] = measured.invariance.ekld.tolist()
        columns["ekld_standard_error"] = measured.invariance.standard_error.tolist()
        columns["agreement"] = measured.invariance.agreement.tolist()
    return pd.DataFrame(columns).sort_values("train_images", ascending=False, kind="stable", ignore_index=True)


def format_table(measured: Measured) -> list[str]:
    """Lines of a table for a terminal."""
    invariance = measured.invariance
    further = "" if invariance is None else f" {'eKLD':>9} {'agreement':>9}"
    lines = [f"{'class':20} {'group':6} {'train':>6} {'test':>6} {'accuracy':>9}{further}"]
    for row in make_class_frame(measured).itertuples(index=False):
        name = row[0] if len(row[0]) <= 20 else row[0][:17] + "..."
        further = "" if invariance is None else f" {row.ekld:9.4f} {row.agreement:9.4f}"
        lines.append(f"{name:20} {row.group:6} {row.train_images:6d} {row.test_images:6d} {row.accuracy:9.4f}{further}")
    groups = {name: members for name, members in measured.prepared.groups.items() if members.any()}
    means = [f"{name} {value:.4f}" for name, value in measured.accuracy.group_means(groups).items()]
    lines += ["", f"balanced accuracy {measured.accuracy.balanced:.4f}   " + "   ".join(means)]
    words = [f"{name.replace('calibration_error', '').strip('_')} {v:.4f}" for name, v in measured.calibration.items()]
    lines.append("calibration error" + "   ".join(words))
    if invariance is None:
        return [*lines, "no invariance figure: the nuisance is the identity, under which every model has eKLD 0"]
    label = measured.reference.label
    return [
        *lines,
        f"mean eKLD {mean_over(invariance.ekld):.4f} nats, against {label}, {invariance.draws} draws an image",
        f"nuisance {label}: {measured.reference.why}",
    ]
