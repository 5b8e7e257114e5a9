"""Decode one picture: upright (EXIF orientation applied), 8 bits (16-bit grey is scaled), grey or RGB.

The one place where an image file is opened. Palette and CMYK pictures are converted, transparency is laid over white.
Pillow is told which formats it may take a file for: left to itself it starts Ghostscript on a .png that holds EPS.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from gen_invariance.errors import printable
from gen_invariance.files import open_regular

_SUFFIXES = {
    "PNG": ".png .apng",
    "JPEG": ".jpg .jpeg .jpe .jfif .jif .mpo",
    "BMP": ".bmp",
    "DIB": ".dib",
    "GIF": ".gif",
    "WEBP": ".webp",
    "TIFF": ".tif .tiff",
    "PPM": ".ppm .pgm .pbm .pnm",
    "AVIF": ".avif .avifs",
    "JPEG2000": ".jp2 .j2k .jpx .jpf .j2c .jpc",
}
SUFFIXES = frozenset(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes.split())
"""Endings, in lower case, of the names of files that are read."""
_UNREAD = """
.heic .heif .hif .jxl .svg .svgz .eps .psd .xcf .tga .ico .icns .pcx .exr .hdr .pfm .dds .qoi
.jxr .wdp .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .dcm .dicom .nii .fits .mhd .nrrd
"""
UNREAD_SUFFIXES = frozenset(_UNREAD.split())
"""Endings of pictures that are not read: such a file is named, never left out in silence."""

MOST_BYTES = 1 << 30  # of one file: an uncompressed picture of the largest size that is decoded
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_LEAST_WHITE = 1 << 14  # 16-bit pictures that stay below are taken for 10, 12 or 14 bits that nobody scaled
_ROW_BYTES = 8  # that Pillow takes for each row besides its pixels: of a strip of one column they are the most
_ROWS = 256  # that are scaled at once
_LARGE = 1 << 25  # pixels; larger pictures are decoded one at a time
_one_large_at_a_time = threading.Lock()
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
_BRANDS = (b"avi", b"hei", b"mif", b"hev")  # of AVIF and HEIF
_PNG, _JPEG = _MAGIC[:2]
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"eXIf")
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
"""EXIF tag that says how a stored picture lies."""


class UnusablePictureError(Exception):
    """A picture that cannot be used; the text says why. Caught by those who know the file's name."""


def decode_picture(
    file: Path | BinaryIO, *, look: Callable[[Image.Image], None] | None = None, side: int | None = None
) -> Image.Image:
    """The picture in `file`, upright, in mode "L" or "RGB".

    What lies beside the pixels (EXIF, texts, profiles) may be damaged; the picture is readable all the same.

    Args:
        file: an encoded picture.
        look: is shown the picture as it is stored, before it is turned or converted.
        side: if the shorter side need not be longer, JPEG is decoded at a fraction of its size, not below this.

    Raises:
        UnusablePictureError: not one readable picture.
    """
    if isinstance(file, Path):
        try:
            opened = open_regular(file, most=MOST_BYTES)
        except OSError as error:
            raise UnusablePictureError(f"cannot be read ({error.strerror or error})") from error
        with opened:
            if not os.fstat(opened.fileno()).st_size:
                raise UnusablePictureError("empty file")
            return decode_picture(opened, look=look, side=side)
    try:
        return _decode_with_or_without_remarks(file, look, side)
    except UnusablePictureError:
        raise
    except Image.DecompressionBombError:
        raise UnusablePictureError(
            f"more than {_most_pixels()} pixels, which may be a decompression bomb; scale it down"
        ) from None
    except UnidentifiedImageError:
        raise UnusablePictureError("not an image of a known format") from None
    except Exception as error:  # damaged files make decoders raise almost anything
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = printable(text)[:200] or type(error).__name__
        raise UnusablePictureError(f"cannot be decoded ({reason})") from error


def read_picture_size(file: BinaryIO) -> tuple[int, int]:
    """(width, height) of the picture in `file` as it is stored; it is not decoded.

    Raises:
        UnusablePictureError: not a picture.
    """
    try:
        with Image.open(file, formats=read_formats()) as image:
            return image.size
    except Exception as error:  # damaged files make decoders raise almost anything
        raise UnusablePictureError(f"not an image of a known format ({printable(error)[:100]})") from error


