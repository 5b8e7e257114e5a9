"""The one door of image files: what may be decoded, by what, and what stands beside the pixels without harm."""

import io
import os
import stat
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from gen_invariance.data.readers.pictures import SUFFIXES, UnusablePictureError, decode_picture, read_formats
from gen_invariance.files import read_regular

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)


def encoded(kind, pixels=PIXELS, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content):
    return np.asarray(decode_picture(io.BytesIO(content)))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
DOS_EPS = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(POSTSCRIPT)) + bytes(20) + POSTSCRIPT


@given(suffix=st.sampled_from(sorted(SUFFIXES)), before=st.sampled_from([b"", b"\n", b"\x04"]))
@settings(max_examples=20, deadline=None)
def test_no_program_is_started_whatever_a_file_holds(tmp_path_factory, suffix, before):
    """A Ghostscript that writes down that it ran stands first in the path."""
    folder = tmp_path_factory.mktemp("eps")
    trap = folder / "gs"
    trap.write_text(f"#!/bin/sh\ntouch {folder}/ran\nexit 0\n")
    trap.chmod(trap.stat().st_mode | stat.S_IEXEC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        patch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # as in a new process: looked for again
        for content in (before + POSTSCRIPT, DOS_EPS):
            (folder / f"a{suffix}").write_bytes(content)
            with pytest.raises(UnusablePictureError, match="not an image of a known format"):
                decode_picture(folder / f"a{suffix}")
    assert not (folder / "ran").exists()


def test_formats_that_start_programs_or_hold_other_files_are_not_read():
    assert {"PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"} <= set(read_formats())
    assert not {"EPS", "WMF", "PSD", "FITS", "HDF5", "GRIB", "BUFR", "ICNS", "MPEG"} & set(read_formats())


KINDS = {"jfif": "JPEG", "jpe": "JPEG", "JPG": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "dib": "DIB", "pbm": "PPM"}


@pytest.mark.parametrize("suffix", KINDS)
def test_all_names_of_a_format_are_read(suffix, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    smooth = np.add.outer(np.arange(24), np.arange(32))[..., None].repeat(3, 2).astype(np.uint8) * 4
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encoded(KINDS[suffix], smooth, **({"quality": 95} if KINDS[suffix] == "JPEG" else {})))
    assert path.suffix.lower() in SUFFIXES
    assert np.abs(np.asarray(decode_picture(path)).astype(int) - smooth).mean() < 3


def chunk(kind, content, *, right=True):
    checksum = zlib.crc32(kind + content) ^ (not right)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


BESIDE = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"cHRM", b"gAMA", b"pHYs", b"sRGB", b"tIME", b"sBIT", b"xxXx"]
BIG = zlib.compress(b"A" * (2 << 20))


@given(
    chunks=st.lists(st.tuples(st.sampled_from(BESIDE), st.binary(max_size=40), st.booleans()), min_size=1, max_size=3)
)
@example(chunks=[(b"zTXt", b"workflow\0\0" + BIG, True)])
@example(chunks=[(b"iCCP", b"ICC Profile\0\0" + BIG, True)])
@example(chunks=[(b"iTXt", b"k\0\1\0en\0k\0" + BIG, True)])
@example(chunks=[(b"eXIf", b"bad", True)])
@example(chunks=[(b"cHRM", b"\0" * 31, True), (b"pHYs", b"\0" * 3, True)])
@example(chunks=[(b"tEXt", b"prompt\0what", False)])
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_what_stands_beside_the_pixels_of_a_png_may_be_damaged(chunks):
    content = encoded("PNG")
    more = b"".join(chunk(kind, text, right=right) for kind, text, right in chunks)
    assert np.array_equal(decoded(content[:33] + more + content[33:]), PIXELS)


SEGMENTS = [b"", b"Exif\0\0", b"MPF\0", b"Photoshop 3.0\0", b"ICC_PROFILE\0\1\1", b"http://ns.adobe.com/xap/1.0/\0"]


