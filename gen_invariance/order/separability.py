"""Which test samples each head gets right against each other class: the raw material of the subset order.

A head sees frozen features only. `pair_hits` answers all two-class questions at once: entry [x, c] says whether
test sample x, of class y, is put on y's side when only y and c compete. The balanced two-class accuracy of a
pair (i, j) is then the mean of two class means (`pair_scores`). For the nearest class mean all pairs come from one
matrix product. Reference: the separation of a pair by a model follows Baena, Drumetz and Gripon (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.classifier.heads import (
    KNN_NEIGHBOURS,
    KNN_TEMPERATURE,
    class_means,
    fit_knn,
    fit_logistic,
    fit_nearest_mean,
    predict,
)
from gen_invariance.data.longtail import split_indices
from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.order.sets import class_pairs
from gen_invariance.order.settings import Head

_STRENGTHS = (0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Features:
    """Features of one backbone, with their labels.

    Attributes:
        train: float (N, D), labelled samples that heads are fitted on.
        train_labels: int64 (N,), each in [0, K).
        test: float (M, D).
        test_labels: int64 (M,).
        num_classes: K.
        train_side, test_side: for head "own" only: share in [0, 1] by which a binary source's own decision puts
            each sample on side 1, float (N,) and (M,).
        train_groups: int64 (N,), train samples of one number show the same thing; None where that is not known.

    Raises:
        ShapeError: axes or lengths do not fit.
        RangeError: a label outside [0, K), a class without train sample.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int
    train_side: Tensor | None = None
    test_side: Tensor | None = None
    train_groups: Tensor | None = None

    def __post_init__(self) -> None:
        parts = (("train", self.train, self.train_labels), ("test", self.test, self.test_labels))
        for name, values, labels in parts:
            if values.ndim != 2 or len(values) != len(labels):
                raise ShapeError(
                    f"{name} features are {tuple(values.shape)} for {len(labels)} labels; give (N, D) and N labels"
                )
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise RangeError(
                    f"{name} labels lie in [{int(labels.min())}, {int(labels.max())}], expected "
                    f"[0, {self.num_classes}); renumber them"
                )
        empty = (torch.bincount(self.train_labels, minlength=self.num_classes) == 0).nonzero().flatten()
        if len(empty):
            raise RangeError(f"class {int(empty[0])} has no train sample to fit a head on; add one or drop the class")

    @property
    def usable(self) -> bool:
        """False for a diverged run: NaN or infinite features, or features that are the same for every sample."""
        joined = torch.cat([self.train, self.test]).float()
        return bool(torch.isfinite(joined).all()) and bool((joined.amax(0) - joined.amin(0)).max() > 1e-9)


def pair_hits(features: Features, head: Head = "ncm", *, generator: torch.Generator | None = None) -> Tensor:
    """Whether each test sample is right against each other class, bool (M, K); its own class's column is False.

    Args:
        features: of one backbone.
        head: "ncm", "knn" (k = min(20, n - 1), cosine, temperature 0.07), "logistic" (L2, strength chosen on a
            held-out quarter of the train samples), or "own" (the binary source's decision as a cut).
        generator: for the held-out quarter of "logistic".

    A draw counts as a miss, so a head that cannot decide never separates.
    """
    if head == "logistic":
        hits = _logistic_hits(features, generator=generator)
    else:
        hits = {"ncm": _ncm_hits, "knn": _knn_hits, "own": _own_hits}[head](features)
    hits[torch.arange(len(hits)), features.test_labels] = False
    return hits


def _ncm_hits(features: Features) -> Tensor:
    """From -|x - m|^2 up to the term |x|^2, which no comparison of classes sees: one matrix product."""
    train = features.train.float()
    centre = train.mean(0)  # differences are taken near the origin, where float32 is finest
    means = class_means(train - centre, features.train_labels, features.num_classes)
    scores = 2 * (features.test.float() - centre) @ means.T - means.square().sum(1)
    return scores.gather(1, features.test_labels[:, None]) > scores


def _knn_hits(features: Features) -> Tensor:
    """Two-class votes among the k nearest of both classes together, from each class's own k nearest."""
    train, test = F.normalize(features.train.float(), dim=1), F.normalize(features.test.float(), dim=1)
    neighbours = min(KNN_NEIGHBOURS, len(train) - 1)
    nearest = torch.full((len(test), features.num_classes, neighbours), -torch.inf)
    for label in range(features.num_classes):
        similar = test @ train[features.train_labels == label].T
        top = similar.topk(min(neighbours, similar.shape[1]), dim=1).values
        nearest[:, label, : top.shape[1]] = top
    of_own_class = nearest[torch.arange(len(test)), features.test_labels]
    hits = torch.empty(len(test), features.num_classes, dtype=torch.bool)
    for label in range(features.num_classes):
        both = torch.cat([of_own_class, nearest[:, label]], dim=1)
        top, column = both.topk(min(neighbours, both.shape[1]), dim=1)
        weight = torch.exp((top - top[:, :1]) / KNN_TEMPERATURE)
        is_right = column < neighbours
        hits[:, label] = (weight * is_right).sum(1) > (weight * ~is_right).sum(1)
    return hits


