"""How time and memory grow: with the batch, the side of the images, the classes, the images and the draws.

    python -m benchmarks.growth out=docs/results/speed/growth        # some minutes on one core
    python -m benchmarks.growth only=classes,draws

Each point is a process of its own; time is its processor time for one unit of work (median of 3), memory what its peak
grew by over the start of the work. Writes `growth.jsonl` and `growth.md`.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.program import markdown, read_settings
from benchmarks.timing import stored
from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.data.loader import ResidentLoader
from gen_invariance.files import write_text
from gen_invariance.measure.invariance import measure_invariance
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Background
from gen_invariance.run import named_generator

Work = Callable[[], object]


def training_step(batch: int) -> Work:
    """Small convolutional network, 32 x 32 x 3, rotation on half of the rows."""
    data = stored(2048, channels=3, size=32)
    model = build_classifier("small_conv", num_classes=10, channels=3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    loader, stage = ResidentLoader(data, batch_size=batch), TailAugment(Rotation(), torch.full((10,), 0.5))

    def work() -> None:
        images, labels = stage(*loader.batch(0))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
        optimizer.step()

    return work


def translating(size: int) -> Work:
    """32 images of that side through munit_small, without gradients."""
    from gen_invariance.translator.munit.model import MunitTranslator

    translator = MunitTranslator(3, width=16, residual_blocks=2).eval()
    images = stored(32, channels=3, size=size).float_images()
    draw = translator.sample(images.shape, generator=named_generator(1))

    def work() -> None:
        with torch.no_grad():
            translator.apply(images, draw)

    return work


def measuring(classes: int) -> Work:
    """eKLD of 2,000 images in that many classes, 3 draws."""
    data = stored(2000, classes=classes)
    model = build_classifier("small_conv", num_classes=classes, channels=1)
    return lambda: measure_invariance(model, data.images, data.labels, Background(), draws=3)


def drawing(draws: int) -> Work:
    """eKLD of 500 images, that many draws."""
    data, model = stored(500), build_classifier("small_conv", num_classes=10, channels=1)
    return lambda: measure_invariance(model, data.images, data.labels, Background(), draws=draws)


def sampling(count: int) -> Work:
    """The class-balanced list of an epoch of that many images, and 100 batches of 128 out of it."""
    data, epochs = stored(count, classes=100), iter(range(10**6))

    def work() -> None:
        loader, epoch = ResidentLoader(data, batch_size=128, rule="class_balanced"), next(epochs)
        for step in range(100):
            loader.batch(epoch * len(loader) + step % len(loader))

    return work


def evaluating(count: int) -> Work:
    """eKLD of that many 16 x 16 images, 1 draw."""
    data, model = stored(count), build_classifier("small_conv", num_classes=10, channels=1)
    return lambda: measure_invariance(model, data.images, data.labels, Background(), draws=1)


POINTS: dict[str, tuple[Callable[[int], Work], tuple[int, ...]]] = {
    "batch": (training_step, (32, 128, 512, 1024)),
    "side": (translating, (16, 32, 64, 128)),
    "classes": (measuring, (10, 100, 1000)),
    "draws": (drawing, (10, 100, 400)),
    "images/batches": (sampling, (10**4, 10**5, 10**6)),
    "images/eKLD": (evaluating, (10**4, 10**5)),
}


def point(name: str, value: int) -> dict[str, object]:
    """Measure one point in this process."""
    torch.set_num_threads(1)
    make, _ = POINTS[name]
    work, taken = make(value), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"of": name, "value": value, "seconds": statistics.median(taken), "megabytes": (peak - before) / 1024}


HEAD = ["growing", "value", "seconds", "times the point before", "memory (MB)", "what is done"]


def table(rows: list[dict[str, object]]) -> str:
    """The points, each with its ratio to the one before."""
    cells = []
    for row, last in zip(rows, [None, *rows[:-1]], strict=True):
        same = last is not None and last["of"] == row["of"]
        factor = f"{row['seconds'] / last['seconds']:.1f} for {row['value'] / last['value']:.0f}" if same else ""
        done = "" if same else (POINTS[row["of"]][0].__doc__ or "").strip()
        cells.append([
            row["of"], f"{row['value']:,}", f"{row['seconds']:.3g}", factor, f"{row['megabytes']:.0f}", done,
        ])  # fmt: skip
    return markdown(HEAD, cells)


def main() -> None:
    """Measure each point in a process of its own."""
    given = read_settings(__doc__, out=Path("runs/growth"), only=tuple(POINTS), point=None)
    if given.point is not None:
        name, value = given.point.rsplit(":", 1)
        print(json.dumps(point(name, int(value))))
        return
    rows = []
    for name, (_, values) in POINTS.items():
        for value in values if name in given.only else ():
            command = [sys.executable, "-m", "benchmarks.growth", f"point={name}:{value}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            write_text(given.out / "growth.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_text(given.out / "growth.md", table(rows))


if __name__ == "__main__":
    main()
