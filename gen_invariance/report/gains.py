"""What an arm gains over generic augmentation, as a share of what the oracle gains over it.

share = (arm - generic) / (oracle - generic). *generic* is the strongest arm that gives every row generic augmentation
and nothing else (`METHOD+trivialaugment@every_row`), for that is what anybody has for nothing. *oracle* is the arm with
the true nuisance or with more real images, under the same generic augmentation where that was measured, else under the
other, else under none. Where the oracle itself does not gain beyond its interval there is nothing to have a share of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from gen_invariance.report.metrics import metric_info
from gen_invariance.report.summary import prepare_results, repetitions, split_totals
from gen_invariance.report.tables import (
    Table,
    TableCell,
    count_column,
    few_pairs_remark,
    make_table,
    measured_cell,
    minus_signs,
)
from gen_invariance.stats import paired_difference

METRICS = ("balanced_accuracy", "many_accuracy", "few_accuracy", "few_ekld", "mean_ekld")
GENERIC = ("randaugment@every_row", "trivialaugment@every_row")
ORACLES, NO_ROOM = ("oracle", "more_real"), "no room"


@dataclass(frozen=True)
class Scale:
    """What is 0 % and what is 100 %.

    Attributes:
        reference: the arm at 0 %.
        oracle: the arm at 100 %; None where none was measured.
        generic: whether the reference is generic augmentation of every row; otherwise it is the first arm.
    """

    reference: str
    oracle: str | None
    generic: bool


def gain_tables(
    frame: pd.DataFrame,
    *,
    baseline: str | None = None,
    scale: Scale | None = None,
    metrics: Sequence[str] = METRICS,
    level: float = 0.95,
) -> list[Table]:
    """A table for each benchmark and long-tail method: the arms' figures, gains over the reference, and shares.

    There is none where neither generic augmentation of every row nor an oracle was measured.

    Args:
        frame: records, as from `load_records`.
        baseline: arm at 0 % where no arm has generic augmentation of every row; None is the first arm.
        scale: what is 0 % and 100 % whatever the arms are called; None reads it off their names.
        metrics: columns, those that were measured.
        level: confidence of the intervals.
    """
    figures, _ = split_totals(repetitions(frame))
    figures = figures[figures["metric"].isin(metrics)]
    families = figures["method"].map(_long_tail_method) if scale is None else pd.Series("", index=figures.index)
    tables = []
    for (benchmark, _), arms in figures.groupby(["benchmark", families], sort=False):
        used = scale or _read_scale(arms, baseline)
        names = set(arms["method"])
        if used.reference in names and len(names) > 1 and (used.generic or used.oracle in names):
            tables.append(_gain_table(str(benchmark), arms, used, metrics=metrics, level=level))
    return tables


def _long_tail_method(arm: str) -> str:
    return arm.split("+")[0].strip()


def _additions(arm: str) -> frozenset[str]:
    """What is added to the long-tail method: {"redraw", "trivialaugment@every_row"}."""
    return frozenset(word.strip() for word in arm.split("+")[1:])


def _read_scale(arms: pd.DataFrame, baseline: str | None) -> Scale:
    """The scale of the arms of one long-tail method, read off their names."""
    names = arms["method"].unique().tolist()
    balanced = arms[arms["metric"] == "balanced_accuracy"].groupby("method")["value"].mean()
    generic_arms = [name for name in names if _additions(name) in [{word} for word in GENERIC] and name in balanced]
    oracles = [{word} for word in ORACLES]
    if generic_arms:
        reference = max(generic_arms, key=lambda name: balanced[name])
        # The oracle under the same augmentation comes first, then under the other, then under none.
        oracles = [{word, generic} for generic in (*_additions(reference), *GENERIC) for word in ORACLES] + oracles
    else:
        reference = baseline if baseline in names else names[0]
    matching = [name for oracle in oracles for name in names if _additions(name) == oracle]
    return Scale(reference, matching[0] if matching else None, bool(generic_arms))


def _gain_table(benchmark: str, arms: pd.DataFrame, scale: Scale, *, metrics: Sequence[str], level: float) -> Table:
    results = prepare_results(arms, baseline=scale.reference, level=level)
    summary, figures = results.summary, results.figures
    unequal = figures.groupby(["method", "seed"])["unequal"].transform("any")
    values = figures[~unequal].pivot_table("value", ["metric", "seed"], "method")
    methods = list(dict.fromkeys(summary["method"]))
    columns = [count_column("Draws", summary)]
    for metric in (name for name in metrics if name in set(summary["metric"])):
        info, rows = metric_info(metric), summary[summary["metric"] == metric].set_index("method", drop=False)
        columns.append((info.title, {method: measured_cell(row) for method, row in rows.iterrows()}))
        shares = {method: _share_cell(values.loc[metric], method, scale, metric, level=level) for method in methods}
        columns.append((f"share, {info.label}", shares))
    marks = {scale.reference: "0 %", scale.oracle: "100 %"}
    rows = {method: (method, marks.get(method, "")) for method in methods}
    remark = few_pairs_remark(summary, scale.reference)
    return make_table(
        _heading(benchmark, scale), "Arm", rows, columns, footnotes=_footnotes(scale, level), remark=remark
    )


def _share_cell(values: pd.DataFrame, method: str, scale: Scale, metric: str, *, level: float) -> TableCell:
    """The share of one arm, over the draws that arm, reference and oracle have in common."""
    if method == scale.reference or not {scale.oracle, scale.reference, method} <= set(values):
        return TableCell()
    sign = -1 if metric_info(metric).higher_is_better is False else 1
    room = paired_difference(sign * values[scale.oracle].to_numpy(), sign * values[scale.reference].to_numpy(), level)
    if not math.isfinite(room.half_width):
        return TableCell("n/a")
    if room.low <= 0:
        return TableCell(NO_ROOM)
    common = values[list(dict.fromkeys([method, scale.reference, scale.oracle]))].dropna()
    gains = common.sub(common[scale.reference], axis=0).mean()
    share = float(gains[method] / gains[scale.oracle])
    return TableCell(minus_signs(f"{100 * share:.0f} %"), sort=share) if math.isfinite(share) else TableCell("n/a")


def _heading(benchmark: str, scale: Scale) -> str:
    gain = f"share of the gain of {scale.oracle} over" if scale.oracle else "no oracle was measured; gain over"
    first = ", the first arm (none with generic augmentation of every row was measured)" * (not scale.generic)
    return f"{benchmark}: {gain} {scale.reference}{first}"


def _footnotes(scale: Scale, level: float) -> tuple[str, ...]:
    low, high = scale.reference, scale.oracle
    figures = (
        f"Mean ± half-width of the {level:.0%} Student interval over draws; small, or after a semicolon: difference to "
        f"{low} on the same draws, its interval, and p of the two-sided sign-flip test with its floor."
    )
    shares = (
        f"Share: (arm − {low}) / ({high} − {low}), means over common draws; {NO_ROOM}: {high} itself gains nothing "
        f"over {low} beyond its interval; n/a: one draw."
    )
    return (figures, shares) if high else (figures,)
