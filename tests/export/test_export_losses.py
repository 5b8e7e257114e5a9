"""Nothing of an image set may be lost or changed on its way through an export: siblings of what once was."""

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections import Counter

import numpy as np
import pytest
from export_inputs import SETTINGS, as_folder, as_npz, build_small, rows_of, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance import Rotation
from gen_invariance.errors import DataError, OutputError
from gen_invariance.export.formats.base import open_format, row_number
from gen_invariance.export.pictures import encode
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings


@given(
    names=st.sets(
        st.sampled_from(["val_images", "val_labels", "test_labels", "test_images", "mean", "meta", "train_age"])
    ),
    column=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_no_array_of_an_npz_file_is_lost(tmp_path_factory, names, column):
    root = tmp_path_factory.mktemp("npz")
    old = dict(np.load(as_npz(root)))
    number = len(old["train_labels"])
    labels = old["train_labels"][:, None] if column else old["train_labels"]
    shown = old["train_images"].dtype.type, old["train_images"].shape[1:]
    more = {"mean": np.float32(3), "meta": np.array(["made", "by hand"]), "train_age": np.arange(number) / 7}
    for part in ("val", "test"):
        if {f"{part}_images", f"{part}_labels"} & names:
            names = names | {f"{part}_images", f"{part}_labels"}
            more |= {f"{part}_images": np.full((5, *shown[1]), 7, shown[0]), f"{part}_labels": np.arange(5) % 3}
    arrays = old | {name: more[name] for name in names} | {"train_labels": labels, "patient": np.arange(number)}
    np.savez(root / "set.npz", **arrays)
    summary = export_dataset(open_format("npz", root / "set.npz"), Rotation(30), root / "out", SETTINGS)
    new = dict(np.load(root / "out" / "set.npz"))
    assert new.keys() == arrays.keys()
    sources = [row_number(row["source"]) for row in rows_of(root / "out", kind="generated", status="kept")]
    assert len(new["train_images"]) == sum(summary.after)
    for name in arrays:
        grows = name in ("train_labels", "patient", "train_age")
        expected = np.concatenate([arrays[name], arrays[name][sources]]) if grows else arrays[name]
        if name != "train_images":
            assert np.array_equal(new[name], expected), name


def test_arrays_that_may_belong_to_two_parts_are_refused(tmp_path):
    old = dict(np.load(as_npz(tmp_path)))
    number = len(old["train_labels"])
    test = {"test_images": old["train_images"], "test_labels": old["train_labels"]}
    np.savez(tmp_path / "set.npz", **old, **test, patient=np.arange(number))
    with pytest.raises(DataError, match="call it train_patient or test_patient"):
        open_format("npz", tmp_path / "set.npz")
    np.savez(tmp_path / "set.npz", **old, other=np.array([object()]))
    with pytest.raises(DataError, match="other holds pickled objects"):
        open_format("npz", tmp_path / "set.npz")


# ---- shards


def png(seed):
    return encode(np.random.default_rng(seed).integers(0, 256, (1, 8, 8), np.uint8))


def tarball(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.parent


NAMINGS = {
    "plain": ("{:04d}.png", "{:04d}.cls"),
    "in folders": ("./a/{:04d}.png", "./a/{:04d}.cls"),
    "dots in keys": ("scan.v2.{:04d}.png", "scan.v2.{:04d}.cls"),
    "a dot in the first number": ("0.5x_{:04d}.png", "0.5x_{:04d}.cls"),
    "names of fields": ("{:04d}.input.png", "{:04d}.target.cls"),
    "large letters": ("{:04d}.PNG", "{:04d}.cls"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_samples_under_any_name_are_found(tmp_path, naming):
    """New samples, too: the output of an export is read again, and grows by as many."""
    image, label = NAMINGS[naming]
    members = [
        pair
        for number in range(8)
        for pair in ((image.format(number), png(number)), (label.format(number), b"01"[number > 5 :][:1]))
    ]
    tarball(tmp_path / "in" / "a.tar", *members)
    data = open_format("webdataset", tmp_path / "in")
    assert [entry.label for entry in data.entries()] == [0] * 6 + [1] * 2
    assert [data.read(entry) for entry in data.entries()] == [png(number) for number in range(8)]
    assert export_dataset(data, Rotation(30), tmp_path / "out", SETTINGS).after == (6, 6)
    again = open_format("webdataset", tmp_path / "out")
    assert np.bincount([entry.label for entry in again.entries()]).tolist() == [6, 6]


def test_no_sample_of_a_shard_vanishes(tmp_path):
    names = ["1.png", "2.png", "5.left.png", "5.right.png", "6.png", "6.mask.png", "8.png"]
    images = [(name, png(number)) for number, name in enumerate(names)]
    labels = [(f"{key}.cls", b"01"[key == 3 :][:1]) for key in (1, 3, 4, 5)]
    other = [("4.heic", b"x"), ("6.json", b'{"label": 1, "age": 70}'), ("8.json", b'{"width": 3}')]
    members = sorted(images + labels + other, key=lambda member: member[0][0])
    members += [("._1.png", b"\0\5\x16\7"), ("__MACOSX/7.png", b"\0\5")]
    tarball(tmp_path / "in" / "a.tar", *members)
    entries = {entry.key: entry for entry in open_format("webdataset", tmp_path / "in").entries()}
    fates = {key: (entry.label, entry.ignored or entry.problem) for key, entry in entries.items()}
    assert fates == {
        "a.tar/1": (0, ""),
        "a.tar/2": (-1, "has no label"),
        "a.tar/3": (1, "has no image"),
        "a.tar/4": (0, ".heic pictures are not read; convert it to PNG or JPEG"),
        "a.tar/5": (0, "2 images in one sample (5.left.png, 5.right.png)"),
        "a.tar/6": (1, ""),
        "a.tar/8": (-1, "has no label"),
    }
    export_dataset(open_format("webdataset", tmp_path / "in"), Rotation(30), tmp_path / "out", SETTINGS)
    summary = rows_of(tmp_path / "out", kind="original")
    assert {row["source"]: row["status"] for row in summary} == {
        "a.tar/1": "kept", "a.tar/2": "ignored", "a.tar/3": "ignored", "a.tar/4": "unusable", "a.tar/5": "unusable",
        "a.tar/6": "kept", "a.tar/8": "ignored"}  # fmt: skip


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["train-000.tar", "test-000.tar", "Val_1.tar"], {"train": 1, "test": 1, "Val": 1}),
        (["part-0.tar", "part-1.tar", "eval.tar"], {"train": 2, "eval": 1}),
        (["train/0.tar", "valid/0.tar"], {"train": 1, "valid": 1}),
        (["test-0.tar", "test-1.tar"], {"train": 2}),
        (["imagenet-train-0.tar", "augmented-b0-0.tar"], {"train": 2}),
    ],
)
def test_shards_of_other_parts_are_not_augmented(tmp_path, names, parts):
    for number, name in enumerate(names):
        members = [(f"{row}.{kind}", content) for row in range(3)
                   for kind, content in (("png", png(10 * number + row)), ("cls", b"001"[row : row + 1]))]  # fmt: skip
        tarball(tmp_path / "in" / name, *members)
    data = open_format("webdataset", tmp_path / "in")
    assert Counter(entry.part for entry in data.entries()) == {part: 3 * count for part, count in parts.items()}
    export_dataset(data, Rotation(30), tmp_path / "out", SETTINGS)
    grown = rows_of(tmp_path / "out", kind="generated", status="kept")
    assert {row["source"].rpartition("/")[0] for row in grown} <= {
        entry.location[0] for entry in data.entries() if entry.part == "train"
    }
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes() for name in names)
    export_dataset(data, Rotation(30), tmp_path / "out", SETTINGS, resume=True)  # done, and taken to be


