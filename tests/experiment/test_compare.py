"""`compare`: the same training on two sets, paired by seed; equal sets differ by nothing, and finished work is kept."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from gen_invariance import load_records, load_source
from gen_invariance.cli.main import run
from gen_invariance.experiment import compare
from gen_invariance.measure.accuracy import AccuracyScores

COUNTS = {0: 24, 1: 12, 2: 4}


def as_folder(root, counts, *, skip=0):
    data = load_source("digits").train
    for label, count in counts.items():
        (root / str(label)).mkdir(parents=True)
        for row in (data.labels == label).nonzero().flatten()[skip : skip + count].tolist():
            Image.fromarray(data.images[row, 0].numpy()).save(root / str(label) / f"{row}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    as_folder(root / "few", COUNTS)
    as_folder(root / "more", dict.fromkeys(COUNTS, 24))
    as_folder(root / "test", dict.fromkeys(COUNTS, 10), skip=100)
    return root


def words(folders, out, *more, augmented="more"):
    few, new, test = (folders / name for name in ("few", augmented, "test"))
    small = ["image_size=16", "steps=20", "batch_size=8", "seeds=[0,1]", "augmentation=none", "progress=false"]
    return ["compare", f"original={few}", f"augmented={new}", f"test={test}", *small, f"out={out}", *more]


def command(capsys, *line):
    capsys.readouterr()
    code = run([str(word) for word in line])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_a_set_and_itself_do_not_differ(folders, tmp_path, capsys):
    code, out, err = command(capsys, *words(folders, tmp_path / "run", augmented="few"))
    assert (code, err) == (0, [])
    assert out[0] == "40 original images, +0 in the augmented set, 30 test images; 2 seeds, 20 steps of 8 images each"
    assert "no difference shown: accuracy on the test images in %" in "\n".join(out)
    found = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert found["verdict"] == "no difference shown"
    assert {name: numbers["difference"] for name, numbers in found["points"].items()} == {
        "balanced_accuracy": 0,
        "many_accuracy": 0,
        "few_accuracy": 0,
    }


@pytest.fixture
def scored(monkeypatch):
    """Trainings that score what the test says; those asked for are counted."""
    asked = []

    def train_and_test(train, test, settings, seed):
        asked.append((len(train), seed))
        gain = (len(train) > 40) * (0.1 + 0.02 * seed)
        accuracy = torch.tensor([0.9, 0.6, 0.2 + gain], dtype=torch.float64)
        return AccuracyScores(accuracy, torch.tensor([10, 10, 10]), float(accuracy.mean()))

    monkeypatch.setattr(compare, "_train_and_test", train_and_test)
    return asked


def test_figures_are_paired_by_seed_and_kept(folders, tmp_path, capsys, scored):
    line = words(folders, tmp_path / "run", "seeds=[0,1,2]")
    code, out, err = command(capsys, *line)
    assert (code, err) == (0, [])
    assert scored == [(count, seed) for seed in range(3) for count in (40, 72)]
    assert out[1:4] == [
        "seed 0: balanced accuracy 56.7 -> 60.0",
        "seed 1: balanced accuracy 56.7 -> 60.7",
        "seed 2: balanced accuracy 56.7 -> 61.3",
    ]
    assert out[4].startswith("better: ")
    gains = np.array([0.1, 0.12, 0.14]) * 100
    half_width = 4.303 * gains.std(ddof=1) / np.sqrt(3)  # Student's factor for two degrees of freedom
    assert out[5] == f"  balanced: 56.7 -> 60.7, difference +4.0 ± {half_width / 3:.1f} (3 seeds, 95 %)"
    assert out[7] == f"  few-shot: 20.0 -> 32.0, difference +12.0 ± {half_width:.1f} (3 seeds, 95 %)"
    records = load_records(tmp_path / "run" / "records")
    few = records[(records["metric"] == "accuracy") & (records["class_name"] == "2")]
    assert few["class_count"].tolist() == [4] * 6  # as in the original, for both
    assert sorted(set(records["method"])) == ["augmented", "original"]
    again = command(capsys, *line, "resume=true")
    assert (again[0], again[1][4:]) == (0, out[4:])
    assert len(scored) == 6
    more = command(capsys, *line, "resume=true", "seeds=[0,1,2,3]")
    assert (more[0], len(scored)) == (0, 8)


def test_a_stopped_comparison_goes_on(folders, tmp_path, capsys, scored, monkeypatch):
    line = words(folders, tmp_path / "run")
    real = compare._train_and_test

    def stop(*args):
        if len(scored) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "_train_and_test", stop)
        assert command(capsys, *line)[0] == 130
    assert command(capsys, *line, "resume=true")[0] == 0
    assert scored == [(40, 0), (72, 0), (40, 1), (72, 1)]


def test_the_part_for_testing_of_the_set_itself(folders, tmp_path, capsys, scored):
    shutil.copytree(folders / "few", tmp_path / "a" / "train")
    shutil.copytree(folders / "test", tmp_path / "a" / "test")
    shutil.copytree(folders / "more", tmp_path / "b" / "train")
    line = ["compare", f"original={tmp_path / 'a'}", f"augmented={tmp_path / 'b'}", f"out={tmp_path / 'run'}"]
    code, out, _ = command(capsys, *line, "image_size=16")
    assert code == 0
    assert "40 original images, +32 in the augmented set, 30 test images; 5 seeds" in out[0]


def test_arrays(tmp_path, capsys, scored):
    data = load_source("digits").train
    rows = (data.labels < 3).nonzero().flatten()
    images, labels = data.images[rows, 0].numpy(), data.labels[rows].numpy()
    test = {"test_images": images[100:130], "test_labels": labels[100:130]}
    for name, count in {"few": 40, "more": 90}.items():
        np.savez(tmp_path / f"{name}.npz", train_images=images[:count], train_labels=labels[:count], **test)
    line = [f"original={tmp_path / 'few.npz'}", f"augmented={tmp_path / 'more.npz'}", f"out={tmp_path / 'run'}"]
    code, out, err = command(capsys, "compare", "source=npz", "image_size=null", *line)
    assert (code, err) == (0, [])
    assert "40 original images, +50 in the augmented set, 30 test images" in out[0]


WRONG = {
    "nothing there": (["original=/no/where"], "does not exist"),
    "no seed": (["seeds=[]"], "seeds"),
    "no test part": (["test=null"], "has no test part; give test=FOLDER"),
    "an unknown backbone": (["backbone=lenet"], "lenet"),
    "an unknown augmentation": (["augmentation=autoaugment"], "augmentation: unknown nuisance 'autoaugment'"),
    "an unknown format": (["source=zip"], "source must be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name, folders, tmp_path, capsys):
    more, text = WRONG[name]
    code, _, err = command(capsys, *words(folders, tmp_path / "run", *more))
    assert (code, len(err)) == (2, 1)
    assert text in err[0]


def test_sets_that_do_not_fit_each_other(folders, tmp_path, capsys, scored):
    other = as_folder(tmp_path / "other", {0: 3, 7: 3})
    code, _, err = command(capsys, *words(folders, tmp_path / "run", f"augmented={other}"))
    assert (code, len(err)) == (2, 1)
    assert "compare two sets of the same classes" in err[0]
    code, _, err = command(capsys, *words(folders, tmp_path / "run", f"test={other}"))
    assert code == 2
    assert "test images are of a class '7'" in err[0]
    assert not (tmp_path / "run").exists()
    line = words(folders, tmp_path / "run")
    assert command(capsys, *line)[0] == 0
    code, _, err = command(capsys, *words(folders, tmp_path / "run", "resume=true", augmented="few"))
    assert code == 2
    assert "data" in err[0]
