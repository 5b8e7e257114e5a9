"""A CSV, JSON-lines or Parquet table of image paths and labels; out come a table of the same columns, and images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from gen_invariance.errors import DataError, DataNotFoundError, SettingsError
from gen_invariance.errors import printable as shown
from gen_invariance.export.formats.base import Entry, Finish, Row, Stored, in_order, unique_keys
from gen_invariance.export.formats.folder import key_of, place_files, read_regular
from gen_invariance.files import atomic_write

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


class TableForm:
    """Paths are relative to the table's folder, or absolute. Further columns are kept; new rows copy their source's.

    Args:
        path: .csv, .tsv, .jsonl or .parquet.
        path_column, label_column: names of the two columns.
    """

    name = "table"
    keeps_size = False
    copied_whole = ""

    def __init__(self, path: Path, *, path_column: str = "path", label_column: str = "label") -> None:
        self.path, self.path_column, self.label_column = path, path_column, label_column
        if not path.is_file():
            raise DataNotFoundError(f"{shown(path)} does not exist or is not a file; give a CSV, JSON or Parquet table")
        if path.suffix.lower() not in _SUFFIXES:
            raise DataError(f"{shown(path)}: a table must end in {', '.join(_SUFFIXES)}; rename or convert it")
        self.class_names = in_order(self._table()[label_column].map(str))

    def _table(self) -> pd.DataFrame:
        """The table, checked."""
        where = shown(self.path)
        table = self._read()
        for column in (self.path_column, self.label_column):
            if column not in table.columns:
                found = ", ".join(map(str, table.columns[:8]))
                raise DataError(
                    f"{where} has no column {column!r} (it has {found}); name the columns with "
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

    def _read(self) -> pd.DataFrame:
        try:
            if self.path.suffix.lower() == ".parquet":
                return pd.read_parquet(self.path)
            if self.path.suffix.lower() == ".jsonl":
                return pd.read_json(self.path, lines=True, dtype=False)
            return pd.read_csv(self.path, sep=self._separator(), dtype=str, keep_default_na=False)
        except ImportError as error:
            raise SettingsError(
                'Parquet needs pyarrow: pip install "gen_invariance[export]", or give a CSV table'
            ) from error
        except (ValueError, OSError) as error:  # pandas and pyarrow raise kinds of both for damaged files
            reason = shown(str(error).strip())[:200]
            raise DataError(f"{shown(self.path)} cannot be read as a table ({reason}); repair or convert it") from error

    def _separator(self) -> str:
        return "\t" if self.path.suffix.lower() == ".tsv" else ","

    def entries(self) -> Sequence[Entry]:
        """One for each row."""
        table = self._table()
        paths = [str(value) for value in table[self.path_column]]
        numbers = {name: label for label, name in enumerate(self.class_names)}
        return [
            Entry(key, numbers[str(label)], (row, path))
            for row, (key, path, label) in enumerate(
                zip(unique_keys(map(_key, paths)), paths, table[self.label_column], strict=True)
            )
        ]

    def read(self, entry: Entry) -> bytes:
        """The bytes of the file the row points to."""
        return read_regular(self._source(entry))

    def _source(self, entry: Entry) -> Path:
        return self.path.parent / entry.place[1]

    def file_of(self, entry: Entry, stem: str | None) -> str:
        """images/CLASS/NAME-HASH, whatever the source's path is: paths may lead anywhere."""
        source = Path(entry.place[1])
        short = hashlib.sha256(entry.key.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        folder = safe_name(self.class_names[entry.label])
        name = safe_name(source.stem[:64])
        return f"images/{folder}/{name}-{short}" + (source.suffix if stem is None else f"{stem}.png")

    def store(self, out: Path, state: Path, unit: str, items: Sequence[Stored], *, originals: str) -> None:
        """One file for each image."""
        place_files(out, items, originals=originals, source_of=self._source)

    def finish(self, work: Finish) -> None:
        """The table: readable originals in their order, then the new images."""
        table = self._table()
        rows, paths = [], []
        for row in work.rows():
            if row["status"] != "kept":
                continue
            entry = work.entries[row["source"]]
            rows.append(entry.place[0])
            paths.append(row["file"] or str(self._source(entry).resolve()))
        result = table.iloc[rows].reset_index(drop=True)
        result[self.path_column] = paths
        with atomic_write(work.out / self.path.name) as temporary:
            if self.path.suffix.lower() == ".parquet":
                result.to_parquet(temporary, index=False)
            elif self.path.suffix.lower() == ".jsonl":
                result.to_json(temporary, orient="records", lines=True, force_ascii=False)
            else:
                result.to_csv(temporary, index=False, sep=self._separator())

    def manifest_file(self, row: Row, number: int) -> str:
        """The file's name."""
        return row["file"]

    def read_back(self, out: Path, row: Row) -> bytes:
        """The written file."""
        return (out / row["file"]).read_bytes()


def safe_name(text: str) -> str:
    """`text` as one path part that no file system reads as more; different texts stay different."""
    name = quote(text, safe=" ()[]+,=@&", errors="surrogateescape")
    return name.replace(".", "%2E") if name.startswith(".") else name or "%"


def _key(path: str) -> str:
    return key_of(Path(path))
