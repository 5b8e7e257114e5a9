"""Losses for long-tailed classes: plain modules `loss(logits, labels)` that know the class counts and nothing else.

Each takes logits (B, K) and labels, int64 (B,) or soft float (B, K) with rows that sum to one, and gives the mean or,
with reduction="none", one value a row. None needs a trainer. With class weights the mean is the weighted one of
`torch.nn.functional.cross_entropy`: divided by the sum of the weights of the labels, so the step size stays comparable.
Rows labelled -100 are left out, as they are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from gen_invariance.classifier.model import COSINE_SCALE
from gen_invariance.data.images import names_or_numbers
from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.settings import BelowOne, check_options

IGNORED = -100
"""The label of rows that count for nothing, torch's own default."""

ClassWeights = str | Mapping[str, float] | None
"""None, "inverse", "effective_number", or a weight for each named class (classes left out get 1)."""


def class_weights(
    kind: ClassWeights, *, counts: Tensor, class_names: Sequence[str] | None = None, beta: float = 0.9999
) -> Tensor | None:
    """Loss weight of each class, float32 (K,), or None for equal weights.

    "inverse" is 1/n, "effective_number" is (1 - beta) / (1 - beta^n) (Cui et al. 2019, equation 2); both are scaled to
    sum K. A dict gives weights by class name as they are; classes it leaves out weigh 1.

    Raises:
        SettingsError: unknown kind or class name, a weight that is not positive and finite.

    Example:
        >>> class_weights("inverse", counts=torch.tensor([30, 10]))
        tensor([0.5000, 1.5000])
    """
    if kind is None:
        return None
    counts = check_counts(counts).double()
    if isinstance(kind, Mapping):
        return _weights_by_name(kind, names_or_numbers(class_names, len(counts)))
    if kind == "inverse":
        weights = 1 / counts
    elif kind == "effective_number":
        weights = (1 - beta) / (1 - beta**counts)
    else:
        raise SettingsError(f"no class weights {kind!r}; choose inverse, effective_number, or a dict by class name")
    return (weights * (len(counts) / weights.sum())).float()


def _weights_by_name(given: Mapping[str, float], names: Sequence[str]) -> Tensor:
    unknown = [name for name in given if name not in names]
    if unknown:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise SettingsError(f"class weights name {unknown[0]!r}, which is no class; the classes are {shown}")
    weights = torch.tensor([float(given.get(name, 1)) for name in names])
    if not (torch.isfinite(weights) & (weights > 0)).all():
        raise SettingsError(f"class weights must be positive and finite, got {dict(given)}; leave a class out instead")
    return weights


def check_counts(counts: Tensor | Sequence[int]) -> Tensor:
    """`counts` as a tensor (K,) on the CPU.

    Raises:
        ShapeError: not one number a class.
        SettingsError: a class without images, for which priors and margins are not defined.
    """
    counts = torch.as_tensor(counts, device="cpu")
    if counts.ndim != 1 or not len(counts):
        raise ShapeError(f"counts must be (K,), got {tuple(counts.shape)}; give the number of images of each class")
    if not (counts > 0).all():
        empty = int((counts <= 0).nonzero()[0])
        raise SettingsError(f"class {empty} has {int(counts[empty])} images; losses need at least 1, remove the class")
    return counts


