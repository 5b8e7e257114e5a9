"""Heads for few samples, fitted on features that are computed once, and few-shot episodes.

Labels may be any int64 numbers, with gaps ({2, 5, 7}): every head renumbers them inside and answers in the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from gen_invariance.errors import DataError, RangeError, SettingsError, ShapeError
from gen_invariance.settings import Count, check_options

KNN_TEMPERATURE = 0.07
"""A neighbour votes with exp(cosine / temperature); tau of Wu et al. 2018, section 3.4."""

KNN_NEIGHBOURS = 20
"""Neighbours that vote where there is no lack of them; k of Caron et al. 2021 (DINO), section 4.1."""

FEW_NEIGHBOURS = 5
"""Neighbours that vote among few samples: no more than a class of the usual five shots has, so none is outvoted."""


@dataclass(frozen=True)
class Head:
    """A fitted head.

    Attributes:
        classes: the labels it was fitted with, int64 (K,), ascending.
        scores: features (N, D) to scores (N, K), larger is likelier, columns as `classes`.
    """

    classes: Tensor
    scores: Callable[[Tensor], Tensor]


def neighbour_votes(
    cosine: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    neighbours: int = KNN_NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
) -> Tensor:
    """Share of the votes of the nearest neighbours that each class gets, (N, K).

    Args:
        cosine: float (N, M), of each sample with each one that may vote; -inf for one that may not.
        labels: int64 (M,), in [0, K).
        num_classes: K.
        neighbours: how many vote; with fewer samples all of them do.
        temperature: each votes with exp(cosine / temperature) (Wu et al. 2018, section 3.4).
    """
    nearest, where = cosine.topk(min(neighbours, cosine.shape[1]), dim=1)
    # The largest cosine is taken off first, so that small temperatures do not overflow.
    votes = ((nearest - nearest[:, :1]) / temperature).exp()
    total = torch.zeros(len(cosine), num_classes, dtype=votes.dtype, device=votes.device)
    total.scatter_add_(1, labels[where], votes)
    return total / total.sum(1, keepdim=True)


def predict(head: Head, features: Tensor) -> Tensor:
    """The likeliest label of each row of `features` (N, D), int64 (N,), in the numbers the head was fitted with."""
    return head.classes[head.scores(features).argmax(1)]


def fit_nearest_mean(features: Tensor, labels: Tensor) -> Head:
    """Nearest class mean on `features` (N, D), `labels` (N,) (Mensink et al. 2013); see `fit_head`.

    Scores are negative squared distances.
    """
    classes, numbers = _renumber(features, labels)
    means = class_means(features, numbers, len(classes))
    return Head(classes, lambda asked: -torch.cdist(asked, means).square())


def fit_cosine(features: Tensor, labels: Tensor) -> Head:
    """Nearest class mean by cosine, the means taken of features scaled to length one; see `fit_head`."""
    classes, numbers = _renumber(features, labels)
    means = F.normalize(class_means(F.normalize(features, dim=1), numbers, len(classes)), dim=1)
    return Head(classes, lambda asked: F.normalize(asked, dim=1) @ means.T)


def fit_knn(
    features: Tensor,
    labels: Tensor,
    *,
    neighbours: Count = FEW_NEIGHBOURS,
    temperature: PositiveFloat = KNN_TEMPERATURE,
) -> Head:
    """K nearest neighbours by cosine, see `neighbour_votes` and `fit_head`."""
    classes, numbers = _renumber(features, labels)
    unit = F.normalize(features, dim=1)

    def score(asked: Tensor) -> Tensor:
        cosine = F.normalize(asked, dim=1) @ unit.T
        return neighbour_votes(
            cosine, numbers, num_classes=len(classes), neighbours=neighbours, temperature=temperature
        )

    return Head(classes, score)


def fit_logistic(features: Tensor, labels: Tensor, *, strength: PositiveFloat = 1.0, balanced: bool = True) -> Head:
    """Logistic regression on standardised features, by scikit-learn on the CPU; see `fit_head`.

    Args:
        features: float (N, D).
        labels: int64 (N,).
        strength: inverse strength of the L2 penalty, scikit-learn's C; larger fits closer.
        balanced: weigh classes by 1/n, so that a long tail is not outvoted.

    Raises:
        DataError: fewer than two classes.
    """
    from sklearn.linear_model import LogisticRegression

    classes, numbers = _renumber(features, labels)
    if len(classes) < 2:
        raise DataError("a logistic head needs at least two classes, got one; use nearest_mean or add classes")
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # constant features carry nothing and must not divide by zero
    standard = ((features - mean) / std).cpu().double().numpy()
    model = LogisticRegression(C=strength, class_weight="balanced" if balanced else None, max_iter=2000)
    model.fit(standard, numbers.cpu().numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(classes) == 2:  # scikit-learn keeps one row then: the log odds of the second class
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight, bias = weight.to(features), bias.to(features)
    return Head(classes, lambda asked: ((asked - mean) / std) @ weight.T + bias)


HEADS = {"nearest_mean": fit_nearest_mean, "cosine": fit_cosine, "knn": fit_knn, "logistic": fit_logistic}


def fit_head(name: str, features: Tensor, labels: Tensor, **options: float) -> Head:
    """Fit the head `name` of `HEADS`.

    Args:
        name: a key of `HEADS`.
        features: float (N, D), e.g. from a frozen backbone.
        labels: int64 (N,), any numbers.
        options: knn takes `neighbours` and `temperature`; logistic `strength` and `balanced`.

    Raises:
        SettingsError: unknown name or option, or an option out of its range.
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
    options = check_options(HEADS[name], options, f"head {name}", without=("features", "labels"))
    return HEADS[name](features, labels, **options)


