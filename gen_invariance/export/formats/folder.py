"""An image folder, `root/class_name/*.png`, or one with train/ and test/ (or val/) parts above the classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gen_invariance.data.readers.tree import (
    FoundFile,
    existing_folder,
    find_classes,
    find_parts,
    judge_file,
    list_files,
    list_visible,
    sub_folders,
)
from gen_invariance.errors import DataError, printable
from gen_invariance.export.formats.base import Entry, FileFormat, path_key


class FolderFormat(FileFormat):
    """Classes are the sub-folders, sorted. Images of other parts than train/ are taken over and not augmented.

    `data.readers.tree` tells parts and classes. Images of other parts may lie in no class, or in one without a training
    image.
    """

    name = "folder"

    def __init__(self, path: Path) -> None:
        self.path = existing_folder(path)
        names = set(os.listdir(self.path))
        if names & {"dataset_info.json", "dataset_dict.json"}:
            raise DataError(f"{printable(self.path)} is a Hugging Face data set saved to disk; use data=huggingface")
        if any(name.endswith(".tar") for name in names):
            raise DataError(f"{printable(self.path)} holds tar shards, not class folders; use data=webdataset")
        parts = {part: folder.name for part, folder in find_parts(self.path).items()}
        self._parts = parts or {"train": ""}
        self.class_names = tuple(folder.name for folder in find_classes(self.path / self._parts["train"]))

    def entries(self) -> Sequence[Entry]:
        """Images and left-out files by part, class and name."""
        entries = [entry for part, folder in self._parts.items() for entry in self._part_entries(part, folder)]
        if self._parts["train"]:
            entries += self._stray_entries("train", self.path, "lies in no part")
        return entries

    def _part_entries(self, part: str, folder: str) -> Iterator[Entry]:
        labels, root = self.labels, self.path / folder
        yield from self._stray_entries(part, root, "lies in no class folder" if part == "train" else "")
        for class_folder in sub_folders(root):
            label = labels.get(class_folder.name, -1)
            for file in list_files(class_folder):
                yield self._entry(file, label, part)

    def _stray_entries(self, part: str, folder: Path, reason: str) -> Iterator[Entry]:
        """Pictures that lie in `folder` itself, left out where there is a reason; other files are not mentioned."""
        for file in map(judge_file, list_visible(folder)):
            if not file.ignored:
                yield self._entry(FoundFile(file.path, ignored=reason) if reason else file, -1, part)

    def _entry(self, file: FoundFile, label: int, part: str) -> Entry:
        relative = file.path.relative_to(self.path)
        return Entry(path_key(relative), label, (os.fspath(relative),), part, file.ignored, file.problem)

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
