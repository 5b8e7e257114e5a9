"""How a picture is stored, read off a source, so that what is made of it is stored alike: format, quality, mode, turn.

A class whose new images are of another format, quality or size than its originals teaches a classifier just that.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from gen_invariance.data.readers.pictures import ORIENTATION, read_orientation

_BACK = {  # from upright to stored, by orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_KEPT = ("icc_profile", "dpi")  # pixels mean colours by the one, sizes by the other
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_TIFF = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "group3", "group4")
_AVIF_QUALITY = 80  # trying some takes too long

EXTENSIONS = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "BMP": ".bmp",
    "WEBP": ".webp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "PPM": ".ppm",
    "AVIF": ".avif",
    "DIB": ".dib",
    "JPEG2000": ".jp2",
}
"""Formats that results are written in; sources in any other get results in PNG."""


@dataclass(frozen=True)
class Encoding:
    """How a picture is stored.

    Attributes:
        file_format: a key of `EXTENSIONS`.
        mode: Pillow's colour mode.
        orientation: of EXIF, 1 to 8.
        options: further ones of `Image.save`.
        native: whether the source is stored in that format.
        size: bytes of the source where its quality has to be found out by trying, else 0.
    """

    file_format: str = "PNG"
    mode: str = "RGB"
    orientation: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    native: bool = True
    size: int = 0

    @property
    def extension(self) -> str:
        """Usual end of a file name."""
        return EXTENSIONS[self.file_format]

    def encode(self, pixels: np.ndarray) -> bytes:
        """Upright uint8 (C, H, W), C of 1 or 3, as a file; the same bytes for the same pixels."""
        image = convert_mode(to_image(pixels), self.mode)
        options = dict(self.options)
        if self.orientation in _BACK:
            image = image.transpose(_BACK[self.orientation])
            exif = Image.Exif()
            exif[ORIENTATION] = self.orientation
            options["exif"] = exif
        return _save(image, self.file_format, options)


def look_at_encoding(content: bytes) -> tuple[Callable[[Image.Image], None], Callable[[Image.Image], Encoding]]:
    """What `decode_picture` shows the stored picture to, and what gives its encoding then, from the upright picture."""
    seen: list[Encoding] = []

    def look(image: Image.Image) -> None:
        seen.append(_read_encoding(image, content))

    def finish(upright: Image.Image) -> Encoding:
        return _with_quality(seen[0], upright) if seen[0].size else seen[0]

    return look, finish


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 (C, H, W) as a picture in mode "L" or "RGB"."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _read_encoding(image: Image.Image, content: bytes) -> Encoding:
    name = "JPEG" if image.format == "MPO" else image.format or ""
    orientation = read_orientation(image)
    if name not in EXTENSIONS:
        mode = image.mode if image.mode in ("1", "L", "LA", "RGB", "RGBA", *_SIXTEEN_BIT) else "RGB"
        return Encoding("PNG", mode, orientation, native=False)
    options = {key: image.info[key] for key in _KEPT if image.info.get(key)}
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        options["qtables"] = {key: list(table) for key, table in image.quantization.items()}
        options["subsampling"] = JpegImagePlugin.get_sampling(image)
        options["progressive"] = bool(image.info.get("progressive"))
    if name == "TIFF" and image.info.get("compression") in _TIFF:
        options["compression"] = image.info["compression"]
    if name == "WEBP" and _is_lossless_webp(content):
        options["lossless"] = True
    if name == "AVIF":
        options["quality"] = _AVIF_QUALITY
    if name == "JPEG2000":
        options |= _jpeg_2000_options(image, content)
    tried = name == "WEBP" and not options.get("lossless")
    return Encoding(name, image.mode, orientation, options, size=len(content) if tried else 0)


def _is_lossless_webp(content: bytes) -> bool:
    """Whether the chunk with the picture in a RIFF file is the lossless one."""
    place = 12
    while place + 8 <= len(content) and content[place : place + 4] not in (b"VP8 ", b"VP8L"):
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    return content[place : place + 4] == b"VP8L"


def _jpeg_2000_options(image: Image.Image, content: bytes) -> dict[str, Any]:
    """Bare or in a container; without loss, as the wavelet of the source says, or of as many bytes as the source."""
    bare = content.startswith(b"\xff\x4f\xff\x51")
    coding = content.find(b"\xff\x52")  # the segment on coding style; its 14th byte tells the wavelet
    if coding >= 0 and content[coding + 13 : coding + 14] == b"\1":
        return {"no_jp2": bare, "irreversible": False}
    raw = image.width * image.height * len(image.getbands())
    return {"no_jp2": bare, "irreversible": True, "quality_mode": "rates", "quality_layers": [raw / len(content)]}


def _with_quality(encoding: Encoding, upright: Image.Image) -> Encoding:
    """The encoding in the least quality at which the source takes as many bytes again: its file does not say which."""
    low, high = 1, 100
    image = convert_mode(upright, encoding.mode)
    while low < high:
        middle = (low + high) // 2
        if len(_save(image, encoding.file_format, encoding.options | {"quality": middle})) < encoding.size:
            low = middle + 1
        else:
            high = middle
    return replace(encoding, options=encoding.options | {"quality": high}, size=0)


def convert_mode(image: Image.Image, mode: str) -> Image.Image:
    """A picture of mode "L" or "RGB" in the colour mode `mode`; what was transparent is opaque."""
    if mode in (image.mode, "L", "RGB", "RGBA", "LA"):
        return image if mode == image.mode else image.convert(mode)
    if mode == "1":
        return image.convert("1", dither=Image.Dither.NONE)
    if mode in ("P", "PA"):
        return image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    if mode in _SIXTEEN_BIT:
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    try:
        return image.convert("RGB").convert(mode)
    except ValueError:  # Lab
        return image.convert("RGB")


def _save(image: Image.Image, file_format: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()
