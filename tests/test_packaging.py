"""The wheel holds all it needs, and works from another folder with nothing of the checkout in reach."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "-w", folder, ROOT],
        check=True,
        cwd=folder,
        timeout=300,
    )
    (found,) = folder.glob("gen_invariance-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a command with the wheel's package in place of the checkout's."""
    target, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", target, wheel], check=True, timeout=300)

    def call(*words):
        environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *words],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    where = call("-c", "import gen_invariance; print(gen_invariance.__file__)").stdout.strip()
    assert Path(where).is_relative_to(target)
    call.elsewhere = elsewhere
    return call


def test_wheel_holds_configs_templates_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gen_invariance").rglob("*") if path.is_file()}
    assert len(configs) > 20
    assert {f"gen_invariance/{name}" for name in configs} <= names
    assert {name for name in package if "__pycache__" not in name} <= names
    assert any(name.endswith(".html.j2") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "benchmarks/", "studies/"))]


def test_help_and_settings(installed):
    for words in (["--help"], ["demo", "--cfg", "job"]):
        done = installed("-m", "gen_invariance.cli.main", *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert "demo" in done.stdout


def test_tiny_demo(installed):
    tiny = ["seeds=1", "epochs=2", "spatial_steps=2", "munit_steps=2", "control=false", "draws=1"]
    done = installed("-m", "gen_invariance.cli.main", "demo", "out=page", *(f"demo.{word}" for word in tiny))
    assert (done.returncode, done.stderr) == (0, "")
    assert "report: page/report/report.html" in done.stdout
    page = (installed.elsewhere / "page" / "report" / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
