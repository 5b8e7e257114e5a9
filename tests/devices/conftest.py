"""The device under test: the first CUDA device, or the pretended one where a process was started for it."""

import os

import pytest
import torch
from rounding import ROUNDED

from gen_invariance.devices import full_precision

PRETENDED = os.environ.get("GEN_INVARIANCE_TEST_DEVICE") == "pretended"
if PRETENDED:  # before the first backward pass, which counts the devices
    from pretended import register

    register()


@pytest.fixture
def device(monkeypatch):
    if not PRETENDED:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        with full_precision():  # figures are compared with the CPU's
            yield torch.device("cuda", 0)
        return
    from accelerate.state import AcceleratorState
    from pretended import PretendedDevice

    found = register()
    # Both ask where values lie in memory; of a GPU they get an answer.
    monkeypatch.setattr("huggingface_hub.serialization._torch.storage_ptr", id)
    monkeypatch.setattr("safetensors.torch._find_shared_tensors", lambda tensors: [])
    AcceleratorState._reset_state(reset_partial_state=True)
    # On a GPU a moved parameter stays the same object, so optimisers made before go on with it.
    torch.__future__.set_swap_module_params_on_conversion(True)
    with PretendedDevice():
        yield found
    torch.__future__.set_swap_module_params_on_conversion(False)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def closeness():
    """How near weights and figures must be to the CPU's; the pretended device computes as the CPU does."""
    return {"rtol": 0, "atol": 0} if PRETENDED else ROUNDED
