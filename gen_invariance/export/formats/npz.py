"""Arrays in an .npz file (`data.readers.arrays.read_npz` has its keys); the output holds the same arrays, longer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gen_invariance.data.readers.arrays import find_npz_parts, load_arrays, read_npz
from gen_invariance.errors import DataError, printable
from gen_invariance.export.formats.base import Entry, Format, Output, Row, Stored, row_number
from gen_invariance.files import atomic_write


class NpzFormat(Format):
    """Training arrays grow by the new images, which keep layout, dtype and size; all others are taken over.

    An array of as many rows as there are training images (groups, patients, ...) grows with them: a new image has the
    values of its source. The arrays are held in memory, in each worker: the format cannot be read piece by piece.

    Args:
        path: the file.
        group: which keys tell the groups, see `data.readers.arrays.read_npz`.
    """

    name = "npz"
    keeps_size = True
    copied_whole = "arrays"

    def __init__(self, path: Path, group: str | None = None) -> None:
        self.path, self._group = path, group
        self._data = read_npz(path, group=group)[0]
        self.class_names = self._data.class_names
        self._check_arrays(load_arrays(path))  # before any work: all of them are written in the end

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._group)

    def entries(self) -> Sequence[Entry]:
        """One for each training image."""
        return [Entry(f"train/{row}", label, (row,)) for row, label in enumerate(self._data.labels.tolist())]

    def read(self, entry: Entry) -> np.ndarray:
        """Pixels uint8 (C, H, W)."""
        return self._data.images[entry.location[0]].numpy()

    def file_name(self, entry: Entry, suffix: str | None) -> str:
        """No file: a row of the array."""
        return ""

    def store_new(self, output: Output, unit: str, items: Sequence[Stored]) -> None:
        """The unit's new images as one array in the working folder."""
        with atomic_write(output.state / "arrays" / f"{unit}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, np.stack([item.content for item in items]))

    def holds_unit(self, output: Output, unit: str, rows: Sequence[Row]) -> bool:
        """Whether the array of new images is in the working folder."""
        is_new = any(row["kind"] == "generated" for row in rows)
        return not is_new or (output.state / "arrays" / f"{unit}.npy").is_file()

    def holds_image(self, out: Path, row: Row) -> bool:
        """Whether the file is there."""
        return (out / self.path.name).is_file()

    def _check_arrays(self, arrays: Mapping[str, np.ndarray]) -> list[str]:
        """Names of the arrays that hold a row for each training image, beside images and labels.

        Raises:
            DataError: an array that may be of the training images or of another part.
        """
        others = [part for part in find_npz_parts(self.path) if part != "train"]
        lengths = {len(arrays[f"{part}_images"]) for part in others if f"{part}_images" in arrays}
        names = []
        for name, array in arrays.items():
            own = name.startswith(tuple(f"{part}_" for part in others)) or name.endswith("class_names")
            if own or name in ("train_images", "train_labels") or array.shape[:1] != (len(self._data),):
                continue
            if not name.startswith("train_") and len(self._data) in lengths:
                raise DataError(
                    f"{printable(self.path)}: {printable(name)} has as many rows as two parts have images; call it "
                    f"train_{printable(name)} or {others[0]}_{printable(name)}"
                )
            names.append(name)
        return names

    def finish(self, output: Output, rows: Iterable[Row], entries: Mapping[str, Entry]) -> None:
        """The file, with the rows of the new images behind those of the old."""
        arrays = load_arrays(self.path)
        new = [np.load(file, allow_pickle=False) for file in sorted((output.state / "arrays").glob("[!.]*.npy"))]
        generated = [row for row in rows if row["kind"] == "generated"]
        if sum(map(len, new)) != len(generated):
            raise DataError(f"{output.state} is damaged: its arrays do not fit its records; choose a new output folder")
        if new:
            sources = [row_number(row["source"]) for row in generated]
            for name in ("train_labels", *self._check_arrays(arrays)):
                arrays[name] = np.concatenate([arrays[name], arrays[name][sources]])
            images = _convert_like(np.concatenate(new), arrays["train_images"])
            arrays["train_images"] = np.concatenate([arrays["train_images"], images])
        with atomic_write(output.folder / self.path.name) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    def manifest_file(self, row: Row, index: int) -> str:
        """FILE/train_images/ROW."""
        number = row_number(row["source"]) if row["kind"] == "original" else len(self._data) + index
        return f"{self.path.name}/train_images/{number}"

    def read_back(self, out: Path, row: Row) -> np.ndarray:
        """The image's row in the written file."""
        if not hasattr(self, "_written"):
            self._written = read_npz(out / self.path.name)[0]
        return self._written.images[row_number(row["file"])].numpy()


def _convert_like(images: np.ndarray, old: np.ndarray) -> np.ndarray:
    """uint8 (N, C, H, W) in the layout and dtype of `old`."""
    if old.ndim == 3:
        images = images[:, 0]
    elif old.shape[-1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    return images if old.dtype == np.uint8 else (images / 255).astype(old.dtype)
