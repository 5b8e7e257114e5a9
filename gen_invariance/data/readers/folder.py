"""A user's image folder, `root/class_name/*.png`, read into `ImageData`.

Classes and files are taken in sorted order, so class numbers do not depend on the file system; `tree` says which files
those are, and `pictures` how one is decoded. A damaged image stops the reading with its name unless the caller asks to
skip damaged ones; what was skipped, and why, is in the report.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gen_invariance.data.grouping import number_groups
from gen_invariance.data.images import ImageData
from gen_invariance.data.readers.base import Reader, ReadOptions, Source, check_same_shape
from gen_invariance.data.readers.pictures import (
    UnusablePictureError,
    crop_centre,
    decode_picture,
    without_remarks_of_pillow,
)
from gen_invariance.data.readers.tree import (
    FoundFile,
    choose_test_part,
    existing_folder,
    find_classes,
    find_parts,
    list_files,
    sub_folders,
)
from gen_invariance.data.storage import GIGABYTE, empty_images, room_like
from gen_invariance.errors import DataError, SettingsError, printable

_AT_ONCE = 256  # pictures that may be decoded before they are needed


@dataclass(frozen=True)
class FolderReport:
    """Where each row came from, and what was left out.

    Attributes:
        paths: the file of each row, in row order.
        skipped: (path, reason) of each damaged image that was skipped.
        ignored: (path, reason) of each other file that is not read.
        groups: what names the group of each row; empty where no groups were asked for.
    """

    paths: tuple[Path, ...]
    skipped: tuple[tuple[Path, str], ...] = ()
    ignored: tuple[tuple[Path, str], ...] = ()
    groups: tuple[str, ...] = ()


class FolderReader(Reader):
    """A user's image folder, with classes as sub-folders, or with train/ and test/ (or val/) above those.

    `tree.find_parts` tells the parts, `tree.choose_test_part` says which one is tested on.
    """

    flip_safe = True  # taken to be photos
    needs_path = "the folder with one sub-folder of images for each class"
    takes_group = True

    def read(self, options: ReadOptions) -> Source:
        """The folder's images; test images get the classes of the training images."""
        root = existing_folder(self.path)
        parts = find_parts(root)
        test_part = choose_test_part(name for name, folder in parts.items() if sub_folders(folder))
        train, report = read_image_folder(parts.get("train", root), **vars(options))
        train = replace(train, name=root.name or "folder")
        files = tuple(os.path.relpath(file, root) for file in report.paths)
        unused = [name for name in parts if name not in ("train", test_part)]
        notes = _make_notes(report, root, unused)
        if test_part is None:
            return Source(train, None, self.flip_safe, report.skipped, files, notes=notes)
        test, test_report = read_image_folder(parts[test_part], class_names=train.class_names, **vars(options))
        test = replace(test, name=train.name)
        channels = max(train.images.shape[1], test.images.shape[1])
        train, test = (replace(part, images=_as_channels(part.images, channels)) for part in (train, test))
        if options.group is not None:  # each part was numbered by itself
            train_groups, test_groups = number_groups(report.groups, test_report.groups)
            train, test = replace(train, groups=train_groups), replace(test, groups=test_groups)
        check_same_shape(train, test, printable(root))
        test_files = tuple(os.path.relpath(file, root) for file in test_report.paths)
        skipped = report.skipped + test_report.skipped
        notes = _make_notes(report, root, unused, test_report)
        return Source(train, test, self.flip_safe, skipped, files, test_files, notes)


def _make_notes(report: FolderReport, root: Path, unused: Sequence[str], *more: FolderReport) -> tuple[str, ...]:
    """A line for each kind of files that are not read."""
    notes = [f"note: {printable(root / name)} is neither trained nor tested on" for name in unused]
    ignored = [each for part in (report, *more) for each in part.ignored]
    if ignored:
        first, reason = ignored[0]
        number = "1 file is" if len(ignored) == 1 else f"{len(ignored):,} files are"
        notes.append(f"note: {number} not read, the first is {printable(first)}: {reason}")
    return tuple(notes)


