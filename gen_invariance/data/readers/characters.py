"""Readers of published character sets: Kuzushiji-49, Kuzushiji-MNIST, EMNIST letters, Devanagari, Omniglot.

Ink is light on a ground of exactly 0, as the nuisances of the K49 benchmarks expect it.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gen_invariance.data.grouping import number_groups
from gen_invariance.data.images import ImageData, names_or_numbers
from gen_invariance.data.readers.arrays import load_arrays, read_idx_pair
from gen_invariance.data.readers.folder import read_image_folder, read_listed_images, shown
from gen_invariance.data.readers.published import PublishedFile, PublishedReader, PublishedSet
from gen_invariance.data.readers.registry import register
from gen_invariance.errors import DataError

_CODH = "http://codh.rois.ac.jp/kmnist/dataset"
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_KMNIST_MD5 = (
    "bdb82020997e1d708af4cf47b453dcf7",
    "e144d726b3acfaa3e44228e80efcd344",
    "5c965bf0a639b31b8f53240b1b52f4d7",
    "7320c461ea6c1c855c0b718fb2a4b134",
)
_K49_MD5 = {
    "train-imgs": "7ac088b20481cf51dcd01ceaab89d821",
    "train-labels": "44a8e1b893f81e63ff38d73cad420f7a",
    "test-imgs": "d352e201d846ce6b94f42c990966f374",
    "test-labels": "4da6f7a62e67a832d5eb1bd85c5ee448",
}


@register("k49")
class _Kuzushiji49(PublishedReader):
    """Kuzushiji-49: 232,365 and 38,547 grey images of 28x28, 49 classes of unequal size.

    Reference:
        Clanuwat et al., "Deep Learning for Classical Japanese Literature", arXiv 1812.01718 (CC BY-SA 4.0).
    """

    facts = PublishedSet(
        "k49",
        tuple(PublishedFile(f"k49-{part}.npz", f"{_CODH}/k49/k49-{part}.npz", md5) for part, md5 in _K49_MD5.items()),
        f"download k49-{{train,test}}-{{imgs,labels}}.npz from {_CODH}/k49/",
        flip_safe=False,
        train_images=232_365,
        test_images=38_547,
        classes=49,
        download=True,
    )

    def parts(self, path: Path | None, **_: object) -> tuple[ImageData, ImageData]:
        """The four files, each with the array `arr_0`."""
        found = []
        for part in ("train", "test"):
            images, labels = (self._array(path, f"k49-{part}-{kind}.npz") for kind in ("imgs", "labels"))
            if images.dtype != torch.uint8 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
                raise DataError(
                    f"k49: {part} images are {images.dtype} {tuple(images.shape)} and labels {tuple(labels.shape)}, "
                    "expected uint8 (N, 28, 28) and (N,); get the files anew"
                )
            found.append(ImageData(images[:, None], labels.long(), names_or_numbers(None, 49), "k49"))
        return found[0], found[1]

    def _array(self, path: Path | None, name: str) -> Tensor:
        file = self.file(path, name)
        arrays = load_arrays(file, ("arr_0",))
        if "arr_0" not in arrays or arrays["arr_0"].dtype.kind not in "iu":
            raise DataError(f"{shown(file)} does not hold whole numbers called arr_0; get the file anew")
        return torch.from_numpy(arrays["arr_0"])


@register("kmnist")
class _KuzushijiMnist(PublishedReader):
    """Kuzushiji-MNIST: 60,000 and 10,000 grey images of 28x28, 10 classes.

    Reference:
        Clanuwat et al., arXiv 1812.01718 (CC BY-SA 4.0).
    """

    facts = PublishedSet(
        "kmnist",
        tuple(
            PublishedFile(f"{name}.gz", f"{_CODH}/kmnist/{name}.gz", md5)
            for name, md5 in zip(_IDX, _KMNIST_MD5, strict=True)
        ),
        f"download the four files from {_CODH}/kmnist/",
        flip_safe=False,
        train_images=60_000,
        test_images=10_000,
        classes=10,
        download=True,
    )

    def parts(self, path: Path | None, **_: object) -> tuple[ImageData, ImageData]:
        """The four IDX files."""
        names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
        files = [self.file(path, f"{name}.gz") for name in _IDX]
        train, test = (read_idx_pair(*pair, num_classes=10) for pair in (files[:2], files[2:]))
        return ImageData(*train, names, "kmnist"), ImageData(*test, names, "kmnist")


@register("emnist_letters")
class _EmnistLetters(PublishedReader):
    """EMNIST Letters: 124,800 and 20,800 grey images of 28x28, 26 classes, upper and lower case together.

    Reference:
        Cohen et al., "EMNIST: an extension of MNIST to handwritten letters", arXiv 1702.05373.
    """

    names = tuple(
        f"emnist-letters-{part}-{kind}-ubyte.gz"
        for part in ("train", "test")
        for kind in ("images-idx3", "labels-idx1")
    )
    facts = PublishedSet(
        "emnist_letters",
        tuple(PublishedFile(name) for name in names),
        "unpack emnist-letters-* of gzip.zip from https://www.nist.gov/itl/products-and-services/emnist-dataset there",
        flip_safe=False,
        classes=26,
    )

    def parts(self, path: Path | None, **_: object) -> tuple[ImageData, ImageData]:
        """The four IDX files; they hold images on their side and labels from 1."""
        found = []
        for pair in (self.names[:2], self.names[2:]):
            images, labels = read_idx_pair(*(self.file(path, name) for name in pair), num_classes=27)
            if not int(labels.min()):
                raise DataError("emnist_letters: labels must count from 1; give the letters split, not another one")
            upright = images.transpose(2, 3).contiguous()
            found.append(ImageData(upright, labels - 1, tuple(string.ascii_uppercase), "emnist_letters"))
        return found[0], found[1]


@register("devanagari")
class _Devanagari(PublishedReader):
    """Devanagari characters: 78,200 and 13,800 grey images of 32x32, 46 classes.

    Reference:
        Acharya, Pant and Gyawali, "Deep learning based large scale handwritten Devanagari character recognition",
        SKIMA 2015 (UCI repository, CC BY 4.0).
    """

    facts = PublishedSet(
        "devanagari",
        (PublishedFile("Train"), PublishedFile("Test")),
        "unpack DevanagariHandwrittenCharacterDataset.zip of the UCI repository so that Train and Test lie there",
        flip_safe=False,
        train_images=78_200,
        test_images=13_800,
        classes=46,
    )

    def parts(
        self, path: Path | None, *, image_size: int | None, skip_corrupt: bool, progress: bool
    ) -> tuple[ImageData, ImageData]:
        """Two image folders of the same classes."""
        options = {"image_size": image_size, "channels": 1, "skip_corrupt": skip_corrupt, "progress": progress}
        train, _ = read_image_folder(self.file(path, "Train"), **options)
        test, _ = read_image_folder(self.file(path, "Test"), class_names=train.class_names, **options)
        return replace(train, name="devanagari"), replace(test, name="devanagari")


@register("omniglot")
class _Omniglot(PublishedReader):
    """Omniglot's 964 background characters, 20 drawings each, as training images; ink inverted to light on dark.

    Its 659 evaluation characters are other classes and are not read: test on what is left of the training images.
    Each alphabet was drawn by twenty people: group "drawer" keeps the drawings of one together, if asked for.

    Reference:
        Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program induction",
        Science 2015 (MIT).
    """

    facts = PublishedSet(
        "omniglot",
        (PublishedFile("images_background"),),
        "unpack images_background.zip of https://github.com/brendenlake/omniglot there",
        flip_safe=False,
        train_images=19_280,
        classes=964,
        group="drawer",
        grouped=False,
        key_of=lambda drawer, label, name: (name.partition("/")[0], drawer),
    )

    def parts(
        self, path: Path | None, *, image_size: int | None, skip_corrupt: bool, progress: bool
    ) -> tuple[ImageData, None]:
        """All drawings below images_background/ALPHABET/CHARACTER."""
        folders = sorted(folder for folder in self.file(path, "images_background").glob("*/*") if folder.is_dir())
        numbered = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.glob("*.png"))]
        data, report = read_listed_images(
            numbered,
            [f"{folder.parent.name}/{folder.name}" for folder in folders],
            name="omniglot",
            image_size=image_size or 28,
            channels=1,
            skip_corrupt=skip_corrupt,
            progress=progress,
        )
        return replace(data, images=255 - data.images, groups=_drawers(report.paths)), None


def _drawers(files: Sequence[Path]) -> Tensor | None:
    """Numbers of the people who drew ALPHABET/CHARACTER/NUMBER_DRAWER.png; None where names are others."""
    drawers = [(file.parent.parent.name, file.stem.rpartition("_")[::2]) for file in files]
    if not all(number and drawer.isdecimal() for _, (number, drawer) in drawers):
        return None
    return number_groups([(alphabet, int(drawer)) for alphabet, (_, drawer) in drawers])[0]
