"""One self-contained HTML page of a benchmark, with its pictures, records and tables beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gen_invariance.errors import DataError
from gen_invariance.files import atomic_write, remove_leftovers, write_text
from gen_invariance.records import FAILED, Cell, finished_cells, measured, write_csv
from gen_invariance.report.metrics import PUBLISHED, Published
from gen_invariance.report.pages import Picture, write_page
from gen_invariance.report.summary import repetitions, summarise
from gen_invariance.report.tables import Table, class_tables, method_tables, to_latex, to_markdown


def write_report(
    folder: Path | str,
    *,
    title: str,
    frame: pd.DataFrame,
    figures: Sequence[Picture] = (),
    notes: Sequence[str] = (),
    command: str = "",
    baseline: str | None = None,
    references: Collection[str] = (),
    level: float = 0.95,
    config_digest: str | Collection[str] | None = None,
    published: Mapping[tuple[str, str], Published] = PUBLISHED,
    gains: Sequence[Table] = (),
) -> Path:
    """Write `report.html` into `folder` and return its path.

    Beside it: `records.csv`, `summary.csv`, `table.md`, `table.tex` (needs booktabs) and `figures/*.png`. The page
    needs none of them, no network and no server. Every file is written whole or not at all, the page last.

    Args:
        folder: created when missing; a report that is there is replaced.
        title: of the page.
        frame: records, from `load_records` or `as_frame`.
        figures: shown in this order.
        notes: paragraphs of plain text on what is shown and what not to conclude from it.
        command: that makes this report again; those of the records are listed as well.
        baseline: method that the others are compared with.
        references: methods that are shown but do not compete for best, such as the oracle.
        level: confidence of all intervals.
        config_digest: keep only records of this configuration, or of these.
        published: verified figures by (benchmark, method).
        gains: from `gains.gain_tables`; shown behind the methods, and written as `gains.md`.

    Raises:
        DataError: no record, or records that must not be averaged (see `summarise`).
        SettingsError: the baseline has no record.
        OutputError: read-only or full disk.
    """
    folder = Path(folder)
    remove_leftovers(folder)
    if config_digest is not None:
        wanted = [config_digest] if isinstance(config_digest, str) else list(config_digest)
        frame = frame[frame["config_digest"].isin(wanted)]
    if measured(frame).empty:
        raise DataError("a report needs at least one record, got none; run the benchmark first")
    summary = summarise(frame, baseline=baseline, level=level)
    tables = method_tables(frame, summary, baseline=baseline, level=level, references=references, published=published)
    for name, figure in zip(_file_names(figures), figures, strict=True):
        with atomic_write(folder / "figures" / name) as temporary:
            temporary.write_bytes(figure.png)
    write_csv(frame, folder / "records.csv")
    write_csv(summary, folder / "summary.csv")
    write_text(folder / "table.md", to_markdown(tables))
    write_text(folder / "table.tex", to_latex(tables))
    if gains:
        write_text(folder / "gains.md", to_markdown(gains))
    return write_page(
        "report.html.j2",
        folder / "report.html",
        title=title,
        notes=notes,
        tables=tables,
        gains=gains,
        class_tables=class_tables(summary),
        figures=figures,
        facts=_facts(frame, command),
        failures=_failures(frame),
        scope=_scope(frame),
        baseline=baseline,
        references=list(references),
        level=f"{level:.0%}",
    )


def _file_names(figures: Sequence[Picture]) -> list[str]:
    """A file name for each figure: its place and the plain letters of its title."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", figure.title.lower()).strip("-")[:60] or "figure" for figure in figures]
    return [f"{number:02d}-{slug}.png" for number, slug in enumerate(slugs, start=1)]


def _scope(frame: pd.DataFrame) -> dict[str, Any]:
    """What the page is about, in numbers."""
    figures = measured(frame)
    repeats = repetitions(frame).groupby(["benchmark", "method"])["seed"].nunique()
    return {
        "benchmarks": list(dict.fromkeys(figures["benchmark"])),
        "methods": list(dict.fromkeys(figures["method"])),
        "repeats": int(repeats.max()),
        "uneven": repeats.nunique() > 1,
        "unit": "class order" if figures.groupby("benchmark")["order"].nunique().max() > 1 else "seed",
        "records": len(figures),
        "measures_invariance": bool(figures["metric"].isin(["ekld", "few_ekld", "mean_ekld", "agreement"]).any()),
    }


def _facts(frame: pd.DataFrame, command: str) -> list[tuple[str, list[str]]]:
    """Where the figures come from: label and the distinct values."""
    versions: dict[str, set[str]] = {}
    seen: set[int] = set()
    for entry in frame["versions"]:
        if isinstance(entry, Mapping) and id(entry) not in seen:
            seen.add(id(entry))
            for name, version in entry.items():
                versions.setdefault(name, set()).add(str(version))
    cells = measured(frame).drop_duplicates(list(Cell._fields))
    minutes = cells["seconds"].sum() / 60
    facts = [
        ("Command", [command] if command else []),
        ("Commands of the records", _distinct(frame["command"])),
        ("Seeds", [", ".join(map(str, sorted(set(cells["seed"]))))]),
        ("Class orders", [", ".join(map(str, sorted(set(cells["order"].dropna())))) or ""]),
        ("Computing time", [f"{minutes:.1f} minutes over {len(cells)} cells"] if minutes > 0 else []),
        ("Configurations", _distinct(frame["config_digest"])),
        ("Data", [digest[:16] for digest in _distinct(frame["data_digest"])]),
        ("Source commit", _distinct(frame["commit"])),
        ("Versions", [f"{name} {', '.join(sorted(found))}" for name, found in sorted(versions.items())]),
    ]
    return [(label, values) for label, values in facts if any(values)]


def _distinct(column: pd.Series) -> list[str]:
    return [str(value) for value in dict.fromkeys(column.dropna()) if value]


def _failures(frame: pd.DataFrame) -> list[str]:
    """Cells that ended with an error and were not finished since."""
    done = finished_cells(frame)
    failed = frame[frame["metric"] == FAILED]
    lines = []
    for row in failed.itertuples(index=False):
        order = None if pd.isna(row.order) else int(row.order)
        if Cell(row.benchmark, row.config_digest, row.method, int(row.seed), order) not in done:
            where = "" if order is None else f"order {order}, "
            lines.append(f"{row.method} on {row.benchmark}, {where}seed {row.seed}: {row.group}")
    return lines
