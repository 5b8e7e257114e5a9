"""Hugging Face data sets on disk: `save_to_disk` folders and Parquet with images inside, by the `datasets` library.

Needs the extra `hf`. A folder with `metadata.csv` or `.jsonl`, and one of class folders (`imagefolder`), are the forms
"table" and "folder"; `open_set` tells them apart. Nothing is fetched, and no code of a data set is run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gen_invariance.errors import DataError, DataNotFoundError, SettingsError
from gen_invariance.errors import printable as shown
from gen_invariance.export.formats.base import Entry, Finish, Form, Row, Stored, in_order
from gen_invariance.export.formats.folder import FolderForm, read_regular
from gen_invariance.export.formats.table import TableForm
from gen_invariance.export.pictures import UnusablePictureError
from gen_invariance.files import atomic_write, cannot_write

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


def open_set(path: Path, *, image_column: str | None = None, label_column: str = "label") -> Form:
    """The form that fits what lies in `path`: saved Arrow files, Parquet, a metadata table, or class folders.

    Args:
        path: a folder, or a .parquet file.
        image_column: where there is more than one column of images; else it is found.
        label_column: class numbers or names; where there is no such column, the only `ClassLabel` serves.
    """
    if not path.exists():
        raise DataNotFoundError(f"{shown(path)} does not exist; give a folder of save_to_disk, or of Parquet files")
    table = next((path / name for name in _METADATA if (path / name).is_file()), None)
    if table is not None:
        return TableForm(table, path_column="file_name", label_column=label_column)
    if path.is_dir() and not _is_saved(path) and next(path.rglob("*.parquet"), None) is None:
        inner = next((found for name in _METADATA for found in path.glob(f"*/{name}")), None)
        if inner is not None:
            raise DataError(
                f"{shown(path)} keeps its metadata by part ({inner.relative_to(path)}); give one part: {inner.parent}"
            )
        return FolderForm(path)
    return HuggingFaceForm(path, image_column=image_column, label_column=label_column)


class HuggingFaceForm:
    """A `Dataset` or `DatasetDict`. The split "train" grows; other splits are taken over.

    New rows copy the other columns of their source. Readable originals come first, in their order. Parquet is unpacked
    into the cache of `datasets` (`HF_DATASETS_CACHE`), as by `load_dataset`; saved Arrow files are read in place.

    Args:
        path: a folder that `save_to_disk` wrote, a folder of Parquet files, or one of these.
        image_column, label_column: see `open_set`.
    """

    name = "huggingface"
    keeps_size = False
    copied_whole = ""

    def __init__(self, path: Path, *, image_column: str | None = None, label_column: str = "label") -> None:
        self.path = path
        self._parts, self._one = _open(path)
        if "train" not in self._parts:
            raise DataError(
                f"{shown(path)} has no split 'train' (it has {', '.join(self._parts)}); name it so, or give the folder "
                "of one split"
            )
        self.image_column = _image_column(self._parts["train"], image_column, path)
        self.label_column = _label_column(self._parts["train"], label_column, path)
        for part, rows in self._parts.items():
            for column in (self.image_column, self.label_column):
                if column not in rows.column_names:
                    raise DataError(f"{shown(path)}: split {part!r} has no column {column!r}, the split 'train' has")
        self.class_names = self._class_names()
        self._arrow = {part: rows.with_format("arrow") for part, rows in self._parts.items()}
        self._positions: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "image_column": self.image_column, "label_column": self.label_column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], image_column=state["image_column"], label_column=state["label_column"])

    def _class_names(self) -> tuple[str, ...]:
        feature = self._parts["train"].features[self.label_column]
        if isinstance(feature, datasets.ClassLabel):
            return tuple(feature.names)
        names = in_order(str(value) for value in self._labels("train") if value not in (None, ""))
        if not names:
            raise DataError(f"{shown(self.path)}: column {self.label_column!r} holds no label; fill it in")
        return names

    def _labels(self, part: str) -> list[Any]:
        return self._parts[part].data.column(self.label_column).to_pylist()

    def entries(self) -> Sequence[Entry]:
        """One for each row. Training rows without a label are left out; in other splits they are taken over."""
        numbers: Mapping[Any, int] = {name: label for label, name in enumerate(self.class_names)}
        if isinstance(self._parts["train"].features[self.label_column], datasets.ClassLabel):
            numbers = {str(label): label for label in range(len(self.class_names))}
        entries = []
        for part in self._parts:
            for row, value in enumerate(self._labels(part)):
                label = numbers.get(str(value), -1)
                ignored = "has no label" if part == "train" and label < 0 else ""
                entries.append(Entry(f"{part}/{row}", label, (part, row), part, ignored))
        return entries

    def read(self, entry: Entry) -> bytes:
        """The encoded image: from its row, or from the file that its row names."""
        part, row = entry.place
        return self._content(self._arrow[part][row])

    def _content(self, row: pa.Table) -> bytes:
        value = row.column(self.image_column)[0].as_py()
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is None and path is None:
            raise UnusablePictureError("its row holds no image")
        return content if content is not None else read_regular(self.path.parent / path)

    def file_of(self, entry: Entry, stem: str | None) -> str:
        """No file, but the name that a new image carries in its row."""
        return "" if stem is None else f"{entry.place[0]}-{entry.place[1]}{stem}.png"

    def store(self, out: Path, state: Path, unit: str, items: Sequence[Stored], *, originals: str) -> None:
        """The unit's new rows as one Arrow file in the working folder."""
        new = [item for item in items if item.generated]
        if not new:
            return
        rows = self._arrow["train"][[item.entry.place[1] for item in new]]
        place = rows.column_names.index(self.image_column)
        field = rows.schema.field(place)
        images = [{"bytes": item.content, "path": item.file} for item in new]
        if not pa.types.is_struct(field.type):
            images = [item.content for item in new]
        rows = rows.set_column(place, field, pa.array(images, field.type))
        with atomic_write(state / "rows" / f"{unit}.arrow") as temporary:
            _write_stream(temporary, rows.schema, [rows])

    def finish(self, work: Finish) -> None:
        """The whole set, written in the working folder and then moved into place."""
        kept: dict[str, list[int]] = {part: [] for part in self._parts}
        for row in work.rows():
            if row["kind"] == "original" and row["status"] == "kept":
                part, number = work.entries[row["source"]].place
                kept[part].append(number)
        parts = {part: self._parts[part].select(rows) for part, rows in kept.items()}
        self._positions = {
            part: np.cumsum(np.bincount(rows, minlength=len(self._parts[part]))) - 1 for part, rows in kept.items()
        }
        if work.originals == "reference":
            parts = {"train": parts["train"].select([])}
        self._first_new = len(parts["train"])
        parts["train"] = _with_new_rows(parts["train"], work.state)
        self._written = parts["train"].with_format("arrow")
        final = work.state / "final"
        shutil.rmtree(final, ignore_errors=True)
        try:
            with _quiet():
                self._save(parts, final)
            for file in sorted(path for path in final.rglob("*") if path.is_file()):
                target = work.out / file.relative_to(final)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        except OSError as error:
            raise cannot_write(work.out, error) from error

    def _save(self, parts: Mapping[str, datasets.Dataset], final: Path) -> None:
        final.mkdir(parents=True)
        if _is_saved(self.path):
            found = parts["train"] if self._one else datasets.DatasetDict(parts)
            found.save_to_disk(final)
        elif self._one:
            parts["train"].to_parquet(final / self.path.name)
        else:
            (final / "data").mkdir()
            for part, rows in parts.items():
                count = 1 + rows.data.nbytes // _SHARD_BYTES
                for index in range(count):
                    shard = rows.shard(count, index, contiguous=True)
                    shard.to_parquet(final / "data" / f"{part}-{index:05d}-of-{count:05d}.parquet")

    def manifest_file(self, row: Row, number: int) -> str:
        """SPLIT/ROW of the finished output."""
        if row["kind"] == "generated":
            return f"train/{self._first_new + number}"
        part, _, place = row["source"].partition("/")
        return f"{part}/{self._positions[part][int(place)]}"

    def read_back(self, out: Path, row: Row) -> bytes:
        """The image in its row."""
        return self._content(self._written[int(row["file"].rpartition("/")[2])])


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote `path`."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _open(path: Path) -> tuple[dict[str, datasets.Dataset], bool]:
    """The splits, and whether there is only one, without a name."""
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise DataError(f"{shown(path)} is no Parquet file; give one, or a folder of save_to_disk")
    try:
        with _quiet():
            if _is_saved(path):
                found = datasets.load_from_disk(path)
            elif path.is_file():
                found = datasets.load_dataset("parquet", data_files={"train": [str(path)]})["train"]
            else:
                found = datasets.load_dataset("parquet", data_dir=str(path))
    except Exception as error:  # the library hands on what pyarrow, json and fsspec raise
        reason = shown(str(error.__cause__ or error).strip() or type(error).__name__)[:200]
        raise DataError(
            f"{shown(path)} cannot be read as a Hugging Face data set ({reason}); save it again, or give another path"
        ) from error
    return ({"train": found}, True) if isinstance(found, datasets.Dataset) else (dict(found), False)