@dataclass(frozen=True)
class FewShot:
    """Accuracy over few-shot episodes.

    Attributes:
        accuracy: mean over episodes, in [0, 1].
        half_width: of its 95 % interval over episodes, by the normal approximation. It says how well these features
            were measured, not how they vary over trainings.
        episodes: how many.
    """

    accuracy: float
    half_width: float
    episodes: int


def few_shot(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 300,
    generator: torch.Generator,
) -> FewShot:
    """Accuracy of nearest class means in few-shot episodes, each of `ways` random classes (Vinyals et al. 2016).

    Features are centred by the train mean and put on the unit sphere (as in EASY, Bendou et al. 2022). A class with
    fewer samples than asked for gives the ones it has, drawn with replacement.

    Args:
        train: features, float (N, D), and labels, int64 (N,) in [0, K), that means are taken of.
        test: the same for the samples that are asked.
        ways: classes of an episode.
        shots: train samples a class.
        queries: test samples a class.
        episodes: how many.
        generator: source of classes and samples.

    Raises:
        SettingsError: ways, shots or episodes out of range.
    """
    num_classes = len(train[1].unique())
    if not 2 <= ways <= num_classes or shots < 1 or episodes < 2:
        raise SettingsError(
            f"few-shot with {ways} ways, {shots} shots, {episodes} episodes: expected 2 to {num_classes} ways, at "
            "least 1 shot and 2 episodes"
        )
    centre = train[0].float().mean(0)
    support = F.normalize(train[0].float() - centre, dim=1)
    asked = F.normalize(test[0].float() - centre, dim=1)
    classes = torch.rand(episodes, num_classes, generator=generator).topk(ways, dim=1).indices
    means = support[_draw_samples(train[1], classes, shots, generator)].mean(dim=2)
    query = asked[_draw_samples(test[1], classes, queries, generator)]
    distance = torch.cdist(query.flatten(1, 2), means)
    truth = torch.arange(ways).repeat_interleave(queries)
    right = (distance.argmin(dim=2) == truth).float().mean(dim=1)
    return FewShot(float(right.mean()), 1.96 * float(right.std()) / math.sqrt(episodes), episodes)


