"""A plain training loop, beside which the package's own plain training has to stand: no stage, no class of the package.

    python -m studies.plain_loop benchmark=gtsrb200_lt orders=0-4 data_root=DATA steps=1575
    python -m studies.plain_loop benchmark=gtsrb200_lt orders=0-4 data_root=DATA steps=1575 records=runs/signs

Trains on the benchmark's own cut of each order: three pooled convolutions and one more, SGD with momentum over a
cosine, rows drawn from instance to class-balanced, images shifted by up to two pixels. Prints balanced accuracy, and
where `records` holds the same orders the paired difference of `method` (ce_drs unless given) to the loop.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.program import append_line, read_settings
from gen_invariance.benchmark.registry import read_benchmark
from gen_invariance.benchmark.run import parse_numbers
from gen_invariance.experiment.task import prepare
from gen_invariance.records import load_records
from gen_invariance.stats import mean_interval, paired_difference


def train(
    images: Tensor, labels: Tensor, classes: int, *, steps: int, seed: int, shift: int, decay: float
) -> nn.Module:
    """A net trained for `steps` batches of 64; it takes float (B, C, H, W) in [0, 1]."""
    torch.manual_seed(seed)  # noqa: TID251  (a script's own process)
    widths = (images.shape[1], 32, 64, 128, 128)
    layers: list[nn.Module] = [nn.BatchNorm2d(widths[0], affine=False)]
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (number < 3)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    counts = torch.bincount(labels, minlength=classes).double()
    for step in range(steps):
        done = step / steps
        weight = ((1 - done) / len(labels) + done / (classes * counts))[labels]
        rows = torch.multinomial(weight, 64, replacement=True)
        batch = F.pad(images[rows].float() / 255, (shift,) * 4)
        top, left = torch.randint(2 * shift + 1, (2,)).tolist()
        batch = batch[:, :, top : top + images.shape[2], left : left + images.shape[3]]
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.zero_grad()
        F.cross_entropy(net(batch), labels[rows]).backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def balanced_accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean over the classes that have test images."""
    right = torch.cat([net(part.float() / 255).argmax(1) for part in images.split(512)]) == labels
    return float(torch.stack([right[labels == label].double().mean() for label in labels.unique()]).mean())


def main() -> None:
    """Train on each order, print, and compare with records."""
    given = read_settings(
        __doc__, benchmark=str, orders="0-4", data_root=None, steps=1500, records=None, method="ce_drs", out=None,
        shift=2, decay=5e-4,
    )  # fmt: skip
    torch.set_num_threads(1)
    benchmark = read_benchmark(given.benchmark, data_root=given.data_root)
    found = {}
    for order in parse_numbers(given.orders, "orders"):
        started, prepared = time.perf_counter(), prepare(benchmark.task, seed=order)
        net = train(
            prepared.train.images, prepared.train.labels, prepared.train.num_classes, steps=given.steps, seed=order,
            shift=given.shift, decay=given.decay,
        )  # fmt: skip
        found[order] = balanced_accuracy(net, prepared.test.images, prepared.test.labels)
        line = {"benchmark": benchmark.name, "method": "plain loop", "order": order, "steps": given.steps,
                "balanced_accuracy": found[order], "seconds": time.perf_counter() - started}  # fmt: skip
        print(json.dumps(line), flush=True)
        if given.out is not None:
            append_line(Path(given.out), line)
    values = 100 * np.array(list(found.values()))
    interval = mean_interval(values)
    print(f"plain loop: balanced accuracy {interval.mean:.1f} ± {interval.half_width:.1f} over {len(found)} orders")
    if given.records is None:
        return
    frame, method = load_records(Path(given.records) / "records"), given.method
    chosen = frame[(frame["benchmark"] == benchmark.name) & (frame["method"] == method)]
    ours = chosen[chosen["metric"] == "balanced_accuracy"].groupby("order")["value"].mean()
    both = [order for order in found if order in ours.index]
    gap = paired_difference(np.array([100 * ours[order] for order in both]), np.array([100 * found[o] for o in both]))
    print(f"{method} minus plain loop: {gap.mean:+.1f} ± {gap.half_width:.1f} points over {len(both)} orders")


if __name__ == "__main__":
    main()
