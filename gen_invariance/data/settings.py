"""Which images, how long their tail, and the rules that classes are drawn by. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from gen_invariance.errors import SettingsError
from gen_invariance.settings import Count, PathText, Side, settings_class


@settings_class("data")
class SourceSettings:
    """Which data set, and how it is read."""

    source: str = "digits"
    """name of a reader: digits, folder, npz, table, cifar10 ..."""
    path: PathText | None = None
    """file or folder of the source, where it needs one"""
    image_size: Side | None = None
    """side to scale images to; null keeps the size"""
    skip_corrupt: bool = False
    """leave damaged image files out instead of stopping"""
    group: str | None = None
    """what tells images of one thing apart, where the source has it (npz, folder, gtsrb, omniglot)"""
    map_from: NonNegativeFloat = 1.0
    """gigabytes of decoded image files from which on they lie on the disk, in the cache folder, until the end"""


@settings_class("data")
class LongTailSettings:
    """How long the tail is, which images make it, and what is held out."""

    profile: Literal["exponential", "step", "zipf", "none"] = "exponential"
    """of class sizes: exponential, step, zipf, or none, which keeps the set as it is"""
    largest: Count | None = None
    """training images of the largest class; null takes what there is"""
    imbalance: float = 100.0
    """largest class over smallest"""
    power: NonNegativeFloat = 2.0
    """of the zipf profile"""
    smallest: Count = 1
    """training images of a class at least"""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of each class held out for validation, before the cut"""
    rest_is_test: bool = False
    """images that the cut leaves out are the test images"""
    shuffle_order: bool = True
    """draw which class is how large; false keeps the order of the source"""
    shortage: Literal["error", "repeat", "cap"] = "error"
    """of images for a class: error, repeat (each use under another draw), or cap (the class stays smaller)"""
    base_images: Count | None = None
    """with shortage=repeat: different images of a class at most"""
    test_images: Count | None = None
    """of a class at most"""
    cut: Literal["own", "cao", "first"] = "own"
    """which images of a class are kept: own, cao (Cao et al. 2019, order 0), first"""
    fill_tail: bool = False
    """fill small classes with images that the cut leaves out: an oracle"""

    def __post_init__(self) -> None:
        if self.base_images is not None and self.shortage != "repeat":
            raise SettingsError(f"data: base_images needs shortage=repeat, got {self.shortage!r}")
        if self.cut != "own" and self.shortage != "error":
            raise SettingsError(f"data: cut must be own with shortage={self.shortage}, got {self.cut!r}")
        if self.fill_tail and (self.shortage == "repeat" or self.rest_is_test or self.profile == "none"):
            raise SettingsError(
                "data.fill_tail (more_real) needs images that the cut leaves out, and there are none with "
                f"shortage={self.shortage}, rest_is_test={str(self.rest_is_test).lower()}, profile={self.profile}"
            )
        if self.shortage != "error" and (self.largest is None or self.profile == "none"):
            raise SettingsError(
                f"data: shortage={self.shortage} needs class sizes: set largest and a profile other than none, "
                f"got largest={self.largest} and profile={self.profile!r}"
            )


RULES = ("instance", "class_balanced", "square_root", "progressive", "effective_number")

Rule = str | Callable[[int], str]
"""The name of a sampling rule, or a callable that gives an epoch's."""


def second_phase(epoch: int, *, start: int) -> bool:
    """Whether `epoch`, counted from 0, belongs to the second phase, which begins with epoch `start`."""
    return epoch >= start


@dataclass(frozen=True)
class DelayedRule:
    """Delayed re-sampling: rule `before` up to epoch `start`, rule `after` from it on; call it with an epoch.

    Reference:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, Alg. 1.

    >>> rule = DelayedRule(start=160)
    >>> rule(159), rule(160)
    ('instance', 'class_balanced')
    """

    start: int
    before: str = "instance"
    after: str = "class_balanced"

    def __post_init__(self) -> None:
        rule_name(self.before)
        rule_name(self.after)
        if self.start < 0:
            raise SettingsError(f"delayed re-sampling must start at epoch 0 or later, got {self.start}")

    def __call__(self, epoch: int) -> str:
        """The rule of `epoch`."""
        return self.after if second_phase(epoch, start=self.start) else self.before


def rule_name(rule: Rule, epoch: int = 0) -> str:
    """The rule of `epoch`, whether `rule` is a name or a callable; unknown names raise `SettingsError`."""
    name = rule if isinstance(rule, str) else rule(epoch)
    if name not in RULES:
        raise SettingsError(f"unknown sampling rule {name!r}; choose one of {', '.join(RULES)}")
    return name
