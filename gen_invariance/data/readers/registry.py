"""Readers of data sets, by name: `load_source("digits")`, `load_source("npz", "cifar.npz")`, ...

Each reader is a class that carries the facts about its data set; a new one is one class with the decorator
`@register`; those of published character and photo sets are in modules of their own. Readers give images as stored
(uint8) and cut no long tail: that is `split.make_long_tailed`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.data.grouping import number_groups
from gen_invariance.data.images import ImageData, names_or_numbers, to_uint8
from gen_invariance.data.readers.arrays import read_idx_pair, read_npz
from gen_invariance.data.readers.folder import existing_folder, find_splits, read_image_folder, shown
from gen_invariance.errors import DataError, DataNotFoundError, SettingsError
from gen_invariance.torchvision_guard import declare_missing_operators

_FASHION_NAMES = (
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
_FASHION_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_RESIZE_CHUNK = 4096  # images resized at once; bounds the memory for their float copies


@dataclass(frozen=True)
class Source:
    """A data set as its publisher splits it.

    Attributes:
        train: training images.
        test: test images, or None when the set has no test part. Their classes may differ from those of `train`
            (Omniglot), then `class_names` does, too.
        flip_safe: a horizontal flip keeps the label (true of photos, false of letters and digits).
        skipped: (path, reason) of each damaged file that was left out.
        train_files, test_files: the file of each row, where the images came as files of their own.
    """

    train: ImageData
    test: ImageData | None
    flip_safe: bool
    skipped: tuple[tuple[Path, str], ...] = ()
    train_files: tuple[str, ...] | None = None
    test_files: tuple[str, ...] | None = None


class _Reader(Protocol):
    """What a data set's class offers; `flip_safe` None means that the file itself may say so.

    One with `takes_group` true also takes the keyword `group`.
    """

    flip_safe: bool | None
    needs_path: str | None

    def read(self, path: Path | None, *, image_size: int | None, skip_corrupt: bool, progress: bool) -> Source: ...


_READERS: dict[str, _Reader] = {}


def register(name: str) -> Callable[[type[_Reader]], type[_Reader]]:
    """Let `load_source` know the decorated class as `name`."""

    def add(reader: type[_Reader]) -> type[_Reader]:
        _READERS[name] = reader()
        return reader

    return add


def _readers() -> dict[str, _Reader]:
    from gen_invariance.data.readers import characters, photos  # noqa: F401  (they register themselves)

    return _READERS


def source_names() -> tuple[str, ...]:
    """Names that `load_source` knows, sorted."""
    return tuple(sorted(_readers()))


def missing_files(name: str, path: Path | str | None = None) -> list[str]:
    """Files of the published set `name` that are not at `path` (or in its cache folder); empty for other sources.

    Raises:
        SettingsError: an unknown name.
    """
    reader = _reader(name)
    place = None if path is None else Path(path).expanduser()
    if reader.needs_path and (place is None or not place.exists()):
        return ["its path" if place is None else shown(place)]
    return reader.missing(place) if hasattr(reader, "missing") else []


def _reader(name: str) -> _Reader:
    if name not in _readers():
        raise SettingsError(f"unknown data set {name!r}; choose one of {', '.join(source_names())}")
    return _READERS[name]


def load_source(
    name: str,
    path: Path | str | None = None,
    *,
    image_size: int | None = None,
    flip_safe: bool | None = None,
    skip_corrupt: bool = False,
    progress: bool = False,
    group: str | None = None,
) -> Source:
    """The data set called `name`.

    Args:
        name: one of `source_names()`.
        path: the file ("npz") or folder ("folder"); not used by "digits"; published sets are otherwise looked for in
            the cache.
        image_size: side of the square to scale images to: the centre is cropped, antialiased; None keeps the size.
        flip_safe: overrides what is known of the data set.
        skip_corrupt: leave damaged image files out instead of raising ("folder").
        progress: show a progress bar ("folder").
        group: what tells which images show the same thing (see `ImageData.groups`): "track" takes the keys
            `train_track` and `test_track` of an .npz file, which otherwise gives `train_groups` and `test_groups`; for
            "folder" a regular expression, see `folder.read_image_folder`. "gtsrb" takes its "track" unless told
            otherwise, "omniglot" its "drawer" when told so.

    Raises:
        SettingsError: an unknown name, a missing path, `image_size` out of range, or a data set without such groups.
        DataNotFoundError: no such file or folder.
        DataError, ShapeError, RangeError: the data is damaged or not what it should be.
    """
    reader = _reader(name)
    if image_size is not None and image_size < 1:
        raise SettingsError(f"image_size must be a positive number of pixels, got {image_size}")
    if path is None and reader.needs_path:
        raise SettingsError(f"data set {name!r} needs a path: {reader.needs_path}")
    if group is not None and not getattr(reader, "takes_group", False):
        raise SettingsError(f"data set {name!r} does not tell groups of images; leave group={group!r} out")
    place = None if path is None else Path(path).expanduser()
    asked = {} if group is None else {"group": group}
    source = reader.read(place, image_size=image_size, skip_corrupt=skip_corrupt, progress=progress, **asked)
    return source if flip_safe is None else replace(source, flip_safe=flip_safe)


def resize_images(images: Tensor, image_size: int) -> Tensor:
    """uint8 (N, C, S, S): the central square of each image, scaled with an antialiased bilinear filter.

    Args:
        images: uint8 (N, C, H, W).
        image_size: S; images of that size come back as they are.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side]
    if side == image_size:
        return square.contiguous()
    size = (image_size, image_size)
    scaled = [
        F.interpolate(chunk.float(), size=size, mode="bilinear", antialias=True).add_(0.5).clamp_(0, 255).byte()
        for chunk in square.split(_RESIZE_CHUNK)
    ]
    return torch.cat(scaled)