def _logistic_hits(features: Features, *, generator: torch.Generator | None) -> Tensor:
    hits = torch.zeros(len(features.test), features.num_classes, dtype=torch.bool)
    for first, second in class_pairs(features.num_classes).tolist():
        predicted, rows = logistic_predictions(features, (first, second), generator=generator)
        right = predicted == features.test_labels[rows]
        other = torch.where(features.test_labels[rows] == first, second, first)
        hits[rows, other] = right
    return hits


def logistic_predictions(
    features: Features, classes: tuple[int, ...], *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Predicted class of every test sample of `classes`, int64 (m,), and their rows (m,)."""
    train_rows, test_rows = _find_rows(features.train_labels, classes), _find_rows(features.test_labels, classes)
    inputs, labels = features.train[train_rows].float(), features.train_labels[train_rows]
    groups = None if features.train_groups is None else features.train_groups[train_rows]
    strength = _choose_strength(inputs, labels, groups=groups, generator=generator)
    head = fit_logistic(inputs, labels, strength=strength, balanced=False)
    return predict(head, features.test[test_rows].float()), test_rows


def _find_rows(labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    return torch.isin(labels, torch.tensor(classes)).nonzero().flatten()


def _choose_strength(
    inputs: Tensor, labels: Tensor, *, groups: Tensor | None, generator: torch.Generator | None
) -> float:
    """The L2 strength of a logistic head with the best accuracy on a held-out quarter."""
    generator = generator or torch.Generator().manual_seed(0)
    numbers = labels.unique(return_inverse=True)[1]
    kept, held_out = split_indices(numbers, fraction=0.25, generator=generator, groups=groups)
    if not len(held_out):
        return 1.0
    right = []
    for strength in _STRENGTHS:
        head = fit_logistic(inputs[kept], labels[kept], strength=strength, balanced=False)
        right.append(int((predict(head, inputs[held_out]) == labels[held_out]).sum()))
    return _STRENGTHS[int(np.argmax(right))]


def _own_hits(features: Features) -> Tensor:
    """The source's own cut; which side stands for which class is read from the train samples, never the test."""
    if features.train_side is None or features.test_side is None:
        raise SettingsError(
            "head 'own' needs the source's own two-class decision; use sources of two classes, or head 'ncm'"
        )
    share = class_means(features.train_side.float()[:, None], features.train_labels, features.num_classes)[:, 0]
    above = share[features.test_labels][:, None] > share[None, :]
    side = (features.test_side > 0.5)[:, None]
    return torch.where(above, side, ~side)


def pair_scores(hits: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    """Balanced two-class accuracy of every pair, float64 (P,) in [0, 1]; NaN where a class has no test sample.

    From `hits` bool (M, K) of `pair_hits` and the test labels int64 (M,); pairs are ordered as in `class_pairs`.
    """
    one_hot = torch.nn.functional.one_hot(labels, num_classes).double()
    right = ((one_hot.T @ hits.double()) / one_hot.sum(0)[:, None]).numpy()
    first, second = class_pairs(num_classes).T
    return (right[first, second] + right[second, first]) / 2


def target_accuracy(
    features: Features, target: tuple[int, ...], head: Head = "ncm", *, generator: torch.Generator | None = None
) -> float:
    """Class-balanced test accuracy in [0, 1] on the classes of `target` (two or more) only; NaN for head "own"."""
    if head == "own":
        return float("nan")
    if head == "logistic":
        predicted, rows = logistic_predictions(features, target, generator=generator)
    else:
        train_rows, rows = _find_rows(features.train_labels, target), _find_rows(features.test_labels, target)
        train, labels = features.train[train_rows].float(), features.train_labels[train_rows]
        if head == "knn":
            fitted = fit_knn(train, labels, neighbours=min(KNN_NEIGHBOURS, len(train_rows) - 1))
        else:
            fitted = fit_nearest_mean(train, labels)
        predicted = predict(fitted, features.test[rows].float())
    truth = features.test_labels[rows]
    right = (predicted == truth).double()
    return float(torch.stack([right[truth == label].mean() for label in target]).mean())


def pack_hits(hits: Tensor) -> np.ndarray:
    """`hits` bool (M, K) as bits, uint8 (M, ceil(K / 8))."""
    return np.packbits(hits.numpy(), axis=1)


def unpack_hits(packed: np.ndarray, num_classes: int) -> np.ndarray:
    """The bool array that `pack_hits` packed; works on any leading axes."""
    return np.unpackbits(packed, axis=-1, count=num_classes).astype(bool)
