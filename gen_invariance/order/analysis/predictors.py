"""Cheap guesses of how well a subset's backbone serves a target, before transfer; the larger the better.

Two prices are kept apart. *Before training* the subset: only what the start's features, sizes and counts tell
(`before_training`). *After training* it, before transfer: scores of its features on a few labelled target samples
(`after_training`). Labels are renumbered in `Labelled`, so gaps in them (subset {2, 5, 7}) cannot change a score.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg, special, stats
from sklearn.covariance import ledoit_wolf

from gen_invariance.classifier.heads import KNN_NEIGHBOURS, class_means, neighbour_votes, predict_left_out
from gen_invariance.errors import DataError, ShapeError
from gen_invariance.order.sets import Subset, class_pairs, pair_mask

_TINY = 1e-12


class Labelled:
    """Labelled features, checked: `features` float64 (N, D), `labels` 0..C-1 without gaps, `counts` (C,).

    Features of a tiny or huge scale are brought near 1: no score depends on it but by floors against dividing by 0.

    Args:
        features: float (N, D).
        labels: whole numbers (N,).
        rescale: False where their scale means something.

    Raises:
        ShapeError: not (N, D) and N labels.
        DataError: NaN or infinite features, or fewer than two classes.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, *, rescale: bool = True) -> None:
        self.features = np.asarray(features, dtype=np.float64)
        if self.features.ndim != 2 or len(features) != len(labels):
            raise ShapeError(f"features are {np.shape(features)} for {len(labels)} labels; give (N, D) and N labels")
        if not np.isfinite(self.features).all():
            raise DataError("features hold NaN or infinite values; leave diverged runs out")
        largest = np.abs(self.features).max(initial=0)
        if rescale and largest > 0 and not 2**-10 <= largest <= 2**20:
            self.features = self.features / 2.0 ** np.round(np.log2(largest))
        self.labels = np.unique(labels, return_inverse=True)[1]
        self.counts = np.bincount(self.labels)
        if len(self.counts) < 2:
            raise DataError("a score needs samples of at least two classes; this target is trivial")

    @cached_property
    def means(self) -> np.ndarray:
        """Mean feature of each class, (C, D)."""
        features, labels = torch.from_numpy(self.features), torch.from_numpy(self.labels)
        return class_means(features, labels, len(self.counts)).numpy()

    @cached_property
    def residual(self) -> np.ndarray:
        """Features less the mean of their class, (N, D)."""
        return self.features - self.means[self.labels]

    @cached_property
    def within(self) -> np.ndarray:
        """Ledoit-Wolf shrunk covariance within classes, (D, D)."""
        return ledoit_wolf(self.residual, assume_centered=True)[0]

    @property
    def shares(self) -> np.ndarray:
        """Share of each class among the samples, (C,)."""
        return self.counts / len(self.labels)


def ncm_leave_one_out(sample: Labelled) -> float:
    """Share of samples nearest to their own class's mean taken without them, in [0, 1].

    Raises:
        DataError: a class with a single sample has no mean without it.
    """
    if sample.counts.min() < 2:
        raise DataError("nearest mean leave-one-out needs two samples of each class; draw more shots")
    predicted, _ = predict_left_out(torch.from_numpy(sample.features), torch.from_numpy(sample.labels))
    return float((predicted.numpy() == sample.labels).mean())


def knn_leave_one_out(sample: Labelled) -> float:
    """Share of samples that a cosine-weighted vote of the nearest others puts right."""
    unit, labels = F.normalize(torch.from_numpy(sample.features), dim=1), torch.from_numpy(sample.labels)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    neighbours = min(KNN_NEIGHBOURS, len(labels) - 1)
    votes = neighbour_votes(cosine, labels, num_classes=len(sample.counts), neighbours=neighbours)
    return float((votes.argmax(dim=1) == labels).double().mean())


def logme(sample: Labelled, *, iterations: int = 200) -> float:
    """Mean over classes of the log evidence of a Bayesian linear model, a sample; NaN when features are all zero.

    The precisions alpha (of the weights) and beta (of the noise) maximise it, by MacKay's fixed point. Comparable only
    between scores with the same number of classes.

    Reference: You et al., "LogME", ICML 2021, equations 2 and 3.
    """
    if not sample.features.any():
        return float("nan")
    spectrum = Spectrum(sample.features, np.eye(len(sample.counts))[sample.labels])
    samples, eigen = len(sample.labels), spectrum.eigen
    alpha, beta = np.ones(len(sample.counts)), np.ones(len(sample.counts))
    for _ in range(iterations):
        kept = beta * eigen / (alpha + beta * eigen)
        effective = kept.sum(axis=0)
        weight = (kept**2 * spectrum.projected / eigen).sum(axis=0)
        residual = spectrum.missed + ((1 - kept) ** 2 * spectrum.projected).sum(axis=0)
        last = alpha, beta
        alpha = np.clip(effective / np.maximum(weight, _TINY), 1e-10, 1e10)
        beta = np.clip(np.maximum(samples - effective, _TINY) / np.maximum(residual, _TINY), 1e-10, 1e10)
        if (np.abs(np.log(alpha / last[0])) + np.abs(np.log(beta / last[1]))).max() < 1e-9:
            break
    return float(spectrum.log_evidence(alpha, beta).mean())


