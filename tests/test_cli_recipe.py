"""What a pretrained classifier brings along on the command line, and what somebody who says otherwise gets."""

import pytest

from gen_invariance.cli.main import compose, run
from gen_invariance.experiment.settings import Task
from gen_invariance.experiment.task import prepare
from gen_invariance.experiment.train import validate_on


def composed(*words):
    return compose("train", list(words), missing_is_error=False)


def test_a_pretrained_classifier_brings_its_training():
    found = composed("classifier=efficientnet_lite0", "data=folder", "data.path=photos")
    assert found["training"]["optimizer"] == "adamw"
    assert found["transfer"]["mode"] == "frozen"
    assert found["classifier"]["head"] == "cosine"
    assert found["augmentation"] == "crop_flip+randaugment"
    assert found["data"]["image_size"] == 128


def test_who_says_otherwise_is_heard():
    found = composed("classifier=efficientnet_lite0", "data=folder", "data.image_size=64", "transfer=full",
                     "augmentation=trivialaugment", "training.epochs=3", "method=ldam")  # fmt: skip
    assert found["data"]["image_size"] == 64
    assert (found["transfer"]["mode"], found["augmentation"]) == ("full", "trivialaugment")
    assert (found["training"]["epochs"], found["training"]["views"], found["training"]["spread"]) == (3, 0, 0)
    assert found["classifier"]["loss"] == "ldam"
    plain = composed("classifier=efficientnet_lite0", "training=cifar")
    assert (plain["transfer"]["mode"], plain["training"]["optimizer"]) == ("none", "sgd")
    scratch = composed("classifier=efficientnet_lite0", "classifier.weights=null")
    assert (scratch["transfer"]["mode"], scratch["training"]["views"]) == ("none", 0)


@pytest.mark.parametrize("words", [[], ["classifier=resnet20"], ["classifier.weights=runs/source", "transfer=frozen"]])
def test_others_are_as_before(words):
    found = composed(*words)
    assert (found["training"]["optimizer"], found["training"]["views"]) == ("sgd", 0)
    assert found["data"]["image_size"] is None


def test_library_models_are_named_alone():
    found = composed("classifier=resnet50")
    assert (found["classifier"]["backbone"], found["classifier"]["weights"]) == ("resnet50", "DEFAULT")
    assert found["training"]["optimizer"] == "adamw"
    assert composed("classifier=timm:convnext_nano.in12k")["classifier"]["backbone"] == "timm:convnext_nano.in12k"


def test_unknown_models_are_refused_before_the_data_are_read(tmp_path, capsys):
    assert run(["train", "classifier=resnet500", "data=folder", "data.path=gone", f"out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "no backbone 'resnet500'" in error
    assert "did you mean resnet50" in error
    assert error.count("\n") == 1


def test_validation_figures_are_those_of_each_shot_group():
    held = prepare(Task(largest=30, imbalance=10, validation_fraction=0.1, rest_is_test=True), seed=0)
    figures = validate_on(held)(lambda images: images.flatten(1)[:, :10])
    assert set(figures) == {"balanced_accuracy", "many_accuracy", "medium_accuracy", "few_accuracy"}
    assert validate_on(prepare(Task(largest=30, imbalance=10, rest_is_test=True), seed=0)) is None
