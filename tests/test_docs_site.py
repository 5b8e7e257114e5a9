"""The documentation site builds without a warning, needs no other host, and its reference leaves nothing out."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gen_invariance

ROOT = Path(__file__).parent.parent
ROOMS = (
    *("data", "nuisance", "translator", "augment", "export", "classifier", "measure", "order", "report", "experiment"),
    *("benchmark", "contrib"),
)
BUILD = "import gc; gc.disable(); from mkdocs.__main__ import cli; cli()"
"""What `python -m mkdocs` does, without looking for garbage that is little."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings_handlers")):
        pytest.skip("needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "build", "--strict", "-d", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_built(site):
    pages = sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))
    assert len(pages) >= 20
    # mkdocs makes an index of a README.
    built = [page.with_stem("index") if page.stem == "README" else page for page in pages]
    assert not [page for page in built if not (site / page).with_suffix(".html").is_file()]


def test_nothing_is_loaded_from_another_host(site):
    source = r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:|//)"
    link = r"<link[^>]*rel=[\"']?(?:stylesheet|preconnect|icon)[^>]*href=[\"']?(?:https?:|//)"
    pages = list(site.rglob("*.html"))
    assert pages
    assert not [page for page in pages if re.search(f"{source}|{link}", page.read_text(encoding="utf-8"))]
    styles = list(site.rglob("*.css"))
    assert styles
    assert not [sheet for sheet in styles if re.search(r"url\([\"']?(https?:|//)|@import", sheet.read_text("utf-8"))]


def test_the_search_shows_pages_in_prose_first(site):
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    boost = {}
    for entry in found:
        boost.setdefault(entry["location"].partition("/")[0].partition("#")[0], set()).add(entry.get("boost", 1))
    assert max(boost.pop("reference")) < min(boost.pop("results")) < 1
    assert set().union(*boost.values()) == {1}


def test_every_public_name_has_its_place_in_the_reference(site):
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    assert len(gen_invariance.__all__) > 20
    for name in gen_invariance.__all__:
        assert re.search(rf"<a [^>]*href=\"?[\w.#]*{name}\"?[^>]*><code>{name}</code>", page), name


def test_what_is_not_public_is_said_to_be_private(site):
    page = (site / "reference" / "augment.html").read_text(encoding="utf-8")
    assert "Public on this page" in page
    assert "private" in (site / "reference" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_holds_every_module(site, room):
    page = (site / "reference" / f"{room}.html").read_text(encoding="utf-8")
    files = [path for path in (ROOT / "gen_invariance" / room).rglob("*.py") if path.name != "__init__.py"]
    assert files
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    assert not [name for name in names if f'id="{name}"' not in page and f"id={name}" not in page]


def test_parameters_that_share_a_line_are_taken_apart():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("grouped", ROOT / "scripts" / "docs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "Size.\n\nArgs:\n    high, wide: of it,\n        in pixels.\n    deep: too.\n\nReturns:\n    a, b: both."
    assert module.separated(text) == (
        "Size.\n\nArgs:\n    high: of it,\n        in pixels.\n    wide: of it,\n        in pixels.\n    deep: too.\n\n"
        "Returns:\n    a, b: both."
    )
