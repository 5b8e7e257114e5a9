"""Second phases that touch the head layer only: classifier re-training, weight scaling, tau-normalisation, priors.

Each ends in a plain linear head, so a corrected classifier is saved, loaded and measured like any other. What has to
be trained is trained on features that pass the backbone once, which makes it a matter of seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.losses import CrossEntropy, log_prior
from gen_invariance.classifier.model import Classifier
from gen_invariance.classifier.posthoc import (
    ScaledHead,
    prepare_classifier_retraining,
    prepare_weight_scaling,
    tau_normalised,
)
from gen_invariance.classifier.transfer import cache_features
from gen_invariance.data.images import ImageData
from gen_invariance.data.sampling import epoch_indices
from gen_invariance.errors import SettingsError
from gen_invariance.run import Run


def correct_head(
    model: Classifier,
    train: ImageData,
    kind: str,
    *,
    run: Run,
    stage: TailAugment | None = None,
    stage_source: ImageData | None = None,
    options: Mapping[str, Any] | None = None,
) -> Classifier:
    """Correct the head of a trained `model`, in place, for balanced classes; its backbone does not change.

    Args:
        model: trained, with a linear head.
        train: its training images.
        kind: "crt" (a new head on class-balanced batches), "lws" (one learned factor a class), "tau_norm" (weights
            over their norm to the power tau), or "logit_adjustment" (tau log prior off the bias).
        run: names the generators.
        stage: augments the images whose features are stored.
        stage_source: what the stage acts on, row for row `train`; None takes `train` itself.
        options: of the kind: `tau` (1.0), or `epochs` (10), `learning_rate` (0.1), `batch_size` (128), and `views`
            (4), how often each image is augmented and stored where there is a stage.

    Raises:
        SettingsError: unknown kind or option, or a head that is not linear.

    Reference: Kang et al. 2020, section 4.2; Menon et al. 2021, equation 9.
    """
    check_correction(model, kind, options)
    correction, _ = _KINDS[kind]
    if stage is not None and stage_source is not None:
        stage = partial(stage, source=(stage_source.to(train.device).float_images(), train.labels))
    model.head = correction(model, train, run=run, stage=stage, **(options or {})).requires_grad_(True)
    return model.eval()


def check_correction(model: Classifier, kind: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise what `correct_head` would, before hours of training rather than after them."""
    if kind not in _KINDS:
        raise SettingsError(f"no head correction {kind!r}; choose {', '.join(_KINDS)}")
    known = _KINDS[kind][1]
    unknown = [name for name in options or {} if name not in known]
    if unknown:
        raise SettingsError(f"head correction {kind} has no option {unknown[0]!r}; it takes {', '.join(known)}")
    if not isinstance(model.head, nn.Linear):
        raise SettingsError(
            f"head correction {kind} needs a linear head, got {type(model.head).__name__}; use head='linear'"
        )
    tau = (options or {}).get("tau", 1.0)
    if not 0 <= tau <= 1 and kind == "tau_norm":
        raise SettingsError(f"tau must lie in [0, 1], got {tau}; choose it on validation images")


def _tau_norm(model: Classifier, train: ImageData, *, run: Run, stage: Any, tau: float = 1.0) -> nn.Linear:
    normalised = tau_normalised(model.head, tau=tau)
    return _linear_like(model.head, normalised.weight, torch.zeros_like(normalised.weight[:, 0]))


def _logit_adjustment(model: Classifier, train: ImageData, *, run: Run, stage: Any, tau: float = 1.0) -> nn.Linear:
    shift = tau * log_prior(train.counts).to(model.head.bias)
    return _linear_like(model.head, model.head.weight, model.head.bias - shift)


def _crt(model: Classifier, train: ImageData, *, run: Run, stage: TailAugment | None, **loop: Any) -> nn.Linear:
    prepare_classifier_retraining(model, generator=run.generator("crt", "head"))
    _train_head(model, train, run=run, stage=stage, **loop)
    return model.head


def _lws(model: Classifier, train: ImageData, *, run: Run, stage: TailAugment | None, **loop: Any) -> nn.Linear:
    prepare_weight_scaling(model)
    _train_head(model, train, run=run, stage=stage, **loop)
    scaled: ScaledHead = model.head
    factors = scaled.factors
    return _linear_like(scaled.head, factors[:, None] * scaled.head.weight, factors * scaled.head.bias)


_LOOP = ("epochs", "learning_rate", "batch_size", "views")
_KINDS: dict[str, tuple[Callable[..., nn.Linear], tuple[str, ...]]] = {
    "crt": (_crt, _LOOP),
    "lws": (_lws, _LOOP),
    "tau_norm": (_tau_norm, ("tau",)),
    "logit_adjustment": (_logit_adjustment, ("tau",)),
}


def _linear_like(head: nn.Linear, weight: Tensor, bias: Tensor) -> nn.Linear:
    """A new linear layer with these numbers, where `head` is."""
    new = nn.utils.skip_init(nn.Linear, head.in_features, head.out_features, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
        new.bias.copy_(bias)
    return new


def _train_head(
    model: Classifier,
    train: ImageData,
    *,
    run: Run,
    stage: TailAugment | None,
    epochs: int = 10,
    learning_rate: float = 0.1,
    batch_size: int = 128,
    views: int = 4,
) -> None:
    """Train `model.head` by SGD with a cosine on stored features, classes drawn evenly."""
    if min(epochs, batch_size, views) < 1 or not learning_rate > 0:
        raise SettingsError(
            "head correction: epochs, batch_size and views must be at least 1 and learning_rate positive, got "
            f"{epochs}, {batch_size}, {views}, {learning_rate}"
        )
    features = _stored_features(model, train, run=run, stage=stage, views=views)
    loss = CrossEntropy(train.counts).to(features.device)
    parameters = [parameter for parameter in model.head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    labels = train.labels.to(features.device)
    for epoch in range(epochs):
        rows = epoch_indices(
            train.labels, rule="class_balanced", epoch=epoch, seed=run.seed, num_epochs=epochs, stream="correction"
        ).to(features.device)
        view = torch.randint(len(features), rows.shape, generator=run.generator("correction", "view", epoch))
        for chosen, which in zip(rows.split(batch_size), view.to(rows.device).split(batch_size), strict=True):
            value = loss(model.head(features[which, chosen]), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
        schedule.step()


def _stored_features(model: Classifier, train: ImageData, *, run: Run, stage: TailAugment | None, views: int) -> Tensor:
    """Features of all training images, (V, N, D): once as they are, or `views` times through the stage."""
    if stage is None:
        return cache_features(model, train.images)[None]
    found = []
    for number in range(views):
        generator = run.generator("correction", "stage", number)
        images, _ = stage(train.float_images(), train.labels, generator=generator)
        found.append(cache_features(model, images))
    return torch.stack(found)
