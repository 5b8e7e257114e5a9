"""What each path asks of a GPU, counted on the pretended device: nothing waits in a step, and little is launched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("bare", "redraw")


def count(tmp_path, paths):
    out = tmp_path / "counts.json"
    line = [sys.executable, "-W", "ignore", "-m", "benchmarks.waits", f"out={out}", f"paths={','.join(paths)}"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def check_stage(counts, names):
    for name in names:
        row = counts[name]
        assert row["waits"] == 0, (name, row["lines"])
        assert row["operations"] <= 0.1 * counts["bare"]["operations"], (name, row)
        assert row.get("growth", 0.0) < 0.01, (name, row)


def test_the_default_stage_makes_no_step_wait(tmp_path):
    counts = count(tmp_path, QUICK)
    assert counts["bare"]["waits"] == 0
    check_stage(counts, QUICK[1:])


@pytest.mark.slow
def test_no_path_waits_in_a_step(tmp_path):
    counts = count(tmp_path, ())
    measures = {name for name in counts if name.startswith("eKLD")}
    whole = {name for name in counts if name.startswith(("inspect", "augment"))}
    for name in counts.keys() - measures - whole:
        assert counts[name]["waits"] == 0, (name, counts[name]["lines"])
    for name in measures:  # once a round of draws, whatever the number of images
        assert counts[name]["waits"] <= 0.25, (name, counts[name]["lines"])
    pairs = (("inspect on 60 images", "inspect on 120 images", 80), ("augment 8 images", "augment 16 images", 6))
    for few, many, most in pairs:
        assert counts[few]["waits"] == counts[many]["waits"] <= most, counts[many]["lines"]
    stages = ("rotation", "spatial", "pose", "redraw", "munit with codes kept", "thickness", "bank of spatial")
    check_stage(counts, stages)


def test_waits_are_seen():
    """What the tests above rest on."""
    program = """
import torch
from tests.devices.pretended import Count, PretendedDevice, register
device = register()
def waits(function):
    with Count() as count:
        function()
    return count.waits
with PretendedDevice():
    there, here = torch.ones(3, device=device), torch.ones(3)
    square = torch.eye(2, device=device)[None]
    print(waits(lambda: there.sum().item()), waits(lambda: bool(there.any())), waits(lambda: there.cpu()),
          waits(lambda: here.to(device)), waits(lambda: there.nonzero()), waits(lambda: there[there > 0]),
          waits(lambda: torch.tensor([1.0], device=device)), waits(lambda: torch.linalg.eigh(square)),
          waits(lambda: there[torch.tensor([0])]), waits(lambda: there.unique()), "|",
          waits(lambda: here.to(device, non_blocking=True)), waits(lambda: there + 1),
          waits(lambda: torch.where(there > 0, there, 0.0)), waits(lambda: there.sort()))
    with Count() as count:
        (there + 1).view(3, 1).mul(2)
    print(count.operations)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    before, after = done.stdout.splitlines()[0].split("|")
    assert all(int(number) >= 1 for number in before.split()), done.stdout + done.stderr
    assert after.split() == ["0"] * 4
    assert done.stdout.splitlines()[1] == "2"
