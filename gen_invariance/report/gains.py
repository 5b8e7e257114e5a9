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
from gen_invariance.report.summary import repetitions, summarise, unequal_data
from gen_invariance.report.tables import Cell, Row, Table, few_pairs, measured_cell
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
    figures = repetitions(frame)
    figures = figures[figures["class_index"].isna() & figures["group"].isna() & figures["metric"].isin(metrics)]
    methods = figures["method"] if scale is None else pd.Series("", index=figures.index)
    tables = []
    for (benchmark, _), own in figures.groupby(["benchmark", methods.map(_base)], sort=False):
        chosen = scale or _scale(own, baseline)
        names = set(own["method"])
        if chosen.reference in names and len(names) > 1 and (chosen.generic or chosen.oracle in names):
            tables.append(_table(str(benchmark), own, chosen, metrics=metrics, level=level))
    return tables


def _base(method: str) -> str:
    return method.split("+")[0].strip()


def _given(method: str) -> frozenset[str]:
    """What is added to the long-tail method: {"redraw", "trivialaugment@every_row"}."""
    return frozenset(word.strip() for word in method.split("+")[1:])


def _scale(own: pd.DataFrame, baseline: str | None) -> Scale:
    """The scale of the arms of one long-tail method, read off their names."""
    names = own["method"].unique().tolist()
    balanced = own[own["metric"] == "balanced_accuracy"].groupby("method")["value"].mean()
    alone = [name for name in names if _given(name) in [{word} for word in GENERIC] and name in balanced]
    if alone:
        reference = max(alone, key=lambda name: balanced[name])
        under = [*_given(reference), *GENERIC]  # the same augmentation, else another, else none
        kinds = [{word, generic} for generic in under for word in ORACLES] + [{word} for word in ORACLES]
    else:
        reference = baseline if baseline in names else names[0]
        kinds = [{word} for word in ORACLES]
    found = [name for kind in kinds for name in names if _given(name) == kind]
    return Scale(reference, found[0] if found else None, bool(alone))


def _table(benchmark: str, own: pd.DataFrame, scale: Scale, *, metrics: Sequence[str], level: float) -> Table:
    summary = summarise(own, baseline=scale.reference, level=level)
    unequal = set(unequal_data(own, scale.reference).itertuples(index=False, name=None))
    keep = [key not in unequal for key in own[["benchmark", "method", "seed"]].itertuples(index=False, name=None)]
    values = own[keep].pivot_table("value", ["metric", "seed"], "method")
    shown = [name for name in metrics if name in set(own["metric"])]
    rows = []
    for method, part in summary.groupby("method", sort=False):
        by_metric = part.set_index("metric")
        cells = [Cell(f"{part['seeds'].max():.0f}", sort=part["seeds"].max())]
        for name in shown:
            cells.append(measured_cell(name, by_metric.loc[name]) if name in by_metric.index else Cell("–"))
            cells.append(_share(values.loc[name], method, scale, name, level=level))
        rows.append(Row(method, {scale.reference: "0 %", scale.oracle: "100 %"}.get(method, ""), tuple(cells)))
    columns = [text for name in shown for text in (metric_info(name).title, f"share, {metric_info(name).label}")]
    notes = {"footnotes": _footnotes(scale, level), "remark": few_pairs(summary, scale.reference)}
    return Table(_heading(benchmark, scale), "Arm", ("Draws", *columns), tuple(rows), **notes)


def _share(values: pd.DataFrame, method: str, scale: Scale, metric: str, *, level: float) -> Cell:
    """The share of one arm, over the draws that arm, reference and oracle have in common."""
    if method == scale.reference or not {scale.oracle, scale.reference, method} <= set(values):
        return Cell("–")
    sign = -1 if metric_info(metric).higher_is_better is False else 1
    room = paired_difference(sign * values[scale.oracle].to_numpy(), sign * values[scale.reference].to_numpy(), level)
    if not math.isfinite(room.half_width):
        return Cell("n/a")
    if room.low <= 0:
        return Cell(NO_ROOM)
    common = values[list(dict.fromkeys([method, scale.reference, scale.oracle]))].dropna()
    gains = common.sub(common[scale.reference], axis=0).mean()
    share = float(gains[method] / gains[scale.oracle])
    return Cell(f"{100 * share:.0f} %".replace("-", "−"), sort=share) if math.isfinite(share) else Cell("n/a")


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