def _resized(data: ImageData, image_size: int | None) -> ImageData:
    return data if image_size is None else replace(data, images=resize_images(data.images, image_size))


@register("digits")
class _Digits:
    """Handwritten digits of the UCI repository, 1,797 of 8x8, which ship with scikit-learn; no test part.

    Reference:
        Alpaydin and Kaynak, "Cascading classifiers", Kybernetika 1998.
    """

    flip_safe = False
    needs_path = None
    image_size = 16  # 8x8 is too small for translators with two stride-2 stages

    def read(self, path: Path | None, *, image_size: int | None, skip_corrupt: bool, progress: bool) -> Source:
        """The whole set as training images; ink 0 to 16 becomes 0 to 255."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        ink = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
        side = image_size or self.image_size
        images = F.interpolate(ink, size=(side, side), mode="bilinear", antialias=side < ink.shape[-1])
        data = ImageData(to_uint8(images), torch.from_numpy(bunch.target).long(), names_or_numbers(None, 10), "digits")
        return Source(data, None, self.flip_safe)


@register("fashion_mnist")
class _FashionMnist:
    """Fashion-MNIST: 60,000 and 10,000 grey images of clothes, 28x28, 10 classes.

    Reference:
        Xiao, Rasul and Vollgraf, arXiv 1708.07747.
    """

    flip_safe = True  # clothes; shoes all point one way in the data, but a flipped shoe is the same class
    needs_path = None

    def read(self, path: Path | None, *, image_size: int | None, skip_corrupt: bool, progress: bool) -> Source:
        """From `path` if given, else from Debian's package, else from the cache, into which it is downloaded."""
        folder = self._find(path)
        parts = [
            _resized(ImageData(images, labels, _FASHION_NAMES, "fashion_mnist"), image_size)
            for images, labels in (
                read_idx_pair(_idx_file(folder, image_name), _idx_file(folder, label_name), num_classes=10)
                for image_name, label_name in _FASHION_FILES
            )
        ]
        return Source(parts[0], parts[1], self.flip_safe)

    def missing(self, path: Path | None) -> list[str]:
        """What is not there, the download aside."""
        raw = (path or cache_folder()) / "FashionMNIST" / "raw"
        names = [name for pair in _FASHION_FILES for name in pair]
        for folder in (_FASHION_DEBIAN if path is None else path, raw):
            if all(_idx_file(folder, name) for name in names):
                return []
        return [f"{name}.gz" for name in names]

    def _find(self, path: Path | None) -> Path:
        cache = cache_folder()
        raw = cache / "FashionMNIST" / "raw"  # where torchvision puts the files
        places = (_FASHION_DEBIAN, raw) if path is None else (path, path / "FashionMNIST" / "raw")
        for folder in places:
            if all(_idx_file(folder, name) for pair in _FASHION_FILES for name in pair):
                return folder
        if path is None and _download_fashion_mnist(cache):
            return raw
        tried = "could not be downloaded" if path is None else f"is not in {shown(path)}"
        raise DataNotFoundError(
            f"Fashion-MNIST {tried}; run `apt-get install dataset-fashion-mnist`, or put "
            f"{', '.join(name + '.gz' for pair in _FASHION_FILES for name in pair)} into {shown(path or cache)}"
            + ("" if path else " and give that folder as the path")
        )