@contextmanager
def without_remarks_of_pillow() -> Iterator[None]:
    """Without Pillow's warnings of odd metadata and of large pictures, in all threads; enter it in one thread only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def is_picture_inside(path: Path) -> bool:
    """Whether the first bytes of a regular file are those of a picture, whatever its name."""
    with open_regular(path) as file:
        head = file.read(16)
    riff, brand = head[:4] == b"RIFF" and head[8:12] == b"WEBP", head[4:8] == b"ftyp" and head[8:11] in _BRANDS
    return head.startswith(_MAGIC) or riff or brand


@cache
def read_formats() -> tuple[str, ...]:
    """What Pillow may take a file for, of what this Pillow knows; all are decoded in this process, without programs."""
    Image.init()
    return tuple(name for name in _SUFFIXES if name in Image.OPEN)


def _decode_with_or_without_remarks(
    file: BinaryIO, look: Callable[[Image.Image], None] | None, side: int | None
) -> Image.Image:
    try:
        return _decode(file, look, side)
    except (UnusablePictureError, Image.DecompressionBombError):
        raise
    except Exception:  # what stands beside the pixels may be what is damaged; they are read again without it
        file.seek(0)
        bare = _without_remarks(file.read())
        if bare is None:
            raise
        return _decode(io.BytesIO(bare), look, side)


def _decode(file: BinaryIO, look: Callable[[Image.Image], None] | None, side: int | None) -> Image.Image:
    with Image.open(file, formats=read_formats()) as image:
        pixels, most = image.width * image.height, _most_pixels()
        if most and max(pixels, _ROW_BYTES * image.height) > most:
            raise Image.DecompressionBombError
        # Phones store a photo and its preview as two frames (MPO); the photo comes first.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise UnusablePictureError(f"{image.n_frames} pictures in one file, an animation or pages")
        with _one_large_at_a_time if pixels > _LARGE else nullcontext():
            bits = _stored_bits(image)
            if side is not None:
                image.draft(None, (side, side))
            image.load()
            if look is not None:
                look(image)
            return _upright(_grey_or_rgb(image, bits), image)


def _most_pixels() -> int:
    """What Pillow itself takes for a bomb, while it only warns from half of that; 0 where it is told to take all."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 0)


def _stored_bits(image: Image.Image) -> int:
    """Bits of a channel in the file, as far as they matter: 8, 12 or 16; known before the pixels are decoded."""
    stored = str(image.tile[0].args) if image.tile else ""
    if ";12" in stored:
        return 12
    return 16 if ";16" in stored or image.mode in _SIXTEEN_BIT else 8


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    """`picture` turned as the EXIF data of `image` say; damaged ones say nothing, and viewers show it as stored."""
    turned = _TURNED.get(read_orientation(image))
    return picture if turned is None else picture.transpose(turned)


def read_orientation(image: Image.Image) -> int:
    """How the stored picture lies, by EXIF from 1, upright, to 8; 1 where nothing, or nothing readable, says so."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # the parser raises almost anything
        return 1
    return orientation if orientation in _TURNED else 1


def _grey_or_rgb(image: Image.Image, bits: int) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        return _eight_bits(image, bits)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if bits > 8:  # Pillow keeps the upper eight bits of each channel
        _check_white(max(high for _, high in image.convert("RGB").getextrema()) << 8)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """Grey of 12 or 16 bits as 8-bit grey: 65535 becomes 255, rounded."""
    wide, white = np.asarray(image), (1 << bits) - 1
    low, high = int(wide.min()), int(wide.max())
    if low < 0 or high > 65535:
        raise ValueError("grey pixels of more than 16 bits")
    if bits == 16:
        _check_white(high)
    grey = np.empty(wide.shape, dtype=np.uint8)
    for start in range(0, len(wide), _ROWS):  # 64-bit numbers of a large picture would take gigabytes
        part = slice(start, start + _ROWS)
        grey[part] = (wide[part].astype(np.int64) * 255 + white // 2) // white
    return Image.fromarray(grey)


def _check_white(brightest: int) -> None:
    """Refuse 16-bit pictures that are almost black, as 12-bit values in 16 bits are: a few grey levels would remain."""
    if 0 < brightest < _LEAST_WHITE:
        raise UnusablePictureError(
            f"16-bit pixels that reach {brightest} of 65535 only, as unscaled 12-bit values do, so what is white is "
            "unknown; scale them to the full range, or to 8 bits"
        )


def _without_remarks(content: bytes) -> bytes | None:
    """A PNG or JPEG file without what its picture does not need; None for other files, or where nothing is left out."""
    parts: Iterator[tuple[bool, bytes]]
    if content.startswith(_PNG):
        parts, start = _png_chunks(content), len(_PNG)
    elif content.startswith(_JPEG):
        parts, start = _jpeg_segments(content), 2
    else:
        return None
    kept = content[:start] + b"".join(part for needed, part in parts if needed)
    return kept if len(kept) < len(content) else None


def _png_chunks(content: bytes) -> Iterator[tuple[bool, bytes]]:
    """Whether the picture needs it, and the chunk."""
    place = len(_PNG)
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + length]
        whole = chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big")
        yield kind in _PNG_PIXELS and (whole or kind != b"eXIf"), chunk
        place += len(chunk)


def _jpeg_segments(content: bytes) -> Iterator[tuple[bool, bytes]]:
    """Whether the picture needs it, and the segment; from the first table or frame on all is one."""
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF and 0xE0 <= content[place + 1] <= 0xEF:
        marker, end = content[place + 1], place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        segment = content[place:end]
        # JFIF and Adobe say how colours are stored, EXIF how the picture is turned.
        yield marker in (0xE0, 0xEE) or segment[4:10] == b"Exif\0\0", segment
        place = end
    yield True, content[place:]


def crop_centre(image: Image.Image) -> Image.Image:
    """The largest square in the middle of `image`."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))
