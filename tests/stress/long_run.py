"""100,000 steps of each loop at toy size: do memory and the number of files stay flat?

    python -m tests.stress.long_run out=runs/long                      # about half an hour of one CPU core
    python -m tests.stress.long_run only=fit,stage steps=20000 out=runs/long

Loops: `fit` (a spatial translator), `train` (a classifier with the stage), `stage` (the stage alone, as in somebody
else's loop), `measure` (accuracy and eKLD, a batch a step). Each runs in a process of its own, which notes its memory
(resident set) and the files in its folder and open in the process twenty times. Flat means: from the first quarter,
which fills caches, to the end memory grows by less than 2 %, or 8 MB. Writes OUT/LOOP.json and OUT/table.md.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from benchmarks.program import read_settings
from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.losses import build_loss
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.data.images import ImageData
from gen_invariance.files import write_text
from gen_invariance.measure.accuracy import measure_accuracy
from gen_invariance.measure.invariance import measure_invariance
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.run import Run, named_generator
from gen_invariance.translator.fit import fit_objective
from gen_invariance.translator.registry import build_objective
from gen_invariance.translator.settings import FitSettings

LOOKS = 20


def data(count: int = 64) -> ImageData:
    """Noise of three classes, 8 x 8."""
    images = torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=named_generator(0, "long"))
    return ImageData(images, torch.arange(count) % 3, ("a", "b", "c"))


def fit(steps: int, out: Path, look: Callable[[int], None]) -> None:
    objective = build_objective("spatial", data(), settings={"discriminator_width": 2})
    settings = FitSettings(
        steps=steps, batch_size=2, head_from=1, log_every=50, sample_every=steps // 10, checkpoint_every=steps // 100
    )
    objective.forward = looked_at(objective.forward, steps, look)
    fit_objective(objective, data(), settings, run=Run(out, kind="fit"), progress=False)


def train(steps: int, out: Path, look: Callable[[int], None]) -> None:
    images = data()
    settings = TrainSettings(
        epochs=steps // 32, batch_size=2, learning_rate=1e-3, warmup=0, milestones=(10**6, 10**6 + 1),
        log_every=10, checkpoint_every=max(1, steps // 3200),
    )  # fmt: skip
    loss = build_loss("cross_entropy", counts=images.counts)
    loss.forward = looked_at(loss.forward, steps, look)
    fit_classifier(
        network(), images, settings, loss=loss, out=out, progress=False,
        stage=TailAugment(Rotation(30), torch.full((3,), 0.5)),
    )  # fmt: skip


def stage(steps: int, out: Path, look: Callable[[int], None]) -> None:
    out.mkdir()
    augment = TailAugment(Rotation(30), torch.full((3,), 0.5))
    images, labels = data(4).float_images(), data(4).labels
    call = looked_at(augment, steps, look)
    for _ in range(steps):
        call(images, labels)


def measure(steps: int, out: Path, look: Callable[[int], None]) -> None:
    out.mkdir()
    images, rounds = data(), 20
    predict = looked_at(network().eval(), steps, look)
    for _ in range(rounds):
        draws = max(1, steps // rounds // 32 - 2)  # 64 images in batches of 2 are 32 calls, as are those of accuracy
        measure_accuracy(predict, images.images, images.labels, batch_size=2)
        measure_invariance(
            predict, images.images, images.labels, Rotation(30), num_classes=3, draws=draws, batch_size=2,
            generator=named_generator(0, "long"),
        )  # fmt: skip


def network() -> torch.nn.Module:
    return build_classifier("small_conv", num_classes=3, channels=1, generator=named_generator(0, "net"))


def looked_at(function: Callable, steps: int, look: Callable[[int], None]) -> Callable:
    """`function`, which looks at memory and files every so many calls."""
    calls = 0

    def call(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls % (steps // LOOKS) == 0:
            look(calls)
        return function(*arguments, **options)

    return call


LOOPS = {"fit": fit, "train": train, "stage": stage, "measure": measure}


def watched(name: str, steps: int, out: Path, report: Path) -> None:
    """Run one loop in this process and write what was seen."""
    torch.set_num_threads(1)
    seen, began = [], time.perf_counter()

    def look(step: int) -> None:
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize() / 2**20
        files = sum(len(names) for _, _, names in os.walk(out))
        seen.append({
            "step": step, "megabytes": round(resident, 1), "files": files, "open": len(os.listdir("/proc/self/fd")),
            "seconds": round(time.perf_counter() - began, 1), "cpu": round(time.process_time(), 1),
        })  # fmt: skip
        write_text(report, json.dumps(seen))

    LOOPS[name](steps, out, look)


def row_of(name: str, seen: list[dict]) -> str:
    """One line of the table."""
    quarter, last = seen[len(seen) // 4], seen[-1]
    grown = last["megabytes"] - quarter["megabytes"]
    flat = grown <= max(8, 0.02 * quarter["megabytes"])
    figures = [
        f"{last['step']:,}", f"{seen[0]['megabytes']:.0f}", f"{quarter['megabytes']:.0f}", f"{last['megabytes']:.0f}",
        f"{grown:+.1f}", f"{quarter['files']} → {last['files']}", f"{quarter['open']} → {last['open']}",
        "yes" if flat else "NO", f"{last['cpu']:.0f}",
    ]  # fmt: skip
    return f"| {name} | " + " | ".join(figures) + " |"


def main() -> int:
    given = read_settings(__doc__, out=Path("runs/long"), only=tuple(LOOPS), steps=100_000)
    out, steps = given.out, given.steps
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        "| loop | steps | MB at 5 % | MB at 25 % | MB at the end | growth since 25 %, MB | files since 25 % | "
        "open files | flat | CPU s |",
        "|" + "---|" * 10,
    ]
    for name in given.only:
        report = out / f"{name}.json"
        if not report.exists() or len(json.loads(report.read_text())) < LOOKS:
            shutil.rmtree(out / name, ignore_errors=True)
            child = os.fork()
            if not child:
                watched(name, steps, out / name, report)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                raise SystemExit(f"{name} failed")
        lines.append(row_of(name, json.loads(report.read_text())))
        print(lines[-1], flush=True)
        write_text(out / "table.md", "\n".join(lines) + "\n")
    return int(any("| NO |" in line for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
