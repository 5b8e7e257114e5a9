"""Every library that the package imports is declared in pyproject.toml, every declared one is pinned."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def imported_packages():
    """Top-level names that the package imports, whether at the start of a module or inside a function."""
    for path in (ROOT / "gen_invariance").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.partition(".")[0]


def test_everything_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in lines}
    called = {"PIL": "pillow", "sklearn": "scikit_learn", "yaml": "pyyaml", "hydra": "hydra_core"}
    called |= {"imblearn": "imbalanced_learn"}
    others = set(imported_packages()) - set(sys.stdlib_module_names) - {"gen_invariance"}
    assert len(others) > 10
    assert {name for name in others if called.get(name, name).lower() not in declared} == set()


def test_everything_that_is_declared_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in lines} - {"gen_invariance"}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert names <= {name.lower().replace("-", "_") for name in pinned}
