"""Forms a labelled image set is kept in, by name: each reads its images and writes new ones beside the old."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gen_invariance.errors import SettingsError

FORMS = {
    "folder": "folder.FolderForm",
    "table": "table.TableForm",
    "npz": "npz.NpzForm",
    "webdataset": "shards.ShardForm",
    "huggingface": "huggingface.open_set",
}
"""Module of each form, and what opens a path there."""

Row = dict[str, Any]
"""One line of the manifest; see `manifest.COLUMNS`."""


@dataclass(frozen=True)
class Entry:
    """One image of the set.

    Attributes:
        key: names the image within the set, whatever machine the set lies on; draws are seeded by it.
        label: class number; -1 for a file that is no image of a class.
        place: where the form finds it.
        part: only "train" images are counted and augmented; others are taken over.
        ignored: why the file is left out; empty for images.
    """

    key: str
    label: int
    place: tuple[Any, ...]
    part: str = "train"
    ignored: str = ""


@dataclass(frozen=True)
class Stored:
    """What a unit of work writes: one image, its file's name in the output, and its content.

    `content` is an encoded file, or uint8 (C, H, W) for a form that keeps pixels.
    """

    entry: Entry
    file: str
    content: bytes | np.ndarray
    generated: bool


@dataclass(frozen=True)
class Finish:
    """What a form gets to write its index at the end: where to, and all manifest rows as often as it likes."""

    out: Path
    state: Path
    rows: Callable[[], Iterable[Row]]
    entries: Mapping[str, Entry]
    originals: str = field(default="copy")


class Form(Protocol):
    """One form of image set. Instances are small and can be pickled: images and entries are not kept in them."""

    name: str
    path: Path
    class_names: tuple[str, ...]
    keeps_size: bool  # results must have the size of their source
    copied_whole: str  # what originals are copied in, images among them that cannot be used; "" if image by image

    def entries(self) -> Sequence[Entry]:
        """All images, in an order that does not depend on the file system."""
        ...

    def read(self, entry: Entry) -> bytes | np.ndarray:
        """The encoded image, or its pixels uint8 (C, H, W); may raise OSError or UnusablePictureError."""
        ...

    def file_of(self, entry: Entry, stem: str | None) -> str:
        """Name in the output folder: of the original (`stem` None) or of a new image; "" where it has no file."""
        ...

    def store(self, out: Path, state: Path, unit: str, items: Sequence[Stored], *, originals: str) -> None:
        """Write the images of one unit of work; done again after a kill, it writes the same."""
        ...

    def finish(self, work: Finish) -> None:
        """Write what is not written image by image."""
        ...

    def manifest_file(self, row: Row, number: int) -> str:
        """Where the finished output has the image of a kept row: the `number`-th new one, or an original."""
        ...

    def read_back(self, out: Path, row: Row) -> bytes | np.ndarray:
        """A new image of the finished output, by its manifest row."""
        ...


def open_form(name: str, path: Path | str, **options: Any) -> Form:
    """The set in `path`, of the form called `name`.

    Args:
        name: a key of `FORMS`.
        path: file or folder.
        options: of the form: `path_column`, `label_column` of a table; `image_column`, `label_column` of a Hugging Face
            data set.

    Raises:
        SettingsError: unknown name or option.
        DataNotFoundError: nothing there.
        DataError: the set cannot be read.
    """
    if name not in FORMS:
        raise SettingsError(f"export knows no form {name!r}; choose one of {', '.join(FORMS)}")
    module, _, kind = FORMS[name].partition(".")
    form = getattr(import_module(f"gen_invariance.export.formats.{module}"), kind)
    try:
        return form(Path(path).expanduser(), **options)
    except TypeError as error:
        raise SettingsError(f"export, {name}: {error}") from error


def unique_keys(keys: Iterable[str]) -> Iterator[str]:
    """`keys`, with the second and later of equal ones numbered."""
    seen: dict[str, int] = {}
    for key in keys:
        seen[key] = number = seen.get(key, 0) + 1
        yield key if number == 1 else f"{key}#{number}"


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names sorted: as numbers where all are whole numbers, else as text."""
    found = set(names)
    numbers = all(name.isascii() and name.isdigit() for name in found)
    return tuple(sorted(found, key=lambda name: (int(name), name) if numbers else (0, name)))
