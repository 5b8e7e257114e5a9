"""Every kind of bad file, folder and argument through the real command: one line, its exit code, nothing lost.

`tests/stress/bad_input.py` prints what the command says to each of them (docs/results/augment/bad-input.md).
"""

import gzip
import io
import json
import os
import shutil
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gen_invariance import SpatialTranslator
from gen_invariance.cli.main import run


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    return make_translator(tmp_path_factory.mktemp("translator") / "t")


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


def make_translator(folder):
    SpatialTranslator(1, start=0.3).save_pretrained(folder)
    return folder


def make_photos(root):
    for name, count in (("cat", 6), ("dog", 2)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 255, (12, 12), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def command(capsys, *words):
    capsys.readouterr()
    code = run(["augment", "progress=false", "off_distribution=null", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


SETTINGS = {
    "no translator": ([], "translator=FOLDER"),
    "translator and fit": (["translator=T", "fit=true"], "one of translator"),
    "missing translator": (["translator=/no/where"], "no translator in /no/where"),
    "translator is no translator": (["translator=DATA"], "no translator in"),
    "misspelt key": (["translator=T", "targt=max"], "did you mean target"),
    "target of words": (["translator=T", "target=mean"], "target must be median, max"),
    "target zero": (["translator=T", "target=0"], "target must be"),
    "ratio above 1": (["translator=T", "target=1.5"], "target must be"),
    "originals": (["translator=T", "originals=move"], "copy, link, reference"),
    "no processes": (["translator=T", "processes=0"], "processes must be"),
    "broken processes": (["translator=T", "processes=two"], "processes"),
    "near_copy": (["translator=T", "near_copy=2"], "near_copy must be in [0, 1]"),
    "batch of none": (["translator=T", "batch_size=0"], "batch_size must be"),
    "size of none": (["translator=T", "data.image_size=0"], "image_size must be"),
    "digits have no files": (["translator=T", "data=digits"], "augment cannot read data=digits"),
    "a profile": (["translator=T", "data.profile=exponential"], "takes the data as they are"),
    "no classifier there": (["translator=T", "classifier=/no/where"], "/no/where"),
    "device": (["translator=T", "device=tpu"], "device must be"),
    "engine": (["translator=T", "engine=spark"], "engine must be one of local, ray"),
    "strength of words": (["translator=T", "strength=weak"], "strength must be auto or a number"),
    "strength above 1": (["translator=T", "strength=2"], "strength must be auto or a number in (0, 1], got 2.0"),
    "force of words": (["translator=T", "force=maybe"], "force must be true or false"),
    "off_distribution": (["translator=T", "off_distribution=-1"], "off_distribution must be at least 0"),
    "nothing per source": (["translator=T", "per_source=0"], "per_source must be"),
    "fractional size": (["translator=T", "data.image_size=12.5"], "image_size"),
    "unknown learner": (["fit=true", "data.image_size=12", "learn.translator=gan"], "no translator 'gan'; choose auto"),
    "learner that chooses": (
        ["fit=true", "data.image_size=12", "learn.translator=auto"],
        "learn.translator=auto is not for augment",
    ),
    "learning nothing": (["fit=true", "data.image_size=12", "learn.steps=0"], "learn.steps must be at least 1"),
    "no head class": (
        ["fit=true", "data.image_size=12"],
        "no class has 20 images or more (largest: 6); lower learn.head_from or set learn.classes=all",
    ),
    "no head class for spatial": (
        ["fit=true", "data.image_size=12", "learn.translator=spatial"],
        "lower learn.head_from or set learn.classes=all",
    ),
    "an option that the learner lacks": (
        ["fit=true", "data.image_size=12", "learn.classes=all", "learn.network_options={widht: 3}"],
        "learn.network_options has no option 'widht'",
    ),
    "an option out of its range": (
        ["fit=true", "data.image_size=12", "learn.classes=all", "learn.objective_options={learning_rate: 0}"],
        "learn.objective_options.learning_rate must be positive",
    ),
}


def filled_in(words, translator, photos):
    return [word.replace("=T", f"={translator}").replace("=DATA", f"={photos}") for word in words]


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_settings(name, photos, translator, tmp_path, capsys):
    words, text = SETTINGS[name]
    words = filled_in(words, translator, photos)
    before = tree(photos)
    code, out, err = command(capsys, f"data.path={photos}", f"out={tmp_path / 'out'}", *words)
    assert code == 2
    assert len(err) == 1, err
    assert text in err[0]
    assert not out
    assert tree(photos) == before
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-translator").exists()  # or the next try would be refused


def hugging_face(path):
    path.mkdir()
    (path / "dataset_info.json").write_text("{}")


def tarball(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def half(path, source):
    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])


def save_npz(path, **arrays):
    np.savez(path, **arrays)


def png():
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


INPUTS = {
    "nothing there": ("folder", lambda p: None, "does not exist"),
    "a file": ("folder", lambda p: p.write_text("x"), "is a file, not a folder"),
    "empty folder": ("folder", lambda p: p.mkdir(), "has no sub-folders"),
    "empty classes": ("folder", lambda p: (p / "cat").mkdir(parents=True), "no file in a class"),
    "datasets folder": ("folder", hugging_face, "Hugging Face data set"),
    "tar folder": ("folder", lambda p: (p.mkdir(), tarball(p / "a.tar")), "use data=webdataset"),
    "no table": ("table", lambda p: None, "does not exist"),
    "wrong ending": ("table", lambda p: p.write_text("path,label\n"), "must end in .csv"),
    "no such column": (
        "table.csv",
        lambda p: p.write_text("file,label\na.png,1\n"),
        "no column 'path' (it has 'file', 'label'); name the columns with path_column=... label_column=",
    ),
    "no label": ("table.csv", lambda p: p.write_text("path,label\na.png,cat\nb.png,\n"), "row 2 has no label"),
    "no rows": ("table.csv", lambda p: p.write_text("path,label\n"), "has no rows"),
    "empty table": ("table.csv", lambda p: p.write_text(""), "cannot be read as a table"),
    "torn table": ("table.csv", lambda p: p.write_text('path,label\n"a.png,cat\n'), "cannot be read as a table"),
    "torn JSON": ("table.jsonl", lambda p: p.write_text('{"path": "a.png", "label"'), "cannot be read as a table"),
    "JSON of numbers": ("table.jsonl", lambda p: p.write_text("1\n2\n"), "in.jsonl"),
    "no parquet": ("table.parquet", lambda p: p.write_bytes(b"PAR1junk"), "cannot be read as a table"),
    "nested": (
        "table.parquet",
        lambda p: pd.DataFrame({"path": [{"bytes": b"x"}], "label": [1]}).to_parquet(p),
        "nested values",
    ),
    "files that are not there": (
        "table.csv",
        lambda p: p.write_text("path,label\na.png,cat\nb.png,cat\n"),
        "no image that can be used; the first of 2 files, a.png: cannot be read (No such file",
    ),
    "no npz": ("npz", lambda p: p.write_bytes(b"junk"), "no .npz file"),
    "npz without labels": ("npz", lambda p: save_npz(p, train_images=np.zeros((2, 8, 8), np.uint8)), "train_labels"),
    "no shards": ("webdataset", lambda p: p.mkdir(), "holds no .tar shard"),
    "no shard file": ("webdataset", lambda p: None, "does not exist"),
    "packed shard": (
        "webdataset",
        lambda p: (p.mkdir(), (p / "a.tar.gz").write_bytes(gzip.compress(b""))),
        "must be unpacked",
    ),
    "shard of junk": ("webdataset", lambda p: (p.mkdir(), (p / "a.tar").write_bytes(b"junk" * 300)), "no plain tar"),
    "no labels": ("webdataset", lambda p: (p.mkdir(), tarball(p / "a.tar", ("a.png", png()))), "an image and a label"),
    "label of bytes": (
        "webdataset",
        lambda p: (p.mkdir(), tarball(p / "a.tar", ("a.png", png()), ("a.cls", b"\xff\xfe"))),
        "is no label",
    ),
}


def place_of(kind, folder):
    form, _, suffix = kind.partition(".")
    return form, folder / ("in.npz" if form == "npz" else f"in.{suffix}" if suffix else "in")


@pytest.mark.parametrize("name", INPUTS)
def test_wrong_inputs(name, translator, tmp_path, capsys):
    kind, make, text = INPUTS[name]
    form, path = place_of(kind, tmp_path)
    make(path)
    words = [f"data={form}", f"data.path={path}", f"out={tmp_path / 'out'}", f"translator={translator}"]
    code, out, err = command(capsys, *words)
    assert code == 2
    assert len(err) == 1, err
    assert text in err[0]
    assert str(path) in err[0] or name == "label of bytes"
    assert not out


OUTPUTS = {
    "in the data": (lambda photos: photos / "more", "lies in the data"),
    "the data": (lambda photos: photos, "lies in the data"),
    "around the data": (lambda photos: photos.parent, "holds the data"),
    "a link to the data": (lambda photos: link(photos), "lies in the data"),
    "foreign files": (lambda photos: foreign(photos), "holds no export (found 'mine.txt')"),
    "a file": (lambda photos: foreign(photos) / "mine.txt", "mine.txt"),
    "a damaged export": (lambda photos: damaged(photos), "is damaged"),
}


def link(photos):
    (photos.parent / "link").symlink_to(photos)
    return photos.parent / "link"


def foreign(photos):
    (photos.parent / "other").mkdir()
    (photos.parent / "other" / "mine.txt").write_text("precious")
    return photos.parent / "other"


def damaged(photos):
    (photos.parent / "other").mkdir()
    (photos.parent / "other" / ".gen_invariance.json").write_text("{")
    return photos.parent / "other"


@pytest.mark.parametrize("name", OUTPUTS)
def test_wrong_outputs(name, photos, translator, capsys):
    make, text = OUTPUTS[name]
    out = make(photos)
    before = tree(photos.parent)
    words = [f"data.path={photos}", f"out={out}", f"translator={translator}", "resume=true"]
    code, _, err = command(capsys, *words)
    assert code == 2
    assert len(err) == 1, err
    assert text in err[0]
    assert tree(photos.parent) == before


def bomb(path):
    content = bytearray(png())
    content[16:24] = (60000).to_bytes(4, "big") * 2  # width and height
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def animated(path):
    frames = [Image.new("L", (8, 8), level) for level in (0, 99)]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])


