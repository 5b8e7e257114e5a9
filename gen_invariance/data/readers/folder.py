"""A user's image folder, `root/class_name/*.png`, read into `ImageData`.

Classes and files are taken in sorted order, so class numbers do not depend on the file system; hidden files are
ignored. Pictures arrive upright (EXIF orientation applied), in 8 bits (16-bit grey is scaled), in grey or RGB
(palette and CMYK are converted, transparency is laid over white). A damaged image stops the reading with its name
unless the caller asks to skip damaged ones; what was skipped, and why, is in the report.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from gen_invariance.data.grouping import number_groups
from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError, DataNotFoundError, SettingsError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_TEST_FOLDERS = ("test", "val", "validation", "valid")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True)
class FolderReport:
    """Where each row came from, and what was left out.

    Attributes:
        paths: the file of each row, in row order.
        skipped: (path, reason) of each damaged image that was skipped.
        groups: what names the group of each row; empty where no groups were asked for.
    """

    paths: tuple[Path, ...]
    skipped: tuple[tuple[Path, str], ...] = ()
    groups: tuple[str, ...] = ()


def read_image_folder(
    path: Path | str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
    skip_corrupt: bool = False,
    progress: bool = False,
    group: str | None = None,
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
    pattern = None if group is None else _compiled(group)
    root = existing_folder(path)
    names = _class_folders(root, class_names)
    files = [_image_files(root / name) for name in names]
    numbered = [(file, label) for label, found in enumerate(files) for file in found]
    captured = {} if pattern is None else {file: _captured(pattern, file) for file, _ in numbered}
    data, report = read_listed_images(
        numbered, names, name=root.name or "folder", image_size=image_size, channels=channels,
        skip_corrupt=skip_corrupt, progress=progress,
    )  # fmt: skip
    _check_none_lost(root, names, data.labels.tolist(), class_names)
    if pattern is None:
        return data, report
    groups = tuple(captured[file] for file in report.paths)
    return replace(data, groups=number_groups(groups)[0]), replace(report, groups=groups)


def _compiled(group: str) -> re.Pattern[str]:
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


def _captured(pattern: re.Pattern[str], file: Path) -> str:
    """What `pattern` captures in the path of `file` below the folder of its class."""
    match = pattern.search(file.name)
    if match is None or match[1] is None:
        raise DataError(
            f"{shown(file)}: group {pattern.pattern!r} does not match {shown(file.name)!r}; "
            "rename the file, or change the expression"
        )
    return match[1]


def read_listed_images(
    numbered: Sequence[tuple[Path, int]],
    class_names: Sequence[str],
    *,
    name: str,
    image_size: int | None = None,
    channels: int | None = None,
    skip_corrupt: bool = False,
    progress: bool = False,
) -> tuple[ImageData, FolderReport]:
    """Image files with their labels, in their order, and a report; arguments as for `read_image_folder`.

    Raises:
        DataError: a damaged or animated image, or images of several sizes.
    """
    rows, skipped, labels = [], [], []
    with closing(_decode_all([file for file, _ in numbered], image_size=image_size, progress=progress)) as decoded:
        for (file, label), picture in zip(numbered, decoded, strict=True):
            if isinstance(picture, np.ndarray):
                rows.append((file, picture))
                labels.append(label)
            elif skip_corrupt:
                skipped.append((file, picture))
            else:
                raise DataError(f"{shown(file)}: {picture}; repair or remove it, or set data.skip_corrupt=true")
    _check_sizes(rows)
    if not rows:
        raise DataError(f"{name}: no readable image among {len(numbered)} files; check them")
    data = ImageData(
        images=_stack([picture for _, picture in rows], channels),
        labels=torch.tensor(labels, dtype=torch.int64),
        class_names=tuple(class_names),
        name=name,
    )
    return data, FolderReport(paths=tuple(file for file, _ in rows), skipped=tuple(skipped))


def find_splits(path: Path | str) -> dict[str, Path]:
    """{"train": ..., "test": ...} when `path` holds a train/ folder of class folders, else {}; "test" may be missing.

    The test part is the first that exists of test/, val/, validation/, valid/.

    Raises:
        DataNotFoundError: no such folder.
    """
    root = existing_folder(path)
    splits = {"train": root / "train"}
    if not splits["train"].is_dir() or not _sub_folders(splits["train"]):
        return {}
    others = [root / name for name in _TEST_FOLDERS if (root / name).is_dir() and _sub_folders(root / name)]
    return splits | ({"test": others[0]} if others else {})


def existing_folder(path: Path | str) -> Path:
    """`path` as a `Path`, or `DataNotFoundError` when it is no folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataNotFoundError(f"{shown(folder)} {kind}; give a folder with one sub-folder of images for each class")
    return folder


