"""Tables of methods and of classes, and how they are written as Markdown and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gen_invariance.report.metrics import METRICS, PUBLISHED, Published, metric_info
from gen_invariance.report.summary import Results, split_totals
from gen_invariance.stats import least_p_value, paired_difference

_CLASS_METRICS = ("accuracy", "ekld", "agreement")
_SHOT_GROUPS = {name: f"{name}_accuracy" for name in ("many", "medium", "few")}
_BOUGHT_WHERE = "Bought where (points)"
_HEADLINE_PAIRS = 5


@dataclass(frozen=True)
class TableCell:
    """One figure of a table: its text, its comparison with the baseline, and the number it is sorted by.

    `words` says that the text may be broken into lines.
    """

    text: str = "–"
    difference: str = ""
    sort: float = math.nan
    best: bool = False
    words: bool = False


Column = tuple[str, Mapping[Hashable, TableCell]]
"""Heading of a column, and its cells by the key of the row."""


@dataclass(frozen=True)
class TableRow:
    """One method (or class): its name, a remark, and a cell for each column."""

    name: str
    remark: str
    cells: tuple[TableCell, ...]


@dataclass(frozen=True)
class Table:
    """Rows and columns of one benchmark, a remark that belongs before them, and the lines that belong under them."""

    benchmark: str
    first_column: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    footnotes: tuple[str, ...] = ()
    remark: str = ""


def make_table(
    benchmark: object,
    first_column: str,
    rows: Mapping[Hashable, tuple[str, str]],
    columns: Sequence[Column],
    *,
    footnotes: Iterable[str] = (),
    remark: str = "",
) -> Table:
    """A table of `columns` with a row for each key in `rows`, which gives its name and remark; gaps become dashes."""
    filled = tuple(
        TableRow(*about, tuple(cells.get(key, TableCell()) for _, cells in columns)) for key, about in rows.items()
    )
    headings = tuple(heading for heading, _ in columns)
    return Table(str(benchmark), first_column, headings, filled, tuple(footnotes), remark)


def method_tables(results: Results, *, references: Collection[str] = ()) -> list[Table]:
    """One table for each benchmark: methods down, metrics across, mean ± half-width over seeds in the cells.

    A cell is marked best only if its method's paired difference to every other method has an interval on the
    better side of zero; with two methods alike, or on different data, nobody is best. With a baseline a column says
    in which shot groups a change of the balanced accuracy was bought. A column shows the figures of `PUBLISHED` where
    there are some.

    Args:
        results: from `prepare_results`.
        references: methods that are shown but do not compete, such as the oracle.
    """
    totals, _ = split_totals(results.summary)
    all_figures, _ = split_totals(results.figures)
    tables = []
    for benchmark, part in totals.groupby("benchmark", sort=False):
        figures = all_figures[all_figures["benchmark"] == benchmark]
        known = {method: entry for (where, method), entry in PUBLISHED.items() if where == benchmark}
        rows: dict[Hashable, tuple[str, str]] = {}
        for method in part["method"].unique():
            rows[method] = method, "reference" if method in references else ""
            if method == results.baseline:
                rows[method] = method, "baseline"
        columns = [count_column("Seeds", part)]
        columns += _metric_columns(part, figures, level=results.level, references=references)
        if known:
            published = {method: TableCell("not available") for method in rows}
            published |= {method: TableCell(entry.text, sort=entry.value) for method, entry in known.items()}
            columns.append(("Published", published))
        footnotes = _footnotes(part, results) + _published_lines(known, rows) + _pairing_lines(part, figures, results)
        remark = few_pairs_remark(part, results.baseline)
        tables.append(make_table(benchmark, "Method", rows, columns, footnotes=footnotes, remark=remark))
    return tables


def class_tables(results: Results) -> list[Table]:
    """One table for each benchmark with per-class figures: classes down, metric and method across, means over seeds."""
    _, figures = split_totals(results.figures)
    tables = []
    for benchmark, part in figures[figures["metric"].isin(_CLASS_METRICS)].groupby("benchmark", sort=False):
        classes = part.groupby(["class_index", "class_name"], sort=True, dropna=False)
        part = part.assign(row=classes.ngroup())
        rows: dict[Hashable, tuple[str, str]] = {}
        for row, (index, name) in enumerate(classes.size().index):
            rows[row] = (str(index) if pd.isna(name) else name), ""
        sizes = part.groupby("row")["class_count"].mean().astype(float)
        means = part.groupby(["metric", "method", "row"], sort=False)["value"].mean().unstack("row")
        columns: list[Column] = [("Training images (mean)", {row: _size_cell(size) for row, size in sizes.items()})]
        for metric in order_metrics(part["metric"]):
            for method in part.loc[part["metric"] == metric, "method"].unique():
                cells = {row: _plain_cell(metric, mean) for row, mean in means.loc[(metric, method)].items()}
                columns.append((f"{metric_info(metric).title}: {method}", cells))
        tables.append(make_table(benchmark, "Class", rows, columns))
    return tables


def order_metrics(present: Iterable[str]) -> list[str]:
    """Metrics that occur: the known ones in the order of `METRICS`, then the others as they appear."""
    names = dict.fromkeys(present)
    return [name for name in METRICS if name in names] + [name for name in names if name not in METRICS]


def count_column(heading: str, part: pd.DataFrame) -> Column:
    """How many seeds, or class orders, each method has."""
    seeds = part.groupby("method")["seeds"].max()
    return heading, {method: TableCell(str(int(count)), sort=count) for method, count in seeds.items()}


def _metric_columns(
    part: pd.DataFrame, figures: pd.DataFrame, *, level: float, references: Collection[str]
) -> list[Column]:
    columns: list[Column] = []
    groups = [name for name in order_metrics(part["metric"]) if name in _SHOT_GROUPS.values()]
    differences = part.pivot(index="method", columns="metric", values="difference")
    for metric in order_metrics(part["metric"]):
        best = _find_best_method(figures[figures["metric"] == metric], metric, level=level, references=references)
        rows = part[part["metric"] == metric].set_index("method", drop=False)
        cells = {method: measured_cell(row, best=method == best) for method, row in rows.iterrows()}
        columns.append((metric_info(metric).title, cells))
        if metric in groups[-1:] and differences[groups].notna().any(axis=None):
            bought = {method: _bought_where_cell(row) for method, row in differences.iterrows()}
            columns.append((_BOUGHT_WHERE, bought))
    return columns


def _find_best_method(figures: pd.DataFrame, metric: str, *, level: float, references: Collection[str]) -> str | None:
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


def measured_cell(row: pd.Series, *, best: bool = False) -> TableCell:
    """The cell of one row of a summary: mean and interval, and the difference to the baseline with p and its floor."""
    info, difference = metric_info(row["metric"]), ""
    if math.isfinite(row["difference"]):
        difference = f"{row['difference'] * info.scale:+.{info.decimals}f}"
        difference += _plus_minus(row["difference_half_width"] * info.scale, info.decimals)
        if row["pairs"] > 1:
            floor = least_p_value(int(row["pairs"]))
            difference += f", p {_format_p_value(row['permutation_p_value'])} (floor {_format_p_value(floor)})"
    text = info.show(row["mean"]) + _plus_minus(row["half_width"] * info.scale, info.decimals)
    return TableCell(minus_signs(text), minus_signs(difference), float(row["mean"]), best)


def _bought_where_cell(differences: pd.Series) -> TableCell:
    """The change of each shot group, in points: "many −26.1, medium −3.2, few +23.0"."""
    known = differences.dropna()
    parts = [f"{name} {100 * known[metric]:+.1f}" for name, metric in _SHOT_GROUPS.items() if metric in known.index]
    return TableCell(minus_signs(", ".join(parts)), words=True) if parts else TableCell()


def _size_cell(size: float) -> TableCell:
    return TableCell(f"{size:.1f}".removesuffix(".0") if math.isfinite(size) else "–", sort=size)


def _plain_cell(metric: str, value: float) -> TableCell:
    return TableCell(minus_signs(metric_info(metric).show(value)) if math.isfinite(value) else "–", sort=value)


def _published_lines(known: Mapping[str, Published], methods: Collection[Hashable]) -> list[str]:
    lines = []
    for method, entry in known.items():
        where = "" if method in methods else " (not run here)"
        label = metric_info(entry.metric).label.lower()
        lines.append(f"Published: {method}{where} {entry.text} {label}. {entry.source}.")
    return lines


def _footnotes(part: pd.DataFrame, results: Results) -> list[str]:
    level = f"{results.level:.0%}"
    lines = [f"Mean ± half-width of the {level} Student interval over seeds; no ± where there is one seed."]
    if results.baseline is not None and part["difference"].notna().any():
        lines.append(
            f"Small, or after a semicolon: difference to {results.baseline} on the same seeds, its interval, and p of "
            "the two-sided sign-flip test with its floor, 2/2ⁿ for n pairs, below which it cannot fall. p is not "
            "corrected for the number of comparisons."
        )
    return lines


def _pairing_lines(part: pd.DataFrame, figures: pd.DataFrame, results: Results) -> list[str]:
    """How to read the changes by group, and which differences are not shown since the data differ."""
    baseline = results.baseline
    if baseline is None:
        return []
    if baseline not in set(part["method"]):
        return [f"No paired difference is shown: {baseline} was not measured on {part['benchmark'].iloc[0]}."]
    lines = []
    if part[part["metric"].isin(_SHOT_GROUPS.values())]["difference"].notna().any():
        lines.append(f"Bought where: change of the accuracy of each shot group against {baseline}, same pairs.")
    for method, rows in figures[figures["unequal"]].groupby("method", sort=False):
        seeds = ", ".join(map(str, sorted(set(rows["seed"]))))
        lines.append(f"No paired difference is shown of {method} and {baseline} at seed {seeds}: their data differ.")
    return lines


def few_pairs_remark(summary: pd.DataFrame, baseline: str | None) -> str:
    """What a reader must know before a table: which comparisons rest on too few pairs to be told as a finding."""
    pairs = summary[summary["pairs"] > 0].groupby("method", sort=False)["pairs"].max()
    few = pairs[pairs < _HEADLINE_PAIRS]
    if few.empty:
        return ""
    named = "" if len(few) == len(pairs) else f" of {', '.join(few.index)}"
    counts = " to ".join(str(int(count)) for count in dict.fromkeys([few.min(), few.max()]))
    noun = "pair" if counts == "1" else "pairs"
    return f"Fewer than five draws: not a headline. The comparison{named} with {baseline} rests on {counts} {noun}."


def to_markdown(tables: Sequence[Table]) -> str:
    """The tables as GitHub Markdown; best figures bold, differences behind a semicolon."""
    blocks = []
    for table in tables:
        lines = [f"## {_escape_markdown(table.benchmark)}", ""]
        if table.remark:
            lines += [_escape_markdown(table.remark), ""]
        head, *rows = _text_rows(table, bold="**{}**", escape=_escape_markdown)
        lines += [_pipes(row) for row in (head, ["---"] * len(head), *rows)]
        blocks.append("\n".join([*lines, "", *map(_escape_markdown, table.footnotes), ""]))
    return "\n".join(blocks)


def to_latex(tables: Sequence[Table]) -> str:
    r"""The tables as LaTeX (`\usepackage{booktabs}`); best figures bold."""
    blocks = []
    for table in tables:
        lines = [f"% {line}" for line in (_escape_latex(table.benchmark), _escape_latex(table.remark)) if line]
        head, *rows = _text_rows(table, bold=r"\textbf{{{}}}", escape=_escape_latex)
        lines += [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
        lines += [" & ".join(head) + r" \\", r"\midrule", *(" & ".join(row) + r" \\" for row in rows)]
        lines += [r"\bottomrule", r"\end{tabular}", *(f"% {' '.join(line.split())}" for line in table.footnotes), ""]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _text_rows(table: Table, *, bold: str, escape: Callable[[str], str]) -> list[list[str]]:
    """The headings and all rows as text."""
    rows = [[escape(heading) for heading in (table.first_column, *table.columns)]]
    for row in table.rows:
        texts = [escape(f"{row.name} ({row.remark})" if row.remark else row.name)]
        for cell in row.cells:
            text = bold.format(escape(cell.text)) if cell.best else escape(cell.text)
            texts.append(f"{text}; {escape(cell.difference)}" if cell.difference else text)
        rows.append(texts)
    return rows


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _format_p_value(value: float) -> str:
    if value < 0.001:
        return "< .001"
    return f"{value:.3g}" if value >= 0.9995 else f"{value:.{3 if value >= 0.1 else 4}f}".lstrip("0")


def _plus_minus(half_width: float, decimals: int) -> str:
    return f" ± {half_width:.{decimals}f}" if math.isfinite(half_width) else ""


def minus_signs(text: str) -> str:
    """`text` with hyphens as minus signs."""
    return text.replace("-", "−")


def _escape_markdown(text: str) -> str:
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


def _escape_latex(text: str) -> str:
    """`text` on one line, with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))
