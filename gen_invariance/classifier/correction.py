"""Second phases that touch the head only: classifier re-training, weight scaling, tau-normalisation, priors.

Each ends in a plain linear head, so a corrected classifier is saved, loaded and measured like any other. What has to
be trained is trained on features that pass the backbone once, which makes it a matter of seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.losses import CrossEntropy, log_prior
from gen_invariance.classifier.model import Classifier, build_head, cache_features
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.data.images import ImageData
from gen_invariance.data.sampling import epoch_indices
from gen_invariance.errors import SettingsError
from gen_invariance.run import Run
from gen_invariance.settings import Count, Fraction, Rows, read_settings, settings_class

_WHERE = "training.head_correction_options"
_PART = 4096  # images that are floats at once


@settings_class(_WHERE)
class HeadTraining:
    """How "crt" and "lws" train, by SGD with a cosine on class-balanced batches of stored features."""

    epochs: Count = 10
    learning_rate: PositiveFloat = 0.1
    batch_size: Rows = 128
    views: Count = 4
    """how often each image is augmented and its features stored, where there is a stage"""


@settings_class(_WHERE)
class TauNorm:
    """How far "tau_norm" goes."""

    tau: Fraction = 1.0


@settings_class(_WHERE)
class Adjustment:
    """How far "logit_adjustment" goes."""

    tau: float = 1.0


_KINDS = {"crt": HeadTraining, "lws": HeadTraining, "tau_norm": TauNorm, "logit_adjustment": Adjustment}


def correct_head(
    model: Classifier,
    data: ImageData,
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
        data: its training images.
        kind: "crt" (a new head on class-balanced batches), "lws" (one learned factor a class), "tau_norm" (weights
            over their norm to the power tau), or "logit_adjustment" (tau log prior off the bias).
        run: names the generators.
        stage: augments the images whose features are stored.
        stage_source: what the stage acts on, row for row `data`; None takes `data` itself.
        options: of the kind, see `HeadTraining`, `TauNorm` and `Adjustment`.

    Raises:
        SettingsError: unknown kind or option, or a head that is not linear.

    Reference: Kang et al. 2020, section 4.2; Menon et al. 2021, equation 9.
    """
    how = check_correction(model, kind, options)
    if kind == "tau_norm":
        model.head = tau_normalised(model.head, tau=how.tau)
    elif kind == "logit_adjustment":
        shift = how.tau * log_prior(data.counts).to(model.head.bias)
        model.head = _linear_head(model.head.weight, model.head.bias - shift)
    else:
        TransferPlan("frozen").apply(model)
        source = None if stage_source is None else stage_source.to(data.device)
        features = _store_features(model, data, run=run, stage=stage, source=source, views=how.views)
        train = partial(_train_on_features, features=features, data=data, run=run, how=how)
        model.head = _retrain(model, train, run=run) if kind == "crt" else _scale(model.head, train)
    model.head.requires_grad_(True)
    return model.eval()


def check_correction(model: Classifier, kind: str, options: Mapping[str, Any] | None = None) -> Any:
    """The options of `kind`, checked; raises what `correct_head` would, before hours of training rather than after."""
    if kind not in _KINDS:
        raise SettingsError(f"no head correction {kind!r}; choose {', '.join(_KINDS)}")
    if not isinstance(model.head, nn.Linear):
        raise SettingsError(
            f"head correction {kind} needs a linear head, got {type(model.head).__name__}; use head='linear'"
        )
    return read_settings(_KINDS[kind], options or {}, _WHERE)


def tau_normalised(head: nn.Linear, *, tau: float = 1.0) -> nn.Linear:
    """A new head with each class's weights divided by their norm to the power `tau`, its bias 0.

    Long-tailed training gives large classes long weights; tau in (0, 1] takes that back without training. Choose it
    on validation images. Reference: Kang et al. 2020, equation 7.
    """
    norms = head.weight.detach().norm(dim=1, keepdim=True).clamp_min(torch.finfo(head.weight.dtype).tiny)
    return _linear_head(head.weight / norms**tau, torch.zeros_like(norms[:, 0]))


def _linear_head(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A new linear layer with these numbers, where they are."""
    classes, width = weight.shape
    head = nn.utils.skip_init(nn.Linear, width, classes, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


def _retrain(model: Classifier, train: Callable[..., None], *, run: Run) -> nn.Linear:
    """A new head, trained on class-balanced batches (cRT)."""
    head = build_head("linear", model.num_features, model.num_classes, generator=run.generator("crt", "head"))
    head.to(model.head.weight)
    train(head, list(head.parameters()))
    return head


def _scale(head: nn.Linear, train: Callable[..., None]) -> nn.Linear:
    """`head` with its logits times one learned factor a class (learnable weight scaling)."""
    head.requires_grad_(False)
    factors = nn.Parameter(torch.ones_like(head.bias))
    train(lambda features: factors * head(features), [factors])
    return _linear_head(factors[:, None] * head.weight, factors * head.bias)


def _train_on_features(
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    *,
    features: Tensor,
    data: ImageData,
    run: Run,
    how: HeadTraining,
) -> None:
    """Train `parameters` of `head` on stored `features` (V, N, D), classes drawn evenly."""
    loss = CrossEntropy(data.counts).to(features.device)
    optimizer = torch.optim.SGD(parameters, lr=how.learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs)
    labels = data.labels.to(features.device)
    for epoch in range(how.epochs):
        rows = epoch_indices(
            data.labels, rule="class_balanced", epoch=epoch, seed=run.seed, num_epochs=how.epochs, stream="correction"
        ).to(features.device)
        views = torch.randint(len(features), rows.shape, generator=run.generator("correction", "view", epoch))
        views = views.to(rows.device)
        for batch, view in zip(rows.split(how.batch_size), views.split(how.batch_size), strict=True):
            value = loss(head(features[view, batch]), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
        schedule.step()


def _store_features(
    model: Classifier, data: ImageData, *, run: Run, stage: TailAugment | None, source: ImageData | None, views: int
) -> Tensor:
    """Features of all training images, (V, N, D): once as they are, or `views` times through the stage.

    Images become floats, four times their size, some thousands at a time.
    """
    if stage is None:
        return cache_features(model, data.images)[None]
    stored = []
    for number in range(views):
        gate = stage.sample(data.images.shape, data.labels, generator=run.generator("correction", "stage", number))
        views_of_parts = []
        for rows in torch.arange(len(data)).split(_PART):
            part, given = slice(int(rows[0]), int(rows[-1]) + 1), source or data
            images, labels, from_source = data.float_images(rows), data.labels[rows], given.float_images(rows)
            moved = stage.apply_gate(images, labels, gate.share(part), source=(from_source, labels))[0]
            views_of_parts.append(cache_features(model, moved))
        stored.append(torch.cat(views_of_parts))
    return torch.stack(stored)
