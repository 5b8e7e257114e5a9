"""Tables of methods and of classes, and their Markdown and LaTeX forms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from gen_invariance.report.metrics import METRICS, PUBLISHED, Metric, Published, metric_info
from gen_invariance.report.summary import repetitions, unequal_data
from gen_invariance.stats import least_p_value, paired_difference

_CLASS_METRICS = ("accuracy", "ekld", "agreement")
_SHOT_GROUPS = {name: f"{name}_accuracy" for name in ("many", "medium", "few")}
_BOUGHT_WHERE = "Bought where (points)"
_HEADLINE_PAIRS = 5


@dataclass(frozen=True)
class Cell:
    """One figure of a table: its text, its comparison with the baseline, and the number it is sorted by.

    `words` says that the text may be broken into lines.
    """

    text: str
    difference: str = ""
    sort: float = math.nan
    best: bool = False
    words: bool = False


@dataclass(frozen=True)
class Row:
    """One method (or class): its name, a remark, and a cell for each column."""

    name: str
    remark: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Rows and columns of one benchmark, a remark that belongs before them, and the lines that belong under them."""

    benchmark: str
    first_column: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[str, ...] = field(default=())
    remark: str = ""


def method_tables(
    frame: pd.DataFrame,
    summary: pd.DataFrame,
    *,
    baseline: str | None = None,
    level: float = 0.95,
    references: Collection[str] = (),
    published: Mapping[tuple[str, str], Published] = PUBLISHED,
) -> list[Table]:
    """One table for each benchmark: methods down, metrics across, mean ± half-width over seeds in the cells.

    A cell is marked best only if its method's paired difference to every other method has an interval on the
    better side of zero; with two methods alike, or on different data, nobody is best. With a baseline a column says
    in which shot groups a change of the balanced accuracy was bought.

    Args:
        frame: the records.
        summary: from `summarise(frame, baseline=baseline, level=level)`.
        baseline: the method that differences are taken to.
        level: confidence of the intervals.
        references: methods that are shown but do not compete, such as the oracle.
        published: verified figures by (benchmark, method); a column appears where there is one.
    """
    whole = summary[summary["class_index"].isna() & summary["class_name"].isna() & summary["group"].isna()]
    figures = repetitions(frame)
    figures = figures[figures["class_index"].isna() & figures["class_name"].isna() & figures["group"].isna()]
    tables = []
    for benchmark, part in whole.groupby("benchmark", sort=False):
        names = _ordered_metrics(part["metric"])
        own = figures[figures["benchmark"] == benchmark]
        best = {
            name: _best_method(own[own["metric"] == name], name, level=level, references=references) for name in names
        }
        known = {method: entry for (where, method), entry in published.items() if where == benchmark}
        shown = _with_bought_where(part, names)
        rows = [
            _method_row(method, rows, names=shown, best=best, baseline=baseline, references=references, known=known)
            for method, rows in part.groupby("method", sort=False)
        ]
        columns = ["Seeds", *(name if name == _BOUGHT_WHERE else metric_info(name).title for name in shown)]
        columns += ["Published"] if known else []
        compared = baseline if part["difference"].notna().any() else None
        footnotes = (
            *_footnotes(known, ran={row.name for row in rows}, baseline=compared, level=level),
            *_pairing(own, part, baseline=baseline, bought=_BOUGHT_WHERE in shown),
        )
        tables.append(Table(benchmark, "Method", tuple(columns), tuple(rows), footnotes, few_pairs(part, baseline)))
    return tables


