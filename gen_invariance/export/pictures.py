"""Pictures between files and the translator: decode, scale, describe."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from gen_invariance.data.readers.pictures import UnusablePictureError, crop_centre, decode_picture, read_picture_size
from gen_invariance.export.encoding import Encoding, look_at_encoding, to_image

_MOST_LOOKED_AT = 2**18  # pixels of a larger picture that its description is taken from


class Picture(NamedTuple):
    """A decoded picture as the translator takes it.

    Attributes:
        pixels: uint8 (C, H, W).
        size: (width, height) of the upright original.
    """

    pixels: np.ndarray
    size: tuple[int, int]


def decode(content: bytes | np.ndarray, *, side: int | None = None) -> Image.Image:
    """The upright picture in mode "L" or "RGB" of an encoded file, or of uint8 pixels (C, H, W).

    Args:
        content: a file's bytes, or pixels.
        side: see `decode_picture`.

    Raises:
        UnusablePictureError: not one readable picture.
    """
    if isinstance(content, np.ndarray):
        return to_image(content)
    if not content:
        raise UnusablePictureError("empty file")
    return decode_picture(io.BytesIO(content), side=side)


def decode_with_encoding(content: bytes | np.ndarray) -> tuple[Image.Image, Encoding]:
    """The picture as `decode` gives it, and how it is stored; pixels are taken for those of a PNG.

    Raises:
        UnusablePictureError: not one readable picture.
    """
    if isinstance(content, np.ndarray):
        image = to_image(content)
        return image, Encoding(mode=image.mode)
    if not content:
        raise UnusablePictureError("empty file")
    look, finish = look_at_encoding(content)
    image = decode_picture(io.BytesIO(content), look=look)
    return image, finish(image)


def read_size(content: bytes | np.ndarray) -> tuple[int, int]:
    """(width, height) of a picture as it lies in its file, which is not decoded.

    Raises:
        UnusablePictureError: not one readable picture.
    """
    if isinstance(content, np.ndarray):
        return content.shape[2], content.shape[1]
    return read_picture_size(io.BytesIO(content))


def prepare(image: Image.Image, *, size: int | None, channels: int | None) -> Picture:
    """The picture as the translator takes it.

    Args:
        image: mode "L" or "RGB".
        size: side to which the central square is scaled; None keeps the whole picture at its size.
        channels: 1 or 3 of the translator; None takes the picture's own.

    Raises:
        UnusablePictureError: a colour picture for a translator of grey ones.
    """
    original_size = image.size
    if size is not None:
        image = crop_centre(image)
        image = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    if channels == 1 and pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise UnusablePictureError("colour picture, but the translator takes grey ones")
        pixels = pixels[..., 0]
    if pixels.ndim == 2:
        return Picture(np.repeat(pixels[None], channels or 1, axis=0), original_size)
    return Picture(np.ascontiguousarray(pixels.transpose(2, 0, 1)), original_size)


def encode(pixels: np.ndarray) -> bytes:
    """uint8 (C, H, W) as PNG, the same bytes for the same pixels."""
    return Encoding(mode="L" if len(pixels) == 1 else "RGB").encode(pixels)


def describe(pixels: np.ndarray) -> tuple[float, float, float]:
    """Brightness, contrast and sharpness of uint8 (C, H, W), in [0, 1]: mean, deviation, mean absolute gradient.

    Of large pictures every n-th row and column is looked at.
    """
    height, width = pixels.shape[1:]
    step = max(1, round(height * width / _MOST_LOOKED_AT))
    rows, columns = (np.float64(part).mean(0) / 255 for part in (pixels[:, ::step], pixels[:, :, ::step]))
    steps = [
        np.abs(np.diff(part, axis=axis)).mean() for part, axis in ((columns, 0), (rows, 1)) if part.shape[axis] > 1
    ]
    return float(rows.mean()), float(rows.std()), float(np.mean(steps)) if steps else 0.0
