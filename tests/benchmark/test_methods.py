"""Methods by name: every file builds, is what the command line composes, and trains as it says."""

import pytest
import torch

from gen_invariance import configs
from gen_invariance.benchmark.arms import build_method
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.cli.main import compose
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.build import build_losses, build_model
from gen_invariance.experiment.settings import ClassifierSettings, Task
from gen_invariance.experiment.task import prepare

NAMES = [name for name in configs.choice_names("method") if name != "none"]
TASK = Task(
    source="digits", largest=24, imbalance=6, rest_is_test=True, nuisance="rotation", many_above=12, few_below=8
)
TRAINING = TrainSettings(epochs=2, batch_size=32, learning_rate=0.02, schedule="cosine", warmup=0, second_phase=1)
CLASSIFIER = ClassifierSettings("small_conv")


@pytest.fixture(scope="module")
def prepared():
    return prepare(TASK, seed=0)


def test_the_names_people_use_are_there():
    wanted = """ce ce_drs ce_drw class_balanced square_root progressive effective_number focal ldam ldam_drw
    balanced_softmax logit_adjustment logit_adjustment_posthoc vector_scaling mixup remix cutmix cmo crt tau_norm lws
    randaugment trivialaugment"""
    assert set(wanted.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_what_the_command_linecomposes(name):
    composed = compose("train", [f"method={name}"])
    method = build_method(name, training=TRAINING, classifier=CLASSIFIER)
    changes = configs.read_choice("method", name)
    assert changes["training"]
    assert composed["augmentation"] == method.augmentation
    for group in ("classifier", "training"):
        values = vars(getattr(method, group))
        for key, value in changes.get(group, {}).items():
            assert composed[group][key] == value == values[key], f"{group}.{key}"


@pytest.mark.parametrize("name", NAMES)
def test_a_method_differs_from_plain_cross_entropy(name, prepared):
    plain, method = (build_method(each, training=TRAINING, classifier=CLASSIFIER) for each in ("ce", name))
    same = (method.training, method.classifier, method.augmentation) == (
        plain.training, plain.classifier, plain.augmentation)  # fmt: skip
    assert same == (name == "ce")
    first, second = build_losses(method.classifier, prepared.train)
    logits = build_model(method.classifier, prepared.train, seed=0)(prepared.train.float_images(torch.arange(4)))
    assert torch.isfinite(first(logits, prepared.train.labels[:4]))
    assert (second is not None) == name.endswith("drw")


def test_unknown_methods_are_named():
    with pytest.raises(SettingsError, match=r"no method 'ldma'; choose balanced_softmax, ce"):
        build_method("ldma", training=TRAINING, classifier=CLASSIFIER)
