"""A CSV, JSON-lines or Parquet table of image paths and labels; out come a table of the same columns, and images."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from gen_invariance.data.readers.tree import is_training_name, name_part
from gen_invariance.errors import DataError, DataNotFoundError, printable
from gen_invariance.export.formats.base import (
    RESERVED,
    Entry,
    FileFormat,
    Output,
    Row,
    path_key,
    sort_class_names,
    unique_keys,
)
from gen_invariance.export.formats.table_file import SUFFIXES, TableFile, read_table
from gen_invariance.files import atomic_write

_PART_COLUMNS = {"split", "partition", "subset", "part", "set", "phase", "usage", "fold", "dataset"}
_FLAG = re.compile(r"(?:is_?)?(train|training|test|testing|val|valid|validation)(?:_(?:image|set))?")
_TRUE, _FALSE = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no", ""}
_LONGEST = 80  # bytes of a part of a path that is made of a cell; the whole name may have 255


class TableFormat(FileFormat):
    """Paths are relative to the table's folder, or absolute. Further columns are kept; new rows copy their source's.

    A column that says which rows are for training (`find_parts_of_rows`) is obeyed: only those grow.

    Args:
        path: .csv, .tsv, .jsonl or .parquet.
        path_column, label_column: names of the two columns.
    """

    name = "table"

    def __init__(self, path: Path, *, path_column: str = "path", label_column: str = "label") -> None:
        self.path, self.path_column, self.label_column = path, path_column, label_column
        if not path.is_file():
            raise DataNotFoundError(
                f"{printable(path)} does not exist or is not a file; give a CSV, JSON or Parquet table"
            )
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{printable(path)}: a table must end in {', '.join(SUFFIXES)}; rename or convert it")
        if path.name in RESERVED:
            raise DataError(f"{printable(path)}: the export writes a file of that name beside the table; rename it")
        table = self._table()
        parts = find_parts_of_rows(table, (path_column, label_column), printable(path))
        labels = zip(parts, table.column(label_column), strict=True)
        self.class_names = sort_class_names(str(label) for part, label in labels if part == "train")

    def _table(self) -> TableFile:
        """The table, checked."""
        where, table = printable(self.path), read_table(self.path)
        for column in (self.path_column, self.label_column):
            if column not in table.columns:
                columns = ", ".join(repr(name) for name in table.columns[:8])
                raise DataError(
                    f"{where} has no column {column!r} (it has {columns}); name the columns with "
                    "path_column=... label_column=..."
                )
            for number, value in enumerate(table.column(column), 1):
                if value is None or str(value).strip() == "" or (isinstance(value, float) and math.isnan(value)):
                    raise DataError(f"{where}: row {number} has no {column}; fill it in or remove the row")
                if isinstance(value, dict | list | bytes):
                    raise DataError(f"{where}: column {column!r} holds nested values, not text; store paths and labels")
        if not len(table):
            raise DataError(f"{where} has no rows; add images")
        return table

    def entries(self) -> Sequence[Entry]:
        """One for each row."""
        table, labels = self._table(), self.labels
        paths = [str(path) for path in table.column(self.path_column)]
        parts = find_parts_of_rows(table, (self.path_column, self.label_column), printable(self.path))
        keys = unique_keys(path_key(Path(path)) for path in paths)
        rows = zip(keys, table.column(self.label_column), paths, parts, strict=True)
        return [
            Entry(key, labels.get(str(label), -1), (row, path, str(label)), part)
            for row, (key, label, path, part) in enumerate(rows)
        ]

    def image_file(self, entry: Entry) -> Path:
        """The file that a row points to; a path of Windows, with backslashes, is understood."""
        file = self.path.parent / entry.location[1]
        if "\\" in entry.location[1] and "\0" not in entry.location[1] and not file.exists():
            return self.path.parent / entry.location[1].replace("\\", "/")
        return file

    def file_name(self, entry: Entry, suffix: str | None) -> str:
        """images/CLASS/NAME-HASH, whatever the source's path is: paths may lead anywhere."""
        source = Path(entry.location[1].replace("\\", "/"))
        short = hashlib.sha256(entry.key.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        stem = f"images/{_safe_name(entry.location[2])}/{_safe_name(source.stem[:64])}-{short}"
        return f"{stem}{_safe_ending(source.suffix) if suffix is None else suffix}"

    def finish(self, output: Output, rows: Iterable[Row], entries: Mapping[str, Entry]) -> None:
        """The table: readable originals in their order, then the new images."""
        indices, paths = [], []
        for row in rows:
            entry = entries[row["source"]]
            indices.append(entry.location[0])
            paths.append(row["file"] or str(self.image_file(entry).resolve()))
        with atomic_write(output.folder / self.path.name) as temporary:
            self._table().write(temporary, indices, {self.path_column: paths})


class Columns(Protocol):
    """Rows with named columns."""

    columns: list[str]

    def __len__(self) -> int: ...

    def column(self, name: str) -> list[Any]:
        """Its cells."""


def find_parts_of_rows(table: Columns, taken: Sequence[str], where: str) -> list[str]:
    """The part of each row: "train", or what a column such as `split` says; all are "train" where there is none.

    Such a column is called split, subset, usage, ... and holds names of parts, of which one is for training; or it is
    called is_test, is_valid, train, ... and holds yes and no.

    Args:
        table: the rows.
        taken: columns of paths and labels, which are no such columns.
        where: the table, for messages.

    Raises:
        DataError: two columns say different things, or one has names of parts and none for training.
    """
    found: dict[str, list[str]] = {}
    for column in table.columns:
        if column in taken or not isinstance(column, str):
            continue
        values = [_plain(value) for value in table.column(column)]
        parts = _named_parts(column, values, where) or _flagged_parts(column, values)
        if parts is not None:
            found[column] = parts
    if len({tuple(part == "train" for part in parts) for parts in found.values()}) > 1:
        raise DataError(f"{where}: columns {', '.join(map(repr, found))} say differently which rows are for training")
    return next(iter(found.values()), ["train"] * len(table))


def _named_parts(column: str, values: Sequence[str], where: str) -> list[str] | None:
    different = {value for value in values if value}
    parts = {value for value in different if name_part(value)}
    named = column.strip().casefold() in _PART_COLUMNS
    if not parts or not (named or (parts == different and len(parts) > 1)):
        return None
    if not any(is_training_name(value) for value in parts):
        if len(parts) == len(different) == 1:
            return None  # the table of one part
        raise DataError(
            f"{where}: column {column!r} names parts ({', '.join(sorted(different)[:4])}) and none for training; call "
            "that train"
        )
    return [name_part(value) or value or "none" for value in values]


def _flagged_parts(column: str, values: Sequence[str]) -> list[str] | None:
    match = _FLAG.fullmatch(column.strip().casefold())
    words = {value.casefold() for value in values}
    if match is None or not words <= _TRUE | _FALSE or not words & _TRUE or not words & _FALSE:
        return None
    yes, no = ("train", "test") if is_training_name(match[1]) else (match[1], "train")
    return [yes if value.casefold() in _TRUE else no for value in values]


def _plain(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _safe_name(text: str) -> str:
    """`text` as one path part that no file system reads as more; different texts stay different."""
    name = quote(text, safe=" ()[]+,=@&", errors="surrogateescape")
    name = name.replace(".", "%2E") if name.startswith(".") else name or "%"
    if len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{re.sub('%[0-9A-F]?$', '', name[:_LONGEST])}-{digest}"


def _safe_ending(suffix: str) -> str:
    """The end of a file's name, where it is an ordinary one."""
    return suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,10}", suffix) else ""
