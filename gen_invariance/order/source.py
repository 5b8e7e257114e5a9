"""The default way to get a subset's backbone: train a small classifier on the subset's classes.

The same seed gives every subset the same initial weights, so differences between subsets are paired. One task from the
initial weights trains a source; one task from a source's weights adapts it (all blocks or the last k); two tasks at
once train jointly (`classifier.joint.train_tasks`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.joint import Task, train_tasks
from gen_invariance.classifier.model import Classifier, build_head
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.data.grouping import hold_groups
from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError
from gen_invariance.order.sets import START, Subset
from gen_invariance.order.settings import Mode, SourceSettings
from gen_invariance.run import named_generator

_EVAL_BATCH = 512


class FittedSource:
    """A trained backbone; calling it gives features.

    Attributes:
        model: the classifier; its head belongs to `subset`.
        subset: the classes it was trained on, () for the start.
        images: training images used.
        diverged: the loss became NaN or infinite.
    """

    def __init__(self, model: Classifier, subset: Subset, *, images: int, diverged: bool = False) -> None:
        self.model, self.subset, self.images, self.diverged = model.eval(), subset, images, diverged

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) of float images (B, C, H, W) in [0, 1]."""
        return self.model.features(images)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor | None:
        """The source head's probabilities (B, |A|); None for the start, which has no head."""
        return self.model(images).softmax(dim=1) if self.subset else None