def shown(path: Path | str) -> str:
    """`path` for a message: line breaks and undecodable bytes escaped, so that the message stays one line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(path))


def _sub_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(root: Path, class_names: Sequence[str] | None) -> list[str]:
    """Class names in label order."""
    if find_splits(root):
        raise DataError(f"{shown(root)} holds train/ and test/ parts, not classes; read {shown(root / 'train')}")
    found = _sub_folders(root)
    if not found:
        raise DataError(
            f"{shown(root)} has no sub-folders; put the images of each class into a sub-folder named after the class"
        )
    if class_names is None:
        return found
    unknown = sorted(set(found) - set(class_names))
    if unknown:
        raise DataError(
            f"{shown(root)}: class {unknown[0]!r} is not among the {len(class_names)} training classes; "
            "rename or remove the folder"
        )
    return list(class_names)


def _image_files(folder: Path) -> list[Path]:
    """Image files of one class, sorted; a class of a fixed list may have no folder."""
    if not folder.is_dir():
        return []
    found = [
        entry
        for entry in sorted(folder.iterdir())
        if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".") and not entry.is_dir()
    ]
    if not found:
        raise DataError(
            f"class folder {shown(folder)} holds no image ({', '.join(sorted(SUFFIXES))}); add images or remove it"
        )
    return found


def _decode_all(
    files: list[Path], *, image_size: int | None, progress: bool
) -> Generator[np.ndarray | str, None, None]:
    """Each file's picture, or the reason why it has none, in order; decoding runs in a few threads."""
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # remarks on odd metadata of readable pictures
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            pictures: Iterator[np.ndarray | str] = pool.map(lambda file: _decode(file, image_size), files)
            if progress:
                from tqdm import tqdm

                pictures = tqdm(pictures, total=len(files), desc="reading images", unit="image")
            yield from pictures
        finally:
            pool.shutdown(cancel_futures=True)  # before the warning filters end: threads still use them


def _decode(file: Path, image_size: int | None) -> np.ndarray | str:
    """Uint8 (H, W) when the picture is grey, else (H, W, 3); a string says why there is none."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return "not a regular file"  # a pipe or a device would block or never end
        with Image.open(file) as image:
            # Phones store a photo and its preview as two frames (MPO); the photo comes first.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                return f"animated image with {image.n_frames} frames where a single picture is expected"
            image.load()
            upright = _grey_or_rgb(ImageOps.exif_transpose(image))
            if image_size is not None:
                upright = _central_square(upright).resize((image_size, image_size), Image.Resampling.BILINEAR)
            return _drop_equal_channels(np.asarray(upright))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels, which may be a decompression bomb"
    except UnidentifiedImageError:
        return "empty file" if file.stat().st_size == 0 else "not an image of a known format"
    except Exception as error:  # damaged files make decoders raise almost anything
        return f"cannot be decoded ({_one_line(error)})"


def _one_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(text)[:200] or type(error).__name__


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode "L" or "RGB"."""
    if image.mode in _SIXTEEN_BIT:
        return _eight_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: 65535 becomes 255, rounded."""
    wide = np.asarray(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError("grey pixels of more than 16 bits")
    return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))


def _central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def _drop_equal_channels(picture: np.ndarray) -> np.ndarray:
    if picture.ndim == 3 and (picture == picture[..., :1]).all():
        return picture[..., 0].copy()
    return picture


def _check_sizes(rows: list[tuple[Path, np.ndarray]]) -> None:
    for file, picture in rows:
        first_file, first = rows[0]
        if picture.shape[:2] != first.shape[:2]:
            raise DataError(
                f"images differ in size: {shown(first_file)} is {first.shape[1]}x{first.shape[0]}, {shown(file)} is "
                f"{picture.shape[1]}x{picture.shape[0]} (width x height); set image_size=N to scale all to N x N"
            )


def _check_none_lost(root: Path, names: list[str], labels: list[int], class_names: Sequence[str] | None) -> None:
    """Skipping must not empty a class; a test part with fixed classes may lack some, but not all."""
    lost = sorted(set(range(len(names))) - set(labels))
    if lost and (class_names is None or not labels):
        raise DataError(f"class {names[lost[0]]!r} of {shown(root)} has no readable image; add some or remove it")


def _stack(pictures: list[np.ndarray], channels: int | None) -> torch.Tensor:
    """Pictures of one size as uint8 (N, C, H, W); grey ones are repeated into RGB, or RGB ones turned grey."""
    if channels is None:
        channels = 1 if all(picture.ndim == 2 for picture in pictures) else 3
    height, width = pictures[0].shape[:2]
    images = np.empty((len(pictures), channels, height, width), np.uint8)
    for row, picture in zip(images, pictures, strict=True):
        if channels == 1 and picture.ndim == 3:
            picture = np.asarray(Image.fromarray(picture).convert("L"))
        row[:] = picture if picture.ndim == 2 else picture.transpose(2, 0, 1)
    return torch.from_numpy(images)
