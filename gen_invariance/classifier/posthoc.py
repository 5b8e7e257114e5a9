"""Corrections of a trained classifier: adjusted logits, and the re-balanced heads of decoupled training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gen_invariance.classifier.losses import log_prior
from gen_invariance.classifier.model import Classifier, CosineHead, build_head
from gen_invariance.errors import SettingsError, ShapeError


def adjust_logits(logits: Tensor, *, counts: Tensor | Sequence[int], tau: float = 1.0) -> Tensor:
    """`logits` (..., K) minus tau log prior: what a plainly trained classifier says about balanced classes.

    Reference: Menon et al. 2021, equation 9.

    Raises:
        ShapeError: logits and counts differ in classes.

    Example:
        >>> adjust_logits(torch.zeros(1, 2), counts=[90, 10]).argmax().item()
        1
    """
    prior = log_prior(counts)
    if logits.shape[-1] != len(prior):
        raise ShapeError(f"logits have {logits.shape[-1]} classes, counts {len(prior)}; give the counts of training")
    return logits - tau * prior.to(logits)


class AdjustedClassifier(nn.Module):
    """`model` with `adjust_logits` behind it; a `predict` callable like the model itself."""

    def __init__(self, model: nn.Module, counts: Tensor | Sequence[int], *, tau: float = 1.0) -> None:
        super().__init__()
        self.model, self.tau = model, tau
        self.register_buffer("counts", torch.as_tensor(counts))

    def forward(self, images: Tensor) -> Tensor:
        """Adjusted logits (B, K) of `images` (B, C, H, W)."""
        return adjust_logits(self.model(images), counts=self.counts, tau=self.tau)


def tau_normalised(head: nn.Linear, *, tau: float = 1.0) -> nn.Linear:
    """A new head with each class's weights divided by their norm to the power `tau`, without bias.

    Long-tailed training gives large classes long weights; tau in (0, 1] takes that back without training. Choose it
    on validation images. Reference: Kang et al. 2020, equation 7.

    Raises:
        SettingsError: the head is not linear (a cosine head has no norms to correct), or tau is outside [0, 1].
    """
    if not isinstance(head, nn.Linear):
        raise SettingsError(
            f"tau-normalisation needs a linear head, got {type(head).__name__}; train with head='linear'"
        )
    if not 0 <= tau <= 1:
        raise SettingsError(f"tau must lie in [0, 1], got {tau}; choose it on validation images")
    new = nn.utils.skip_init(
        nn.Linear, head.in_features, head.out_features, bias=False, device=head.weight.device, dtype=head.weight.dtype
    )
    with torch.no_grad():
        norms = head.weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(head.weight.dtype).tiny)
        new.weight.copy_(head.weight / norms**tau)
    return new


def prepare_classifier_retraining(model: Classifier, *, generator: torch.Generator) -> Classifier:
    """Make `model`, in place, ready for classifier re-training: a new head, the backbone fixed and in eval mode.

    What is left is to train it with class-balanced sampling. Reference: Kang et al. 2020, section 4.2 (cRT).

    Raises:
        SettingsError: the backbone declares no blocks.
    """
    fix_backbone(model)
    kind = "cosine" if isinstance(model.head, CosineHead) else "linear"
    where = model.head.weight
    model.head = build_head(kind, model.num_features, model.num_classes, generator=generator).to(where)
    return model


class ScaledHead(nn.Module):
    """A fixed linear head whose logits are multiplied by one learned factor a class.

    Reference: Kang et al. 2020, section 4.2 (learnable weight scaling).
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise SettingsError(
                f"weight scaling needs a linear head, got {type(head).__name__}; train with head='linear'"
            )
        self.head = head.requires_grad_(False)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.factors = nn.Parameter(torch.ones_like(head.weight[:, 0]))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, K)."""
        return self.factors * self.head(features)


def prepare_weight_scaling(model: Classifier) -> Classifier:
    """Make `model`, in place, ready to learn one factor a class; all else is fixed, the backbone in eval mode.

    Raises:
        SettingsError: the backbone declares no blocks or the head is not linear.
    """
    fix_backbone(model)
    model.head = ScaledHead(model.head)
    return model


def fix_backbone(model: Classifier) -> None:
    """Stop all training of `model.backbone`: no gradients, no change of batch-norm statistics.

    Raises:
        SettingsError: the backbone declares no blocks.
    """
    model.require_blocks()
    model.backbone.requires_grad_(False)
    for parameter in model.backbone.parameters():
        parameter.grad = None
    model.keep_in_eval(model.blocks)
