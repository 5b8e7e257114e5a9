"""Fixtures every room uses: a seeded generator, and a small long-tailed set of real digits."""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell that starts the tests in the background makes them deaf to Ctrl-C, and with them all they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