def read_image_folder(
    path: Path | str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
    skip_corrupt: bool = False,
    progress: bool = False,
    group: str | None = None,
    map_from: float = GIGABYTE,
) -> tuple[ImageData, FolderReport]:
    """All images of `path`, one sub-folder a class, uint8 (N, C, H, W), and a report.

    Args:
        path: the folder whose sub-folders are the classes.
        image_size: side to which the central square of each image is scaled, antialiased; None keeps sizes, which
            must then be equal.
        channels: 1 or 3; None gives 1 when every picture is grey (R = G = B in every pixel), else 3.
        class_names: fixes classes and their order (for a test part); None takes the sub-folders, sorted.
        skip_corrupt: leave damaged images out instead of raising.
        progress: show a progress bar.
        group: regular expression with one capturing group, searched in each file's name (its path below the folder of
            its class). Files for which that captures the same text, in whatever class, show the same thing.
        map_from: bytes of decoded images from which on they lie in a mapped file, not in memory, see `storage`.

    Raises:
        DataNotFoundError: no such folder.
        DataError: no class, an unknown or an empty one, a damaged or animated image, images of several sizes, or a
            file whose name `group` does not match.
        SettingsError: `image_size` or `channels` out of range, or `group` no expression with one capturing group.
    """
    if channels not in (None, 1, 3):
        raise SettingsError(f"channels must be 1 (grey), 3 (RGB) or left out, got {channels}")
    if image_size is not None and image_size < 1:
        raise SettingsError(f"image_size must be a positive number of pixels, got {image_size}")
    pattern = None if group is None else _compile(group)
    root = existing_folder(path)
    names = _class_folders(root, class_names)
    found = [(file, label) for label, name in enumerate(names) for file in _class_files(root / name)]
    problems = tuple((file.path, file.problem) for file, _ in found if file.problem)
    if problems and not skip_corrupt:
        raise _unusable(*problems[0])
    labelled = [(file.path, label) for file, label in found if not file.problem and not file.ignored]
    captured = {}
    if pattern is not None:
        captured = {file: _capture(pattern, file, root / names[label]) for file, label in labelled}
    data, report = read_listed_images(
        labelled,
        names,
        name=root.name or "folder",
        image_size=image_size,
        channels=channels,
        skip_corrupt=skip_corrupt,
        progress=progress,
        map_from=map_from,
    )
    _check_none_lost(root, names, data.labels.tolist(), class_names)
    ignored = tuple((file.path, file.ignored) for file, _ in found if file.ignored)
    report = replace(report, skipped=problems + report.skipped, ignored=ignored)
    if pattern is None:
        return data, report
    groups = tuple(captured[file] for file in report.paths)
    return replace(data, groups=number_groups(groups)[0]), replace(report, groups=groups)


