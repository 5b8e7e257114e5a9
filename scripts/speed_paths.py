"""The hot paths that `benchmark_speed.py` measures: for each the plain recipe and what the package has for it."""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import plain_recipe as recipe
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gen_invariance.augment.numbered import KeptCodes, TranslationBank
from gen_invariance.augment.stage import TailAugment
from gen_invariance.benchmark.demo import DemoSettings
from gen_invariance.benchmark.task import Prepared, prepare
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.train import TrainSettings, fit_classifier
from gen_invariance.data.images import ImageData
from gen_invariance.data.loader import ResidentLoader
from gen_invariance.measure.any_model import as_predict
from gen_invariance.measure.invariance import (
    InvarianceDifference,
    InvarianceScores,
    compare_invariance,
    measure_invariance,
)
from gen_invariance.measure.rounds import Rounds
from gen_invariance.nuisance import Background, CropFlip, Rotation, Thickness
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import Run, named_generator
from gen_invariance.translator.munit import MunitObjective, MunitTranslator
from gen_invariance.translator.pose import PoseTranslator
from gen_invariance.translator.spatial import SpatialTranslator


@dataclass
class Variant:
    """One way to do a path's work.

    Attributes:
        name: in the table.
        kind: "plain", "same" (mathematics, outputs compared), or "changed" (training or settings).
        run: does `units` of work, `repeats` times a measurement.
        unit: what one unit is.
        goal: of the ratio, in words.
        against: the variant that ratios are to; None takes the path's first.
        cost: the ratio is this over the other, not the other over this.
        difference: largest difference to the plain outputs, computed once.
        seconds: measures itself, in place of `run`.
        note: below the table.
    """

    name: str
    kind: str
    run: Callable[[], object] = lambda: None
    units: float = 1
    repeats: int = 1
    unit: str = "step"
    goal: str = ""
    against: str | None = None
    cost: bool = False
    difference: Callable[[], float] | None = None
    seconds: Callable[[], float] | None = None
    note: str = ""


SMALL = {"width": 16, "residual_blocks": 2}
BATCH, CLASSES = 128, 10


def pictures(count: int, channels: int = 1, size: int = 28) -> Tensor:
    """uint8 images of which half of the pixels are 0, as ink on an empty ground has."""
    images = torch.randint(256, (count, channels, size, size), generator=named_generator(0, "pixels"))
    return (images * (torch.rand(images.shape, generator=named_generator(0, "ground")) < 0.5)).to(torch.uint8)


def stored(count: int, device: torch.device, channels: int = 1, size: int = 28) -> ImageData:
    names = tuple(map(str, range(CLASSES)))
    return ImageData(pictures(count, channels, size), torch.arange(count) % CLASSES, names).to(device)


# ---- fitting MUNIT


def copy_weights(objective: MunitObjective, plain: recipe.PlainMunit) -> None:
    """The package's weights into the plain networks; biases that a normalisation removes have no counterpart."""

    def layers(module: nn.Module) -> list[nn.Module]:
        return [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]

    ours, own = objective.translator, plain.gens[0]
    pairs = (
        (ours.content_encoder, own.content),
        (ours.style_encoder, own.style),
        (nn.ModuleList([ours.decoder.blocks, ours.decoder.up, ours.decoder.last]), own.decoder),
        (ours.decoder.style, own.mlp),
        (objective.discriminator, plain.dis[0]),
    )
    with torch.no_grad():
        for first, second in pairs:
            for source, target in zip(layers(first), layers(second), strict=True):
                target.weight.copy_(source.weight.view_as(target.weight))
                if source.bias is not None:
                    target.bias.copy_(source.bias.view_as(target.bias))


