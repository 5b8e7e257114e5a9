"""The optimiser of a training: parameter groups with a rate each, under SGD or AdamW."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gen_invariance.classifier.model import Classifier
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.transfer import TransferPlan


def build_optimizer(model: Classifier, settings: TrainSettings, plan: TransferPlan | None) -> torch.optim.Optimizer:
    """The optimiser that `settings` name over the groups of `plan`, or over all that trains.

    Each group holds its rate at factor 1 under torch's name for it, "initial_lr". Under AdamW a plan that names no
    rate takes that of the settings, for rates of SGD are a hundred times too large for it.
    """
    groups: list[dict[str, Any]]
    if plan is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trained, "lr": settings.learning_rate, "weight_decay": settings.weight_decay}]
    else:
        groups = fill_rate(plan, settings).parameter_groups(model)
    groups = [{**group, "initial_lr": group["lr"]} for group in groups]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(settings.momentum, 0.999), fused=True)
    return torch.optim.SGD(groups, momentum=settings.momentum, fused=True)


def fill_rate(plan: TransferPlan, settings: TrainSettings) -> TransferPlan:
    """`plan`, its rate that of the settings where it names none and they train by AdamW."""
    if plan.lr is None and settings.optimizer == "adamw":
        return replace(plan, lr=settings.learning_rate)
    return plan
