"""Runs of another kind, damaged ones and those that are there already end in one line that names them, exit code 2."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from test_cli_bad_data import arrays
from test_cli_bad_settings import FIT, TRAIN, one_line, refused

from gen_invariance.cli.main import run


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "fit"
    assert run([*FIT, f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "train"
    assert run([*TRAIN, f"out={out}"]) == 0
    return out


# ---- translators


def bare(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def config_is_text(folder):
    (folder / "translator" / "config.json").write_text("{not json")


def config_is_list(folder):
    (folder / "translator" / "config.json").write_text("[1, 2]")


def other_class(folder):
    (folder / "translator" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))


def other_shape(folder):
    path = folder / "translator" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"operations": ["rotation"]}))


def truncated_weights(folder):
    (weights,) = (folder / "translator").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-3])


def no_weights(folder):
    for weights in (folder / "translator").glob("*.safetensors"):
        weights.unlink()


@pytest.mark.parametrize(
    "damage", [bare, config_is_text, config_is_list, other_class, other_shape, truncated_weights, no_weights]
)
@pytest.mark.parametrize("verb", ["train", "measure"])
def test_damaged_translator(damage, verb, fitted, trained, tmp_path, capsys):
    copy, out = tmp_path / "fit", tmp_path / "out"
    shutil.copytree(fitted, copy)
    damage(copy)
    if verb == "train":
        arguments = [*TRAIN, "stage=translator", f"stage.translator={copy}", f"out={out}"]
    else:
        arguments = ["measure", f"run={trained}", "nuisance=translator", f"translator={copy}"]
    assert str(copy) in refused(arguments, capsys)
    assert not out.exists()


def test_run_of_another_kind(fitted, trained, tmp_path, capsys):
    out = tmp_path / "out"
    line = refused([*TRAIN, "stage=translator", f"stage.translator={trained}", f"out={out}"], capsys)
    assert str(trained) in line
    assert "fit wrote" in line
    line = refused(["measure", f"run={fitted}"], capsys)
    assert "'fit' run" in line
    assert "train wrote" in line
    assert not out.exists()


def test_translator_of_other_channels(fitted, tmp_path, capsys):
    out, shape = tmp_path / "out", (30, 16, 16, 3)
    munit = tmp_path / "munit"
    tiny = ["translator=munit_small", "translator.network={width: 4, residual_blocks: 1}"]
    assert run([*FIT, *tiny, "translator.objective.discriminator_layers=1", f"out={munit}"]) == 0
    colours = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "rgb.npz", **arrays() | {"train_images": colours, "test_images": colours[:12]})
    chosen = ["data=npz", f"data.path={tmp_path / 'rgb.npz'}", "training.epochs=2"]
    line = refused(["train", *chosen, "stage=translator", f"stage.translator={munit}", f"out={out}"], capsys)
    assert "1 channel(s)" in line
    assert not out.exists()
    plain = tmp_path / "plain"
    assert run(["train", *chosen, f"out={plain}"]) == 0
    assert "1 channel(s)" in refused(["measure", f"run={plain}", "nuisance=translator", f"translator={munit}"], capsys)


# ---- runs, and what measure and report are told of them


def run_json_is_text(folder):
    (folder / "run.json").write_text("{")


def run_json_is_bare(folder):
    (folder / "run.json").write_text(json.dumps({"kind": "train"}))


def run_json_lacks_data(folder):
    about = json.loads((folder / "run.json").read_text())
    del about["config"]["data"]
    (folder / "run.json").write_text(json.dumps(about))


def run_json_from_elsewhere(folder):
    about = json.loads((folder / "run.json").read_text())
    about["config"]["data"]["colour"] = "red"
    (folder / "run.json").write_text(json.dumps(about))


def no_checkpoint(folder):
    shutil.rmtree(folder / "checkpoints")


def flipped_bit(folder):
    for file in (folder / "checkpoints").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def truncated_checkpoint(folder):
    for file in (folder / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-10])


def foreign_checkpoint(folder):
    for file in (folder / "checkpoints").iterdir():
        torch.save({"model": {}}, file)


@pytest.mark.parametrize(
    "damage",
    [
        *(bare, run_json_is_text, run_json_is_bare, run_json_lacks_data, run_json_from_elsewhere),
        *(no_checkpoint, flipped_bit, truncated_checkpoint, foreign_checkpoint),
    ],
)
def test_damaged_run(damage, trained, tmp_path, capsys):
    copy = tmp_path / "train"
    shutil.copytree(trained, copy)
    damage(copy)
    capsys.readouterr()
    assert run(["measure", f"run={copy}", "draws=1"]) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert str(copy) in one_line(last)
    # A damaged checkpoint is named, too, before it is passed over.
    assert all(line.startswith("warning: ") for line in before)
    assert bool(before) == (damage in (flipped_bit, truncated_checkpoint, foreign_checkpoint))
    assert not (copy / "measures").exists()


def test_bad_measure_settings(trained, capsys):
    for setting, word in (
        ("split=tset", "tset"),
        ("split=validation", "validation_fraction"),
        ("nuisance=wind", "wind"),
        ("nuisance=translator", "translator=FOLDER"),
        ("draws=0", "draws"),
        ("batch_size=0", "batch_size"),
        ("nuisance=../../x", "x"),
    ):
        assert word in refused(["measure", f"run={trained}", setting], capsys)
    assert "nowhere" in refused(["measure", f"run={trained}/nowhere"], capsys)
    assert not (trained / "measures").exists()


def test_bad_report_settings(trained, tmp_path, capsys):
    out, measured = tmp_path / "out", tmp_path / "measured"
    assert "nowhere" in refused(["report", f"records={tmp_path / 'nowhere'}", f"out={out}"], capsys)
    assert "measure run=" in refused(["report", f"records={trained}", f"out={out}"], capsys)
    shutil.copytree(trained, measured)
    assert run(["measure", f"run={measured}", "draws=1"]) == 0
    assert "plain" in refused(["report", f"records={measured}", "baseline=plain", f"out={out}"], capsys)
    assert not out.exists()
    for file in (measured / "records").iterdir():
        file.write_text("not a record\n")
    capsys.readouterr()
    assert run(["report", f"records={measured}", f"out={out}"]) == 2
    warning, last = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert "damaged" in warning
    assert "measured" in one_line(last)
    assert not out.exists()


# ---- a run in the output folder


def snapshot(folder):
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_out_with_a_run(fitted, capsys):
    before = snapshot(fitted)
    assert "resume=true" in refused([*FIT, f"out={fitted}"], capsys)
    assert "settings differ" in refused([*FIT, f"out={fitted}", "resume=true", "fit.batch_size=9"], capsys)
    assert "seed" in refused([*FIT, f"out={fitted}", "resume=true", "seed=1"], capsys)
    assert "'fit' run" in refused([*TRAIN, f"out={fitted}", "resume=true"], capsys)
    assert snapshot(fitted) == before