def our_step(objective: MunitObjective, images: Tensor, draw: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step as `fit_translator` takes it."""
    out = objective.forward(images, draw)
    terms = objective.discriminator_terms(out)
    _update(objective, "discriminator", terms)
    objective.discriminator.requires_grad_(False)
    terms |= objective.translator_terms(out)
    _update(objective, "translator", {name: term for name, term in terms.items() if name != "discriminator"})
    objective.discriminator.requires_grad_(True)
    return terms


def _update(objective: MunitObjective, name: str, terms: dict[str, Tensor]) -> None:
    objective.optimizers[name].zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    objective.optimizers[name].step()


def objective_on(device: torch.device, **network: int) -> MunitObjective:
    translator = MunitTranslator(1, **network).to(device)
    made = MunitObjective(translator, discriminator_layers=3 if network else 4)
    made.discriminator.to(device)
    return made


def munit_same(device: torch.device, batch: int, goal: str) -> list[Variant]:
    """One domain, the same losses, both ways."""
    images = pictures(batch).float().to(device) / 255
    draw = {"style": torch.randn(batch, 8, generator=named_generator(1)).to(device)}
    ours, plain = objective_on(device), recipe.PlainMunit(1, domains=1, device=device)

    def difference() -> float:
        fresh, other = objective_on(device), recipe.PlainMunit(1, domains=1, device=device)
        copy_weights(fresh, other)
        one, two = our_step(fresh, images, draw), other.step([images * 2 - 1], [draw["style"]])
        return max(abs(float(one[name].detach()) - value) / abs(value) for name, value in two.items())

    return [
        Variant(
            f"recipe, one domain, batch {batch}", "plain", lambda: plain.step([images * 2 - 1], [draw["style"]])
        ),
        Variant(
            f"ours, batch {batch}", "same", lambda: our_step(ours, images, draw), goal=goal, difference=difference,
            note="difference is relative, of the five loss terms",
        ),
    ]  # fmt: skip


def munit_per_image(device: torch.device) -> list[Variant]:
    """What one training image of the generator that is kept costs."""
    variants = []
    plain, one = recipe.PlainMunit(1, device=device), pictures(1).float().to(device) / 127.5 - 1
    styles = [torch.randn(1, 8, device=device) for _ in range(2)]
    variants.append(
        Variant("recipe, two domains, batch 1", "plain", lambda: plain.step([one, one], styles), unit="image")
    )
    for name, network in (("ours, width 64, batch 16", {}), ("ours, munit_small, batch 16", SMALL)):
        objective, images = objective_on(device, **network), pictures(16).float().to(device) / 255
        draw = {"style": torch.randn(16, 8, device=device)}

        def run(objective: MunitObjective = objective, images: Tensor = images, draw: dict = draw) -> None:
            our_step(objective, images, draw)

        variants.append(Variant(name, "changed", run, units=16, unit="image", goal="with quality: docs/performance.md"))
    return variants


# ---- generating


def munit_on(device: torch.device, **network: int) -> MunitTranslator:
    return MunitTranslator(1, **network).to(device).eval().requires_grad_(False)


def generating(device: torch.device) -> list[Variant]:
    """Useful generated images: 64 of a batch of 128."""
    data, half = stored(256, device), BATCH // 2
    plain, objective = recipe.PlainMunit(1, domains=1, device=device), objective_on(device)
    copy_weights(objective, plain)
    variants = [
        Variant(
            "recipe: 128 translated, 64 used", "plain",
            lambda: recipe.generated_half(plain.gens[0], data.float_images(torch.arange(BATCH)) * 2 - 1),
            units=half, unit="image",
        ),
    ]  # fmt: skip
    rows = torch.arange(half, device=device)
    for name, nuisance in (
        ("width 64", objective.translator.eval().requires_grad_(False)),
        ("munit_small", munit_on(device, **SMALL)),
    ):
        same = name == "width 64"
        draw = nuisance.sample((half, 1, 28, 28), generator=named_generator(2))
        kept = KeptCodes(nuisance, data.images)
        kept.codes(torch.arange(256, device=device))

        def apply(nuisance: Nuisance = nuisance, draw: dict = draw) -> Tensor:
            with torch.no_grad():
                return nuisance.apply(data.float_images(rows), draw)

        def keep(kept: KeptCodes = kept, draw: dict = draw) -> Tensor:
            return kept.translate(rows, draw)

        def difference(fast: Callable[[], Tensor], draw: dict = draw, same: bool = same) -> Callable | None:
            with torch.no_grad():
                content, _ = plain.gens[0].encode(data.float_images(rows) * 2 - 1)
                slow = (plain.gens[0].decode(content, draw["style"].to(device)) + 1) / 2
            return (lambda: float((slow - fast()).abs().max())) if same else None

        kind, common = "same" if same else "changed", {"units": half, "unit": "image"}
        variants += [
            Variant(f"ours, {name}, only the used half", kind, apply, difference=difference(apply), **common),
            Variant(
                f"ours, {name}, codes kept", kind, keep, difference=difference(keep), **common,
                goal=">= 3.5" if same else "15 at equal quality",
            ),
            banked(f"ours, {name}, bank, each used 4 times, filling counted", nuisance, data, reuse=4),
        ]  # fmt: skip
    return variants


def banked(name: str, nuisance: Nuisance, data: ImageData, *, reuse: int) -> Variant:
    """Half batches out of a bank of one translation an image, over a whole period and so with all of its redrawing."""
    half, period = BATCH // 2, reuse * len(data) // (BATCH // 2)
    bank = TranslationBank(nuisance, data.images, versions=1, period=period, block=32)
    bank.advance(0)
    steps = itertools.count()

    def run() -> None:
        for step in itertools.islice(steps, period):
            bank.advance(step)
            rows = torch.arange(step * half, (step + 1) * half, device=data.device) % len(data)
            bank.translate(rows, {"version": torch.zeros(half, dtype=torch.int64)})

    return Variant(name, "changed", run, units=half * period, unit="image")


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
        step(*stage(x, y, numbers=numbers))

    def staged(nuisance: Nuisance, *, remember: bool = False) -> Callable[[], None]:
        stage = TailAugment(nuisance, torch.full((CLASSES,), 0.5)).to(device)
        if not remember:
            return lambda: with_stage(stage)
        stage.remember(data.images, data.labels)
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
    stage.remember(data.images, data.labels, versions=2, period=2 * len(data) * 8 // (BATCH // 2))
    steps, count = itertools.count(), 16

    def run() -> None:
        for number in itertools.islice(steps, count):
            stage.advance(number)
            rows = torch.randint(len(data), (BATCH,), device=device)
            step(*stage(data.float_images(rows), data.labels[rows], numbers=rows))

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

        def loaded(nuisance: Nuisance = nuisance) -> None:
            for batch, _ in ResidentLoader(data, batch_size=BATCH).epoch(0):
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
        ]  # fmt: skip
    return variants


# ---- eKLD


def ekld_forward(device: torch.device) -> list[Variant]:
    """eKLD of a ResNet-20 under backgrounds, 100 images, 20 draws."""
    data, draws = stored(100, device), 20
    model = build_classifier("resnet20", num_classes=CLASSES, channels=1).to(device).eval()

    def ours() -> InvarianceScores:
        return measure_invariance(
            model, data.images, data.labels, Background(), draws=draws, generator=named_generator(5)
        )

    def difference() -> float:
        generator, told = named_generator(5), []
        for _ in range(draws):
            told.append(Background().sample(data.images.shape, generator=generator)["level"].tolist())
        levels = iter([told[draw][image] for image in range(len(data)) for draw in range(draws)])
        slow = recipe.divergence(
            model, data.images, lambda image: recipe.background(image, level=next(levels)), draws=draws, gradients=False
        )
        by_class = np.array([slow[data.labels.cpu().numpy() == label].mean() for label in range(CLASSES)])
        return float(np.abs(by_class - ours().ekld.numpy()).max() / by_class.max())

    common = {"units": len(data) * draws / 1000, "unit": "1,000 images"}
    return [
        Variant(
            "recipe", "plain", lambda: recipe.divergence(model, data.images, recipe.background, draws=draws), **common
        ),
        Variant(
            "recipe, without gradients", "plain",
            lambda: recipe.divergence(model, data.images, recipe.background, draws=draws, gradients=False), **common,
        ),
        Variant("ours", "same", ours, goal=">= 2.2", difference=difference, note="difference is relative", **common),
        Variant("ours, against no gradients", "same", ours, against="recipe, without gradients", **common),
    ]  # fmt: skip


@cache
def trained_digits(device: torch.device, *, seed: int = 0) -> tuple[nn.Module, Prepared]:
    """A classifier of long-tailed turned digits, as the demonstration trains it, in a minute at most."""
    prepared = prepare(DemoSettings().rotated, seed=0)
    train = prepared.train.to(device)
    model = build_classifier("small_conv", num_classes=train.num_classes, channels=1, generator=named_generator(seed))
    how = TrainSettings(epochs=40, batch_size=64, schedule="cosine", warmup=3, sampling="class_balanced")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", kind="train", seed=seed)
        return fit_classifier(model, train, how, loss=nn.CrossEntropyLoss(), run=run, progress=False), prepared


def ekld_precision(device: torch.device) -> list[Variant]:
    """To the same standard error: 40 images of each class of the digits under rotation, the recipe's 100 draws."""
    model, prepared = trained_digits(device)
    rows = torch.cat([(prepared.test.labels == label).nonzero()[:40, 0] for label in range(CLASSES)])
    data, nuisance = prepared.test.subset(rows).to(device), Rotation()

    def ours(until: float | None) -> InvarianceScores:
        return measure_invariance(model, data.images, data.labels, nuisance, draws=100, standard_error=until)

    whole, early = ours(None), ours(0.0)
    errors = [f"{float(scores.standard_error.mean()):.4f}" for scores in (whole, early)]
    used = early.draws_by_class.double()
    note = (
        f"standard error, mean over classes: {errors[0]} nats with 100 draws, {errors[1]} with {int(used.min())} to "
        f"{int(used.max())} draws a class ({float(used.mean()):.0f} on average)"
    )
    other, few = trained_digits(device, seed=1)[0], 20

    def recipe_on(*models: nn.Module, gradients: bool = False) -> None:
        for each in models:
            recipe.divergence(each, data.images, recipe.rotation, draws=100, gradients=gradients)

    def pair(draws: int) -> InvarianceDifference:
        return compare_invariance(model, other, data.images, data.labels, nuisance, draws=draws)

    careful = "recipe, 100 draws, without gradients"
    both = "recipe, two classifiers, 100 draws each, without gradients"
    return [
        Variant("recipe, 100 draws", "plain", lambda: recipe_on(model, gradients=True)),
        Variant(careful, "plain", lambda: recipe_on(model)),
        Variant("ours, 100 draws", "same", lambda: ours(None), against=careful),
        Variant("ours, until draws hardly matter", "changed", lambda: ours(0.0), goal=">= 10", note=note),
        Variant("ours, the same, against no gradients", "changed", lambda: ours(0.0), against=careful),
        Variant(both, "plain", lambda: recipe_on(model, other)),
        Variant(
            f"ours, their difference, {few} draws of both", "changed", lambda: pair(few), against=both, goal=">= 10",
            note=errors_of_difference([model, other], data, nuisance, float(pair(few).standard_error.mean())),
        ),
    ]  # fmt: skip


def errors_of_difference(models: list[nn.Module], data: ImageData, nuisance: Nuisance, ours: float) -> str:
    """How precise the difference of two classifiers is: from two measurements of 100 draws, and under equal draws."""
    apart = []
    for place, each in enumerate(models):
        with as_predict(each, fold=True) as ask:
            rounds = Rounds(
                [ask], data.images, data.labels, nuisance, originals=None, num_classes=None, draws=100,
                batch_size=512, generator=named_generator(6, place),
            )  # fmt: skip
            with torch.no_grad():
                rounds.run(100)
        apart.append(rounds)
    one, two = (rounds.divergence[0] for rounds in apart)
    separate = (apart[0].standard_error(one) ** 2 + apart[0].standard_error(two) ** 2).sqrt()
    paired = apart[0].standard_error(one - two)
    return (
        f"standard error of the difference, mean over classes: {float(separate.mean()):.4f} nats from two figures of "
        f"100 draws, {float(paired.mean()):.4f} where their images are paired, {ours:.4f} here"
    )


# ---- starting up


def starting(device: torch.device) -> list[Variant]:
    """Processor seconds of child processes."""

    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def imported(line: str) -> Callable[[], float]:
        """Beyond what torch takes."""
        clock = "import time, torch; t = time.process_time()"
        program = f"{clock}; {line}; print(time.process_time() - t)"

        def run() -> float:
            done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
            return float(done.stdout)

        return run

    command = str(Path(sys.executable).with_name("gen-invariance"))
    common = {"unit": "start"}
    return [
        Variant("python -c pass", "plain", seconds=lambda: seconds(sys.executable, "-c", "pass"), **common),
        Variant("gen-invariance --help", "same", seconds=lambda: seconds(command, "--help"), goal="< 1 s", **common),
        Variant(
            "import gen_invariance, torch not counted", "same", seconds=imported("import gen_invariance"),
            goal="< 1.5 s", **common,
        ),
        Variant(
            "gen_invariance.TailAugment, torch not counted", "same",
            seconds=imported("import gen_invariance; gen_invariance.TailAugment"), **common,
        ),
    ]  # fmt: skip


PATHS: dict[str, Callable[[torch.device], list[Variant]]] = {
    "munit_step_1": lambda device: munit_same(device, 1, ">= 1.5"),
    "munit_step_16": lambda device: munit_same(device, 16, ">= 1.2"),
    "munit_image": munit_per_image,
    "generating": generating,
    "training_step": training_step,
    "loading": loading,
    "nuisances": nuisances,
    "ekld_forward": ekld_forward,
    "ekld_precision": ekld_precision,
    "starting": starting,
}
