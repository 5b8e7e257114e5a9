"""Cheap guesses of how well a subset's backbone serves a target, before transfer; the larger the better.

Two prices are kept apart. *Before training* the subset: only what the start's features, sizes and counts tell
(`before_training`). *After training* it, before transfer: scores of its features on a few labelled target samples
(`after_training`). All feature scores take float64 features Z (N, D) and labels remapped here to 0..C-1, so gaps in
the labels (subset {2, 5, 7}) cannot change a score.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg, stats
from sklearn.covariance import ledoit_wolf

from gen_invariance.classifier.heads import KNN_NEIGHBOURS, class_means, neighbour_votes, predict_left_out
from gen_invariance.errors import DataError, ShapeError
from gen_invariance.order.sets import Subset, class_pairs, pair_mask

_TINY = 1e-12


def _check(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features as float64, labels 0..C-1, samples of each class (C,)."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) != len(labels):
        raise ShapeError(f"features are {features.shape} for {len(labels)} labels; give (N, D) and N labels")
    if not np.isfinite(features).all():
        raise DataError("features hold NaN or infinite values; leave diverged runs out")
    labels = np.unique(labels, return_inverse=True)[1]
    counts = np.bincount(labels)
    if len(counts) < 2:
        raise DataError("a score needs samples of at least two classes; this target is trivial")
    return features, labels, counts


def _means(features: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return class_means(torch.from_numpy(features), torch.from_numpy(labels), len(counts)).numpy()


def ncm_leave_one_out(features: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples nearest to their own class's mean taken without them, in [0, 1].

    Raises:
        DataError: a class with a single sample has no mean without it.
    """
    features, labels, counts = _check(features, labels)
    if counts.min() < 2:
        raise DataError("nearest mean leave-one-out needs two samples of each class; draw more shots")
    predicted, _ = predict_left_out(torch.from_numpy(features), torch.from_numpy(labels))
    return float((predicted.numpy() == labels).mean())


