"""A study's figures as the keyword arguments of benchmark records, one dictionary each."""

from __future__ import annotations

from typing import Any

import numpy as np

from gen_invariance.order.analysis import OrderStudy
from gen_invariance.order.table import pair_tables


def study_records(study: OrderStudy) -> list[dict[str, Any]]:
    """Separated pairs, accuracy on all classes and eKLD of each class, for every subset and seed.

    The keys are benchmark, method (the subset), seed, metric, value and, for eKLD, class_name and class_index.
    """
    measured, order = study.measured, study.order
    benchmark = f"order-{order.about.get('data', 'data')}-{order.mode}-{order.head}"
    accuracy = measured.on_target(tuple(range(measured.num_classes)))
    place = {tuple(pair): column for column, pair in enumerate(_all_pairs(measured.num_classes))}
    columns = [place[tuple(pair)] for pair in order.pairs.tolist()]
    found: list[dict[str, Any]] = []
    for line, (seed, table) in enumerate(zip(measured.seeds, pair_tables(measured), strict=True)):
        separated = (table[:, columns] >= order.threshold).sum(axis=1)
        for row, subset in enumerate(order.subsets):
            common = {"benchmark": benchmark, "method": order.name(subset), "seed": seed}
            found.append({**common, "metric": "separated_pairs", "value": float(separated[row])})
            found.append({**common, "metric": "balanced_accuracy", "value": float(accuracy[line, row])})
            if measured.ekld is not None:
                found += [
                    {**common, "metric": "ekld", "value": float(value), "class_index": c, "class_name": name}
                    for c, (name, value) in enumerate(zip(order.class_names, measured.ekld[line, row], strict=True))
                ]
    return found


def _all_pairs(num_classes: int) -> list[tuple[int, int]]:
    return list(zip(*(side.tolist() for side in np.triu_indices(num_classes, 1)), strict=True))
