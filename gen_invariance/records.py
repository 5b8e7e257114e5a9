"""Measured results as append-only JSON lines.

A *cell* is one (benchmark, configuration, method, seed, class order); it gives one record for each metric and class.
Each process appends to a `records-*.jsonl` of its own in one folder, by a single `write` of whole lines on an
`O_APPEND` descriptor. That needs no lock and holds on network file systems, where appends of several machines to one
file may overwrite each other. A killed process may leave half a line at the end of its file, which readers skip. A
cell ends with a marker line, written in the same call after its records, that says how many they are. So a cell that
was cut short or damaged is known to be unfinished and can be run again. Where cells are measured twice the later
record counts: each line says when it was written, by the clock, or just after the latest line that is there where that
is of a clock ahead.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import sys
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
from pandas.api.types import is_numeric_dtype
from pydantic import AfterValidator, AllowInfNan, BeforeValidator, Field

from gen_invariance.errors import DataNotFoundError, SettingsError
from gen_invariance.files import cannot_write, open_regular, read_regular, utf8_text, write_text
from gen_invariance.run import package_versions, source_commit
from gen_invariance.settings import settings_class

_WRITTEN = re.compile(rb'"written": ([0-9.eE+]+)')
_NO_CLOCK = 1e15
FINISHED, FAILED = "finished", "failed"
"""Metrics of marker records: the last line of a cell, and a cell that ended with an error."""


def _escape_text(value: Any) -> Any:
    return utf8_text(value) if isinstance(value, str) else value


def _require_text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def _decode_value(value: Any) -> Any:
    """The opposite of what `_encode` does to numbers that JSON lacks."""
    if value is None:
        return math.nan
    return float(value) if value in ("inf", "-inf") else value


_Text = Annotated[str, BeforeValidator(_escape_text)]
_Name = Annotated[_Text, AfterValidator(_require_text)]
_Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Value = Annotated[float, AllowInfNan(), BeforeValidator(_decode_value)]


class Cell(NamedTuple):
    """What is measured in one go; `order` is None where the seed decides the class order, too."""

    benchmark: str
    config_digest: str
    method: str
    seed: int
    order: int | None = None


@settings_class("record")
class Record:
    """One measured figure and where it comes from.

    Attributes:
        benchmark: name of the data set and protocol.
        method: name of the arm.
        seed: of everything random, or, where there is an `order`, of the training alone; methods are paired by it.
        order: number of the class order (and with it of the images and of their draws), where it is numbered apart.
        metric: a key of `metrics.METRICS`, or any other name.
        value: the figure; NaN where it cannot be known (a class without test images).
        class_name: set on per-class figures.
        class_index: label of that class.
        class_count: its training images.
        group: "many", "medium", "few", or another set of classes.
        config_digest: `run.config_digest` of the settings without the seed.
        data_digest: digest of the long-tailed training images. Test images follow from the same settings and seed.
        command: what was typed.
        versions: of the libraries the figure depends on.
        commit: of the source.
        seconds: that the cell took.

    Raises:
        SettingsError: an empty benchmark, method or metric, or a value that is no number.
    """

    benchmark: _Name
    method: _Name
    seed: _Whole
    metric: _Name
    value: _Value
    order: _Whole | None = None
    class_name: _Text | None = None
    class_index: _Whole | None = None
    class_count: _Whole | None = None
    group: _Text | None = None
    config_digest: str = ""
    data_digest: str | None = ""
    command: _Text | None = ""
    versions: Mapping[str, Any] | None = field(default_factory=dict)
    commit: str | None = None
    seconds: float | None = None

    @property
    def cell(self) -> Cell:
        """What this record is a part of."""
        return Cell(self.benchmark, self.config_digest, self.method, self.seed, self.order)

    @property
    def key(self) -> tuple[Any, ...]:
        """What names this figure: two records of equal key are the same figure measured twice."""
        return *self.cell, self.metric, self.class_index, self.class_name, self.group


_COLUMNS = [entry.name for entry in fields(Record)]
_KEY = [*Cell._fields, "metric", "class_index", "class_name", "group"]


def provenance() -> dict[str, Any]:
    """The `command`, `versions` and `commit` of this process, for `Record(**provenance(), ...)`."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "versions": package_versions(), "commit": source_commit()}


