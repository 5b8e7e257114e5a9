"""Every kind of bad setting ends in one line that names it, exit code 2, and leaves nothing behind in `out`."""

import re
import warnings

import pytest
import torch

from gen_invariance.cli.main import run

TINY = ["data=digits_rotation", "data.largest=24", "data.imbalance=4", "data.few_below=8", "data.many_above=16",
        "data.test_images=5"]  # fmt: skip
FIT = ["fit", *TINY, "fit.steps=2", "fit.batch_size=8"]
TRAIN = ["train", *TINY, "training.epochs=2", "training.warmup=0"]


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


def refused(arguments, capsys, *, code=2):
    """Run in this process; the one line on stderr, after checking that it is one and that nothing else happened."""
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == code
    return one_line(capsys.readouterr().err)


def one_line(stderr):
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("gen-invariance: ")
    assert not re.search(r"Traceback|__init__|<class|object at 0x", lines[0]), lines[0]
    return lines[0]


SETTINGS = {
    "verb misspelt": (["trian"], ["'trian'", "did you mean train"]),
    "option with dashes": (["fit", "--steps=3"], ["--steps=3", "no dashes"]),
    "key misspelt": (["fit", "fit.stepps=3"], ["fit.stepps", "did you mean fit.steps"]),
    "key misspelt, of the verb": (["train", "sed=3"], ["sed", "did you mean seed"]),
    "key of another verb": (["measure", "fit.steps=3", "run=x"], ["fit.steps"]),
    "no such choice": (["train", "classifier=resnet21"], ["resnet21", "resnet20", "small_conv"]),
    "no equals sign": (["fit", "steps"], ["steps"]),
    "unreadable value": (["fit", "fit.steps=[1,"], ["fit.steps"]),
    "missing setting": (["measure"], ["run=..."]),
    "missing translator": (["train", "stage=translator"], ["stage.translator"]),
    "missing path": (["fit", "data=npz"], ["npz", "path"]),
    "missing records": (["report"], ["records=..."]),
    "word for a number": (["fit", "fit.steps=abc"], ["fit.steps", "whole number", "'abc'"]),
    "word for the seed": (["fit", "seed=x"], ["seed", "whole number", "'x'"]),
    "fraction for a whole number": (["train", "data.largest=1.5"], ["data.largest", "whole number", "1.5"]),
    "number for a switch": (["fit", "resume=3"], ["resume", "true or false"]),
    "nothing for a folder": (["fit", "out=null"], ["out", "text"]),
    "word for a mapping": (["fit", "data.nuisance_options=3"], ["data.nuisance_options", "mapping"]),
    "too few milestones": (["train", "training.milestones=[3]"], ["training.milestones", "2 values"]),
    "infinite rate": (["train", "training.learning_rate=inf"], ["training.learning_rate", "finite"]),
    "NaN rate": (["train", "training.weight_decay=nan"], ["training.weight_decay", "finite"]),
    "negative steps": (["fit", "fit.steps=-1"], ["fit.steps", "-1"]),
    "no steps": (["fit", "fit.steps=0"], ["fit.steps", "0"]),
    "no batch": (["fit", "fit.batch_size=0"], ["fit.batch_size", "0"]),
    "no epochs": (["train", "training.epochs=0"], ["epochs", "0"]),
    "negative rate": (["train", "training.learning_rate=-1"], ["learning_rate", "-1"]),
    "negative class size": (["fit", "data.largest=-3"], ["largest", "-3"]),
    "negative imbalance": (["fit", "data.imbalance=-1"], ["imbalance", "-1"]),
    "validation fraction": (["fit", "data.validation_fraction=2"], ["fraction", "2"]),
    "image size": (["fit", "data.image_size=0"], ["image_size", "0"]),
    "group bounds": (["fit", "data.few_below=0"], ["few_below", "0"]),
    "too large a class": (["fit", "data.largest=9999"], ["largest"]),
    "head classes too large": ([*FIT, "fit.head_from=999"], ["999", "fit.head_from"]),
    "classes": (["fit", "fit.classes=tail"], ["fit.classes", "'tail'", "head, all"]),
    "precision": (["fit", "fit.mixed_precision=fp8"], ["fp8", "bf16"]),
    "source": (["fit", "data.source=cifar"], ["'cifar'", "npz"]),
    "profile": (["fit", "data.profile=long"], ["'long'", "exponential"]),
    "nuisance": (["fit", "data.nuisance=wind"], ["'wind'", "rotation"]),
    "nuisance option": (["fit", "data.nuisance_options={speed: 3}"], ["rotation", "speed"]),
    "nuisance option, by its own key": (["fit", "data.nuisance_options.speed=3"], ["rotation", "speed"]),
    "loss option's kind": ([*TRAIN, "classifier.loss=focal", "classifier.loss_options={gamma: far}"], ["gamma"]),
    "loss option's range": ([*TRAIN, "classifier.loss=focal", "classifier.loss_options={gamma: -1}"], ["gamma", "-1"]),
    "nuisance option's kind": (["fit", "data.nuisance_options={degrees: far}"], ["degrees"]),
    "translator": (["fit", *TINY, "translator.name=gan"], ["'gan'", "munit"]),
    "translator's network": (
        ["fit", *TINY, "+translator.network.depth=3"],
        ["translator.network", "'depth'", "operations"],
    ),
    "translator's operation": (["fit", *TINY, "translator.network.operations=[spin]"], ["spin", "rotation"]),
    "translator's start, a word": (["fit", *TINY, "translator.network.start=abc"], ["start"]),
    "translator's start": (["fit", *TINY, "translator.network.start=-1"], ["start", "-1"]),
    "translator's rate, a word": (["fit", *TINY, "translator.objective.learning_rate=abc"], ["learning_rate"]),
    "translator's rate": (["fit", *TINY, "translator.objective.learning_rate=-1"], ["learning"]),
    "translator's width": (["fit", *TINY, "translator=munit_small", "translator.network.width=0"], ["width", "0"]),
    "translator's width, a word": (["fit", *TINY, "translator=munit", "translator.network.width=a"], ["width"]),
    "weights of the losses": (["fit", *TINY, "translator=munit", "translator.objective.weights={kl: 1}"], ["kl"]),
    "weight of a loss": (["fit", *TINY, "translator=munit", "translator.objective.weights.image=a"], ["image"]),
    "backbone": ([*TRAIN, "classifier.backbone=resnet21"], ["resnet21", "small_conv"]),
    "head": ([*TRAIN, "classifier.head=round"], ["round", "cosine"]),
    "loss": ([*TRAIN, "classifier.loss=mse"], ["mse", "cross_entropy"]),
    "loss option": ([*TRAIN, "classifier.loss_options={gamma: 2}"], ["gamma"]),
    "sampling": ([*TRAIN, "training.sampling=often"], ["often", "class_balanced"]),
    "schedule": ([*TRAIN, "training.schedule=linear"], ["linear", "cosine"]),
    "stage's nuisance": ([*TRAIN, "stage.nuisance=wind"], ["wind", "randaugment"]),
    "stage's translator": ([*TRAIN, "stage.nuisance=translator"], ["stage.translator"]),
    "policy": ([*TRAIN, "stage=oracle", "stage.policy=often"], ["often", "hard_cutoff"]),
    "policy option": ([*TRAIN, "stage=oracle", "stage.policy_options={p: 2}"], ["auto", "p"]),
    "probability": ([*TRAIN, "stage=oracle", "stage.policy_options={maximum: 2}"], ["maximum", "2"]),
    "augmentation": ([*TRAIN, "augmentation=mixup"], ["mixup", "crop_flip"]),
    "device": ([*FIT, "device=abacus"], ["abacus", "cpu"]),
    "device that torch knows and nobody has": ([*FIT, "device=mps"], ["mps", "cpu"]),
    "demo without seeds": (["demo", "demo.seeds=0"], ["demo.seeds", "0"]),
    "word for the demo's seeds": (["demo", "demo.seeds=three"], ["demo.seeds", "'three'"]),
}


@pytest.mark.parametrize(("arguments", "words"), SETTINGS.values(), ids=SETTINGS)
def test_bad_settings(arguments, words, tmp_path, capsys):
    out = tmp_path / "out"
    where = [f"out={out}"] if len(arguments) > 1 and arguments[0] != "measure" else []
    if any(argument.startswith("out=") for argument in arguments):
        where = []
    line = refused([*arguments, *where], capsys)
    assert all(word in line for word in words), line
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(tmp_path, capsys):
    assert "device=cpu" in refused([*FIT, "device=cuda", f"out={tmp_path / 'out'}"], capsys)