def _draw_samples(labels: Tensor, classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Row numbers, int64 (E, ways, count): `count` samples of each class, without repeats if possible."""
    samples = torch.empty(*classes.shape, count, dtype=torch.int64)
    for label in classes.unique().tolist():
        rows, where = (labels == label).nonzero().flatten(), classes == label
        if len(rows) >= count:
            picks = torch.rand(int(where.sum()), len(rows), generator=generator).topk(count, dim=1).indices
        else:
            picks = torch.randint(len(rows), (int(where.sum()), count), generator=generator)
        samples[where] = rows[picks]
    return samples


def measure_similarity(features: Tensor, labels: Tensor, *, groups: Tensor | None = None) -> float:
    """How well the source's features already tell the target classes apart: 1 perfectly, 0 not above chance.

    Balanced accuracy of `predict_left_out`, rescaled so that chance is 0. It needs no training, no source images, and
    a few samples a class; `TransferPlan.resolve` takes it.

    Args:
        features: float (N, D) of target samples under the source's backbone.
        labels: int64 (N,), any numbers; classes of one sample (or group) only serve as means.
        groups: int64 (N,), samples of one number show the same thing, see `predict_left_out`.

    Raises:
        DataError: fewer than two classes, or none with two samples (groups, where they are given).
        ShapeError: features or labels of another form.
    """
    classes, numbers = _renumber(features, labels)
    predicted, has_mean = predict_left_out(features, numbers, groups=groups)
    measured = torch.bincount(numbers[has_mean], minlength=len(classes)) > 0
    if len(classes) < 2 or not measured.any():
        raise DataError("similarity needs two classes and at least one with two samples; give more target samples")
    right = (predicted == numbers).to(features)
    counts = torch.bincount(numbers, minlength=len(classes)).to(features)
    recall = torch.zeros_like(counts).index_add(0, numbers, right) / counts
    chance = 1 / len(classes)
    return max(0.0, (recall[measured].mean().item() - chance) / (1 - chance))


def predict_left_out(features: Tensor, labels: Tensor, *, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest class mean of each sample, the sample left out of the mean of its own class.

    Args:
        features: float (N, D).
        labels: int64 (N,), in [0, K), each class with a sample.
        groups: int64 (N,), samples of one number show the same thing: they are all left out together.

    Returns:
        The class of the nearest mean, int64 (N,), and bool (N,), whether its own class had other samples. Where it
        had none, its own class's mean is the sample (or its group) itself.
    """
    count = torch.bincount(labels).to(features)
    means = class_means(features, labels, len(count))
    if groups is None:
        out_sum, out_count = features, torch.ones_like(features[:, 0])
    else:
        out_sum, out_count = _group_sums(features, labels, groups)
    left = count[labels] - out_count
    others = (means[labels] * count[labels, None] - out_sum) / left.clamp_min(1)[:, None]
    distance = torch.cdist(features, means).square()
    rows = torch.arange(len(labels), device=features.device)
    distance[rows, labels] = torch.where(left > 0, (features - others).square().sum(1), distance[rows, labels])
    return distance.argmin(1), left > 0


def _group_sums(features: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample the sum (N, D) and the count (N,) of the samples of its class and group, itself with them."""
    pairs = torch.stack([labels, groups.to(labels.device)]).unique(dim=1, return_inverse=True)[1]
    counts = torch.bincount(pairs).to(features)
    return class_means(features, pairs, len(counts))[pairs] * counts[pairs, None], counts[pairs]


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean feature of each class, (K, D); NaN rows for classes without a sample."""
    sums = torch.zeros(num_classes, features.shape[1], dtype=features.dtype, device=features.device)
    sums.index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=num_classes).to(features)[:, None]


def _renumber(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct labels (K,), ascending, and each label's index among them, int64 (N,)."""
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
    return labels.unique(return_inverse=True)
