"""`predict`, `load_classifier` and the page of mistakes, on a folder of colours that a classifier tells apart."""

import csv
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from gen_invariance import load_classifier
from gen_invariance.cli.main import run
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.experiment.evaluate import open_run
from gen_invariance.experiment.trained import trained_prior
from gen_invariance.measure.calibration import adjust_to_prior

COLOURS = {"=red": (220, 30, 30), "blue": (30, 30, 220), "class": (30, 200, 30)}
COUNTS = {"=red": 12, "blue": 8, "class": 3}


def paint(path, colour, seed, size=(20, 12)):
    rng = np.random.default_rng(seed)
    pixels = np.array(colour) + rng.normal(0, 12, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for name, count in COUNTS.items():
        for number in range(count):
            paint(root / "train" / name / f"{number}.png", COLOURS[name], number)
        for number in range(3):
            paint(root / "test" / name / f"{number}.png", COLOURS[name], 100 + number)
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    words = ["data=folder", f"data.path={photos}", "data.image_size=8", "training.epochs=6", "training.batch_size=8"]
    assert run(["train", *words, "training.sampling=class_balanced", "progress=false", f"out={out}"]) == 0
    return out


def rows_of(path):
    """Rows of a CSV file; what a spreadsheet would take for a formula has an apostrophe in front."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: value.removeprefix("'") for key, value in row.items()} for row in csv.DictReader(file)]


def test_answers_are_those_of_the_opened_run(photos, trained, tmp_path, capsys):
    out = tmp_path / "p.csv"
    words = [f"run={trained}", f"data.path={photos / 'test'}", f"out={out}", "progress=false"]
    assert run(["predict", *words, "probabilities=true", "page=true"]) == 0
    model, prepared, *_ = open_run(trained)
    with torch.no_grad():
        expected = model(prepared.test.float_images()).softmax(1)
    rows = rows_of(out)
    assert [row["path"] for row in rows] == [f"{name}/{n}.png" for name in sorted(COLOURS) for n in range(3)]
    names = sorted(COLOURS)
    found = torch.tensor([[float(row[f"p_{name}"]) for name in names] for row in rows])
    assert torch.allclose(found, expected.float(), atol=1e-5)
    assert [names.index(row["class"]) for row in rows] == expected.argmax(1).tolist()
    accuracy = float((expected.argmax(1) == prepared.test.labels).double().mean())
    assert f"of 9 images in folders named as classes {accuracy:.1%} are right" in capsys.readouterr().out
    page = (tmp_path / "p-mistakes" / "mistakes.html").read_text(encoding="utf-8")
    assert "http" not in page.split("</style>")[1]
    assert "Most confused" in page
    assert sum(int(row["as class"]) for row in rows_of(tmp_path / "p-mistakes" / "confusion.csv")) == sum(
        row["class"] == "class" for row in rows
    )


def test_broken_files_are_left_out_and_named(trained, tmp_path, capsys):
    folder = tmp_path / "new"
    paint(folder / "deep" / "er" / "a.jpg", COLOURS["blue"], 1, size=(31, 17))
    paint(folder / "b.png", COLOURS["=red"], 2)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(40))
    (folder / "raw.heic").write_bytes(b"x")
    (folder / "notes.txt").write_text("not an image")
    out = tmp_path / "p.csv"
    words = ["predict", f"run={trained}", f"data.path={folder}", f"out={out}", "progress=false"]
    assert run(words) == 1
    printed = capsys.readouterr()
    assert "2 files could not be read and have no row" in printed.err
    assert printed.err.count("\n") == 1
    assert [row["path"] for row in rows_of(out)] == ["b.png", "deep/er/a.jpg"]
    assert list(rows_of(out)[0]) == ["path", "class", "probability"]  # nothing says what is right
    assert [row["path"] for row in rows_of(f"{out}.skipped.csv")] == ["raw.heic", "broken.jpg"]
    before = out.read_bytes()
    assert run(words) == 2
    assert "overwrite=true" in capsys.readouterr().err
    (folder / "broken.jpg").unlink(), (folder / "raw.heic").unlink()
    assert run([*words, "overwrite=true"]) == 0
    assert out.read_bytes() == before
    assert not (tmp_path / "p.csv.skipped.csv").exists()


BAD = {
    "ending": (["out={tmp}/p.txt"], "out must end in .csv or .parquet"),
    "prior": (["out={tmp}/p.csv", "prior=even"], "unknown prior 'even'; choose trained, uniform"),
    "class": (["out={tmp}/p.csv", "prior={{zebra: 1}}"], "prior names 'zebra', which is no class"),
    "page": (["out={tmp}/p.csv", "page=true"], "page=true needs images in folders that are named"),
    "empty": (["out={tmp}/p.csv", "data.path={tmp}/empty"], "holds no image"),
    "gone": (["out={tmp}/p.csv", "data.path={tmp}/gone"], "does not exist"),
    "run": (["out={tmp}/p.csv", "run={tmp}"], "is not a run folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, trained, photos, tmp_path, capsys):
    words, expected = BAD[name]
    (tmp_path / "empty").mkdir()
    shutil.copy(photos / "test" / "blue" / "0.png", tmp_path / "one.png")
    given = ["predict", f"run={trained}", f"data.path={tmp_path / 'one.png'}", "progress=false"]
    assert run([*given, *(word.format(tmp=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert not list(tmp_path.glob("p*"))


def test_a_loaded_classifier_needs_no_data(photos, trained, tmp_path):
    copy = tmp_path / "moved"
    shutil.copytree(trained, copy)
    about = json.loads((copy / "run.json").read_text())
    about["config"]["data"]["path"] = "gone"
    (copy / "run.json").write_text(json.dumps(about))
    classifier = load_classifier(copy)
    assert not classifier.model.training
    assert classifier.class_names == tuple(sorted(COLOURS))
    assert classifier.counts.tolist() == [12, 8, 3]
    assert classifier.shape == (3, 8, 8)
    assert classifier.prior.tolist() == pytest.approx([1 / 3] * 3)  # its batches were balanced
    images, pictures = classifier.read([photos / "test" / "blue" / "0.png", tmp_path / "none.png"])
    assert images.shape == (1, 3, 8, 8)
    assert pictures[1].problem.startswith("cannot be read")
    plain, moved = classifier.predict(images), classifier.predict(images, prior={"blue": 1, "class": 3})
    expected = adjust_to_prior(plain, trained=torch.ones(3), deployed=torch.tensor([0.0, 1.0, 3.0]))
    assert torch.allclose(moved, expected)
    with pytest.raises(ShapeError, match="takes 3 channel"):
        classifier.predict(images[:, :1])
    with pytest.raises(SettingsError, match="unknown prior"):
        classifier.predict(images, prior="zipf")


def test_parquet_and_estimated_prior(photos, trained, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    out = tmp_path / "p.parquet"
    words = [f"run={trained}", f"data.path={photos / 'test'}", f"out={out}", "prior=estimate", "progress=false"]
    assert run(["predict", *words]) == 0
    assert "estimated prior: " in capsys.readouterr().out
    assert list(pd.read_parquet(out).columns) == ["path", "class", "probability", "label"]


def test_what_prior_a_training_leads_to():
    counts = torch.tensor([90, 9, 1])
    shares = {
        "plain": ({}, [0.9, 0.09, 0.01]),
        "balanced": ({"training": {"sampling": "progressive"}}, [1 / 3] * 3),
        "loss": ({"classifier": {"loss": "balanced_softmax"}}, [1 / 3] * 3),
        "head": ({"training": {"head_correction": "crt"}}, [1 / 3] * 3),
        "weights": ({"classifier": {"loss_options": {"weights": "inverse"}}}, [1 / 3] * 3),
        "root": ({"training": {"sampling": "square_root"}}, [x / (90**0.5 + 4) for x in (90**0.5, 3, 1)]),
    }
    for config, expected in shares.values():
        assert trained_prior(config, counts).tolist() == pytest.approx(expected)
