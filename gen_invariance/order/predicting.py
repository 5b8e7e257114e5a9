"""Score the cheap predictors of `predictors` on a measured study."""

from __future__ import annotations

import numpy as np
import pandas as pd

from gen_invariance.order import predictors
from gen_invariance.order.preorder import Preorder
from gen_invariance.order.relation import SubsetOrder, inclusion
from gen_invariance.order.scoring import EdgeScore, compare_edges, score_predictor
from gen_invariance.order.sets import START, Subset, class_pairs
from gen_invariance.order.table import Measurements
from gen_invariance.run import named_generator


def score_predictors(
    measured: Measurements, order: SubsetOrder, *, start_scores: np.ndarray, shots: int, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, EdgeScore]]:
    """Score all predictors of accuracy on all classes, and the pair-level guesses of the order.

    Args:
        measured: cells with cached features.
        order: the measured order.
        start_scores: pair separability of each subset over all pairs, (n, P); the start's row is used.
        shots: labelled samples of each class that predictors see.
        seed: of the bootstrap intervals.

    Returns:
        A row for each predictor (empty with fewer than three sources), and edge scores by guess.
    """
    rows = [row for row, subset in enumerate(order.subsets) if subset != START]
    subsets = [order.subsets[row] for row in rows]
    if len(rows) < 3:
        return pd.DataFrame(), {}
    guesses: list[list[dict[str, float]]] = []
    pair_guess = np.zeros((len(rows), start_scores.shape[1]))
    prices: dict[str, str] = {}
    for run_seed in measured.seeds:
        guesses.append([])
        for place, subset in enumerate(subsets):
            features, labels, probabilities = _labelled(measured, subset, run_seed, shots)
            after = predictors.after_training(features, labels, probabilities=probabilities)
            before = _before(measured, subset, run_seed, start_scores, images=int(measured.images[rows[place]]))
            prices |= dict.fromkeys(after, "after training") | dict.fromkeys(before, "before training")
            guesses[-1].append(before | after)
            pair_guess[place] += predictors.lda_pair_scores(features, labels) / len(measured.seeds)
    truth = measured.on_target(tuple(range(measured.num_classes)))[:, rows]
    within = Preorder(order.estimated.leq[np.ix_(rows, rows)])
    table = []
    for name, price in prices.items():
        values = np.array([[guess[name] for guess in line] for line in guesses])
        scored = score_predictor(
            values,
            truth,
            sizes=np.array([len(subset) for subset in subsets]),
            relation=within,
            generator=named_generator(seed, "order predictors"),
        )
        table.append({"predictor": name, "price": price, **scored.row()})
    return pd.DataFrame(table), _predicted_edges(measured, order, subsets, pair_guess, start_scores, within)


def _labelled(
    measured: Measurements, subset: Subset, seed: int, shots: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The first `shots` labelled samples of each class: features (N, D), labels (N,), source probabilities."""
    cell = measured.cached(subset, seed)
    labels = cell["train_labels"]
    keep = np.concatenate([np.flatnonzero(labels == label)[:shots] for label in range(measured.num_classes)])
    probabilities = cell["probabilities"][keep] if "probabilities" in cell else None
    return cell["train_features"][keep].astype(np.float64), labels[keep], probabilities


def _before(
    measured: Measurements, subset: Subset, seed: int, start_scores: np.ndarray, *, images: int
) -> dict[str, float]:
    if START not in measured.subsets:
        return {"size": float(len(subset)), "images": float(images)}
    cell = measured.cached(START, seed)
    labels, features = cell["train_labels"], cell["train_features"].astype(np.float64)
    means = np.stack([features[labels == label].mean(axis=0) for label in range(measured.num_classes)])
    return predictors.before_training(
        subset,
        target=tuple(range(measured.num_classes)),
        start_means=means,
        start_scores=start_scores[measured.subsets.index(START)],
        images=images,
    )


def _predicted_edges(
    measured: Measurements,
    order: SubsetOrder,
    subsets: list[Subset],
    pair_guess: np.ndarray,
    start_scores: np.ndarray,
    truth: Preorder,
) -> dict[str, EdgeScore]:
    columns = _pair_columns(order, measured.num_classes)
    guesses = {"LDA pairs, after training": pair_guess}
    if START in measured.subsets:
        start = start_scores[measured.subsets.index(START)]
        before = [predictors.predicted_before(s, start_scores=start, num_classes=measured.num_classes) for s in subsets]
        guesses["start's pairs and own classes, before training"] = np.array(before)
    nested = np.array([[set(a) <= set(b) for b in subsets] for a in subsets])
    found = {"set inclusion, before training": compare_edges(Preorder(nested), truth)}
    for name, guess in guesses.items():
        separated = guess[:, columns] >= order.threshold
        found[name] = compare_edges(Preorder(inclusion(separated, separated)), truth)
    return found


def _pair_columns(order: SubsetOrder, num_classes: int) -> np.ndarray:
    place = {tuple(pair): column for column, pair in enumerate(class_pairs(num_classes).tolist())}
    return np.array([place[tuple(pair)] for pair in order.pairs.tolist()])
