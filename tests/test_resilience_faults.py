"""Faults that are not the program's: full and read-only disks, files that vanish, too little memory, a dead process."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from gen_invariance import errors
from gen_invariance.cli.main import run
from gen_invariance.errors import RunError, SettingsError, is_device_failure, is_out_of_memory
from gen_invariance.experiment import evaluate as measuring
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings
from gen_invariance.nuisance.geometry import Rotation

SLOW = pytest.mark.slow
DATA = ["data=digits_rotation", "data.largest=24", "data.imbalance=4", "data.few_below=8", "data.many_above=16"]
SLIM = ["fit.batch_size=4", "translator.objective.discriminator_width=4", "fit.log_every=1"]
COMMANDS = {
    "fit": ["fit", *DATA, *SLIM, "fit.steps=24", "fit.checkpoint_every=2", "fit.sample_every=12"],
    "train": ["train", *DATA, "training.epochs=8", "training.warmup=0", "training.checkpoint_every=1"],
    "augment": ["augment", "data=folder", "target=40", "batch_size=4"],
}


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "fit"
    assert run(["fit", *DATA, *SLIM, "fit.steps=1", f"out={out}"]) == 0
    return out


def photos(root):
    noise = np.random.default_rng(0)
    for name, count in (("cat", 9), ("dog", 4)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(noise.integers(0, 256, (16, 16), np.uint8)).save(root / name / f"{number}.png")
    return root


def one_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("gen-invariance: ")
    return lines[0]


# ---- a disk that fills up, or becomes read-only, in the middle of a run; then it is put right


@contextlib.contextmanager
def small_disk(place, size):
    """A file system of so many kilobytes; skips the test where nobody may mount one."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small file system needs rights that this user does not have")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True, capture_output=True)


