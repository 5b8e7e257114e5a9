"""Readers of published photo sets: CIFAR, GTSRB, TinyImageNet, ImageNet-LT, Places-LT, iNaturalist 2018.

CIFAR is read in its binary version, since the Python version is pickled and nothing here is unpickled. Large sets are
held in memory at the size asked for, 64 pixels unless set.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_invariance.data.grouping import number_groups
from gen_invariance.data.images import ImageData, names_or_numbers
from gen_invariance.data.readers.folder import read_listed_images, shown
from gen_invariance.data.readers.published import PublishedFile, PublishedReader, PublishedSet
from gen_invariance.data.readers.registry import register
from gen_invariance.errors import DataError

_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz"
_LARGE = 64  # pixels


class _Cifar(PublishedReader):
    """Records of `label_bytes` labels, of which the last counts, and 3,072 pixels."""

    label_bytes: int
    train_files: tuple[str, ...]
    test_file: str
    names_file: str

    def parts(self, path: Path | None, **_: object) -> tuple[ImageData, ImageData]:
        """The binary files and their list of class names."""
        text = self.file(path, self.names_file).read_text(encoding="utf-8")
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        train = np.concatenate([self._records(path, name) for name in self.train_files])
        return self._data(train, names), self._data(self._records(path, self.test_file), names)

    def _records(self, path: Path | None, name: str) -> np.ndarray:
        file, length = self.file(path, name), self.label_bytes + 3072
        content = np.frombuffer(file.read_bytes(), np.uint8)
        if not len(content) or len(content) % length:
            raise DataError(
                f"{shown(file)} is truncated: {len(content)} bytes are no multiple of {length}; get it anew"
            )
        return content.reshape(-1, length)

    def _data(self, records: np.ndarray, names: tuple[str, ...]) -> ImageData:
        labels = torch.from_numpy(records[:, self.label_bytes - 1].astype(np.int64))
        pixels = records[:, self.label_bytes :].reshape(-1, 3, 32, 32)
        return ImageData(torch.from_numpy(np.ascontiguousarray(pixels)), labels, names, self.facts.name)


@register("cifar10")
class _Cifar10(_Cifar):
    """CIFAR-10: 50,000 and 10,000 photos of 32x32, 10 classes.

    Reference:
        Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """

    label_bytes, names_file, test_file = 1, "batches.meta.txt", "test_batch.bin"
    train_files = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
    facts = PublishedSet(
        "cifar10",
        tuple(map(PublishedFile, (*train_files, test_file, names_file))),
        f"unpack {_KRIZHEVSKY}/cifar-10-binary.tar.gz (md5 c32a1d4ab5d03f1284b67883e8d87530) there",
        flip_safe=True,
        train_images=50_000,
        test_images=10_000,
        classes=10,
    )


@register("cifar100")
class _Cifar100(_Cifar):
    """CIFAR-100: 50,000 and 10,000 photos of 32x32, 100 classes.

    Reference:
        Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """

    label_bytes, names_file, test_file = 2, "fine_label_names.txt", "test.bin"
    train_files = ("train.bin",)
    facts = PublishedSet(
        "cifar100",
        tuple(map(PublishedFile, (*train_files, test_file, names_file))),
        f"unpack {_KRIZHEVSKY}/cifar-100-binary.tar.gz there",
        flip_safe=True,
        train_images=50_000,
        test_images=10_000,
        classes=100,
    )


class _Listed(PublishedReader):
    """A set whose images are files with labels from lists; subclasses give both lists."""

    image_size = _LARGE
    channels = 3

    def listed(self, path: Path | None) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]], Sequence[str]]:
        raise NotImplementedError

    def parts(
        self, path: Path | None, *, image_size: int | None, skip_corrupt: bool, progress: bool
    ) -> tuple[ImageData, ImageData]:
        """Both lists, decoded at `image_size` or the set's own."""
        *lists, names = self.listed(path)
        for numbered in lists:
            absent = next((file for file, _ in numbered if not file.is_file()), None)
            if absent is not None or not numbered:
                raise DataError(
                    f"{self.facts.name}: {shown(absent or 'a list')} is missing or empty; unpack the set anew"
                )
        options = {
            "name": self.facts.name,
            "image_size": image_size or self.image_size,
            "channels": self.channels,
            "skip_corrupt": skip_corrupt,
            "progress": progress,
        }
        (train, report), (test, _) = (read_listed_images(numbered, names, **options) for numbered in lists)
        return replace(train, groups=self.groups_of(report.paths)), test

    def groups_of(self, files: Sequence[Path]) -> Tensor | None:
        """Group numbers of the training images; None where their files do not tell."""
        return None


@register("gtsrb")
class _Gtsrb(_Listed):
    """German traffic signs: 39,209 and 12,630 photos of several sizes, 43 classes; read at 32x32.

    Training images come in tracks, some thirty frames of one physical sign each; tracks count from 0 in each class.

    Reference:
        Stallkamp et al., "Man vs. computer: benchmarking machine learning algorithms for traffic sign recognition",
        Neural Networks 2012.
    """

    image_size = 32
    facts = PublishedSet(
        "gtsrb",
        tuple(map(PublishedFile, ("GTSRB/Final_Training/Images", "GTSRB/Final_Test/Images", "GT-final_test.csv"))),
        "unpack GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip there",
        flip_safe=False,
        train_images=39_209,
        test_images=12_630,
        classes=43,
        group="track",
        key_of=lambda track, label, name: (label, track),
    )

    def listed(self, path: Path | None) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]], Sequence[str]]:
        """Class folders for training, a table with semicolons for testing."""
        folders = self.file(path, "GTSRB/Final_Training/Images")
        train = [(file, int(file.parent.name)) for file in sorted(folders.glob("[0-9]*/*.ppm"))]
        images = self.file(path, "GTSRB/Final_Test/Images")
        table = self.file(path, "GT-final_test.csv")
        try:
            with open(table, newline="", encoding="utf-8") as file:
                test = [(images / row["Filename"], int(row["ClassId"])) for row in csv.DictReader(file, delimiter=";")]
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{shown(table)} has no columns Filename and ClassId; get it anew") from error
        return train, test, names_or_numbers(None, 43)

    def groups_of(self, files: Sequence[Path]) -> Tensor | None:
        """By class folder and the number before the underscore: 00012/00003_00027.ppm is a frame of track 3."""
        tracks = [(file.parent.name, file.stem.partition("_")[::2]) for file in files]
        if not all(track.isdecimal() and frame for _, (track, frame) in tracks):
            return None
        return number_groups([(label, int(track)) for label, (track, _) in tracks])[0]


