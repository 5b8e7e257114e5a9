"""Decode one picture: upright (EXIF orientation applied), 8 bits (16-bit grey is scaled), grey or RGB.

Palette and CMYK pictures are converted, transparency is laid over white.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gen_invariance.errors import printable

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class UnusablePictureError(Exception):
    """A picture that cannot be used; the text says why. Caught by those who know the file's name."""


def decode_picture(file: Path | BinaryIO) -> Image.Image:
    """The picture in `file`, upright, in mode "L" or "RGB".

    Raises:
        UnusablePictureError: not one readable picture.
    """
    try:
        with Image.open(file) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            # Phones store a photo and its preview as two frames (MPO); the photo comes first.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise UnusablePictureError(f"{image.n_frames} pictures in one file, an animation or pages")
            image.load()
            return _grey_or_rgb(ImageOps.exif_transpose(image))
    except UnusablePictureError:
        raise
    except Image.DecompressionBombError:
        most = Image.MAX_IMAGE_PIXELS
        raise UnusablePictureError(f"more than {most} pixels, which may be a decompression bomb") from None
    except UnidentifiedImageError:
        raise UnusablePictureError("not an image of a known format") from None
    except Exception as error:  # damaged files make decoders raise almost anything
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = printable(text)[:200] or type(error).__name__
        raise UnusablePictureError(f"cannot be decoded ({reason})") from error


def _grey_or_rgb(image: Image.Image) -> Image.Image:
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


def crop_centre(image: Image.Image) -> Image.Image:
    """The largest square in the middle of `image`."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))
