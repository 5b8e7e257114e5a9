"""Train a candidate on images: the same code for a simulated tail and for the whole set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from gen_invariance.augment.policy import policy
from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.losses import CrossEntropy
from gen_invariance.classifier.model import Classifier
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.nuisance.compose import Compose
from gen_invariance.nuisance.geometry import CropFlip
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.referee.candidates import Candidate, Translator
from gen_invariance.referee.settings import RefereeSettings
from gen_invariance.run import Run, config_digest, named_generator
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.registry import find_kind
from gen_invariance.translator.settings import FitSettings

_EPOCHS = 20
"""Points in which progressive sampling moves from instance to class-balanced."""
_HEAD_FROM = 20  # of a fit, where classes are large enough

Fitted = Mapping[str, Nuisance]
"""Fitted translators by `translator_key`."""


def translator_key(translator: Translator) -> str:
    """Tells translators of different settings or weights apart."""
    return f"{translator.kind or 'given'}-{config_digest(translator.identity())[:8]}"


class PlainTraining(Protocol):
    """Settings of a short plain training; read only, for settings classes are frozen."""

    @property
    def steps(self) -> int:
        """Updates."""

    @property
    def batch_size(self) -> int:
        """Images a step."""

    @property
    def learning_rate(self) -> float:
        """Peak rate."""


def make_train_settings(
    settings: PlainTraining, *, sampling: Literal["progressive", "class_balanced"] = "progressive"
) -> TrainSettings:
    """A plain training of `settings.steps` updates: SGD with momentum along a cosine, classes drawn by `sampling`."""
    epochs = min(_EPOCHS, settings.steps)
    return TrainSettings(
        epochs=epochs,
        epoch_images=round(settings.steps / epochs) * settings.batch_size,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=5e-4,
        schedule="cosine",
        warmup=0.05,
        sampling=sampling,
        log_every=epochs,
        checkpoint_every=epochs,
    )


def is_quick(translator: Translator) -> bool:
    """Whether it is there already, or fitted in one go, in seconds; the others need minutes or hours."""
    return translator.folder is not None or find_kind(translator.kind).fit is not None


def fit_candidate_translator(
    translator: Translator,
    data: ImageData,
    *,
    seed: int = 0,
    flip_safe: bool = False,
    fit_steps: int = 300,
    out: Run | Path | str | None = None,
) -> nn.Module:
    """`translator` fitted on the large classes of `data`, or loaded; in eval mode.

    Raises:
        SettingsError: `data` has no class to fit on, or its network settings are not this kind's.
        CheckpointError: its folder holds no translator.
        RunError: the fit failed.
    """
    if translator.folder is not None:
        return load_translator(translator.folder).to(data.device)
    largest = int(data.counts.max())
    loop = FitSettings(steps=max(fit_steps, 1), head_from=max(1, min(_HEAD_FROM, largest // 2)), flip=flip_safe)
    return fit_translator(
        translator.kind,
        data,
        loop,
        network=translator.network,
        objective=translator.objective,
        out=out,
        seed=seed,
        progress=False,
    )


def build_candidate_stage(candidate: Candidate, data: ImageData, fitted: Fitted) -> TailAugment | None:
    """The stage of `candidate` for the classes of `data`; None where it has none.

    Raises:
        SettingsError: a translator of it is not among `fitted`, or an unknown nuisance or policy.
    """
    if not candidate.stage:
        return None
    parts = []
    for part in candidate.stage:
        if isinstance(part, Translator):
            if translator_key(part) not in fitted:
                raise SettingsError(f"candidate {candidate.name!r}: its translator was not fitted; fit it first")
            parts.append(fitted[translator_key(part)])
        else:
            parts.append(build_nuisance(part) if isinstance(part, str) else part)
    nuisance = parts[0] if len(parts) == 1 else Compose(parts)
    return TailAugment(nuisance, policy(candidate.policy, data.counts, **candidate.policy_options))


def build_every_row(candidate: Candidate, *, side: int, flip_safe: bool) -> Nuisance:
    """What every row gets: crops (and mirror images where labels allow them), then what the candidate adds."""
    crop = CropFlip(padding=max(1, round(side / 16)), flip=flip_safe)
    more = [build_nuisance(part) if isinstance(part, str) else part for part in candidate.every_row]
    return Compose([crop, *more]) if more else crop


def train_candidate(
    candidate: Candidate,
    data: ImageData,
    settings: TrainSettings | None = None,
    *,
    seed: int = 0,
    backbone: str = "small_conv",
    flip_safe: bool = False,
    fitted: Fitted | None = None,
    **fit_options: Any,
) -> Classifier:
    """A classifier trained from scratch on `data` as `candidate` would have it, in eval mode.

    Candidates that are trained with one seed share initial weights, batches and crops.

    Args:
        candidate: see `read_candidate`.
        data: long-tailed training images, on the device that shall train.
        settings: of the training; None takes those of the referee's own trainings.
        seed: of everything random.
        backbone: a name of `build_classifier`.
        flip_safe: whether a mirrored image keeps its label.
        fitted: translators that were fitted before; None fits those of the candidate on `data`.
        fit_options: of `fit_candidate_translator`.

    Raises:
        SettingsError: settings that do not fit each other, or the data.
        RunError: a training or a fit broke down.

    Example:
        >>> from gen_invariance import TrainSettings, load_source, make_long_tailed, read_candidate, train_candidate
        >>> train = make_long_tailed(load_source("digits"), largest=60, imbalance=20, rest_is_test=True).train
        >>> model = train_candidate(read_candidate("randaugment@every_row"), train, TrainSettings(epochs=1, warmup=0))
        >>> model(train.float_images()[:2]).shape
        torch.Size([2, 10])
    """
    if fitted is None:
        fitted = {
            translator_key(each): fit_candidate_translator(each, data, seed=seed, flip_safe=flip_safe, **fit_options)
            for each in candidate.translators
        }
    model = build_classifier(
        backbone,
        num_classes=data.num_classes,
        channels=data.images.shape[1],
        generator=named_generator(seed, "classifier"),
    )
    model.set_normalisation(*data.mean_std())
    return fit_classifier(
        model,
        data,
        settings or make_train_settings(RefereeSettings()),
        loss=CrossEntropy(data.counts),
        stage=build_candidate_stage(candidate, data, fitted),
        augmentation=build_every_row(candidate, side=data.images.shape[-1], flip_safe=flip_safe),
        seed=seed,
        progress=False,
    )
