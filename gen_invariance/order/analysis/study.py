"""Everything that is computed from the measurements: the order, its stability, and what happens along it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from gen_invariance.classifier.heads import few_shot
from gen_invariance.errors import SettingsError
from gen_invariance.order.analysis import along
from gen_invariance.order.analysis.accuracy import AccuracyRelation, accuracy_relation
from gen_invariance.order.analysis.curriculum import Curriculum
from gen_invariance.order.analysis.fundamental import FundamentalSet, fundamental_set
from gen_invariance.order.analysis.predicting import score_predictors
from gen_invariance.order.analysis.scoring import EdgeScore
from gen_invariance.order.analysis.sensitivity import Sweep, edge_frequency, split_half_stability, sweep_threshold
from gen_invariance.order.bootstrap import CellBounds, cell_bounds, crossed_bootstrap
from gen_invariance.order.measurements import Measurements
from gen_invariance.order.relation import SubsetOrder, subset_order
from gen_invariance.order.sets import START, class_pairs, pair_mask
from gen_invariance.order.settings import AnalysisSettings
from gen_invariance.run import named_generator


@dataclass(frozen=True)
class OrderStudy:
    """The order of class subsets and all that was found along it.

    Attributes:
        order: the three-valued order.
        bounds: cell bounds behind it.
        sweep: the relation over thresholds, with edge persistence.
        frequency: share of bootstrap draws in which a is below b, (n, n).
        split_half: Jaccard overlap of edges between halves of the seeds; NaN with one seed.
        accuracy: tested accuracy relation between sources; None with one seed or when not measured.
        fundamental: the fewest subsets that together separate all separable pairs.
        gains: one entry for each cover, target all classes.
        chains: monotonicity on maximal chains.
        against_start: pairs gained and lost by training.
        nested: nested sources that obey and disobey.
        seen: mean separability of seen, half-seen and unseen pairs.
        table: one row for each subset (name, size, images, pairs, accuracy, few-shot, ...).
        predictors: one row for each predictor, target all classes.
        predicted_edges: how well pair-level guesses give the order, by name.
        invariance: eKLD along the order; None when not measured.
        facts: further numbers by name.
        measured: the measurements.
        curricula: training up the longest chain, one for each seed, where that was asked for.
    """

    order: SubsetOrder
    bounds: CellBounds
    sweep: Sweep
    frequency: np.ndarray
    split_half: float
    accuracy: AccuracyRelation | None
    fundamental: FundamentalSet
    gains: list[along.CoverGain]
    chains: list[along.ChainFit]
    against_start: list[along.StartComparison]
    nested: dict[str, Any]
    seen: dict[str, float]
    table: pd.DataFrame
    predictors: pd.DataFrame
    predicted_edges: dict[str, EdgeScore]
    invariance: along.InvarianceAlong | None
    measured: Measurements
    facts: dict[str, Any] = field(default_factory=dict)
    curricula: tuple[Curriculum, ...] = ()


def analyse(
    measured: Measurements,
    settings: AnalysisSettings,
    *,
    mode: str,
    head: str,
    seed: int = 0,
    about: dict[str, Any] | None = None,
) -> OrderStudy:
    """All figures of one study; deterministic in the measurements, the settings and the `seed` of the bootstraps."""
    drawn = crossed_bootstrap(
        measured.hits,
        measured.test_labels,
        num_classes=measured.num_classes,
        resamples=settings.resamples,
        generator=named_generator(seed, "order bootstrap"),
    )
    start_scores = drawn.scores[:, measured.subsets.index(START) if START in measured.subsets else 0].mean(axis=0)
    pairs = class_pairs(measured.num_classes)
    columns = _columns(measured, settings, pairs)
    drawn = drawn.of_pairs(columns)
    bounds = cell_bounds(drawn, alpha=settings.alpha, simultaneous=settings.simultaneous)
    order = subset_order(
        bounds,
        subsets=measured.subsets,
        pairs=pairs[columns],
        threshold=_threshold(measured, settings, bounds.estimate, pairs[columns]),
        class_names=measured.class_names,
        test_counts=np.bincount(measured.test_labels, minlength=measured.num_classes),
    )
    order = replace(order, mode=mode, head=head, about={**order.about, **(about or {})})
    accuracy = measured.on_target(measured.all_classes)
    relation = _accuracy_relation(measured, settings)
    predictor_table, predicted_edges = score_predictors(
        measured, order, start_scores=start_scores, shots=settings.predictor_shots, seed=seed
    )
    facts = {
        "spearman_separated_accuracy": along.separated_against_accuracy(order, accuracy),
        "auc_separability_for_accuracy": (
            along.agreement_with_accuracy(order, relation.non_inferior) if relation is not None else math.nan
        ),
        "notes": list(measured.notes) + list(order.notes),
        **_shape_facts(order),
    }
    generator = named_generator(seed, "order split")
    return OrderStudy(
        order=order,
        bounds=bounds,
        sweep=sweep_threshold(bounds),
        frequency=edge_frequency(drawn.draws, order.threshold),
        split_half=split_half_stability(drawn.scores, order.threshold, generator=generator),
        accuracy=relation,
        fundamental=fundamental_set(order.separated, num_classes=measured.num_classes),
        gains=along.cover_gains(order, accuracy, images=measured.images),
        chains=along.chain_fits(order, accuracy, target=settings.heldout_classes or measured.all_classes),
        against_start=along.against_start(order),
        nested=along.nested_subsets(order),
        seen=along.seen_half_unseen(order),
        table=_subset_table(measured, order, accuracy, settings),
        predictors=predictor_table,
        predicted_edges=predicted_edges,
        invariance=along.invariance_along(order, measured.ekld) if measured.ekld is not None else None,
        measured=measured,
        facts=facts,
    )


def _columns(measured: Measurements, settings: AnalysisSettings, pairs: np.ndarray) -> np.ndarray:
    """The pairs that count, bool (P,)."""
    if not settings.heldout_classes:
        return np.ones(len(pairs), dtype=bool)
    return pair_mask(settings.heldout_classes, pairs)


def _threshold(
    measured: Measurements, settings: AnalysisSettings, estimate: np.ndarray, pairs: np.ndarray
) -> float | np.ndarray:
    if settings.relative_margin is None:
        return settings.threshold
    absent = [tuple(pair) for pair in pairs.tolist() if tuple(pair) not in measured.subsets]
    if absent:
        raise SettingsError(
            f"a relative threshold needs every pair among the sources, {len(absent)} are not (first: {absent[0]}); "
            "choose=pairs, or use an absolute threshold"
        )
    reached = [estimate[measured.subsets.index(tuple(pair)), column] for column, pair in enumerate(pairs.tolist())]
    return np.maximum(np.array(reached) - settings.relative_margin, 0.501)  # chance is never a separation


def _accuracy_relation(measured: Measurements, settings: AnalysisSettings) -> AccuracyRelation | None:
    sources = [subset for subset in measured.subsets if subset != START]
    if len(measured.seeds) < 2 or any(len(s) < 2 or s not in measured.targets for s in sources):
        return None
    rows = [measured.subsets.index(subset) for subset in sources]
    columns = [measured.targets.index(subset) for subset in sources]
    table = measured.accuracy[:, rows][:, :, columns]
    if not np.isfinite(table).all():
        return None
    return accuracy_relation(table, margin=settings.margin, alpha=settings.alpha)


def _shape_facts(order: SubsetOrder) -> dict[str, Any]:
    all_classes = tuple(range(len(order.class_names)))
    facts: dict[str, Any] = dict(order.counts())
    for name, relation in (("certain", order.certain), ("estimated", order.estimated)):
        facts[f"{name}_height"] = len(relation.longest_chain())
        facts[f"{name}_width"] = relation.width()
        facts[f"{name}_classes"] = len(relation.classes())
    if all_classes in order.subsets:
        facts["all_classes_on_top"] = all_classes in order.maximal(relation="estimated")
    return facts


def _subset_table(
    measured: Measurements, order: SubsetOrder, accuracy: np.ndarray, settings: AnalysisSettings
) -> pd.DataFrame:
    rows = []
    ways = min(settings.ways, measured.num_classes)
    compared = {entry.subset: entry for entry in along.against_start(order)}
    for row, subset in enumerate(order.subsets):
        few_shots = []
        for seed in measured.seeds:
            features = measured.features(subset, seed)
            episodes = few_shot(
                (features.train, features.train_labels),
                (features.test, features.test_labels),
                ways=ways,
                shots=settings.shots,
                generator=named_generator(seed, "order episodes"),  # the same episodes for every subset
            )
            few_shots.append(episodes.accuracy)
        start = compared.get(subset)
        rows.append(
            {
                "subset": order.name(subset),
                "classes": len(subset),
                "images": int(measured.images[row]),
                "separated": int(order.separated_counts[row]),
                "certainly_separated": int(order.yes[row].sum()),
                "accuracy": float(accuracy[:, row].mean()),
                f"{ways}-way {settings.shots}-shot": float(np.mean(few_shots)),
                "gained": start.gained if start else 0,
                "lost": start.lost if start else 0,
                "harmful": start.harmful if start else "",
            }
        )
    return pd.DataFrame(rows)
