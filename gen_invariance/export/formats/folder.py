"""An image folder, `root/class_name/*.png`, or one with train/ and test/ (or val/) parts above the classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gen_invariance.data.readers.folder import existing_folder, find_splits, sub_folders
from gen_invariance.data.readers.pictures import SUFFIXES
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
        self.class_names = tuple(path.name for path in sub_folders(self.path / self._parts["train"]))
        if not self.class_names:
            raise DataError(
                f"{printable(self.path)} has no sub-folders; put the images of each class into a sub-folder named "
                "after it"
            )

    def entries(self) -> Sequence[Entry]:
        """Images and left-out files by part, class and name."""
        return [entry for part, folder in self._parts.items() for entry in self._part_entries(part, folder)]

    def _part_entries(self, part: str, folder: str) -> Iterator[Entry]:
        visible, labels = _list_visible(self.path / folder), self.labels
        for path in visible:
            if path.suffix.lower() in SUFFIXES and not path.is_dir():
                yield self._entry(path, -1, part, "lies in no class folder")
        for class_folder in filter(Path.is_dir, visible):
            label = labels.get(class_folder.name, -1)
            for path in _list_visible(class_folder):
                reason = "" if label >= 0 else "its class has no training image"
                if path.is_dir():
                    reason = "a folder inside a class folder"
                elif path.suffix.lower() not in SUFFIXES:
                    reason = "no image by its name"
                yield self._entry(path, label, part, reason)

    def _entry(self, path: Path, label: int, part: str, ignored: str) -> Entry:
        relative = path.relative_to(self.path)
        return Entry(path_key(relative), label, (os.fspath(relative),), part, ignored)

    def image_file(self, entry: Entry) -> Path:
        """The file of an image."""
        return self.path / entry.location[0]

    def file_name(self, entry: Entry, suffix: str | None) -> str:
        """The same relative path; a new image lies beside its source."""
        path = Path(entry.location[0])
        if suffix is None:
            return os.fspath(path)
        stem = os.fsdecode(os.fsencode(path.stem)[:160])  # a name has 255 bytes, and some are added
        return os.fspath(path.with_name(f"{stem}{suffix}"))


def _list_visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
