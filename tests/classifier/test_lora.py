"""Low-rank adapters: start, what moves, merging."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.lora import add_lora, merge_lora
from gen_invariance.errors import SettingsError
from gen_invariance.run import named_generator


def images():
    return torch.rand(6, 1, 16, 16, generator=named_generator(0, "images"))


def build():
    return build_classifier("resnet20", num_classes=3, channels=1)


def test_adapters_start_at_nothing_train_alone_and_merge():
    pytest.importorskip("peft")
    model = build().eval()
    plain, keys = model(images()), set(model.state_dict())
    state = torch.random.get_rng_state()
    trained = add_lora(model, rank=4, stages=["stage2", "stage3"], generator=named_generator(0, "lora"))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(model(images()), plain)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimiser = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        model.train()
        F.cross_entropy(model(images()), torch.arange(6) % 3).backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all("lora_" in key or key.startswith("head.") for key in moved)
    assert not any("stage1" in key or "stem" in key for key in moved)
    tuned = model.eval()(images())
    merge_lora(model)
    torch.testing.assert_close(model(images()), tuned, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == keys


def test_depthwise_layers_are_left_alone():
    pytest.importorskip("peft")
    model = build_classifier("efficientnet_b0", num_classes=3)
    add_lora(model, rank=4, generator=named_generator(0, "lora"))
    grouped = [m for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    assert grouped
    assert not any("lora" in name for m in grouped for name, _ in m.named_modules())


def test_misuse_is_named(monkeypatch):
    with (
        pytest.raises(SettingsError, match="rank must be at least 1")
        if importlib.util.find_spec("peft")
        else (pytest.raises(SettingsError, match="pip install peft"))
    ):
        add_lora(build(), rank=0, generator=named_generator(0))
    if importlib.util.find_spec("peft"):
        with pytest.raises(SettingsError, match="takes an adapter of rank 500; lower it"):
            add_lora(build(), rank=500, generator=named_generator(0))
        with pytest.raises(SettingsError, match="no stage 'stage9'"):
            add_lora(build(), stages=["stage9"], generator=named_generator(0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(SettingsError, match="pip install peft"):
        add_lora(build(), generator=named_generator(0))
