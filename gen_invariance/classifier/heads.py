"""Heads for few samples, fitted on features that are computed once, and few-shot episodes.

Labels may be any int64 numbers, with gaps ({2, 5, 7}): every head renumbers them inside and answers in the caller's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.errors import DataError, RangeError, SettingsError, ShapeError


class Head(Protocol):
    """A fitted head: `classes`, int64 (K,) ascending, and `scores`, larger is likelier."""

    classes: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Scores (N, K) of `features` (N, D), columns as `classes`."""
        ...


@dataclass(frozen=True)
class MeanHead:
    """Nearest class mean, by Euclidean distance or by cosine.

    Reference: Mensink et al. 2013; with `cosine`, the means are those of features of length one.
    """

    classes: Tensor
    means: Tensor
    cosine: bool = False

    def scores(self, features: Tensor) -> Tensor:
        """Negative squared distances, or cosines, (N, K)."""
        if self.cosine:
            return F.normalize(features, dim=1) @ F.normalize(self.means, dim=1).T
        return -torch.cdist(features, self.means).square()


@dataclass(frozen=True)
class NeighbourHead:
    """k nearest neighbours by cosine, each voting with exp(cosine / temperature) (Wu et al. 2018, section 3.4)."""

    classes: Tensor
    features: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    neighbours: int = 5
    temperature: float = 0.1

    def scores(self, features: Tensor) -> Tensor:
        """Share of the votes, (N, K)."""
        cosine = F.normalize(features, dim=1) @ self.features.T
        nearest, where = cosine.topk(min(self.neighbours, len(self.labels)), dim=1)
        # The largest cosine is taken off first, so that small temperatures do not overflow.
        votes = ((nearest - nearest[:, :1]) / self.temperature).exp()
        total = torch.zeros(len(features), len(self.classes), dtype=votes.dtype, device=votes.device)
        total.scatter_add_(1, self.labels[where], votes)
        return total / total.sum(1, keepdim=True)


