"""Room for the pixels of an image set: in memory, or in a file that is mapped into it where they are many.

A mapped tensor is used like any other: rows that are looked at are read from the disk, and the system drops them again
when it needs the memory. The file has no name any more once it is mapped, so it is gone when nothing uses it, or the
process ends, however it ends. What is taken out of mapped images is mapped again where it is large.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from gen_invariance.devices import check_memory
from gen_invariance.errors import OutputError
from gen_invariance.files import cannot_write

GIGABYTE = 1 << 30
_SMALL = 32 << 20  # bytes that are taken out of mapped images into memory
_CHUNK = 64 << 20  # bytes that are copied at a time


def cache_folder() -> Path:
    """Where downloads and pixels are kept: gen_invariance/ in $XDG_CACHE_HOME, which is ~/.cache unless set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gen_invariance"


def empty_images(shape: Sequence[int], *, map_from: float = GIGABYTE) -> Tensor:
    """Room for uint8 images of `shape` (N, C, H, W), mapped if they take `map_from` bytes or more.

    Raises:
        OutputError: the disk of the cache folder has no room for them.
        SettingsError: they are to lie in memory, which has no room for them.
    """
    size = torch.Size(shape).numel()
    if size < map_from or not size:
        check_pixels_fit(shape)
        return torch.empty(tuple(shape), dtype=torch.uint8, device="cpu")
    folder = cache_folder() / "pixels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        _reserve(handle, size, folder)
        return torch.from_file(name, shared=True, size=size, dtype=torch.uint8).view(tuple(shape))
    finally:
        os.close(handle)
        with suppress(OSError):  # where a file in use cannot be removed
            os.unlink(name)


def check_pixels_fit(shape: Sequence[int], *, device: torch.device | str = "cpu") -> None:
    """Raise `SettingsError` where uint8 images of `shape` (N, C, H, W) are more than the memory holds."""
    count, _, height, width = shape
    what = f"{count} images of {width} x {height} pixels"
    check_memory(torch.Size(shape).numel(), what, "choose a smaller image size or fewer images", device=device)


def check_batch(images: Tensor, batch_size: int, *, where: str, pixel_bytes: int = 128) -> None:
    """Raise `SettingsError` where training on batches of `images` cannot fit in the memory of their device.

    `pixel_bytes` is what a pixel takes at least: unless told otherwise, two layers of 16 float channels.
    """
    height, width = images.shape[2:]
    check_memory(
        batch_size * height * width * pixel_bytes,
        f"{where}: a batch of {batch_size} images of {width} x {height} pixels",
        "choose a smaller batch size or image size",
        device=images.device,
    )


def _reserve(handle: int, size: int, folder: Path) -> None:
    """Take the bytes now: a mapped file that meets a full disk later ends the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            os.truncate(handle, size)
    except OSError as error:
        raise OutputError(
            f"images of {size / GIGABYTE:.1f} GB do not fit in {folder} ({error.strerror}); free some space, set "
            "XDG_CACHE_HOME to a larger disk, or keep them in memory with a larger data.map_from"
        ) from error


def is_mapped(images: Tensor) -> bool:
    """Whether the pixels lie in a file."""
    return images.device.type == "cpu" and images.untyped_storage().filename is not None


def room_like(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Room for images of `shape` that are made of `images`: mapped if those are, and these are large, too."""
    if is_mapped(images):
        return empty_images(shape, map_from=_SMALL)
    check_pixels_fit(shape, device=images.device)
    return torch.empty(tuple(shape), dtype=torch.uint8, device=images.device)


def take_rows(images: Tensor, rows: Tensor) -> Tensor:
    """The rows that `rows`, int64 (M,), names, in that order, see `room_like`."""
    if not is_mapped(images):
        return images[rows]
    taken = room_like(images, (len(rows), *images.shape[1:]))
    step = images_at_once(images)
    for start in range(0, len(rows), step):
        torch.index_select(images, 0, rows[start : start + step], out=taken[start : start + step])
    return taken


def images_at_once(images: Tensor) -> int:
    """How many of `images` are copied at a time, so that memory is bounded."""
    return max(1, _CHUNK // max(1, images[:1].numel()))
