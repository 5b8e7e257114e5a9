"""A table in a file, its cells as they stand there: text in CSV, JSON objects by line, Arrow columns in Parquet.

Rows can be taken and one column replaced; nothing else changes on the way through. Other readers make numbers of cells,
and write them with fewer digits.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gen_invariance.errors import DataError, SettingsError, printable

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


class TableFile(ABC):
    """Rows and named columns."""

    columns: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """Its cells; None where there is none."""

    @abstractmethod
    def write(self, path: Path, rows: Sequence[int], changed: Mapping[str, Sequence[str]]) -> None:
        """These rows, with the cells of some columns replaced, in the way the table was written."""


def read_table(path: Path) -> TableFile:
    """The table in `path`, by its name's ending.

    Raises:
        DataError: damaged, not of this kind, or with two columns of one name.
        SettingsError: Parquet without pyarrow.
    """
    kind = {".parquet": ParquetTable, ".jsonl": JsonTable}.get(path.suffix.lower(), CsvTable)
    try:
        table = kind(path)
    except ImportError as error:
        raise SettingsError(
            'Parquet needs pyarrow: pip install "gen_invariance[export]", or give a CSV table'
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{printable(path)} is not UTF-8 (byte {error.start}); save it as UTF-8 (in Excel: 'CSV UTF-8')"
        ) from error
    except (ValueError, OSError, RecursionError) as error:  # pandas and pyarrow raise kinds of both for damaged files
        reason = printable(str(error).strip())[:200]
        raise DataError(f"{printable(path)} cannot be read as a table ({reason}); repair or convert it") from error
    double = next((name for name in table.columns if name and table.columns.count(name) > 1), None)
    if double is not None:
        raise DataError(f"{printable(path)} has two columns {double!r}; rename one")
    return table


class CsvTable(TableFile):
    """Comma, semicolon or tab between cells, as the first line says; UTF-8 or UTF-16, with a mark or without."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            head = file.read(1 << 16)
        marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
        self._encoding = next((name for mark, name in marks.items() if head.startswith(mark)), "utf-8")
        self._line_end = "\r\n" if b"\r\n" in head.replace(b"\0", b"") else "\n"
        with open(path, encoding=self._encoding, newline="") as file:
            first = file.readline(1 << 20)
        self._separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        rows = pd.read_csv(
            path, sep=self._separator, dtype=str, keep_default_na=False, header=None, encoding=self._encoding
        )
        self.columns = rows.iloc[0].fillna("").tolist()
        self._rows = rows.iloc[1:].fillna("").reset_index(drop=True)

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> list[Any]:
        """Its cells, as text."""
        return self._rows[self.columns.index(name)].tolist()

    def write(self, path: Path, rows: Sequence[int], changed: Mapping[str, Sequence[str]]) -> None:
        """With the separator, encoding and line ends of the original."""
        table = self._rows.iloc[list(rows)].copy()
        for name, cells in changed.items():
            table[self.columns.index(name)] = list(cells)
        odd = any("\r" in cell for column in table for cell in table[column])  # not quoted by itself
        table.to_csv(
            path,
            index=False,
            header=self.columns,
            sep=self._separator,
            encoding=self._encoding,
            lineterminator=self._line_end,
            quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL,
        )


class JsonTable(TableFile):
    """An object in each line; objects need not have the same keys."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8-sig")
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        self._rows = [_read_object(line, number) for number, line in lines]
        self.columns = list(dict.fromkeys(name for row in self._rows for name in row))

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> list[Any]:
        """Its values."""
        return [row.get(name) for row in self._rows]

    def write(self, path: Path, rows: Sequence[int], changed: Mapping[str, Sequence[str]]) -> None:
        """Each object with its own keys, in their order."""
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            for place, row in enumerate(rows):
                values = self._rows[row] | {name: cells[place] for name, cells in changed.items()}
                file.write(json.dumps(values, ensure_ascii=False) + "\n")


def _read_object(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} holds no object")
    return row


class ParquetTable(TableFile):
    """Columns keep their Arrow types, and the file what pandas and others wrote beside them."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        # `partitioning`: folders above the file, such as year=2024/, are no columns of it.
        self._table: pa.Table = pq.read_table(path, partitioning=None)
        self.columns = self._table.column_names

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> list[Any]:
        """Its values."""
        return self._table.column(name).to_pylist()

    def write(self, path: Path, rows: Sequence[int], changed: Mapping[str, Sequence[str]]) -> None:
        """With the schema of the original."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = self._table.take(list(rows))
        for name, cells in changed.items():
            place = table.column_names.index(name)
            field = table.schema.field(place)
            kind = field.type if pa.types.is_string(field.type) or pa.types.is_large_string(field.type) else pa.string()
            table = table.set_column(place, field.with_type(kind), pa.array(cells, kind))
        pq.write_table(table, path)
