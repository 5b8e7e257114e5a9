"""`run_train`: one training of a classifier on a long-tailed set, from settings to a run folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gen_invariance.classifier.backbones import require_backbone
from gen_invariance.classifier.heads import measure_similarity
from gen_invariance.classifier.model import Classifier, CosineHead, cache_features
from gen_invariance.classifier.optimizer import fill_rate
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.data.images import ImageData
from gen_invariance.experiment.auto import AUTO, choose_stage
from gen_invariance.experiment.build import (
    TrainingParts,
    build_losses,
    build_model,
    build_stage,
    compute_translated_share,
    format_untranslated_note,
    require_channels,
    select_stage_source,
)
from gen_invariance.experiment.inspect import obey_verdict
from gen_invariance.experiment.launch import Say, open_run_folder, prepare_on_device, say_nothing
from gen_invariance.experiment.settings import ClassifierSettings, StageSettings, TrainRun
from gen_invariance.experiment.task import Prepared
from gen_invariance.measure.accuracy import measure_accuracy
from gen_invariance.nuisance.build import build_augmentation
from gen_invariance.run import Run, is_first_process
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.verdict import read_verdict


def run_train(settings: TrainRun, *, say: Say = say_nothing) -> Path:
    """Prepare the data, train the classifier with its stage, and return the run folder.

    Args:
        settings: see `TrainRun`.
        say: is told what is unusual about the data or the stage, and what a transfer plan trains.

    Raises:
        SettingsError: settings that do not fit each other or the data; the run folder of other settings.
        CheckpointError: a translator or pretrained weights that are damaged or do not fit.
        RunError: the training failed.
    """
    require_backbone(settings.classifier.backbone)  # before the data are read
    facts: dict[str, Any] = {}
    if settings.stage.nuisance == AUTO:
        settings, chosen = choose_stage(settings, say=say)
        facts = {
            "choice": {"chosen": chosen.choice.chosen.name, "reason": chosen.choice.reason, "file": str(chosen.file)}
        }
    folder, translator, verdict = settings.stage.translator, None, ""
    stage: StageSettings = settings.stage
    if folder:
        translator = load_translator(folder)
        stage = obey_verdict(settings.stage, folder)
        if stage != settings.stage:
            verdict = read_verdict(folder).word
    prepared = prepare_on_device(
        settings.data, seed=settings.seed, device=settings.device, progress=settings.progress, say=say
    )
    if translator is not None:
        require_channels(translator, prepared, folder)
    parts = TrainingParts(
        stage=build_stage(stage, prepared, translator=translator),
        stage_source=select_stage_source(stage, prepared),
        augmentation=build_augmentation(settings.augmentation, flip=prepared.flip_safe),
        plan=None if settings.transfer.mode == "none" else settings.transfer,
    )
    share = compute_translated_share(stage, prepared)
    note = format_untranslated_note(stage, share, translator=translator is not None, verdict=verdict)
    if note is None and verdict:
        note = f"note: inspect says '{verdict}', so the policy auto is weaker"
    if note is not None:
        say(note)
    with open_run_folder(settings, "train", _describe_run(settings, stage), prepared.split) as run:
        if is_first_process():
            run.note(given_share=asdict(share), image_shape=list(prepared.train.images.shape[1:]), **facts)
        model = train_classifier(
            prepared.train,
            settings.classifier,
            settings.training,
            parts,
            run=run,
            evaluate=validate_on(prepared),
            progress=settings.progress,
            say=say,
        )
        if is_first_process() and isinstance(model.head, CosineHead):
            run.note(feature_norm=measure_feature_norm(model, prepared.train))
    return run.path


@torch.no_grad()
def measure_feature_norm(model: Classifier, data: ImageData, *, most: int = 256) -> float:
    """Mean length of the features of `most` images spread over the data; `export` needs it to replace a cosine head."""
    rows = torch.linspace(0, len(data) - 1, min(most, len(data)), device=data.device).long()
    model.eval()
    lengths = [model.features(data.float_images(part)).norm(dim=1) for part in rows.split(32)]
    return float(torch.cat(lengths).mean())


def validate_on(prepared: Prepared) -> Callable[[nn.Module], dict[str, float]] | None:
    """What measures balanced accuracy and that of each shot group on the validation images; None where there are none.

    Groups of which no class has a validation image are left out.
    """
    held = prepared.validation
    if not len(held):
        return None

    def measure(model: nn.Module) -> dict[str, float]:
        found = measure_accuracy(model, held.images, held.labels, num_classes=held.num_classes)
        by_group = {f"{name}_accuracy": value for name, value in found.group_means(prepared.groups).items()}
        figures = {"balanced_accuracy": found.balanced, **by_group}
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    return measure


def _describe_run(settings: TrainRun, stage: StageSettings) -> dict[str, Any]:
    """What `run.json` says of the settings; `measure`, `report` and `augment` read it."""
    return {
        "data": settings.data.identity(),
        "classifier": asdict(settings.classifier),
        "training": settings.training.identity(),
        "stage": asdict(stage),
        "transfer": settings.transfer.identity(),
        "augmentation": settings.augmentation,
    }


def train_classifier(
    train: ImageData,
    classifier: ClassifierSettings,
    training: TrainSettings,
    parts: TrainingParts,
    *,
    run: Run,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    progress: bool | None = None,
    say: Say = say_nothing,
) -> Classifier:
    """Build the classifier and its losses for `train`, and train it; an "auto" plan is resolved first.

    `say` is told what a transfer plan trains, and why; `evaluate` is that of `fit_classifier`.
    """
    model = build_model(classifier, train, seed=run.seed)
    loss, second_loss = build_losses(classifier, train)
    plan = resolve_plan(parts.plan, model, train)
    if plan is not None:
        for line in fill_rate(plan, training).describe(model).splitlines():
            say(line)
    return fit_classifier(
        model,
        train,
        training,
        loss=loss,
        second_loss=second_loss,
        plan=plan,
        stage=parts.stage,
        stage_source=parts.stage_source,
        augmentation=parts.augmentation,
        evaluate=evaluate,
        out=run,
        progress=progress,
    )


def resolve_plan(plan: TransferPlan | None, model: Classifier, train: ImageData) -> TransferPlan | None:
    """`plan`, its "auto" replaced by the mode that the training images suggest under the backbone as it is."""
    if plan is None or plan.mode != "auto":
        return plan
    TransferPlan("frozen").apply(model.eval())  # `fit_classifier` puts the model into the state of the real plan
    similarity = measure_similarity(cache_features(model, train.images), train.labels, groups=train.groups)
    return plan.resolve(model, num_images=len(train), similarity=similarity, counts=train.counts.tolist())
