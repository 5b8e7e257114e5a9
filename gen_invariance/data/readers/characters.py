"""Readers of character sets: digits, Kuzushiji-49, Kuzushiji-MNIST, EMNIST letters, Devanagari, Omniglot.

Ink is light on a ground of exactly 0, as the nuisances of the K49 benchmarks expect it.
"""

from __future__ import annotations

import string
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.data.images import ImageData, names_or_numbers, to_uint8
from gen_invariance.data.readers.arrays import load_arrays
from gen_invariance.data.readers.base import Reader, ReadOptions, Source
from gen_invariance.data.readers.folder import read_image_folder
from gen_invariance.data.readers.published import (
    IdxReader,
    Listed,
    ListedReader,
    PublishedFile,
    PublishedReader,
    idx_files,
)
from gen_invariance.errors import DataError, printable

_CODH = "http://codh.rois.ac.jp/kmnist/dataset"


class Digits(Reader):
    """Handwritten digits of the UCI repository, 1,797 of 8x8, which ship with scikit-learn; no test part.

    Reference:
        Alpaydin and Kaynak, "Cascading classifiers", Kybernetika 1998.
    """

    image_size = 16  # 8x8 is too small for translators that halve the image twice

    def read(self, options: ReadOptions) -> Source:
        """The whole set as training images; ink 0 to 16 becomes 0 to 255."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        ink = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
        side = options.image_size or self.image_size
        images = F.interpolate(ink, size=(side, side), mode="bilinear", antialias=side < ink.shape[-1])
        data = ImageData(to_uint8(images), torch.from_numpy(bunch.target).long(), names_or_numbers(None, 10), "digits")
        return Source(data, None, self.flip_safe)


class Kuzushiji49(PublishedReader):
    """Kuzushiji-49: 232,365 and 38,547 grey images of 28x28, 49 classes of unequal size.

    Reference:
        Clanuwat et al., "Deep Learning for Classical Japanese Literature", arXiv 1812.01718 (CC BY-SA 4.0).
    """

    name = "k49"
    files = (
        PublishedFile("k49-train-imgs.npz", f"{_CODH}/k49/k49-train-imgs.npz", "7ac088b20481cf51dcd01ceaab89d821"),
        PublishedFile("k49-train-labels.npz", f"{_CODH}/k49/k49-train-labels.npz", "44a8e1b893f81e63ff38d73cad420f7a"),
        PublishedFile("k49-test-imgs.npz", f"{_CODH}/k49/k49-test-imgs.npz", "d352e201d846ce6b94f42c990966f374"),
        PublishedFile("k49-test-labels.npz", f"{_CODH}/k49/k49-test-labels.npz", "4da6f7a62e67a832d5eb1bd85c5ee448"),
    )
    advice = f"download k49-{{train,test}}-{{imgs,labels}}.npz from {_CODH}/k49/"
    train_images, test_images, classes = 232_365, 38_547, 49
    download = True

    def parts(self, options: ReadOptions) -> tuple[ImageData, ImageData]:
        """The four files, each with the array `arr_0`."""
        return self._part("train"), self._part("test")

    def _part(self, part: str) -> ImageData:
        images, labels = self._array(f"k49-{part}-imgs.npz"), self._array(f"k49-{part}-labels.npz")
        if images.dtype != torch.uint8 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise DataError(
                f"k49: {part} images are {images.dtype} {tuple(images.shape)} and labels {tuple(labels.shape)}, "
                "expected uint8 (N, 28, 28) and (N,); get the files anew"
            )
        return ImageData(images[:, None], labels.long(), names_or_numbers(None, 49), "k49")

    def _array(self, name: str) -> Tensor:
        file = self.file(name)
        arrays = load_arrays(file, ("arr_0",))
        if "arr_0" not in arrays or arrays["arr_0"].dtype.kind not in "iu":
            raise DataError(f"{printable(file)} does not hold whole numbers called arr_0; get the file anew")
        return torch.from_numpy(arrays["arr_0"])


class KuzushijiMnist(IdxReader):
    """Kuzushiji-MNIST: 60,000 and 10,000 grey images of 28x28, 10 classes.

    Reference:
        Clanuwat et al., arXiv 1812.01718 (CC BY-SA 4.0).
    """

    name = "kmnist"
    files = idx_files(
        f"{_CODH}/kmnist",
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    )
    advice = f"download the four files from {_CODH}/kmnist/"
    train_images, test_images = 60_000, 10_000
    class_names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    download = True


class EmnistLetters(IdxReader):
    """EMNIST Letters: 124,800 and 20,800 grey images of 28x28, 26 classes, upper and lower case together.

    Its files hold images on their side and labels from 1.

    Reference:
        Cohen et al., "EMNIST: an extension of MNIST to handwritten letters", arXiv 1702.05373.
    """

    name = "emnist_letters"
    files = tuple(
        PublishedFile(f"emnist-letters-{part}-{kind}-ubyte.gz")
        for part in ("train", "test")
        for kind in ("images-idx3", "labels-idx1")
    )
    advice = (
        "unpack emnist-letters-* of gzip.zip from https://www.nist.gov/itl/products-and-services/emnist-dataset there"
    )
    classes = 26
    class_names = tuple(string.ascii_uppercase)
    first_label = 1

    def parts(self, options: ReadOptions) -> tuple[ImageData, ImageData]:
        """The four files, images upright."""
        train, test = super().parts(options)
        upright = [part.images.transpose(2, 3).contiguous() for part in (train, test)]
        return replace(train, images=upright[0]), replace(test, images=upright[1])


class Devanagari(PublishedReader):
    """Devanagari characters: 78,200 and 13,800 grey images of 32x32, 46 classes.

    Reference:
        Acharya, Pant and Gyawali, "Deep learning based large scale handwritten Devanagari character recognition",
        SKIMA 2015 (UCI repository, CC BY 4.0).
    """

    name = "devanagari"
    files = (PublishedFile("Train"), PublishedFile("Test"))
    advice = "unpack DevanagariHandwrittenCharacterDataset.zip of the UCI repository so that Train and Test lie there"
    train_images, test_images, classes = 78_200, 13_800, 46

    def parts(self, options: ReadOptions) -> tuple[ImageData, ImageData]:
        """Two image folders of the same classes."""
        how: dict[str, Any] = {
            "image_size": options.image_size,
            "channels": 1,
            "skip_corrupt": options.skip_corrupt,
            "progress": options.progress,
            "map_from": options.map_from,
        }
        train, _ = read_image_folder(self.file("Train"), **how)
        test, _ = read_image_folder(self.file("Test"), class_names=train.class_names, **how)
        return replace(train, name=self.name), replace(test, name=self.name)


class Omniglot(ListedReader):
    """Omniglot's 964 background characters, 20 drawings each, as training images; ink inverted to light on dark.

    Its 659 evaluation characters are other classes and are not read: test on what is left of the training images.
    Each alphabet was drawn by twenty people: group "drawer" keeps the drawings of one together, if asked for.

    Reference:
        Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program induction",
        Science 2015 (MIT).
    """

    name = "omniglot"
    files = (PublishedFile("images_background"),)
    advice = "unpack images_background.zip of https://github.com/brendenlake/omniglot there"
    train_images, classes = 19_280, 964
    image_size, channels = 28, 1
    group, grouped = "drawer", False

    def lists(self) -> tuple[Listed, None, list[str]]:
        """All drawings below images_background/ALPHABET/CHARACTER."""
        folders = sorted(folder for folder in self.file("images_background").glob("*/*") if folder.is_dir())
        drawings = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.glob("*.png"))]
        return drawings, None, [f"{folder.parent.name}/{folder.name}" for folder in folders]

    def parts(self, options: ReadOptions) -> tuple[ImageData, None]:
        """All drawings, inverted."""
        train, _ = super().parts(options)
        return replace(train, images=255 - train.images), None

    def file_group(self, file: Path) -> Hashable | None:
        """By alphabet and the number after the underscore of ALPHABET/CHARACTER/NUMBER_DRAWER.png."""
        number, _, drawer = file.stem.rpartition("_")
        return (file.parent.parent.name, int(drawer)) if number and drawer.isdecimal() else None

    def group_key(self, value: Hashable, label: int, class_name: str) -> Hashable:
        """Drawers are numbered in each alphabet."""
        return class_name.partition("/")[0], value