class Spectrum:
    """Features Z (N, D) and targets Y (N, C) in the singular directions of Z, for the evidence of Y = Z W + noise.

    Attributes:
        eigen: the part of the spectrum of Z'Z (and of ZZ') that is not zero, (r, 1).
        projected: squared parts of the targets in these directions, (r, C).
        missed: squared part of each target outside the span of the features, (C,).
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray) -> None:
        left, singular, _ = np.linalg.svd(features, full_matrices=False)
        whole = singular > singular.max() * np.finfo(float).eps * max(features.shape)
        self.shape = features.shape
        self.eigen = singular[whole, None] ** 2
        self.projected = (left[:, whole].T @ targets) ** 2
        self.missed = np.maximum(np.square(targets).sum(axis=0) - self.projected.sum(axis=0), 0.0)

    def log_evidence(self, alpha: np.ndarray | float, beta: np.ndarray | float) -> np.ndarray:
        """Log of the integral of N(y; Z w, 1/beta) N(w; 0, 1/alpha) over w, divided by N; (C,).

        The full determinant is used: when N < D the directions without data each contribute log(alpha), which the
        default of the authors' code drops.
        """
        samples, width = self.shape
        scale = alpha + beta * self.eigen
        fit = self.missed + (self.projected * alpha / scale).sum(axis=0)
        determinant = np.log(scale).sum(axis=0) + (width - len(self.eigen)) * np.log(alpha)
        total = samples * np.log(beta / (2 * np.pi)) + width * np.log(alpha) - determinant - beta * fit
        return total / 2 / samples


def leep(sample: Labelled) -> float:
    """Mean log of the expected empirical prediction, at most 0; source classes without mass are left out.

    Features are the source head's probabilities of the target samples, (N, |A|), rows summing to 1.

    Reference: Nguyen et al., "LEEP", ICML 2020, equations 1 and 2.
    """
    joint = sample.means * sample.shares[:, None]
    mass = joint.sum(axis=0)
    conditional = np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0)
    predicted = (conditional[sample.labels] * sample.features).sum(axis=1)
    return float(np.log(np.maximum(predicted, _TINY)).mean())


def nce(sample: Labelled) -> float:
    """Minus the conditional entropy H(target label | hard source label) in nats, at most 0 (Tran et al. 2019).

    Features are the source head's probabilities, as for `leep`.
    """
    joint = np.zeros((len(sample.counts), sample.features.shape[1]))
    np.add.at(joint, (sample.labels, sample.features.argmax(axis=1)), 1 / len(sample.labels))
    return float(special.xlogy(joint, joint).sum() - special.xlogy(joint.sum(axis=0), joint.sum(axis=0)).sum())


def h_score(sample: Labelled) -> float:
    """(1 - a) tr(S_a^-1 cov(class means)) with the Ledoit-Wolf covariance S_a of shrinkage a, in [0, C - 1].

    Unshrunk it saturates at C - 1 when N <= D. Reference: Bao et al. 2019; Ibrahim et al. 2022, eq. 6, for shrinkage.
    """
    centre = sample.features.mean(axis=0)
    covariance, shrinkage = ledoit_wolf(sample.features - centre)
    return float((1 - shrinkage) * _between(sample, covariance))


def lda(sample: Labelled) -> float:
    """Fisher's tr(S_W^-1 S_B) with a Ledoit-Wolf shrunk within-class covariance, at least 0."""
    return float(_between(sample, sample.within))


def _between(sample: Labelled, covariance: np.ndarray) -> np.ndarray:
    """tr(covariance^-1 S_B) with the covariance S_B of the class means."""
    between = (sample.means - sample.features.mean(axis=0)) * np.sqrt(sample.shares)[:, None]
    return (between * _solve(covariance, between)).sum()


