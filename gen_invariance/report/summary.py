"""Summary of records over seeds or class orders: mean, interval, and paired difference to a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from gen_invariance.errors import DataError, SettingsError
from gen_invariance.records import measured
from gen_invariance.stats import mean_interval, paired_difference

_SHARED = ["benchmark", "metric", "class_index", "class_name", "group"]
_FIGURE = ["benchmark", "method", *_SHARED[1:]]


@dataclass(frozen=True, eq=False)
class Results:
    """The figures of a report, prepared once for all of its tables.

    Attributes:
        figures: one row a figure and repetition, as `pair_figures` gives them.
        summary: one row a figure, as `summarise` gives it.
        baseline: method that the others are compared with, or None.
        level: confidence of the intervals.
    """

    figures: pd.DataFrame
    summary: pd.DataFrame
    baseline: str | None
    level: float


def prepare_results(frame: pd.DataFrame, *, baseline: str | None = None, level: float = 0.95) -> Results:
    """The figures of `frame` and their summary; arguments and errors are those of `summarise`."""
    figures = pair_figures(repetitions(frame), baseline)
    return Results(figures, _summarise(figures, baseline, level), baseline, level)


def summarise(frame: pd.DataFrame, *, baseline: str | None = None, level: float = 0.95) -> pd.DataFrame:
    """Mean and interval over seeds of every figure, and its paired difference to a baseline.

    Args:
        frame: from `load_records`; (benchmark, method, metric, class, group) name a figure, seeds repeat it, or class
            orders (see `repetitions`).
        baseline: method that the others are compared with on the seeds both have, where they had the same data; no
            differences when left out.
        level: confidence of the intervals, in (0, 1).

    Returns:
        One row a figure, in order of appearance: benchmark, method, metric, class_index, class_name, group,
        class_count (mean over seeds), mean, half_width, seeds, difference (method minus baseline),
        difference_half_width, pairs, t_p_value, permutation_p_value; NaN where there is nothing to compare.

    Raises:
        SettingsError: the baseline is not among the methods.
        DataError: a method's records come from several configurations.

    Example:
        >>> from gen_invariance.records import Record, RecordWriter
        >>> cell = [Record(benchmark="signs", method="ce", seed=0, metric="balanced_accuracy", value=0.8)]
        >>> RecordWriter("measured/records").write_cell(cell)
        >>> from gen_invariance import load_records, summarise
        >>> summarise(load_records("measured"))["mean"].tolist()
        [0.8]
    """
    return prepare_results(frame, baseline=baseline, level=level).summary


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
    rows = frame[many].assign(row=frame.index[many])
    keys = [*_FIGURE, "config_digest", "order"]
    how = {name: "mean" if name == "value" else "first" for name in rows if name not in keys}
    means = rows.groupby(keys, sort=False, dropna=False, as_index=False).agg(how)
    means = means.set_index("row").assign(seed=lambda table: table["order"].astype("int64"), order=pd.NA)
    means["order"] = means["order"].astype("Int64")
    return pd.concat([frame[~many], means[list(frame)]]).sort_index().rename_axis(None)


def pair_figures(figures: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """`figures` of `repetitions`, each beside the baseline's of the same seed.

    Returns:
        With two more columns: `other`, the baseline's value, NaN where there is nothing to compare; `unequal`, whether
        the two were measured on different data, which is no pair. Records that do not name their data are taken at
        their word.
    """
    keys = [*_SHARED, "seed"]
    partners = figures[figures["method"] == baseline].drop_duplicates(keys, keep="last")
    paired = figures.merge(partners[[*keys, "value", "data_digest"]], on=keys, how="left", suffixes=("", "_baseline"))
    ours, theirs = (paired[name].fillna("") for name in ("data_digest", "data_digest_baseline"))
    unequal = (ours != "") & (theirs != "") & (ours != theirs)
    other = paired["value_baseline"].mask(unequal | (paired["method"] == baseline))
    return figures.assign(other=other.to_numpy(dtype=float), unequal=unequal.to_numpy())


def _summarise(figures: pd.DataFrame, baseline: str | None, level: float) -> pd.DataFrame:
    _require_one_configuration(figures)
    methods = list(dict.fromkeys(figures["method"]))
    if baseline is not None and baseline not in methods:
        raise SettingsError(f"baseline {baseline!r} has no record; choose one of {', '.join(map(repr, methods))}")
    groups = figures.groupby(_FIGURE, sort=False, dropna=False)
    numbered = figures.assign(figure=groups.ngroup()).drop_duplicates(["figure", "seed"], keep="last")
    values = numbered.pivot(index="figure", columns="seed", values="value").to_numpy(dtype=float)
    others = numbered.pivot(index="figure", columns="seed", values="other").to_numpy(dtype=float)
    interval = mean_interval(values, level)
    paired = paired_difference(values, others, level)
    summary = groups["class_count"].mean().reset_index()
    return summary.assign(
        mean=interval.mean,
        half_width=interval.half_width,
        seeds=interval.count,
        difference=paired.mean,
        difference_half_width=paired.half_width,
        pairs=paired.count,
        t_p_value=paired.t_p_value,
        permutation_p_value=paired.permutation_p_value,
    )


def _require_one_configuration(figures: pd.DataFrame) -> None:
    digests = figures.groupby(["benchmark", "method"], sort=False)["config_digest"].unique()
    for (benchmark, method), several in digests.items():
        if len(several) > 1:
            raise DataError(
                f"records of {method!r} on {benchmark!r} come from {len(several)} configurations "
                f"({', '.join(map(repr, several))}) and are not averaged; choose one by its config_digest"
            )


def split_totals(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of figures over all classes, and those of single classes; figures of groups are in neither."""
    by_class = table["class_index"].notna() | table["class_name"].notna()
    return table[~by_class & table["group"].isna()], table[by_class]