def _with_bought_where(part: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """`names` with the column of the changes by shot group behind the last of the groups, where there are some."""
    groups = [name for name in names if name in _SHOT_GROUPS.values()]
    if not part[part["metric"].isin(groups)]["difference"].notna().any():
        return list(names)
    place = names.index(groups[-1]) + 1
    return [*names[:place], _BOUGHT_WHERE, *names[place:]]


def few_pairs(summary: pd.DataFrame, baseline: str | None) -> str:
    """What a reader must know before a table: which comparisons rest on too few pairs to be told as a finding."""
    pairs = summary[summary["pairs"] > 0].groupby("method", sort=False)["pairs"].max()
    few = pairs[pairs < _HEADLINE_PAIRS]
    if few.empty:
        return ""
    named = "" if len(few) == len(pairs) else f" of {', '.join(few.index)}"
    counts = " to ".join(str(int(count)) for count in dict.fromkeys([few.min(), few.max()]))
    noun = "pair" if counts == "1" else "pairs"
    return f"Fewer than five draws: not a headline. The comparison{named} with {baseline} rests on {counts} {noun}."


def _pairing(own: pd.DataFrame, part: pd.DataFrame, *, baseline: str | None, bought: bool) -> list[str]:
    """How to read the changes by group, and which differences are not shown since the data differ."""
    if baseline is None:
        return []
    if baseline not in set(part["method"]):
        return [f"No paired difference is shown: {baseline} was not measured on {part['benchmark'].iloc[0]}."]
    lines = []
    if bought:
        lines.append(f"Bought where: change of the accuracy of each shot group against {baseline}, same pairs.")
    unequal = unequal_data(own, baseline)
    for method, cells in unequal.groupby("method", sort=False):
        seeds = ", ".join(map(str, sorted(cells["seed"])))
        lines.append(f"No paired difference is shown of {method} and {baseline} at seed {seeds}: their data differ.")
    return lines


def class_tables(summary: pd.DataFrame) -> list[Table]:
    """One table for each benchmark with per-class figures: classes down, metric and method across, means over seeds."""
    named = summary["class_index"].notna() | summary["class_name"].notna()
    by_class = summary[named & summary["metric"].isin(_CLASS_METRICS)]
    tables = []
    for benchmark, part in by_class.groupby("benchmark", sort=False):
        pairs = [
            (metric, method)
            for metric in _ordered_metrics(part["metric"])
            for method in dict.fromkeys(part.loc[part["metric"] == metric, "method"])
        ]
        rows = []
        for (index, name), one in part.groupby(["class_index", "class_name"], sort=True, dropna=False):
            means = dict(zip(zip(one["metric"], one["method"], strict=True), one["mean"], strict=True))
            size = one["class_count"].astype(float).mean()
            cells = [Cell(f"{size:.1f}".removesuffix(".0") if math.isfinite(size) else "–", sort=size)]
            cells += [
                _plain_cell(metric_info(metric), means.get((metric, method), math.nan)) for metric, method in pairs
            ]
            rows.append(Row(str(index) if pd.isna(name) else name, "", tuple(cells)))
        columns = ("Training images (mean)", *(f"{metric_info(metric).title}: {method}" for metric, method in pairs))
        tables.append(Table(benchmark, "Class", columns, tuple(rows)))
    return tables


def to_markdown(tables: Sequence[Table]) -> str:
    """The tables as GitHub Markdown; best figures bold, differences behind a semicolon."""
    blocks = []
    for table in tables:
        head = [table.first_column, *table.columns]
        lines = [f"## {_markdown(table.benchmark)}", "", *([_markdown(table.remark), ""] if table.remark else [])]
        lines += [_pipes(map(_markdown, head)), _pipes(["---"] * len(head))]
        for row in table.rows:
            cells = [_joined(cell, bold="**{}**", escape=_markdown) for cell in row.cells]
            lines.append(_pipes([_markdown(_named(row)), *cells]))
        blocks.append("\n".join([*lines, "", *map(_markdown, table.footnotes), ""]))
    return "\n".join(blocks)


def to_latex(tables: Sequence[Table]) -> str:
    r"""The tables as LaTeX (`\usepackage{booktabs}`); best figures bold."""
    blocks = []
    for table in tables:
        head = [table.first_column, *table.columns]
        lines = [f"% {line}" for line in (_latex(table.benchmark), _latex(table.remark)) if line]
        lines += [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
        lines += [" & ".join(map(_latex, head)) + r" \\", r"\midrule"]
        for row in table.rows:
            cells = [_joined(cell, bold=r"\textbf{{{}}}", escape=_latex) for cell in row.cells]
            lines.append(" & ".join([_latex(_named(row)), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", *(f"% {' '.join(line.split())}" for line in table.footnotes), ""]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _ordered_metrics(found: pd.Series) -> list[str]:
    """Metrics that occur: the known ones in the order of `METRICS`, then the others as they appear."""
    present = dict.fromkeys(found)
    return [name for name in METRICS if name in present] + [name for name in present if name not in METRICS]


def _best_method(figures: pd.DataFrame, metric: str, *, level: float, references: Collection[str]) -> str | None:
    """The method that is better than every other one by more than the paired interval, if there is one."""
    direction = metric_info(metric).higher_is_better
    figures = figures[~figures["method"].isin(references)]
    named = figures[figures["data_digest"] != ""]
    values = figures.pivot_table("value", "method", "seed", sort=False)
    if direction is None or len(values) < 2 or (named.groupby("seed")["data_digest"].nunique() > 1).any():
        return None
    gains = values if direction else -values
    leader = gains.mean(axis=1).idxmax()
    others = gains.drop(index=leader).to_numpy()
    lead = paired_difference(np.broadcast_to(gains.loc[leader].to_numpy(), others.shape), others, level)
    return leader if bool(np.all(lead.low > 0)) else None


def _method_row(
    method: str,
    rows: pd.DataFrame,
    *,
    names: Sequence[str],
    best: Mapping[str, str | None],
    baseline: str | None,
    references: Collection[str],
    known: Mapping[str, Published],
) -> Row:
    by_metric = rows.set_index("metric")
    seeds = int(rows["seeds"].max())
    cells = [Cell(str(seeds), sort=seeds)]
    for name in names:
        if name == _BOUGHT_WHERE:
            cells.append(_bought_where(by_metric["difference"]))
        elif name in by_metric.index:
            cells.append(measured_cell(name, by_metric.loc[name], best=best[name] == method))
        else:
            cells.append(Cell("–"))
    if known:
        cells.append(_published_cell(known.get(method)))
    remark = "baseline" if method == baseline else "reference" if method in references else ""
    return Row(method, remark, tuple(cells))


def _bought_where(differences: pd.Series) -> Cell:
    """The change of each shot group, in points: "many −26.1, medium −3.2, few +23.0"."""
    known = differences.dropna()
    parts = [f"{name} {100 * known[metric]:+.1f}" for name, metric in _SHOT_GROUPS.items() if metric in known.index]
    return Cell(_signs(", ".join(parts)), words=True) if parts else Cell("–")


def measured_cell(metric: str, row: pd.Series, *, best: bool = False) -> Cell:
    """The cell of one row of a summary: mean and interval, and the difference to the baseline with p and its floor."""
    info, difference = metric_info(metric), ""
    if math.isfinite(row["difference"]):
        gap, half_width = row["difference"] * info.scale, row["difference_half_width"] * info.scale
        chance = ""
        if row["pairs"] > 1:
            floor = least_p_value(int(row["pairs"]))
            chance = f", p {_p_value(row['permutation_p_value'])} (floor {_p_value(floor)})"
        difference = _signs(f"{gap:+.{info.decimals}f}") + _plus_minus(half_width, info.decimals) + chance
    text = _signs(info.show(row["mean"])) + _plus_minus(row["half_width"] * info.scale, info.decimals)
    return Cell(text, difference, float(row["mean"]), best)


def _plain_cell(info: Metric, value: float) -> Cell:
    return Cell(_signs(info.show(value)) if math.isfinite(value) else "–", sort=value)


def _published_cell(entry: Published | None) -> Cell:
    if entry is None:
        return Cell("not available")
    info = metric_info(entry.metric)
    # With the digits of the source, which are more than our own figures deserve.
    return Cell(f"{entry.value * info.scale:.4g} {info.unit}".strip(), sort=entry.value)


def _footnotes(
    known: Mapping[str, Published], *, ran: Collection[str], baseline: str | None, level: float
) -> tuple[str, ...]:
    lines = [f"Mean ± half-width of the {level:.0%} Student interval over seeds; no ± where there is one seed."]
    if baseline is not None:
        lines.append(
            f"Small, or after a semicolon: difference to {baseline} on the same seeds, its interval, and p of the "
            "two-sided sign-flip test with its floor, 2/2ⁿ for n pairs, below which it cannot fall. p is not corrected "
            "for the number of comparisons."
        )
    for method, entry in known.items():
        shown, where = _published_cell(entry).text, "" if method in ran else " (not run here)"
        lines.append(f"Published: {method}{where} {shown} {metric_info(entry.metric).label.lower()}. {entry.source}.")
    return tuple(lines)


def _p_value(value: float) -> str:
    if value < 0.001:
        return "< .001"
    return f"{value:.3g}" if value >= 0.9995 else f"{value:.{3 if value >= 0.1 else 4}f}".lstrip("0")


def _plus_minus(half_width: float, decimals: int) -> str:
    return f" ± {half_width:.{decimals}f}" if math.isfinite(half_width) else ""


def _signs(text: str) -> str:
    return text.replace("-", "−")


def _named(row: Row) -> str:
    return f"{row.name} ({row.remark})" if row.remark else row.name


def _joined(cell: Cell, *, bold: str, escape: Callable[[str], str]) -> str:
    text = escape(cell.text)
    text = bold.format(text) if cell.best else text
    return f"{text}; {escape(cell.difference)}" if cell.difference else text


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(text: str) -> str:
    """`text` on one line, with what Markdown or HTML would act on taken literally."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


def _latex(text: str) -> str:
    """`text` on one line, with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))