class SourceTrainer:
    """Trains sources on `train` and adapts them to targets; `fit` is a `FitBackbone` of `cells`.

    Args:
        train: all classes; each class is split once, by `data_seed`, into images for sources and a pool of labelled
            images for heads, which no source ever sees; groups, where `train` has them, go to one side whole.
        settings: of training.
        pool: images of each class kept for heads (at most half of a class).
        data_seed: of that split.
        device: where to train.

    Raises:
        DataError: a class with fewer than two images, or groups.
    """

    def __init__(
        self,
        train: ImageData,
        settings: SourceSettings,
        *,
        pool: int = 40,
        data_seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.train, self.settings, self.device = train.to(device), settings, torch.device(device)
        if int(train.counts.min()) < 2:
            short = train.class_names[int(train.counts.argmin())]
            raise DataError(f"{train.name}: class {short!r} has fewer than two images; sources and heads need one each")
        for_heads = None if train.groups is None else _hold_groups_for_heads(train, pool, data_seed)
        source, head = [], []
        for label in range(train.num_classes):
            rows = (train.labels == label).nonzero().flatten().cpu()
            rows = rows[torch.randperm(len(rows), generator=named_generator(data_seed, "order split", label))]
            is_head = torch.arange(len(rows)) < min(pool, len(rows) // 2) if for_heads is None else for_heads[rows]
            head.append(rows[is_head])
            source.append(rows[~is_head])
        self.source_rows, self.head_rows = source, torch.cat(head)
        self._mean, self._std = train.subset(torch.cat(source)[:5000]).mean_std()

    def start(self, seed: int, *, num_classes: int = 2) -> Classifier:
        """The untouched classifier of `seed`; the backbone does not depend on the number of classes."""
        model = build_classifier(
            self.settings.name,
            num_classes=num_classes,
            channels=self.train.images.shape[1],
            weights=self.settings.weights,
            generator=named_generator(seed, "order init"),
        )
        if self.settings.weights is None:
            model.set_normalisation(self._mean, self._std)
        return model.to(self.device)

    def fit(self, subset: Subset, seed: int) -> FittedSource:
        """Train the backbone of `subset`; () gives the start. The same (subset, seed) gives the same backbone."""
        model = self.start(seed, num_classes=max(len(subset), 2))
        if subset == START:
            return FittedSource(model, START, images=0)
        task = self.source_task(subset, seed, head=model.head)
        generator = named_generator(seed, "order train", subset)
        finite = self.train_on(model, [task], steps=self.steps_for(task), generator=generator)
        return FittedSource(model, subset, images=len(task.rows), diverged=not finite)

    def train_on(self, model: Classifier, tasks: list[Task], *, steps: int, generator: torch.Generator) -> bool:
        """Train `model` and the heads of `tasks` in place; False when the loss became NaN or infinite."""
        settings: Any = self.settings
        return train_tasks(model, self.train, tasks, steps=steps, settings=settings, generator=generator)

    def source_task(self, subset: Subset, seed: int, *, head: nn.Module) -> Task:
        """The images of `subset` under the budget, labels 0..|A|-1."""
        count = self.settings.images_for(subset)
        rows = [self._draw(label, count, seed) for label in subset]
        if len(subset) == 1:  # one class against an equal number of images of all others
            others = [label for label in range(self.train.num_classes) if label != subset[0]]
            rest = [self._draw(label, -(-len(rows[0]) // len(others)), seed) for label in others]
            rows.append(torch.cat(rest)[: len(rows[0])])
        sizes = torch.tensor([len(part) for part in rows])
        return Task(torch.cat(rows), torch.arange(len(rows)).repeat_interleave(sizes), head)

    def _draw(self, label: int, count: int, seed: int) -> Tensor:
        rows = self.source_rows[label]
        order = torch.randperm(len(rows), generator=named_generator(seed, "order images", label))
        return rows[order[:count]]

    def steps_for(self, task: Task) -> int:
        """Optimiser steps of a source under the budget."""
        if self.settings.budget == "steps":
            return self.settings.steps
        return self.settings.epochs * math.ceil(len(task.rows) / self.settings.batch_size)

    def new_head(self, model: Classifier, classes: int, generator: torch.Generator) -> nn.Module:
        """A new linear head for `model` on the device that trains; for one class it has two outputs."""
        return build_head("linear", model.num_features, max(classes, 2), generator=generator).to(self.device)

    def adapt(
        self, source: FittedSource, target: Subset, rows: Tensor, *, mode: Mode, last_stages: int, seed: int
    ) -> Callable[[Tensor], Tensor]:
        """Fine-tune a copy of `source` on labelled `rows` of the target; the result maps images to class indices.

        Args:
            source: what to start from. "joint" starts from the untouched weights and trains on the source's images
                and the target's at once; the start itself then trains on the target alone.
            target: classes to tell apart, two or more.
            rows: rows of `train`, only those of target classes are used.
            mode: "partial", "full" or "joint".
            last_stages: for "partial", how many blocks train, counted from the output.
            seed: of the new head, the batches and, for "joint", the start.

        Raises:
            SettingsError: more blocks than the backbone has.
        """
        model = self.start(seed) if mode == "joint" else copy.deepcopy(source.model)
        if mode == "partial":
            TransferPlan("partial", last_stages=last_stages).apply(model)
        classes = torch.tensor(target)
        labels = self.train.labels.cpu()[rows]
        wanted = torch.isin(labels, classes)
        generator = named_generator(seed, "order adapt", mode, source.subset, target)
        head = self.new_head(model, len(target), generator)
        tasks = [Task(rows[wanted], torch.searchsorted(classes, labels[wanted]), head)]
        if mode == "joint" and source.subset != START:
            other = self.new_head(model, len(source.subset), generator)
            tasks.append(self.source_task(source.subset, seed, head=other))
        self.train_on(model, tasks, steps=self.settings.steps, generator=generator)
        model.eval()

        @torch.no_grad()
        def predict(images: Tensor) -> Tensor:
            return classes.to(images.device)[head(model.features(images)).argmax(dim=1)]

        return predict


def _hold_groups_for_heads(train: ImageData, pool: int, seed: int) -> Tensor:
    """Which images are for heads, bool (N,): whole groups, about `pool` images of each class or half of them."""
    labels, counts = train.labels.cpu(), train.counts
    generator = named_generator(seed, "order split", "groups")
    wanted = (counts // 2).clamp(max=pool)
    held = hold_groups(labels, train.groups, wanted=wanted, generator=generator)
    without = (torch.bincount(labels[held], minlength=len(counts)) == 0).nonzero().flatten().tolist()
    if without:
        raise DataError(
            f"{train.name}: class {train.class_names[without[0]]!r} has no group to spare; sources and heads need one "
            "each, add images of another group"
        )
    return held


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], data: ImageData, rows: Tensor | None = None) -> Tensor:
    """`function` of float images over `rows` of `data` (all by default), on the CPU, in batches of 512."""
    rows = torch.arange(len(data)) if rows is None else rows
    return torch.cat([function(data.float_images(part)).cpu() for part in rows.split(_EVAL_BATCH)])