class CrossEntropy(nn.Module):
    """Cross-entropy with label smoothing and class weights; the other losses build on it.

    Args:
        counts: training images of each class, (K,).
        weights, class_names, beta: see `class_weights`.
        label_smoothing: share of each label that is spread evenly over all classes.
    """

    def __init__(
        self,
        counts: Tensor,
        *,
        weights: ClassWeights = None,
        class_names: Sequence[str] | None = None,
        beta: BelowOne = 0.9999,
        label_smoothing: BelowOne = 0.0,
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        counts = check_counts(counts)
        self.num_classes = len(counts)
        values = class_weights(weights, counts=counts, class_names=class_names, beta=beta)
        self.register_buffer("class_weights", values, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
        """The loss of `logits` (B, K) under `labels`, int64 (B,) or soft (B, K): a scalar, or (B,) for "none".

        Rows labelled `IGNORED` count for nothing: 0 with "none", left out of the mean.

        Raises:
            ShapeError: logits or labels do not fit the classes.
            RangeError: a label that is no class (looked for on the CPU only: a GPU would have to be waited for).
            SettingsError: unknown reduction.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ShapeError(
                f"logits must be (B, {self.num_classes}), got {tuple(logits.shape)}; check the head's classes"
            )
        hard = labels.ndim == 1 and not labels.is_floating_point()
        if not hard and (labels.shape != logits.shape or not labels.is_floating_point()):
            raise ShapeError(
                f"labels must be int64 ({len(logits)},) or float {tuple(logits.shape)}, got {labels.dtype} "
                f"{tuple(labels.shape)}; give class numbers or one probability for each class"
            )
        if reduction not in ("mean", "none"):
            raise SettingsError(f"no reduction {reduction!r}; choose mean or none")
        if hard:
            labels = labels.long()
            self._check_range(labels)
        else:  # 0 times minus infinity, of a class that is masked, is no number
            logits = logits.clamp_min(torch.finfo(logits.dtype).min / 2)
        rows = self._rows(logits, labels)
        return rows if reduction == "none" else rows.sum() / self.row_weights(labels).sum()

    def _check_range(self, labels: Tensor) -> None:
        if labels.device.type != "cpu" or not len(labels):
            return
        wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= self.num_classes)]
        if len(wrong):
            raise RangeError(
                f"labels must lie in [0, {self.num_classes}), or be {IGNORED} to leave a row out, got {wrong[0]}"
            )

    def row_weights(self, labels: Tensor) -> Tensor:
        """What each row of `labels` counts in the mean, float32 (B,); a batch split into parts divides by their sum."""
        if labels.is_floating_point():
            if self.class_weights is None:
                return torch.ones(len(labels), dtype=torch.float32, device=labels.device)
            return labels.to(self.class_weights) @ self.class_weights
        kept = labels != IGNORED
        return kept.float() if self.class_weights is None else self.class_weights[labels.long() * kept] * kept

    def _rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted loss of each row, (B,)."""
        labels = labels if labels.ndim == 1 else labels.to(logits.dtype)
        weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        return F.cross_entropy(logits, labels, weight=weights, label_smoothing=self.label_smoothing, reduction="none")


class Focal(CrossEntropy):
    """Focal loss, -w (1 - p)^gamma log p (Lin et al. 2017, equation 5); p is the plain softmax, without class weights.

    gamma = 0 is cross-entropy. Soft labels weigh the terms of their classes.
    """

    def __init__(self, counts: Tensor, *, gamma: NonNegativeFloat = 1.0, **options: Any) -> None:
        super().__init__(counts, **options)
        if self.label_smoothing:
            raise SettingsError("focal has no label_smoothing; smooth the labels yourself and pass them as soft labels")
        self.gamma = gamma

    def _rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        # The label's own terms only: of a masked class, minus infinity, none has a gradient.
        log_p = logits.log_softmax(1).clamp_min(torch.finfo(logits.dtype).min)
        weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        if labels.ndim > 1:
            labels = labels.to(logits.dtype)
            terms = self._terms(log_p.masked_fill(labels == 0, 0.0))
            return (labels * (terms if weights is None else terms * weights)).sum(1)
        kept = labels != IGNORED
        labels = labels * kept
        terms = self._terms(log_p.gather(1, labels[:, None])[:, 0])
        return torch.where(kept, terms if weights is None else terms * weights[labels], 0.0)

    def _terms(self, log_p: Tensor) -> Tensor:
        # 1 - p with full precision near p = 1; kept off zero, where its power has no gradient for gamma < 1.
        missing = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
        return -(missing**self.gamma) * log_p


class Ldam(CrossEntropy):
    """Label-distribution-aware margins (Cao et al. 2019, equations 12 and 13), for a cosine head.

    Margins m_c are proportional to n_c^(-1/4), the largest is `max_margin`. The head's logits already hold the scale
    (`model.CosineHead`), so the label's logit is lowered by `scale` * m_c, which equals s * (cos - m_c). Soft
    labels give the expected loss over labels, as mixup needs it.
    """

    def __init__(
        self,
        counts: Tensor,
        *,
        max_margin: NonNegativeFloat = 0.5,
        scale: PositiveFloat = COSINE_SCALE,
        **options: Any,
    ) -> None:
        super().__init__(counts, **options)
        raw = check_counts(counts).double() ** -0.25
        self.register_buffer("margins", (raw * (max_margin * scale / raw.max())).float(), persistent=False)

    def _rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == 1:
            shift = F.one_hot(labels.clamp_min(0), self.num_classes) * self.margins.to(logits.dtype)
            return super()._rows(logits - shift, labels)
        # Each class with weight in a row's label is a label of its own; mixed labels have two, so this stays small.
        row, label = labels.nonzero(as_tuple=True)
        terms = labels[row, label].to(logits.dtype) * self._rows(logits[row], label)
        return torch.zeros_like(logits[:, 0]).index_add(0, row, terms)


class LogitAdjustment(CrossEntropy):
    """Train-time logit adjustment, cross-entropy of logits + tau log prior (Menon et al. 2021, equation 10).

    At tau = 1 it is balanced softmax (Ren et al. 2020, equation 3), which weighs the softmax by class counts.
    """

    def __init__(self, counts: Tensor, *, tau: float = 1.0, **options: Any) -> None:
        super().__init__(counts, **options)
        self.register_buffer("shift", tau * log_prior(counts), persistent=False)

    def _rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super()._rows(logits + self.shift.to(logits.dtype), labels)


class VectorScaling(CrossEntropy):
    """Vector-scaling loss (Kini et al. 2021, equation 2): cross-entropy of Delta_c z_c + iota_c.

    Delta_c = (n_c / n_max)^gamma, iota_c = tau log prior_c. gamma = 0 is logit adjustment, gamma = tau = 0
    cross-entropy.
    """

    def __init__(self, counts: Tensor, *, gamma: float = 0.15, tau: float = 1.25, **options: Any) -> None:
        super().__init__(counts, **options)
        counts = check_counts(counts).double()
        self.register_buffer("factor", ((counts / counts.max()) ** gamma).float(), persistent=False)
        self.register_buffer("shift", tau * log_prior(counts), persistent=False)

    def _rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        scaled = logits * self.factor.to(logits.dtype) + self.shift.to(logits.dtype)
        return super()._rows(scaled, labels)


def log_prior(counts: Tensor | Sequence[int]) -> Tensor:
    """Natural log of each class's share of the training images, float32 (K,)."""
    counts = check_counts(counts).double()
    return (counts / counts.sum()).log().float()


LOSSES: dict[str, type[CrossEntropy]] = {
    "cross_entropy": CrossEntropy,
    "focal": Focal,
    "ldam": Ldam,
    "balanced_softmax": LogitAdjustment,
    "logit_adjustment": LogitAdjustment,
    "vector_scaling": VectorScaling,
}


def build_loss(
    name: str, *, counts: Tensor | Sequence[int], class_names: Sequence[str] | None = None, **options: Any
) -> CrossEntropy:
    """The loss `name` of `LOSSES` with its `options`.

    Args:
        name: a key of `LOSSES`.
        counts: training images of each class, (K,).
        class_names: K names, for `weights` given by name.
        options: all take `weights`, `beta`, and (but focal) `label_smoothing`; focal `gamma`; ldam `max_margin` and
            `scale`; logit_adjustment `tau`; vector_scaling `gamma` and `tau`.

    Raises:
        SettingsError: unknown name, unknown option, or an option out of its range.

    Example:
        >>> loss = build_loss("cross_entropy", counts=[90, 10], class_names=["cat", "lynx"], weights={"lynx": 4.0})
        >>> loss.class_weights
        tensor([1., 4.])
    """
    if name not in LOSSES:
        raise SettingsError(f"no loss {name!r}; choose {', '.join(LOSSES)}")
    # Balanced softmax is logit adjustment at tau = 1, and has no tau.
    without = ("counts", "class_names", "tau") if name == "balanced_softmax" else ("counts", "class_names")
    options = check_options(LOSSES[name], options, f"loss {name}", without=without)
    return LOSSES[name](torch.as_tensor(counts, device="cpu"), class_names=class_names, **options)