def contents(out):
    """The bytes of everything whose bytes are promised; a run keeps its command line in run.json."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "run.json"]
    last = max((path.name for path in files if path.suffix == ".ckpt"), default=None)
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in files
        if path.suffix != ".ckpt" or path.name == last
    }


def line_of(verb, tmp_path, fitted):
    more = [f"translator={fitted}", f"data.path={photos(tmp_path / 'photos')}"] if verb == "augment" else []
    return [*COMMANDS[verb], *more]


@pytest.mark.parametrize(
    ("verb", "size"), [("fit", 120), ("fit", 40), ("train", 700), ("train", 100), ("augment", 100)]
)
def test_a_full_disk_then_space_again(verb, size, tmp_path, fitted, capsys):
    line = line_of(verb, tmp_path, fitted)
    assert run([*line, f"out={tmp_path / 'whole'}"]) == 0
    with small_disk(tmp_path / "disk", size) as disk:
        capsys.readouterr()
        assert run([*line, f"out={disk / 'out'}"]) == 2
        error = one_line(capsys)
        assert "No space left" in error
        assert "free some space" in error
        remount(disk, "size=50m")
        assert run([*line, f"out={disk / 'out'}", "resume=true"]) == 0
        assert contents(disk / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("verb", [pytest.param("fit", marks=SLOW), pytest.param("train", marks=SLOW), "augment"])
def test_a_disk_that_becomes_read_only(verb, tmp_path, fitted, capsys, monkeypatch):
    line = line_of(verb, tmp_path, fitted)
    assert run([*line, f"out={tmp_path / 'whole'}"]) == 0
    renames, replace = iter(range(10**6)), os.replace

    def locked(source, target):
        if next(renames) >= 5:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), source, None, target)
        return replace(source, target)

    monkeypatch.setattr(os, "replace", locked)
    capsys.readouterr()
    assert run([*line, f"out={tmp_path / 'out'}"]) == 2
    assert "Read-only file system" in one_line(capsys)
    monkeypatch.undo()
    assert run([*line, f"out={tmp_path / 'out'}", "resume=true"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("verb", ["fit", pytest.param("augment", marks=SLOW)])
def test_a_read_only_folder(verb, tmp_path, fitted, capsys):
    line = line_of(verb, tmp_path, fitted)
    with small_disk(tmp_path / "disk", 100) as disk:
        remount(disk, "ro")
        capsys.readouterr()
        assert run([*line, f"out={disk / 'out'}"]) == 2
        assert "Read-only file system" in one_line(capsys)


# ---- files that vanish


class Thief(Rotation):
    """Takes an original away when the first batch is turned."""

    def __init__(self, file):
        super().__init__(30)
        self.file = str(file)

    def apply(self, images, draw):
        if os.path.exists(self.file):
            os.unlink(self.file)
        return super().apply(images, draw)


def test_an_original_that_vanishes_is_named_and_the_rest_is_written(tmp_path):
    root = photos(tmp_path / "photos")
    settings = ExportSettings(target=12, batch_size=2, off_distribution=None)
    summary = export_dataset(open_format("folder", root), Thief(root / "dog" / "3.png"), tmp_path / "out", settings)
    assert summary.after == (12, 12)
    assert {source for source, _ in summary.problems} == {"dog/3.png"}
    assert all("No such file" in reason for _, reason in summary.problems)
    assert (tmp_path / "out" / "dog" / "3.png").is_file()  # it had been taken over before
    with pytest.raises(SettingsError, match="images were added, removed or renamed"):
        export_dataset(open_format("folder", root), Rotation(30), tmp_path / "out", settings, resume=True)


def test_originals_that_all_vanish_end_in_a_line(tmp_path, fitted, capsys, monkeypatch):
    root = photos(tmp_path / "photos")
    listed = open_format

    def then_gone(*arguments, **options):
        data = listed(*arguments, **options)
        entries = data.entries()
        data.entries = lambda: entries
        shutil.rmtree(root)
        return data

    monkeypatch.setattr("gen_invariance.experiment.augment.open_format", then_gone)
    assert run(["augment", f"data.path={root}", f"translator={fitted}", f"out={tmp_path / 'out'}"]) == 2
    assert "no image that can be used" in one_line(capsys)


# ---- memory

MESSAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]


@pytest.mark.parametrize("error", MESSAGES, ids=lambda error: type(error).__name__)
def test_what_counts_as_out_of_memory(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "train"
    assert run([*COMMANDS["train"], f"out={out}"]) == 0
    return out


@pytest.mark.parametrize("error", MESSAGES[:1], ids=lambda error: type(error).__name__)
def test_measuring_halves_its_batch(error, trained, tmp_path, monkeypatch, capsys):
    whole, small = (shutil.copytree(trained, tmp_path / name) for name in ("whole", "small"))
    measuring.measure_run(measuring.MeasureRun(run=str(whole), draws=1))
    original, tried = measuring.measure_invariance, []

    def greedy(*arguments, batch_size, **options):
        tried.append(batch_size)
        if batch_size > 200:
            raise error
        return original(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(measuring, "measure_invariance", greedy)
    assert run(["measure", f"run={small}", "draws=1", "batch_size=512"]) == 0
    assert tried == [512, 256, 128]
    assert "warning: out of memory; measuring with batch_size=128 instead" in capsys.readouterr().err
    found, expected = (
        json.loads((folder / "measures" / "data" / "figures.json").read_text()) for folder in (small, whole)
    )
    assert found == pytest.approx(expected, nan_ok=True, abs=1e-6)


def test_no_memory_even_for_one_image_is_one_line(trained, monkeypatch, capsys):
    def greedy(*arguments, **options):
        raise MESSAGES[0]

    monkeypatch.setattr(measuring, "predict_logits", greedy)
    assert run(["measure", f"run={trained}", "batch_size=2"]) == 1
    assert "out of memory" in one_line(capsys)


class Greedy(Rotation):
    def apply(self, images, draw):
        raise MESSAGES[1]


def test_an_export_without_memory_says_what_to_set(tmp_path):
    form = open_format("folder", photos(tmp_path / "photos"))
    with pytest.raises(RunError, match="ran out of memory at a batch of 4; lower batch_size"):
        export_dataset(form, Greedy(30), tmp_path / "out", ExportSettings(target=20, batch_size=4))


class Lost(Rotation):
    def apply(self, images, draw):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")


def test_an_export_on_a_device_that_failed_rejects_no_picture(tmp_path):
    form = open_format("folder", photos(tmp_path / "photos"))
    with pytest.raises(RunError, match=r"cpu failed .CUDA error: an illegal memory access.*resume=true") as found:
        export_dataset(form, Lost(30), tmp_path / "out", ExportSettings(target=20, batch_size=4))
    assert is_device_failure(found.value.__cause__)
    assert not is_device_failure(RuntimeError("Padding size should be less than the corresponding input dimension"))
    assert not any("generated" in path.read_text() for path in (tmp_path / "out").rglob("*.jsonl"))


def test_a_judge_without_memory_says_what_to_set(tmp_path):
    def judge(images):
        raise MESSAGES[0]

    form = open_format("folder", photos(tmp_path / "photos"))
    with pytest.raises(RunError, match="ran out of memory at a batch of 4; lower batch_size"):
        export_dataset(form, Rotation(30), tmp_path / "out", ExportSettings(target=20, batch_size=4), predict=judge)


def test_errors_that_are_not_about_memory_stay(trained, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a defect")

    monkeypatch.setattr(measuring, "predict_logits", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run(["measure", f"run={trained}"])
    assert errors.first_line(RuntimeError("a\nb")) == "a"


# ---- a process that dies beside another


def two_processes(words):
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    common["MASTER_PORT"] = str(20000 + (os.getpid() * 11 + 5) % 20000)
    return [
        subprocess.Popen(
            [sys.executable, "-m", "gen_invariance.cli.main", *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "fit"])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_is_killed(verb, victim, tmp_path):
    out = tmp_path / "run"
    longer = {"train": ["training.epochs=4000"], "fit": ["fit.steps=40000"]}[verb]
    words = [*COMMANDS[verb], *longer, "device=cpu", f"out={out}"]
    processes = two_processes(words)
    end = time.monotonic() + 240
    while not list(out.glob("checkpoints/*.ckpt")):
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), [each.communicate() for each in processes]
        time.sleep(0.05)
    processes[victim].send_signal(signal.SIGKILL)
    processes[victim].communicate()
    _, error = processes[1 - victim].communicate(timeout=120)
    lines = [line for line in error.splitlines() if line.startswith("gen-invariance: ")]
    assert processes[1 - victim].returncode == 1, error
    assert lines == [
        "gen-invariance: another process of this run died; the same command with resume=true goes on from the last "
        "checkpoint"
    ]
    assert "Traceback" not in error
    shorter = {"train": "training.epochs=1", "fit": "fit.steps=1"}[verb]
    goes_on = ["resume=true", "allow_changed_settings=true"]
    assert run([*COMMANDS[verb], shorter, "device=cpu", f"out={out}", *goes_on]) == 0
