"""Few-shot accuracy of a backbone: nearest class mean over many small episodes, from cached features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gen_invariance.errors import SettingsError
from gen_invariance.order.separability import Features


@dataclass(frozen=True)
class FewShot:
    """Accuracy over episodes.

    Attributes:
        accuracy: mean, in [0, 1].
        half_width: of the 95 % normal interval over episodes.
        episodes: how many.
    """

    accuracy: float
    half_width: float
    episodes: int


def few_shot_accuracy(
    features: Features, *, ways: int, shots: int, episodes: int = 300, queries: int = 15, generator: torch.Generator
) -> FewShot:
    """Episodes of `ways` classes: means of `shots` train samples each, tested on `queries` test samples each.

    Features are centred by the train mean and put on the unit sphere (as in EASY, Bendou et al. 2022). A class with
    fewer samples than asked for gives the ones it has, drawn with replacement.

    Raises:
        SettingsError: ways, shots or episodes out of range.
    """
    if not 2 <= ways <= features.num_classes or shots < 1 or episodes < 2:
        raise SettingsError(
            f"few-shot with {ways} ways, {shots} shots, {episodes} episodes: expected 2 to {features.num_classes} "
            "ways, at least 1 shot and 2 episodes"
        )
    centre = features.train.float().mean(0)
    train = torch.nn.functional.normalize(features.train.float() - centre, dim=1)
    test = torch.nn.functional.normalize(features.test.float() - centre, dim=1)
    chosen = torch.rand(episodes, features.num_classes, generator=generator).topk(ways, dim=1).indices
    support = train[_draw(features.train_labels, chosen, shots, generator)].mean(dim=2)
    query = test[_draw(features.test_labels, chosen, queries, generator)]
    distance = torch.cdist(query.flatten(1, 2), support)
    truth = torch.arange(ways).repeat_interleave(queries)
    right = (distance.argmin(dim=2) == truth).float().mean(dim=1)
    return FewShot(float(right.mean()), 1.96 * float(right.std()) / math.sqrt(episodes), episodes)


def _draw(labels: torch.Tensor, classes: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Row numbers, int64 (E, ways, count): `count` samples of each class, without repeats if possible."""
    found = torch.empty(*classes.shape, count, dtype=torch.int64)
    for label in classes.unique().tolist():
        rows, where = (labels == label).nonzero().flatten(), classes == label
        if len(rows) >= count:
            picks = torch.rand(int(where.sum()), len(rows), generator=generator).topk(count, dim=1).indices
        else:
            picks = torch.randint(len(rows), (int(where.sum()), count), generator=generator)
        found[where] = rows[picks]
    return found
