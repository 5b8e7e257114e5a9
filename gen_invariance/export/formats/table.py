"""A CSV, JSON-lines or Parquet table of image paths and labels; out come a table of the same columns, and images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from gen_invariance.errors import DataError, DataNotFoundError, SettingsError, printable
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
from gen_invariance.files import atomic_write

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


class TableFormat(FileFormat):
    """Paths are relative to the table's folder, or absolute. Further columns are kept; new rows copy their source's.

    Args:
        path: .csv, .tsv, .jsonl or .parquet.
        path_column, label_column: names of the two columns.
    """

    name = "table"

    def __init__(self, path: Path, *, path_column: str = "path", label_column: str = "label") -> None:
        self.path, self.path_column, self.label_column = path, path_column, label_column
        self._suffix = path.suffix.lower()
        self._separator = "\t" if self._suffix == ".tsv" else ","
        if not path.is_file():
            raise DataNotFoundError(
                f"{printable(path)} does not exist or is not a file; give a CSV, JSON or Parquet table"
            )
        if self._suffix not in _SUFFIXES:
            raise DataError(f"{printable(path)}: a table must end in {', '.join(_SUFFIXES)}; rename or convert it")
        if path.name in RESERVED:
            raise DataError(f"{printable(path)}: the export writes a file of that name beside the table; rename it")
        self.class_names = sort_class_names(self._table()[label_column].map(str))

    def _table(self) -> pd.DataFrame:
        """The table, checked."""
        where, table = printable(self.path), self._read_table()
        for column in (self.path_column, self.label_column):
            if column not in table.columns:
                columns = ", ".join(map(str, table.columns[:8]))
                raise DataError(
                    f"{where} has no column {column!r} (it has {columns}); name the columns with "
                    "path_column=... label_column=..."
                )
            empty = table[column].isna() | table[column].map(lambda value: str(value).strip() == "").astype(bool)
            if empty.any():
                raise DataError(f"{where}: row {int(empty.argmax()) + 1} has no {column}; fill it in or remove the row")
            if table[column].map(lambda value: isinstance(value, dict | list | bytes)).any():
                raise DataError(f"{where}: column {column!r} holds nested values, not text; store paths and labels")
        if not len(table):
            raise DataError(f"{where} has no rows; add images")
        return table

    def _read_table(self) -> pd.DataFrame:
        try:
            if self._suffix == ".parquet":
                return pd.read_parquet(self.path)
            if self._suffix == ".jsonl":
                return pd.read_json(self.path, lines=True, dtype=False)
            return pd.read_csv(self.path, sep=self._separator, dtype=str, keep_default_na=False)
        except ImportError as error:
            raise SettingsError(
                'Parquet needs pyarrow: pip install "gen_invariance[export]", or give a CSV table'
            ) from error
        except (ValueError, OSError) as error:  # pandas and pyarrow raise kinds of both for damaged files
            reason = printable(str(error).strip())[:200]
            raise DataError(
                f"{printable(self.path)} cannot be read as a table ({reason}); repair or convert it"
            ) from error

    def entries(self) -> Sequence[Entry]:
        """One for each row."""
        table = self._table()
        paths = table[self.path_column].map(str)
        labels = table[self.label_column].map(str).map(self.labels)
        keys = unique_keys(path_key(Path(path)) for path in paths)
        return [
            Entry(key, label, (row, path))
            for row, (key, label, path) in enumerate(zip(keys, labels.tolist(), paths, strict=True))
        ]

    def image_file(self, entry: Entry) -> Path:
        """The file that a row points to."""
        return self.path.parent / entry.location[1]

    def file_name(self, entry: Entry, suffix: str | None) -> str:
        """images/CLASS/NAME-HASH, whatever the source's path is: paths may lead anywhere."""
        source = Path(entry.location[1])
        short = hashlib.sha256(entry.key.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        stem = f"images/{_safe_name(self.class_names[entry.label])}/{_safe_name(source.stem[:64])}-{short}"
        return f"{stem}{source.suffix if suffix is None else suffix}"

    def finish(self, output: Output, rows: Iterable[Row], entries: Mapping[str, Entry]) -> None:
        """The table: readable originals in their order, then the new images."""
        indices, paths = [], []
        for row in rows:
            entry = entries[row["source"]]
            indices.append(entry.location[0])
            paths.append(row["file"] or str(self.image_file(entry).resolve()))
        table = self._table().iloc[indices].reset_index(drop=True)
        table[self.path_column] = paths
        with atomic_write(output.folder / self.path.name) as temporary:
            if self._suffix == ".parquet":
                table.to_parquet(temporary, index=False)
            elif self._suffix == ".jsonl":
                table.to_json(temporary, orient="records", lines=True, force_ascii=False)
            else:
                table.to_csv(temporary, index=False, sep=self._separator)


def _safe_name(text: str) -> str:
    """`text` as one path part that no file system reads as more; different texts stay different."""
    name = quote(text, safe=" ()[]+,=@&", errors="surrogateescape")
    return name.replace(".", "%2E") if name.startswith(".") else name or "%"
