"""Each command on another device than the CPU, beside itself on the CPU: the same files, figures and weights."""

from __future__ import annotations

import csv
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import ROUNDED, WARPED
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.utils._python_dispatch import _disable_current_modes

from gen_invariance.cli import main as cli
from gen_invariance.experiment import launch

pytestmark = pytest.mark.gpu

DATA = [
    "data=digits_rotation", "data.largest=40", "data.imbalance=8", "data.test_images=20", "data.few_below=10",
    "data.many_above=20",
]  # fmt: skip
FIT = ["fit", *DATA, "fit.steps=4", "fit.batch_size=8", "fit.log_every=1", "fit.sample_every=4", "progress=false"]
SMALL = ["translator.network={width: 4, residual_blocks: 1}", "translator.objective.discriminator_width=4"]
TRAIN = [
    "train",
    *DATA,
    "training.epochs=3",
    "training.warmup=0",
    "training.second_phase=1",
    "training.batch_size=64",
    "progress=false",
]
FITS = {
    "spatial": [],
    "pose": [],
    "redraw": [],
    "munit_small": SMALL,
    "flow": ["translator.network.width=8"],
}
TRAININGS = {
    "oracle": ["stage=oracle"],
    "randaugment": ["stage=randaugment"],
    "trivialaugment": ["method=trivialaugment"],
    "codes": ["stage=translator", "stage.translator=MUNIT"],
    "bank": ["stage=translator", "stage.translator=MUNIT", "training.stage_bank=2", "training.stage_bank_epochs=1"],
    "redraw": ["stage=translator", "stage.translator=REDRAW", "training.stage_source=batch"],
    "robust": ["stage=oracle", "training.worst_of=2", "training.consistency=0.5"],
    "crop": ["augmentation=crop_flip", "stage=oracle"],
    "average": ["training.average_decay=0.9", "training.accumulate=2"],
    "transfer": ["transfer=partial", "transfer.epochs_per_stage=1", "transfer.head_epochs=1"],
    "ldam_drs": ["method=ldam_drs"],
    "cmo": ["method=cmo"],
    "lws": ["method=lws"],
}
MORE = ("randaugment", "trivialaugment", "crop", "average", "ldam_drs", "cmo")
"""Of `TRAININGS`, what goes the way of others by another name."""
METHODS = (
    "balanced_softmax", "crt", "cutmix", "effective_number", "focal", "ldam_drw", "logit_adjustment",
    "logit_adjustment_posthoc", "mixup", "progressive", "remix", "tau_norm", "vector_scaling",
)  # fmt: skip


@pytest.fixture
def command(device, monkeypatch):
    """Carries out a command line on the CPU or on the device."""
    if device.type != "cuda":
        real = launch.choose_device
        for name, module in list(sys.modules.items()):
            if name.startswith("gen_invariance.") and getattr(module, "choose_device", None) is real:
                monkeypatch.setattr(module, "choose_device", lambda name: device if name == str(device) else real(name))

    def carry_out(line, out, *, where="cpu"):
        place = "cpu" if where == "cpu" else str(device)
        words = [f"out={out}"] if out else []
        # On the CPU nothing has to be pretended, which would only take time.
        with _disable_current_modes() if where == "cpu" else nullcontext():
            assert cli.run([*line, *words, f"device={place}"]) == 0

    return carry_out


@pytest.fixture(scope="session")
def translators(tmp_path_factory):
    """Fitted on the CPU, for trainings."""
    folder = tmp_path_factory.mktemp("fitted")
    for name, words in (("munit_small", SMALL), ("redraw", [])):
        assert cli.run([*FIT, f"translator={name}", *words, f"out={folder / name}", "device=cpu"]) == 0
    return {"MUNIT": folder / "munit_small", "REDRAW": folder / "redraw"}


def same(one: Path, two: Path, closeness: dict) -> int:
    """Compare weights and figures below two folders; how many files were compared."""
    compared = 0
    for path in sorted(path for path in one.rglob("*") if path.is_file()):
        other = two / path.relative_to(one)
        if path.parent.name == "records":  # named by chance, and as many as there are writers
            path, other = path.parent, other.parent
        if path.suffix == ".safetensors":
            weights, others = load_file(path), load_file(other)
            assert weights.keys() == others.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(others[name], weight, **closeness)
        elif path.name == "class_size.csv" and closeness["atol"]:
            assert other.exists(), f"{other} was not written"  # ranks of ten classes: one that moves is much
            continue
        elif path.is_dir() or path.suffix in (".csv", ".jsonl"):
            read = _csv if path.suffix == ".csv" else _jsonl
            compare_numbers(read(path), read(other), closeness, str(path))
        else:
            assert other.exists(), f"{other} was not written"
            continue
        compared += 1
    return compared


def compare_numbers(one: list[dict], two: list[dict], closeness: dict, where: str) -> None:
    """Figures agree; to rounding on any device, as a CPU measures in smaller batches than others.

    A share of the 20 test images of a class may move by two, whose two likeliest answers rounding can swap after a
    training this short.
    """
    timed = {"seconds", "fit_seconds", "train_seconds", "measure_seconds", "versions", "config_digest", "host", "time"}
    assert len(one) == len(two), where
    for row, other in zip(one, two, strict=True):
        for key in row.keys() - timed:
            if isinstance(row[key], int | float) and not isinstance(row[key], bool):
                is_share = any(word in f"{key} {row.get('metric', '')}" for word in ("accuracy", "agreement"))
                slack = 0.11 if is_share and closeness["atol"] else max(closeness["atol"], 1e-7)
                slack = 2 if Path(where).name == "confusion.csv" and closeness["atol"] else slack
                assert other[key] == pytest.approx(
                    row[key], rel=max(closeness["rtol"], 1e-5), abs=slack, nan_ok=True
                ), f"{where}: {key}"


