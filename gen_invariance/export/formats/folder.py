"""An image folder, `root/class_name/*.png`, or one with train/ and test/ (or val/) parts above the classes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gen_invariance.data.readers.folder import SUFFIXES, existing_folder, find_splits
from gen_invariance.errors import DataError
from gen_invariance.errors import printable as shown
from gen_invariance.export.formats.base import Entry, Finish, Row, Stored
from gen_invariance.export.pictures import UnusablePictureError
from gen_invariance.files import atomic_write

_WRITERS = 8
_HUGGING_FACE = "dataset_info.json"


class FolderForm:
    """Classes are the sub-folders, sorted. Images of other parts than train/ are taken over and not augmented."""

    name = "folder"
    keeps_size = False
    copied_whole = ""

    def __init__(self, path: Path) -> None:
        self.path = existing_folder(path)
        self._refuse_others()
        splits = find_splits(self.path)
        self._parts = {part: place.name for part, place in splits.items()} or {"train": ""}
        self.class_names = tuple(_sub_folders(self.path / self._parts["train"]))
        if not self.class_names:
            raise DataError(
                f"{shown(self.path)} has no sub-folders; put the images of each class into a sub-folder named after it"
            )

    def _refuse_others(self) -> None:
        names = {entry.name for entry in os.scandir(self.path)}
        if _HUGGING_FACE in names or "dataset_dict.json" in names:
            raise DataError(f"{shown(self.path)} is a Hugging Face data set saved to disk; use data=huggingface")
        if any(name.endswith(".tar") for name in names):
            raise DataError(f"{shown(self.path)} holds tar shards, not class folders; use data=webdataset")

    def entries(self) -> Sequence[Entry]:
        """Images and left-out files by part, class and name."""
        return [entry for part, top in self._parts.items() for entry in self._part_entries(part, top)]

    def _part_entries(self, part: str, top: str) -> Iterator[Entry]:
        root = self.path / top
        for file in sorted(entry.name for entry in os.scandir(root) if not is_folder(entry)):
            if Path(file).suffix.lower() in SUFFIXES and not file.startswith("."):
                yield _entry(Path(top, file), -1, part, "lies in no class folder")
        for name in _sub_folders(root):
            label = self.class_names.index(name) if name in self.class_names else -1
            with os.scandir(root / name) as found:
                files = sorted((entry.name, is_folder(entry)) for entry in found if not entry.name.startswith("."))
            for file, nested in files:
                reason = "" if label >= 0 else "its class has no training image"
                if nested:
                    reason = "a folder inside a class folder"
                elif Path(file).suffix.lower() not in SUFFIXES:
                    reason = "no image by its name"
                yield _entry(Path(top, name, file), label, part, reason)

    def read(self, entry: Entry) -> bytes:
        """The file's bytes."""
        return read_regular(self.path / entry.place[0])

    def file_of(self, entry: Entry, stem: str | None) -> str:
        """The same relative path; a new image lies beside its source."""
        place = Path(entry.place[0])
        return os.fspath(place if stem is None else place.with_name(f"{short_stem(place)}{stem}.png"))

    def store(self, out: Path, state: Path, unit: str, items: Sequence[Stored], *, originals: str) -> None:
        """One file for each image."""
        place_files(out, items, originals=originals, source_of=lambda entry: self.path / entry.place[0])

    def finish(self, work: Finish) -> None:
        """Nothing: a folder has no index."""

    def manifest_file(self, row: Row, number: int) -> str:
        """The file's name."""
        return row["file"]

    def read_back(self, out: Path, row: Row) -> bytes:
        """The written file."""
        return (out / row["file"]).read_bytes()


def place_files(out: Path, items: Sequence[Stored], *, originals: str, source_of: Callable[[Entry], Path]) -> None:
    """Write image files, each whole, or link to the originals where that was asked for.

    Several at once: every file waits until the disk has it, and disks take many files in the time of one.
    """

    def place(item: Stored) -> None:
        with atomic_write(out / item.file) as temporary:
            if originals == "link" and not item.generated:
                temporary.symlink_to(source_of(item.entry).resolve())
            else:
                temporary.write_bytes(item.content)

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(place, items))


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or a device would block or never end.

    Raises:
        UnusablePictureError: not a regular file.
        OSError: it cannot be read.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # NUL in a path of a table
        raise UnusablePictureError(f"not a path ({error})") from None
    if not stat.S_ISREG(mode):
        raise UnusablePictureError("not a regular file")
    return path.read_bytes()


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether a directory entry is a folder; a link in a circle is none, it is found out when it is read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def short_stem(place: Path) -> str:
    """The file's name without its ending, cut so that room is left for what is added to it (255 bytes in all)."""
    return os.fsdecode(os.fsencode(place.stem)[:160])


def _entry(place: Path, label: int, part: str, ignored: str) -> Entry:
    return Entry(key_of(place), label, (os.fspath(place),), part, ignored)


def key_of(place: Path) -> str:
    """A path as text that any file format can hold: undecodable bytes are escaped."""
    return os.fsencode(place.as_posix()).decode("utf-8", "backslashreplace")


def _sub_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if is_folder(entry) and not entry.name.startswith("."))
