"""`gen-invariance order` on toy images, through the real command line."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

from gen_invariance.cli.main import compose, run
from gen_invariance.experiment.settings import OrderRun
from gen_invariance.order.relation import SubsetOrder
from gen_invariance.records import finished_cells, load_records, measured
from gen_invariance.settings import get_defaults, read_settings

NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Four noisy patterns, fewer training images of each class than of the one before, twelve for testing."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 50, (4, 8, 8))
    counts = {"train": [16, 14, 12, 10], "test": [12] * 4}
    labels = {part: np.repeat(np.arange(4), count) for part, count in counts.items()}
    arrays = {f"{part}_labels": chosen for part, chosen in labels.items()}
    for part, chosen in labels.items():
        noise = rng.integers(0, 206, (len(chosen), 8, 8))
        arrays[f"{part}_images"] = (patterns[chosen] + noise).astype(np.uint8)
    path = tmp_path_factory.mktemp("toy") / "toy.npz"
    np.savez(path, class_names=np.array(NAMES), **arrays)
    small = ["pool=5", "source.images_per_class=5", "source.epochs=1", "source.batch_size=8", "analysis.resamples=100"]
    small.append("analysis.threshold=0.6")
    return ["order", "data=npz", f"data.path={path}", "device=cpu", *(f"order.{word}" for word in small)]


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """One run: three listed subsets, two seeds, eKLD under rotations of up to 30 degrees."""
    out = tmp_path_factory.mktemp("order") / "run"
    arguments = [*toy, *LISTED, *TURNED, "order.seeds=[0,1]", f"out={out}"]
    assert run(arguments) == 0
    return out, arguments


LISTED = ["order.choose=list", "order.subsets=[[ant,bee],[2,dog],[ant,cat,dog]]"]
TURNED = [
    *("nuisance=rotation", "nuisance_options={degrees: 30, mode: bilinear}"),
    *("order.draws=1", "order.invariance_images=2"),
]


def refused(arguments, capsys):
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    assert run([str(word) for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gen-invariance: ")
    assert not re.search(r"Traceback|<class|object at 0x", line), line
    return line


def test_everything_is_written_and_said(finished, capsys, monkeypatch):
    out, arguments = finished
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/gen-invariance", "order", "out=runs/a b"])
    assert run([*arguments, "resume=true"]) == 0  # all cells are there, so this only reads them
    said = capsys.readouterr().out
    for word in ("{ant, bee}", "{cat, dog}", "start", "4 subsets, 6 pairs", "Of 12 ordered pairs", "eKLD changes"):
        assert word in said, word
    assert f"page: {out / 'order.html'}" in said
    names = {"order.html", "order.svg", "order.png", "order.dot", "order.txt", "order.json", "subsets.csv"}
    assert names <= {path.name for path in out.iterdir()}
    assert (out / "order.txt").read_text() in said
    order = SubsetOrder.load(out / "order.json")
    assert set(order.subsets) == {(), (0, 1), (2, 3), (0, 2, 3)}
    assert order.about["seed_list"] == [0, 1]
    page = (out / "order.html").read_text()
    assert "gen-invariance order &#39;out=runs/a b&#39;" in page
    assert "/somewhere/bin" not in page


def test_records_are_whole_cells_and_are_not_doubled_by_reading_again(finished):
    out, arguments = finished
    frame = measured(load_records(out / "records"))
    assert set(frame["method"]) == {"start", "{ant, bee}", "{cat, dog}", "{ant, cat, dog}"}
    assert set(frame["seed"]) == {0, 1}
    assert set(frame["metric"]) == {"separated_pairs", "balanced_accuracy", "ekld"}
    assert len(frame) == 4 * 2 * (1 + 1 + 4)
    assert len(finished_cells(out / "records")) == 4 * 2
    assert frame["config_digest"].nunique() == 1
    assert frame.loc[frame["metric"] == "ekld", "class_name"].value_counts().to_dict() == dict.fromkeys(NAMES, 8)
    assert run([*arguments, "resume=true"]) == 0
    assert len(measured(load_records(out / "records"))) == len(frame)


def test_read_again_with_another_threshold_and_more_seeds(finished, tmp_path):
    out, arguments = finished
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    before = {path.name: path.stat().st_mtime_ns for path in (copy / "cells").iterdir()}
    again = [*arguments, f"out={copy}", "resume=true", "order.analysis.threshold=0.7", "order.seeds=[0,1,2]"]
    assert run(again) == 0
    now = {path.name: path.stat().st_mtime_ns for path in (copy / "cells").iterdir()}
    assert len(now) == len(before) + 4
    assert {name: now[name] for name in before} == before
    assert float(np.max(SubsetOrder.load(copy / "order.json").threshold)) == 0.7
    assert load_records(copy / "records")["config_digest"].nunique() == 2


def test_another_nuisance_or_training_is_no_resume(finished, capsys):
    out, arguments = finished
    before = (out / "order.json").read_bytes()
    for change, name in (
        ("nuisance_options={degrees: 60, mode: bilinear}", "nuisance"),
        ("nuisance=lighting", "option 'degrees'"),
        ("nuisance=null", "nuisance"),
        ("order.source.epochs=2", "source"),
        ("order.draws=3", "draws"),
    ):
        assert name in refused([*arguments, change, "resume=true"], capsys)
    assert "resume=true" in refused(arguments, capsys)
    assert (out / "order.json").read_bytes() == before


def test_subsets_are_prefixes_of_the_class_sizes(toy, tmp_path):
    words = ["order.choose=tail", "order.sizes=[2,3]", "order.seeds=[0]", f"out={tmp_path / 'run'}"]
    assert run([*toy, *words]) == 0
    assert SubsetOrder.load(tmp_path / "run" / "order.json").subsets == ((), (2, 3), (1, 2, 3))


BAD = {
    "unknown choice": (["order.choose=some"], ["choose", "'some'", "random"]),
    "nothing listed": (["order.choose=list"], ["no class subset"]),
    "unknown class": (["order.choose=list", "order.subsets=[[ant,elk]]"], ["'elk'", "ant, bee"]),
    "class twice": (["order.choose=list", "order.subsets=[[ant,0]]"], ["twice"]),
    "subset twice": (["order.choose=list", "order.subsets=[[ant,bee],[bee,ant]]"], ["given twice"]),
    "one class": (["order.choose=list", "order.subsets=[[ant]]"], ["at least 2", "one_vs_rest"]),
    "no list of lists": (["order.choose=list", "order.subsets=[ant,bee]"], ["order.subsets", "list"]),
    "too large": (["order.choose=size", "order.size=5"], ["size is 5", "2 to 4"]),
    "too many": (["order.choose=random", "order.count=99"], ["99"]),
    "prefix too long": (["order.choose=head", "order.sizes=[9]"], ["9", "2 to 4"]),
    "own head of three classes": (["order.choose=size", "order.size=3", "order.head=own"], ["'own'", "pairs"]),
    "mode": (["order.mode=half"], ["mode", "'half'", "frozen"]),
    "same seed twice": (["order.seeds=[1,1]"], ["seeds"]),
    "word for a seed": (["order.seeds=[x]"], ["order.seeds"]),
    "threshold of chance": (["order.analysis.threshold=0.5"], ["order.analysis.threshold", "0.5"]),
    "alpha": (["order.analysis.alpha=2"], ["order.analysis.alpha", "got 2"]),
    "correction": (["order.analysis.simultaneous=holm"], ["'holm'", "bonferroni"]),
    "held out and used": (
        ["order.choose=list", "order.subsets=[[ant,bee]]", "order.analysis.heldout_classes=[1,2]"],
        ["held-out class 1"],
    ),
    "key misspelt": (["order.source.epoch=3"], ["order.source.epoch", "epochs"]),
    "whole number": (["order.source.epochs=1.5"], ["order.source.epochs", "whole number"]),
    "backbone": (["order.source.name=resnet21"], ["resnet21"]),
    "nuisance": (["nuisance=wind"], ["wind", "rotation"]),
    "option of the nuisance": (["nuisance=rotation", "nuisance_options={angle: 3}"], ["angle", "degrees"]),
    "no translator": (["nuisance=translator"], ["translator=FOLDER"]),
    "device": (["device=tpu"], ["tpu", "cpu"]),
    "file": (["data.path=nowhere.npz"], ["nowhere.npz"]),
}


@pytest.mark.parametrize(("words", "named"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(words, named, toy, tmp_path, capsys):
    out = tmp_path / "out"
    line = refused([*toy, *words, f"out={out}"], capsys)
    assert all(word in line for word in named), line
    assert not out.exists()


def test_foreign_folder_and_other_runs_are_left_alone(toy, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "thesis.tex" in refused([*toy, f"out={tmp_path}"], capsys)
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "run.json").write_text(json.dumps({"kind": "fit", "seed": 0, "config": {}}))
    assert "'fit' run" in refused([*toy, f"out={tmp_path}", "resume=true"], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_the_file_of_settings_has_all_of_the_library_and_its_defaults():
    values = compose("order", [])
    assert values["order"] == get_defaults(OrderRun)["order"]
    assert set(values) == set(get_defaults(OrderRun))
    settings = read_settings(OrderRun, values, "")
    assert settings.order.seeds == (0, 1, 2)
    assert settings.order.source.epochs == 6


@pytest.mark.slow
def test_two_processes_share_the_cells_and_write_what_one_writes(tmp_path):
    small = [
        "order", "order.count=2", "order.seeds=[0]", "order.source.epochs=1", "order.source.images_per_class=5",
        "order.analysis.resamples=100", "progress=false", "device=cpu",
    ]  # fmt: skip
    assert run([*small, f"out={tmp_path / 'one'}"]) == 0
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + (os.getpid() * 7 + 5) % 20000),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "gen_invariance.cli.main", *small, f"out={tmp_path / 'two'}"],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [out.count("page:") for out, _ in said] == [1, 0]
    for name in ("order.json", "order.txt", "subsets.csv", "predictors.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    lines = [
        sum(len(path.read_text().splitlines()) for path in (tmp_path / folder / "records").iterdir())
        for folder in ("one", "two")
    ]
    assert lines[0] == lines[1] > 0
