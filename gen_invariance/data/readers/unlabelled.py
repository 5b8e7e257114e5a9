"""Pictures without labels: the image files below a folder, and their pixels at the size that a model takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gen_invariance.data.readers.pictures import UnusablePictureError, decode_picture, without_remarks_of_pillow
from gen_invariance.data.readers.tree import FoundFile, existing_folder, list_files
from gen_invariance.errors import DataError, printable

_AT_ONCE = 256  # pictures that may be decoded before they are needed


@dataclass(frozen=True)
class Picture:
    """An image file.

    Attributes:
        path: the file.
        pixels: uint8 (C, H, W); None where there are none.
        problem: why there are none.
    """

    path: Path
    pixels: Tensor | None = None
    problem: str = ""


def find_pictures(path: Path | str) -> list[FoundFile]:
    """The image files below `path`, at any depth and sorted, or `path` itself where it is a file.

    Files that are no images by their names are left out; those that cannot be read, by name, say so in `problem`.

    Raises:
        DataNotFoundError: no such file or folder.
        DataError: no image there.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return [FoundFile(given)]
    found = [file for file in list_files(existing_folder(given)) if not file.ignored]
    if not found:
        raise DataError(f"{printable(given)} holds no image (.png, .jpg, .webp, .tif, ...); give a folder of images")
    return found


def read_pictures(files: Sequence[Path], shape: tuple[int, int, int]) -> Iterator[Picture]:
    """Each file with its pixels, or the reason why it has none, in order; decoding runs in a few threads.

    Args:
        files: to read.
        shape: (C, H, W) of the pixels; the largest centred part of those proportions is scaled to it, antialiased.
    """
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    with without_remarks_of_pillow():
        try:
            for start in range(0, len(files), _AT_ONCE):
                yield from pool.map(lambda file: _read(file, shape), files[start : start + _AT_ONCE])
        finally:
            pool.shutdown(cancel_futures=True)  # before the warning filters end: threads still use them


def _read(file: Path, shape: tuple[int, int, int]) -> Picture:
    try:
        picture = decode_picture(file)
    except UnusablePictureError as error:
        return Picture(file, problem=str(error))
    channels, height, width = shape
    picture = fit_picture(picture.convert("L" if channels == 1 else "RGB"), height=height, width=width)
    pixels = torch.from_numpy(np.array(picture))
    return Picture(file, pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous())


def fit_picture(picture: Image.Image, *, height: int, width: int) -> Image.Image:
    """The largest centred part of `picture` that has the proportions of width x height, scaled to it."""
    if picture.size == (width, height):
        return picture
    factor = min(picture.width / width, picture.height / height)
    across = max(1, min(picture.width, round(width * factor)))
    down = max(1, min(picture.height, round(height * factor)))
    left, top = (picture.width - across) // 2, (picture.height - down) // 2
    part = picture.crop((left, top, left + across, top + down))
    return part.resize((width, height), Image.Resampling.BILINEAR)