def pages(path, suffix):
    first, second = (Image.new("L", (8, 8), level) for level in (0, 99))
    first.save(path.with_suffix(suffix), save_all=True, append_images=[second])


def wide_grey(path):
    pixels = np.full((8, 8), 1 << 20, np.int32)
    Image.fromarray(pixels, "I").save(path.with_suffix(".tif"))


def lab(path):
    Image.new("LAB", (8, 8)).save(path.with_suffix(".tif"))


FILES = {
    "animated png": lambda p: pages(p, ".png"),
    "animated webp": lambda p: pages(p, ".webp"),
    "pages of a tiff": lambda p: pages(p, ".tif"),
    "grey of 32 bits": wide_grey,
    "Lab colours": lab,
    "heif in a jpg": lambda p: p.with_suffix(".jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64)),
    "svg": lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("hello"),
    "cut off": lambda p: half(p, p.parent / "0.png"),
    "only a header": lambda p: p.write_bytes(png()[:40]),
    "bomb": bomb,
    "animated": animated,
    "a pipe": os.mkfifo,
    "a dangling link": lambda p: p.symlink_to("nowhere"),
    "a link to itself": lambda p: p.symlink_to(p.name),
    "floating point": lambda p: Image.new("F", (8, 8), 0.5).save(p.with_suffix(".tif")),
    "colour for a grey translator": lambda p: Image.new("RGB", (12, 12), "red").save(p),
    "html": lambda p: p.with_suffix(".jpg").write_text("<html>404</html>"),
    "numpy": lambda p: np.save(p.open("wb"), np.zeros((8, 8), np.uint8)),
}


REASONS = {
    "animated": "2 pictures in one file",
    "pages of a tiff": "2 pictures in one file",
    "grey of 32 bits": "grey pixels of more than 16 bits",
    "empty": "empty file",
    "text": "not an image of a known format",
    "cut off": "truncated",
    "bomb": "more than 178956970 pixels",
    "a pipe": "not a regular file",
    "a dangling link": "No such file",
    "floating point": "floating-point pixels",
    "colour for a grey translator": "colour picture, but the translator takes grey ones",
}
"""What is said of some of them."""


def test_bad_files_are_listed_and_the_rest_is_written(photos, translator, tmp_path, capsys):
    stems = {name: f"bad-{number}" for number, name in enumerate(FILES)}
    for name, stem in stems.items():
        FILES[name](photos / "dog" / f"{stem}.png")
    words = [f"data.path={photos}", f"out={tmp_path / 'out'}", f"translator={translator}", "target=max"]
    code, out, err = command(capsys, *words)
    assert code == 1
    assert len(err) == 1, err
    assert f"{len(FILES)} images could not be used and are not in" in err[0]
    assert out.count("NOT USABLE: dog/bad-") == 10
    assert f"NOT USABLE: {len(FILES) - 10} more, see the manifest" in out
    assert "dog: 2 -> 6" in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert sum(row["status"] == "kept" for row in rows) == 12
    reasons = {Path(row["source"]).stem: row["reason"] for row in rows if row["status"] == "unusable"}
    assert set(reasons) == set(stems.values())
    for name, stem in stems.items():
        assert REASONS.get(name, "") in reasons[stem], name


def test_one_bad_file_is_named(photos, translator, tmp_path, capsys):
    FILES["bomb"](photos / "dog" / "bad.png")
    code, out, err = command(capsys, f"data.path={photos}", f"out={tmp_path / 'out'}", f"translator={translator}")
    assert code == 1
    assert "1 image could not be used and is not in" in err[0]
    assert f"the first is dog/bad.png: {REASONS['bomb']}" in err[0]
    assert "NOT USABLE: dog/bad.png" in out


def test_a_good_run_then_the_same_again(photos, translator, tmp_path, capsys):
    words = [f"data.path={photos}", f"out={tmp_path / 'out'}", f"translator={translator}", "target=max"]
    code, out, err = command(capsys, *words)
    assert (code, err) == (0, [])
    assert "8 originals, 4 new images" in out
    code, _, err = command(capsys, *words)
    assert code == 2
    assert "add resume=true" in err[0]
    assert command(capsys, *words, "resume=true")[0] == 0
    shutil.rmtree(photos / "dog")
    code, _, err = command(capsys, *words, "resume=true")
    assert code == 2
    assert "data (images were added, removed or renamed)" in err[0]


def test_bad_images_in_shards_are_said_to_be_in_the_output(translator, tmp_path, capsys):
    """Shards are copied whole, so what cannot be used comes along; by reference nothing does."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12), np.uint8)).save(buffer, "PNG")
    contents = {"a": buffer.getvalue(), "b": buffer.getvalue(), "c": buffer.getvalue(), "d": b"no image"}
    members = [
        (f"{key}.{ending}", content)
        for (key, image), label in zip(contents.items(), b"0010", strict=True)
        for ending, content in (("png", image), ("cls", bytes([label])))
    ]
    (tmp_path / "shards").mkdir()
    tarball(tmp_path / "shards" / "one.tar", *members)
    words = ["data=webdataset", f"data.path={tmp_path / 'shards'}", f"translator={translator}", "target=max"]
    code, out, err = command(capsys, *words, f"out={tmp_path / 'out'}", "near_copy=0")
    assert code == 1
    assert "3 originals, 1 new image, 0 results rejected" in out
    assert f"1 image could not be used and has no new ones, but came into {tmp_path / 'out'} with the shards" in err[0]
    with tarfile.open(tmp_path / "out" / "one.tar") as tar:
        assert tar.extractfile("d.png").read() == b"no image"
    code, _, err = command(capsys, *words, f"out={tmp_path / 'named'}", "near_copy=0", "originals=reference")
    assert code == 1
    assert f"1 image could not be used and is not in {tmp_path / 'named'}" in err[0]
    assert not (tmp_path / "named" / "one.tar").exists()


def test_an_image_that_is_lacking(photos, translator, tmp_path, capsys):
    words = [f"data.path={photos}", f"out={tmp_path / 'out'}", f"translator={translator}"]
    code, out, _ = command(capsys, *words, "target=3", "near_copy=1", "tries=1")
    assert code == 0
    assert "8 originals, 0 new images, 1 result rejected" in out
    assert "class 'dog' lacks 1 image to the target" in out


LEARNERS = {
    "redraw": ("RedrawTranslator", ["learn.network_options={parts: [tone]}"]),  # noise shows nothing by itself
    "pose": ("PoseTranslator", []),
    "spatial": ("SpatialTranslator", ["learn.network_options={operations: [gain]}"]),
    "flow_stroke": ("FlowTranslator", ["learn.network_options={width: 8}"]),
    "munit_small": ("MunitTranslator", ["learn.network_options={width: 4}"]),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_fitting_any_translator_first(name, photos, tmp_path, capsys):
    kind, more = LEARNERS[name]
    words = ["fit=true", "data.image_size=16", "learn.classes=all", "learn.steps=2", "learn.batch_size=4"]
    words += [f"learn.translator={name}", *more, f"data.path={photos}", f"out={tmp_path / 'out'}", "near_copy=0"]
    words.append("results=square")  # after two steps some change shapes, which is not brought to another size
    code, out, err = command(capsys, *words, "target=max")
    assert (code, err) == (0, [])
    assert "8 originals, 4 new images" in out
    config = json.loads((tmp_path / "out-translator" / "translator" / "config.json").read_text())
    assert config["_class_name"] == kind
    if name == "flow_stroke":  # the file's own setting, and the user's over another
        assert (config["removes"], config["width"]) == (["tone", "sign", "thickness"], 8)
    if name == "spatial":
        assert config["operations"] == ["gain"]


def test_fitting_first(photos, tmp_path, capsys):
    words = ["fit=true", "data.image_size=12", "learn.classes=all", "learn.steps=3", "learn.batch_size=4"]
    words += [f"data.path={photos}", f"out={tmp_path / 'out'}", "target=max", "near_copy=0"]
    words.append("learn.network_options={parts: [tone]}")  # noise shows nothing by itself
    code, out, err = command(capsys, *words)
    assert (code, err) == (0, [])
    assert "8 originals, 4 new images" in out
    assert (tmp_path / "out-translator" / "translator" / "config.json").is_file()
    assert command(capsys, *words, "resume=true")[0] == 0
