"""Training successively up a chain of subsets against jumping to its top, at equal optimiser steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.order.cells import extract_features
from gen_invariance.order.separability import pair_hits, pair_scores
from gen_invariance.order.sets import START, Subset
from gen_invariance.order.settings import Head
from gen_invariance.order.source import FittedSource, SourceTrainer
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
    threshold: float | np.ndarray,
    head: Head = "ncm",
) -> Curriculum:
    """Train on each subset of `chain` in turn, and on its top alone for as many steps in all.

    Each step of the chain has a new head, its own learning-rate cycle, and an equal share of the optimiser steps.

    Raises:
        SettingsError: fewer than two subsets, or the start among them.
    """
    chain = tuple(chain)
    if len(chain) < 2 or START in chain:
        raise SettingsError(f"a curriculum needs at least two trained subsets, got {len(chain)}; leave the start out")

    def separated(source: FittedSource) -> np.ndarray:
        features = extract_features(source, trainer.train, trainer.head_rows, test)
        return pair_scores(pair_hits(features, head), features.test_labels, test.num_classes) >= threshold

    model = trainer.start(seed)
    share = max(1, trainer.steps_for(trainer.source_task(chain[-1], seed, head=model.head)) // len(chain))
    reached = []
    for number, subset in enumerate(chain):
        generator = named_generator(seed, "order climb", number, subset)
        task = trainer.source_task(subset, seed, head=trainer.new_head(model, len(subset), generator))
        trainer.train_on(model, [task], steps=share, generator=generator)
        reached.append(separated(FittedSource(model, subset, images=0)))

    fresh = trainer.start(seed, num_classes=len(chain[-1]))
    task = trainer.source_task(chain[-1], seed, head=fresh.head)
    total = share * len(chain)
    trainer.train_on(fresh, [task], steps=total, generator=named_generator(seed, "order jump"))
    jumped = separated(FittedSource(fresh, chain[-1], images=0))
    lost = [0] + [int((before & ~after).sum()) for before, after in itertools.pairwise(reached)]
    return Curriculum(chain, tuple(int(pairs.sum()) for pairs in reached), tuple(lost), int(jumped.sum()), total, seed)
