"""Corrections of the head: formulas, what moves, saved and not repeated."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_train import Interrupted, digits, network, same_weights, settings, train
from test_train_options import stage
from torch import nn

from gen_invariance.classifier import correction
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.correction import correct_head
from gen_invariance.classifier.losses import build_loss
from gen_invariance.classifier.model import Backbone, Classifier
from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.run import Run


def corrected(folder, kind, options=None, *, data=None, model=None, **rest):
    data, model = data or digits(), model or network().eval()
    return correct_head(model, data, kind, run=Run(folder, kind="train"), options=options, **rest)


def test_closed_corrections_equal_their_formulas(tmp_path, generator):
    data, images = digits(), torch.rand(5, 1, 16, 16, generator=generator)
    model = network().eval()
    nn.init.normal_(model.head.bias, generator=generator)
    prior = data.counts / data.counts.sum()
    expected = model(images) - 0.8 * prior.log()
    found = corrected(tmp_path / "a", "logit_adjustment", {"tau": 0.8}, model=copy.deepcopy(model))(images)
    torch.testing.assert_close(found, expected)
    head = corrected(tmp_path / "b", "tau_norm", {"tau": 0.5}, model=copy.deepcopy(model)).head
    for new, old in zip(head.weight, model.head.weight, strict=True):
        torch.testing.assert_close(new, old / old.norm() ** 0.5)
    assert not head.bias.any()
    head = corrected(tmp_path / "c", "tau_norm", model=copy.deepcopy(model)).head
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("sourced", [False, True])
def test_features_are_stored_a_part_of_the_images_at_a_time(sourced, tmp_path, monkeypatch):
    """As from all images at once, which as floats need four times the memory of the set."""
    asked, original, data = [], ImageData.float_images, digits()
    monkeypatch.setattr(ImageData, "float_images", lambda self, rows=None: asked.append(rows) or original(self, rows))
    given = {"run": Run(None, kind="train"), "stage": stage(), "views": 2}
    given["source"] = replace(data, images=255 - data.images) if sourced else None
    model = network().eval().requires_grad_(False)
    whole = correction._store_features(model, data, **given)
    monkeypatch.setattr(correction, "_PART", 7)
    parts = correction._store_features(model, data, **given)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole[0], whole[1])
    assert all(rows is not None for rows in asked)
    assert max(len(rows) for rows in asked[4:]) == 7


def test_adjustment_after_training_undoes_the_one_in_training(tmp_path, generator):
    data, images, labels = digits(), torch.rand(5, 1, 16, 16, generator=generator), torch.tensor([0, 1, 2, 1, 0])
    model = network().eval()
    plain = F.cross_entropy(model(images), labels)
    loss = build_loss("logit_adjustment", counts=data.counts, tau=0.8)
    found = corrected(tmp_path, "logit_adjustment", {"tau": 0.8}, model=model)
    torch.testing.assert_close(loss(found(images), labels), plain)


@pytest.mark.parametrize("kind", ["crt", "lws"])
@pytest.mark.parametrize("staged", [False, True])
def test_trained_corrections_move_the_head_only(kind, staged, tmp_path):
    options = {"epochs": 4, "batch_size": 8, "views": 2} if staged else {"epochs": 4, "batch_size": 8}
    extra = {"stage": stage()} if staged else {}
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    once = corrected(tmp_path / "one", kind, options, model=model, **extra)
    again = corrected(tmp_path / "two", kind, options, **extra)
    assert same_weights(once, again)
    assert isinstance(once.head, nn.Linear)
    after = once.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("head."))
    ratio = after["head.weight"] / before["head.weight"]
    assert not torch.allclose(ratio, torch.ones_like(ratio))
    if kind == "lws":
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-4, rtol=1e-4)


def test_re_training_learns_on_balanced_classes(tmp_path):
    data = digits((60, 20, 6))
    model = corrected(tmp_path / "run", "crt", {"epochs": 60, "learning_rate": 0.02}, data=data)
    right = model(data.float_images()).argmax(1) == data.labels
    assert min(float(right[data.labels == label].float().mean()) for label in range(3)) > 0.5  # the features are random


def test_a_correction_is_saved_and_not_repeated(tmp_path):
    how = settings(epochs=2, head_correction="logit_adjustment")
    first = train(tmp_path / "run", how)
    again = train(tmp_path / "run", how, resume=True)
    assert same_weights(first, again)
    uncorrected = train(tmp_path / "other", settings(epochs=2))
    assert not torch.equal(first.head.bias, uncorrected.head.bias)
    assert torch.equal(first.head.weight, uncorrected.head.weight)


def test_a_run_stopped_before_its_correction_is_corrected_later(tmp_path, monkeypatch):
    import gen_invariance.classifier.train as module

    how = settings(epochs=2, head_correction="crt", head_correction_options={"epochs": 2})
    straight = train(tmp_path / "straight", how)

    def stop(*_, **__):
        raise Interrupted

    monkeypatch.setattr(module, "correct_head", stop)
    with pytest.raises(Interrupted):
        train(tmp_path / "halted", how)
    monkeypatch.undo()
    assert same_weights(straight, train(tmp_path / "halted", how, resume=True))


def test_misuse_is_named(tmp_path):
    cosine = build_classifier("small_conv", num_classes=3, channels=1, head="cosine")
    with pytest.raises(SettingsError, match="needs a linear head, got CosineHead"):
        corrected(tmp_path / "a", "tau_norm", model=cosine)
    bare = Classifier(Backbone(nn.Flatten(), 256, 1, {}), nn.Linear(256, 3))
    with pytest.raises(SettingsError, match="declares no blocks"):
        corrected(tmp_path / "b", "crt", model=bare)
    for kind, options, words in (
        ("crt", {"tau": 1}, "has no setting 'tau'; choose of epochs, learning_rate, batch_size, views"),
        ("crt", {"epochs": 0}, "epochs must be at least 1"),
        ("lws", {"learning_rate": 0.0}, "learning_rate must be positive"),
        ("tau_norm", {"tau": 2.0}, r"tau must be in \[0, 1\]"),
        ("none", {}, "no head correction 'none'; choose crt, lws"),
    ):
        with pytest.raises(SettingsError, match=words):
            corrected(tmp_path / words[:4], kind, options)
