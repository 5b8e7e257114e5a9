"""Hugging Face data sets on disk: `save_to_disk` folders and Parquet with images inside, by the `datasets` library.

Needs the extra `hf`. A folder with `metadata.csv` or `.jsonl`, and one of class folders (`imagefolder`), are the
formats "table" and "folder"; `open_dataset` tells them apart. Nothing is fetched, and no code of a data set is run.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gen_invariance.data.readers.pictures import MOST_BYTES, UnusablePictureError
from gen_invariance.errors import DataError, DataNotFoundError, SettingsError, printable
from gen_invariance.export.formats.base import (
    Entry,
    Format,
    Output,
    Row,
    Stored,
    row_number,
    sort_class_names,
)
from gen_invariance.export.formats.folder import FolderFormat
from gen_invariance.export.formats.hub_files import describe_file, find_data_files
from gen_invariance.export.formats.table import TableFormat, find_parts_of_rows
from gen_invariance.files import atomic_write, cannot_write, read_regular, write_text

try:
    import datasets
    import pyarrow as pa
except ImportError as missing:
    raise SettingsError(
        'Hugging Face data sets need the library datasets: pip install "gen_invariance[hf]"'
    ) from missing

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SHARD_BYTES = 500_000_000  # as the library cuts its own files
_LABEL_TYPES = ("int", "uint", "string", "large_string", "bool")


def open_dataset(path: Path, *, image_column: str | None = None, label_column: str = "label") -> Format:
    """The format that fits what lies in `path`: saved Arrow files, Parquet, a metadata table, or class folders.

    Args:
        path: a folder, or a .parquet file.
        image_column: where there is more than one column of images; else it is found.
        label_column: class numbers or names; where there is no such column, the only `ClassLabel` serves.
    """
    if not path.exists():
        raise DataNotFoundError(f"{printable(path)} does not exist; give a folder of save_to_disk, or of Parquet files")
    table = next((path / name for name in _METADATA if (path / name).is_file()), None)
    if table is not None:
        return TableFormat(table, path_column="file_name", label_column=label_column)
    if path.is_dir() and not _is_saved(path) and next(path.rglob("*.parquet"), None) is None:
        inner = next((file for name in _METADATA for file in path.glob(f"*/{name}")), None)
        if inner is not None:
            raise DataError(
                f"{printable(path)} keeps its metadata by part ({inner.relative_to(path)}); give one part: "
                f"{inner.parent}"
            )
        return FolderFormat(path)
    return HuggingFaceFormat(path, image_column=image_column, label_column=label_column)


class HuggingFaceFormat(Format):
    """A `Dataset` or `DatasetDict`. The split "train" grows; other splits are taken over.

    New rows copy the other columns of their source. Readable originals come first, in their order. Parquet is unpacked
    into the cache of `datasets` (`HF_DATASETS_CACHE`), as by `load_dataset`; saved Arrow files are read in place.

    Args:
        path: a folder that `save_to_disk` wrote, a folder of Parquet files, or one of these.
        image_column, label_column: see `open_dataset`.
    """

    name = "huggingface"

    def __init__(self, path: Path, *, image_column: str | None = None, label_column: str = "label") -> None:
        self.path = path
        self._parts, self._has_one_part = _load(path)
        if "train" not in self._parts:
            raise DataError(
                f"{printable(path)} has no split 'train' (it has {', '.join(self._parts)}); name it so, or give "
                "the folder of one split"
            )
        train = self._parts["train"]
        self.image_column = _image_column(train, image_column, path)
        self.label_column = _label_column(train, label_column, path)
        for part, rows in self._parts.items():
            for column in (self.image_column, self.label_column):
                if column not in rows.column_names:
                    raise DataError(
                        f"{printable(path)}: split {part!r} has no column {column!r}, the split 'train' has"
                    )
        feature = train.features[self.label_column]
        self._coded = isinstance(feature, datasets.ClassLabel)
        self.class_names = tuple(feature.names) if self._coded else self._names_in_rows()
        self._arrow = {part: rows.with_format("arrow") for part, rows in self._parts.items()}
        self._written_rows: dict[str, np.ndarray] = {}  # of each part: where the output has an original row

    def __reduce__(self) -> tuple[Any, ...]:
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        return partial(type(self), self.path, **columns), ()

    def _names_in_rows(self) -> tuple[str, ...]:
        names = sort_class_names(str(value) for value in self._labels("train") if value not in (None, ""))
        if not names:
            raise DataError(f"{printable(self.path)}: column {self.label_column!r} holds no label; fill it in")
        return names

    def _labels(self, part: str) -> list[Any]:
        return self._parts[part].data.column(self.label_column).to_pylist()

    def entries(self) -> Sequence[Entry]:
        """One for each row. Training rows without a label are left out; in other splits they are taken over."""
        labels = {str(label): label for label in self.labels.values()} if self._coded else self.labels
        entries = []
        for split in self._parts:
            for row, (value, part) in enumerate(zip(self._labels(split), self._parts_of_rows(split), strict=True)):
                label = labels.get(str(value), -1)
                ignored = "has no label" if part == "train" and label < 0 else ""
                entries.append(Entry(f"{split}/{row}", label, (split, row), part, ignored))
        return entries

    def _parts_of_rows(self, split: str) -> list[str]:
        """The part of each row of a split: where "train" is the only one, a column may keep rows for testing."""
        rows = self._parts[split]
        if len(self._parts) > 1:
            return [split] * len(rows)
        return find_parts_of_rows(_Columns(rows), (self.image_column, self.label_column), printable(self.path))

    def read(self, entry: Entry) -> bytes:
        """The encoded image: from its row, or from the file that its row names."""
        part, row = entry.location
        return self._image_in(self._arrow[part][row])

    def _image_in(self, row: pa.Table) -> bytes:
        value = row.column(self.image_column)[0].as_py()
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is None and path is None:
            raise UnusablePictureError("its row holds no image")
        return content if content is not None else read_regular(self.path.parent / path, most=MOST_BYTES)

    def file_name(self, entry: Entry, suffix: str | None) -> str:
        """No file, but the name that a new image carries in its row."""
        part, row = entry.location
        return "" if suffix is None else f"{part}-{row}{suffix}"

    def holds_unit(self, output: Output, unit: str, rows: Sequence[Row]) -> bool:
        """Whether the rows of new images are in the working folder."""
        is_new = any(row["kind"] == "generated" for row in rows)
        return not is_new or (output.state / "rows" / f"{unit}.arrow").is_file()

    def holds_image(self, out: Path, row: Row) -> bool:
        """Not asked of single rows: whoever reads the set again is told of a missing file."""
        return True

    def store_new(self, output: Output, unit: str, items: Sequence[Stored]) -> None:
        """The unit's new rows as one Arrow file in the working folder."""
        rows = self._arrow["train"][[item.entry.location[1] for item in items]]
        index = rows.column_names.index(self.image_column)
        field = rows.schema.field(index)
        images = [{"bytes": item.content, "path": item.file} for item in items]
        if not pa.types.is_struct(field.type):
            images = [item.content for item in items]
        rows = rows.set_column(index, field, pa.array(images, field.type))
        with atomic_write(output.state / "rows" / f"{unit}.arrow") as temporary:
            _write_stream(temporary, rows.schema, [rows])

    def finish(self, output: Output, rows: Iterable[Row], entries: Mapping[str, Entry]) -> None:
        """The whole set, written in the working folder and then moved into place."""
        kept: dict[str, list[int]] = {part: [] for part in self._parts}
        for row in rows:
            if row["kind"] == "original":
                part, number = entries[row["source"]].location
                kept[part].append(number)
        parts = {}
        for part, numbers in kept.items():
            parts[part] = self._parts[part].select(numbers)
            self._written_rows[part] = np.cumsum(np.bincount(numbers, minlength=len(self._parts[part]))) - 1
        if output.originals == "reference":
            parts = {"train": parts["train"].select([])}
        self._first_new = len(parts["train"])
        parts["train"] = _with_new_rows(parts["train"], output.state)
        self._written = parts["train"].with_format("arrow")
        final = output.state / "final"
        shutil.rmtree(final, ignore_errors=True)
        try:
            with _no_progress_bars():
                self._save(parts, final)
            for file in sorted(path for path in final.rglob("*") if path.is_file()):
                target = output.folder / file.relative_to(final)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        except OSError as error:
            raise cannot_write(output.folder, error) from error

    def _save(self, parts: Mapping[str, datasets.Dataset], final: Path) -> None:
        final.mkdir(parents=True)
        if _is_saved(self.path):
            whole = parts["train"] if self._has_one_part else datasets.DatasetDict(parts)
            whole.save_to_disk(final)
        elif self._has_one_part:
            parts["train"].to_parquet(final / self.path.name)
            write_text(
                final / "README.md", describe_file(self.path.name)
            )  # else `load_dataset` reads the manifest, too
        else:
            (final / "data").mkdir()
            for part, rows in parts.items():
                count = 1 + rows.data.nbytes // _SHARD_BYTES
                for index in range(count):
                    shard = rows.shard(count, index, contiguous=True)
                    shard.to_parquet(final / "data" / f"{part}-{index:05d}-of-{count:05d}.parquet")

    def manifest_file(self, row: Row, index: int) -> str:
        """SPLIT/ROW of the finished output."""
        if row["kind"] == "generated":
            return f"train/{self._first_new + index}"
        part = row["source"].partition("/")[0]
        return f"{part}/{self._written_rows[part][row_number(row['source'])]}"

    def read_back(self, out: Path, row: Row) -> bytes:
        """The image in its row."""
        return self._image_in(self._written[row_number(row["file"])])


