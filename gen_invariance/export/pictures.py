"""Pictures between files and the translator: decode, scale, scale back, encode."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gen_invariance.data.readers.pictures import UnusablePictureError, crop_centre, decode_picture


@dataclass(frozen=True)
class Picture:
    """A decoded picture at the translator's size.

    Attributes:
        pixels: uint8 (C, H, W).
        size: (width, height) of the upright original.
    """

    pixels: np.ndarray
    size: tuple[int, int]


def decode(content: bytes | np.ndarray) -> Image.Image:
    """The upright picture in mode "L" or "RGB", as `data.readers.folder` reads it.

    Args:
        content: an encoded file, or uint8 pixels (C, H, W).

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
    original = image.size
    if size is not None and whole:
        scale = size / min(original)
        image = _scaled(image, tuple(max(1, round(side * scale)) for side in original))
    elif size is not None:
        image = _scaled(crop_centre(image), (size, size))
    pixels = np.asarray(image)
    if channels == 1 and pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise UnusablePictureError("colour picture, but the translator takes grey ones")
        pixels = pixels[..., 0]
    if pixels.ndim == 2:
        return Picture(np.repeat(pixels[None], channels or 1, axis=0), original)
    return Picture(np.ascontiguousarray(pixels.transpose(2, 0, 1)), original)


def scaled_back(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (C, H, W) scaled to (width, height)."""
    return np.ascontiguousarray(
        prepare(_scaled(decode(pixels), size), size=None, whole=True, channels=len(pixels)).pixels
    )


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


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