@given(marker=st.integers(0xE1, 0xEF), content=st.binary(max_size=60), name=st.sampled_from(SEGMENTS))
@settings(max_examples=100, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_what_stands_beside_the_pixels_of_a_jpeg_may_be_damaged(marker, content, name):
    if marker == 0xEE:
        name = b"Dobe"  # a true Adobe segment says how colours are stored
    segment = bytes([0xFF, marker]) + struct.pack(">H", 2 + len(name + content)) + name + content
    plain = encoded("JPEG")
    found, expected = decoded(plain[:2] + segment + plain[2:]), decoded(plain)
    if found.shape == expected.shape:  # chance may write an orientation
        assert np.array_equal(np.sort(found, axis=None), np.sort(expected, axis=None))
    else:
        assert sorted(found.shape) == sorted(expected.shape)


def test_pixels_may_not_be_damaged():
    content = bytearray(encoded("PNG"))
    content[content.index(b"IDAT") + 10] ^= 255
    with pytest.raises(UnusablePictureError):
        decoded(bytes(content))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_even_where_other_exif_is_damaged(orientation):
    stored = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = exif.tobytes()
    # One more entry, of 4 GB of rationals far behind the end: what Pillow cannot write anew.
    count = struct.unpack_from("<H" if plain[6:8] == b"II" else ">H", plain, 14)[0]
    order = "<" if plain[6:8] == b"II" else ">"
    broken = bytearray(plain[:14] + struct.pack(order + "H", count + 1) + plain[16 : 16 + 12 * count])
    broken += struct.pack(order + "HHII", 0x9999, 5, 1 << 29, 1 << 30) + bytes(4)
    turned = {1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.transpose(1, 0, 2),
              6: np.rot90(PIXELS, -1), 7: PIXELS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(PIXELS)}  # fmt: skip
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=bytes(broken))
    assert np.array_equal(decoded(buffer.getvalue()), turned[orientation])


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_values_of_fewer_bits_in_sixteen_are_refused(bits, suffix):
    """They would come out as a few almost black levels."""
    grey = (np.arange(108).reshape(9, 12) * ((1 << bits) - 1) // 107).astype(np.uint16)
    with pytest.raises(UnusablePictureError, match="scale them to the full range"):
        decoded(encoded(suffix, grey))
    full = (grey.astype(np.int64) * 65535 // ((1 << bits) - 1)).astype(np.uint16)
    assert np.array_equal(decoded(encoded(suffix, full)), np.round(full / 257))
    assert decoded(encoded(suffix, np.zeros((9, 12), np.uint16))).max() == 0  # black is black


def deep_png(pixels):
    """Uint16 (H, W, C) as a PNG, which Pillow cannot write: by hand, after the PNG specification."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_sixteen_bits(channels):
    wide = np.random.default_rng(1).integers(0, 65536, (9, 12, channels)).astype(np.uint16)
    if channels != 3:
        wide[..., -1] = 65535  # opaque
    found, colours = decoded(deep_png(wide)), wide[..., : 1 if channels == 2 else 3]
    assert np.abs(found.reshape(9, 12, -1)[..., : colours.shape[-1]] - colours / 257).max() <= 1
    if channels != 3:
        wide[..., :-1] //= 16
    with pytest.raises(UnusablePictureError, match="scale them to the full range"):
        decoded(deep_png(wide // 16 if channels == 3 else wide))


def test_a_pipe_or_a_device_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UnusablePictureError, match="not a regular file"):
            decode_picture(path)
    (tmp_path / "long.png").write_bytes(encoded("PNG"))
    os.truncate(tmp_path / "long.png", 1 << 40)  # sparse: a terabyte of nothing
    with pytest.raises(UnusablePictureError, match="bytes, which is more than"):
        decode_picture(tmp_path / "long.png")
    with pytest.raises(OSError, match="more than 3"):
        read_regular(tmp_path / "long.png", most=3)


@pytest.mark.parametrize(("width", "height"), [(1, 100_000_000), (3, 40_000_000), (1, 30_000_000)])
def test_a_strip_whose_rows_alone_fill_the_memory_is_refused(width, height):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    with pytest.raises(UnusablePictureError, match="decompression bomb"):
        decoded(content)


def test_sixteen_bits_are_scaled_alike_in_all_strips():
    values = np.random.default_rng(0).integers(0, 65536, (700, 5), dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    expected = np.rint(values.astype(np.float64) * 255 / 65535)
    assert (np.asarray(decoded(buffer.getvalue())) == expected).all()


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr("gen_invariance.data.readers.pictures._LARGE", 50)
    running, most, load = [0], [0], Image.Image.load

    def counted(image):
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            return load(image)
        finally:
            running[0] -= 1

    monkeypatch.setattr(Image.Image, "load", counted)
    content = encoded("BMP")
    threads = [threading.Thread(target=decoded, args=(content,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
