"""Readers of data sets, by name: `load_source("digits")`, `load_source("npz", "cifar.npz")`, ...

Readers give images as stored (uint8) and cut no long tail: that is `split.make_long_tailed`. A new reader is a class
that derives from `base.Reader`, or from `published.PublishedReader` for a published set, and a line in `READERS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gen_invariance.data.readers.base import Reader, ReadOptions, Source
from gen_invariance.data.storage import GIGABYTE
from gen_invariance.errors import SettingsError, printable

READERS: Mapping[str, str] = {
    "cifar10": "photos.Cifar10",
    "cifar100": "photos.Cifar100",
    "devanagari": "characters.Devanagari",
    "digits": "characters.Digits",
    "emnist_letters": "characters.EmnistLetters",
    "fashion_mnist": "photos.FashionMnist",
    "folder": "folder.FolderReader",
    "gtsrb": "photos.Gtsrb",
    "imagenet_lt": "photos.ImageNetLt",
    "inaturalist2018": "photos.INaturalist2018",
    "k49": "characters.Kuzushiji49",
    "kmnist": "characters.KuzushijiMnist",
    "npz": "arrays.NpzReader",
    "omniglot": "characters.Omniglot",
    "places_lt": "photos.PlacesLt",
    "tiny_imagenet": "photos.TinyImageNet",
}
"""Name of a data set: module and class of its reader, in `data.readers`."""


def source_names() -> tuple[str, ...]:
    """Names that `load_source` knows, sorted."""
    return tuple(sorted(READERS))


def missing_files(name: str, path: Path | str | None = None) -> list[str]:
    """Files of the data set `name` that are not at `path` (or in its cache folder).

    Raises:
        SettingsError: an unknown name.
    """
    reader = _find_reader(name, path)
    if reader.needs_path and (reader.path is None or not reader.path.exists()):
        return ["its path" if reader.path is None else printable(reader.path)]
    return reader.missing()


def load_source(
    name: str,
    path: Path | str | None = None,
    *,
    image_size: int | None = None,
    flip_safe: bool | None = None,
    skip_corrupt: bool = False,
    progress: bool = False,
    group: str | None = None,
    map_from: float = GIGABYTE,
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
        map_from: bytes of decoded images from which on they lie in a mapped file, not in memory (sets of image files).

    Raises:
        SettingsError: an unknown name, a missing path, `image_size` out of range, or a data set without such groups.
        DataNotFoundError: no such file or folder.
        DataError, ShapeError, RangeError: the data is damaged or not what it should be.

    Example:
        >>> from gen_invariance import load_source
        >>> load_source("digits").train.images.shape
        torch.Size([1797, 1, 16, 16])
    """
    reader = _find_reader(name, path)
    if image_size is not None and image_size < 1:
        raise SettingsError(f"image_size must be a positive number of pixels, got {image_size}")
    if path is None and reader.needs_path:
        raise SettingsError(f"data set {name!r} needs a path: {reader.needs_path}")
    if group is not None and not reader.takes_group:
        raise SettingsError(f"data set {name!r} does not tell groups of images; leave group={group!r} out")
    source = reader.read(ReadOptions(image_size, skip_corrupt, progress, group, map_from))
    return source if flip_safe is None else replace(source, flip_safe=flip_safe)


def _find_reader(name: str, path: Path | str | None) -> Reader:
    if name not in READERS:
        raise SettingsError(f"unknown data set {name!r}; choose one of {', '.join(source_names())}")
    module, _, class_name = READERS[name].partition(".")
    reader = getattr(importlib.import_module(f"gen_invariance.data.readers.{module}"), class_name)
    return reader(None if path is None else Path(path).expanduser())