@register("tiny_imagenet")
class _TinyImageNet(_Listed):
    """TinyImageNet: 100,000 photos of 64x64, 200 classes; its 10,000 validation images are the test part."""

    facts = PublishedSet(
        "tiny_imagenet",
        tuple(map(PublishedFile, ("train", "val/images", "val/val_annotations.txt"))),
        "unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip and give the folder tiny-imagenet-200",
        flip_safe=True,
        train_images=100_000,
        test_images=10_000,
        classes=200,
    )

    def listed(self, path: Path | None) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]], Sequence[str]]:
        """Class folders for training, a table with tabs for testing."""
        folders = sorted(folder for folder in self.file(path, "train").iterdir() if folder.is_dir())
        number = {folder.name: label for label, folder in enumerate(folders)}
        train = [(file, number[folder.name]) for folder in folders for file in sorted(folder.glob("images/*.JPEG"))]
        table, images = self.file(path, "val/val_annotations.txt"), self.file(path, "val/images")
        test = [(images / name, number.get(wnid, -1)) for name, wnid, *_ in _columns(table)]
        if any(label < 0 for _, label in test):
            raise DataError(f"{shown(table)} names classes that have no training folder; unpack the set anew")
        return train, test, tuple(number)


class _ListFiles(_Listed):
    """Text files of a relative path and a label a line."""

    train_list: str
    test_list: str

    def listed(self, path: Path | None) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]], Sequence[str]]:
        """Images lie below the folder of the lists."""
        root, parts = self.facts.place(path), []
        for name in (self.train_list, self.test_list):
            file = self.file(path, name)
            try:
                parts.append([(root / image, int(label)) for image, label in _columns(file)])
            except ValueError as error:
                raise DataError(f"{shown(file)} must hold a path and a class number a line; get it anew") from error
        highest = max((label for part in parts for _, label in part), default=0)
        return parts[0], parts[1], names_or_numbers(None, self.facts.classes or highest + 1)


def _columns(file: Path) -> list[list[str]]:
    return [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


@register("imagenet_lt")
class _ImageNetLt(_ListFiles):
    """ImageNet-LT: 115,846 long-tailed training photos, 50,000 test photos, 1,000 classes of 1,280 to 5.

    Reference:
        Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019.
    """

    train_list, test_list = "ImageNet_LT_train.txt", "ImageNet_LT_test.txt"
    facts = PublishedSet(
        "imagenet_lt",
        tuple(map(PublishedFile, (train_list, test_list, "train", "val"))),
        "put ImageNet's train/ and val/ folders and the two list files of Liu et al. there",
        flip_safe=True,
        train_images=115_846,
        test_images=50_000,
        classes=1000,
    )


@register("places_lt")
class _PlacesLt(_ListFiles):
    """Places-LT: 62,500 long-tailed training photos, 36,500 test photos, 365 classes of 4,980 to 5.

    Reference:
        Liu et al., CVPR 2019.
    """

    train_list, test_list = "Places_LT_train.txt", "Places_LT_test.txt"
    facts = PublishedSet(
        "places_lt",
        tuple(map(PublishedFile, (train_list, test_list, "data_256"))),
        "put Places365's data_256/ folder and the two list files of Liu et al. there",
        flip_safe=True,
        train_images=62_500,
        test_images=36_500,
        classes=365,
    )


@register("inaturalist2018")
class _INaturalist2018(_Listed):
    """iNaturalist 2018: 437,513 training and 24,426 validation photos (the test part here), 8,142 species.

    Reference:
        Van Horn et al., "The iNaturalist species classification and detection dataset", CVPR 2018.
    """

    facts = PublishedSet(
        "inaturalist2018",
        tuple(map(PublishedFile, ("train2018.json", "val2018.json", "train_val2018"))),
        "unpack train_val2018.tar.gz and the two annotation files of the 2018 competition there",
        flip_safe=True,
        train_images=437_513,
        test_images=24_426,
        classes=8142,
    )

    def listed(self, path: Path | None) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]], Sequence[str]]:
        """COCO-style annotation files; category numbers are the labels."""
        tables = [self._table(path, name) for name in ("train2018.json", "val2018.json")]
        numbers = [label for part in tables for _, label in part]
        return tables[0], tables[1], names_or_numbers(None, self.facts.classes or max(numbers, default=0) + 1)

    def _table(self, path: Path | None, name: str) -> list[tuple[Path, int]]:
        file, root = self.file(path, name), self.facts.place(path)
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            label = {entry["image_id"]: int(entry["category_id"]) for entry in found["annotations"]}
            return [(root / image["file_name"], label[image["id"]]) for image in found["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{shown(file)} is no annotation file of the 2018 competition ({error}); get it anew"
            ) from error
