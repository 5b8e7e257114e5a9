"""The default way to get a subset's backbone: train a small classifier on the subset's classes.

The same seed gives every subset the same initial weights, so differences between subsets are paired. The loop is
`train_tasks`: one backbone, one head for each task, plain SGD with a cosine. One task from the initial weights trains
a source; one task from a source's weights adapts it (all stages or the last k); two tasks at once train jointly.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.model import Classifier, build_head
from gen_invariance.data.grouping import check_groups, hold_groups
from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError, SettingsError
from gen_invariance.order.sets import START, Subset
from gen_invariance.run import named_generator

BUDGETS = ("per_class", "total", "steps")
MODES = ("frozen", "partial", "full", "joint")
_EVAL_BATCH = 512


@dataclass(frozen=True)
class SourceSettings:
    """How a source's backbone is trained.

    Attributes:
        name: a name of `build_classifier`.
        weights: pretrained start for `build_classifier`, or None for random weights.
        budget: "per_class" (images_per_class each, epochs fixed), "total" (total_images shared by the classes,
            epochs fixed), or "steps" (images_per_class each, the same number of steps for all).
        images_per_class, total_images: numbers behind the budget; a class that has fewer gives what it has.
        epochs: for the first two budgets.
        steps: for the third, and for adapting to a target.
        batch_size, learning_rate, momentum, weight_decay: of SGD.
        flip: flip images horizontally at random; wrong for letters and digits.
        single: None, or "one_vs_rest" to allow one-class sources (the class against an equal draw of the others).

    Raises:
        SettingsError: a value outside its range.
    """

    name: str = "small_conv"
    weights: str | None = None
    budget: str = "per_class"
    images_per_class: int = 100
    total_images: int = 500
    epochs: int = 20
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    flip: bool = False
    single: str | None = None

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise SettingsError(f"budget is {self.budget!r}, expected one of {', '.join(BUDGETS)}")
        if self.single not in (None, "one_vs_rest"):
            raise SettingsError(f"single is {self.single!r}, expected None or 'one_vs_rest'")
        for name in ("images_per_class", "total_images", "epochs", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not (self.learning_rate > 0 and 0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise SettingsError("learning_rate must be positive, momentum in [0, 1), weight_decay at least 0")

    def images_for(self, subset: Subset) -> int:
        """Images a class that the budget allows."""
        if self.budget == "total":
            return max(1, self.total_images // max(len(subset), 1))
        return self.images_per_class


@dataclass(frozen=True)
class Task:
    """Rows of a data set to tell apart by their own head; `classes` gives the head's outputs their meaning."""

    rows: Tensor
    labels: Tensor
    classes: Subset
    head: nn.Module