REFUSED = {
    "packed ones": ([("a.tar", [("1.png", png(1)), ("1.cls", b"0")]), ("b.tar.gz", [])], "packed shards (b.tar.gz)"),
    "two parts without training": ([("test.tar", []), ("val.tar", [])], "none for training"),
    "several labels": ([("a.tar", [("1.png", png(1)), ("1.json", b'{"label": [1, 2]}')])], "holds several labels"),
    "a long label": ([("a.tar", [("1.png", png(1)), ("1.cls", bytes(2 << 20))])], "is no label"),
    "no label at all": ([("a.tar", [("1.png", png(1))])], "no sample has an image and a label"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_shards_that_cannot_be_read_right_are_refused(tmp_path, kind):
    shards, words = REFUSED[kind]
    for name, members in shards:
        tarball(tmp_path / name, *members)
    with pytest.raises(DataError, match=re.escape(words)):
        open_format("webdataset", tmp_path)


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
@pytest.mark.parametrize(("name", "reason"), [("2.png", "sparse"), ("2.cls", "is no label")])
def test_a_sparse_member_of_many_gigabytes_is_not_unpacked(tmp_path, name, reason):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        (tmp_path / f"{number}.cls").write_text("0")
    os.truncate(tmp_path / name, 40 << 30)
    names = ["1.png", "1.cls", "2.png", "2.cls"]
    subprocess.run(["tar", "-S", "-C", tmp_path, "-cf", tmp_path / "a.tar", *names], check=True)
    assert (tmp_path / "a.tar").stat().st_size < 100_000
    if name == "2.cls":
        with pytest.raises(DataError, match=reason):
            open_format("webdataset", tmp_path / "a.tar")
    else:
        problems = [entry.problem for entry in open_format("webdataset", tmp_path / "a.tar").entries()]
        assert problems[0] == ""
        assert reason in problems[1]


def test_a_shard_that_is_damaged_in_the_middle_is_refused(tmp_path):
    """Its samples behind that place would vanish: a damaged header looks like the end of the file."""
    members = [
        (f"{number}.{kind}", content) for number in range(9) for kind, content in (("png", png(number)), ("cls", b"0"))
    ]
    tarball(tmp_path / "a.tar", *members)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    place = content.index(b"4.png\0")
    content[place + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=f"damaged at byte {place}, and what follows would be lost"):
        open_format("webdataset", tmp_path)


# ---- names


def test_names_that_an_export_needs_itself_are_refused(tmp_path):
    as_folder(tmp_path / "in")
    (tmp_path / "in" / "two").rename(tmp_path / "in" / "preview.html")
    with pytest.raises(DataError, match=r"writes a file called preview\.html"):
        export_dataset(open_format("folder", tmp_path / "in"), Rotation(30), tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a" * 251, "é" * 125 + "a", "猫" * 83 + "aa"])
def test_names_of_255_bytes(tmp_path, name):
    root = as_folder(tmp_path / "in")
    (root / "two" / f"{name}.png").write_bytes(png(0))
    assert len(os.fsencode(f"{name}.png")) == 255
    summary = export_dataset(open_format("folder", root), Rotation(30), tmp_path / "out", SETTINGS)
    assert summary.after == (20, 20, 20)
    assert (tmp_path / "out" / "two" / f"{name}.png").read_bytes() == png(0)
    made = rows_of(tmp_path / "out", source=f"two/{name}.png", kind="generated", status="kept")
    assert all((tmp_path / "out" / row["file"]).is_file() for row in made)
    assert made


# ---- where is written, and how much


@pytest.mark.parametrize("place", ["two", ".gen_invariance", ".gen_invariance/units", ".gen_invariance/lock"])
def test_nothing_is_written_through_links_in_an_output(tmp_path, place, monkeypatch):
    data = open_format("folder", as_folder(tmp_path / "in"))
    with monkeypatch.context() as patch:
        patch.setattr("gen_invariance.export.runner.write_preview", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_dataset(data, Rotation(30), tmp_path / "out", SETTINGS)
    link, victim = tmp_path / "out" / place, tmp_path / "victim"
    link.rename(victim) if link.exists() else victim.write_text("mine")
    link.symlink_to(victim)
    before = tree(victim) if victim.is_dir() else victim.read_bytes()
    with pytest.raises(OutputError, match="is a link, and an export writes nothing through links"):
        export_dataset(data, Rotation(30), tmp_path / "out", SETTINGS, resume=True)
    assert (tree(victim) if victim.is_dir() else victim.read_bytes()) == before


def test_a_strip_of_pixels_is_not_enlarged_without_bound(tmp_path):
    """A PNG of 500 bytes would be a picture of 51 million pixels at the size that the translator works at."""
    root = as_folder(tmp_path / "in")
    (root / "two" / "strip.png").write_bytes(encode(np.zeros((1, 200_000, 1), np.uint8)))
    settings = ExportSettings(target="max", image_size=16, off_distribution=None)
    export_dataset(open_format("folder", root), build_small(), tmp_path / "out", settings)
    reasons = {row["reason"] for row in rows_of(tmp_path / "out", source="two/strip.png", kind="generated")}
    assert reasons == {"cannot be translated (1x200000 pixels would be translated at 16x3200000; crop it)"}
