"""An exported set has the format of its input; pictures of every kind and size are read as they look."""

import io
import struct
import tarfile
import zlib

import numpy as np
import pandas as pd
import pytest
from export_inputs import SETTINGS, as_folder, as_npz, as_shards, as_table, rows_of, tree
from PIL import Image, ImageCms

from gen_invariance import Identity, Rotation, load_source
from gen_invariance.errors import GenInvarianceError
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.inputs import read_training_images
from gen_invariance.export.manifest import read_manifest
from gen_invariance.export.pictures import UnusablePictureError, decode, prepare
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings

# ---- sets


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("originals", ["copy", "reference", "link"])
def test_table_in_table_out(suffix, originals, tmp_path):
    path = as_table(tmp_path / "in", suffix=suffix)
    settings = ExportSettings(target="max", off_distribution=None, originals=originals)
    summary = export_dataset(open_format("table", path), Rotation(30), tmp_path / "out", settings)
    assert summary.after == (20, 20, 20)
    written = tmp_path / "out" / f"set{suffix}"
    table = pd.read_parquet(written) if suffix == ".parquet" else pd.read_csv(written)
    assert table.columns.tolist() == ["split", "path", "label"]
    assert table["label"].value_counts().tolist() == [20, 20, 20]
    for place, (file, label) in enumerate(zip(table["path"], table["label"], strict=True)):
        found = tmp_path / "out" / file
        assert np.array(Image.open(found)).shape == (8, 8)
        if place >= 32:
            assert found.parent.name == label
        elif originals != "copy":
            assert (tmp_path / "in" / "files") in found.resolve().parents
    again = open_format("table", written)
    assert len(again.entries()) == 60  # the output is an input


@pytest.mark.parametrize(("layout", "dtype"), [("nhw", np.uint8), ("nhwc", np.float32), ("nchw", np.uint8)])
def test_npz_in_npz_out(layout, dtype, tmp_path):
    path = as_npz(tmp_path / "in", layout=layout, dtype=dtype)
    settings = ExportSettings(target="max", off_distribution=None, image_size=16)  # results go back to 8 x 8
    summary = export_dataset(open_format("npz", path), Rotation(30), tmp_path / "out", settings)
    assert summary.after == (20, 20, 20)
    old, new = np.load(path), np.load(tmp_path / "out" / "set.npz")
    assert new["train_images"].shape == (60, *old["train_images"].shape[1:])
    assert new["train_images"].dtype == dtype
    assert new["train_labels"].dtype == np.int32
    assert np.bincount(new["train_labels"]).tolist() == [20, 20, 20]
    assert np.array_equal(new["train_images"][:32], old["train_images"])
    rows = rows_of(tmp_path / "out", kind="generated", status="kept")
    assert [int(row["file"].split("/")[-1]) for row in rows] == list(range(32, 60))
    assert [row["label"] for row in rows] == new["train_labels"][32:].tolist()


@pytest.mark.parametrize("group", [None, "track"])
def test_new_rows_of_an_npz_file_are_of_the_group_of_their_source(group, tmp_path):
    path = as_npz(tmp_path / "in")
    with np.load(path) as stored:
        arrays = dict(stored)
    tracks = np.array([f"t{row // 2}" for row in range(len(arrays["train_labels"]))])
    key = group or "groups"
    np.savez(path, **arrays, **{f"train_{key}": tracks, f"test_{key}": np.arange(3)})
    export_dataset(open_format("npz", path, group=group), Rotation(30), tmp_path / "out", SETTINGS)
    with np.load(tmp_path / "out" / "set.npz") as stored:
        found, kept = stored[f"train_{key}"], stored[f"test_{key}"]
    sources = [int(row["source"].split("/")[-1]) for row in rows_of(tmp_path / "out", kind="generated", status="kept")]
    assert found.tolist() == [*tracks, *tracks[sources]]
    assert kept.tolist() == [0, 1, 2]
    assert len(load_source("npz", tmp_path / "out" / "set.npz", group=group).train.groups) == len(found)


@pytest.mark.parametrize("json_labels", [False, True])
def test_shards_in_shards_out(json_labels, tmp_path):
    path = as_shards(tmp_path / "in", json_labels=json_labels)
    summary = export_dataset(open_format("webdataset", path), Rotation(30), tmp_path / "out", SETTINGS)
    assert summary.after == (20, 20, 20)
    again = open_format("webdataset", tmp_path / "out")
    entries = again.entries()
    assert [sum(entry.label == label for entry in entries) for label in range(3)] == [20, 20, 20]
    assert all(Image.open(io.BytesIO(again.read(entry))).size == (8, 8) for entry in entries)
    for row in rows_of(tmp_path / "out", kind="generated"):
        shard, _, member = row["file"].partition("/")
        with tarfile.open(tmp_path / "out" / shard) as tar:
            assert member in tar.getnames()


def test_train_and_test_parts(tmp_path):
    as_folder(tmp_path / "in" / "train")
    as_folder(tmp_path / "in" / "val")
    summary = export_dataset(open_format("folder", tmp_path / "in"), Rotation(30), tmp_path / "out", SETTINGS)
    assert summary.after == (20, 20, 20)
    old, new = tree(tmp_path / "in"), tree(tmp_path / "out")
    assert {name for name in new if name.startswith("val/")} == {name for name in old if name.startswith("val/")}
    assert len([name for name in new if name.startswith("train/")]) == 60


