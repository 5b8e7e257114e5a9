"""The rules of the house, read off the source: who may import whom, and what may not be written anywhere."""

import ast
import functools
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

import gen_invariance

PACKAGE = Path(gen_invariance.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = (
    "errors",
    "settings",
    "stopping",
    "devices",
    "torchvision_guard",
    "files",
    "run",
    "configs",
    "jobs",
    "stats",
    "data",
    "nuisance",
    "translator",
    "contrib",
    "augment",
    "export",
    "classifier",
    "measure",
    "referee",
    "records",
    "order",
    "report",
    "experiment",
    "benchmark",
    "cli",
)
LONG_MODULES: set[str] = set()
"""Modules that may pass 400 lines, with the reason in their docstring; nobody needs it yet."""


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node):
    """Every node below `node`, except what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from walk(child)


@functools.cache
def imports_of(path):
    """Dotted names of all imports, lazy ones too, and their lines, in the order they are written."""
    found = []
    for node in walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def test_the_package_was_found():
    assert len(MODULES) > 50
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__", "__main__"}
    assert found <= set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rooms_import_only_from_rooms_above_them(path):
    if path == PACKAGE / "__init__.py":
        pytest.skip("the front door names every room, lazily")
    own = ROOMS.index(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    for imported, line in imports_of(path):
        parts = imported.split(".")
        if parts[0] != "gen_invariance":
            continue
        assert len(parts) > 1, f"line {line}: a room may not import the package as a whole"
        assert ROOMS.index(parts[1]) <= own, f"line {line}: {imported} lies below {ROOMS[own]}"


def module_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def import_graph():
    """Module -> module, lazy imports too."""
    graph = nx.DiGraph()
    known = {module_of(path) for path in MODULES if path != PACKAGE / "__init__.py"}
    for path in MODULES:
        for imported, _ in imports_of(path):
            target = imported if imported in known else imported.rpartition(".")[0]
            if target in known and target != module_of(path):
                graph.add_edge(module_of(path), target)
    return graph


def test_no_module_imports_itself_through_others():
    assert [sorted(circle) for circle in nx.strongly_connected_components(import_graph()) if len(circle) > 1] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_may_not_be_written(path):
    for node in ast.walk(tree_of(path)):
        where = f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda" or ast.unparse(node.value) == "torch", f"{where}: .cuda"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "torch.load":
            weights_only = {key.arg: ast.unparse(key.value) for key in node.keywords}.get("weights_only")
            assert weights_only == "True", f"{where}: torch.load without weights_only=True"
        if called == "print":
            assert path.parent.name == "cli", f"{where}: print"
        if called in ("np.load", "numpy.load"):
            allowed = {key.arg: ast.unparse(key.value) for key in node.keywords}.get("allow_pickle", "False")
            assert allowed == "False", f"{where}: pickled arrays"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_libraries_that_have_one_place(path):
    for imported, line in imports_of(path):
        library = imported.split(".")[0]
        forbidden = library in ("pickle", "cPickle", "dill", "joblib") and imported != "pickle.UnpicklingError"
        assert not forbidden, f"line {line}: {imported}"
        if library in ("hydra", "omegaconf"):
            assert name_of(path) in ("configs.py",), f"line {line}: {library}"


LEADS_TO_TORCHVISION = ("torchvision", "diffusers", "timm", "peft")


def guarded():
    named = [path for path in MODULES if any(name in path.read_text("utf-8") for name in LEADS_TO_TORCHVISION)]
    return [path for path in named if any(name.split(".")[0] in LEADS_TO_TORCHVISION for name, _ in imports_of(path))]


def test_some_modules_need_the_guard():
    assert {"translator/munit/model.py", "classifier/backbones.py"} <= set(map(name_of, guarded()))


@pytest.mark.parametrize("path", guarded(), ids=name_of)
def test_the_guard_comes_first(path):
    lines = imports_of(path)
    guard = [line for name, line in lines if name.startswith("gen_invariance.torchvision_guard")]
    first = min(line for name, line in lines if name.split(".")[0] in LEADS_TO_TORCHVISION)
    assert guard, "import gen_invariance.torchvision_guard first"
    assert min(guard) < first, f"line {first} comes before the guard"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_length_and_docstring(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "say what the module is for"
    assert len(text.splitlines()) <= 400 or name_of(path) in LONG_MODULES


@pytest.mark.parametrize("name", gen_invariance.__all__)
def test_public_names_are_there_and_described(name):
    found = getattr(gen_invariance, name)
    assert inspect.isclass(found) or inspect.isfunction(found)
    assert found.__doc__
    assert found.__module__.startswith("gen_invariance.")


def test_public_names_live_where_the_front_door_says():
    for name, home in gen_invariance._HOMES.items():
        assert hasattr(importlib.import_module(f"gen_invariance.{home}"), name)
    assert sorted(gen_invariance.__all__) == gen_invariance.__all__ == dir(gen_invariance)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = gen_invariance.Nonsense


HEAVY = [
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "matplotlib",
    "diffusers",
    "kornia",
    "accelerate",
    "scipy",
    "sklearn",
]
SCHEMA = """
import sys
from gen_invariance.cli import main
from gen_invariance.cli.verbs import VERBS
assert all(verb.settings for verb in VERBS.values())
"""
BEFORE_WORK = {
    "import of the package": "import sys, gen_invariance, gen_invariance.cli.main; assert 'hydra' not in sys.modules",
    "settings classes": SCHEMA,
    "a misspelt key": SCHEMA + "assert main.run(['train', 'trainning.epochs=3']) == 2",
    "--cfg job": SCHEMA + "assert main.run(['train', '--cfg', 'job']) == 0",
    "--help": SCHEMA + "assert [main.run([verb, '--help']) for verb in VERBS] == [0] * len(VERBS)",
}


@pytest.mark.parametrize("program", BEFORE_WORK.values(), ids=BEFORE_WORK)
def test_nothing_heavy_is_imported_before_work_begins(program):
    program += f"\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
