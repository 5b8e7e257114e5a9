"""The manifest: a line for every image that was looked at, with where it went, or why it did not go anywhere.

At the end there is a line for each class that did not reach the target, kind "class", status "short".
"""

from __future__ import annotations

import itertools
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
    "kind": "string",  # original, generated, class
    "status": "string",  # kept, rejected, unusable, ignored; of a class: short
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

_TYPES = {"string": str, "int64": int, "float64": int | float}


def write_unit(path: Path, rows: Iterable[Row]) -> None:
    """The record of one finished unit of work, whole or not at all; it says that its images are written."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_unit(path: Path) -> list[Row]:
    """What `write_unit` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_manifest(out: Path, rows: Iterable[Row], *, chunk: int = 4096) -> None:
    """Write `manifest.jsonl` and, where pyarrow is installed, `manifest.parquet`; rows are held a chunk at a time.

    Args:
        out: the output folder.
        rows: in manifest order.
        chunk: rows held at a time; part of the Parquet file's bytes.
    """
    with atomic_write(out / "manifest.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: row.get(name) for name in COLUMNS}) + "\n")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    with atomic_write(out / "manifest.parquet") as temporary, pq.ParquetWriter(temporary, schema) as writer:
        written = map(_escaped, read_manifest(out))
        while part := list(itertools.islice(written, chunk)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


def _escaped(row: Row) -> Row:
    """The row with names of files and classes escaped where they are not UTF-8, which Parquet cannot hold."""
    return {name: utf8_text(value) if isinstance(value, str) else value for name, value in row.items()}


def read_manifest(out: Path) -> Iterator[dict[str, Any]]:
    """The rows of `out`/manifest.jsonl, one at a time.

    Raises:
        OutputError: a row is not one that `write_manifest` writes; the file was changed or cut.
    """
    path = out / "manifest.jsonl"
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                damaged = [name for name, kind in COLUMNS.items() if not isinstance(row[name], _TYPES[kind] | None)]
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged = ["row"]
            if damaged:
                raise OutputError(
                    f"{path} is damaged (line {number} has no fitting {damaged[0]}); export into another folder, or "
                    "delete this one"
                )
            yield row