def test_images_for_fitting(photos, tmp_path):
    data = read_training_images(open_format("folder", photos))
    assert data.images.shape == (32, 1, 8, 8)
    assert data.class_names == ("one", "two", "zero")
    assert data.counts.tolist() == [9, 3, 20]
    assert len(read_training_images(open_format("folder", photos), most=10)) == 10
    Image.new("RGB", (9, 9), (250, 0, 0)).save(photos / "two" / "red.png")
    with pytest.raises(GenInvarianceError, match=r"data\.image_size=N"):
        read_training_images(open_format("folder", photos))
    assert read_training_images(open_format("folder", photos), image_size=8).images.shape == (33, 3, 8, 8)


# ---- pictures


def test_modes_of_pictures(tmp_path):
    """Grey, colour, palette, transparent, 16-bit and turned pictures of one scene look alike to the translator."""
    colour = np.zeros((8, 12, 3), np.uint8)
    colour[:, :6] = (200, 40, 40)
    image, exif = Image.fromarray(colour), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show upright
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    image.save(folder / "rgb.png")
    image.convert("RGBA").save(folder / "rgba.png")
    image.quantize(8).save(folder / "palette.png")
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    image.convert("L").save(folder / "grey.png")
    image.convert("CMYK").save(folder / "cmyk.tif")
    wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(wide).save(folder / "deep.png")
    export_dataset(open_format("folder", tmp_path / "in"), Identity(), tmp_path / "out", ExportSettings(target=1))
    rows = {row["source"]: row for row in read_manifest(tmp_path / "out")}
    assert len(rows) == 7
    assert {row["status"] for row in rows.values()} == {"kept"}
    assert {(row["width"], row["height"]) for row in rows.values()} == {(12, 8)}
    data = open_format("folder", tmp_path / "in")
    pixels = {entry.key: prepare(decode(data.read(entry)), size=None, channels=3).pixels for entry in data.entries()}
    for name in ("rgba", "palette", "turned"):
        assert np.array_equal(pixels[f"a/{name}.png"], pixels["a/rgb.png"]), name
    assert np.array_equal(pixels["a/deep.png"], pixels["a/grey.png"])


def cmyk(pixels):
    """Cyan, magenta, yellow and black of uint8 RGB, without black; the inverse of what `decode` has to do."""
    return Image.merge("CMYK", [*(Image.fromarray(255 - pixels[..., channel]) for channel in range(3)),
                                Image.new("L", pixels.shape[1::-1], 0)])  # fmt: skip


def deep_colour(pixels):
    """A PNG of 16 bits a channel, which Pillow cannot write: by hand, after the PNG specification."""
    height, width, _ = pixels.shape
    big = (pixels.astype(">u2") * 257).reshape(height, -1).view(np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in big)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def half_clear(pixels):
    """Grey with transparency: what shows over white is uint8 `pixels`[..., 0], to one level."""
    grey, alpha = np.array([pixels[..., 0], np.full(pixels.shape[:2], 255)], np.float64)
    alpha[:4] = 200
    under = np.clip((grey - (255 - alpha)) * 255 / alpha, 0, 255).round().astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(under), Image.fromarray(alpha.astype(np.uint8))])


KINDS = {
    "png": lambda rgb: (saved(Image.fromarray(rgb), "PNG"), rgb),
    "bmp": lambda rgb: (saved(Image.fromarray(rgb), "BMP"), rgb),
    "webp": lambda rgb: (saved(Image.fromarray(rgb), "WEBP", lossless=True), rgb),
    "cmyk tiff": lambda rgb: (saved(cmyk(rgb), "TIFF"), rgb),
    "16-bit colour": lambda rgb: (deep_colour(rgb), rgb),
    "bilevel": lambda rgb: (
        saved(Image.fromarray(rgb[..., 0] > 127), "PNG"),
        ((rgb[..., :1] > 127) * 255).repeat(3, 2),
    ),
    "grey and alpha": lambda rgb: (
        saved(half_clear(np.maximum(rgb, 60)), "PNG"),
        np.maximum(rgb, 60)[..., :1].repeat(3, 2),
    ),
    "turned": lambda rgb: (saved(Image.fromarray(np.rot90(rgb).copy()), "PNG", exif=turned(6)), rgb),
    "mirrored": lambda rgb: (saved(Image.fromarray(rgb[:, ::-1].copy()), "PNG", exif=turned(2)), rgb),
    "upside down": lambda rgb: (saved(Image.fromarray(rgb[::-1, ::-1].copy()), "PNG", exif=turned(3)), rgb),
}


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_translator_sees_of_a_kind_of_picture(kind):
    rgb = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    content, expected = KINDS[kind](rgb)
    found = prepare(decode(content), size=None, channels=3).pixels.transpose(1, 2, 0)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_picture_in_lab_colours_is_converted_or_refused():
    """Not every Pillow can; eight bits of Lab hold dark and saturated colours roughly."""
    rgb = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(Image.fromarray(rgb), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    try:
        found = np.asarray(decode(saved(lab, "TIFF"))).astype(int)
    except UnusablePictureError:
        pytest.skip("this Pillow refuses them")
    assert np.abs(found - rgb).mean() < 3