def _head_groups(train: ImageData, pool: int, seed: int) -> Tensor:
    """Which images are for heads, bool (N,): whole groups, about `pool` images of each class or half of them."""
    labels, counts = train.labels.cpu(), train.counts
    generator = named_generator(seed, "order split", "groups")
    wanted = (counts // 2).clamp(max=pool)
    held = hold_groups(labels, check_groups(train.groups, labels), wanted=wanted, generator=generator)
    without = (torch.bincount(labels[held], minlength=len(counts)) == 0).nonzero().flatten().tolist()
    if without:
        raise DataError(
            f"{train.name}: class {train.class_names[without[0]]!r} has no group to spare; sources and heads need one "
            "each, add images of another group"
        )
    return held


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
    """Trains sources on `train` and adapts them to targets; `fit` is a `fit_backbone` for `measure`.

    Args:
        train: all classes; each class is split once, by `data_seed`, into images for sources and a pool of labelled
            images for heads, which no source ever sees; groups, where `train` has them, go to one side whole.
        settings: of training.
        pool: images of each class kept for heads (at most half of a class).
        data_seed: of that split.
        device: where to train.
    """

    def __init__(
        self,
        train: ImageData,
        settings: SourceSettings,
        *,
        pool: int = 50,
        data_seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.train, self.settings, self.device = train.to(device), settings, torch.device(device)
        if int(train.counts.min()) < 2:
            short = train.class_names[int(train.counts.argmin())]
            raise DataError(f"{train.name}: class {short!r} has fewer than two images; sources and heads need one each")
        by_group = None if train.groups is None else _head_groups(train, pool, data_seed)
        source, head = [], []
        for label in range(train.num_classes):
            rows = (train.labels == label).nonzero().flatten().cpu()
            rows = rows[torch.randperm(len(rows), generator=named_generator(data_seed, "order split", label))]
            first = torch.arange(len(rows)) < min(pool, len(rows) // 2) if by_group is None else by_group[rows]
            head.append(rows[first])
            source.append(rows[~first])
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
        finite = self._train(model, [task], steps=self.steps_for(task), generator=generator)
        return FittedSource(model, subset, images=len(task.rows), diverged=not finite)

    def source_task(self, subset: Subset, seed: int, *, head: nn.Module) -> Task:
        """The images of `subset` under the budget, labels remapped to 0..|A|-1."""
        count = self.settings.images_for(subset)
        chosen = [self._draw(label, count, seed) for label in subset]
        if len(subset) == 1:  # one class against an equal number of images of all others
            others = [label for label in range(self.train.num_classes) if label != subset[0]]
            rest = [self._draw(label, -(-len(chosen[0]) // len(others)), seed) for label in others]
            chosen.append(torch.cat(rest)[: len(chosen[0])])
        labels = torch.cat([torch.full((len(rows),), place) for place, rows in enumerate(chosen)])
        return Task(torch.cat(chosen), labels, subset, head)

    def _draw(self, label: int, count: int, seed: int) -> Tensor:
        rows = self.source_rows[label]
        order = torch.randperm(len(rows), generator=named_generator(seed, "order images", label))
        return rows[order[:count]]

    def steps_for(self, task: Task) -> int:
        """Optimiser steps of a source under the budget."""
        if self.settings.budget == "steps":
            return self.settings.steps
        return self.settings.epochs * math.ceil(len(task.rows) / self.settings.batch_size)

    def _train(self, model: Classifier, tasks: Sequence[Task], *, steps: int, generator: torch.Generator) -> bool:
        return train_tasks(model, self.train, tasks, steps=steps, settings=self.settings, generator=generator)

    def adapt(
        self, source: FittedSource, target: Subset, rows: Tensor, *, mode: str, last_stages: int, seed: int
    ) -> Callable[[Tensor], Tensor]:
        """Fine-tune a copy of `source` on labelled `rows` of the target; the result maps images to class indices.

        Args:
            source: what to start from. "joint" starts from the untouched weights and trains on the source's images
                and the target's at once; the start itself then trains on the target alone.
            target: classes to tell apart, two or more.
            rows: rows of `train`, only those of target classes are used.
            mode: "partial", "full" or "joint".
            last_stages: for "partial", how many stages train, counted from the output.
            seed: of the new head, the batches and, for "joint", the start.
        """
        model = self.start(seed) if mode == "joint" else copy.deepcopy(source.model)
        if mode == "partial":
            freeze_stages(model, last_stages)
        classes = torch.tensor(target, device=self.train.labels.device)
        rows = rows[torch.isin(self.train.labels[rows.to(self.device)], classes).cpu()]
        labels = torch.searchsorted(classes, self.train.labels[rows.to(self.device)]).cpu()
        drawn = named_generator(seed, "order adapt", mode, source.subset, target)
        head = build_head("linear", model.num_features, len(target), generator=drawn).to(self.device)
        tasks = [Task(rows, labels, target, head)]
        if mode == "joint" and source.subset != START:
            width = max(len(source.subset), 2)
            other = build_head("linear", model.num_features, width, generator=drawn).to(self.device)
            tasks.append(self.source_task(source.subset, seed, head=other))
        self._train(model, tasks, steps=self.settings.steps, generator=drawn)
        model.eval()

        @torch.no_grad()
        def predict(images: Tensor) -> Tensor:
            return classes[head(model.features(images)).argmax(dim=1)]

        return predict


def freeze_stages(model: Classifier, last_stages: int) -> None:
    """Freeze all but the last `last_stages` stages, batch-norm statistics included.

    Raises:
        SettingsError: more stages than the backbone has, or none.
    """
    if not 1 <= last_stages <= len(model.blocks):
        raise SettingsError(
            f"last_stages is {last_stages}, expected 1 to {len(model.blocks)} ({', '.join(model.blocks)})"
        )
    frozen = model.blocks[: len(model.blocks) - last_stages]
    for stage in frozen:
        for parameter in model.block_parameters(stage).values():
            parameter.requires_grad_(False)
    model.keep_in_eval(frozen)


def train_tasks(
    model: Classifier,
    data: ImageData,
    tasks: Sequence[Task],
    *,
    steps: int,
    settings: SourceSettings,
    generator: torch.Generator,
) -> bool:
    """Train `model`'s backbone and the tasks' heads in place; each step takes one batch of every task.

    SGD with momentum, warm-up over a tenth of the steps, cosine to zero. Returns False, at once, when a loss is not
    finite: a diverged run is a missing measurement, never a score of zero.
    """
    heads = [parameter for task in tasks for parameter in task.head.parameters()]
    weights = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        weights + heads,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    orders = [torch.empty(0, dtype=torch.int64) for _ in tasks]
    model.train()
    for _ in range(steps):
        loss = torch.zeros((), device=data.device)
        for place, task in enumerate(tasks):
            size = min(settings.batch_size, len(task.rows))
            if len(orders[place]) < size:  # a new epoch of this task
                orders[place] = torch.randperm(len(task.rows), generator=generator)
            batch, orders[place] = orders[place][:size], orders[place][size:]
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


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], data: ImageData, rows: Tensor | None = None) -> Tensor:
    """`function` of float images over `rows` of `data` (all by default), on the CPU, in batches of 512."""
    rows = torch.arange(len(data)) if rows is None else rows
    return torch.cat([function(data.float_images(part)).cpu() for part in rows.split(_EVAL_BATCH)])
