"""What the stage and the options of training add to a step: ratios to a bare step, all taking turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import BATCH, CLASSES, SMALL, Variant, stored
from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.batches import Batches
from gen_invariance.classifier.losses import LOSSES, build_loss
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.data.loader import ResidentLoader
from gen_invariance.data.readers.registry import load_source
from gen_invariance.nuisance.generic import RandAugment, TrivialAugment
from gen_invariance.nuisance.geometry import CropFlip, Rotation
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import Run
from gen_invariance.translator.flow.model import FlowTranslator
from gen_invariance.translator.munit.model import MunitTranslator
from gen_invariance.translator.redraw.model import RedrawTranslator
from gen_invariance.translator.redraw.pose import PoseTranslator
from gen_invariance.translator.spatial import SpatialTranslator

SHARE, SIDE, STEPS = 0.25, 32, 12


def candidates() -> dict[str, Nuisance]:
    """What is given to the rows."""
    wide = RedrawTranslator(3)
    # Strokes of 1 to 4 pixels in its bank: how far they are grown decides what that costs.
    wide.log_width.copy_(torch.linspace(0, math.log(4), len(wide.log_width)))
    return {
        "rotation (by hand)": Rotation(),
        "spatial": SpatialTranslator(3, start=0.3),
        "pose": PoseTranslator(3),
        "redraw, tone (photographs)": RedrawTranslator(3, parts=("tone",), kind="photo"),
        "redraw, tone and pose": RedrawTranslator(3, parts=("tone", "pose")),
        "redraw, tone, stroke and pose": wide,
        "munit_small": MunitTranslator(3, **SMALL),
        "munit": MunitTranslator(3),
        "flow": FlowTranslator(3),
    }


def figures(count: int) -> Tensor:
    """float (count, 3, SIDE, SIDE): real figures, as what `redraw` costs depends on there being any."""
    digits = load_source("digits").train
    images = digits.float_images(torch.arange(count) % len(digits))
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def stage(device: torch.device) -> list[Variant]:
    """A ResNet-32 step on 128 scaled-up digits with nothing, and with a quarter of the rows translated in each way.

    Weights are untrained: they cost the same.
    """
    images = figures(BATCH).to(device)
    labels = (torch.arange(BATCH) % CLASSES).to(device)
    model = build_classifier("resnet32", num_classes=CLASSES, channels=3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(augment: TailAugment | None = None) -> None:
        inputs, targets = augment(images, labels) if augment else (images, labels)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    variants = [Variant("bare step", "plain", step)]
    for name, nuisance in candidates().items():
        augment = TailAugment(nuisance, torch.full((CLASSES,), SHARE)).to(device)
        variants.append(Variant(name, "changed", lambda augment=augment: step(augment), cost=True))
    return variants


def options() -> dict[str, dict[str, Any]]:
    """What `fit_classifier` is called with, by the name of the option."""
    rotate = TailAugment(Rotation(90.0), torch.full((CLASSES,), 0.5))  # half of the rows
    return {
        "plain": {},
        **{f"loss {name}": {"loss": name} for name in LOSSES if name != "cross_entropy"},
        **{f"sampling {name}": {"settings": {"sampling": name}} for name in ("class_balanced", "progressive")},
        **{name: {"settings": {"mixing": name}} for name in ("mixup", "remix", "cutmix", "cmo")},
        "crop and flip": {"augmentation": CropFlip()},
        "randaugment": {"augmentation": RandAugment()},
        "trivialaugment": {"augmentation": TrivialAugment()},
        "stage (rotation)": {"stage": rotate},
        "stage, balanced source": {"stage": rotate, "settings": {"stage_source": "balanced"}},
        **{f"stage, worst of {k}": {"stage": rotate, "settings": {"worst_of": k}} for k in (2, 4)},
        "stage, consistency": {"stage": rotate, "settings": {"consistency": 1.0}},
        "average of weights": {"settings": {"average_decay": 0.999}},
        "4 parts": {"settings": {"accumulate": 4}},
        "plan: frozen": {"plan": TransferPlan("frozen")},
        "plan: last stage": {"plan": TransferPlan("partial", last_stages=1)},
        "plan: pull to start": {"plan": TransferPlan("full", pull_to_start=0.01)},
    }


def batches(device: torch.device) -> list[Variant]:
    """Batches of a training, made ready without a model: by hand, step by step, and in blocks of steps.

    By hand is what a training did before there were blocks: the rows' images, a gate, and a copy of the batch in which
    the gated rows are replaced.
    """
    data, variants = stored(BATCH * STEPS, device, 3, SIDE), []
    for name in ("rotation (by hand)", "spatial", "munit_small"):
        nuisance, run = candidates()[name], Run(None, kind="train")
        augment = TailAugment(nuisance, torch.full((CLASSES,), SHARE)).to(device)
        loader = ResidentLoader(data, batch_size=BATCH)

        def by_hand(augment: TailAugment = augment, loader: ResidentLoader = loader, run: Run = run) -> None:
            for step in range(STEPS):
                rows, generator = loader.indices(step), run.generator("train", step)
                images, labels = data.float_images(rows), data.labels[rows]
                gate = augment.sample(images.shape, labels, generator=generator)
                augment.apply_gate(images, labels, gate, source=(data.float_images(rows), labels))

        def prepared(block: int, nuisance: Nuisance = nuisance, run: Run = run) -> Callable[[], None]:
            how = TrainSettings(epochs=1, batch_size=BATCH, warmup=0, milestones=(1, 2), stage_source="batch")
            stage = TailAugment(nuisance, torch.full((CLASSES,), SHARE)).to(device)
            made = Batches(data, how, run, stage=stage, block_steps=block)
            made.stage.disable_cache()  # codes that are kept would hide what is compared here

            def run_epoch() -> None:
                made._block = None
                for step in range(STEPS):
                    made.at(step)

            return run_epoch

        first = f"by hand, {name}"
        common = {"units": STEPS, "unit": f"batch of {BATCH}", "against": first}
        variants += [
            Variant(first, "plain", by_hand, units=STEPS, unit=f"batch of {BATCH}"),
            Variant(f"step by step, {name}", "same", prepared(1), goal=">= 1 on a CPU", **common),
            Variant(f"in one block, {name}", "same", prepared(STEPS), **common),
        ]
    return variants


def training_options(device: torch.device) -> list[Variant]:
    """An epoch of 12 batches of 64 with one option each, `small_conv`, 16 pixels."""
    data = stored(STEPS * 64, device, size=16)
    plain = TrainSettings(epochs=1, batch_size=64, learning_rate=0.01, warmup=0, milestones=(1, 1))

    def epoch(option: dict[str, Any]) -> Callable[[], None]:
        rest = {key: value for key, value in option.items() if key not in ("settings", "loss")}
        settings = replace(plain, **option.get("settings", {}))
        loss = build_loss(option.get("loss", "cross_entropy"), counts=data.counts)

        def run() -> None:
            model = build_classifier("small_conv", num_classes=CLASSES, channels=1)
            fit_classifier(model, data, settings, loss=loss, progress=False, **rest)

        return run

    return [
        Variant(name, "plain" if name == "plain" else "changed", epoch(option), units=STEPS, cost=name != "plain")
        for name, option in options().items()
    ]
