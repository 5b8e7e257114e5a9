"""Hot paths of training a classifier: a step, its batches and nuisances, the plain recipe's way and the package's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import plain_recipe as recipe
from benchmarks.paths_munit import munit_on
from benchmarks.timing import BATCH, CLASSES, SMALL, Variant, stored
from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.data.images import ImageData
from gen_invariance.data.loader import ResidentLoader
from gen_invariance.nuisance.geometry import CropFlip, Rotation
from gen_invariance.nuisance.intensity import Background
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.nuisance.thickness import Thickness
from gen_invariance.run import named_generator
from gen_invariance.translator.redraw.pose import PoseTranslator
from gen_invariance.translator.spatial import SpatialTranslator

# ---- a training step


def classifier_on(device: torch.device, *, fast: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_classifier("resnet20", num_classes=CLASSES, channels=1).to(device)
    if fast:
        model = model.to(memory_format=torch.channels_last)
    how = {"fused": True} if fast else {"foreach": False}
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=2e-4, **how)


def training_step(device: torch.device) -> list[Variant]:
    """A ResNet-20 step on 128 images with nothing, and with half of the rows translated in each way."""
    data = stored(1024, device)
    slow, slow_optimizer = classifier_on(device, fast=False)
    model, optimizer = classifier_on(device, fast=True)
    plain = recipe.PlainMunit(1, domains=1, device=device).gens[0]
    rows = torch.arange(BATCH, device=device)
    x, y = data.float_images(rows), data.labels[rows]

    def with_recipe() -> None:
        generated = recipe.generated_half(plain, x * 2 - 1)
        recipe.classifier_step(slow, slow_optimizer, torch.cat([x[: BATCH // 2] * 2 - 1, generated]), y)

    def step(images: Tensor = x, labels: Tensor = y) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
        optimizer.step()

    def with_stage(stage: TailAugment, numbers: Tensor | None = None) -> None:
        step(*stage(x, y, indices=numbers))

    def staged(nuisance: Nuisance, *, remember: bool = False) -> Callable[[], None]:
        stage = TailAugment(nuisance, torch.full((CLASSES,), 0.5)).to(device)
        if not remember:
            return lambda: with_stage(stage)
        stage.enable_cache(data.images, data.labels)
        return lambda: with_stage(stage, rows)

    small, large = munit_on(device, **SMALL), munit_on(device)
    common = {"against": "ours, without", "cost": True}
    return [
        Variant("recipe, without", "plain", lambda: recipe.classifier_step(slow, slow_optimizer, x * 2 - 1, y)),
        Variant("recipe, with MUNIT", "plain", with_recipe, against="recipe, without", cost=True),
        Variant("ours, without", "same", step, repeats=2),
        Variant("ours, MUNIT width 64", "same", staged(large), **common),
        Variant("ours, MUNIT width 64, codes kept", "same", staged(large, remember=True), goal="<= 3.2", **common),
        Variant("ours, munit_small", "changed", staged(small), **common),
        Variant("ours, munit_small, codes kept", "changed", staged(small, remember=True), goal="<= 1.5", **common),
        Variant("ours, spatial", "changed", staged(SpatialTranslator(1, start=0.3)), goal="<= 1.1", **common),
        Variant("ours, pose", "changed", staged(PoseTranslator(1)), goal="<= 1.1", **common),
        Variant("ours, rotation by hand", "changed", staged(Rotation()), **common),
        bank_step(device, small, step, data, goal="<= 1.1"),
    ]


def bank_step(device: torch.device, nuisance: Nuisance, step: Callable, data: ImageData, *, goal: str) -> Variant:
    """A bank of 2 versions of 1,024 images, each translation used about 8 times; 32 steps are an eighth of a period."""
    stage = TailAugment(nuisance, torch.full((CLASSES,), 0.5)).to(device)
    stage.enable_cache(data.images, data.labels, versions=2, period=2 * len(data) * 8 // (BATCH // 2))
    steps, count = itertools.count(), 16

    def run() -> None:
        for number in itertools.islice(steps, count):
            stage.refresh_cache(number)
            rows = torch.randint(len(data), (BATCH,), device=device)
            step(*stage(data.float_images(rows), data.labels[rows], indices=rows))

    return Variant(
        "ours, munit_small, bank, each used 8 times, filling counted", "changed", run, units=count,
        against="ours, without", cost=True, goal=goal,
    )  # fmt: skip


# ---- batches, nuisances


def loading(device: torch.device) -> list[Variant]:
    """A batch of 128, ready for the network."""
    variants = []
    for name, channels, size, augment in (("28 x 28 x 1", 1, 28, False), ("32 x 32 x 3, crop and flip", 3, 32, True)):
        data, batches = stored(BATCH * 8, device, channels, size), 8
        plain = DataLoader(
            recipe.PlainImages(data.images.cpu(), data.labels, flip=augment), batch_size=BATCH, shuffle=True
        )
        loader, base = ResidentLoader(data, batch_size=BATCH), CropFlip()

        def slow(plain: DataLoader = plain) -> None:
            for images, labels in plain:
                images.to(device), labels.to(device)

        def fast(loader: ResidentLoader = loader, augment: bool = augment, base: Nuisance = base) -> None:
            for images, _ in loader.epoch(0):
                if augment:
                    base.apply(images, base.sample(images.shape, generator=named_generator(0)))

        first = f"recipe, {name}"
        variants += [
            Variant(first, "plain", slow, units=batches, unit="batch of 128"),
            Variant(
                f"ours, {name}", "same", fast, units=batches, repeats=5, unit="batch of 128", against=first,
                goal=">= 8" if augment else ">= 80",
            ),
        ]  # fmt: skip
    return variants


def nuisances(device: torch.device) -> list[Variant]:
    """Each hand-written nuisance on stored images, and on its way through a data set."""
    data, variants = stored(1024, device), []
    raw, images = data.images[:, 0].cpu().numpy(), data.float_images()
    goals = {"background": (">= 3", ">= 50"), "thickness": (">= 3", ">= 50"), "rotation": ("", "")}
    for name, nuisance in (("background", Background()), ("thickness", Thickness()), ("rotation", Rotation())):
        change = recipe.CHANGES[name]
        draw = nuisance.sample(images.shape, generator=named_generator(3))
        plain = DataLoader(recipe.PlainImages(data.images.cpu(), data.labels, change=change), batch_size=BATCH)

        def alone(change: Callable = change) -> None:
            torch.from_numpy(np.stack([change(image) for image in raw])).to(device)

        def difference(name: str = name, nuisance: Nuisance = nuisance, draw: dict = draw) -> float:
            words = {"background": ("level",), "thickness": ("dilate", "side"), "rotation": ("degrees",)}[name]
            keys = {"dilate": "grow"}
            told = [{keys.get(word, word): draw[word][place].item() for word in words} for place in range(64)]
            slow = np.stack([recipe.CHANGES[name](image, **how) for image, how in zip(raw, told, strict=False)])
            fast = nuisance.apply(images[:64], {key: value[:64] for key, value in draw.items()})[:, 0].cpu()
            return float((fast - torch.from_numpy(slow).float() / 255).abs().mean())

        def fast(nuisance: Nuisance = nuisance, draw: dict = draw) -> None:
            nuisance.apply(images, draw)

        def loaded(nuisance: Nuisance = nuisance, size: int = BATCH) -> None:
            for batch, _ in ResidentLoader(data, batch_size=size).epoch(0):
                nuisance.apply(batch, nuisance.sample(batch.shape, generator=named_generator(4)))

        def chain(plain: DataLoader = plain) -> None:
            for batch, _ in plain:
                batch.to(device)

        common = {"units": len(data) / 1000, "unit": "1,000 images"}
        goal = goals[name]
        first, second = f"recipe, {name}", f"recipe, {name}, through a data set"
        variants += [
            Variant(first, "plain", alone, **common),
            Variant(
                f"ours, {name}", "same", fast, repeats=5, against=first, goal=goal[0], difference=difference, **common,
                note="difference is the mean over pixels; PIL's bicubic kernel is another one than torch's"
                if name == "rotation" else "",
            ),
            Variant(second, "plain", chain, **common),
            Variant(
                f"ours, {name}, batches", "same", loaded, repeats=5, against=second, goal=goal[1], **common
            ),
            Variant(
                f"ours, {name}, 512 at a time, as eKLD takes them", "same", partial(loaded, size=4 * BATCH), repeats=5,
                against=second, goal=goal[1], **common,
            ),
        ]  # fmt: skip
    return variants
