"""What the stage costs in a training step: time with it over time without it, interleaved, for each nuisance.

    python scripts/benchmark_stage.py [--device cuda] [--batch 128] [--size 32] [--share 0.25] [--steps 30]

Prints minimum, median and maximum of the ratio; both steps of a pair run back to back, so what else the machine does
falls on both. Weights are untrained: they cost the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gen_invariance import MunitTranslator, Rotation, SpatialTranslator, TailAugment
from gen_invariance.classifier.backbones import build_classifier


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Wall time of one call, the device's queue emptied before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", default="resnet32")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.25, help="share of rows that get the nuisance")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch, 3, options.size, options.size, generator=generator).to(device)
    labels = torch.randint(10, (options.batch,), generator=generator).to(device)
    model = build_classifier(options.backbone, num_classes=10, channels=3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(augment: TailAugment | None = None) -> None:
        inputs, targets = augment(images, labels) if augment else (images, labels)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    candidates = {
        "rotation (by hand)": Rotation(),
        "spatial": SpatialTranslator(3, start=0.3),
        "munit_small": MunitTranslator(3, width=16, residual_blocks=2),
        "munit": MunitTranslator(3),
    }
    print(
        f"{options.backbone}, {options.batch} x {options.size} x {options.size}, {options.share:.0%} of rows, {device}"
    )
    for name, nuisance in candidates.items():
        augment = TailAugment(nuisance, torch.full((10,), options.share)).to(device)
        step(), step(augment)  # warm up
        ratios = [seconds(lambda: step(augment), device) / seconds(step, device) for _ in range(options.steps)]  # noqa: B023
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{name:20} min {low:5.2f}  median {middle:5.2f}  max {high:5.2f}", flush=True)


if __name__ == "__main__":
    main()