class RecordWriter:
    """Appends records to a file of its own in `folder`; several writers may work in one folder at once.

    The file is made at the first write, and anew after a fork, so a writer can be passed to worker processes.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path: Path | None = None
        self._owner = 0
        self._seen: dict[str, tuple[int, float]] = {}  # of each file how far it was read, and its latest time

    def write(self, records: Record | Iterable[Record]) -> None:
        """Append `records` by one write: after a kill they are there up to some line, never a line in the middle.

        Raises:
            OutputError: read-only or full disk; what was half written is taken back.
        """
        records = [records] if isinstance(records, Record) else list(records)
        if records:
            written = self._next_time()
            self._append("".join(_encode(record, written) for record in records).encode())

    def _next_time(self) -> float:
        """The time to write beside a record: now, but after all that is there, for the later one counts."""
        latest = 0.0
        for file in self.folder.glob("records-*.jsonl"):
            start, known = self._seen.get(file.name, (0, 0.0))
            try:
                with open_regular(file) as opened:
                    opened.seek(start)
                    added = opened.read()
            except OSError:  # it is named when the records are read
                continue
            whole = added[: added.rfind(b"\n") + 1]
            known = max([known, *(_read_time(each) for each in _WRITTEN.findall(whole))])
            self._seen[file.name] = start + len(whole), known
            latest = max(latest, known)
        return max(time.time(), math.nextafter(latest, math.inf))

    def write_cell(self, records: Iterable[Record]) -> None:
        """Append all records of one cell and the marker that ends it.

        Raises:
            SettingsError: no record, records of several cells, or one figure twice.
            OutputError: read-only or full disk.
        """
        records = list(records)
        if len({record.cell for record in records}) != 1:
            raise SettingsError("write_cell takes the records of exactly one cell (benchmark, config, method, seed)")
        if len({record.key for record in records}) != len(records):
            raise SettingsError(f"cell {records[0].cell} gives one figure twice; name each (metric, class, group) once")
        self.write([*records, _make_marker(records[-1], FINISHED, value=len(records))])

    def write_failure(self, record: Record, error: BaseException) -> None:
        """Append that the cell of `record` ended with `error`; the cell stays unfinished.

        Raises:
            OutputError: read-only or full disk.
        """
        self.write(replace(_make_marker(record, FAILED, value=1), group=f"{type(error).__name__}: {error}"))

    def _append(self, content: bytes) -> None:
        if self.path is None or self._owner != os.getpid():
            self.path = self.folder / f"records-{uuid.uuid4().hex[:16]}.jsonl"
            self._owner = os.getpid()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, content)
                os.fsync(descriptor)
            except OSError as error:
                os.ftruncate(descriptor, before)  # this process alone writes here
                raise cannot_write(self.path, error) from error
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    """`os.write` may take less than it was given (a nearly full disk): go on, and let the next call say why."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _make_marker(record: Record, metric: str, *, value: float) -> Record:
    return replace(record, metric=metric, value=value, class_name=None, class_index=None, class_count=None, group=None)


def _encode(record: Record, written: float) -> str:
    row = asdict(record)
    if not math.isfinite(record.value):  # NaN and Infinity are not JSON
        row["value"] = None if math.isnan(record.value) else str(record.value)
    return json.dumps({**row, "written": written}, default=str) + "\n"


