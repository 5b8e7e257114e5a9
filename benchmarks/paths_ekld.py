"""Hot paths of eKLD: draws and precision, the plain recipe's way and the package's."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import plain_recipe as recipe
from benchmarks.timing import CLASSES, Variant, stored
from gen_invariance.benchmark.demo import ROTATED
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.data.images import ImageData
from gen_invariance.experiment.task import Prepared, prepare
from gen_invariance.measure.invariance import (
    InvarianceDifference,
    InvarianceScores,
    compare_invariance,
    measure_invariance,
)
from gen_invariance.measure.predict import as_predict
from gen_invariance.measure.rounds import Rounds
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Background
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import Run, named_generator


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
    prepared = prepare(ROTATED, seed=0)
    train = prepared.train.to(device)
    model = build_classifier("small_conv", num_classes=train.num_classes, channels=1, generator=named_generator(seed))
    how = TrainSettings(epochs=40, batch_size=64, schedule="cosine", warmup=3, sampling="class_balanced")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", kind="train", seed=seed)
        return fit_classifier(model, train, how, loss=nn.CrossEntropyLoss(), out=run, progress=False), prepared


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
    other, few = trained_digits(device, seed=1)[0], 12

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
        with as_predict(each, fuse=True) as ask:
            rounds = Rounds([ask], data.images, data.labels, nuisance)
            with torch.no_grad():
                rounds.run(100, generator=named_generator(6, place))
        apart.append(rounds)
    one, two = (rounds.divergence[0] for rounds in apart)
    separate = (apart[0].standard_error(one) ** 2 + apart[0].standard_error(two) ** 2).sqrt()
    paired = apart[0].standard_error(one - two)
    return (
        f"standard error of the difference, mean over classes: {float(separate.mean()):.4f} nats from two figures of "
        f"100 draws, {float(paired.mean()):.4f} where their images are paired, {ours:.4f} here"
    )
