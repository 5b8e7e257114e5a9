"""How long a translator is fitted, on what, and how closely it is looked at. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import Field

from gen_invariance.errors import SettingsError
from gen_invariance.settings import Count, CountOrZero, Rows, Text, settings_class

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_PACE = ("log_every", "sample_every", "checkpoint_every", "budget")
_LATER = {"average": 0.0, "watch_every": 0, "patience": 0}  # added later; off they are not named, so old runs go on


@settings_class("fit")
class FitSettings:
    """How long a translator is fitted, on what, and how often results are written.

    Example:
        >>> from gen_invariance import FitSettings
        >>> FitSettings(steps=100, batch_size=16).steps
        100
    """

    steps: Count = 300
    """Updates of the translator, and as many of its adversary."""
    batch_size: Rows = 64
    """Images a step, over all processes, drawn class-balanced."""
    classes: Literal["head", "all"] | tuple[Text, ...] = "head"
    """head: classes of head_from images or more; all: every class; or names such as [cat, dog], however small."""
    head_from: Count = 20
    """Smallest training count of a head class."""
    flip: bool | None = None
    """Mirror half of the images; null asks the data set whether that keeps the label, and does not without one."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights, which is then what is kept, such as 0.999; 0: none."""
    budget: str | None = None
    """Stop after this time, such as 90s, 10min or 2h; parts of a resumed fit that ran with a budget count together."""
    watch_every: CountOrZero = 0
    """Steps between evaluations on a fifth of the images, held out; the best weights are kept; 0: never."""
    patience: CountOrZero = 0
    """Stop after so many evaluations without a better score; 0: never."""
    log_every: Count = 25
    """Steps between lines of metrics."""
    sample_every: Count = 100
    """Steps between sample grids."""
    checkpoint_every: Count = 100
    """Steps between checkpoints."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """bf16 and fp16 need a GPU."""

    def __post_init__(self) -> None:
        if self.patience and not self.watch_every:
            raise SettingsError("fit.patience counts evaluations of the quality; set fit.watch_every, too")
        if self.budget is not None:
            parse_seconds(self.budget)
        if not isinstance(self.classes, str) and len(set(self.classes)) != max(len(self.classes), 1):
            raise SettingsError(f"fit.classes must name at least one class, and each once, got {list(self.classes)}")

    def identity(self) -> dict[str, object]:
        """The settings that decide the result, for a run's config; how often to write and when to stop is left out."""
        given = {name: value for name, value in asdict(self).items() if name not in _PACE} | {"flip": bool(self.flip)}
        return {name: value for name, value in given.items() if name not in _LATER or value != _LATER[name]}


def parse_seconds(budget: str, where: str = "fit.budget") -> float:
    """Seconds of a text such as "90s", "1.5 min" or "2h"; `where` is what errors call it.

    Raises:
        SettingsError: it is something else, or no time at all.

    >>> parse_seconds("10min")
    600.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", budget)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not seconds:
        raise SettingsError(f"{where} must be a time such as 90s, 10min or 2h, got {budget!r}")
    return seconds


@settings_class("quality")
class AssessSettings:
    """How closely a translator is looked at."""

    draws: Annotated[int, Field(ge=2, le=10**9)] = 4
    """Translations of each image."""
    neighbours: Count = 5
    """k of precision, recall, density and coverage."""
    failures: CountOrZero = 8
    """Worst translations to show."""
