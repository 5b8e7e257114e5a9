"""`Format`, what every format of image set does: read its images, and write new ones beside the old."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from gen_invariance.data.readers.pictures import MOST_BYTES
from gen_invariance.errors import SettingsError
from gen_invariance.files import atomic_write, read_regular

FORMATS = {
    "folder": "folder.FolderFormat",
    "table": "table.TableFormat",
    "npz": "npz.NpzFormat",
    "webdataset": "shards.ShardFormat",
    "huggingface": "huggingface.open_dataset",
}
"""What opens a path of each format, below this package."""

RESERVED = ("manifest.jsonl", "manifest.parquet", "preview.html")
"""Files that every export writes."""

Row = dict[str, Any]
"""One line of the manifest; see `manifest.COLUMNS`."""

_WRITERS = 8  # every file waits until the disk has it, and disks take many files in the time of one


@dataclass(frozen=True)
class Entry:
    """One image of the set.

    Attributes:
        key: names the image within the set, whatever machine the set lies on; draws are seeded by it.
        label: class number; -1 for a file that is no image of a class, which only other parts than "train" take over.
        location: where the format finds it.
        part: only "train" images are counted and augmented; others are taken over.
        ignored: why the file is left out; empty for images.
        problem: why an image cannot be used, as far as that is known without reading it.
    """

    key: str
    label: int
    location: tuple[Any, ...]
    part: str = "train"
    ignored: str = ""
    problem: str = ""


class Stored(NamedTuple):
    """One image to write: its entry, its file's name in the output, and its content.

    `content` is an encoded file, or uint8 (C, H, W) for a format that keeps pixels; of originals it is empty, they are
    taken over from where they lie.
    """

    entry: Entry
    file: str
    content: bytes | np.ndarray


@dataclass(frozen=True)
class Output:
    """Where an export writes to.

    Attributes:
        folder: the output.
        state: the working folder in it, which goes when the export is done.
        originals: what becomes of them: "copy", "link" or "reference".
    """

    folder: Path
    state: Path
    originals: str = "copy"

    def take_over(self, source: Path, name: str) -> None:
        """Copy the original file `source` to `name` or link to it, as `originals` says."""
        with atomic_write(self.folder / name) as temporary:
            if self.originals == "link":
                temporary.symlink_to(source.resolve())
            else:
                shutil.copyfile(source, temporary)


class Format(ABC):
    """A set of images in one format. Instances are small and can be pickled: images and entries are not kept in them.

    Attributes:
        name: as in `FORMATS`.
        keeps_size: results must have the size of their source.
        copied_whole: what originals are copied in, images among them that cannot be used; "" if image by image.
        path: of the set.
        class_names: K names, in label order.
    """

    name: ClassVar[str]
    keeps_size: ClassVar[bool] = False
    copied_whole: ClassVar[str] = ""
    path: Path
    class_names: tuple[str, ...]

    @property
    def labels(self) -> dict[str, int]:
        """Class number by name."""
        return {name: label for label, name in enumerate(self.class_names)}

    @abstractmethod
    def entries(self) -> Sequence[Entry]:
        """All images, in an order that does not depend on the file system."""

    @abstractmethod
    def read(self, entry: Entry) -> bytes | np.ndarray:
        """The encoded image, or its pixels uint8 (C, H, W); may raise OSError or UnusablePictureError."""

    def extension(self, entry: Entry) -> str:
        """End of the name of the image's file, such as ".JPG"; "" where its name is not known."""
        return ""

    @abstractmethod
    def file_name(self, entry: Entry, suffix: str | None) -> str:
        """Name in the output: of the original (`suffix` None) or of a new image, whose name ends in `suffix`.

        "" where it has no file.
        """

    def store_originals(self, output: Output, items: Sequence[Stored]) -> None:  # noqa: B027
        """Write originals of one unit of work, in a format that keeps them image by image."""

    @abstractmethod
    def store_new(self, output: Output, unit: str, items: Sequence[Stored]) -> None:
        """Write the new images of one unit of work, at least one; done again after a kill, it writes the same."""

    def holds_unit(self, output: Output, unit: str, rows: Sequence[Row]) -> bool:
        """Whether what was written of a unit is still there; `rows` are those of its record that are kept."""
        return True

    def holds_image(self, out: Path, row: Row) -> bool:
        """Whether the finished output still has the file of an image, by its manifest row."""
        return not row["file"] or (out / row["file"]).is_file()

    def finish(  # noqa: B027
        self, output: Output, rows: Iterable[Row], entries: Mapping[str, Entry]
    ) -> None:
        """Write what is not written image by image, from the manifest rows that are kept and the entries by key."""

    def manifest_file(self, row: Row, index: int) -> str:
        """Where the finished output has the image of a kept row: the `index`-th new one, or an original."""
        return row["file"]

    def read_back(self, out: Path, row: Row) -> bytes | np.ndarray:
        """A new image of the finished output, by its manifest row."""
        return (out / row["file"]).read_bytes()


