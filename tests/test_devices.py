"""The tests of `tests/devices` on a device that is pretended: no GPU is needed to see that devices are not mixed."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked import ForkedCommand

from gen_invariance import FitSettings, build_classifier, fit_translator, load_source, make_long_tailed
from gen_invariance.devices import are_finite, use_accelerator
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.launch import choose_device

DEVICES = Path(__file__).parent / "devices"


def run(which: str) -> str:
    """Carry out those of `tests/devices` on the pretended device; what pytest wrote.

    In a fork, as a new Python would import everything again. `conftest.py` sees to it that nothing went before: a
    device has to be there before the first backward pass, which counts the devices.
    """
    words = [DEVICES, "-q", "-m", which, "-p", "no:cacheprovider", f"--rootdir={DEVICES.parents[1]}"]
    forked = ForkedCommand(words, before=pretend, program=pytest.main)
    written, _ = forked.communicate(timeout=1200)
    assert forked.returncode == 0, written[-4000:]
    return written


def pretend() -> None:
    os.environ |= {"GEN_INVARIANCE_TEST_DEVICE": "pretended", "PYTEST_ADDOPTS": ""}
    for name, module in list(sys.modules.items()):  # they were imported without one
        if (getattr(module, "__file__", None) or "").startswith(str(DEVICES)):
            del sys.modules[name]


def test_every_room_works_on_another_device_than_the_cpu():
    passed = run("gpu and not slow")
    assert "skipped" not in passed
    assert not re.search(r"\b0 passed", passed)


@pytest.mark.slow
def test_every_method_works_on_another_device_than_the_cpu():
    run("gpu and slow")


def mix(folder: str) -> int:
    """Print of each way to mix devices, and not to, whether it does what a GPU does."""
    sys.path.insert(0, folder)
    from pretended import PretendedDevice, register

    def refused(function) -> bool:
        try:
            function()
        except (RuntimeError, TypeError):
            return True
        return False

    device = register()
    with PretendedDevice():
        there, here = torch.ones(3, device=device), torch.ones(3)
        print(
            refused(lambda: there + here), refused(lambda: torch.cat([here, there])), refused(there.numpy),
            refused(lambda: torch.rand(3, device=device, generator=torch.Generator())),
            refused(lambda: torch.nn.Linear(3, 2)(there)),
            (there + torch.tensor(1.0)).tolist() == [2, 2, 2], there[torch.tensor([0])].device == device,
            there.cpu().numpy().sum() == 3, (there.to("cpu") + here).sum().item() == 6,
        )  # fmt: skip
    return 0


def test_mixed_devices_are_refused():
    """What the tests above rest on."""
    written, errors = ForkedCommand([DEVICES], before=pretend, program=lambda words: mix(*words)).communicate()
    assert written.split() == ["True"] * 9, written + errors


def test_loops_of_two_precisions_in_one_process_beside_a_users_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    own = Accelerator(cpu=True, mixed_precision="no")
    with use_accelerator("cpu", mixed_precision="bf16") as accelerator:
        assert accelerator.mixed_precision == "bf16"
        with use_accelerator("cpu", mixed_precision="no") as inner:
            assert inner.mixed_precision == "no"
        assert (accelerator.mixed_precision, accelerator.device.type) == ("bf16", "cpu")
    assert (own.mixed_precision, own.device.type, own.num_processes) == ("no", "cpu", 1)


def test_each_process_of_a_launcher_takes_its_own_gpu(monkeypatch):
    """Before accelerate sets it, the current device of each is the first one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert choose_device(name) == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", rank)
        assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(SettingsError, match="one GPU, and the launcher started several"):
        choose_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SettingsError, match="has no GPU, torch finds 2"):
        choose_device("cuda")


def test_another_device_than_the_first_of_its_kind_can_be_had():
    AcceleratorState._reset_state(reset_partial_state=True)
    with use_accelerator("cpu"), use_accelerator("meta:1") as accelerator:
        assert accelerator.device == torch.device("meta", 1)
    with use_accelerator("cpu") as accelerator:
        assert accelerator.device.type == "cpu"


@pytest.mark.parametrize(
    ("name", "precision"),
    [("redraw", torch.bfloat16), ("spatial", torch.float64), ("munit", torch.bfloat16), ("flow", torch.float64)],
)
def test_fits_under_another_default_precision_are_the_same(name, precision):
    data = make_long_tailed(load_source("digits"), largest=30, imbalance=6, rest_is_test=True).train
    small = {"munit": {"width": 4, "residual_blocks": 1, "mlp_width": 8}, "flow": {"width": 8}}.get(name)

    def fit():
        settings = FitSettings(steps=1, batch_size=4)
        return fit_translator(name, data, settings, network=small, progress=False).state_dict()

    expected = fit()
    torch.set_default_dtype(precision)
    try:
        found, classifier = fit(), build_classifier("small_conv", num_classes=10, channels=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {each.dtype for each in classifier.parameters()} == {torch.float32}


def test_one_number_that_is_none_is_found_among_many():
    tensors = [torch.ones(3), torch.zeros(2, 2), torch.ones(0), torch.arange(3)]
    assert are_finite(tensors)
    assert are_finite([])
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not are_finite([*tensors, torch.tensor([1.0, value]), torch.ones(2)])
