"""What the stage costs in a training step: a step with it over a bare step, interleaved, for each nuisance.

    python -m benchmarks.stage [--device cuda] [--batch 128] [--size 32] [--share 0.25] [--steps 30] [--out DIR]

Prints and writes minimum, median and maximum of the ratio. Both steps of a pair run back to back, in turns the one and
the other first, so what else the machine does falls on both. On a CPU the ratio is of processor time (of all threads),
which other work hardly touches; on a GPU of wall time, its queue emptied before and after. Images are scikit-learn's
digits, scaled up. Weights are untrained: they cost the same.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance import MunitTranslator, Rotation, SpatialTranslator, TailAugment, load_source
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.files import write_json, write_text
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import package_versions
from gen_invariance.translator.flow.model import FlowTranslator
from gen_invariance.translator.redraw.model import RedrawTranslator
from gen_invariance.translator.redraw.pose import PoseTranslator

CLASSES = 10


def candidates() -> dict[str, Nuisance]:
    """What is given to the rows."""
    return {
        "rotation (by hand)": Rotation(),
        "spatial": SpatialTranslator(3, start=0.3),
        "pose": PoseTranslator(3),
        "redraw, tone (photographs)": RedrawTranslator(3, parts=("tone",), kind="photo"),
        "redraw, tone and pose": RedrawTranslator(3, parts=("tone", "pose")),
        "redraw, tone, stroke and pose": with_widths(RedrawTranslator(3)),
        "munit_small": MunitTranslator(3, width=16, residual_blocks=2),
        "munit": MunitTranslator(3),
        "flow": FlowTranslator(3),
    }


def with_widths(redraw: RedrawTranslator) -> RedrawTranslator:
    """Strokes of 1 to 4 pixels in its bank: how far they are grown decides what that costs."""
    redraw.log_width.copy_(torch.linspace(0, math.log(4), len(redraw.log_width)))
    return redraw


def figures_of(count: int, size: int) -> Tensor:
    """float (count, 3, size, size): real figures, as what `redraw` costs depends on there being any."""
    digits = load_source("digits").train
    images = digits.float_images(torch.arange(count) % len(digits))
    return F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Processor time of one call on a CPU, wall time on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratios(
    augmented: Callable[[], None], bare: Callable[[], None], device: torch.device, steps: int
) -> tuple[list[float], list[float]]:
    """Augmented over bare of each pair, and the seconds of the bare steps."""
    augmented(), bare()  # warm up
    found, plain = [], []
    for number in range(steps):
        order = (augmented, bare) if number % 2 else (bare, augmented)
        times = {step: seconds(step, device) for step in order}
        found.append(times[augmented] / times[bare])
        plain.append(times[bare])
    return found, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", default="resnet32")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.25, help="share of rows that get the nuisance")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="folder for DEVICE.md and DEVICE.json; none writes nothing")
    options = parser.parse_args()
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    images = figures_of(options.batch, options.size).to(device)
    labels = torch.randint(CLASSES, (options.batch,), generator=generator).to(device)
    model = build_classifier(options.backbone, num_classes=CLASSES, channels=3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(augment: TailAugment | None = None) -> None:
        inputs, targets = augment(images, labels) if augment else (images, labels)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    what = "processor time" if device.type == "cpu" else "wall time"
    command = " ".join(["python -m benchmarks.stage", *sys.argv[1:]])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    lines = [
        f"    {command}",
        "",
        f"{options.backbone}, {options.batch} images of {options.size} x {options.size}, {options.share:.0%} of rows "
        f"translated, {options.steps} pairs of steps. {name}, {what}.",
        "",
        "| nuisance | min | median | max | bare step, median ms |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    figures = {}
    for kind, nuisance in candidates().items():
        augment = TailAugment(nuisance, torch.full((CLASSES,), options.share)).to(device)
        found, plain = ratios(lambda: step(augment), step, device, options.steps)  # noqa: B023
        low, middle, high = min(found), statistics.median(found), max(found)
        lines.append(f"| {kind} | {low:.2f} | {middle:.2f} | {high:.2f} | {1e3 * statistics.median(plain):.0f} |")
        figures[kind] = {"ratios": found, "bare_seconds": plain}
        print(lines[-1], flush=True)
    if options.out:
        write_text(options.out / f"{device.type}.md", "\n".join(lines) + "\n")
        about = {"command": command, "device": name, "versions": package_versions(), "of": what}
        write_json(options.out / f"{device.type}.json", about | {"figures": figures})


if __name__ == "__main__":
    main()
