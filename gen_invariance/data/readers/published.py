"""Where the files of published data sets are looked for, and the few that are downloaded."""

from __future__ import annotations

import hashlib
import shutil
import urllib.request
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from gen_invariance.data.grouping import number_groups
from gen_invariance.data.images import ImageData
from gen_invariance.data.readers.arrays import read_idx_pair, read_npz
from gen_invariance.data.readers.base import Reader, ReadOptions, Source
from gen_invariance.data.readers.folder import read_listed_images
from gen_invariance.data.storage import cache_folder
from gen_invariance.errors import DataError, DataNotFoundError, SettingsError, printable
from gen_invariance.files import atomic_write

_TIMEOUT = 30  # seconds without an answer

Listed = list[tuple[Path, int]]
"""Image files with their labels."""


@dataclass(frozen=True)
class PublishedFile:
    """A file as its publisher offers it; `url` and `md5` are None where none is published."""

    name: str
    url: str | None = None
    md5: str | None = None


class PublishedReader(Reader):
    """A published data set; subclasses say how its files become images.

    Attributes:
        name: of the source; `NAME.npz` with our own keys (see `arrays.read_npz`) is taken in place of its files.
        files: that it is made of, below its folder.
        advice: where to get it, in a few words.
        train_images, test_images, classes: how many its publisher says there are; checked.
        download: whether `files` are fetched when no path is given.
        group: what its files tell of each image beyond the label, such as the track; None for nothing.
        grouped: whether `group` is taken unless another one is asked for; otherwise only when it is asked for.
    """

    takes_group = True
    name: str
    files: tuple[PublishedFile, ...]
    advice: str
    train_images: int | None = None
    test_images: int | None = None
    classes: int | None = None
    download = False
    group: str | None = None
    grouped = True

    def parts(self, options: ReadOptions) -> tuple[ImageData, ImageData | None]:
        """Training and test images of the published files, which are all there, with the groups they tell."""
        raise NotImplementedError

    def group_key(self, value: Hashable, label: int, class_name: str) -> Hashable:
        """The key of a group from its value in an .npz file, which may begin anew in each class."""
        return value

    @property
    def folder(self) -> Path:
        """The folder (or .npz file) to look in."""
        return cache_folder() / self.name if self.path is None else self.path

    def find(self, name: str) -> Path | None:
        """The file or folder `name`, or `name`.gz or `name` without .gz."""
        for spelling in (name, f"{name}.gz", name.removesuffix(".gz")):
            if (self.folder / spelling).exists():
                return self.folder / spelling
        return None

    def file(self, name: str) -> Path:
        """One of the published files, which is there."""
        return self.find(name) or self.folder / name

    def find_npz(self) -> Path | None:
        """The .npz file that stands in for the published files, if there is one."""
        path = self.folder if self.folder.suffix == ".npz" else self.folder / f"{self.name}.npz"
        return path if path.is_file() else None

    def missing(self) -> list[str]:
        """Files that are not there."""
        return [] if self.find_npz() else [file.name for file in self.files if self.find(file.name) is None]

    def read(self, options: ReadOptions) -> Source:
        """Both parts, from the published files or from an .npz in their place."""
        npz = self.find_npz()
        if npz:
            train, test = self._read_npz(npz, options)
        else:
            train, test = self._read_files(options)
        if test is not None:
            test = test.resized(options.image_size)
        return Source(train.resized(options.image_size), test, self.flip_safe)

    def _read_npz(self, file: Path, options: ReadOptions) -> tuple[ImageData, ImageData | None]:
        """The set from an .npz of our own keys; smaller cuts of it are welcome, so nothing is counted."""
        usual = self.group if self.grouped else None
        own_group = self.group is not None and (options.group or usual) == self.group
        key_of = self.group_key if own_group else None
        train, test = read_npz(file, group=options.group, usual=usual or "groups", key_of=key_of)
        return replace(train, name=self.name), None if test is None else replace(test, name=self.name)

    def _read_files(self, options: ReadOptions) -> tuple[ImageData, ImageData | None]:
        if options.group not in (None, self.group):
            known = f"it has {self.group!r}, or leave it out" if self.group else "leave it out"
            raise SettingsError(f"{self.name} has no group {options.group!r}; {known}")
        self._require_files()
        train, test = self.parts(options)
        if options.group is None and not self.grouped:
            train = replace(train, groups=None)
        elif self.group and train.groups is None:
            raise DataError(f"{self.name}: file names do not tell the {self.group}; unpack the set anew")
        self._check_number(len(train), self.train_images, "training images")
        self._check_number(train.num_classes, self.classes, "classes")
        if test is not None:
            self._check_number(len(test), self.test_images, "test images")
        return train, test

    def _check_number(self, number: int, expected: int | None, what: str) -> None:
        if expected is not None and number != expected:
            raise DataError(f"{self.name}: got {number} {what}, the published set has {expected}; get its files anew")

    def _require_files(self) -> None:
        """Download what may be downloaded; raise `DataNotFoundError` while something is missing."""
        missing = self.missing()
        if missing and self.path is None and self.download:
            for file in self.files:
                if file.name in missing and not download(file, self.folder):
                    break
            missing = self.missing()
        if missing:
            names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise DataNotFoundError(
                f"{self.name}: {printable(self.folder)} lacks {names}; {self.advice}, "
                f"or put {self.name}.npz (train_images, train_labels, test_images, test_labels) there"
            )