class FileFormat(Format):
    """A format that keeps each image in a file of its own."""

    @abstractmethod
    def image_file(self, entry: Entry) -> Path:
        """The file of an image."""

    def read(self, entry: Entry) -> bytes:
        """The file's bytes."""
        return read_regular(self.image_file(entry), most=MOST_BYTES)

    def store_originals(self, output: Output, items: Sequence[Stored]) -> None:
        """One file for each image, or a link to it, several at once."""
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(lambda item: output.take_over(self.image_file(item.entry), item.file), items))

    def extension(self, entry: Entry) -> str:
        """That of its file."""
        return self.image_file(entry).suffix

    def holds_unit(self, output: Output, unit: str, rows: Sequence[Row]) -> bool:
        """Whether each image has its file."""
        return all(self.holds_image(output.folder, row) for row in rows)

    def store_new(self, output: Output, unit: str, items: Sequence[Stored]) -> None:
        """One file for each image, several at once."""

        def write(item: Stored) -> None:
            with atomic_write(output.folder / item.file) as temporary:
                temporary.write_bytes(item.content)

        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(write, items))


def open_format(name: str, path: Path | str, **options: Any) -> Format:
    """The set in `path`, in the format called `name`.

    Args:
        name: a key of `FORMATS`: "folder", "table", "npz", "webdataset" or "huggingface".
        path: file or folder.
        options: of the format: `path_column`, `label_column` of a table; `image_column`, `label_column` of a Hugging
            Face data set; `group` of an .npz file.

    Raises:
        SettingsError: unknown name or option.
        DataNotFoundError: nothing there.
        DataError: the set cannot be read.

    Example:
        >>> import numpy as np
        >>> images = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
        >>> np.savez("few.npz", train_images=images, train_labels=np.arange(12) // 9)
        >>> from gen_invariance import open_format
        >>> open_format("npz", "few.npz").class_names
        ('0', '1')
    """
    if name not in FORMATS:
        raise SettingsError(f"export knows no format {name!r}; choose one of {', '.join(FORMATS)}")
    module, _, opener = FORMATS[name].partition(".")
    opener = getattr(import_module(f"gen_invariance.export.formats.{module}"), opener)
    try:
        return opener(Path(path).expanduser(), **options)
    except TypeError as error:
        raise SettingsError(f"export, {name}: {error}") from error


def unique_keys(keys: Iterable[str]) -> Iterator[str]:
    """`keys`, with the second and later of equal ones numbered."""
    seen: dict[str, int] = {}
    for key in keys:
        seen[key] = number = seen.get(key, 0) + 1
        yield key if number == 1 else f"{key}#{number}"


def sort_class_names(names: Iterable[str]) -> tuple[str, ...]:
    """Class names, each once, sorted: as numbers where all are whole numbers, else as text."""
    unique = set(names)
    if all(name.isascii() and name.isdigit() for name in unique):
        return tuple(sorted(unique, key=lambda name: (int(name), name)))
    return tuple(sorted(unique))


def row_number(address: str) -> int:
    """The row at the end of an address such as "train/7" in a manifest."""
    return int(address.rpartition("/")[2])


def path_key(path: Path) -> str:
    """A path as text that any file format can hold: undecodable bytes are escaped."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
