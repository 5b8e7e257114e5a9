"""What is measured for the order of class subsets, and what is made of it. Needs no torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from gen_invariance.errors import SettingsError
from gen_invariance.settings import Count, CountOrZero, Depth, Rows, settings_class

Mode = Literal["frozen", "partial", "full", "joint"]
"""How a backbone serves a target: frozen features, or fine-tuned in its last blocks, in all, or with the source."""

Head = Literal["ncm", "knn", "logistic", "own"]
"""Nearest class mean; k nearest neighbours; logistic regression; a binary source's own decision as a cut."""

Simultaneous = Literal["bootstrap", "bonferroni", "none"]
"""How the level is shared among the cells: max-|t| bootstrap (never wider than Bonferroni), Bonferroni, or not."""


@settings_class("order.source")
class SourceSettings:
    """How a source's backbone is trained."""

    name: str = "small_conv"
    """backbone, as for train"""
    weights: str | None = None
    """pretrained start of a backbone that has one"""
    budget: Literal["per_class", "total", "steps"] = "per_class"
    """per_class, total (images), or steps"""
    images_per_class: Count = 40
    """for budget=per_class and budget=steps; a class that has fewer gives what it has"""
    total_images: Count = 500
    """for budget=total, shared by the classes of a subset"""
    epochs: Count = 6
    """for the first two budgets"""
    steps: Count = 150
    """for budget=steps, and for adapting to a target"""
    batch_size: Rows = 64
    """images of a step"""
    learning_rate: PositiveFloat = 0.05
    """of SGD"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """of SGD"""
    weight_decay: NonNegativeFloat = 5e-4
    """of SGD"""
    flip: bool = False
    """mirror images at random; wrong for letters and digits"""
    single: Literal["one_vs_rest"] | None = None
    """one_vs_rest allows subsets of one class, against an equal draw of the others"""

    def images_for(self, subset: tuple[int, ...]) -> int:
        """Images a class that the budget allows."""
        if self.budget == "total":
            return max(1, self.total_images // max(len(subset), 1))
        return self.images_per_class


@settings_class("order.analysis")
class AnalysisSettings:
    """What to make of the measurements."""

    threshold: Annotated[float, Field(gt=0.5, le=1)] = 0.95
    """two-class accuracy from which a pair counts as separated"""
    relative_margin: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """instead: within this of the model trained on exactly that pair; all pairs must be sources"""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """chance that any certain statement is wrong"""
    simultaneous: Simultaneous = "bootstrap"
    """bootstrap, bonferroni or none"""
    resamples: Annotated[int, Field(ge=100, le=10**6)] = 2000
    """bootstrap draws"""
    heldout_classes: tuple[int, ...] = ()
    """only pairs of these count; no source may hold one"""
    margin: NonNegativeFloat = 0.02
    """tolerated loss of the accuracy relation"""
    ways: Annotated[int, Field(ge=2, le=10**9)] = 5
    """of few-shot episodes"""
    shots: Count = 1
    """of few-shot episodes"""
    predictor_shots: Annotated[int, Field(ge=2, le=10**9)] = 20
    """labelled images of each class that predictors see"""

    def __post_init__(self) -> None:
        if len(self.heldout_classes) == 1:
            raise SettingsError("one held-out class has no pair; hold out two classes or more")


@settings_class("order")
class OrderSettings:
    """What is measured and how it is read.

    Example:
        >>> from gen_invariance import OrderSettings
        >>> OrderSettings(choose="pairs", seeds=(0, 1)).seeds
        (0, 1)
    """

    choose: Literal["list", "pairs", "size", "random", "head", "tail", "all"] = "random"
    """list (subsets alone), pairs, size, random, head or tail (prefixes of the class sizes), all (up to 12 classes)"""
    subsets: tuple[tuple[int | str, ...], ...] = ()
    """further ones by class name or index: [[cat,dog],[0,3,5]]"""
    size: CountOrZero = 2
    """classes of each subset, for choose=size"""
    count: CountOrZero = 8
    """for choose=random, and the next two"""
    smallest: CountOrZero = 2
    """classes of a random subset at least"""
    largest: CountOrZero | None = None
    """classes of a random subset at most; null: all"""
    sizes: tuple[CountOrZero, ...] = ()
    """lengths of head or tail prefixes; empty: all from 2"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of training, the same for every subset"""
    mode: Mode = "frozen"
    """frozen, or partial, full, joint: one more training for each pair of classes"""
    last_stages: Depth = 1
    """blocks that partial trains"""
    head: Head = "ncm"
    """on frozen features: ncm, knn, logistic, or own (pairs only)"""
    shots: Count | None = None
    """labelled images of each class for heads; null: the pool"""
    pool: Count = 40
    """images of each class kept for heads, at most half of a class"""
    fewest_seeds: Count = 1
    """subsets with fewer good seeds are left out"""
    draws: Count = 5
    """transformations of each image, for eKLD"""
    invariance_images: Count = 20
    """test images of each class, for eKLD"""
    curriculum: bool = False
    """also train up the longest chain, against jumping to its top"""
    source: SourceSettings = field(default_factory=SourceSettings)
    analysis: AnalysisSettings = field(default_factory=AnalysisSettings)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingsError(f"order.seeds must be one or more different numbers, got {list(self.seeds)}")
