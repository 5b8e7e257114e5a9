"""How candidates are compared. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from gen_invariance.settings import Count, CountOrZero, PathText, Rows, Text, Workers, settings_class
from gen_invariance.translator.settings import parse_seconds

_PACE = ("budget", "splits", "processes")


@settings_class("choose")
class RefereeSettings:
    """How candidates are compared on simulated tails.

    The budget decides how many splits are made and nothing else: a split's figures depend on the data, the seed and
    the settings alone.

    Example:
        >>> from gen_invariance import RefereeSettings
        >>> RefereeSettings(budget="2min").seconds
        120.0
    """

    budget: str = "10min"
    """time for all splits together, such as 90s, 10min or 2h; every candidate is tried once whatever it says"""
    splits: Count = 8
    """simulated tails at most"""
    steps: Annotated[int, Field(ge=20, le=10**9)] = 2000
    """updates of one training; fewer are unfair to heavy augmentation, which pays late"""
    batch_size: Rows = 32
    """images a step"""
    learning_rate: PositiveFloat = 0.1
    """peak rate of SGD, which falls along a cosine"""
    backbone: str = "small_conv"
    """network that is trained from scratch, unless weights are given"""
    weights: PathText | None = None
    """DEFAULT, a weights file or a run folder: heads on cached features of that backbone are trained instead"""
    image_size: Annotated[int, Field(ge=8, le=8192)] | None = 20
    """larger images are scaled down to this side, for a first look; null keeps them"""
    held_back: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """share of each large class that is held back to score on"""
    score_images: Annotated[int, Field(ge=2, le=10**9)] = 250
    """held-back images of a class at most; classes weigh the same"""
    cut_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """share of the large classes that are cut down to tail sizes"""
    head_from: Annotated[int, Field(ge=4, le=10**9)] = 20
    """smallest class that is large; less where there are too few such classes"""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """confidence of intervals"""
    views: Count = 4
    """with weights: augmented views of each training image"""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """of trainings: no, bf16, or auto, which is bf16 where the hardware multiplies it"""
    processes: Workers = 1
    """workers of one thread each; the result does not depend on it, except through more splits in the time"""
    fit_steps: CountOrZero = 300
    """with translators that are fitted in steps (the pose of figures): so many"""

    def __post_init__(self) -> None:
        parse_seconds(self.budget, "choose.budget")

    @property
    def seconds(self) -> float:
        """The budget in seconds."""
        return parse_seconds(self.budget, "choose.budget")

    def identity(self) -> dict[str, Any]:
        """The settings that decide the figures of a split, for a run's config."""
        return {name: value for name, value in asdict(self).items() if name not in _PACE}


@settings_class("choose")
class CandidateSettings(RefereeSettings):
    """Which candidates are compared, and how."""

    candidates: tuple[Text, ...] | None = None
    """words such as redraw@tail+trivialaugment@every_row; null: generic ones, and redraw in several uses"""

    @property
    def referee(self) -> RefereeSettings:
        """How candidates are compared."""
        return RefereeSettings(**{each.name: getattr(self, each.name) for each in fields(RefereeSettings)})
