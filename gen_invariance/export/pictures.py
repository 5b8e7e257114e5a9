"""Pictures between files and the translator: decode, scale, scale back, encode."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from gen_invariance.data.readers.pictures import UnusablePictureError, crop_centre, decode_picture


class Picture(NamedTuple):
    """A decoded picture at the translator's size.

    Attributes:
        pixels: uint8 (C, H, W).
        size: (width, height) of the upright original.
    """

    pixels: np.ndarray
    size: tuple[int, int]


def decode(content: bytes | np.ndarray) -> Image.Image:
    """The upright picture in mode "L" or "RGB" of an encoded file, or of uint8 pixels (C, H, W).

    Raises:
        UnusablePictureError: not one readable picture.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content[0] if len(content) == 1 else np.ascontiguousarray(content.transpose(1, 2, 0)))
    if not content:
        raise UnusablePictureError("empty file")
    return decode_picture(io.BytesIO(content))


def prepare(image: Image.Image, *, size: int | None, whole: bool, channels: int | None) -> Picture:
    """The picture as the translator takes it.

    Args:
        image: mode "L" or "RGB".
        size: side of the square, or of the shorter side where `whole`; None keeps the size.
        whole: keep all of the picture instead of its central square.
        channels: 1 or 3 of the translator; None takes the picture's own.

    Raises:
        UnusablePictureError: a colour picture for a translator of grey ones.
    """
    original_size = image.size
    if size is not None and whole:
        scale = size / min(image.size)
        width, height = image.size
        image = resize(image, (max(1, round(width * scale)), max(1, round(height * scale))))
    elif size is not None:
        image = resize(crop_centre(image), (size, size))
    pixels = np.asarray(image)
    if channels == 1 and pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise UnusablePictureError("colour picture, but the translator takes grey ones")
        pixels = pixels[..., 0]
    if pixels.ndim == 2:
        return Picture(np.repeat(pixels[None], channels or 1, axis=0), original_size)
    return Picture(np.ascontiguousarray(pixels.transpose(2, 0, 1)), original_size)


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` scaled to (width, height)."""
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def encode(pixels: np.ndarray) -> bytes:
    """uint8 (C, H, W) as PNG, the same bytes for the same pixels."""
    buffer = io.BytesIO()
    decode(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def describe(pixels: np.ndarray) -> tuple[float, float, float]:
    """Brightness, contrast and sharpness of uint8 (C, H, W), in [0, 1]: mean, deviation, mean absolute gradient."""
    grey = pixels.astype(np.float64).mean(0) / 255
    steps = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1) if grey.shape[axis] > 1]
    return float(grey.mean()), float(grey.std()), float(np.mean(steps)) if steps else 0.0
