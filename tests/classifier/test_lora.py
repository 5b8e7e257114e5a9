"""Low-rank adapters: start, what moves, merging, and training under a transfer plan."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from test_train import Interrupted, digits, interrupt_at, same_weights, settings, train

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.lora import add_lora, merge_lora
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.errors import SettingsError
from gen_invariance.run import named_generator

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")


def images():
    return torch.rand(6, 1, 16, 16, generator=named_generator(0, "images"))


def build():
    return build_classifier("resnet20", num_classes=3, channels=1)


@needs_peft
def test_adapters_start_at_nothing_train_alone_and_merge():
    model = build().eval()
    plain, keys = model(images()), set(model.state_dict())
    state = torch.random.get_rng_state()
    add_lora(model, rank=4, generator=named_generator(0, "lora"))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(model(images()), plain)
    plan = TransferPlan("lora", lr=0.1, weight_decay=0.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan.apply(model)
    optimiser = torch.optim.SGD(plan.parameter_groups(model))
    for _ in range(3):
        model.train()
        F.cross_entropy(model(images()), torch.arange(6) % 3).backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"head.weight", "head.bias"} < moved
    assert all("lora_" in key or key.startswith("head.") for key in moved)
    tuned = model.eval()(images())
    merge_lora(model)
    torch.testing.assert_close(model(images()), tuned, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == keys


@needs_peft
@pytest.mark.parametrize("at", [1, 2])
def test_a_plan_trains_adapters_resumes_and_leaves_a_plain_network(at, tmp_path):
    how, plan = settings(epochs=3, average_decay=0.5), TransferPlan("lora", lr=0.05, lora_rank=2)
    trained = train(tmp_path / "straight", how, plan=plan)
    start = build_classifier("small_conv", num_classes=3, channels=1, generator=named_generator(0, "net"))
    assert trained.state_dict().keys() == start.state_dict().keys()
    changed = {key for key, value in trained.state_dict().items() if not torch.equal(value, start.state_dict()[key])}
    assert {"backbone.conv4.0.weight", "head.weight"} <= changed
    assert not any("running" in key or ".1." in key for key in changed), "batch norm stays as it was"
    with pytest.raises(Interrupted):
        train(tmp_path / "halted", how, plan=plan, evaluate=interrupt_at(at))
    assert same_weights(trained, train(tmp_path / "halted", how, plan=plan, resume=True))
    assert same_weights(trained, train(tmp_path / "halted", how, plan=plan, resume=True))


@needs_peft
def test_depthwise_layers_are_left_alone():
    model = build_classifier("efficientnet_b0", num_classes=3)
    add_lora(model, rank=4, generator=named_generator(0, "lora"))
    grouped = [m for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    assert grouped
    assert not any("lora" in name for m in grouped for name, _ in m.named_modules())


@needs_peft
def test_misuse_is_named():
    with pytest.raises(SettingsError, match="rank must be at least 1"):
        add_lora(build(), rank=0, generator=named_generator(0))
    with pytest.raises(SettingsError, match="takes an adapter of rank 500; lower it"):
        add_lora(build(), rank=500, generator=named_generator(0))


def test_without_peft_the_plan_says_how_to_install_it(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest))
    with pytest.raises(SettingsError, match="pip install peft"):
        train(tmp_path, settings(), data=digits(), plan=TransferPlan("lora"))
