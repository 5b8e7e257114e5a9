"""Benchmark cells: train the classifier of a method on a task, measure it, and return records.

A cell is one (task, method, seed). Its figures depend on these alone, so cells may run in any order, in any process,
and again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import long_tailed_indices
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.build import TrainingParts, build_stage, select_stage_source
from gen_invariance.experiment.evaluate import make_records
from gen_invariance.experiment.settings import ClassifierSettings, MeasureSettings, StageSettings, Task
from gen_invariance.experiment.task import Prepared
from gen_invariance.experiment.train import train_classifier
from gen_invariance.measure.accuracy import measure_accuracy
from gen_invariance.measure.invariance import InvarianceScores, measure_invariance
from gen_invariance.nuisance.build import build_augmentation
from gen_invariance.nuisance.compose import is_identity
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.records import Record, provenance
from gen_invariance.run import Run, config_digest, named_generator

PROTOCOL = 3
"""How cells are trained and measured. Since 2 the true nuisance acts on images that have not met it yet, in the
oracle's stage and in eKLD; before, they carried two draws of it. Since 3 phases are shares of training, plain
augmentation comes after the stage, and `small_conv` has a fourth convolution."""


@dataclass(frozen=True)
class Method:
    """One arm of a comparison.

    Attributes:
        name: in records and figures.
        stage: what the tail is given.
        training: how the classifier is trained.
        classifier: which classifier.
        translator: name of the translator the stage needs ("spatial", "munit"), or None.
        augmentation: of every row, see `build_augmentation`.
        augmentation_options: of its parts, by name.
        more_real: train on the tail filled up with images that the cut left out, for as many steps: an oracle.

    Raises:
        SettingsError: a phase that the method promises would never start.
    """

    name: str
    stage: StageSettings
    training: TrainSettings
    classifier: ClassifierSettings
    translator: str | None = None
    augmentation: str = "none"
    augmentation_options: Mapping[str, Any] = field(default_factory=dict)
    more_real: bool = False

    def __post_init__(self) -> None:
        try:
            self.training.check_phases(
                stage=self.stage.nuisance != "none", second_loss=self.classifier.second_loss_options is not None
            )
        except SettingsError as error:
            raise SettingsError(f"method {self.name}: {error}") from error


@dataclass(frozen=True)
class CellInputs:
    """What a cell is computed from.

    Attributes:
        prepared: the images of the task.
        filled: the same with its tail filled up, which a method with `more_real` trains on.
        translator: fitted, where the method needs one.
        fit_seconds: what fitting it took, for the record.
        learned: a fitted nuisance that eKLD is measured against, too.
    """

    prepared: Prepared
    filled: Prepared | None = None
    translator: Nuisance | None = None
    fit_seconds: float | None = None
    learned: Nuisance | None = None


def cell_settings(task: Task, method: Method) -> dict[str, Any]:
    """What decides the figures of a cell but its seed; how often to log or save, and where data lie, does not."""
    path = None if task.path is None else Path(task.path).name
    return {
        "task": {**task.identity(), "path": path},
        "method": {**asdict(method), "training": method.training.identity()},
    }


def cell_digest(task: Task, method: Method, *, draws: int, **more: Any) -> str:
    """Digest of all settings of a cell but its seed; `more` are further ones."""
    return config_digest({**cell_settings(task, method), "draws": draws, "protocol": PROTOCOL, **more})


def run_cell(
    task: Task,
    method: Method,
    inputs: CellInputs,
    *,
    seed: int,
    folder: Path,
    measure: MeasureSettings,
    **about: Any,
) -> list[Record]:
    """Train and measure one cell; the run folder stays behind in `folder`.

    Args:
        task: names the benchmark.
        method: the arm.
        inputs: images and translators.
        seed: of everything random.
        folder: of the run; an unfinished one is resumed.
        measure: eKLD is left out where the task's nuisance is the identity.
        about: fields of the records that are not those of the task: `benchmark`, `order`, `config_digest`.
    """
    started = time.perf_counter()
    prepared = inputs.prepared
    parts = TrainingParts(
        stage=build_stage(method.stage, prepared, translator=inputs.translator),
        stage_source=select_stage_source(method.stage, prepared),
        augmentation=build_augmentation(
            method.augmentation, flip=prepared.flip_safe, options=method.augmentation_options
        ),
    )
    train, training = prepared.train, method.training
    if method.more_real:
        training = replace(training, epoch_images=training.epoch_images or len(train))
        train = inputs.filled.train
    with Run.open(folder, kind="train", seed=seed, config=cell_settings(task, method), resume=None) as run:
        model = train_classifier(train, method.classifier, training, parts, run=run, progress=False)
    seconds = {"train_seconds": time.perf_counter() - started}
    if inputs.fit_seconds is not None:
        seconds["fit_seconds"] = inputs.fit_seconds

    test = prepared.test
    accuracy = measure_accuracy(model, test.images, test.labels, num_classes=test.num_classes)
    rows = _select_some_of_each(test, measure.invariance_images)
    images, labels = test.images[rows], test.labels[rows]

    def measure_against(nuisance: Nuisance, originals: Tensor | None, purpose: str) -> InvarianceScores:
        return measure_invariance(
            model,
            images,
            labels,
            nuisance,
            originals=originals,
            num_classes=test.num_classes,
            draws=measure.draws,
            generator=named_generator(seed, purpose),
        )

    invariance, by_class = None, {}
    if not is_identity(prepared.nuisance):
        invariance = measure_against(prepared.nuisance, prepared.originals("test").images[rows], "evaluation")
    if inputs.learned is not None:  # it takes images as they are in the data, for that is what it was fitted on
        by_class["learned_ekld"] = measure_against(inputs.learned, None, "evaluation, learned").ekld
    common = {
        "benchmark": task.name,
        "method": method.name,
        "seed": seed,
        "config_digest": cell_digest(task, method, draws=measure.draws),
        "data_digest": prepared.train.digest,
        "seconds": time.perf_counter() - started,
        **provenance(),
        **about,
    }
    return make_records(accuracy, invariance, prepared, common=common, totals=seconds, by_class=by_class)


def _select_some_of_each(data: ImageData, number: int | None) -> Tensor:
    """Rows of at most `number` images of each class, int64, the same for every call on the same data."""
    if number is None:
        return torch.arange(len(data), device=data.device)
    generator = named_generator(0, "evaluation", "images")
    wanted = data.counts.clamp(max=number)
    rows = long_tailed_indices(data.labels.cpu(), wanted, generator=generator, groups=data.groups)
    return rows.to(data.device)