def _jsonl(path: Path) -> list[dict]:
    files = path.glob("*.jsonl") if path.is_dir() else [path]
    return _in_order([json.loads(line) for file in files for line in file.read_text().splitlines()])


def _csv(path: Path) -> list[dict]:
    def number(text):
        try:
            return float(text)
        except (TypeError, ValueError):
            return text

    with path.open() as file:
        return _in_order([{key: number(value) for key, value in row.items()} for row in csv.DictReader(file)])


def _in_order(rows: list[dict]) -> list[dict]:
    """Without times, sorted by what names a row."""
    rows = [row for row in rows if not str(row.get("metric")).endswith("seconds")]
    names = ("step", "method", "metric", "class_index", "seed")
    return sorted(rows, key=lambda row: [str(row.get(name)) for name in names])


@pytest.mark.parametrize("name", FITS)
def test_fit(name, command, tmp_path, closeness):
    line = [*FIT, f"translator={name}", *FITS[name]]
    command(line, tmp_path / "cpu")
    command(line, tmp_path / "there", where="device")
    # MUNIT's decoder convolves, and flow attends, in other forms on a CPU.
    close = ROUNDED if name in ("munit_small", "flow") or closeness["atol"] else WARPED
    assert same(tmp_path / "cpu", tmp_path / "there", close) >= 2


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in TRAININGS if name not in MORE),
        *(pytest.param(name, marks=pytest.mark.slow) for name in (*MORE, *METHODS)),
    ],
)
def test_train_and_measure(name, command, tmp_path, closeness, translators):
    line = list(TRAIN)
    for word in TRAININGS.get(name, [f"method={name}"]):
        key, _, value = word.partition("=")
        line.append(f"{key}={translators.get(value, value)}")
    for where in ("cpu", "device"):
        command(line, tmp_path / where, where=where)
        command(["measure", f"run={tmp_path / where}", "draws=2"], None, where=where)
    close = ROUNDED if name in ("codes", "bank") else closeness
    assert same(tmp_path / "cpu", tmp_path / "device", close) >= 2


ORDER = [
    "order", "data.test_images=20", "order.count=2", "order.seeds=[0]", "order.source.epochs=1",
    "order.source.images_per_class=20", "order.analysis.resamples=100", "order.draws=2", "nuisance=rotation",
]  # fmt: skip
BENCHMARK = [
    "benchmark", "run", "benchmark=digits_rot_lt", "methods=[ce_drs,ce_drs+spatial]", "orders=0",
    "data_options.largest=40", "data_options.imbalance=8", "training_options.epochs=2", "training_options.warmup=0",
    "data_options.test_images=20", "fit_options.spatial.steps=5", "measure_options.draws=2",
]  # fmt: skip


def test_order(command, tmp_path, closeness):
    for where in ("cpu", "device"):
        command(ORDER, tmp_path / where, where=where)
    assert same(tmp_path / "cpu", tmp_path / "device", closeness) >= 2


def test_benchmark(command, tmp_path):
    for where in ("cpu", "device"):
        command(BENCHMARK, tmp_path / where, where=where)
    assert same(tmp_path / "cpu", tmp_path / "device", ROUNDED) >= 2  # `spatial` warps in another form on a CPU


@pytest.mark.parametrize("name", [pytest.param("MUNIT", marks=pytest.mark.slow), "REDRAW"])
def test_inspect(name, command, translators, tmp_path, closeness):
    line = ["inspect", *DATA, f"translator={translators[name]}", "inspect.judge_epochs=2", "inspect.draws=2",
            "inspect.budget=null"]  # fmt: skip
    found = []
    for where in ("cpu", "device"):
        command([*line, "inspect.max_images=20", "inspect.held_out=0.3"], tmp_path / where, where=where)
        figures = json.loads((tmp_path / where / "quality.json").read_text())["figures"]
        found.append([{key: figure["value"] for key, figure in sorted(figures.items())}])
    assert len(found[0][0]) > 5
    compare_numbers(*found, ROUNDED if name == "MUNIT" else closeness, "quality.json")


@pytest.mark.parametrize("name", ["MUNIT", "REDRAW"])
def test_augment(name, command, translators, tmp_path, closeness):
    images = load_digits().images * 15.9
    for number, count in ((0, 9), (1, 3)):
        folder = tmp_path / "in" / str(number)
        folder.mkdir(parents=True)
        for place in range(count):
            Image.fromarray(images[place * 10 + number].astype("uint8")).resize((16, 16)).save(folder / f"{place}.png")
    line = ["augment", "data=folder", f"data.path={tmp_path / 'in'}", "target=max", f"translator={translators[name]}"]
    for where in ("cpu", "device"):
        command(line, tmp_path / where, where=where)
    written = sorted(path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*.png"))
    assert len(written) >= 6
    for path in written:
        one, two = (np.asarray(Image.open(tmp_path / where / path), dtype=int) for where in ("cpu", "device"))
        assert np.abs(one - two).max() <= (1 if closeness["atol"] == 0 else 2)