def _solve(covariance: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows @ covariance^-1, with a ridge far below the smallest scale that matters."""
    ridge = 1e-10 * max(float(np.trace(covariance)) / len(covariance), _TINY)
    return linalg.solve(covariance + ridge * np.eye(len(covariance)), rows.T, assume_a="pos").T


def lda_pair_scores(sample: Labelled) -> np.ndarray:
    """Predicted balanced two-class accuracy of each pair of present classes, float64 (C (C - 1) / 2,) in [0.5, 1].

    Phi(d / 2) with the Mahalanobis distance d of the class means under the shared within-class covariance: exact for
    Gaussian classes of one covariance. What the noise of the two means adds to d^2 is taken off; without that a few
    samples in many dimensions make every pair look separated.
    """
    counts, residual = sample.counts, sample.residual
    first, second = class_pairs(len(counts)).T
    gap = sample.means[first] - sample.means[second]
    dimensions = float((residual * _solve(sample.within, residual)).sum()) / (len(residual) - len(counts))
    noise = dimensions * (1 / counts[first] + 1 / counts[second])
    squared = (gap * _solve(sample.within, gap)).sum(axis=1) - noise
    return stats.norm.cdf(np.sqrt(np.maximum(squared, 0)) / 2)


def negative_cdnv(sample: Labelled) -> float:
    """Minus the class-distance normalised variance, mean over pairs, at most 0 (Galanti et al. 2022, eq. 5).

    Pairs of classes with the same mean count as -(mean variance) / tiny, a very bad but finite score.
    """
    variance = np.bincount(sample.labels, np.square(sample.residual).sum(axis=1)) / sample.counts
    first, second = class_pairs(len(sample.counts)).T
    distance = np.square(sample.means[first] - sample.means[second]).sum(axis=1)
    spread = (variance[first] + variance[second]) / 2
    # Features that are all alike are no collapse of classes, although nothing varies within one.
    spread = np.where((distance <= _TINY) & (spread <= _TINY), 1.0, spread)
    return float(-(spread / np.maximum(distance, _TINY)).mean())


def gbc(sample: Labelled) -> float:
    """Minus the summed Gaussian Bhattacharyya coefficients over ordered class pairs, at most 0 (Pandy et al. 2022)."""
    floor = 1e-6 * max(float(sample.features.var()), _TINY)
    squares = Labelled(np.square(sample.residual), sample.labels, rescale=False)
    variance = squares.means + floor
    first, second = class_pairs(len(sample.counts)).T
    shared = (variance[first] + variance[second]) / 2
    distance = np.square(sample.means[first] - sample.means[second]) / shared / 8
    spread = 0.5 * (np.log(shared) - 0.5 * (np.log(variance[first]) + np.log(variance[second])))
    return float(-2 * np.exp(-(distance + spread).sum(axis=1)).sum())


FEATURE_SCORES: dict[str, Callable[[Labelled], float]] = {
    "ncm_loo": ncm_leave_one_out,
    "knn_loo": knn_leave_one_out,
    "logme": logme,
    "h_score": h_score,
    "lda": lda,
    "cdnv": negative_cdnv,
    "gbc": gbc,
}
HEAD_SCORES: dict[str, Callable[[Labelled], float]] = {"leep": leep, "nce": nce}


def after_training(sample: Labelled, *, probabilities: np.ndarray | None = None) -> dict[str, float]:
    """All scores of a trained backbone's features; LEEP and NCE only with the source head's probabilities (N, |A|)."""
    scores = {name: score(sample) for name, score in FEATURE_SCORES.items()}
    by_head = None if probabilities is None else Labelled(probabilities, sample.labels, rescale=False)
    for name, score in HEAD_SCORES.items():
        scores[name] = float("nan") if by_head is None else score(by_head)
    return scores


def before_training(
    subset: Subset,
    *,
    target: Subset,
    start_means: np.ndarray,
    start_scores: np.ndarray,
    images: int,
) -> dict[str, float]:
    """Scores that need no training of `subset`, only the start's features.

    Args:
        subset: source classes.
        target: target classes.
        start_means: (K, D) class means of the start's features.
        start_scores: (P,) pair separability of the start, over all pairs.
        images: training images of the subset under its budget.

    Returns:
        size, images, `start_separability` (mean of the start over the source's own pairs: easy sources score high),
        `start_hard_pairs` (share of the target's pairs that are in the source, weighted by how badly the start
        separates them), `centroid_min` and `centroid_mean` (minus the mean distance of the target's new classes to
        the nearest, or to all, source classes; 0 when no class is new).
    """
    pairs = class_pairs(len(start_means))
    inside, wanted = (pair_mask(group, pairs) for group in (subset, target))
    error = 1 - start_scores
    new = [c for c in target if c not in subset]
    distance = np.linalg.norm(start_means[new][:, None] - start_means[list(subset)][None], axis=2)
    usable = len(new) > 0 and len(subset) > 0
    return {
        "size": float(len(subset)),
        "images": float(images),
        "start_separability": float(start_scores[inside].mean()) if inside.any() else float("nan"),
        "start_hard_pairs": float(error[inside & wanted].sum() / max(error[wanted].sum(), _TINY)),
        "centroid_min": -float(distance.min(axis=1).mean()) if usable else 0.0,
        "centroid_mean": -float(distance.mean()) if usable else 0.0,
    }


def predicted_before(subset: Subset, *, start_scores: np.ndarray, num_classes: int) -> np.ndarray:
    """Pair separability guessed before training, (P,): 1 for pairs inside the source, else what the start has."""
    inside = pair_mask(subset, class_pairs(num_classes))
    return np.where(inside, 1.0, start_scores)