def knn_leave_one_out(features: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples that a cosine-weighted vote of the nearest others puts right."""
    features, labels, counts = _check(features, labels)
    unit = F.normalize(torch.from_numpy(features), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    neighbours = min(KNN_NEIGHBOURS, len(labels) - 1)
    votes = neighbour_votes(cosine, torch.from_numpy(labels), num_classes=len(counts), neighbours=neighbours)
    return float((votes.argmax(dim=1).numpy() == labels).mean())


def logme(features: np.ndarray, labels: np.ndarray, *, iterations: int = 200) -> float:
    """Mean over classes of the log evidence of a Bayesian linear model, a sample; NaN when features are all zero.

    The full determinant is used: when N < D the D - N directions without data each contribute log(alpha), which the
    authors' released default drops. Comparable only between scores with the same number of classes.

    Reference: You et al., "LogME", ICML 2021, equations 2 and 3.
    """
    features, labels, counts = _check(features, labels)
    samples, width = features.shape
    if not features.any():
        return float("nan")
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    eigen = singular**2
    evidence = [
        _class_evidence(eigen, left.T @ target, float(target @ target), (samples, width), iterations)
        for target in (labels[:, None] == np.arange(len(counts))).astype(np.float64).T
    ]
    return float(np.mean(evidence))


def _class_evidence(
    eigen: np.ndarray, projected: np.ndarray, energy: float, shape: tuple[int, int], iterations: int
) -> float:
    """Largest log evidence a sample over the precisions alpha (weights) and beta (noise), by MacKay's fixed point."""
    samples, width = shape
    missed = max(energy - float(projected @ projected), 0.0)  # of the target, outside the span of the features
    alpha, beta = 1.0, 1.0
    for _ in range(iterations):
        effective = float((beta * eigen / (alpha + beta * eigen)).sum())
        weight = float((beta**2 * eigen * projected**2 / (alpha + beta * eigen) ** 2).sum())
        residual = missed + float((projected**2 * (alpha / (alpha + beta * eigen)) ** 2).sum())
        new_alpha = effective / max(weight, _TINY)
        new_beta = max(samples - effective, _TINY) / max(residual, _TINY)
        done = abs(np.log(new_alpha / alpha)) + abs(np.log(new_beta / beta)) < 1e-9
        alpha, beta = float(np.clip(new_alpha, 1e-10, 1e10)), float(np.clip(new_beta, 1e-10, 1e10))
        if done:
            break
    return log_evidence(eigen, projected, energy, (samples, width), alpha=alpha, beta=beta)


def log_evidence(
    eigen: np.ndarray, projected: np.ndarray, energy: float, shape: tuple[int, int], *, alpha: float, beta: float
) -> float:
    """Log of the integral of N(y; Z w, 1/beta) N(w; 0, 1/alpha) over w, divided by N.

    Args:
        eigen: non-zero part of the spectrum of Z'Z (and of ZZ').
        projected: y in the matching left singular directions.
        energy: |y|^2.
        shape: N and D.
        alpha: precision of the weights.
        beta: precision of the noise.
    """
    samples, width = shape
    missed = max(energy - float(projected @ projected), 0.0)
    fit = missed + float((projected**2 * alpha / (alpha + beta * eigen)).sum())
    determinant = float(np.log(alpha + beta * eigen).sum()) + (width - len(eigen)) * np.log(alpha)
    total = samples * np.log(beta) + width * np.log(alpha) - samples * np.log(2 * np.pi) - determinant - beta * fit
    return float(total / 2 / samples)


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean log of the expected empirical prediction, at most 0; source classes without mass are left out.

    Args:
        probabilities: (N, |A|), the source head's probabilities of the target samples, rows summing to 1.
        labels: (N,).

    Reference: Nguyen et al., "LEEP", ICML 2020, equations 1 and 2.
    """
    probabilities, labels, counts = _check(probabilities, labels)
    joint = np.zeros((len(counts), probabilities.shape[1]))
    np.add.at(joint, labels, probabilities / len(labels))
    mass = joint.sum(axis=0)
    conditional = np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0)
    predicted = (conditional[labels] * probabilities).sum(axis=1)
    return float(np.log(np.maximum(predicted, _TINY)).mean())


def nce(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Minus the conditional entropy H(target label | hard source label) in nats, at most 0 (Tran et al. 2019)."""
    probabilities, labels, counts = _check(probabilities, labels)
    joint = np.zeros((len(counts), probabilities.shape[1]))
    np.add.at(joint, (labels, probabilities.argmax(axis=1)), 1 / len(labels))
    source = joint.sum(axis=0)
    present = joint > 0
    return float((joint[present] * np.log(joint[present] / np.broadcast_to(source, joint.shape)[present])).sum())


def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """(1 - a) tr(S_a^-1 cov(class means)) with the Ledoit-Wolf covariance S_a of shrinkage a, in [0, C - 1].

    Unshrunk it saturates at C - 1 when N <= D. Reference: Bao et al. 2019; Ibrahim et al. 2022, eq. 6, for shrinkage.
    """
    features, labels, counts = _check(features, labels)
    centred = features - features.mean(axis=0)
    between = _means(centred, labels, counts) * np.sqrt(counts / len(labels))[:, None]
    covariance, shrinkage = ledoit_wolf(centred)
    return float((1 - shrinkage) * (between * _solve(covariance, between)).sum())


def lda(features: np.ndarray, labels: np.ndarray) -> float:
    """Fisher's tr(S_W^-1 S_B) with a Ledoit-Wolf shrunk within-class covariance, at least 0."""
    features, labels, counts = _check(features, labels)
    means = _means(features, labels, counts)
    within = ledoit_wolf(features - means[labels], assume_centered=True)[0]
    between = (means - features.mean(axis=0)) * np.sqrt(counts / len(labels))[:, None]
    return float((between * _solve(within, between)).sum())


def _solve(covariance: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows @ covariance^-1, with a ridge far below the smallest scale that matters."""
    ridge = 1e-10 * max(float(np.trace(covariance)) / len(covariance), _TINY)
    return linalg.solve(covariance + ridge * np.eye(len(covariance)), rows.T, assume_a="pos").T


def lda_pair_scores(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Predicted balanced two-class accuracy of each pair of present classes, float64 (C (C - 1) / 2,) in [0.5, 1].

    Phi(d / 2) with the Mahalanobis distance d of the class means under the shared within-class covariance: exact for
    Gaussian classes of one covariance. What the noise of the two means adds to d^2 is taken off; without that a few
    samples in many dimensions make every pair look separated.
    """
    features, labels, counts = _check(features, labels)
    means = _means(features, labels, counts)
    within = ledoit_wolf(features - means[labels], assume_centered=True)[0]
    first, second = class_pairs(len(counts)).T
    gap = means[first] - means[second]
    residual = features - means[labels]
    dimensions = float((residual * _solve(within, residual)).sum()) / (len(labels) - len(counts))
    noise = dimensions * (1 / counts[first] + 1 / counts[second])
    squared = (gap * _solve(within, gap)).sum(axis=1) - noise
    return stats.norm.cdf(np.sqrt(np.maximum(squared, 0)) / 2)


def negative_cdnv(features: np.ndarray, labels: np.ndarray) -> float:
    """Minus the class-distance normalised variance, mean over pairs, at most 0 (Galanti et al. 2022, eq. 5).

    Pairs of classes with the same mean count as -(mean variance) / tiny, a very bad but finite score.
    """
    features, labels, counts = _check(features, labels)
    means = _means(features, labels, counts)
    variance = np.bincount(labels, np.square(features - means[labels]).sum(axis=1)) / counts
    first, second = class_pairs(len(counts)).T
    distance = np.square(means[first] - means[second]).sum(axis=1)
    return float(-((variance[first] + variance[second]) / (2 * np.maximum(distance, _TINY))).mean())


def gbc(features: np.ndarray, labels: np.ndarray) -> float:
    """Minus the summed Gaussian Bhattacharyya coefficients over ordered class pairs, at most 0 (Pandy et al. 2022)."""
    features, labels, counts = _check(features, labels)
    means = _means(features, labels, counts)
    floor = 1e-6 * max(float(features.var()), _TINY)
    variance = np.stack([features[labels == c].var(axis=0) for c in range(len(counts))]) + floor
    first, second = class_pairs(len(counts)).T
    shared = (variance[first] + variance[second]) / 2
    distance = np.square(means[first] - means[second]) / shared / 8
    spread = 0.5 * (np.log(shared) - 0.5 * (np.log(variance[first]) + np.log(variance[second])))
    return float(-2 * np.exp(-(distance + spread).sum(axis=1)).sum())


FEATURE_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "ncm_loo": ncm_leave_one_out,
    "knn_loo": knn_leave_one_out,
    "logme": logme,
    "h_score": h_score,
    "lda": lda,
    "cdnv": negative_cdnv,
    "gbc": gbc,
}
HEAD_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"leep": leep, "nce": nce}


def after_training(
    features: np.ndarray, labels: np.ndarray, *, probabilities: np.ndarray | None = None
) -> dict[str, float]:
    """All scores of a trained backbone's features (N, D); LEEP and NCE only with the source head's probabilities."""
    scores = {name: score(features, labels) for name, score in FEATURE_SCORES.items()}
    for name, score in HEAD_SCORES.items():
        scores[name] = float("nan") if probabilities is None else score(probabilities, labels)
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
