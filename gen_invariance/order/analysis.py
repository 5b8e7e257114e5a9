"""Everything that is computed from the measurements: the order, its stability, and what happens along it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from gen_invariance.errors import SettingsError
from gen_invariance.order.accuracy import AccuracyRelation, accuracy_relation
from gen_invariance.order.bootstrap import SIMULTANEOUS, CellBounds, cell_bounds, crossed_bootstrap
from gen_invariance.order.chains import (
    ChainFit,
    CoverGain,
    InvarianceAlong,
    StartComparison,
    against_start,
    agreement_with_accuracy,
    chain_fits,
    cover_gains,
    invariance_along,
    nested_subsets,
    seen_half_unseen,
    separated_against_accuracy,
)
from gen_invariance.order.fewshot import few_shot_accuracy
from gen_invariance.order.fundamental import FundamentalSet, fundamental_set
from gen_invariance.order.predicting import score_predictors
from gen_invariance.order.relation import SubsetOrder, subset_order
from gen_invariance.order.scoring import EdgeScore
from gen_invariance.order.sensitivity import Sweep, edge_frequency, split_half_stability, sweep_threshold
from gen_invariance.order.sets import START, Subset, class_pairs, pair_mask
from gen_invariance.order.table import Measurements
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
    """

    order: SubsetOrder
    bounds: CellBounds
    sweep: Sweep
    frequency: np.ndarray
    split_half: float
    accuracy: AccuracyRelation | None
    fundamental: FundamentalSet
    gains: list[CoverGain]
    chains: list[ChainFit]
    against_start: list[StartComparison]
    nested: dict[str, Any]
    seen: dict[str, float]
    table: pd.DataFrame
    predictors: pd.DataFrame
    predicted_edges: dict[str, EdgeScore]
    invariance: InvarianceAlong | None
    measured: Measurements
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnalysisSettings:
    """What to make of the measurements.

    Attributes:
        threshold: separability above which a pair counts as separated, in (0.5, 1].
        relative_margin: when set, each pair's threshold is instead the score of the model trained on exactly that
            pair, minus this; all pairs must then be among the sources.
        alpha: chance that any certain statement is wrong.
        simultaneous: "bootstrap", "bonferroni" or "none".
        resamples: bootstrap draws.
        heldout_classes: when given, only pairs of these classes count, and no source may contain one.
        margin: tolerated accuracy loss of the accuracy relation.
        ways, shots: of the few-shot episodes.
        predictor_shots: labelled samples a class that predictors see.
        seed: of the bootstraps.

    Raises:
        SettingsError: a value outside its range.
    """

    threshold: float = 0.9
    relative_margin: float | None = None
    alpha: float = 0.05
    simultaneous: str = "bootstrap"
    resamples: int = 2000
    heldout_classes: Subset = ()
    margin: float = 0.02
    ways: int = 5
    shots: int = 1
    predictor_shots: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "heldout_classes", tuple(self.heldout_classes))  # a config gives a list
        if not 0.5 < self.threshold <= 1:
            raise SettingsError(f"separation threshold is {self.threshold}, expected above 0.5 (chance) and at most 1")
        if self.relative_margin is not None and not 0 <= self.relative_margin < 0.5:
            raise SettingsError(f"relative_margin is {self.relative_margin}, expected 0 to 0.5; 0.02 is usual")
        if len(self.heldout_classes) == 1:
            raise SettingsError("one held-out class has no pair; hold out two classes or more")
        if self.predictor_shots < 2:
            raise SettingsError(f"predictor_shots is {self.predictor_shots}, expected at least 2")
        # Checked here, too, so that it does not come up after hours of training.
        if not 0 < self.alpha < 0.5:
            raise SettingsError(f"alpha is {self.alpha}, expected between 0 and 0.5; 0.05 is usual")
        if self.simultaneous not in SIMULTANEOUS:
            raise SettingsError(f"simultaneous is {self.simultaneous!r}, expected one of {', '.join(SIMULTANEOUS)}")
        if self.resamples < 100:
            raise SettingsError(f"resamples is {self.resamples}, expected at least 100; 2000 is usual")
        if self.ways < 2 or self.shots < 1:
            raise SettingsError(f"ways and shots are {self.ways} and {self.shots}, expected at least 2 and 1")


