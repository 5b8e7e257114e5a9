"""What `tests/stress/fuzz.py` found, as small as it gets: all once ended in a traceback, a hang or worse."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen_invariance.cli.main import run
from gen_invariance.data.readers.arrays import read_npz
from gen_invariance.data.readers.folder import read_image_folder
from gen_invariance.errors import CheckpointError, DataError, first_line
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings
from gen_invariance.files import load_checkpoint, save_checkpoint
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.records import Record, RecordWriter, as_frame, finished_cells, load_records
from gen_invariance.run import Run, named_generator
from gen_invariance.translator.io import load_translator

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


def photos(root, names=("cat", "dog")):
    noise = np.random.default_rng(0)
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(4 - place):
            Image.fromarray(noise.integers(0, 256, (16, 16), np.uint8)).save(root / name / f"{number}.png")
    return root


# ---- names


def test_a_class_that_is_not_utf8_reaches_every_output_of_an_export(tmp_path):
    root = photos(tmp_path / "in", (NOT_UTF8, "dog"))
    (root / "dog" / f"{NOT_UTF8}.png").write_bytes((root / "dog" / "0.png").read_bytes())
    summary = export_dataset(
        open_format("folder", root), Rotation(30), tmp_path / "out", ExportSettings(target=6, off_distribution=None)
    )
    assert summary.after == (6, 6)
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert {row["class"] for row in rows} == {NOT_UTF8, "dog"}
    assert all((tmp_path / "out" / row["file"]).is_file() for row in rows)
    parquet = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert {row["class"] for row in parquet} == {"caf\\udce9", "dog"}
    assert "caf\\udce9" in (tmp_path / "out" / "preview.html").read_text(encoding="utf-8")


def test_records_of_a_class_that_is_not_utf8(tmp_path):
    record = Record(benchmark="b", method="m", seed=0, metric="accuracy", value=0.5, class_name=NOT_UTF8, class_index=0)
    assert as_frame([record])["class_name"].tolist() == ["caf\\udce9"]
    RecordWriter(tmp_path).write_cell([record])
    file = next(tmp_path.iterdir())
    file.write_text(file.read_text().replace("caf\\\\udce9", "caf\\udce9"))  # as another program may have written it
    assert "caf\\udce9" in load_records(tmp_path)["class_name"].tolist()


# ---- records


@pytest.mark.parametrize(
    "change",
    [
        {"class_count": " "}, {"class_index": 1.5}, {"seed": "x"}, {"seed": 10**30}, {"method": [1]}, {"group": {}},
        {"seconds": "long"}, {"value": []}, {"versions": "1"}, {"metric": None}, {"order": "a"},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_of_the_wrong_kind_is_named_and_left_out(change, tmp_path):
    records = [Record(benchmark="b", method="m", seed=0, metric=name, value=0.5) for name in ("accuracy", "ekld")]
    RecordWriter(tmp_path).write_cell(records)
    file = next(tmp_path.iterdir())
    lines = file.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | change)
    file.write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="line 1 is damaged"):
        frame = load_records(tmp_path)
    assert frame["metric"].tolist() == ["ekld", "finished"]
    assert finished_cells(frame) == set()


# ---- checkpoints whose checksum is right and whose contents are not

DATA = ["data=digits_rotation", "data.largest=24", "data.imbalance=4", "data.few_below=8", "data.many_above=16"]
FIT = ["fit", *DATA, "fit.steps=1", "fit.batch_size=2", "translator.objective.discriminator_width=4"]
TRAIN = ["train", *DATA, "training.epochs=1", "training.sampling=instance"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert run([*FIT, f"out={folder / 'fit'}"]) == 0
    assert run([*TRAIN, f"out={folder / 'train'}"]) == 0
    return folder


def one_line(capsys, *, code=2):
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(error) == 1, error
    assert error[0].startswith("gen-invariance: ")
    assert all(letter.isprintable() for letter in error[0])
    return error[0]


ODD = [pytest.param(value, marks=pytest.mark.slow) for value in (None, [], 3, {0: 1})]


@pytest.mark.parametrize("value", ["text", {"": 1}, *ODD], ids=str)
@pytest.mark.parametrize(
    ("kind", "key"), [("train", "model"), ("train", "optimizer"), ("fit", "optimizers"), ("fit", "discriminator")]
)
def test_a_checkpoint_of_something_else(kind, key, value, runs, tmp_path, capsys):
    out = shutil.copytree(runs / kind, tmp_path / "out")
    file = max((out / "checkpoints").iterdir())
    save_checkpoint(file, load_checkpoint(file) | {key: value})
    assert run([*(FIT if kind == "fit" else TRAIN), f"out={out}", "resume=true"]) == 2
    assert "does not fit" in one_line(capsys)
    if key == "model":
        assert run(["measure", f"run={out}", "draws=1"]) == 2
        assert "does not fit" in one_line(capsys)


def test_an_error_without_a_message_has_a_line():
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(KeyError()) == "KeyError"


# ---- command lines


@pytest.mark.parametrize(
    "words",
    [
        ["train", "data=3"], ["fit", "data=0.5"], ["fit", "data=true"], ["demo", "demo=true"], ["fit", "fit=3"],
        ["fit", "translator=[1,2]"], ["order", "order=null"],
        ["fit", "translator.objective=2"], ["fit", "translator.network=[a]"],
        pytest.param(["order", "order.source=3"], marks=pytest.mark.slow), ["inspect", "inspect=x",
        "translator=x"], ["fit", "~data"], ["train", "~seed"], ["augment", "learn=3", "out=x", "fit=true"],
        ["train", "stage.translator=16", "out=x"], ["train", "stage.translator=true", "out=x"],
        ["augment", "classifier=false", "out=x", "translator=x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_settings_of_the_wrong_shape(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(words) == 2
    one_line(capsys)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ---- files that are no files of their kind


def npz_with_header(path, header):
    text = header.encode()
    with zipfile.ZipFile(path, "w") as archive:
        content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)
        archive.writestr("train_images.npy", content)


@pytest.mark.parametrize(
    "header",
    [
        "{" * 3000,
        "[" * 9000,
        "(" * 60000,
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99999, 9999), }",
    ],
    ids=lambda header: header[:20],
)
def test_array_headers_that_are_no_headers(header, tmp_path):
    npz_with_header(tmp_path / "a.npz", header)
    with pytest.raises(DataError, match=r"a\.npz: train_images cannot be read"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("name", [["MunitTranslator"], {"a": 1}, 3, None, True])
def test_a_translator_whose_kind_is_no_name(name, runs, tmp_path):
    folder = shutil.copytree(runs / "fit", tmp_path / "fit") / "translator"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": name}))
    with pytest.raises(CheckpointError, match="not a translator"):
        load_translator(folder)


@pytest.mark.parametrize("file", ["translator/config.json", "quality.json", "run.json"])
def test_json_nested_without_end(file, runs, tmp_path, capsys):
    out = shutil.copytree(runs / "fit", tmp_path / "fit")
    (out / file).write_text("[" * 200_000)
    staged = ["stage=translator", f"stage.translator={out}", f"out={tmp_path / 'out'}"]
    assert run([*FIT, f"out={out}", "resume=true"] if file == "run.json" else [*TRAIN, *staged]) == 2
    assert Path(file).name in one_line(capsys)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)]
)
def test_images_that_are_no_files_do_not_block(make, tmp_path):
    root = photos(tmp_path / "in")
    make(root / "cat" / "odd.png")
    with pytest.raises(DataError, match=r"odd\.png: cannot be read"):
        read_image_folder(root)
    data, report = read_image_folder(root, skip_corrupt=True)
    assert len(data) == 7
    assert [path.name for path, _ in report.skipped] == ["odd.png"]


# ---- every hostile name at once, through every output

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hostile():
    from tests.stress import fuzz_inputs

    return [name for name in fuzz_inputs.NAMES if name not in ("train", "test") and not name.startswith(".")]


def check_pages(folder):
    pages = [path for ending in ("html", "svg", "md") for path in folder.rglob(f"*.{ending}")]
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<script>alert(1)" not in text
        assert "<img src=x" not in text
        assert "\x1b" not in text or page.suffix == ".html"  # a browser does nothing with it, a terminal does


def test_hostile_class_and_file_names_through_an_export(hostile, runs, tmp_path, capsys):
    root, noise = tmp_path / "in", np.random.default_rng(0)
    for number, name in enumerate(hostile):
        (root / name).mkdir(parents=True)
        for place in range(2 + number % 2):
            picture = Image.fromarray(noise.integers(0, 256, (16, 16), np.uint8))
            (root / name / f"{name[:100]}{place}.png").write_bytes(encoded(picture))
    line = ["augment", f"data.path={root}", f"translator={runs / 'fit'}", f"out={tmp_path / 'out'}"]
    assert run([*line, "target=4", "near_copy=0", "off_distribution=null"]) == 0
    told = capsys.readouterr()
    assert all(letter.isprintable() or letter == "\n" for letter in told.out + told.err)
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert {row["class"] for row in rows} == set(hostile)
    assert all((tmp_path / "out" / row["file"]).is_file() for row in rows if row["status"] == "kept")
    assert sum(row["kind"] == "generated" and row["status"] == "kept" for row in rows) > len(hostile)
    check_pages(tmp_path / "out")
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"in", "out"}


def encoded(picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_hostile_class_names_through_a_report(hostile, runs, tmp_path, capsys):
    folder = shutil.copytree(runs / "train", tmp_path / "train")
    assert run(["measure", f"run={folder}", "draws=1"]) == 0
    file = next((folder / "records").iterdir())
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    names = [name for name in hostile if len(name) < 60]
    for turn in range(0, len(names), 10):
        for row in rows:
            if row["class_index"] is not None:
                row["class_name"] = names[(turn + row["class_index"]) % len(names)]
            row["method"] = names[turn]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run(["report", f"records={folder}", f"out={tmp_path / f'report{turn}'}"]) == 0
        check_pages(tmp_path / f"report{turn}")
    assert all(letter.isprintable() or letter == "\n" for letter in capsys.readouterr().out)


# ---- the programs themselves, in short


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words"),
    [("resume", ["kills=4", "only=fit,augment"]), ("fuzz", ["cases=60", "seed=7"]), ("long_run", ["steps=320"])],
)
def test_a_short_form_of_each_program(program, words, tmp_path):
    line = [sys.executable, "-m", f"tests.stress.{program}", *words, f"out={tmp_path / 'out'}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n") >= 3
    assert table in done.stdout or program == "long_run"


def test_a_nul_in_a_path_of_a_table(tmp_path):
    root = photos(tmp_path / "in")
    rows = [f"cat/{number}.png,cat" for number in range(4)] + ["a\0b.png,dog", "dog/0.png,dog"]
    (root / "table.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    settings = ExportSettings(target=4, off_distribution=None)
    summary = export_dataset(open_format("table", root / "table.csv"), Rotation(30), tmp_path / "out", settings)
    assert summary.after == (4, 4)
    assert [reason for _, reason in summary.problems] == ["cannot be read (not a path (embedded null byte))"]


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"step": "3"}', b"[1]", b"3", b'{"step": null}', b"[" * 100_000])
def test_metrics_that_are_none(line, tmp_path):
    made = Run(tmp_path, kind="fit")
    made.log(step=1, loss=0.5)
    made.save(1, {})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    made.log(step=2, loss=0.5)
    assert [row["step"] for row in made.metrics()] == [1, 2]
    assert made.load_latest()["step"] == 1
    assert [row["step"] for row in made.metrics()] == [1]


def test_a_translator_with_a_setting_that_it_does_not_know(runs, tmp_path):
    folder = shutil.copytree(runs / "fit", tmp_path / "fit") / "translator"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"residownsamples": 2}))
    with pytest.raises(CheckpointError, match=r"config\.json has the setting 'residownsamples', which"):
        load_translator(folder)


def test_images_of_one_pixel(tmp_path, capsys):
    np.savez(tmp_path / "data.npz", train_images=np.zeros((8, 1, 1), np.uint8), train_labels=np.arange(8) % 2)
    words = [f"data.path={tmp_path / 'data.npz'}", "data.profile=none", "fit.steps=1", "fit.head_from=1"]
    assert run(["fit", "data=npz", *words, f"out={tmp_path / 'out'}"]) == 2
    assert "fitted on images of 4 x 4 pixels or more, got 1 x 1; set data.image_size" in capsys.readouterr().err


def test_a_member_of_a_shard_whose_name_is_not_utf8(tmp_path):
    """It cannot be read, twice over: as a picture, and as a word that a generator is named by."""
    (tmp_path / "in").mkdir()
    picture = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(picture, "PNG")
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
        for key, label, content in (("a", b"0", picture.getvalue()), ("b", b"0", picture.getvalue()),
                                    (NOT_UTF8, b"1", b"no picture"), ("d", b"1", picture.getvalue())):  # fmt: skip
            for end, data in (("png", content), ("cls", label)):
                member = tarfile.TarInfo(f"{key}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    settings = ExportSettings(target=3, off_distribution=None)
    summary = export_dataset(open_format("webdataset", tmp_path / "in"), Rotation(30), tmp_path / "out", settings)
    assert len(summary.problems) == 1
    assert named_generator(0, NOT_UTF8).initial_seed() != named_generator(0, "caf").initial_seed()
