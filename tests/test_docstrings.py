"""The examples in docstrings say what really comes out."""

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gen_invariance"
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


NEEDS = {"gen_invariance.augment.sampler": "imblearn", "gen_invariance.measure.metric": "torchmetrics"}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_there_are_examples():
    assert len(FILES) > 20


@pytest.mark.parametrize("name", [module_name(path) for path in FILES])
def test_examples_of_a_module(name, monkeypatch, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0
