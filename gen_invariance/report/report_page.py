"""One self-contained HTML page of a benchmark, with its pictures, records and tables beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from gen_invariance.errors import DataError
from gen_invariance.files import remove_leftovers, write_text
from gen_invariance.records import FAILED, Cell, finished_cells, measured, row_cells, write_csv
from gen_invariance.report.class_figures import class_pictures
from gen_invariance.report.drawing import save_png
from gen_invariance.report.pages import Picture, write_page
from gen_invariance.report.runs import describe_sources, find_method, merge_sources, read_sources
from gen_invariance.report.settings import ReportSettings
from gen_invariance.report.summary import Results, prepare_results
from gen_invariance.report.tables import Table, class_tables, method_tables, to_latex, to_markdown


def write_report(
    records: pd.DataFrame | Path | str | Sequence[Path | str],
    out: Path | str,
    settings: ReportSettings | None = None,
    *,
    pictures: Sequence[Picture] | None = None,
    notes: Sequence[str] = (),
    gains: Sequence[Table] = (),
    command: str = "",
) -> Path:
    """Write `report.html` into the folder `out` and return its path.

    Beside it: `records.csv`, `summary.csv`, `table.md`, `table.tex` (needs booktabs) and `figures/*.png`. The page
    needs none of them, no network and no server. Every file is written whole or not at all, the page last.

    Args:
        records: a frame, from `load_records` or `as_frame`; or one folder or several, of measured runs or of records.
            Runs are labelled by the settings in which they differ; those that differ by the seed alone are
            repetitions of one method.
        out: created when missing; a report that is there is replaced.
        settings: title, baseline and the like.
        pictures: shown in this order; None draws accuracy and invariance by class size.
        notes: paragraphs of plain text on what is shown and what not to conclude from it.
        gains: from `gains.gain_tables`; shown behind the methods, and written as `gains.md`.
        command: what makes this report again; commands of the records are listed as well.

    Raises:
        DataNotFoundError: a folder without records.
        DataError: no record, or records that must not be averaged (see `summarise`).
        SettingsError: a baseline or reference that has no record.
        OutputError: read-only or full disk.

    Example:
        >>> import tempfile
        >>> from gen_invariance.records import Record, as_frame
        >>> record = Record(benchmark="digits", method="ce", seed=0, metric="balanced_accuracy", value=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(as_frame([record]), folder, ReportSettings(title="Digits")).name
        'report.html'
    """
    out, settings = Path(out), settings or ReportSettings()
    if not isinstance(records, pd.DataFrame):
        sources = read_sources([records] if isinstance(records, Path | str) else records)
        records = merge_sources(sources)
        notes = [*notes, *describe_sources(sources, records)]
        baseline = settings.baseline
        settings = replace(
            settings,
            baseline=None if baseline is None else find_method(baseline, sources, "baseline"),
            references=tuple(find_method(name, sources, "references") for name in settings.references),
        )
    if settings.config_digest is not None:
        records = records[records["config_digest"] == settings.config_digest]
    if measured(records).empty:
        raise DataError("a report needs at least one record, got none; run the benchmark first")
    results = prepare_results(records, baseline=settings.baseline, level=settings.level)
    tables = method_tables(results, references=settings.references)
    pictures = class_pictures(records, level=settings.level) if pictures is None else pictures

    remove_leftovers(out)
    for name, picture in zip(_file_names(pictures), pictures, strict=True):
        save_png(out / "figures" / name, picture.png)
    write_csv(records, out / "records.csv")
    write_csv(results.summary, out / "summary.csv")
    write_text(out / "table.md", to_markdown(tables))
    write_text(out / "table.tex", to_latex(tables))
    if gains:
        write_text(out / "gains.md", to_markdown(gains))
    return write_page(
        "report.html.j2",
        out / "report.html",
        title=settings.title,
        notes=notes,
        tables=tables,
        gains=gains,
        class_tables=class_tables(results),
        figures=pictures,
        facts=_facts(records, command),
        failures=_failures(records),
        scope=_describe_scope(records, results),
        references=settings.references,
        level=f"{settings.level:.0%}",
    )


def _file_names(pictures: Sequence[Picture]) -> list[str]:
    """A file name for each picture: its number and the plain letters of its title."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", picture.title.lower()).strip("-")[:60] or "figure" for picture in pictures]
    return [f"{number:02d}-{slug}.png" for number, slug in enumerate(slugs, start=1)]


def _describe_scope(frame: pd.DataFrame, results: Results) -> dict[str, Any]:
    """What the page is about, in numbers."""
    frame = measured(frame)
    repeats = results.figures.groupby(["benchmark", "method"])["seed"].nunique()
    return {
        "benchmarks": list(dict.fromkeys(frame["benchmark"])),
        "methods": list(dict.fromkeys(frame["method"])),
        "repeats": int(repeats.max()),
        "uneven": repeats.nunique() > 1,
        "unit": "class order" if frame.groupby("benchmark")["order"].nunique().max() > 1 else "seed",
        "records": len(frame),
        "measures_invariance": bool(frame["metric"].isin(["ekld", "few_ekld", "mean_ekld", "agreement"]).any()),
    }


def _facts(frame: pd.DataFrame, command: str) -> list[tuple[str, list[str]]]:
    """Where the figures come from: label and the distinct values."""
    cells = measured(frame).drop_duplicates(list(Cell._fields))
    versions: dict[str, set[str]] = {}
    for entry in cells["versions"]:
        for name, version in entry.items() if isinstance(entry, Mapping) else ():
            versions.setdefault(name, set()).add(str(version))
    minutes = cells["seconds"].sum() / 60
    facts = [
        ("Command", [command]),
        ("Commands of the records", _distinct(frame["command"])),
        ("Seeds", [", ".join(map(str, sorted(set(cells["seed"]))))]),
        ("Class orders", [", ".join(map(str, sorted(set(cells["order"].dropna()))))]),
        ("Computing time", [f"{minutes:.1f} minutes over {len(cells)} cells"] if minutes > 0 else []),
        ("Configurations", _distinct(frame["config_digest"])),
        ("Data", [digest[:16] for digest in _distinct(frame["data_digest"])]),
        ("Source commit", _distinct(frame["commit"])),
        ("Versions", [f"{name} {', '.join(sorted(several))}" for name, several in sorted(versions.items())]),
    ]
    return [(label, values) for label, values in facts if any(values)]


def _distinct(column: pd.Series) -> list[str]:
    return [str(value) for value in dict.fromkeys(column.dropna()) if value]


def _failures(frame: pd.DataFrame) -> list[str]:
    """Cells that ended with an error and were not finished since."""
    done, failed = finished_cells(frame), frame[frame["metric"] == FAILED]
    lines = []
    for cell, error in zip(row_cells(failed), failed["group"], strict=True):
        if cell not in done:
            where = "" if cell.order is None else f"order {cell.order}, "
            lines.append(f"{cell.method} on {cell.benchmark}, {where}seed {cell.seed}: {error}")
    return lines
