"""The stages but `variants`: the package's own loops, commands and tests, timed on a device."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, schedule

import gen_invariance as gi
from benchmarks.gpu.host import ESTIMATE, Host, describe
from benchmarks.gpu.variants import variants
from benchmarks.timing import stored
from gen_invariance.classifier import train
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.cli import main as cli
from gen_invariance.nuisance.geometry import CropFlip
from gen_invariance.run import named_generator, package_versions
from gen_invariance.translator import fit
from gen_invariance.translator.flow.model import FlowTranslator
from gen_invariance.translator.munit.model import MunitTranslator
from gen_invariance.translator.redraw import fit as redraw_fit
from gen_invariance.translator.redraw.model import RedrawTranslator
from gen_invariance.translator.redraw.pose import PoseTranslator
from gen_invariance.translator.settings import FitSettings


def info(host: Host) -> None:
    """Versions, latencies and rates."""
    for name, version in package_versions().items():
        host.note(name, version)
    if not host.is_cuda:
        return
    host.note("device", torch.cuda.get_device_name(0))
    host.note("cudnn", torch.backends.cudnn.version())
    small, cpu = torch.zeros(128, device=host.device), torch.zeros(128)
    pinned = cpu.pin_memory()
    calls: dict[str, tuple[Any, int]] = {
        "launch_us": (lambda: small.add_(1), 5000),
        "item_us": (lambda: small[0].item(), 500),
        "copy_that_waits_us": (lambda: cpu.to(host.device), 500),
        "copy_from_pinned_us": (lambda: pinned.to(host.device, non_blocking=True), 500),
        "pin_and_copy_us": (lambda: cpu.pin_memory().to(host.device, non_blocking=True), 500),
    }
    for name, (call, repeats) in calls.items():
        host.seconds(call, 20)
        host.note(name, 1e6 * host.seconds(call, repeats))
    big = torch.empty(2**28, device=host.device)
    other = torch.empty_like(big)
    host.note("copy_tb_s", 2 * big.numel() * 4 / host.seconds(lambda: other.copy_(big), 20) / 1e12)


def nuisances() -> dict[str, Any]:
    """What the stage gives in `steps`; unfitted, which costs the same."""
    strokes = RedrawTranslator(3)
    strokes.log_width.copy_(torch.linspace(0, math.log(4), len(strokes.log_width)))
    return {
        "rotation": gi.Rotation(), "spatial": gi.SpatialTranslator(3, start=0.3), "pose": PoseTranslator(3),
        "redraw": RedrawTranslator(3, ("tone", "colour", "sharpness"), "photo"), "redraw, figures": strokes,
        "munit_small": MunitTranslator(3, width=16, residual_blocks=2), "munit": MunitTranslator(3),
        "flow": FlowTranslator(3), "randaugment": gi.RandAugment(),
    }  # fmt: skip


class _EnoughError(Exception):
    """The steps that were wanted are done."""


def time_steps(host: Host, *, nuisance: Any = None, channels: int = 3, recorder: Any = None, **options: Any) -> dict:
    """Milliseconds of a step of `fit_classifier`, on the wall and of the host, and its waits; then it is broken off."""
    found: dict[str, Any] = {}
    warm, steps = host.pick(70, 1), host.pick(70, 2)  # a block of staged steps is warm by then
    marks, original = {"at": 0}, train._State.set_rates

    def set_rates(self: Any, factor: float) -> None:
        number = marks["at"]
        marks["at"] += 1
        if recorder is not None:
            recorder.step()
        if number == warm:
            host.wait()
            marks["started"] = time.perf_counter()
        if number == warm + steps:
            host_seconds = time.perf_counter() - marks["started"]
            host.wait()
            found["ms"] = 1e3 * (time.perf_counter() - marks["started"]) / steps
            found["host_ms"] = 1e3 * host_seconds / steps  # about equal to ms: the host is the bottleneck
            if host.is_cuda:
                found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
                torch.cuda.set_sync_debug_mode("warn")
        if number == warm + steps + 4:
            if host.is_cuda:
                torch.cuda.set_sync_debug_mode("default")
            raise _EnoughError
        original(self, factor)

    batch = host.pick(128, 8)
    data = stored(host.pick(20_000, 8 * 10), host.device, channels, 32 if channels == 3 else 28)
    stage = None if nuisance is None else gi.TailAugment(nuisance, torch.full((data.num_classes,), 0.25))
    name = options.pop("backbone", "resnet32")
    model = gi.build_classifier(name, num_classes=data.num_classes, channels=channels)
    augmentation = options.pop("augmentation", None)
    train._State.set_rates = set_rates
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            how = TrainSettings(epochs=200, batch_size=batch, **options)
            train.fit_classifier(model, data, how, stage=stage, augmentation=augmentation, progress=False)
    except _EnoughError:
        pass
    finally:
        train._State.set_rates = original
    waits = [each for each in caught if "called a synchronizing" in str(each.message).lower()]
    found["waits"] = len(waits) / 4
    found["places"] = sorted({f"{Path(each.filename).name}:{each.lineno}" for each in waits})
    return found


def steps(host: Host) -> None:
    """The step without a stage and with each nuisance; ratios are to the bare step beside it."""
    given = nuisances()
    if host.tiny:
        given = {name: given[name] for name in ("spatial", "redraw")}
    bare = time_steps(host)
    host.note("bare", bare)

    def note(name: str, base: dict = bare, **options: Any) -> dict:
        try:
            row = time_steps(host, **options)
            row["over_bare"] = row["ms"] / base["ms"]
        except Exception as error:  # one nuisance that fails stops no other
            row = describe(error)
        host.note(name, row)
        return row

    for name, nuisance in given.items():
        note(name, nuisance=nuisance)
    note("bare, in the middle")
    note("bank of spatial", nuisance=given["spatial"], stage_bank=2)
    cropped = note("crop_flip", augmentation=CropFlip())
    if not host.tiny:
        note("spatial behind crop_flip", cropped, nuisance=given["spatial"], augmentation=CropFlip())
        note("average_decay", average_decay=0.99)
        note("bf16", mixed_precision="bf16")
        note("resnet20, 28 x 28, grey", backbone="resnet20", channels=1)
        note("bare, at the end")


def fits(host: Host) -> None:
    """Milliseconds of a step of fitting each translator, by the package's own loops."""
    count, data = host.pick(60, 6), stored(host.pick(2000, 60), host.device)
    tiny = {"width": 4, "residual_blocks": 1, "mlp_width": 8}
    cases: list[tuple[str, str, dict, int, str]] = [
        ("spatial", "spatial", {}, 64, "no"),
        ("munit_small", "munit", host.pick({"width": 16, "residual_blocks": 2}, tiny), 16, "no"),
        ("munit", "munit", host.pick({}, tiny), 16, "no"), ("munit, bf16", "munit", host.pick({}, tiny), 16, "bf16"),
        ("flow", "flow", host.pick({}, {"width": 8}), 32, "no"), ("pose", "pose", {}, 64, "no"),
    ]  # fmt: skip
    for name, kind, network, batch, precision in cases if not host.tiny else [cases[0], cases[2], cases[5]]:
        hooked, attribute = (redraw_fit, "move_by") if kind == "pose" else (fit, "draw_images")
        stamps, original = [], getattr(hooked, attribute)

        def called(*given: Any, stamps: list = stamps, original: Any = original, **options: Any) -> Any:
            if len(stamps) in (count // 3, count - 1):
                host.wait()
            stamps.append(time.perf_counter())
            return original(*given, **options)

        how = FitSettings(
            steps=count, batch_size=host.pick(batch, 4), log_every=1000, sample_every=1000, checkpoint_every=1000,
            head_from=1, **({} if precision == "no" else {"mixed_precision": precision}),
        )  # fmt: skip
        setattr(hooked, attribute, called)
        try:
            objective = {"images_per_class": 8} if kind == "pose" else {}
            fit.fit_translator(kind, data, how, network=network, objective=objective, progress=False)
            first = count // 3
            host.note(name, {"ms": 1e3 * (stamps[count - 1] - stamps[first]) / (count - 1 - first)})
        except Exception as error:  # one translator that fails stops no other
            host.note(name, describe(error))
        finally:
            setattr(hooked, attribute, original)


def profiled(host: Host) -> None:
    """Kernels of a step, how long the GPU is busy, and how long the host is; tables in profile.txt."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if host.is_cuda else [])]
    texts, given = [], nuisances()
    how = schedule(wait=host.pick(66, 0), warmup=host.pick(2, 1), active=host.pick(64, 1), repeat=1)
    for name in host.pick(("bare", "spatial", "redraw", "munit_small"), ("bare",)):
        with profile(activities=kinds, schedule=how) as recorder:
            time_steps(host, nuisance=given.get(name), recorder=recorder)
        number = host.pick(64, 1)
        events = recorder.key_averages()
        kernels = [each for each in recorder.events() if str(each.device_type).endswith("CUDA")]
        host.note(name, {
            "kernels": len(kernels) / number,
            "GPU busy ms": sum(each.device_time for each in kernels) / 1e3 / number,
            "host ms in operations": sum(each.self_cpu_time_total for each in events) / 1e3 / number,
        })  # fmt: skip
        order = "self_cuda_time_total" if host.is_cuda else "self_cpu_time_total"
        texts.append(f"=== {name}\n" + events.table(sort_by=order, row_limit=25, max_name_column_width=60))
        (host.out / "profile.txt").write_text("\n".join(texts))


def tests(host: Host) -> None:
    """The tests marked `gpu`; their output in pytest.txt."""
    chosen = host.pick([], ["-k", "nuisances_do or own_accelerator"])
    line = [
        sys.executable, "-m", "pytest", "tests/devices", *host.pick(["tests/translator/test_fit.py"], []), "-m",
        "gpu and not slow", "-q", "--tb=line", "-p", "no:cacheprovider", *chosen,
    ]  # fmt: skip
    here = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not host.is_cuda:
        here |= {"GEN_INVARIANCE_TEST_DEVICE": "pretended", "PYTEST_ADDOPTS": ""}
    with (host.out / "pytest.txt").open("w") as file:
        code = subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, env=here, check=False).returncode
    host.note("exit", code)
    host.note("tail", (host.out / "pytest.txt").read_text().splitlines()[-20:])


def run_command(host: Host, words: list[str]) -> dict[str, dict[str, float]]:
    """`benchmark run` with these words; the totals of each method, seconds among them."""
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "run", time.perf_counter()
        code = cli.run(["benchmark", "run", *words, "orders=0", f"out={out}", f"device={host.device}"])
        host.note("seconds", time.perf_counter() - started)
        host.note("exit", code)
        rows: dict[str, dict[str, float]] = {}
        for path in (out / "records").glob("*.jsonl"):
            for row in map(json.loads, path.read_text().splitlines()):
                if row.get("class_index") is None:
                    rows.setdefault(row["method"], {})[row["metric"]] = row["value"]
    for method, figures in rows.items():
        host.note(method, figures)
    return rows


def cifar(host: Host, epochs: int | None = None) -> None:
    """CIFAR-10-LT for some epochs, and what 200 would take."""
    epochs = epochs or host.pick(20, 2)
    words = ["benchmark=cifar10_lt_if100", "methods=[ce_drs]", f"data_root={host.data}"]
    words.append(f"training_options.epochs={epochs}")
    words += host.pick([], ["measure_options.draws=2", "data_options.largest=100"])
    if epochs != 200:
        words.append(f"training_options.milestones=[{max(1, epochs * 8 // 10)},{max(1, epochs * 9 // 10)}]")
    rows = run_command(host, words)
    trained = rows.get("ce_drs", {}).get("train_seconds")
    if trained is not None:
        host.note(ESTIMATE, host.found["seconds"] + (200 / epochs - 1) * trained)


def k49(host: Host) -> None:
    """Translators, classifiers, measures and report on a stand-in; MUNIT's 10,000 steps are estimated from fewer."""
    few = host.pick(400, 2)
    with tempfile.TemporaryDirectory() as folder:
        write_stand_in(Path(folder), host)
        words = [
            "benchmark=k49_rot_lt", f"data_root={folder}", f"fit_options.munit.steps={few}",
            f"methods={host.pick('[ce_drs,ce_drs+redraw,ce_drs+git]', '[ce_drs]')}",
            f"fit_options.munit.checkpoint_every={few}", f"fit_options.munit.sample_every={few}",
        ]  # fmt: skip
        words += host.pick([], [
            "training_options.epochs=2", "training_options.milestones=[1,2]", "training_options.warmup=0",
            "measure_options.draws=2", "data_options.largest=40", "training_options.batch_size=64",
        ])  # fmt: skip
        rows = run_command(host, words)
    git = rows.get("ce_drs+git", {})
    if "fit_seconds" in git:
        parts = ("train_seconds", "measure_seconds")
        rest = sum(rows[method].get(part, 0.0) for method in ("ce_drs", "ce_drs+git") for part in parts)
        pipeline = git["fit_seconds"] * 10_000 / few + rest
        host.note("pipeline with munit, 10,000 steps, estimated seconds", pipeline)


def write_stand_in(folder: Path, host: Host) -> None:
    """Of the size and form of Kuzushiji-49: strokes of 49 shapes, each image moved a little."""
    generator = named_generator(0, "stand-in")
    shapes, place = torch.zeros(49, 1, 28, 28), torch.linspace(0, 1, 60)[:, None]
    for shape in shapes:
        for _ in range(3):
            a, b, c = torch.rand(3, 2, generator=generator) * 20 + 4
            rows, columns = ((1 - place) ** 2 * a + 2 * place * (1 - place) * b + place**2 * c).round().long().unbind(1)
            shape[0, rows, columns] = 1
    shapes, parts = F.max_pool2d(shapes, 3, 1, 1), {}
    for part, number in (("train", host.pick(4742, 60)), ("test", host.pick(786, 10))):
        found = []
        for shape in shapes:
            turn = 0.15 * torch.randn(number, 2, 2, generator=generator) + torch.eye(2)
            way = torch.cat([turn, 0.1 * torch.randn(number, 2, 1, generator=generator)], 2)
            grid = F.affine_grid(way, [number, 1, 28, 28], align_corners=False)
            moved = F.grid_sample(shape.expand(number, 1, 28, 28), grid, align_corners=False)
            found.append(moved.mul(255).round().to(torch.uint8))
        parts[f"{part}_images"] = torch.cat(found)[:, 0].numpy()
        parts[f"{part}_labels"] = np.repeat(np.arange(49), number)
    np.savez(folder / "k49.npz", **parts)


STAGES = {
    "info": info, "steps": steps, "variants": variants, "cifar": cifar, "k49": k49, "fits": fits, "profile": profiled,
    "tests": tests, "cifar_full": lambda host: cifar(host, host.pick(200, 2)),
}  # fmt: skip


def carry_out(given: SimpleNamespace) -> None:
    """One stage, as its own process does it."""
    host = Host(given.device, given.tiny, Path(given.data), Path(given.out), Path(given.result))
    if given.tiny:
        torch.set_num_threads(1)
    try:
        STAGES[given.stage](host)
    except BaseException:
        host.note("failed", traceback.format_exc()[-2000:])
        raise
    rows = [row for row in host.found.values() if isinstance(row, dict) and "ms" in row]
    if len(rows) > 1:
        host.note("median ms", statistics.median(row["ms"] for row in rows))
