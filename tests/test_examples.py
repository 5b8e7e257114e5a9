"""The examples run, each in a folder of its own; those whose library is not installed are skipped."""

import importlib
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch

import gen_invariance.torchvision_guard  # noqa: F401

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "plain_pytorch": "torch",
    "accelerate_loop": "accelerate",
    "torchvision_v2": "torchvision",
    "kornia_sequential": "kornia",
    "timm_train": "timm",
    "imblearn_pipeline": "imblearn",
    "lightning_module": "lightning",
    "huggingface_trainer": "transformers datasets",
}


def test_every_example_is_listed():
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_example(name, tmp_path, monkeypatch):
    for library in NEEDS[name].split():
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with torch.random.fork_rng():
        torch.random.set_rng_state(torch.Generator().manual_seed(0).get_state())
        try:
            with warnings.catch_warnings():
                # What our own lines cause; libraries of others warn as they like.
                warnings.filterwarnings("error", message=".*requires_grad.*")
                value = importlib.import_module(name).main(tmp_path / "work")
        finally:
            sys.modules.pop(name, None)
    assert math.isfinite(value)
    if name == "kornia_sequential":
        assert value == 0
    if name == "imblearn_pipeline":
        assert value > 0.7
