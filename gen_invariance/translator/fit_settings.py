"""`FitSettings`: how long a translator is fitted, on which classes, and how often one looks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_PACE = ("log_every", "sample_every", "checkpoint_every", "budget")
_LATER = {"average": 0.0, "watch_every": 0, "patience": 0}  # added later; off they are not named, so old runs go on


@dataclass(frozen=True)
class FitSettings:
    """How long, on what, and how often to look.

    Attributes:
        steps: updates of the translator (and as many of its adversary).
        batch_size: images a step, over all processes; drawn class-balanced.
        classes: "head" fits on classes with at least `head_from` images, "all" on every class, a list of names on
            these classes, however small.
        head_from: the smallest training count of a head class.
        flip: mirror half of the images; only where a mirrored image keeps its label.
        average: decay of the moving average of the translator's weights, which is then what is saved and shown; it
            rises to it. 0 keeps the weights as they are.
        budget: time after which fitting stops, such as "90s", "10min" or "2h"; None for no limit. Parts of a fit that
            was resumed count together, those that ran without a budget do not.
        watch_every: steps between looks at the quality on held-out images (see `watch`); 0 does not look.
        patience: looks without a better score after which fitting stops; 0 never stops.
        log_every, sample_every, checkpoint_every: steps between metrics lines, sample grids and checkpoints.
        mixed_precision: "no", "bf16" or "fp16" (GPU).

    Raises:
        SettingsError: a value out of its range.
    """

    steps: int = 2000
    batch_size: int = 16
    classes: str | tuple[str | int, ...] = "head"
    head_from: int = 20
    flip: bool | None = False
    average: float = 0.0
    budget: str | None = None
    watch_every: int = 0
    patience: int = 0
    log_every: int = 50
    sample_every: int = 500
    checkpoint_every: int = 500
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "head_from", "log_every", "sample_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"fit.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("watch_every", "patience"):
            if getattr(self, name) < 0:
                raise SettingsError(f"fit.{name} must be at least 0, got {getattr(self, name)}")
        if self.patience and not self.watch_every:
            raise SettingsError("fit.patience counts looks at the quality; set fit.watch_every, too")
        if not 0 <= self.average < 1:
            raise SettingsError(f"fit.average must lie in [0, 1), got {self.average}; 0.999 is usual")
        if self.budget is not None:
            seconds_of(self.budget)
        object.__setattr__(self, "classes", checked_classes(self.classes, "fit.classes"))
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise SettingsError(f"fit.mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}")

    def identity(self) -> dict[str, object]:
        """The settings that decide the result, for a run's config; how often to look and when to stop is left out."""
        given = {name: value for name, value in asdict(self).items() if name not in _PACE}
        return {name: value for name, value in given.items() if name not in _LATER or value != _LATER[name]}


def seconds_of(budget: str) -> float:
    """Seconds of a text such as "90s", "1.5 min" or "2h".

    Raises:
        SettingsError: it is something else, or no time at all.

    >>> seconds_of("10min")
    600.0
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", budget)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not seconds:
        raise SettingsError(f"fit.budget must be a time such as 90s, 10min or 2h, got {budget!r}")
    return seconds


def checked_classes(classes: str | Sequence[str | int], name: str) -> str | tuple[str, ...]:
    """`classes` as "head", "all" or a tuple of names; `name` is what the setting is called.

    Raises:
        SettingsError: something else, an empty list, or a class twice.
    """
    if isinstance(classes, str):
        if classes not in ("head", "all"):
            raise SettingsError(f"{name} must be head, all or a list of class names, got {classes!r}")
        return classes
    names = tuple(map(str, classes))  # the name of a digit arrives as a number
    if not names or len(set(names)) < len(names):
        raise SettingsError(f"{name} must name at least one class, and each once, got {list(names)}")
    return names


def chosen_classes(
    data: ImageData, classes: str | Sequence[str], *, head_from: int, advice: str = "lower head_from"
) -> list[int]:
    """Labels of the classes that `classes` chooses, ascending; each has an image.

    Args:
        data: the training set.
        classes: "head", "all", or names.
        head_from: the smallest count of a head class.
        advice: what the error says to do when no class is large enough.

    Raises:
        SettingsError: no class is large enough, a name does not exist, or a named class has no image.
    """
    counts = data.counts.tolist()
    if isinstance(classes, str):
        least = head_from if classes == "head" else 1
        chosen = [label for label, count in enumerate(counts) if count >= least]
        if not chosen:
            raise SettingsError(
                f"{data.name}: no class has {least} images or more (largest: {int(data.counts.max())}); {advice}"
            )
        return chosen
    place = {name: label for label, name in enumerate(data.class_names)}
    for name in classes:
        if name not in place:
            raise SettingsError(f"{data.name} has no class {name!r} to fit on; choose of {_some(data.class_names)}")
        if not counts[place[name]]:
            raise SettingsError(f"{data.name}: class {name!r} has no image to fit on; name another one")
    return sorted(place[name] for name in classes)


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def class_members(data: ImageData, settings: FitSettings) -> list[Tensor]:
    """Indices of each chosen class's images.

    Raises:
        SettingsError: see `chosen_classes`.
    """
    advice = "lower fit.head_from or set fit.classes=all"
    chosen = chosen_classes(data, settings.classes, head_from=settings.head_from, advice=advice)
    labels = data.labels.cpu()
    return [(labels == label).nonzero().squeeze(1) for label in chosen]
