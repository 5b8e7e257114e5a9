"""An exported set: balanced, in the form of its input, whoever computes it, and however often it is killed."""

import io
import itertools
import json
import os
import pickle
import random
import signal
import struct
import tarfile
import traceback
import zlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageCms
from sklearn.datasets import load_digits

from gen_invariance import Compose, Identity, Lighting, MunitTranslator, Rotation, SpatialTranslator
from gen_invariance.augment.export import ExportSettings, export, open_form, workers
from gen_invariance.augment.export.learning import image_data
from gen_invariance.augment.export.manifest import COLUMNS, read_manifest
from gen_invariance.augment.export.pictures import (
    UnusablePictureError,
    decode,
    describe,
    encode,
    prepare,
    scaled_back,
)
from gen_invariance.augment.export.settings import goal_of
from gen_invariance.augment.export.units import draw_generator, outside
from gen_invariance.data import to_uint8
from gen_invariance.errors import GenInvarianceError, OutputError, RunError, SettingsError

COUNTS = {"zero": 20, "one": 9, "two": 3}


def digits():
    """Real digits, uint8 (N, 8, 8), and labels, as many of each class as COUNTS says."""
    bunch = load_digits()
    rows = np.concatenate([np.flatnonzero(bunch.target == label)[:n] for label, n in enumerate(COUNTS.values())])
    return (bunch.images[rows] * 255 / 16).astype(np.uint8), bunch.target[rows]


def as_folder(root, *, size=None):
    images, labels = digits()
    for row, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / list(COUNTS)[label]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels)
        (picture if size is None else picture.resize(size)).save(folder / f"{row:03d}.png")
    return root


@pytest.fixture
def photos(tmp_path):
    return as_folder(tmp_path / "photos")


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def rows_of(out, **wanted):
    return [row for row in read_manifest(out) if all(row[name] == value for name, value in wanted.items())]


SETTINGS = ExportSettings(target="max", batch_size=8, off_distribution=None)


def test_balanced_folder_with_manifest_and_untouched_source(photos, tmp_path):
    before = tree(photos)
    summary = export(open_form("folder", photos), Rotation(30), tmp_path / "out", SETTINGS)
    assert tree(photos) == before
    assert summary.before == (9, 3, 20)  # one, two, zero
    assert summary.after == (20, 20, 20)
    written = tree(tmp_path / "out")
    assert {name: written[name] for name in before} == before
    rows = list(read_manifest(tmp_path / "out"))
    assert list(rows[0]) == list(COLUMNS)
    table = pd.read_parquet(tmp_path / "out" / "manifest.parquet")
    assert table["file"].tolist() == [row["file"] for row in rows]
    kept = {row["file"] for row in rows if row["status"] == "kept"}
    assert kept == {name for name in written if name.endswith(".png")}
    assert "preview.html" in written
    assert set(written) - kept == {"manifest.jsonl", "manifest.parquet", "preview.html", ".gen_invariance.json"}


def test_every_new_image_is_the_draw_that_the_manifest_names(photos, tmp_path):
    export(open_form("folder", photos), Rotation(30), tmp_path / "out", SETTINGS)
    rows = rows_of(tmp_path / "out", kind="generated")
    assert len(rows) == 28
    for row in rows:
        source = torch.from_numpy(np.array(Image.open(photos / row["source"])))[None, None].float() / 255
        generator = torch.Generator().manual_seed(int(row["draw_seed"], 16))
        expected = Rotation(30).apply(source, Rotation(30).sample(source.shape, generator=generator))
        found = np.array(Image.open(tmp_path / "out" / row["file"]))
        assert np.array_equal(found, to_uint8(expected)[0, 0].numpy())
        assert row["strength"] == pytest.approx(float((expected - source).abs().mean()), abs=1e-6)
        assert row["source"].split("/")[0] == row["class"] == row["file"].split("/")[0]
    pairs = [(row["source"], row["copy"]) for row in rows]
    assert len(set(pairs)) == len(pairs)
    most = max(copy for source, copy in pairs if source.startswith("two"))
    assert most == 5  # 17 new images from 3 sources, shared out evenly


def test_draws_of_other_sources_copies_and_seeds_differ():
    seeds = {draw_generator(*name).initial_seed() for name in [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0)]}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("target", "goal"), [("median", 9), ("max", 20), (12, 12), ("12", 12), (0.5, 10), ("1.0", 20), (1, 1), ("1e-1", 2)]
)
def test_targets(target, goal):
    assert goal_of([20, 9, 3], target) == goal