def cache_folder() -> Path:
    """Where downloads are kept: gen_invariance/ in $XDG_CACHE_HOME, which is ~/.cache unless set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gen_invariance"


def _idx_file(folder: Path, name: str) -> Path | None:
    """The file `name` or `name`.gz of `folder`, if there is one."""
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _download_fashion_mnist(cache: Path) -> bool:
    """Whether torchvision could download, and verify, the files."""
    declare_missing_operators()
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(cache, download=True)
    except (OSError, RuntimeError):  # no network, no space, a wrong checksum
        return False
    return True


@register("npz")
class _Npz:
    """Arrays in an .npz file; `arrays.read_npz` documents its keys."""

    flip_safe = False  # unknown, and wrong flips do more harm than missing ones
    needs_path = "the .npz file with train_images, train_labels[, test_images, test_labels, class_names]"
    takes_group = True

    def read(
        self, path: Path | None, *, image_size: int | None, skip_corrupt: bool, progress: bool, group: str | None = None
    ) -> Source:
        """Both parts of the file."""
        parts = read_npz(path, group=group)
        train, test = (None if part is None else _resized(part, image_size) for part in parts)
        _require_same_shape(train, test, shown(path))
        return Source(train, test, self.flip_safe)


@register("folder")
class _Folder:
    """A user's image folder, with classes as sub-folders, or with train/ and test/ (or val/) above those."""

    flip_safe = True  # taken to be photos
    needs_path = "the folder with one sub-folder of images for each class"
    takes_group = True

    def read(
        self, path: Path | None, *, image_size: int | None, skip_corrupt: bool, progress: bool, group: str | None = None
    ) -> Source:
        """The folder's images; test images get the classes of the training images."""
        options = {"image_size": image_size, "skip_corrupt": skip_corrupt, "progress": progress, "group": group}
        root = existing_folder(path)
        splits = find_splits(root)
        train, report = read_image_folder(splits.get("train", root), **options)
        train = replace(train, name=root.name or "folder")
        files = tuple(os.path.relpath(file, root) for file in report.paths)
        if "test" not in splits:
            return Source(train, None, self.flip_safe, report.skipped, files)
        test, test_report = read_image_folder(splits["test"], class_names=train.class_names, **options)
        train, test = _same_channels(train, replace(test, name=train.name))
        if group is not None:  # each part was numbered by itself
            of_train, of_test = number_groups(report.groups, test_report.groups)
            train, test = replace(train, groups=of_train), replace(test, groups=of_test)
        _require_same_shape(train, test, shown(root))
        test_files = tuple(os.path.relpath(file, root) for file in test_report.paths)
        return Source(train, test, self.flip_safe, report.skipped + test_report.skipped, files, test_files)


def _same_channels(first: ImageData, second: ImageData) -> tuple[ImageData, ImageData]:
    """Both parts in RGB when either is."""
    channels = max(first.images.shape[1], second.images.shape[1])
    parts = (first, second)
    return tuple(replace(part, images=part.images.expand(-1, channels, -1, -1).contiguous()) for part in parts)


def _require_same_shape(train: ImageData, test: ImageData | None, where: str) -> None:
    if test is not None and train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{where}: training images are {tuple(train.images.shape[1:])} and test images "
            f"{tuple(test.images.shape[1:])} (channels, height, width); store them alike, or set image_size=N"
        )
