"""Fixtures every room uses, and how the tests of a process begin: nothing here imports torch before they are collected.

The process that only shares the tests out between two others needs no torch.
"""

import gc
import os
import signal

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
gc.disable()  # while all is imported: a quarter of that time went into looking for garbage in what stays

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell that starts the tests in the background makes them deaf to Ctrl-C, and with them all they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """First the tests that fork to pretend a device: it has to be there before a process's first backward pass."""
    items.sort(key=lambda item: item.path.name != "test_devices.py")


def pytest_collection_finish():
    import torch

    from gen_invariance import torchvision_guard  # noqa: F401  tests import torchvision, too

    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through again
    gc.enable()


@pytest.fixture
def generator():
    import torch

    return torch.Generator().manual_seed(0)
