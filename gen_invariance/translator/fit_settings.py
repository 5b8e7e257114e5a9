"""`FitSettings`: how long a translator is fitted, on which classes, how often results are written; rows of classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.settings import Text, settings_class

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

    steps: PositiveInt = 300
    """Updates of the translator, and as many of its adversary."""
    batch_size: PositiveInt = 64
    """Images a step, over all processes, drawn class-balanced."""
    classes: Literal["head", "all"] | tuple[Text, ...] = "head"
    """head: classes of head_from images or more; all: every class; or names such as [cat, dog], however small."""
    head_from: PositiveInt = 20
    """Smallest training count of a head class."""
    flip: bool | None = None
    """Mirror half of the images; null asks the data set whether that keeps the label, and does not without one."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights, which is then what is kept, such as 0.999; 0: none."""
    budget: str | None = None
    """Stop after this time, such as 90s, 10min or 2h; parts of a resumed fit that ran with a budget count together."""
    watch_every: NonNegativeInt = 0
    """Steps between evaluations on a fifth of the images, held out; the best weights are kept; 0: never."""
    patience: NonNegativeInt = 0
    """Stop after so many evaluations without a better score; 0: never."""
    log_every: PositiveInt = 25
    """Steps between lines of metrics."""
    sample_every: PositiveInt = 100
    """Steps between sample grids."""
    checkpoint_every: PositiveInt = 100
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


def parse_seconds(budget: str) -> float:
    """Seconds of a text such as "90s", "1.5 min" or "2h".

    Raises:
        SettingsError: it is something else, or no time at all.

    >>> parse_seconds("10min")
    600.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", budget)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not seconds:
        raise SettingsError(f"fit.budget must be a time such as 90s, 10min or 2h, got {budget!r}")
    return seconds


def find_class_members(data: ImageData, settings: FitSettings) -> list[Tensor]:
    """Rows of each class that `settings` chooses, by ascending label, int64 on the CPU; each class has an image.

    Raises:
        SettingsError: no class is large enough, a name does not exist, or a named class has no image.
    """
    counts = data.counts.tolist()
    if isinstance(settings.classes, str):
        least = settings.head_from if settings.classes == "head" else 1
        chosen = [label for label, count in enumerate(counts) if count >= least]
        if not chosen:
            raise SettingsError(
                f"{data.name}: no class has {least} images or more (largest: {max(counts)}); lower fit.head_from or "
                "set fit.classes=all"
            )
        return find_class_rows(data, chosen)
    label_of = {name: label for label, name in enumerate(data.class_names)}
    for name in settings.classes:
        if name not in label_of:
            raise SettingsError(f"{data.name} has no class {name!r} to fit on; choose of {_first_of(data.class_names)}")
        if not counts[label_of[name]]:
            raise SettingsError(f"{data.name}: class {name!r} has no image to fit on; name another one")
    return find_class_rows(data, sorted(label_of[name] for name in settings.classes))


def _first_of(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def find_class_rows(data: ImageData, labels: Sequence[int]) -> list[Tensor]:
    """Rows of the images of each class in `labels`, int64 on the CPU."""
    all_labels = data.labels.cpu()
    return [(all_labels == label).nonzero().squeeze(1) for label in labels]


def draw_balanced_rows(members: Sequence[Tensor], count: int, *, generator: torch.Generator) -> Tensor:
    """`count` class-balanced rows, int64 (B,): a class uniformly, then one of its `members`, the rows of each class."""
    sizes = torch.tensor([len(rows) for rows in members])
    starts = sizes.cumsum(0) - sizes
    classes = torch.randint(len(members), (count,), generator=generator)
    within = (torch.rand(count, generator=generator) * sizes[classes]).long()
    return torch.cat(list(members))[starts[classes] + within]
