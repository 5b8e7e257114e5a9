"""Joint training: one backbone, one head for each task (a class subset, or the source beside the target).

There are two ways. `train_tasks` is a short loop with separate heads, each step on a batch of every task. `TaskLoss`
trains one linear head whose classes are those of all tasks side by side, which makes joint training an ordinary
`fit_classifier` on the union of their images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_invariance.classifier.losses import CrossEntropy
from gen_invariance.classifier.model import Classifier
from gen_invariance.classifier.settings import cosine_decay
from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError


@dataclass(frozen=True)
class Task:
    """Images to tell apart by a head of their own.

    Attributes:
        rows: int64 (N,), of the data set that is trained on.
        labels: int64 (N,), in [0, K).
        head: maps features (B, D) to logits (B, K).
    """

    rows: Tensor
    labels: Tensor
    head: nn.Module


class TaskSettings(Protocol):
    """How `train_tasks` trains: SGD on batches of `batch_size` images of each task, mirrored at random with `flip`."""

    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    flip: bool


def train_tasks(
    model: Classifier,
    data: ImageData,
    tasks: Sequence[Task],
    *,
    steps: int,
    settings: TaskSettings,
    generator: torch.Generator,
) -> bool:
    """Train `model`'s backbone and the tasks' heads in place; each step takes one batch of every task.

    SGD with Nesterov momentum, warm-up over a tenth of the steps, cosine to zero. Parts of the backbone that a
    `TransferPlan` froze stay as they are. Batches and flips are drawn from `generator`, on the CPU.

    Returns:
        False, at once, when a loss is not finite: a diverged run is a missing measurement, never a score of zero.
    """
    parameters = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    for task in tasks:
        parameters += task.head.parameters()
    optimizer = torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, cosine_decay(step / steps))
    )
    waiting = [torch.empty(0, dtype=torch.int64) for _ in tasks]  # what is left of each task's epoch
    model.train()
    for _ in range(steps):
        loss = torch.zeros((), device=data.device)
        for index, task in enumerate(tasks):
            size = min(settings.batch_size, len(task.rows))
            if len(waiting[index]) < size:
                waiting[index] = torch.randperm(len(task.rows), generator=generator)
            batch, waiting[index] = waiting[index][:size], waiting[index][size:]
            images = data.float_images(task.rows[batch])
            if settings.flip:
                flipped = (torch.rand(size, generator=generator) < 0.5).to(images.device)
                images = torch.where(flipped[:, None, None, None], images.flip(3), images)
            logits = task.head(model.features(images))
            loss = loss + F.cross_entropy(logits, task.labels[batch].to(logits.device)) / len(tasks)
        if not torch.isfinite(loss):
            return False
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return True


class TaskLoss(CrossEntropy):
    """Cross-entropy of several tasks under one linear head whose classes are theirs side by side.

    A row competes with the classes of its own task only, so the head is as many heads as there are tasks. Labels are
    hard.

    Args:
        counts: training images of each class, (K,).
        task_of: task number of each class, int64 (K,).
    """

    def __init__(self, counts: Tensor, *, task_of: Tensor, **options: Any) -> None:
        super().__init__(counts, **options)
        if task_of.shape != (self.num_classes,):
            raise SettingsError(f"task_of must name the task of {self.num_classes} classes, got {tuple(task_of.shape)}")
        self.register_buffer("task_of", task_of, persistent=False)

    def _rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        other = self.task_of[labels][:, None] != self.task_of[None]
        return super()._rows(logits.masked_fill(other, -torch.inf), labels)
