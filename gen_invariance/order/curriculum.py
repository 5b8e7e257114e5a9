"""Training successively up a chain of subsets against jumping to its top, at equal optimiser steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gen_invariance.classifier.model import build_head
from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.order.backbone import FittedSource, SourceTrainer, in_batches, train_tasks
from gen_invariance.order.separability import Features, pair_hits, pair_scores
from gen_invariance.order.sets import Subset
from gen_invariance.run import named_generator


@dataclass(frozen=True)
class Curriculum:
    """What one seed's climb gave.

    Attributes:
        chain: subsets, bottom first.
        climbing: separated pairs after each step of the chain.
        lost: pairs separated after the step before and no longer after this one (forgetting); first entry 0.
        jumping: separated pairs of the top trained alone for the same total steps.
        steps: that total.
        seed: of both runs.
    """

    chain: tuple[Subset, ...]
    climbing: tuple[int, ...]
    lost: tuple[int, ...]
    jumping: int
    steps: int
    seed: int


def climb(
    trainer: SourceTrainer,
    chain: Sequence[Subset],
    *,
    test: ImageData,
    seed: int,
    threshold: float | np.ndarray = 0.9,
    head: str = "ncm",
) -> Curriculum:
    """Train on each subset of `chain` in turn, and on its top alone for as many steps in all.

    Each stage has a new head, its own learning-rate cycle, and an equal share of the steps.

    Raises:
        SettingsError: fewer than two subsets, or the start among them.
    """
    chain = tuple(chain)
    if len(chain) < 2 or () in chain:
        raise SettingsError(f"a curriculum needs at least two trained subsets, got {len(chain)}; leave the start out")
    model = trainer.start(seed)
    top = trainer.source_task(chain[-1], seed, head=model.head)
    share = max(1, trainer.steps_for(top) // len(chain))
    separated = []
    for place, subset in enumerate(chain):
        drawn = named_generator(seed, "order climb", place, subset)
        new_head = build_head("linear", model.num_features, max(len(subset), 2), generator=drawn).to(trainer.device)
        task = trainer.source_task(subset, seed, head=new_head)
        train_tasks(model, trainer.train, [task], steps=share, settings=trainer.settings, generator=drawn)
        separated.append(_separated(trainer, FittedSource(model, subset, images=0), test, threshold, head))
    fresh = trainer.start(seed, num_classes=len(chain[-1]))
    task = trainer.source_task(chain[-1], seed, head=fresh.head)
    drawn = named_generator(seed, "order jump")
    total = share * len(chain)
    train_tasks(fresh, trainer.train, [task], steps=total, settings=trainer.settings, generator=drawn)
    jumped = _separated(trainer, FittedSource(fresh, chain[-1], images=0), test, threshold, head)
    lost = [0] + [int((a & ~b).sum()) for a, b in itertools.pairwise(separated)]
    counts = tuple(int(s.sum()) for s in separated)
    return Curriculum(chain, counts, tuple(lost), int(jumped.sum()), total, seed)


def _separated(
    trainer: SourceTrainer, source: FittedSource, test: ImageData, threshold: float | np.ndarray, head: str
) -> np.ndarray:
    rows = trainer.head_rows
    features = Features(
        in_batches(source, trainer.train, rows),
        trainer.train.labels.cpu()[rows],
        in_batches(source, test),
        test.labels.cpu(),
        num_classes=test.num_classes,
        train_groups=None if trainer.train.groups is None else trainer.train.groups.cpu()[rows],
    )
    return pair_scores(pair_hits(features, head), features.test_labels, test.num_classes) >= threshold
