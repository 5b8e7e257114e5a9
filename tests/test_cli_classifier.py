"""`train` with methods and transfer plans through the command line, its bad input, and on two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from gen_invariance.classifier.model import Backbone, Classifier
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.cli.main import run
from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.run import Run

TRAIN = ["train", "data=digits_rotation", "data.largest=24", "data.imbalance=4", "data.few_below=8", "progress=false",
         "data.many_above=16", "data.test_images=5", "training.epochs=2", "training.warmup=0"]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "run"
    assert run([*TRAIN, "method=ldam_drw", f"out={out}"]) == 0
    return out


def test_a_method_trains_and_is_measured(source, capsys):
    config = json.loads((source / "run.json").read_text())["config"]
    assert config["classifier"]["loss"] == "ldam"
    assert config["classifier"]["second_loss_options"] == {"weights": "effective_number"}
    assert config["training"]["sampling"] == "instance"  # the default training says delayed
    assert json.loads((source / "run.json").read_text())["facts"]["feature_norm"] > 0  # its head is a cosine one
    assert run(["measure", f"run={source}", "draws=1"]) == 0
    assert "balanced accuracy" in capsys.readouterr().out


def test_an_override_beats_the_method(tmp_path):
    assert run([*TRAIN, "method=crt", "training.sampling=square_root", f"out={tmp_path / 'run'}"]) == 0
    training = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["training"]
    assert (training["sampling"], training["head_correction"]) == ("square_root", "crt")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # trained, and corrected


def test_a_plan_is_described_and_keeps_the_backbone(source, tmp_path, capsys):
    out = tmp_path / "run"
    assert run([*TRAIN, "transfer=frozen", f"classifier.weights={source}", f"out={out}"]) == 0
    assert "head        1,290  from epoch 0" in capsys.readouterr().out
    before, after = (Run(folder, kind="train", seed=0, config=json.loads((folder / "run.json").read_text())["config"],
                         resume=True).load_latest()["model"] for folder in (source, out))  # fmt: skip
    backbone = [name for name in before if name.startswith("backbone.")]
    assert backbone
    assert all(torch.equal(before[name], after[name]) for name in backbone)
    assert run(["measure", f"run={out}", "draws=1"]) == 0


def test_auto_says_why(tmp_path, capsys):
    assert run([*TRAIN, "transfer=auto", f"out={tmp_path / 'run'}"]) == 0
    assert "auto: a median of 12 images a class, the smallest 6, similarity" in capsys.readouterr().out


BAD = {
    "class": (["classifier.loss_options={weights: {zebra: 2.0}}"], "class weights name 'zebra', which is no class"),
    "stages": (["transfer=partial", "transfer.last_stages=7"], "cannot train the last 7 blocks, the backbone has 4"),
    "method": (["method=ldma"], "method has no choice 'ldma'"),
    "worst": (["training.worst_of=3"], "training.worst_of works on what the stage does"),
    "cosine": (["method=ldam", "training.head_correction=crt"], "needs a linear head, got CosineHead"),
    "mixing": (["method=mixup", "training.mixing_options={beta: 1}"], "mixing mixup has no option 'beta'"),
    "mode": (["transfer=full", "transfer.mode=half"], "got 'half'"),
    "augmentation": (["augmentation=autoaugment"], "augmentation: unknown nuisance 'autoaugment'; choose one of"),
    "package": (["classifier=small_conv", "classifier.weights=DEFAULT"], "small_conv has no published weights"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, tmp_path, capsys):
    words, expected = BAD[name]
    assert run([*TRAIN, *words, f"out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert not (tmp_path / "run").exists()


def test_weights_of_another_architecture(source, tmp_path, capsys):
    assert run([*TRAIN, "classifier=resnet20", f"classifier.weights={source}", f"out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "are of another architecture than resnet20" in error
    assert not (tmp_path / "run").exists()


def test_a_backbone_without_declared_blocks(tmp_path):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    model = Classifier(Backbone(module, 4, 1, {}), torch.nn.Linear(4, 2))
    data = ImageData(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    with pytest.raises(SettingsError, match=r"declares no blocks; wrap it with Classifier\(Backbone") as caught:
        fit_classifier(model, data, TrainSettings(epochs=1), loss=torch.nn.CrossEntropyLoss(),
                       plan=TransferPlan("frozen"), out=tmp_path / "r", progress=False)  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_processes_share_one_run_folder(tmp_path):
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    common["MASTER_PORT"] = str(20000 + (os.getpid() * 7 + 3) % 20000)
    words = [*TRAIN, "method=mixup", "device=cpu", f"out={tmp_path / 'run'}"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "gen_invariance.cli.main", *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "classifier:" in told[0][0]
    assert told[1][0] == ""
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