def analyse(
    measured: Measurements, settings: AnalysisSettings, *, mode: str, head: str, about: dict[str, Any] | None = None
) -> OrderStudy:
    """All figures of one study; deterministic in the measurements and the settings."""
    drawn = crossed_bootstrap(
        measured.hits,
        measured.test_labels,
        num_classes=measured.num_classes,
        resamples=settings.resamples,
        generator=named_generator(settings.seed, "order bootstrap"),
    )
    pairs = class_pairs(measured.num_classes)
    columns = _columns(measured, settings, pairs)
    bounds = cell_bounds(
        drawn.scores[:, :, columns],
        sample_variance=drawn.sample_variance[:, columns],
        sample_freedom=drawn.sample_freedom[columns],
        largest=drawn.largest,
        alpha=settings.alpha,
        simultaneous=settings.simultaneous,
    )
    order = subset_order(
        bounds,
        subsets=measured.subsets,
        pairs=pairs[columns],
        threshold=_threshold(measured, settings, bounds.estimate, pairs[columns]),
        class_names=measured.class_names,
        test_counts=np.bincount(measured.test_labels, minlength=measured.num_classes),
        mode=mode,
        head=head,
        about=about,
    )
    everything = tuple(range(measured.num_classes))
    accuracy = measured.on_target(everything)
    relation = _accuracy_relation(measured, settings)
    scores, edges = score_predictors(
        measured, order, start_scores=drawn.scores.mean(axis=0), shots=settings.predictor_shots, seed=settings.seed
    )
    facts = {
        "spearman_separated_accuracy": separated_against_accuracy(order, accuracy),
        "auc_separability_for_accuracy": (
            agreement_with_accuracy(order, relation.non_inferior) if relation is not None else math.nan
        ),
        "notes": list(measured.notes) + list(order.notes),
        **_shape_facts(order),
    }
    generator = named_generator(settings.seed, "order split")
    target = everything if not settings.heldout_classes else settings.heldout_classes
    return OrderStudy(
        order=order,
        bounds=bounds,
        sweep=sweep_threshold(bounds),
        frequency=edge_frequency(drawn.draws[:, :, columns], order.threshold),
        split_half=split_half_stability(drawn.scores[:, :, columns], order.threshold, generator=generator),
        accuracy=relation,
        fundamental=fundamental_set(order.separated, num_classes=measured.num_classes),
        gains=cover_gains(order, accuracy, images=measured.images),
        chains=chain_fits(order, accuracy, target=target),
        against_start=against_start(order),
        nested=nested_subsets(order),
        seen=seen_half_unseen(order),
        table=_subset_table(measured, order, accuracy, settings),
        predictors=scores,
        predicted_edges=edges,
        invariance=invariance_along(order, measured.ekld) if measured.ekld is not None else None,
        measured=measured,
        facts=facts,
    )


def _columns(measured: Measurements, settings: AnalysisSettings, pairs: np.ndarray) -> np.ndarray:
    """The pairs that count, bool (P,)."""
    if not settings.heldout_classes:
        return np.ones(len(pairs), dtype=bool)
    touched = [s for s in measured.subsets if set(s) & set(settings.heldout_classes)]
    if touched:
        raise SettingsError(
            f"source {list(touched[0])} contains a held-out class; held-out pairs must be new to every source"
        )
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
    own = [estimate[measured.subsets.index(tuple(pair)), column] for column, pair in enumerate(pairs.tolist())]
    return np.maximum(np.array(own) - settings.relative_margin, 0.501)  # chance is never a separation


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
    everything = tuple(range(len(order.class_names)))
    facts: dict[str, Any] = dict(order.counts())
    for name, relation in (("certain", order.certain), ("estimated", order.estimated)):
        facts[f"{name}_height"] = len(relation.longest_chain())
        facts[f"{name}_width"] = relation.width()
        facts[f"{name}_classes"] = len(relation.classes())
    if everything in order.subsets:
        facts["all_classes_on_top"] = everything in order.maximal(relation="estimated")
    return facts


def _subset_table(
    measured: Measurements, order: SubsetOrder, accuracy: np.ndarray, settings: AnalysisSettings
) -> pd.DataFrame:
    rows = []
    ways = min(settings.ways, measured.num_classes)
    compared = {entry.subset: entry for entry in against_start(order)}
    for row, subset in enumerate(order.subsets):
        shots = [
            few_shot_accuracy(
                measured.features(subset, seed),
                ways=ways,
                shots=settings.shots,
                generator=named_generator(seed, "order episodes"),  # the same episodes for every subset
            ).accuracy
            for seed in measured.seeds
        ]
        start = compared.get(subset)
        rows.append(
            {
                "subset": order.name(subset),
                "classes": len(subset),
                "images": int(measured.images[row]),
                "separated": int(order.separated_counts[row]),
                "certainly_separated": int(order.yes[row].sum()),
                "accuracy": float(accuracy[:, row].mean()),
                f"{ways}-way {settings.shots}-shot": float(np.mean(shots)),
                "gained": start.gained if start else 0,
                "lost": start.lost if start else 0,
                "harmful": start.harmful if start else "",
            }
        )
    return pd.DataFrame(rows)
