"""Summary of records over seeds or class orders: mean, interval, and paired difference to a baseline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from gen_invariance.errors import DataError, SettingsError
from gen_invariance.records import measured
from gen_invariance.stats import mean_interval, paired_difference

_FIGURE = ["benchmark", "method", "metric", "class_index", "class_name", "group"]


def repetitions(frame: pd.DataFrame) -> pd.DataFrame:
    """The figures of `frame` by what repeats independently, which is in the column `seed`.

    Where a benchmark was measured on several class orders, training seeds are averaged within each order and the
    order takes the place of the seed: trainings on the same images do not say how much other images would change.
    With one order, or none numbered, the seeds stay.
    """
    frame = measured(frame)
    many = frame.groupby("benchmark")["order"].transform("nunique") > 1
    if not many.any():
        return frame
    rows = frame[many].assign(place=frame.index[many])
    keys = [*_FIGURE, "config_digest", "order"]
    how = {name: "mean" if name == "value" else "first" for name in rows if name not in keys}
    means = rows.groupby(keys, sort=False, dropna=False, as_index=False).agg(how)
    means = means.set_index("place").assign(seed=lambda table: table["order"].astype("int64"), order=pd.NA)
    means["order"] = means["order"].astype("Int64")
    return pd.concat([frame[~many], means[list(frame)]]).sort_index().rename_axis(None)


def summarise(
    frame: pd.DataFrame,
    *,
    baseline: str | None = None,
    level: float = 0.95,
    config_digest: str | Collection[str] | None = None,
) -> pd.DataFrame:
    """Mean and interval over seeds of every figure, and its paired difference to a baseline.

    Args:
        frame: from `load_records`; (benchmark, method, metric, class, group) name a figure, seeds repeat it, or class
            orders (see `repetitions`).
        baseline: method that the others are compared with on the seeds both have, where they had the same data (see
            `unequal_data`); no differences when left out.
        level: confidence of the intervals, in (0, 1).
        config_digest: keep only records of this configuration, or of these.

    Returns:
        One row a figure, in order of appearance: benchmark, method, metric, class_index, class_name, group,
        class_count (mean over seeds), mean, half_width, seeds, difference (method minus baseline),
        difference_half_width, pairs, t_p_value, permutation_p_value; NaN where there is nothing to compare.

    Raises:
        SettingsError: the baseline is not among the methods.
        DataError: a method's records come from several configurations.
    """
    frame = repetitions(frame)
    if config_digest is not None:
        wanted = [config_digest] if isinstance(config_digest, str) else list(config_digest)
        frame = frame[frame["config_digest"].isin(wanted)]
    _require_one_configuration(frame)
    methods = list(dict.fromkeys(frame["method"]))
    if baseline is not None and baseline not in methods:
        raise SettingsError(f"baseline {baseline!r} has no record; choose one of {', '.join(map(repr, methods))}")

    table = _values_by_seed(frame)
    values = table["values"]
    interval = mean_interval(values, level)
    summary = table["keys"].assign(mean=interval.mean, half_width=interval.half_width, seeds=interval.count)
    partner = _baseline_rows(summary, baseline)
    others = np.where(partner[:, None] < 0, np.nan, values[partner])
    if baseline is not None:
        others[_without_pair(table, unequal_data(frame, baseline))] = np.nan
    paired = paired_difference(values, others, level)
    return summary.assign(
        difference=paired.mean,
        difference_half_width=paired.half_width,
        pairs=paired.count,
        t_p_value=paired.t_p_value,
        permutation_p_value=paired.permutation_p_value,
    )


def _require_one_configuration(frame: pd.DataFrame) -> None:
    digests = frame.groupby(["benchmark", "method"], sort=False)["config_digest"].unique()
    for (benchmark, method), found in digests.items():
        if len(found) > 1:
            raise DataError(
                f"records of {method!r} on {benchmark!r} come from {len(found)} configurations "
                f"({', '.join(map(repr, found))}) and are not averaged; choose with config_digest="
            )


def unequal_data(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Cells measured on other data than the baseline's of the same seed: they are no pairs, and are not compared.

    Args:
        frame: figures as `repetitions` gives them; records that do not name their data are taken at their word.
        baseline: a method.

    Returns:
        One row a cell: benchmark, method, seed.
    """
    named = frame[frame["data_digest"] != ""].drop_duplicates(["benchmark", "method", "seed", "data_digest"])
    ours = named[named["method"] == baseline]
    both = named.merge(ours, on=["benchmark", "seed"], suffixes=("", "_baseline"))
    unequal = both[both["data_digest"] != both["data_digest_baseline"]]
    return unequal[["benchmark", "method", "seed"]].drop_duplicates(ignore_index=True)


def _without_pair(table: Mapping[str, Any], unequal: pd.DataFrame) -> np.ndarray:
    """Which values (M, R) of `_values_by_seed` are of the cells `unequal`."""
    cells = set(unequal.itertuples(index=False, name=None))
    keys = zip(table["keys"]["benchmark"], table["keys"]["method"], strict=True)
    return np.array([[(*key, seed) in cells for seed in table["seeds"]] for key in keys], dtype=bool)


def _values_by_seed(frame: pd.DataFrame) -> dict[str, Any]:
    """Figures (M rows of keys), the seeds (R,), and the values (M, R) over them, NaN where a seed is missing."""
    groups = frame.groupby(_FIGURE, sort=False, dropna=False)
    row = groups.ngroup().to_numpy()
    seeds, column = np.unique(frame["seed"], return_inverse=True)
    values = np.full((groups.ngroups, max(len(seeds), 1)), np.nan)
    values[row, column] = frame["value"]
    keys = groups["class_count"].mean().reset_index()
    return {"keys": keys, "seeds": seeds.tolist(), "values": values}


def _baseline_rows(summary: pd.DataFrame, baseline: str | None) -> np.ndarray:
    """For each figure the row number of the baseline's, -1 where there is none and for the baseline itself."""
    columns = [name for name in _FIGURE if name != "method"]
    # Missing classes and groups are equal to each other here, which NaN is not.
    keys = [tuple(None if pd.isna(part) else part for part in row) for row in summary[columns].itertuples(index=False)]
    methods = summary["method"].tolist()
    rows = {key: row for row, (key, method) in enumerate(zip(keys, methods, strict=True)) if method == baseline}
    found = [-1 if method == baseline else rows.get(key, -1) for key, method in zip(keys, methods, strict=True)]
    return np.array(found, dtype=np.int64)