def _image_column(rows: datasets.Dataset, wanted: str | None, path: Path) -> str:
    columns = [name for name, feature in rows.features.items() if _holds_images(feature)]
    if wanted is not None and wanted not in columns:
        raise DataError(f"{shown(path)}: no column {wanted!r} of images; these hold images: {', '.join(columns)}")
    if wanted is None and len(columns) != 1:
        found = f"columns {', '.join(columns)} hold images" if columns else "no column holds encoded images"
        raise DataError(f"{shown(path)}: {found} (of {', '.join(rows.column_names)}); set image_column=NAME")
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
            f"{shown(path)} has no column {wanted!r} (it has {', '.join(rows.column_names)}); set label_column=NAME"
        )
    feature = rows.features[column]
    plain = isinstance(feature, datasets.Value) and feature.dtype.rstrip("0123456789") in _LABEL_TYPES
    if not plain and not isinstance(feature, datasets.ClassLabel):
        raise DataError(f"{shown(path)}: column {column!r} is {feature}; labels must be class numbers or names")
    return column


def _with_new_rows(rows: datasets.Dataset, state: Path) -> datasets.Dataset:
    """`rows` and, behind them, those of all units, which are brought into one file first."""
    files = sorted((state / "rows").glob("[!.]*.arrow"))
    if not files:
        return rows
    with pa.memory_map(str(files[0])) as source, pa.ipc.open_stream(source) as reader:
        schema = reader.schema
    with atomic_write(state / "new.arrow") as temporary:
        _write_stream(temporary, schema, map(_read_stream, files))
    # A fingerprint of its own would be made of the file's place and time, and it is written into the output.
    table = datasets.table.MemoryMappedTable.from_file(str(state / "new.arrow"))
    new = datasets.Dataset(table, info=rows.info, split=rows.split, fingerprint="augmented")
    return datasets.concatenate_datasets([rows, new])


def _write_stream(path: Path, schema: pa.Schema, tables: Any) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _read_stream(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return reader.read_all()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own progress bars."""
    shown_before = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown_before:
            datasets.enable_progress_bars()
