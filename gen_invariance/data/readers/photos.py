"""Readers of photo sets: Fashion-MNIST, CIFAR, GTSRB, TinyImageNet, ImageNet-LT, Places-LT, iNaturalist 2018.

CIFAR is read in its binary version, since the Python version is pickled and nothing here is unpickled.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gen_invariance.data.images import ImageData, names_or_numbers
from gen_invariance.data.readers.base import ReadOptions
from gen_invariance.data.readers.published import (
    IdxReader,
    Listed,
    ListedReader,
    PublishedFile,
    PublishedReader,
    idx_files,
)
from gen_invariance.data.readers.tree import sub_folders
from gen_invariance.data.storage import cache_folder
from gen_invariance.errors import DataError, printable

_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz"
_ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class FashionMnist(IdxReader):
    """Fashion-MNIST: 60,000 and 10,000 grey images of clothes, 28x28, 10 classes.

    Reference:
        Xiao, Rasul and Vollgraf, arXiv 1708.07747.
    """

    name = "fashion_mnist"
    flip_safe = True  # shoes all point one way in the data, but a flipped shoe is the same class
    files = idx_files(
        _ZALANDO,
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    )
    advice = f"run `apt-get install dataset-fashion-mnist`, download the four files from {_ZALANDO}/"
    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    download = True

    @property
    def folder(self) -> Path:
        """`path`, Debian's package or the cache, where torchvision's downloads in FashionMNIST/raw are found, too."""
        below = Path("FashionMNIST") / "raw"
        places = [_DEBIAN, cache_folder() / below] if self.path is None else [self.path / below]
        for place in places:
            if all((place / file.name).is_file() or (place / Path(file.name).stem).is_file() for file in self.files):
                return place
        return super().folder


class _Cifar(PublishedReader):
    """Records of `label_bytes` labels, of which the last counts, and 3,072 pixels."""

    flip_safe = True
    train_images, test_images = 50_000, 10_000
    label_bytes: int
    train_files: tuple[str, ...]
    test_file: str
    names_file: str

    def parts(self, options: ReadOptions) -> tuple[ImageData, ImageData]:
        """The binary files and their list of class names."""
        text = self.file(self.names_file).read_text(encoding="utf-8")
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        return self._read_records(self.train_files, names), self._read_records((self.test_file,), names)

    def _read_records(self, files: Sequence[str], names: tuple[str, ...]) -> ImageData:
        length, parts = self.label_bytes + 3072, []
        for file in map(self.file, files):
            content = np.frombuffer(file.read_bytes(), np.uint8)
            if not len(content) or len(content) % length:
                raise DataError(
                    f"{printable(file)} is truncated: {len(content)} bytes are no multiple of {length}; get it anew"
                )
            parts.append(content.reshape(-1, length))
        records = torch.from_numpy(np.concatenate(parts))
        pixels = records[:, self.label_bytes :].reshape(-1, 3, 32, 32)
        return ImageData(pixels, records[:, self.label_bytes - 1].long(), names, self.name)


class Cifar10(_Cifar):
    """CIFAR-10: 50,000 and 10,000 photos of 32x32, 10 classes.

    Reference:
        Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """

    name = "cifar10"
    label_bytes, names_file, test_file = 1, "batches.meta.txt", "test_batch.bin"
    train_files = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
    files = tuple(map(PublishedFile, (*train_files, test_file, names_file)))
    advice = f"unpack {_KRIZHEVSKY}/cifar-10-binary.tar.gz (md5 c32a1d4ab5d03f1284b67883e8d87530) there"
    classes = 10


class Cifar100(_Cifar):
    """CIFAR-100: 50,000 and 10,000 photos of 32x32, 100 classes.

    Reference:
        Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """

    name = "cifar100"
    label_bytes, names_file, test_file = 2, "fine_label_names.txt", "test.bin"
    train_files = ("train.bin",)
    files = tuple(map(PublishedFile, (*train_files, test_file, names_file)))
    advice = f"unpack {_KRIZHEVSKY}/cifar-100-binary.tar.gz there"
    classes = 100


class Gtsrb(ListedReader):
    """German traffic signs: 39,209 and 12,630 photos of several sizes, 43 classes; read at 32x32.

    Training images come in tracks, some thirty frames of one physical sign each; tracks count from 0 in each class.

    Reference:
        Stallkamp et al., "Man vs. computer: benchmarking machine learning algorithms for traffic sign recognition",
        Neural Networks 2012.
    """

    name = "gtsrb"
    files = tuple(map(PublishedFile, ("GTSRB/Final_Training/Images", "GTSRB/Final_Test/Images", "GT-final_test.csv")))
    advice = "unpack GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip there"
    train_images, test_images, classes = 39_209, 12_630, 43
    image_size = 32
    group = "track"

    def lists(self) -> tuple[Listed, Listed, Sequence[str]]:
        """Class folders for training, a table with semicolons for testing."""
        folders = self.file("GTSRB/Final_Training/Images")
        train = [(file, int(file.parent.name)) for file in sorted(folders.glob("[0-9]*/*.ppm"))]
        images, table = self.file("GTSRB/Final_Test/Images"), self.file("GT-final_test.csv")
        try:
            with open(table, newline="", encoding="utf-8") as file:
                test = [(images / row["Filename"], int(row["ClassId"])) for row in csv.DictReader(file, delimiter=";")]
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{printable(table)} has no columns Filename and ClassId; get it anew") from error
        return train, test, names_or_numbers(None, 43)

    def file_group(self, file: Path) -> Hashable | None:
        """By class folder and the number before the underscore: 00012/00003_00027.ppm is a frame of track 3."""
        track, _, frame = file.stem.partition("_")
        return (file.parent.name, int(track)) if track.isdecimal() and frame else None

    def group_key(self, value: Hashable, label: int, class_name: str) -> Hashable:
        """Tracks are numbered in each class."""
        return label, value


class TinyImageNet(ListedReader):
    """TinyImageNet: 100,000 photos of 64x64, 200 classes; its 10,000 validation images are the test part."""

    name = "tiny_imagenet"
    flip_safe = True
    files = tuple(map(PublishedFile, ("train", "val/images", "val/val_annotations.txt")))
    advice = "unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip and give the folder tiny-imagenet-200"
    train_images, test_images, classes = 100_000, 10_000, 200

    def lists(self) -> tuple[Listed, Listed, Sequence[str]]:
        """Class folders for training, a table with tabs for testing."""
        folders = sub_folders(self.file("train"))
        number = {folder.name: label for label, folder in enumerate(folders)}
        train = [(file, number[folder.name]) for folder in folders for file in sorted(folder.glob("images/*.JPEG"))]
        table, images = self.file("val/val_annotations.txt"), self.file("val/images")
        test = [(images / columns[0], number.get(columns[1], -1)) for columns in _read_columns(table)]
        if any(label < 0 for _, label in test):
            raise DataError(f"{printable(table)} names classes that have no training folder; unpack the set anew")
        return train, test, tuple(number)


def _read_columns(file: Path) -> list[list[str]]:
    return [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


class _ListFiles(ListedReader):
    """Text files of a relative path and a label a line; images lie below the folder of the lists."""

    flip_safe = True
    train_list: str
    test_list: str
    classes: int

    def lists(self) -> tuple[Listed, Listed, Sequence[str]]:
        """The lists of both files."""
        return self._read_list(self.train_list), self._read_list(self.test_list), names_or_numbers(None, self.classes)

    def _read_list(self, name: str) -> Listed:
        file = self.file(name)
        try:
            return [(self.folder / image, int(label)) for image, label in _read_columns(file)]
        except ValueError as error:
            raise DataError(f"{printable(file)} must hold a path and a class number a line; get it anew") from error


class ImageNetLt(_ListFiles):
    """ImageNet-LT: 115,846 long-tailed training photos, 50,000 test photos, 1,000 classes of 1,280 to 5.

    Reference:
        Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019.
    """

    name = "imagenet_lt"
    train_list, test_list = "ImageNet_LT_train.txt", "ImageNet_LT_test.txt"
    files = tuple(map(PublishedFile, (train_list, test_list, "train", "val")))
    advice = "put ImageNet's train/ and val/ folders and the two list files of Liu et al. there"
    train_images, test_images, classes = 115_846, 50_000, 1000


class PlacesLt(_ListFiles):
    """Places-LT: 62,500 long-tailed training photos, 36,500 test photos, 365 classes of 4,980 to 5.

    Reference:
        Liu et al., CVPR 2019.
    """

    name = "places_lt"
    train_list, test_list = "Places_LT_train.txt", "Places_LT_test.txt"
    files = tuple(map(PublishedFile, (train_list, test_list, "data_256")))
    advice = "put Places365's data_256/ folder and the two list files of Liu et al. there"
    train_images, test_images, classes = 62_500, 36_500, 365


class INaturalist2018(ListedReader):
    """iNaturalist 2018: 437,513 training and 24,426 validation photos (the test part here), 8,142 species.

    Reference:
        Van Horn et al., "The iNaturalist species classification and detection dataset", CVPR 2018.
    """

    name = "inaturalist2018"
    flip_safe = True
    files = tuple(map(PublishedFile, ("train2018.json", "val2018.json", "train_val2018")))
    advice = "unpack train_val2018.tar.gz and the two annotation files of the 2018 competition there"
    train_images, test_images, classes = 437_513, 24_426, 8142

    def lists(self) -> tuple[Listed, Listed, Sequence[str]]:
        """COCO-style annotation files; category numbers are the labels."""
        names = names_or_numbers(None, self.classes)
        return self._read_table("train2018.json"), self._read_table("val2018.json"), names

    def _read_table(self, name: str) -> Listed:
        file = self.file(name)
        try:
            table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            label = {entry["image_id"]: int(entry["category_id"]) for entry in table["annotations"]}
            return [(self.folder / image["file_name"], label[image["id"]]) for image in table["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{printable(file)} is no annotation file of the 2018 competition ({error}); get it anew"
            ) from error
