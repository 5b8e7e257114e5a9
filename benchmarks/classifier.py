"""What each option of the training loop adds to a step, as a ratio to plain cross-entropy; options take turns.

python -m benchmarks.classifier [--device cuda] [--backbone resnet32 --size 32 --batch 128]
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.losses import LOSSES, build_loss
from gen_invariance.classifier.train import TrainSettings, fit_classifier
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.data.images import ImageData
from gen_invariance.nuisance.generic import RandAugment, TrivialAugment
from gen_invariance.nuisance.geometry import CropFlip, Rotation
from gen_invariance.run import Run


def options(stage: TailAugment, batch: int) -> dict[str, dict]:
    """What `fit_classifier` is called with, by the name of the option."""
    plain = TrainSettings(epochs=1, batch_size=batch, learning_rate=0.01, warmup=0, milestones=(1, 1))
    told = {"plain": {}}
    told |= {f"loss {name}": {"loss": name} for name in LOSSES if name != "cross_entropy"}
    told |= {f"sampling {name}": {"settings": {"sampling": name}} for name in ("class_balanced", "progressive")}
    told |= {name: {"settings": {"mixing": name}} for name in ("mixup", "remix", "cutmix", "cmo")}
    told |= {"crop and flip": {"augmentation": CropFlip()}, "randaugment": {"augmentation": RandAugment()}}
    told |= {"trivialaugment": {"augmentation": TrivialAugment()}, "stage (rotation)": {"stage": stage}}
    told |= {"stage, balanced source": {"stage": stage, "settings": {"stage_source": "balanced"}}}
    told |= {f"stage, worst of {k}": {"stage": stage, "settings": {"worst_of": k}} for k in (2, 4)}
    told |= {"stage, consistency": {"stage": stage, "settings": {"consistency": 1.0}}}
    told |= {"average of weights": {"settings": {"average_decay": 0.999}}, "4 parts": {"settings": {"accumulate": 4}}}
    told |= {
        "plan: frozen": {"plan": TransferPlan("frozen")},
        "plan: last stage": {"plan": TransferPlan("partial", last_stages=1)},
    }
    told |= {"plan: pull to start": {"plan": TransferPlan("full", pull_to_start=0.01)}}
    return {name: {**how, "settings": replace(plain, **how.get("settings", {}))} for name, how in told.items()}


def seconds(data: ImageData, how: dict, backbone: str, device: torch.device) -> float:
    """Wall time of one epoch."""
    model = build_classifier(backbone, num_classes=data.num_classes, channels=data.images.shape[1])
    rest = {key: value for key, value in how.items() if key not in ("settings", "loss")}
    loss = build_loss(how.get("loss", "cross_entropy"), counts=data.counts)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", kind="train")
        started = time.perf_counter()
        fit_classifier(model, data, how["settings"], loss=loss, out=run, progress=False, **rest)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="small_conv")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device, generator = torch.device(given.device), torch.Generator().manual_seed(0)
    count = given.steps * given.batch
    images = torch.randint(256, (count, given.channels, given.size, given.size), generator=generator, dtype=torch.uint8)
    data = ImageData(images, torch.arange(count) % 10, tuple("0123456789")).to(device)
    stage = TailAugment(Rotation(90.0), torch.full((10,), 0.5))  # half of the rows
    told = options(stage, given.batch)
    for how in told.values():  # the first call of each pays for what is built once
        seconds(data, how, given.backbone, device)
    taken = {name: [] for name in told}
    for _ in range(given.rounds):
        for name, how in told.items():
            taken[name].append(seconds(data, how, given.backbone, device))
    base = np.array(taken["plain"])
    step = 1000 * np.median(base) / given.steps
    print(f"{given.backbone}, {given.size} pixels, batch {given.batch}, {device}: plain step {step:.2f} ms")
    print(
        f"{'option':24} {'min':>6} {'median':>7} {'max':>6}   (of {given.rounds} rounds, ratio to plain in the round)"
    )
    for name, values in taken.items():
        ratio = np.array(values) / base
        print(f"{name:24} {ratio.min():6.2f} {np.median(ratio):7.2f} {ratio.max():6.2f}")


if __name__ == "__main__":
    main()
