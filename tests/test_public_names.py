"""Public names: each can be imported, has types, an example that runs, and is all that the examples use."""

import ast
import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest

import gen_invariance

ROOT = Path(gen_invariance.__file__).parent.parent
STUB = Path(gen_invariance.__file__).with_suffix(".pyi")
NAMES = gen_invariance.__all__
PROMISED = {
    *("fit_translator", "load_translator", "inspect_translator", "TailAugment", "KorniaNuisance", "policy"),
    *("export_dataset", "build_classifier", "TransferPlan", "TrainSettings", "fit_classifier", "measure_accuracy"),
    *("measure_invariance", "compare_invariance", "run_order", "run_benchmark", "load_records", "write_report"),
}


def stubbed():
    """Home and name of each import of the stub."""
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names), "only X as X is exported by a stub"
            yield from ((alias.name, node.module) for alias in node.names)


def test_what_was_promised_is_there():
    assert set(NAMES) >= PROMISED


def test_the_stub_names_what_is_imported_from_where():
    homes = {name: f"gen_invariance.{home}" for name, home in gen_invariance._HOMES.items()}
    assert dict(stubbed()) == homes


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_what_the_stub_says(name):
    namespace = {}
    exec(f"from gen_invariance import {name}", namespace)
    home = dict(stubbed())[name]
    assert namespace[name] is getattr(importlib.import_module(home), name)


def signature_of(found):
    """The parameters that a caller gives, without `self`."""
    parameters = list(inspect.signature(found.__init__ if inspect.isclass(found) else found).parameters.values())
    return parameters[1:] if inspect.isclass(found) else parameters


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_types(name):
    found = getattr(gen_invariance, name)
    if inspect.isclass(found) and ("__init__" not in vars(found) or getattr(found, "_is_protocol", False)):
        return  # an error, or a protocol
    source = inspect.unwrap(found.__init__ if inspect.isclass(found) else found)
    missing = [p.name for p in signature_of(found) if p.annotation is inspect.Parameter.empty]
    assert not missing or hasattr(found, "__pydantic_fields__")
    if inspect.isfunction(found):
        assert "return" in source.__annotations__


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example(name):
    """`test_docstrings.py` runs it."""
    assert ">>> " in getattr(gen_invariance, name).__doc__


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_import_public_names_only(path):
    used = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gen_invariance"):
            assert node.module == "gen_invariance", f"line {node.lineno}: {node.module} is private"
            used += [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("gen_invariance.")]
    assert set(used) <= set(NAMES)


def test_there_are_types_where_callers_look():
    assert typing.get_type_hints(gen_invariance.measure_accuracy)["num_classes"] == int | None
    assert re.search(r"Typing :: Typed", (ROOT / "pyproject.toml").read_text())
    assert (ROOT / "gen_invariance" / "py.typed").exists()
