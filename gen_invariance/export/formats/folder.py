"""An image folder, `root/class_name/*.png`, or one with train/ and test/ (or val/) parts above the classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gen_invariance.data.readers.folder import SUFFIXES, existing_folder, find_splits
from gen_invariance.errors import DataError, printable
from gen_invariance.export.formats.base import Entry, FileFormat, path_key


class FolderFormat(FileFormat):
    """Classes are the sub-folders, sorted. Images of other parts than train/ are taken over and not augmented."""

    name = "folder"

    def __init__(self, path: Path) -> None:
        self.path = existing_folder(path)
        names = set(os.listdir(self.path))
        if names & {"dataset_info.json", "dataset_dict.json"}:
            raise DataError(f"{printable(self.path)} is a Hugging Face data set saved to disk; use data=huggingface")
        if any(name.endswith(".tar") for name in names):
            raise DataError(f"{printable(self.path)} holds tar shards, not class folders; use data=webdataset")
        parts = {part: folder.name for part, folder in find_splits(self.path).items()}
        self._parts = parts or {"train": ""}
        self.class_names = tuple(_list_folder(self.path / self._parts["train"], folders=True))
        if not self.class_names:
            raise DataError(
                f"{printable(self.path)} has no sub-folders; put the images of each class into a sub-folder named "
                "after it"
            )

    def entries(self) -> Sequence[Entry]:
        """Images and left-out files by part, class and name."""
        return [entry for part, folder in self._parts.items() for entry in self._part_entries(part, folder)]

    def _part_entries(self, part: str, folder: str) -> Iterator[Entry]:
        root = self.path / folder
        for file in _list_folder(root, folders=False):
            if Path(file).suffix.lower() in SUFFIXES:
                yield _entry(Path(folder, file), -1, part, "lies in no class folder")
        for name in _list_folder(root, folders=True):
            label = self.class_names.index(name) if name in self.class_names else -1
            nested = set(_list_folder(root / name, folders=True))
            for file in sorted(nested.union(_list_folder(root / name, folders=False))):
                reason = "" if label >= 0 else "its class has no training image"
                if file in nested:
                    reason = "a folder inside a class folder"
                elif Path(file).suffix.lower() not in SUFFIXES:
                    reason = "no image by its name"
                yield _entry(Path(folder, name, file), label, part, reason)

    def source_of(self, entry: Entry) -> Path:
        """The file of an image."""
        return self.path / entry.location[0]

    def file_name(self, entry: Entry, suffix: str | None) -> str:
        """The same relative path; a new image lies beside its source."""
        path = Path(entry.location[0])
        if suffix is None:
            return os.fspath(path)
        stem = os.fsdecode(os.fsencode(path.stem)[:160])  # a name has 255 bytes, and some are added
        return os.fspath(path.with_name(f"{stem}{suffix}.png"))


def _entry(path: Path, label: int, part: str, ignored: str) -> Entry:
    return Entry(path_key(path), label, (os.fspath(path),), part, ignored)


def _list_folder(folder: Path, *, folders: bool) -> list[str]:
    """Names of the folders in `folder`, or of all else, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry) == folders
        )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A link in a circle is none; it is found out when it is read."""
    try:
        return entry.is_dir()
    except OSError:
        return False
