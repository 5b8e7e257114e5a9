"""Score the cheap predictors of `predictors` on a measured study."""

from __future__ import annotations

import numpy as np
import pandas as pd

from gen_invariance.classifier.heads import class_means
from gen_invariance.order.analysis import predictors
from gen_invariance.order.analysis.scoring import EdgeScore, compare_edges, score_predictor
from gen_invariance.order.measurements import Measurements
from gen_invariance.order.preorder import Preorder
from gen_invariance.order.relation import SubsetOrder, inclusion
from gen_invariance.order.sets import START, Subset, pair_columns
from gen_invariance.run import named_generator


def score_predictors(
    measured: Measurements, order: SubsetOrder, *, start_scores: np.ndarray, shots: int, seed: int = 0
) -> tuple[pd.DataFrame, dict[str, EdgeScore]]:
    """Score all predictors of accuracy on all classes, and the pair-level guesses of the order.

    Args:
        measured: cells with cached features.
        order: the measured order.
        start_scores: pair separability of the start over all pairs, (P,); unused where it was not measured.
        shots: labelled samples of each class that predictors see.
        seed: of the bootstrap intervals.

    Returns:
        A row for each predictor (empty with fewer than three sources), and edge scores by guess.
    """
    rows, subsets = order.source_rows, order.sources
    if len(rows) < 3:
        return pd.DataFrame(), {}
    prices: dict[str, str] = {}
    guesses: list[list[dict[str, float]]] = []
    pair_guess = np.zeros((len(rows), len(start_scores)))
    for run_seed in measured.seeds:
        guesses.append([])
        for line, subset in enumerate(subsets):
            sample, probabilities = _labelled(measured, subset, run_seed, shots)
            after = predictors.after_training(sample, probabilities=probabilities)
            before = _before(measured, subset, run_seed, start_scores)
            prices |= dict.fromkeys(after, "after training") | dict.fromkeys(before, "before training")
            guesses[-1].append(before | after)
            pair_guess[line] += predictors.lda_pair_scores(sample) / len(measured.seeds)
    truth = measured.on_target(measured.all_classes)[:, rows]
    relation = Preorder(order.estimated.leq[np.ix_(rows, rows)])
    sizes = np.array([len(subset) for subset in subsets])
    table = []
    for name, price in prices.items():
        values = np.array([[guess[name] for guess in of_seed] for of_seed in guesses])
        generator = named_generator(seed, "order predictors")
        scored = score_predictor(values, truth, sizes=sizes, relation=relation, generator=generator)
        table.append({"predictor": name, "price": price, **scored})
    return pd.DataFrame(table), _predicted_edges(measured, order, pair_guess, start_scores, relation)


def _labelled(
    measured: Measurements, subset: Subset, seed: int, shots: int
) -> tuple[predictors.Labelled, np.ndarray | None]:
    """The first `shots` labelled samples of each class, and the source's probabilities of them."""
    cell = measured.cached(subset, seed)
    labels = cell["train_labels"]
    keep = np.concatenate([np.flatnonzero(labels == label)[:shots] for label in measured.all_classes])
    sample = predictors.Labelled(cell["train_features"][keep], labels[keep])
    return sample, cell["probabilities"][keep] if "probabilities" in cell else None


def _before(measured: Measurements, subset: Subset, seed: int, start_scores: np.ndarray) -> dict[str, float]:
    images = int(measured.images[measured.subsets.index(subset)])
    if START not in measured.subsets:
        return {"size": float(len(subset)), "images": float(images)}
    start = measured.features(START, seed)
    means = class_means(start.train.double(), start.train_labels, measured.num_classes).numpy()
    return predictors.before_training(
        subset, target=measured.all_classes, start_means=means, start_scores=start_scores, images=images
    )


def _predicted_edges(
    measured: Measurements, order: SubsetOrder, pair_guess: np.ndarray, start_scores: np.ndarray, truth: Preorder
) -> dict[str, EdgeScore]:
    subsets = order.sources
    guesses = {"LDA pairs, after training": pair_guess}
    if START in measured.subsets:
        before = [
            predictors.predicted_before(subset, start_scores=start_scores, num_classes=measured.num_classes)
            for subset in subsets
        ]
        guesses["start's pairs and own classes, before training"] = np.array(before)
    nested = np.array([[set(a) <= set(b) for b in subsets] for a in subsets])
    scores = {"set inclusion, before training": compare_edges(Preorder(nested), truth)}
    columns = pair_columns(order.pairs, measured.num_classes)
    for name, guess in guesses.items():
        separated = guess[:, columns] >= order.threshold
        scores[name] = compare_edges(Preorder(inclusion(separated, separated)), truth)
    return scores