def idx_files(address: str, *md5: str) -> tuple[PublishedFile, ...]:
    """The four files of a set in the form of MNIST, at `address`."""
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(
        PublishedFile(f"{part}-ubyte.gz", f"{address}/{part}-ubyte.gz", digest)
        for part, digest in zip(parts, md5, strict=True)
    )


class IdxReader(PublishedReader):
    """A set of four IDX files: images and labels for training, images and labels for testing."""

    classes = 10
    class_names: tuple[str, ...]
    first_label = 0

    def parts(self, options: ReadOptions) -> tuple[ImageData, ImageData]:
        """The four files."""
        train, test = (
            ImageData(*self._pair(*(self.file(file.name) for file in pair)), self.class_names, self.name)
            for pair in (self.files[:2], self.files[2:])
        )
        return train, test

    def _pair(self, images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
        images, labels = read_idx_pair(images_path, labels_path, num_classes=len(self.class_names) + self.first_label)
        if int(labels.min()) < self.first_label:
            raise DataError(
                f"{self.name}: labels must count from {self.first_label}; give the letters split, not another one"
            )
        return images, labels - self.first_label


class ListedReader(PublishedReader):
    """A set whose images are files with labels from lists; subclasses make the lists.

    Attributes:
        image_size: side of the images unless asked for; large sets are held in memory at that size.
        channels: 1 or 3.
    """

    image_size = 64
    channels = 3

    def lists(self) -> tuple[Listed, Listed | None, Sequence[str]]:
        """Training and test files with their labels, and the class names."""
        raise NotImplementedError

    def file_group(self, file: Path) -> Hashable | None:
        """The key of the group of a training image; None where its file does not tell."""
        return None

    def parts(self, options: ReadOptions) -> tuple[ImageData, ImageData | None]:
        """Both lists, decoded at the size asked for or the set's own."""
        train_list, test_list, names = self.lists()
        train, paths = self._decode(train_list, names, options)
        keys = [self.file_group(file) for file in paths]
        if None not in keys:
            train = replace(train, groups=number_groups(keys)[0])
        return train, None if test_list is None else self._decode(test_list, names, options)[0]

    def _decode(
        self, labelled: Listed, names: Sequence[str], options: ReadOptions
    ) -> tuple[ImageData, tuple[Path, ...]]:
        absent = next((file for file, _ in labelled if not file.is_file()), None)
        if absent is not None or not labelled:
            raise DataError(f"{self.name}: {printable(absent or 'a list')} is missing or empty; unpack the set anew")
        data, report = read_listed_images(
            labelled,
            names,
            name=self.name,
            image_size=options.image_size or self.image_size,
            channels=self.channels,
            skip_corrupt=options.skip_corrupt,
            progress=options.progress,
            map_from=options.map_from,
        )
        return data, report.paths


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
