"""Where the files of published data sets are looked for, and the few that are downloaded; used by the readers."""

from __future__ import annotations

import hashlib
import shutil
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gen_invariance.data.images import ImageData
from gen_invariance.data.readers.arrays import KeyOf, read_npz
from gen_invariance.data.readers.folder import shown
from gen_invariance.data.readers.registry import Source, cache_folder, resize_images
from gen_invariance.errors import DataError, DataNotFoundError, SettingsError
from gen_invariance.files import atomic_write

_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class PublishedFile:
    """A file as its publisher offers it; `md5` is None where none is published."""

    name: str
    url: str | None = None
    md5: str | None = None


@dataclass(frozen=True)
class PublishedSet:
    """What is known of a published data set.

    Attributes:
        name: of the source; `NAME.npz` with our own keys (see `arrays.read_npz`) is taken in place of its files.
        files: that it is made of, below its folder.
        advice: where to get it, in a few words.
        flip_safe: whether a mirrored image keeps its label.
        download: whether `files` are fetched when no path is given.
        group: what its files tell of each image beyond the label, such as the track; None for nothing.
        grouped: whether `group` is taken unless another one is asked for; otherwise only when it is asked for.
        key_of: makes the key of a group out of its value, the label and the class name, see `arrays.read_npz`.
        train_images, test_images, classes: how many its publisher says there are; checked.
    """

    name: str
    files: tuple[PublishedFile, ...]
    advice: str
    flip_safe: bool
    train_images: int | None = None
    test_images: int | None = None
    classes: int | None = None
    download: bool = False
    group: str | None = None
    grouped: bool = True
    key_of: KeyOf | None = None

    def place(self, path: Path | None) -> Path:
        """The folder (or .npz file) to look in: `path`, or the set's own folder in the cache."""
        return cache_folder() / self.name if path is None else path

    def npz(self, path: Path | None) -> Path | None:
        """The .npz file that stands in for the published files, if there is one."""
        place = self.place(path)
        found = place if place.suffix == ".npz" else place / f"{self.name}.npz"
        return found if found.is_file() else None

    def missing(self, path: Path | None) -> list[str]:
        """Files that are not there; empty when the set can be read."""
        if self.npz(path):
            return []
        return [file.name for file in self.files if self.find(path, file.name) is None]

    def find(self, path: Path | None, name: str) -> Path | None:
        """The file or folder `name`, or `name`.gz or `name` without .gz."""
        place = self.place(path)
        return next(
            (p for p in (place / name, place / f"{name}.gz", place / name.removesuffix(".gz")) if p.exists()), None
        )

    def require(self, path: Path | None) -> None:
        """Download what may be downloaded; raise `DataNotFoundError` while something is missing."""
        left = self.missing(path)
        if left and path is None and self.download:
            wanted = [file for file in self.files if file.name in left]
            left = [] if all(download(file, self.place(None)) for file in wanted) else self.missing(None)
        if left:
            raise DataNotFoundError(
                f"{self.name}: {shown(self.place(path))} lacks {_some(left)}; {self.advice}, "
                f"or put {self.name}.npz (train_images, train_labels, test_images, test_labels) there"
            )

    def checked(self, train: ImageData, test: ImageData | None) -> Source:
        """A `Source` of the two parts; `DataError` when they are not as many as published."""
        found = {"training images": (len(train), self.train_images), "classes": (train.num_classes, self.classes)}
        if test is not None:
            found["test images"] = (len(test), self.test_images)
        for what, (got, expected) in found.items():
            if expected is not None and got != expected:
                raise DataError(f"{self.name}: got {got} {what}, the published set has {expected}; get its files anew")
        return Source(train, test, self.flip_safe)

    def read_npz(self, file: Path, image_size: int | None, *, group: str | None = None) -> Source:
        """The set from an .npz of our own keys; smaller cuts of it are welcome, so nothing is counted."""
        usual = self.group if self.grouped else None
        key_of = self.key_of if self.group and (group or usual) == self.group else None
        train, test = read_npz(file, group=group, usual=usual or "groups", key_of=key_of)
        parts = [None if part is None else replace(resized(part, image_size), name=self.name) for part in (train, test)]
        return Source(parts[0], parts[1], self.flip_safe)


class PublishedReader:
    """A reader whose facts are a `PublishedSet`; subclasses say how its files become images."""

    needs_path = None
    takes_group = True
    facts: PublishedSet

    @property
    def flip_safe(self) -> bool:
        """Whether a mirrored image keeps its label."""
        return self.facts.flip_safe

    def missing(self, path: Path | None) -> list[str]:
        """Files that are not there."""
        return self.facts.missing(path)

    def read(
        self, path: Path | None, *, image_size: int | None, skip_corrupt: bool, progress: bool, group: str | None = None
    ) -> Source:
        """Both parts, from the published files or from an .npz in their place."""
        npz = self.facts.npz(path)
        if npz:
            return self.facts.read_npz(npz, image_size, group=group)
        if group not in (None, self.facts.group):
            known = f"it has {self.facts.group!r}, or leave it out" if self.facts.group else "leave it out"
            raise SettingsError(f"{self.facts.name} has no group {group!r}; {known}")
        self.facts.require(path)
        train, test = self.parts(path, image_size=image_size, skip_corrupt=skip_corrupt, progress=progress)
        if group is None and not self.facts.grouped:
            train = replace(train, groups=None)
        elif self.facts.group and train.groups is None:
            raise DataError(f"{self.facts.name}: file names do not tell the {self.facts.group}; unpack the set anew")
        return self.facts.checked(resized(train, image_size), None if test is None else resized(test, image_size))

    def parts(
        self, path: Path | None, *, image_size: int | None, skip_corrupt: bool, progress: bool
    ) -> tuple[ImageData, ImageData | None]:
        """Training and test images of the published files, which are all there, with the groups they tell."""
        raise NotImplementedError

    def file(self, path: Path | None, name: str) -> Path:
        """One of the published files."""
        return self.facts.find(path, name) or self.facts.place(path) / name


def resized(data: ImageData, image_size: int | None) -> ImageData:
    """`data` at `image_size`; as it is for None."""
    return data if image_size is None else replace(data, images=resize_images(data.images, image_size))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def download(file: PublishedFile, folder: Path) -> bool:
    """Whether `file` could be fetched into `folder` and has its published checksum; written whole or not at all."""
    if file.url is None or not file.url.startswith(("http://", "https://")):
        return False
    try:
        with atomic_write(folder / file.name) as temporary:
            with urllib.request.urlopen(file.url, timeout=_TIMEOUT) as answer, open(temporary, "wb") as target:
                shutil.copyfileobj(answer, target)
            if file.md5 is not None and _md5(temporary) != file.md5:
                raise OSError("wrong checksum")
    except OSError:  # no network, no space, a broken answer
        return False
    return True


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
