"""The guard in fresh interpreters, since it acts once, when it is first imported."""

import subprocess
import sys
import textwrap
from types import ModuleType

import pytest
import torch


def run_fresh(program):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300, check=False
    )


def check_fresh(program):
    done = run_fresh(program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchvision_and_diffusers_work_after_the_guard():
    out = check_fresh(
        """
        import gen_invariance.torchvision_guard as guard
        print(guard.declare_missing_operators(), len(guard._declared) <= 1)  # a second call does nothing
        from torchvision import models
        from diffusers import UNet2DModel
        print(sum(p.numel() for p in models.resnet18().parameters()), UNet2DModel.__name__)
        """
    )
    assert out.split() == ["False", "True", "11689512", "UNet2DModel"]


def test_without_the_guard_the_import_fails_beside_a_cpu_torch():
    """What the guard is for; where the compiled operators load (a CUDA build), there is nothing to show."""
    done = run_fresh("import torchvision")
    if done.returncode == 0:
        pytest.skip("torchvision's compiled operators load with this torch")
    assert "torchvision::nms does not exist" in done.stderr


@pytest.mark.parametrize("present", [("nms", "qnms"), ("nms",)])
def test_only_what_is_missing_is_declared(present):
    """Another package with the same repair came first: declaring twice would raise."""
    out = check_fresh(
        f"""
        import torch
        library = torch.library.Library("torchvision", "DEF")
        for name in {present}:
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import gen_invariance.torchvision_guard as guard
        print(bool(guard._declared), hasattr(torch.ops.torchvision, "nms"), hasattr(torch.ops.torchvision, "qnms"))
        """
    )
    assert out.split() in (["False" if len(present) == 2 else "True", "True", "True"], ["False", "True", "False"])


@pytest.fixture
def untouched(monkeypatch):
    """The guard as if nothing had been imported or declared; any declaration fails the test."""
    import gen_invariance.torchvision_guard as guard

    monkeypatch.setattr(guard, "_declared", [])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(guard, "_compiled_operators_load", lambda: False)
    monkeypatch.setattr(torch.library, "Library", None)
    return guard


def test_nothing_is_declared_once_torchvision_is_imported(untouched, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setattr(untouched, "_OPERATORS", ("one_that_is_missing",))
    assert untouched.declare_missing_operators() is False


def test_nothing_is_declared_where_the_compiled_operators_load(untouched, monkeypatch):
    monkeypatch.setattr(untouched, "_compiled_operators_load", lambda: True)
    monkeypatch.setattr(untouched, "_OPERATORS", ("one_that_is_missing",))
    assert untouched.declare_missing_operators() is False


def test_no_torchvision_means_nothing_to_repair(monkeypatch):
    import gen_invariance.torchvision_guard as guard

    monkeypatch.setattr(guard.importlib.util, "find_spec", lambda name: None)
    assert guard._compiled_operators_load()