@dataclass(frozen=True)
class LogisticHead:
    """Multinomial logistic regression on standardised features."""

    classes: Tensor
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Logits, (N, K)."""
        return ((features - self.mean) / self.std) @ self.weight.T + self.bias


def predict(head: Head, features: Tensor) -> Tensor:
    """The likeliest label of each row of `features` (N, D), int64 (N,), in the numbers the head was fitted with."""
    return head.classes[head.scores(features).argmax(1)]


def fit_nearest_mean(features: Tensor, labels: Tensor) -> MeanHead:
    """Nearest class mean on `features` (N, D), `labels` (N,); see `fit_head`."""
    classes, numbers = _renumbered(features, labels)
    return MeanHead(classes, _means(features, numbers, len(classes)))


def fit_cosine(features: Tensor, labels: Tensor) -> MeanHead:
    """Nearest class mean by cosine, on features scaled to length one; see `fit_head`."""
    classes, numbers = _renumbered(features, labels)
    return MeanHead(classes, _means(F.normalize(features, dim=1), numbers, len(classes)), cosine=True)


def fit_knn(features: Tensor, labels: Tensor, *, neighbours: int = 5, temperature: float = 0.1) -> NeighbourHead:
    """K nearest neighbours; with fewer samples than `neighbours`, all of them vote. See `fit_head`."""
    if neighbours < 1 or temperature <= 0:
        raise SettingsError(f"need neighbours >= 1 and temperature > 0, got {neighbours} and {temperature}")
    classes, numbers = _renumbered(features, labels)
    return NeighbourHead(classes, F.normalize(features, dim=1), numbers, neighbours, temperature)


def fit_logistic(features: Tensor, labels: Tensor, *, strength: float = 1.0, balanced: bool = True) -> LogisticHead:
    """Logistic regression by scikit-learn on the CPU, with an L2 penalty of inverse strength `strength`.

    Args:
        features: float (N, D).
        labels: int64 (N,).
        strength: scikit-learn's C; larger fits closer.
        balanced: weigh classes by 1/n, so that a long tail is not outvoted.

    Raises:
        SettingsError: strength is not positive.
        DataError: fewer than two classes.
    """
    from sklearn.linear_model import LogisticRegression

    if strength <= 0:
        raise SettingsError(f"strength must be positive, got {strength}; 1 is usual")
    classes, numbers = _renumbered(features, labels)
    if len(classes) < 2:
        raise DataError("a logistic head needs at least two classes, got one; use nearest_mean or add classes")
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # constant features carry nothing and must not divide by zero
    standard = ((features - mean) / std).double().cpu().numpy()
    model = LogisticRegression(C=strength, class_weight="balanced" if balanced else None, max_iter=2000)
    model.fit(standard, numbers.cpu().numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(classes) == 2:  # scikit-learn keeps one row then: the log odds of the second class
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return LogisticHead(classes, mean, std, weight.to(features), bias.to(features))


HEADS = {"nearest_mean": fit_nearest_mean, "cosine": fit_cosine, "knn": fit_knn, "logistic": fit_logistic}


def fit_head(name: str, features: Tensor, labels: Tensor, **options: float) -> Head:
    """Fit the head `name` of `HEADS`.

    Args:
        name: a key of `HEADS`.
        features: float (N, D), e.g. from a frozen backbone.
        labels: int64 (N,), any numbers.
        options: knn takes `neighbours` and `temperature`; logistic `strength` and `balanced`.

    Raises:
        SettingsError: unknown name or option.
        ShapeError: features or labels of another form.
        RangeError: a feature is NaN or infinite.
        DataError: no samples.

    Example:
        >>> head = fit_head("nearest_mean", torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([2, 2, 7]))
        >>> predict(head, torch.tensor([[8.0], [-3.0]]))
        tensor([7, 2])
    """
    if name not in HEADS:
        raise SettingsError(f"no head {name!r}; choose {', '.join(HEADS)}")
    try:
        return HEADS[name](features, labels, **options)
    except TypeError as error:
        raise SettingsError(f"head {name}: {error}; see fit_{name}") from error


@dataclass(frozen=True)
class FewShot:
    """Accuracy over few-shot episodes.

    Attributes:
        accuracy: mean over episodes.
        half_width: of its 95% interval over episodes, by the normal approximation; NaN for one episode. It says how
            well these features were measured, not how they vary over trainings.
        episodes: accuracy of each, float64 (E,).
    """

    accuracy: float
    half_width: float
    episodes: Tensor


def few_shot(
    features: Tensor,
    labels: Tensor,
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 600,
    head: str = "nearest_mean",
    generator: torch.Generator,
) -> FewShot:
    """Accuracy of `head` in episodes of `ways` random classes with `shots` support and `queries` query samples each.

    Support and query samples never overlap; every class has as many of both. Reference: Vinyals et al. 2016,
    section 4.1; intervals as in Snell et al. 2017.

    Args:
        features: float (N, D).
        labels: int64 (N,), any numbers.
        ways: classes of an episode.
        shots: labelled samples a class.
        queries: tested samples a class.
        episodes: how many.
        head: a key of `HEADS`.
        generator: source of classes and samples.

    Raises:
        SettingsError: unknown head, a number below one, or fewer than `ways` classes with `shots` + `queries` samples.
        ShapeError: features or labels of another form.
    """
    if min(shots, queries, episodes) < 1 or ways < 2:
        raise SettingsError(
            f"need ways >= 2 and shots, queries, episodes >= 1, got {ways}, {shots}, {queries}, {episodes}; check them"
        )
    classes, numbers = _renumbered(features, labels)
    counts = torch.bincount(numbers, minlength=len(classes))
    usable = (counts >= shots + queries).nonzero()[:, 0]
    if len(usable) < ways:
        raise SettingsError(
            f"{ways} ways need {ways} classes of {shots + queries} samples (shots + queries), only {len(usable)} of "
            f"{len(classes)} have them; lower ways, shots or queries"
        )
    rows = [(numbers == number).nonzero()[:, 0] for number in usable.tolist()]
    accuracies = torch.empty(episodes, dtype=torch.float64)
    expected = torch.arange(ways).repeat_interleave(queries).to(features.device)
    for episode in range(episodes):
        support, query = _draw_episode(rows, ways, shots, queries, generator)
        fitted = fit_head(head, features[support], torch.arange(ways).repeat_interleave(shots).to(features.device))
        accuracies[episode] = (predict(fitted, features[query]) == expected).double().mean()
    spread = accuracies.std().item() if episodes > 1 else math.nan
    return FewShot(accuracies.mean().item(), 1.96 * spread / math.sqrt(episodes), accuracies)


def _draw_episode(
    rows: list[Tensor], ways: int, shots: int, queries: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Row numbers of support (ways * shots,) and query (ways * queries,) samples, class after class."""
    chosen = torch.randperm(len(rows), generator=generator, device=generator.device)[:ways].tolist()
    support, query = [], []
    for number in chosen:
        order = torch.randperm(len(rows[number]), generator=generator, device=generator.device).to(rows[number].device)
        support.append(rows[number][order[:shots]])
        query.append(rows[number][order[shots : shots + queries]])
    return torch.cat(support), torch.cat(query)


