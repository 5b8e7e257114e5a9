"""Joint training: one backbone, one head for each task (a class subset, or the source beside the target).

A `Classifier` whose head is a `JointHead` works with `TransferPlan("joint")` like any other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gen_invariance.classifier.backbones import Classifier, build_head
from gen_invariance.classifier.losses import CrossEntropy
from gen_invariance.errors import SettingsError


class JointHead(nn.Module):
    """One head for each task.

    Args:
        width: number of features D.
        tasks: number of classes of each task, by name.
        kind: "linear" or "cosine".
        generator: source of the initial weights.

    Raises:
        SettingsError: no task, a task without classes, or a name with a dot.
    """

    def __init__(
        self, width: int, tasks: Mapping[str, int], *, kind: str = "linear", generator: torch.Generator
    ) -> None:
        super().__init__()
        if not tasks or min(tasks.values()) < 1 or any("." in name for name in tasks):
            raise SettingsError(f"tasks need names without dots and at least one class each, got {dict(tasks)}")
        self.heads = nn.ModuleDict(
            {name: build_head(kind, width, classes, generator=generator) for name, classes in tasks.items()}
        )

    def forward(self, features: Tensor, task: str | None = None) -> Tensor:
        """Features (B, D) to the logits (B, K_task) of `task`.

        Raises:
            SettingsError: no or an unknown task.
        """
        if task not in self.heads:
            raise SettingsError(f"no task {task!r}; this model has {', '.join(self.heads)}")
        return self.heads[task](features)


class TaskView(nn.Module):
    """A joint model seen as the classifier of one task; it shares all weights."""

    def __init__(self, model: Classifier, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K_task) of `images`, float (B, C, H, W) in [0, 1]."""
        return self.model.head(self.model.features(images), self.task)


class TaskLoss(CrossEntropy):
    """Cross-entropy of several tasks under one linear head whose classes are theirs side by side.

    A row competes with the classes of its own task only, so the head is as many heads as there are tasks, and joint
    training is ordinary training on the union of their images. Labels are hard.

    Args:
        counts: training images of each class, (K,).
        task_of: task number of each class, int64 (K,).
    """

    def __init__(self, counts: Tensor, *, task_of: Tensor, **options: Any) -> None:
        super().__init__(counts, **options)
        if task_of.shape != (self.num_classes,):
            raise SettingsError(f"task_of must name the task of {self.num_classes} classes, got {tuple(task_of.shape)}")
        self.register_buffer("task_of", task_of, persistent=False)

    def _rows(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        other = self.task_of[labels][:, None] != self.task_of[None]
        return super()._rows(logits.masked_fill(other, -torch.inf), labels, weights)


def joint_losses(
    model: Classifier, batches: Mapping[str, tuple[Tensor, Tensor]], losses: Mapping[str, Callable[..., Tensor]]
) -> dict[str, Tensor]:
    """Mean loss of each task in `batches`; all images pass the backbone together, so batch norm sees every task.

    Raises:
        SettingsError: a task without loss or head.
    """
    missing = [task for task in batches if task not in losses]
    if missing:
        raise SettingsError(f"no loss for task {missing[0]!r}; there are losses for {', '.join(losses)}")
    features = model.features(torch.cat([images for images, _ in batches.values()]))
    parts = features.split([len(images) for images, _ in batches.values()])
    return {
        task: losses[task](model.head(part, task), labels)
        for (task, (_, labels)), part in zip(batches.items(), parts, strict=True)
    }


def task_shares(sizes: Mapping[str, int], *, temperature: float = 1.0) -> dict[str, float]:
    """Share of steps, or weight, of each task, proportional to size^(1/temperature); infinity is equal shares.

    Raises:
        SettingsError: an empty task or a temperature that is not positive.

    Example:
        >>> task_shares({"source": 90, "target": 10})
        {'source': 0.9, 'target': 0.1}
    """
    if not sizes or min(sizes.values()) < 1 or not temperature > 0:
        raise SettingsError(f"need positive sizes and temperature, got {dict(sizes)} and {temperature}")
    power = 0.0 if math.isinf(temperature) else 1 / temperature
    raw = {task: size**power for task, size in sizes.items()}
    return {task: value / sum(raw.values()) for task, value in raw.items()}


def gradient_cosines(model: Classifier, losses: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """Cosine between the gradients of each two tasks on the backbone; below 0 they pull apart. The graph is kept.

    Raises:
        SettingsError: no part of the backbone trains.
    """
    shared = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    if not shared:
        raise SettingsError("the backbone is frozen, so tasks share no gradients; use TransferPlan('joint')")
    flat = {
        task: torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
        for task, loss in losses.items()
    }
    return {
        (one, two): torch.cosine_similarity(flat[one], flat[two], dim=0).item()
        for one, two in itertools.combinations(flat, 2)
    }
