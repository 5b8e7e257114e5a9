"""The manifest: a line for every image that was looked at, with where it went, or why it did not go anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gen_invariance.errors import OutputError
from gen_invariance.export.formats.base import Row
from gen_invariance.files import atomic_write, utf8_text, write_text

COLUMNS: dict[str, str] = {
    "file": "string",  # in the output; empty when not written
    "source": "string",  # key of the original within the set
    "class": "string",
    "label": "int64",
    "part": "string",  # train, test
    "kind": "string",  # original, generated
    "status": "string",  # kept, rejected, unusable, ignored
    "reason": "string",
    "copy": "int64",  # number of the draw for this source; -1 for originals
    "draw_seed": "string",  # hexadecimal seed of the draw
    "strength": "float64",  # mean absolute difference to the source, in [0, 1]
    "quality": "float64",  # distance outside the range of the originals, see `units.outside`; 0 is inside
    "translator": "string",  # SHA-256 of its weights and settings
    "width": "int64",
    "height": "int64",
    "sha256": "string",  # of the encoded image, or of its pixels
}
"""Name and Arrow type of each column."""


def write_unit(path: Path, rows: Iterable[Row]) -> None:
    """The record of one finished unit of work, whole or not at all; it says that its images are written."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_unit(path: Path) -> list[Row]:
    """What `write_unit` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def public(row: Row) -> dict[str, Any]:
    """The columns of a row."""
    return {name: row.get(name) for name in COLUMNS}


def write_manifest(out: Path, rows: Iterable[Row], *, chunk: int = 4096) -> list[Path]:
    """Write `manifest.jsonl` and, where pyarrow is installed, `manifest.parquet`; rows are held a chunk at a time.

    Args:
        out: the output folder.
        rows: in manifest order.
        chunk: rows held at a time; part of the Parquet file's bytes.
    """
    path = out / "manifest.jsonl"
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(public(row)) + "\n" for row in rows)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return [path]
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    table = out / "manifest.parquet"
    with atomic_write(table) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for part in _chunks(read_manifest(out), chunk):
            writer.write_table(pa.Table.from_pylist([_utf8(row) for row in part], schema=schema))
    return [path, table]


def read_manifest(out: Path) -> Iterator[dict[str, Any]]:
    """The rows of `out`/manifest.jsonl, one at a time.

    Raises:
        OutputError: a row is not one that `write_manifest` writes; the file was changed or cut.
    """
    path = out / "manifest.jsonl"
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield _row(line, path, number)
    except UnicodeDecodeError as error:
        raise _damaged(path, "not UTF-8") from error


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"line {number} is not JSON") from error
    kinds = {"string": str, "int64": int, "float64": (int, float)}
    if not isinstance(row, dict) or COLUMNS.keys() - row.keys():
        raise _damaged(path, f"line {number} is not a row of it")
    for name, kind in COLUMNS.items():
        if row[name] is not None and not isinstance(row[name], kinds[kind]):
            raise _damaged(path, f"line {number} has no fitting {name}")
    return row


def _damaged(path: Path, reason: str) -> OutputError:
    return OutputError(f"{path} is damaged ({reason}); export into another folder, or delete this one")


def _utf8(row: Row) -> Row:
    """The row with names of files and classes escaped where they are not UTF-8, which Parquet cannot hold."""
    return {name: utf8_text(value) if isinstance(value, str) else value for name, value in row.items()}


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    part: list[Row] = []
    for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