def _compile(group: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(group)
    except (re.error, OverflowError, RecursionError) as error:
        raise SettingsError(
            f"group {group!r} is no regular expression ({error}); '^([0-9]+)_' takes the number that a name begins with"
        ) from error
    if pattern.groups != 1:
        raise SettingsError(
            f"group {group!r} must have one capturing group, it has {pattern.groups}; put (...) around what names the "
            "group, and (?:...) around anything else"
        )
    return pattern


def _capture(pattern: re.Pattern[str], file: Path, class_folder: Path) -> str:
    name = file.relative_to(class_folder).as_posix()
    match = pattern.search(name)
    if match is None or match[1] is None:
        raise DataError(
            f"{printable(file)}: group {pattern.pattern!r} does not match {printable(name)!r}; "
            "rename the file, or change the expression"
        )
    return match[1]


def read_listed_images(
    labelled: Sequence[tuple[Path, int]],
    class_names: Sequence[str],
    *,
    name: str,
    image_size: int | None = None,
    channels: int | None = None,
    skip_corrupt: bool = False,
    progress: bool = False,
    map_from: float = GIGABYTE,
) -> tuple[ImageData, FolderReport]:
    """Image files with their labels, in their order, and a report; arguments as for `read_image_folder`.

    Raises:
        DataError: a damaged or animated image, or images of several sizes.
    """
    kept, labels, skipped = [], [], []
    pixels = _Pixels(len(labelled), channels, map_from=map_from)
    with closing(_decode_all([file for file, _ in labelled], image_size=image_size, progress=progress)) as decoded:
        for (file, label), picture in zip(labelled, decoded, strict=True):
            if isinstance(picture, np.ndarray):
                pixels.append(file, picture)
                kept.append(file)
                labels.append(label)
            elif skip_corrupt:
                skipped.append((file, picture))
            else:
                raise _unusable(file, picture)
    if not kept:
        raise DataError(f"{name}: no readable image among {len(labelled)} files; check them")
    data = ImageData(
        images=pixels.images,
        labels=torch.tensor(labels, dtype=torch.int64),
        class_names=tuple(class_names),
        name=name,
    )
    return data, FolderReport(paths=tuple(kept), skipped=tuple(skipped))


def _unusable(file: Path, reason: str) -> DataError:
    return DataError(f"{printable(file)}: {reason}; repair or remove it, or set data.skip_corrupt=true")


def _class_folders(root: Path, class_names: Sequence[str] | None) -> list[str]:
    """Class names in label order."""
    if class_names is None:
        return [folder.name for folder in find_classes(root)]
    unknown = sorted({folder.name for folder in sub_folders(root)} - set(class_names))
    if unknown:
        raise DataError(
            f"{printable(root)}: class {unknown[0]!r} is not among the {len(class_names)} training classes; "
            "rename or remove the folder"
        )
    return list(class_names)


def _class_files(folder: Path) -> list[FoundFile]:
    """Files of one class, sorted; a class of a fixed list may have no folder."""
    if not folder.is_dir():
        return []
    files = list(list_files(folder))
    if all(file.ignored for file in files):
        raise DataError(
            f"class folder {printable(folder)} holds no image (.png, .jpg, .webp, .tif, ...); add images or remove it"
        )
    return files


def _decode_all(
    files: list[Path], *, image_size: int | None, progress: bool
) -> Generator[np.ndarray | str, None, None]:
    """Each file's picture, or the reason why it has none, in order; decoding runs in a few threads."""
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    with without_remarks_of_pillow():
        try:
            parts = (files[start : start + _AT_ONCE] for start in range(0, len(files), _AT_ONCE))
            pictures: Iterator[np.ndarray | str] = (
                picture for part in parts for picture in pool.map(lambda file: _decode(file, image_size), part)
            )
            if progress:
                from tqdm import tqdm

                pictures = tqdm(pictures, total=len(files), desc="reading images", unit="image")
            yield from pictures
        finally:
            pool.shutdown(cancel_futures=True)  # before the warning filters end: threads still use them


def _decode(file: Path, image_size: int | None) -> np.ndarray | str:
    """Uint8 (H, W) when the picture is grey, else (H, W, 3); a string says why there is none."""
    try:
        image = decode_picture(file)
    except UnusablePictureError as error:
        return str(error)
    if image_size is not None:
        image = crop_centre(image).resize((image_size, image_size), Image.Resampling.BILINEAR)
    picture = np.asarray(image)
    is_grey = picture.ndim == 3 and (picture == picture[..., :1]).all()
    return picture[..., 0].copy() if is_grey else picture


def _check_none_lost(root: Path, names: list[str], labels: list[int], class_names: Sequence[str] | None) -> None:
    """Skipping must not empty a class; a test part with fixed classes may lack some, but not all."""
    lost = sorted(set(range(len(names))) - set(labels))
    if lost and (class_names is None or not labels):
        raise DataError(f"class {names[lost[0]]!r} of {printable(root)} has no readable image; add some or remove it")


class _Pixels:
    """Pictures of one size as uint8 (N, C, H, W), put in place one by one; there is never a second copy of them.

    Grey ones are repeated into RGB, or RGB ones turned grey; where `channels` does not say which, they are RGB from the
    first one that is not grey.
    """

    def __init__(self, most: int, channels: int | None, *, map_from: float) -> None:
        self._most, self._channels, self._map_from = most, channels, map_from
        self._first: tuple[Path, np.ndarray] | None = None
        self._room = torch.empty(0, 1, 1, 1, dtype=torch.uint8, device="cpu")
        self._count = 0

    @property
    def images(self) -> torch.Tensor:
        """What was put in place."""
        return self._room[: self._count]

    def append(self, file: Path, picture: np.ndarray) -> None:
        """Put the picture of `file` in the next place: (H, W) if it is grey, else (H, W, 3)."""
        if self._first is None:
            self._first = (file, picture)
            self._take_room(self._channels or (1 if picture.ndim == 2 else 3), picture.shape)
        _check_size(*self._first, file, picture)
        if self._channels is None and picture.ndim == 3 and self._room.shape[1] == 1:
            before = self.images
            self._take_room(3, picture.shape)
            self._room[: self._count] = before
        if self._room.shape[1] == 1 and picture.ndim == 3:
            picture = np.asarray(Image.fromarray(picture).convert("L"))
        self._room.numpy()[self._count] = picture if picture.ndim == 2 else picture.transpose(2, 0, 1)
        self._count += 1

    def _take_room(self, channels: int, shape: Sequence[int]) -> None:
        self._room = empty_images((self._most, channels, *shape[:2]), map_from=self._map_from)


def _check_size(first_file: Path, first: np.ndarray, file: Path, picture: np.ndarray) -> None:
    if picture.shape[:2] != first.shape[:2]:
        raise DataError(
            f"images differ in size: {printable(first_file)} is {first.shape[1]}x{first.shape[0]}, "
            f"{printable(file)} is {picture.shape[1]}x{picture.shape[0]} (width x height); set data.image_size=N to "
            "scale all to N x N"
        )


def _as_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """`images`, grey ones repeated into `channels`."""
    if images.shape[1] == channels:
        return images
    repeated = room_like(images, (len(images), channels, *images.shape[2:]))
    return repeated.copy_(images.expand(-1, channels, -1, -1))