def load_records(folder: Path | str) -> pd.DataFrame:
    """All records of a folder, one row each, markers included.

    Figures measured twice (equal benchmark, config_digest, method, seed, metric, class and group) appear once, as
    last written. A half-written line at the end of a file is skipped; any other damaged line is named in a warning
    and skipped, so that its cell counts as unfinished.

    Args:
        folder: one that holds `records-*.jsonl`, one that holds such a folder called `records` (a measured run, a
            grid), or a single file.

    Raises:
        DataNotFoundError: no such file or folder.

    Example:
        >>> import tempfile
        >>> record = Record(benchmark="digits", method="ce", seed=0, metric="balanced_accuracy", value=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     RecordWriter(folder).write(record)
        ...     load_records(folder)[["method", "value"]].values.tolist()
        [['ce', 0.5]]
    """
    path = Path(folder).expanduser()
    if not path.exists():
        raise DataNotFoundError(f"no records at {path}; give the folder (or one .jsonl file) that a run wrote")
    if (path / "records").is_dir():
        path = path / "records"
    files = sorted(path.glob("records-*.jsonl")) if path.is_dir() else [path]
    rows = [row for file in files for row in _read_rows(file)]
    frame = pd.DataFrame(rows, columns=[*_COLUMNS, "written"]).sort_values("written", kind="stable")
    return _tidy(frame.drop(columns="written"))


def as_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Records in memory as the frame that `load_records` gives."""
    return _tidy(pd.DataFrame([vars(record) for record in records], columns=_COLUMNS))


def _read_time(value: Any) -> float:
    """When a line was written, in seconds; 0 where it says what no clock would."""
    try:
        seconds = float(value)
    except (ValueError, TypeError):
        return 0.0
    return seconds if 0 <= seconds < _NO_CLOCK else 0.0


def _read_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    lines = read_regular(file).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            record = Record(**{name: row[name] for name in _COLUMNS if name in row or name == "config_digest"})
            rows.append({**vars(record), "written": _read_time(row.get("written") or 0)})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number < len(lines):
                warnings.warn(
                    f"{file}, line {number} is damaged and left out; its cell counts as unfinished", stacklevel=3
                )
    return rows


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a key, the last one kept, with stable column types."""
    text = ["class_name", "group", "commit"]
    frame[text] = frame[text].astype(object).where(frame[text].notna(), None)
    kinds = {
        **dict.fromkeys(("value", "seconds"), "float64"),
        **dict.fromkeys(("order", "class_index", "class_count"), "Int64"),
        "seed": "int64",
    }
    return frame.astype(kinds).drop_duplicates(_KEY, keep="last").reset_index(drop=True)


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of `frame` that hold figures: markers of finished and failed cells are left out."""
    return frame[~frame["metric"].isin([FINISHED, FAILED])]


def row_cells(frame: pd.DataFrame) -> list[Cell]:
    """The cell of each row of records."""
    return [
        Cell(benchmark, digest, method, int(seed), None if pd.isna(order) else int(order))
        for benchmark, digest, method, seed, order in frame[list(Cell._fields)].itertuples(index=False)
    ]


def finished_cells(source: Path | str | pd.DataFrame) -> set[Cell]:
    """Cells of which every record is there, from a frame or from where `load_records` reads.

    A folder that does not exist has none: that is a run before its first cell.
    """
    if not isinstance(source, pd.DataFrame):
        if not Path(source).exists():
            return set()
        source = load_records(source)
    figures = Counter(row_cells(measured(source)))
    ended = source[source["metric"] == FINISHED]
    return {cell for cell, size in zip(row_cells(ended), ended["value"], strict=True) if figures[cell] >= size}


def write_csv(frame: pd.DataFrame, path: Path | str) -> None:
    """Write records or a summary as CSV, whole or not at all; mappings become JSON.

    Text that a spreadsheet would take for a formula, such as a class called "=1+1", gets an apostrophe in front.

    Raises:
        OutputError: read-only or full disk.
    """
    if "versions" in frame:
        frame = frame.assign(versions=[json.dumps(value, sort_keys=True, default=str) for value in frame["versions"]])
    text = {name: frame[name].map(_without_formula) for name in frame if not is_numeric_dtype(frame[name])}
    frame = frame.assign(**text).rename(columns=_without_formula)
    text = frame.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # which is not quoted by itself, and ends a line for many readers
        text = frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    write_text(path, text)


def _without_formula(value: object) -> object:
    if not isinstance(value, str) or not value.lstrip().startswith(("=", "+", "-", "@")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
