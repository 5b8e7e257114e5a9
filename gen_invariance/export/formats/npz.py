"""Arrays in an .npz file (`data.readers.arrays.read_npz` has its keys); the output holds the same arrays, longer."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gen_invariance.data.readers.arrays import load_arrays, read_npz
from gen_invariance.errors import DataError
from gen_invariance.export.formats.base import Entry, Finish, Row, Stored
from gen_invariance.files import atomic_write

_KEYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names", "test_class_names")


class NpzForm:
    """Training arrays grow by the new images, which keep layout, dtype and size; test arrays are taken over.

    A new image is of the group of its source, where the file has groups. The arrays are held in memory, in each worker:
    the format cannot be read piece by piece.

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

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "class_names": self.class_names, "_group": self._group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _data=read_npz(state["path"])[0])

    def entries(self) -> Sequence[Entry]:
        """One for each training image."""
        return [Entry(f"train/{row}", label, (row,)) for row, label in enumerate(self._data.labels.tolist())]

    def read(self, entry: Entry) -> np.ndarray:
        """Pixels uint8 (C, H, W)."""
        return self._data.images[entry.place[0]].numpy()

    def file_of(self, entry: Entry, stem: str | None) -> str:
        """No file: a row of the array."""
        return ""

    def store(self, out: Path, state: Path, unit: str, items: Sequence[Stored], *, originals: str) -> None:
        """The unit's new images as one array in the working folder."""
        new = [item.content for item in items if item.generated]
        if new:
            buffer = io.BytesIO()
            np.save(buffer, np.stack(new))
            with atomic_write(state / "arrays" / f"{unit}.npy") as temporary:
                temporary.write_bytes(buffer.getvalue())

    def finish(self, work: Finish) -> None:
        """The file, with the rows of the new images behind those of the old."""
        groups = f"train_{self._group or 'groups'}"
        arrays = load_arrays(self.path, (*_KEYS, groups, groups.replace("train", "test", 1)))
        new = [np.load(file, allow_pickle=False) for file in _unit_files(work.state)]
        kept = [row for row in work.rows() if row["kind"] == "generated" and row["status"] == "kept"]
        labels = [row["label"] for row in kept]
        if sum(map(len, new)) != len(labels):
            raise DataError(f"{work.state} is damaged: its arrays do not fit its records; choose a new output folder")
        if new:
            old = arrays["train_images"]
            arrays["train_images"] = np.concatenate([old, _like(np.concatenate(new), old)])
            labels = np.asarray(labels, arrays["train_labels"].dtype)
            arrays["train_labels"] = np.concatenate([arrays["train_labels"], labels])
            if groups in arrays:
                sources = [int(row["source"].rpartition("/")[2]) for row in kept]
                arrays[groups] = np.concatenate([arrays[groups], arrays[groups][sources]])
        with atomic_write(work.out / self.path.name) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    def manifest_file(self, row: Row, number: int) -> str:
        """FILE/train_images/ROW."""
        place = row["source"].rpartition("/")[2] if row["kind"] == "original" else len(self._data) + number
        return f"{self.path.name}/train_images/{place}"

    def read_back(self, out: Path, row: Row) -> np.ndarray:
        """The image's row in the written file."""
        if not hasattr(self, "_written"):
            self._written = read_npz(out / self.path.name)[0]
        return self._written.images[int(row["file"].rpartition("/")[2])].numpy()


def _unit_files(state: Path) -> Iterator[Path]:
    folder = state / "arrays"
    return iter(sorted(folder.glob("[!.]*.npy")) if folder.is_dir() else ())


def _like(images: np.ndarray, old: np.ndarray) -> np.ndarray:
    """uint8 (N, C, H, W) in the layout and dtype of `old`."""
    if old.ndim == 3:
        images = images[:, 0]
    elif old.shape[-1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    return images if old.dtype == np.uint8 else (images / 255).astype(old.dtype)
