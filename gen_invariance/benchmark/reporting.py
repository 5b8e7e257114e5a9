"""Several measured runs, or the records of a grid, on one page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from gen_invariance.benchmark.records import load_records
from gen_invariance.errors import DataNotFoundError

if TYPE_CHECKING:
    from gen_invariance.benchmark.report import Figure


def _records_in(folder: Path) -> pd.DataFrame:
    frame = load_records(folder / "records" if (folder / "records").is_dir() else folder)
    if frame.empty:
        raise DataNotFoundError(f"no records in {folder}; run: gen-invariance measure run={folder}")
    return frame


def report_of(
    folders: Sequence[Path | str], out: Path | str, *, title: str, baseline: str | None, references: Collection[str]
) -> Path:
    """One page over the records of several measured runs.

    Raises:
        DataNotFoundError: a folder without records.
        DataError, SettingsError: records that must not be put together; see `write_report`.
    """
    from gen_invariance.benchmark.report import write_report

    if not folders:
        raise DataNotFoundError("records=[] names no folder; give one or more that measure wrote")
    frame = pd.concat([_records_in(Path(folder)) for folder in folders], ignore_index=True)
    return write_report(
        out,
        title=title,
        frame=frame,
        figures=figures_of(frame),
        command="gen-invariance report",
        baseline=baseline,
        references=references,
    )


def figures_of(frame: pd.DataFrame) -> list[Figure]:
    """Accuracy and invariance by class size, for each benchmark of `frame` that has figures by class."""
    from gen_invariance.benchmark.class_figures import accuracy_by_class, ekld_against_class_size
    from gen_invariance.benchmark.drawing import method_styles
    from gen_invariance.benchmark.report import Figure

    figures = []
    styles = method_styles(frame["method"].unique())
    for benchmark, rows in frame.groupby("benchmark", sort=False):
        for metric, draw, shows in (
            ("accuracy", accuracy_by_class, "Accuracy by class size"),
            ("ekld", ekld_against_class_size, "Invariance by class size"),
        ):
            if rows[rows["metric"] == metric]["value"].notna().any():
                name = f"{shows}: {benchmark}"
                alt = f"{shows} of each method on {benchmark}."
                figures.append(Figure(name, f"{shows}, all seeds.", alt, draw(rows, styles=styles)))
    return figures
