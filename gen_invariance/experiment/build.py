"""Build the parts of a training run from their settings: the stage, plain augmentation, the classifier, its losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gen_invariance.augment.policy import policy
from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.losses import CrossEntropy, build_loss
from gen_invariance.classifier.model import Classifier
from gen_invariance.data.images import ImageData
from gen_invariance.errors import CheckpointError, SettingsError
from gen_invariance.experiment.settings import ClassifierSettings, StageSettings
from gen_invariance.experiment.task import Prepared
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.nuisance.compose import Compose, is_identity
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.report.labels import NOTHING_TRANSLATED
from gen_invariance.run import named_generator

if TYPE_CHECKING:
    from gen_invariance.classifier.transfer import TransferPlan
    from gen_invariance.translator.munit.model import MunitTranslator
    from gen_invariance.translator.spatial import SpatialTranslator


@dataclass(frozen=True)
class TrainingParts:
    """What a training has beside the network, its loss and its schedule.

    Attributes:
        stage: gives the nuisance to the tail.
        stage_source: what the stage acts on where that is not the training images, see `select_stage_source`.
        augmentation: of every row, after the stage.
        plan: which blocks of a pretrained backbone train.
    """

    stage: TailAugment | None = None
    stage_source: ImageData | None = None
    augmentation: Nuisance | None = None
    plan: TransferPlan | None = None


def build_stage(
    settings: StageSettings, prepared: Prepared, *, translator: Nuisance | None = None
) -> TailAugment | None:
    """The stage of `settings`, or None.

    Raises:
        SettingsError: an unknown nuisance, or "translator" without one.
    """
    if settings.nuisance == "none":
        return None
    parts = [_build_stage_nuisance(name, settings, prepared, translator) for name in settings.parts]
    nuisance = parts[0] if len(parts) == 1 else Compose(parts)
    return TailAugment(nuisance, policy(settings.policy, prepared.train.counts, **settings.policy_options))


def _build_stage_nuisance(
    name: str, settings: StageSettings, prepared: Prepared, translator: Nuisance | None
) -> Nuisance:
    if name == "true":
        return prepared.nuisance
    if name != "translator":
        return build_nuisance(name, **settings.nuisance_options.get(name, {}))
    if translator is None:
        raise SettingsError("stage.nuisance=translator needs stage.translator: the folder of a fitted translator")
    return translator


def select_stage_source(settings: StageSettings, prepared: Prepared) -> ImageData | None:
    """The images that the stage acts on where they are not the training images.

    The oracle's nuisance takes the images before they met it, for otherwise its rows would carry the nuisance twice.
    """
    return prepared.originals("train") if settings.parts[0] == "true" else None


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
    first = build_loss(settings.loss, **about, **settings.loss_options)
    if settings.second_loss_options is None:
        return first, None
    return first, build_loss(settings.loss, **about, **settings.second_loss_options)


def require_channels(translator: MunitTranslator | SpatialTranslator, prepared: Prepared, folder: Path | str) -> None:
    """Raise `CheckpointError` unless the translator of `folder` takes images of as many channels as the data's."""
    got, expected = translator.config.channels, prepared.train.images.shape[1]
    if got != expected:
        raise CheckpointError(
            f"the translator in {folder} was fitted on images of {got} channel(s), the data has {expected}; "
            "fit one on this data"
        )


@dataclass(frozen=True)
class TranslatedShare:
    """The stage's probability, averaged.

    Attributes:
        rows: over training images: the share of rows that is translated where images are drawn as they come.
        classes: over the classes that have images: the share where classes are drawn evenly. 0 means nothing at all.
    """

    rows: float
    classes: float


def compute_translated_share(settings: StageSettings, prepared: Prepared) -> TranslatedShare:
    """The share that the stage of `settings` translates of the prepared training images; 0 where it only repeats them.

    Raises:
        SettingsError: an unknown policy or option.
    """
    idle = {"none", "identity"}
    if is_identity(prepared.nuisance):
        idle.add("true")
    if idle.issuperset(settings.parts):
        return TranslatedShare(0.0, 0.0)
    counts = prepared.train.counts.cpu()
    probability = policy(settings.policy, counts, **settings.policy_options).double()
    rows = float((probability * counts).sum() / counts.sum().clamp(min=1))
    return TranslatedShare(rows, float(probability[counts > 0].mean()) if (counts > 0).any() else 0.0)


def format_stage_label(nuisance: str, share: TranslatedShare) -> str:
    """What a run with this stage is called.

    >>> format_stage_label("translator", TranslatedShare(0.0, 0.0))
    'translator (nothing translated)'
    >>> format_stage_label("none", TranslatedShare(0.0, 0.0))
    'none'
    """
    nothing = share.classes == 0 and nuisance != "none"
    return f"{nuisance} ({NOTHING_TRANSLATED})" if nothing else nuisance


def format_untranslated_note(
    settings: StageSettings, share: TranslatedShare, *, translator: bool, verdict: str = ""
) -> str | None:
    """One line for `train` where a translation was asked for and none takes place; None otherwise.

    Args:
        settings: of the stage.
        share: from `compute_translated_share`.
        translator: whether a fitted translator was named.
        verdict: what `inspect` says of it, where the policy obeyed that.
    """
    if share.classes > 0 or (settings.nuisance == "none" and not translator):
        return None
    if settings.nuisance == "none":
        return "note: nothing is translated: stage.nuisance is none, so stage.translator is not used"
    if verdict:
        return (
            f"note: inspect says '{verdict}', so nothing is translated; stage.policy=everywhere would translate "
            "nevertheless"
        )
    if {"identity", "true"}.issuperset(settings.parts):
        return f"note: nothing is translated: stage.nuisance={settings.nuisance} leaves these images as they are"
    return f"note: nothing is translated: stage.policy={settings.policy} gives every class the probability 0"