class _Columns:
    """Columns of text, numbers and truth values."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self._rows = rows
        plain = ("string", "large_string", "bool", "int8", "int32", "int64", "uint8")
        self.columns = [
            name
            for name, feature in rows.features.items()
            if isinstance(feature, datasets.Value) and feature.dtype in plain
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> list[Any]:
        """Its cells."""
        return self._rows.data.column(name).to_pylist()


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote `path`."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _load(path: Path) -> tuple[dict[str, datasets.Dataset], bool]:
    """The splits, and whether there is only one, without a name."""
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise DataError(f"{printable(path)} is no Parquet file; give one, or a folder of save_to_disk")
    try:
        with _no_progress_bars():
            if _is_saved(path):
                loaded = datasets.load_from_disk(path)
            elif path.is_file():
                loaded = datasets.load_dataset("parquet", data_files={"train": [glob.escape(str(path))]})["train"]
            else:
                loaded = datasets.load_dataset("parquet", data_dir=str(path), data_files=find_data_files(path))
    except DataError:
        raise
    except Exception as error:  # the library hands on what pyarrow, json and fsspec raise
        reason = printable(str(error.__cause__ or error).strip() or type(error).__name__)[:200]
        raise DataError(
            f"{printable(path)} cannot be read as a Hugging Face data set ({reason}); save it again, or give "
            "another path"
        ) from error
    return ({"train": loaded}, True) if isinstance(loaded, datasets.Dataset) else (dict(loaded), False)


def _image_column(rows: datasets.Dataset, wanted: str | None, path: Path) -> str:
    columns = [name for name, feature in rows.features.items() if _holds_images(feature)]
    if wanted is not None and wanted not in columns:
        raise DataError(f"{printable(path)}: no column {wanted!r} of images; these hold images: {', '.join(columns)}")
    if wanted is None and len(columns) != 1:
        problem = f"columns {', '.join(columns)} hold images" if columns else "no column holds encoded images"
        raise DataError(f"{printable(path)}: {problem} (of {', '.join(rows.column_names)}); set image_column=NAME")
    return wanted or columns[0]


def _holds_images(feature: Any) -> bool:
    """Encoded ones: an `Image`, the struct that it is stored as, or bytes."""
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))


def _label_column(rows: datasets.Dataset, wanted: str, path: Path) -> str:
    coded = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    column = wanted if wanted in rows.column_names else coded[0] if len(coded) == 1 else None
    if column is None:
        raise DataError(
            f"{printable(path)} has no column {wanted!r} (it has {', '.join(rows.column_names)}); set label_column=NAME"
        )
    feature = rows.features[column]
    plain = isinstance(feature, datasets.Value) and feature.dtype.rstrip("0123456789") in _LABEL_TYPES
    if not plain and column not in coded:
        raise DataError(f"{printable(path)}: column {column!r} is {feature}; labels must be class numbers or names")
    return column


def _with_new_rows(rows: datasets.Dataset, state: Path) -> datasets.Dataset:
    """`rows` and, behind them, those of all units, which are brought into one file first."""
    files = sorted((state / "rows").glob("[!.]*.arrow"))
    if not files:
        return rows
    with atomic_write(state / "new.arrow") as temporary:
        _write_stream(temporary, _read_stream(files[0]).schema, map(_read_stream, files))
    # A fingerprint of its own would be made of the file's place and time, and it is written into the output.
    table = datasets.table.MemoryMappedTable.from_file(str(state / "new.arrow"))
    new = datasets.Dataset(table, info=rows.info, split=rows.split, fingerprint="augmented")
    return datasets.concatenate_datasets([rows, new])


def _write_stream(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _read_stream(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return reader.read_all()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without the library's own progress bars."""
    enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