@pytest.mark.parametrize("target", ["mean", 0, -3, 1.5, "0.0", "", ".", None, True, [3], "nan", 10**12])
def test_wrong_targets_are_named(target):
    with pytest.raises(SettingsError, match="target must be"):
        ExportSettings(target=target)


def build_small():
    with torch.random.fork_rng():
        torch.random.set_rng_state(torch.Generator().manual_seed(1).get_state())
        return MunitTranslator(1, width=8, downsamples=1, residual_blocks=1, style_downsamples=2, mlp_width=8)


def test_units_done_alone_and_in_another_order_write_the_same_bytes(photos, tmp_path, monkeypatch):
    """What a worker process does, without the seconds that one takes to start."""
    nuisance = Compose([build_small(), Lighting()])
    export(open_form("folder", photos), nuisance, tmp_path / "one", SETTINGS)

    def run(self, units):
        workers.start_worker(pickle.loads(pickle.dumps(self._job)))
        return [workers.one_unit(pickle.loads(pickle.dumps(unit))) for unit in reversed(list(units))]

    monkeypatch.setattr(workers.Workers, "run", run)
    export(open_form("folder", photos), nuisance, tmp_path / "two", SETTINGS)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(photos, tmp_path):
    nuisance = Compose([build_small(), Lighting()])
    for processes in (1, 2):
        export(open_form("folder", photos), nuisance, tmp_path / str(processes), SETTINGS, processes=processes)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def in_child(work):
    """Run `work` in a forked process; its exit status. What it raises is raised here, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            os.write(writing, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as file:
        said = file.read()  # until the child is gone
    status = os.waitpid(child, 0)[1]
    if said:
        pytest.fail(f"in the child:\n{said}")
    return status


def kill_at(moment):
    """Make this process die by SIGKILL when it renames a file for the `moment`-th time, before or after doing so.

    Several threads rename: each asks for its own number, as a shared one may have moved on when it is looked at again.
    """
    real, numbers = os.replace, itertools.count(1)

    def replace(*args):
        number = next(numbers)
        if number == moment and moment % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)
        if number == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def kill_and_resume(source, out, settings, nuisance, moments):
    kills = 0
    for moment in moments:

        def work(moment=moment):
            kill_at(moment)
            export(source, nuisance, out, settings, resume=True)

        status = in_child(work)
        assert status in (0, signal.SIGKILL), status
        kills += status == signal.SIGKILL
    export(source, nuisance, out, settings, resume=True)
    return kills


@pytest.mark.parametrize("moments", [10, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["folder", "table", "npz", "webdataset"])
def test_killed_at_random_moments_ends_in_the_same_bytes(form, moments, tmp_path):
    data, nuisance = open_form(form, INPUTS[form](tmp_path / "in")), Rotation(30)
    settings = ExportSettings(target="max", batch_size=4, near_copy=0.05)  # some are rejected: more than one round
    export(data, nuisance, tmp_path / "whole", settings)
    assert rows_of(tmp_path / "whole", status="rejected")
    draw = random.Random(f"{form}{moments}")
    kills = 0
    for _ in range(max(1, moments // 10)):  # each folder is killed several times
        out = tmp_path / f"killed-{kills}"
        chosen = [draw.randint(1, 25 if form in ("folder", "table") else 8) for _ in range(min(moments, 10))]
        kills += kill_and_resume(data, out, settings, nuisance, chosen)
        assert tree(out) == tree(tmp_path / "whole")
    assert kills >= 3


def test_killed_while_finishing(photos, tmp_path):
    source = open_form("folder", photos)
    export(source, Rotation(30), tmp_path / "whole", SETTINGS)

    def count():
        real, numbers = os.replace, itertools.count()

        def replace(*args):
            next(numbers)
            real(*args)

        os.replace = replace
        export(source, Rotation(30), tmp_path / "count", SETTINGS)
        os._exit(next(numbers))

    total = in_child(count) >> 8
    assert total > 30
    for back in range(5):
        out = tmp_path / f"late{back}"
        kill_and_resume(source, out, SETTINGS, Rotation(30), [total - back])
        assert tree(out) == tree(tmp_path / "whole")


def test_resume_of_a_finished_export_changes_nothing_and_other_settings_are_refused(photos, tmp_path):
    source, out = open_form("folder", photos), tmp_path / "out"
    first = export(source, Rotation(30), out, SETTINGS)
    before = tree(out)
    assert export(source, Rotation(30), out, SETTINGS, resume=True) == first
    assert tree(out) == before
    with pytest.raises(SettingsError, match="already holds an export"):
        export(source, Rotation(30), out, SETTINGS)
    with pytest.raises(SettingsError, match="target changed"):
        export(source, Rotation(30), out, replace(SETTINGS, target=5), resume=True)
    with pytest.raises(SettingsError, match="translator changed"):
        export(source, Rotation(31), out, SETTINGS, resume=True)
    (photos / "two" / "new.png").write_bytes((photos / "zero" / "000.png").read_bytes())
    with pytest.raises(SettingsError, match="images were added"):
        export(source, Rotation(30), out, SETTINGS, resume=True)


def test_a_second_export_into_the_same_folder_waits_outside(photos, tmp_path):
    import fcntl

    out = tmp_path / "out"
    (out / ".gen_invariance").mkdir(parents=True)
    with open(out / ".gen_invariance" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another export"):
            export(open_form("folder", photos), Rotation(30), out, SETTINGS)


def as_table(root, *, suffix=".csv"):
    as_folder(root / "files")
    files = sorted((root / "files").rglob("*.png"))
    table = pd.DataFrame(
        {
            "split": "train",
            "path": [str(file.relative_to(root)) for file in files],
            "label": [file.parent.name for file in files],
        }
    )
    path = root / f"set{suffix}"
    table.to_parquet(path) if suffix == ".parquet" else table.to_csv(path, index=False)
    return path


def as_npz(root, *, layout="nhwc", dtype=np.uint8):
    root.mkdir(parents=True, exist_ok=True)
    images, labels = digits()
    images = images if dtype == np.uint8 else (images / 255).astype(dtype)
    images = {"nhw": images, "nhwc": np.stack([images] * 3, -1), "nchw": np.stack([images] * 3, 1)}[layout]
    names = np.array(list(COUNTS))
    np.savez(root / "set.npz", train_images=images, train_labels=labels.astype(np.int32), class_names=names)
    return root / "set.npz"


def as_shards(root, *, json_labels=False):
    root.mkdir(parents=True, exist_ok=True)
    images, labels = digits()
    for shard, rows in enumerate(np.array_split(np.arange(len(labels)), 3)):
        with tarfile.open(root / f"set-{shard}.tar", "w") as tar:
            for row in rows:
                label = ("json", json.dumps({"label": int(labels[row])})) if json_labels else ("cls", str(labels[row]))
                for suffix, content in (("png", encode(images[row][None])), (label[0], label[1].encode())):
                    member = tarfile.TarInfo(f"a/{row:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


INPUTS = {"folder": as_folder, "table": as_table, "npz": as_npz, "webdataset": as_shards}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("originals", ["copy", "reference", "link"])
def test_table_in_table_out(suffix, originals, tmp_path):
    path = as_table(tmp_path / "in", suffix=suffix)
    settings = ExportSettings(target="max", off_distribution=None, originals=originals)
    summary = export(open_form("table", path), Rotation(30), tmp_path / "out", settings)
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
    again = open_form("table", written)
    assert len(again.entries()) == 60  # the output is an input


@pytest.mark.parametrize(("layout", "dtype"), [("nhw", np.uint8), ("nhwc", np.float32), ("nchw", np.uint8)])
def test_npz_in_npz_out(layout, dtype, tmp_path):
    path = as_npz(tmp_path / "in", layout=layout, dtype=dtype)
    settings = ExportSettings(target="max", off_distribution=None, image_size=16)  # results go back to 8 x 8
    summary = export(open_form("npz", path), Rotation(30), tmp_path / "out", settings)
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


@pytest.mark.parametrize("json_labels", [False, True])
def test_shards_in_shards_out(json_labels, tmp_path):
    path = as_shards(tmp_path / "in", json_labels=json_labels)
    summary = export(open_form("webdataset", path), Rotation(30), tmp_path / "out", SETTINGS)
    assert summary.after == (20, 20, 20)
    again = open_form("webdataset", tmp_path / "out")
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
    summary = export(open_form("folder", tmp_path / "in"), Rotation(30), tmp_path / "out", SETTINGS)
    assert summary.after == (20, 20, 20)
    old, new = tree(tmp_path / "in"), tree(tmp_path / "out")
    assert {name for name in new if name.startswith("val/")} == {name for name in old if name.startswith("val/")}
    assert len([name for name in new if name.startswith("train/")]) == 60


def test_sizes_on_the_way_there_and_back(tmp_path):
    as_folder(tmp_path / "in", size=(40, 24))
    data = open_form("folder", tmp_path / "in")
    for back, size in ((False, (16, 16)), (True, (40, 24))):
        settings = ExportSettings(target="max", image_size=16, restore_size=back, off_distribution=None)
        export(data, SpatialTranslator(1, start=0.3), tmp_path / f"out{back}", settings)
        rows = rows_of(tmp_path / f"out{back}", kind="generated")
        assert rows
        assert {Image.open(tmp_path / f"out{back}" / row["file"]).size for row in rows} == {size}
        assert {(row["width"], row["height"]) for row in rows} == {size}
    picture = prepare(Image.new("L", (40, 24)), size=16, whole=True, channels=1)
    assert picture.pixels.shape == (1, 16, 27)
    assert scaled_back(picture.pixels, picture.size).shape == (1, 24, 40)


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
    export(open_form("folder", tmp_path / "in"), Identity(), tmp_path / "out", ExportSettings(target=1))
    rows = {row["source"]: row for row in read_manifest(tmp_path / "out")}
    assert len(rows) == 7
    assert {row["status"] for row in rows.values()} == {"kept"}
    assert {(row["width"], row["height"]) for row in rows.values()} == {(12, 8)}
    form, entries = open_form("folder", tmp_path / "in"), open_form("folder", tmp_path / "in").entries()
    pixels = {
        entry.key: prepare(decode(form.read(entry)), size=None, whole=True, channels=3).pixels for entry in entries
    }
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
    found = prepare(decode(content), size=None, whole=True, channels=3).pixels.transpose(1, 2, 0)
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


def test_near_copies_and_other_classes_are_rejected_and_made_up_for(photos, tmp_path):
    data = open_form("folder", photos)
    none = export(data, Identity(), tmp_path / "same", SETTINGS)
    assert none.after == none.before
    assert none.short == (("one", 11), ("two", 17))
    assert {row["reason"] for row in rows_of(tmp_path / "same", status="rejected")} == {"near copy of its source"}

    def fussy(images):  # takes about half of all images for class 1
        odd = (images.sum((1, 2, 3)) * 1e4).long() % 2
        return torch.nn.functional.one_hot(odd, 3).float()

    judged = export(data, Rotation(30), tmp_path / "judged", SETTINGS, predict=fussy)
    assert judged.after[0] == 20  # class "one" is number 0
    assert judged.rejected
    reasons = {row["reason"] for row in rows_of(tmp_path / "judged", status="rejected", label=0)}
    assert reasons == {"the classifier takes it for 'two'"}


def test_results_unlike_any_original_are_rejected(photos, tmp_path):
    class White(Identity):
        def apply(self, images, draw):
            return torch.ones_like(images)

    summary = export(open_form("folder", photos), White(), tmp_path / "out", ExportSettings(target="max"))
    assert summary.after == summary.before
    assert all("unlike any original" in row["reason"] for row in rows_of(tmp_path / "out", status="rejected"))
    ranges = np.array([[0.2, 0.1, 0.1], [0.4, 0.2, 0.2]])
    assert outside((0.3, 0.15, 0.15), ranges) == 0
    assert outside((0.5, 0.15, 0.15), ranges) == pytest.approx(0.5)
    assert outside((0.1, 0.15, 0.15), ranges) == pytest.approx(0.5)
    assert describe(np.full((3, 4, 4), 51, np.uint8)) == pytest.approx((0.2, 0, 0))


@pytest.mark.parametrize("level", [0.0, 0.45, 1.0])
def test_pictures_without_content_are_rejected_however_much_the_originals_differ(level, tmp_path):
    """Photographs from dark to bright: half a range below the darkest lies below black."""
    base = np.random.default_rng(0).integers(0, 256, (60, 8, 8)) / 255
    for number, (pixels, light) in enumerate(zip(base, np.linspace(0.15, 0.75, 60), strict=True)):
        folder = tmp_path / "in" / ("many" if number < 50 else "few")
        folder.mkdir(parents=True, exist_ok=True)
        spread = 0.2 + number % 4 * 0.2
        Image.fromarray(((light + spread * (pixels - 0.5)).clip(0, 1) * 255).astype(np.uint8)).save(
            folder / f"{number}.png"
        )

    class Flat(Identity):
        def apply(self, images, draw):
            return torch.full_like(images, level)

    summary = export(open_form("folder", tmp_path / "in"), Flat(), tmp_path / "out", ExportSettings(target="max"))
    assert summary.after == summary.before == (10, 50)


def test_at_most_so_many_from_one_source(photos, tmp_path):
    settings = ExportSettings(target="max", per_source=2, off_distribution=None)
    summary = export(open_form("folder", photos), Rotation(30), tmp_path / "out", settings)
    assert summary.after == (20, 9, 20)
    assert summary.short == (("two", 11),)


def test_unusable_files_are_named_and_do_not_count(photos, tmp_path):
    (photos / "two" / "bad.png").write_bytes(b"not a picture")
    (photos / "two" / "empty.png").write_bytes(b"")
    (photos / "two" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(photos / "two" / "pipe.png")
    (photos / "two" / "notes.txt").write_text("hello")
    (photos / "two" / "more").mkdir()
    (photos / "stray.png").write_bytes(b"x")
    summary = export(open_form("folder", photos), Rotation(30), tmp_path / "out", SETTINGS)
    assert summary.after == (20, 20, 20)
    assert [key for key, _ in summary.problems] == ["two/bad.png", "two/empty.png", "two/gone.png", "two/pipe.png"]
    assert [key for key, _ in summary.ignored] == ["stray.png", "two/more", "two/notes.txt"]
    assert not (tmp_path / "out" / "two" / "bad.png").exists()
    assert len(rows_of(tmp_path / "out", status="unusable")) == 4


def test_colour_pictures_for_a_grey_translator_are_named(photos, tmp_path):
    Image.new("RGB", (8, 8), (250, 0, 0)).save(photos / "two" / "red.png")
    summary = export(open_form("folder", photos), SpatialTranslator(1, start=0.5), tmp_path / "out", SETTINGS)
    assert summary.problems == (("two/red.png", "colour picture, but the translator takes grey ones"),)


def test_a_full_disk_stops_with_one_line_and_goes_on_later(photos, tmp_path, monkeypatch):
    whole = export(open_form("folder", photos), Rotation(30), tmp_path / "whole", SETTINGS)
    real, left = os.replace, [20]

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        export(open_form("folder", photos), Rotation(30), tmp_path / "out", SETTINGS)
    monkeypatch.setattr(os, "replace", real)
    again = export(open_form("folder", photos), Rotation(30), tmp_path / "out", SETTINGS, resume=True)
    assert again.after == whole.after
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_failing_picture_does_not_take_others_along(photos, tmp_path):
    Image.new("L", (2, 2), 99).save(photos / "two" / "tiny.png")  # smaller than the network's reflected border
    summary = export(open_form("folder", photos), build_small(), tmp_path / "out", SETTINGS)
    assert summary.after == (20, 20, 20)
    assert any("cannot be translated" in row["reason"] for row in rows_of(tmp_path / "out", status="rejected"))


@pytest.mark.slow
def test_a_killed_worker_ends_in_one_line(photos, tmp_path):
    with pytest.raises(RunError, match="a worker process died"):
        export(open_form("folder", photos), _Deadly(), tmp_path / "out", SETTINGS, processes=2)


class _Deadly(Rotation):
    def apply(self, images, draw):
        os.kill(os.getpid(), signal.SIGKILL)


def test_images_for_fitting(photos, tmp_path):
    data = image_data(open_form("folder", photos))
    assert data.images.shape == (32, 1, 8, 8)
    assert data.class_names == ("one", "two", "zero")
    assert data.counts.tolist() == [9, 3, 20]
    assert len(image_data(open_form("folder", photos), most=10)) == 10
    Image.new("RGB", (9, 9), (250, 0, 0)).save(photos / "two" / "red.png")
    with pytest.raises(GenInvarianceError, match=r"data\.image_size=N"):
        image_data(open_form("folder", photos))
    assert image_data(open_form("folder", photos), image_size=8).images.shape == (33, 3, 8, 8)