def measure_similarity(features: Tensor, labels: Tensor, *, groups: Tensor | None = None) -> float:
    """How well the source's features already tell the target classes apart: 1 perfectly, 0 not above chance.

    Balanced accuracy of nearest class means, each sample left out of its own mean, rescaled so that chance is 0. It
    needs no training, no source images, and a few samples a class; `TransferPlan.resolve` takes it.

    Args:
        features: float (N, D) of target samples under the source's backbone.
        labels: int64 (N,), any numbers; classes of one sample only serve as means.
        groups: int64 (N,), samples of one number show the same thing: they are all left out of the mean that one of
            them is compared with, and classes of one group only serve as means.

    Raises:
        DataError: fewer than two classes, or none with two samples (groups, where they are given).
        ShapeError: features or labels of another form.
    """
    classes, numbers = _renumbered(features, labels)
    counts = torch.bincount(numbers, minlength=len(classes)).to(features)
    out = None if groups is None else _group_sums(features, numbers, groups)
    measured = counts > 1 if out is None else _has_other(counts[numbers] - out[1], numbers, len(classes))
    if len(classes) < 2 or not measured.any():
        raise DataError("similarity needs two classes and at least one with two samples; give more target samples")
    means = _means(features, numbers, len(classes))
    distances = torch.cdist(features, means).square()
    own = counts[numbers]
    rows = torch.arange(len(numbers), device=features.device)
    if out is None:
        # Leaving x out of a mean over n moves that mean away from x: the distance grows by (n / (n - 1))^2.
        distances[rows, numbers] *= torch.where(own > 1, (own / (own - 1).clamp_min(1)) ** 2, 1.0)
    else:
        others = (means[numbers] * own[:, None] - out[0]) / (own - out[1]).clamp_min(1)[:, None]
        distances[rows, numbers] = torch.where(
            own > out[1], (features - others).square().sum(1), distances[rows, numbers]
        )
    right = (distances.argmin(1) == numbers).to(features)
    recall = torch.zeros_like(counts).index_add(0, numbers, right) / counts
    chance = 1 / len(classes)
    return max(0.0, (recall[measured].mean().item() - chance) / (1 - chance))


def _group_sums(features: Tensor, numbers: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample the sum (N, D) and the count (N,) of the samples of its class and group, itself with them."""
    groups = groups.to(features.device).unique(return_inverse=True)[1]
    _, pairs = (numbers * (int(groups.max()) + 1) + groups).unique(return_inverse=True)
    number = int(pairs.max()) + 1
    sums = torch.zeros(number, features.shape[1], dtype=features.dtype, device=features.device)
    return sums.index_add_(0, pairs, features)[pairs], torch.bincount(pairs).to(features)[pairs]


def _has_other(left: Tensor, numbers: Tensor, num_classes: int) -> Tensor:
    """Classes, bool (K,), of which some sample has others left, by how many it has, (N,)."""
    return torch.bincount(numbers[left > 0], minlength=num_classes) > 0


def _renumbered(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct labels (K,), ascending, and each label's position among them, int64 (N,)."""
    if features.ndim != 2 or not features.is_floating_point():
        raise ShapeError(f"features must be float (N, D), got {features.dtype} {tuple(features.shape)}; flatten them")
    if labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
        raise ShapeError(
            f"labels must be int64 ({len(features)},), got {labels.dtype} {tuple(labels.shape)}; one for each row"
        )
    if not len(labels):
        raise DataError("got no samples; a head needs at least one for each class")
    if not torch.isfinite(features).all():
        raise RangeError("features hold NaN or infinite values; did the backbone's training diverge?")
    classes, numbers = labels.unique(return_inverse=True)
    return classes, numbers


def _means(features: Tensor, numbers: Tensor, num_classes: int) -> Tensor:
    sums = torch.zeros(num_classes, features.shape[1], dtype=features.dtype, device=features.device)
    sums.index_add_(0, numbers, features)
    return sums / torch.bincount(numbers, minlength=num_classes).to(features)[:, None]
