"""The tests of `tests/devices` on a device that is pretended: no GPU is needed to see that devices are not mixed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gen_invariance.devices import use_accelerator
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.launch import choose_device

DEVICES = Path(__file__).parent / "devices"


def run(which: str) -> str:
    environment = {**os.environ, "GEN_INVARIANCE_TEST_DEVICE": "pretended", "PYTEST_ADDOPTS": ""}
    line = [sys.executable, "-m", "pytest", str(DEVICES), "-q", "-m", which, "-p", "no:cacheprovider"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=DEVICES.parents[1])
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_every_room_works_on_another_device_than_the_cpu():
    passed = run("gpu and not slow")
    assert "skipped" not in passed
    assert not re.search(r"\b0 passed", passed)


@pytest.mark.slow
def test_every_method_works_on_another_device_than_the_cpu():
    run("gpu and slow")


def test_mixed_devices_are_refused():
    """What the tests above rest on."""
    program = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from pretended import PretendedDevice, register
device = register()
def refused(function):
    try:
        function()
    except (RuntimeError, TypeError):
        return True
    return False
with PretendedDevice():
    there, here = torch.ones(3, device=device), torch.ones(3)
    print(refused(lambda: there + here), refused(lambda: torch.cat([here, there])), refused(there.numpy),
          refused(lambda: torch.rand(3, device=device, generator=torch.Generator())),
          refused(lambda: torch.nn.Linear(3, 2)(there)),
          (there + torch.tensor(1.0)).tolist() == [2, 2, 2], there[torch.tensor([0])].device == device,
          there.cpu().numpy().sum() == 3, (there.to("cpu") + here).sum().item() == 6)
"""
    done = subprocess.run([sys.executable, "-c", program, str(DEVICES)], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 9, done.stdout + done.stderr


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
