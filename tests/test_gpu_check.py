"""The check for a GPU host, dry, on a CPU: its stages run on today's code, and one that fails leaves the rest."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu.__main__ import LIMITS, main, table, why_not

ROOT = Path(__file__).resolve().parents[1]


def check(out, *words):
    line = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "device=cpu", "tiny=true", f"out={out}", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_a_stage_that_fails_stops_no_other(tmp_path):
    done = check(tmp_path, "stages=cifar,info", "total=10000", f"data={tmp_path / 'none'}")
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert stages["info"]["ended"] == "done"
    assert stages["info"]["result"]["torch"]
    assert "no cifar10.npz" in stages["cifar"]["ended"]
    assert "## info: done" in (tmp_path / "table.txt").read_text()


def test_unknown_words_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^unknown stage infos; choose of info, "):
        main(SimpleNamespace(stages=("infos",), out=tmp_path, total=1.0))


def test_what_is_left_out_and_why(tmp_path):
    given = SimpleNamespace(stages=(), data=tmp_path)
    (tmp_path / "cifar10.npz").touch()
    assert why_not("info", given, {}, 500) is None
    assert why_not("info", given, {}, 5) == "no time left"
    expected = {"cifar": {"result": {"200 epochs, estimated seconds": 90.0}}}
    assert why_not("cifar_full", given, expected, 120) is None
    assert "90 s are expected and 95 s left" in why_not("cifar_full", given, expected, 95)
    assert why_not("steps", SimpleNamespace(stages=("info",), data=tmp_path), {}, 500) == ""
    assert all(most > least for most, least in LIMITS.values())
    assert table({"info": {"ended": "done", "seconds": 2.0, "result": {"a": {"ms": 1.23456, "places": ["x"]}}}}) == (
        "## info: done, 2 s\n  a: {'ms': 1.235}\n"
    )


@pytest.mark.slow
def test_all_stages_run_on_a_cpu(tmp_path):
    done = check(tmp_path, "total=10000", "data=none")
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    log = (tmp_path / "log.txt").read_text()[-3000:]
    assert done.returncode == 0, log
    for name, about in stages.items():
        if not name.startswith("cifar"):
            assert about["ended"] == "done", (name, about, log)
    assert stages["tests"]["result"]["exit"] == 0
    assert stages["steps"]["result"]["redraw"]["over_bare"] > 0
    assert stages["fits"]["result"]["munit"]["ms"] > 0
    assert stages["k49"]["result"]["exit"] == 0
