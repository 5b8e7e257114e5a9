"""`kill -9` of fit or train at any step, then the same command with resume=true: the same final weights."""

import json
import random
import signal
import time

import pytest
import torch
from forked import ForkedCommand
from safetensors.torch import load_file

from gen_invariance.cli.main import run
from gen_invariance.files import load_checkpoint

DATA = ["data=digits_rotation", "data.test_images=5", "data.largest=40", "data.imbalance=8", "data.few_below=10",
        "data.many_above=20"]  # fmt: skip
PACE = ["fit.log_every=1", "fit.checkpoint_every=3", "fit.sample_every=4", "fit.batch_size=8"]
TINY = ["translator.network={width: 4, residual_blocks: 1}", "translator.objective.discriminator_layers=2"]
COMMANDS = {
    "train": ["train", *DATA, "stage=oracle", "training.epochs=16", "training.checkpoint_every=3"],
    "spatial": ["fit", *DATA, *PACE, "fit.steps=60"],
    "munit": ["fit", *DATA, *PACE, "fit.steps=40", "translator=munit_small", *TINY],
}


def start(arguments, out, *more):
    return ForkedCommand([*arguments, f"out={out}", *more])


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(process, out, step):
    """SIGKILL as soon as `step` more lines of metrics are written; returns whether it came in time."""
    before, end = lines_in(out / "metrics.jsonl"), time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        if lines_in(out / "metrics.jsonl") >= before + step:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def weights_of(out):
    """The final weights, by name."""
    if (out / "translator").is_dir():
        return load_file(out / "translator" / "diffusion_pytorch_model.safetensors")
    last = max((out / "checkpoints").iterdir())
    return load_checkpoint(last)["model"]


def check_same(out, whole):
    left, right = weights_of(out), weights_of(whole)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in right)
    rows, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (out, whole)
    )
    assert rows == expected
    assert [file for file in out.rglob("*") if file.name.endswith(".tmp") and file.parent != out / "checkpoints"] == []


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("train", 1),
        pytest.param("train", 3, marks=pytest.mark.slow),
        pytest.param("spatial", 3, marks=pytest.mark.slow),
        pytest.param("munit", 3, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(name, kills, tmp_path):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    moments, in_time = random.Random(name), 0
    for attempt in range(kills):
        process = start(COMMANDS[name], out, *(["resume=true"] if attempt else []))
        in_time += kill_at(process, out, moments.randint(1, 9 // kills))
    assert run([*COMMANDS[name], f"out={out}", "resume=true"]) == 0
    assert run([*COMMANDS[name], f"out={whole}"]) == 0
    assert in_time == kills
    check_same(out, whole)


def test_killed_before_its_first_checkpoint(tmp_path):
    """`resume=true` also works where nothing was saved yet, and where there is no run at all."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    short = ["fit", *DATA, "fit.steps=3", "fit.batch_size=4", "fit.log_every=1"]
    assert run([*short, f"out={whole}", "resume=true"]) == 0
    out.mkdir()
    (out / "run.json").write_bytes((whole / "run.json").read_bytes())
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo')
    assert run([*short, f"out={out}", "resume=true"]) == 0
    check_same(out, whole)
