"""Benchmark cells: fit what a method needs, train its classifier, measure, and return records.

A cell is one (task, method, seed). Its figures depend on these alone, so cells may run in any order, in any process,
and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen_invariance.augment.policy import policy
from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.backbones import Classifier, build_classifier
from gen_invariance.classifier.heads import measure_similarity
from gen_invariance.classifier.losses import CrossEntropy, build_loss
from gen_invariance.classifier.train import TrainSettings, fit_classifier
from gen_invariance.classifier.transfer import TransferPlan, cache_features
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import long_tailed_indices
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.task import Prepared, Task
from gen_invariance.measure.accuracy import AccuracyScores, mean_over, measure_accuracy
from gen_invariance.measure.invariance import InvarianceScores, measure_invariance
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.nuisance.compose import Compose, is_identity
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.records import Record, provenance
from gen_invariance.run import Run, config_digest, named_generator

PROTOCOL = 3
"""How cells are trained and measured. Since 2 the true nuisance acts on images that have not met it yet, in the
oracle's stage and in eKLD; before, they carried two draws of it. Since 3 phases are shares of training, plain
augmentation comes after the stage, and `small_conv` has a fourth convolution."""


@dataclass(frozen=True)
class StageSettings:
    """What the stage gives, and to whom.

    Attributes:
        nuisance: names joined by "+", applied in that order: "none" (no stage), "identity" (second stream only),
            "true" (the one in the data: oracle), "translator", or what `nuisance.build` knows by name.
        policy: name of a policy of `augment.policy`: where the stage acts.
        policy_options: of that policy.
        nuisance_options: options of the nuisances, by name.
    """

    nuisance: str = "none"
    policy: str = "auto"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    nuisance_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """The names of `nuisance`, in order."""
        return [name.strip() for name in self.nuisance.split("+")]


@dataclass(frozen=True)
class ClassifierSettings:
    """Which classifier, with which loss.

    Attributes:
        backbone: a name of `classifier.backbones`.
        head: "linear" or "cosine".
        loss: a name of `classifier.losses`.
        loss_options: of that loss.
        second_loss_options: of that loss in the second phase, for delayed re-weighting; None keeps `loss_options`.
        weights: start of the backbone, see `classifier.backbones.build_classifier`; None is from scratch.
    """

    backbone: str = "resnet20"
    head: str = "linear"
    loss: str = "cross_entropy"
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    second_loss_options: Mapping[str, Any] | None = None
    weights: str | None = None


def build_stage(
    settings: StageSettings, prepared: Prepared, *, translator: Nuisance | None = None
) -> TailAugment | None:
    """The stage of `settings`, or None.

    Raises:
        SettingsError: an unknown nuisance, or "translator" without one.
    """
    if settings.nuisance == "none":
        return None
    parts = [_stage_nuisance(name, settings, prepared, translator) for name in settings.parts]
    nuisance = parts[0] if len(parts) == 1 else Compose(parts)
    return TailAugment(nuisance, policy(settings.policy, prepared.train.counts, **settings.policy_options))


def stage_source(settings: StageSettings, prepared: Prepared) -> ImageData | None:
    """What the stage acts on where that is not the training images: the oracle's nuisance takes the images before they
    met it, for otherwise its rows would carry the nuisance twice.
    """
    return prepared.originals("train") if settings.parts[0] == "true" else None


def _stage_nuisance(
    name: str, settings: StageSettings, prepared: Prepared, translator: Nuisance | None
) -> Nuisance:
    if name == "true":
        return prepared.nuisance
    if name != "translator":
        return build_nuisance(name, **settings.nuisance_options.get(name, {}))
    if translator is None:
        raise SettingsError("stage.nuisance=translator needs stage.translator: the folder of a fitted translator")
    return translator


def build_augmentation(name: str, *, flip: bool, options: Mapping[str, Any] | None = None) -> Nuisance | None:
    """The plain augmentation of every row: "none", or names of `nuisance.build` joined by "+", applied in that order.

    Args:
        name: "crop_flip", "randaugment", "trivialaugment", "crop_flip+trivialaugment", ...
        flip: whether a mirrored image keeps its label; "crop_flip" mirrors only then, unless its options say so.
        options: by name.

    Raises:
        SettingsError: another name, or an option it lacks.
    """
    if name == "none":
        return None
    given = {**(options or {})}
    given["crop_flip"] = {"flip": flip, **given.get("crop_flip", {})}
    try:
        parts = [build_nuisance(part, **given.get(part, {})) for part in map(str.strip, name.split("+"))]
    except SettingsError as error:
        raise SettingsError(f"augmentation: {error}") from error
    return parts[0] if len(parts) == 1 else Compose(parts)


def build_model(settings: ClassifierSettings, train: ImageData, *, seed: int) -> Classifier:
    """A new classifier; without pretrained weights, which bring their own, it is normalised by the training images."""
    model = build_classifier(
        settings.backbone,
        num_classes=train.num_classes,
        channels=train.images.shape[1],
        head=settings.head,
        weights=settings.weights,
        generator=named_generator(seed, "classifier"),
    )
    if settings.weights is None:
        model.set_normalisation(*train.mean_std())
    return model


def build_losses(settings: ClassifierSettings, train: ImageData) -> tuple[CrossEntropy, CrossEntropy | None]:
    """The loss of the first phase, and that of the second where it is another."""
    about = {"counts": train.counts, "class_names": train.class_names}
    first = build_loss(settings.loss, **about, **dict(settings.loss_options))
    if settings.second_loss_options is None:
        return first, None
    return first, build_loss(settings.loss, **about, **dict(settings.second_loss_options))


def train_classifier(
    prepared: Prepared,
    classifier: ClassifierSettings,
    training: TrainSettings,
    *,
    stage: TailAugment | None,
    run: Run,
    base: Nuisance | None = None,
    plan: TransferPlan | None = None,
    stage_source: ImageData | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Classifier:
    """Build the classifier and its loss for the prepared data, and train it; an "auto" plan is resolved first.

    `say` is told what a transfer plan trains, and why. `stage_source` is what the stage acts on, see `fit_classifier`.
    """
    train = prepared.train
    model = build_model(classifier, train, seed=run.seed)
    loss, second = build_losses(classifier, train)
    plan = resolve_plan(plan, model, train)
    if plan is not None:
        say(plan.describe(model))
    return fit_classifier(
        model, train, training, loss=loss, second_loss=second, run=run, plan=plan, stage=stage, base=base,
        stage_source=stage_source, progress=progress,
    )  # fmt: skip


def resolve_plan(plan: TransferPlan | None, model: Classifier, train: ImageData) -> TransferPlan | None:
    """`plan`, its "auto" replaced by the mode that the training images suggest under the backbone as it is."""
    if plan is None or plan.mode != "auto":
        return plan
    TransferPlan("frozen").apply(model.eval())  # `fit_classifier` puts the model into the state of the real plan
    similarity = measure_similarity(cache_features(model, train.images), train.labels, groups=train.groups)
    return plan.resolve(model, num_images=len(train), similarity=similarity)


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
    prepared: Prepared,
    method: Method,
    *,
    seed: int,
    folder: Path,
    filled: Prepared | None = None,
    translator: Nuisance | None = None,
    fit_seconds: float | None = None,
    draws: int = 10,
    invariance_images: int | None = None,
    learned: Nuisance | None = None,
    **about: Any,
) -> list[Record]:
    """Train and measure one cell; the run folder stays behind in `folder`.

    Args:
        task: names the benchmark.
        prepared: its images for `seed`.
        method: the arm.
        seed: of everything random.
        folder: of the run; an unfinished one is resumed.
        filled: the same with its tail filled up, which a method with `more_real` trains on.
        translator: fitted, where the method needs one.
        fit_seconds: what fitting it took, for the record.
        draws: transformations of each test image for eKLD, which is left out where the task's nuisance is the identity.
        invariance_images: test images of each class at most for eKLD, the same ones for every method; None is all.
        learned: a fitted nuisance that eKLD is measured against, too.
        about: fields of the records that are not those of the task: `benchmark`, `order`, `config_digest`.
    """
    started = time.perf_counter()
    run = Run(folder, kind="train", seed=seed, config=cell_settings(task, method), resume=True)
    stage = build_stage(method.stage, prepared, translator=translator)
    base = build_augmentation(
        method.augmentation, flip=prepared.flip_safe, options=method.augmentation_options
    )
    seen, training = prepared, method.training
    if method.more_real:
        seen, training = filled, replace(training, epoch_images=training.epoch_images or len(prepared.train))
    model = train_classifier(
        seen, method.classifier, training, stage=stage, run=run, base=base,
        stage_source=stage_source(method.stage, prepared), progress=False,
    )  # fmt: skip
    train_seconds = time.perf_counter() - started
    accuracy = measure_accuracy(
        model, prepared.test.images, prepared.test.labels, num_classes=prepared.test.num_classes
    )
    rows = _some_of_each(prepared.test, invariance_images)
    images, labels = prepared.test.images[rows], prepared.test.labels[rows]

    def against(nuisance: Nuisance, originals: Tensor | None, purpose: str) -> InvarianceScores:
        return measure_invariance(
            model, images, labels, nuisance, originals=originals, num_classes=prepared.test.num_classes, draws=draws,
            generator=named_generator(seed, purpose),
        )  # fmt: skip

    invariance = None
    if not is_identity(prepared.nuisance):
        invariance = against(prepared.nuisance, prepared.originals("test").images[rows], "evaluation")
    # A translator takes images as they are in the data, for that is what it was fitted on.
    more = {} if learned is None else {"learned_ekld": against(learned, None, "evaluation, learned").ekld}
    seconds = {"train_seconds": train_seconds}
    if fit_seconds is not None:
        seconds["fit_seconds"] = fit_seconds
    common = {
        "benchmark": task.name,
        "method": method.name,
        "seed": seed,
        "config_digest": cell_digest(task, method, draws=draws),
        "data_digest": prepared.train.digest,
        "seconds": time.perf_counter() - started,
        **provenance(),
        **about,
    }
    return records_of(accuracy, invariance, prepared, extra=seconds, by_class=more, common=common)


def _some_of_each(data: ImageData, number: int | None) -> Tensor:
    """Rows of at most `number` images of each class, int64, the same for every call on the same data."""
    if number is None:
        return torch.arange(len(data), device=data.device)
    generator = named_generator(0, "evaluation", "images")
    wanted = data.counts.clamp(max=number)
    rows = long_tailed_indices(data.labels.cpu(), wanted, generator=generator, groups=data.groups)
    return rows.to(data.device)


def records_of(
    accuracy: AccuracyScores,
    invariance: InvarianceScores | None,
    prepared: Prepared,
    *,
    extra: Mapping[str, float],
    common: Mapping[str, Any],
    by_class: Mapping[str, Tensor] | None = None,
) -> list[Record]:
    """Everything measured on one classifier as records: totals, by group, and by class.

    `invariance` is None where nothing was measured: under the identity every model has eKLD 0. A group without classes
    has no record. `extra` are further totals, `by_class` further figures (K,), each with its mean as "mean_NAME".
    """
    more = dict(by_class or {})
    groups = {name: chosen for name, chosen in prepared.groups.items() if chosen.any()}
    if invariance is not None:
        more = {"ekld": invariance.ekld, "agreement": invariance.agreement, **more}
    totals = {
        "balanced_accuracy": accuracy.balanced,
        **{f"{name}_accuracy": value for name, value in accuracy.group_means(groups).items()},
        **{f"mean_{name}": mean_over(values) for name, values in more.items() if name != "agreement"},
        **extra,
    }
    if invariance is not None and "few" in groups:
        totals["few_ekld"] = mean_over(invariance.ekld[groups["few"]])
    records = [Record(metric=metric, value=value, **common) for metric, value in totals.items()]
    group_of = {label: name for name, chosen in groups.items() for label in chosen.nonzero().flatten().tolist()}
    figures = {"accuracy": accuracy.accuracy, **more}
    counts = prepared.train.counts.tolist()
    for metric, values in figures.items():
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
