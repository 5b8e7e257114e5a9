"""What a study keeps of a grid, and the tables that its page shows.

    python -m studies.tables out=runs/letters results=docs/results/benchmark/letters16

Writes `records.csv` (figures of every cell), `classes.csv` (eKLD by class), `gains.md` (all figures, paired
differences, shares), `class_size.md` and, for each benchmark, a picture of eKLD against class size; prints the short
table of the page. Without `out` it prints the table of the records that are in `results` already. With
`arms=ce_drs,ce_drs+redraw` it prints these side by side instead: balanced (many-shot / few-shot) accuracy.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.program import markdown, read_settings
from gen_invariance.files import write_text
from gen_invariance.records import Record, as_frame, load_records, measured, write_csv
from gen_invariance.report.class_figures import ekld_against_class_size
from gen_invariance.report.drawing import method_styles, save_png
from gen_invariance.report.gains import gain_tables
from gen_invariance.report.size_effect import size_effect_table, size_effects
from gen_invariance.report.summary import summarise
from gen_invariance.report.tables import to_markdown

METRICS = ("balanced_accuracy", "many_accuracy", "few_accuracy", "few_ekld")
KEPT = ["benchmark", "method", "order", "seed", "metric", "value", "config_digest", "commit"]
HEAD = ["set", "arm", "orders", "balanced (%)", "many-shot (%)", "few-shot (%)", "balanced, over generic", "p",
        "share of the oracle's gain", "few-shot eKLD (nats)"]  # fmt: skip


def short_table(frame: pd.DataFrame) -> str:
    """A row an arm, Markdown: accuracies, the paired difference to generic augmentation of every row, share, eKLD."""
    rows = []
    for table in gain_tables(frame, metrics=METRICS):
        name = table.benchmark.split(":")[0]
        for row in table.rows:
            draws, balanced, share, many, _, few, _, ekld, _ = row.cells
            gain, _, p = balanced.difference.partition(", p ")
            arm = f"{row.name} ({row.remark})" if row.remark else row.name
            cells = [name, f"`{arm}`", draws.text, balanced.text, many.text, few.text, gain or "–"]
            cells += [p.split(" (")[0] or "–", share.text, ekld.text]
            rows.append(cells)
    return markdown(HEAD, rows)


def side_by_side(frame: pd.DataFrame, arms: list[str]) -> str:
    """A row a benchmark, a column an arm, Markdown: balanced accuracy with its interval (many-shot / few-shot)."""
    lines = ["| set | " + " | ".join(f"`{arm}`" for arm in arms) + " |", "|" + "---|" * (len(arms) + 1)]
    summary = summarise(frame).set_index(["benchmark", "method", "metric"])
    for benchmark in dict.fromkeys(frame["benchmark"]):
        cells = []
        for arm in arms:
            balanced, many, few = (summary.loc[(benchmark, arm, metric)] for metric in METRICS[:3])
            ends = f"{100 * many['mean']:.0f} / {100 * few['mean']:.0f}"
            cells.append(f"{100 * balanced['mean']:.1f} ± {100 * balanced['half_width']:.1f} ({ends})")
        lines.append(f"| {benchmark} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def from_csv(path: Path) -> pd.DataFrame:
    """The records that `records.csv` keeps, as a frame of totals."""
    rows = pd.read_csv(path).itertuples()
    return as_frame(Record(**{name: getattr(row, name) for name in KEPT}) for row in rows)


def keep(frame: pd.DataFrame, results: Path) -> None:
    """Write what is kept of a grid's records."""
    totals = frame[frame["class_index"].isna() & frame["metric"].isin([*METRICS, "medium_accuracy", "mean_ekld"])]
    write_csv(totals[KEPT].assign(value=totals["value"].round(7)), results / "records.csv")
    classes = frame[frame["metric"] == "ekld"].rename(columns={"value": "ekld"})
    names = ["benchmark", "method", "order", "class_index", "class_count", "ekld"]
    write_csv(classes[names].assign(ekld=classes["ekld"].round(5)), results / "classes.csv")
    kept = from_csv(results / "records.csv")  # so that what is kept gives the same figures to the last digit
    write_text(results / "gains.md", to_markdown(gain_tables(kept, metrics=METRICS)))
    write_text(results / "class_size.md", size_effect_table(size_effects(frame)))
    styles = method_styles(frame["method"].unique())
    for benchmark, rows in frame.groupby("benchmark"):
        save_png(results / f"invariance-{benchmark}.png", ekld_against_class_size(rows, styles=styles))


def main() -> None:
    """Keep, then print."""
    given = read_settings(__doc__, results=Path, out=None, arms=())
    if given.out is not None:
        keep(measured(load_records(Path(given.out) / "records")), given.results)
    frame = from_csv(given.results / "records.csv")
    print(side_by_side(frame, given.arms) if given.arms else short_table(frame), end="")


if __name__ == "__main__":
    main()
