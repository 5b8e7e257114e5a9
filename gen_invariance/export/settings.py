"""What an export is asked for, and how many images that is for each class."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gen_invariance.errors import SettingsError

ORIGINALS = ("copy", "link", "reference")


@dataclass(frozen=True)
class ExportSettings:
    """What is written; none of these settings is about speed, all of them decide the result.

    Attributes:
        target: images each class is brought to: "median" or "max" of the class sizes, a whole number N, or a ratio of
            the largest class in (0, 1] written with a decimal point (0.5: no class is smaller than half the
            largest). Classes never shrink.
        strength: share of the images that a class lacks to its target that is made, in (0, 1]; less than 1 where the
            translator is not fully trusted.
        image_size: side that pictures are scaled to for the translator; None leaves them as they are.
        restore_size: scale the whole picture so that its shorter side is `image_size`, translate it, and scale the
            result back to the picture's own size. Otherwise the central square is taken, and results are
            `image_size` x `image_size`.
        originals: "copy" them, "link" to them, or only "reference" them in the manifest.
        near_copy: reject results whose mean absolute difference to their source, in [0, 1], is smaller.
        off_distribution: reject results whose brightness, contrast or sharpness lies further outside the range of the
            originals than this share of the range, or below this share of the way from its lower end to 0; None
            keeps all.
        per_source: results from one source at most; None sets no limit.
        tries: how often rejected results are made up for by other draws.
        batch_size: images translated at once; also those of a tar shard and of a unit of work.
        seed: of all draws.

    Raises:
        SettingsError: a value out of its range.
    """

    target: str | int | float = "median"
    strength: float = 1.0
    image_size: int | None = None
    restore_size: bool = False
    originals: str = "copy"
    near_copy: float = 0.004
    off_distribution: float | None = 0.5
    per_source: int | None = None
    tries: int = 5
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        goal_of([1], self.target)
        if self.originals not in ORIGINALS:
            raise SettingsError(f"export: originals must be one of {', '.join(ORIGINALS)}, got {self.originals!r}")
        for name in ("image_size", "per_source", "tries", "batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SettingsError(f"export: {name} must be a whole number of at least 1, got {value!r}")
        for name, low, high in (("near_copy", 0, 1), ("off_distribution", 0, float("inf"))):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and low <= value <= high):
                raise SettingsError(f"export: {name} must lie in [{low}, {high}], got {value!r}")
        if not (isinstance(self.strength, int | float) and 0 < self.strength <= 1):
            raise SettingsError(f"export: strength must lie in (0, 1], got {self.strength!r}")
        if self.near_copy is None or not isinstance(self.seed, int):
            raise SettingsError("export: near_copy must be a number (0 keeps all but equal copies), seed a whole one")

    def identity(self) -> dict[str, Any]:
        """The settings as JSON-able values."""
        return asdict(self)


def goals_of(counts: Sequence[int], settings: ExportSettings) -> list[int]:
    """Images that each class is brought to; classes never shrink.

    Args:
        counts: images of each class.
        settings: its `target` and `strength`.
    """
    goal = goal_of([count for count in counts if count], settings.target)
    return [count + math.ceil(settings.strength * max(goal - count, 0)) for count in counts]


def goal_of(counts: Sequence[int], target: str | int | float) -> int:
    """Images that `target` asks for in every class.

    Args:
        counts: images of each class that has any.
        target: see `ExportSettings`; numbers may come as text.

    Raises:
        SettingsError: not a target.
    """
    text = str(target).strip()
    if text == "median":
        return int(statistics.median(counts))
    if text == "max":
        return max(counts)
    if re.fullmatch(r"\d{1,9}", text) and int(text) >= 1:
        return int(text)
    if re.fullmatch(r"\d*\.\d*|\d+e-\d+", text) and text != "." and 0 < float(text) <= 1:
        return max(1, round(float(text) * max(counts)))
    raise SettingsError(
        f"export: target must be median, max, a number of images, or a ratio of the largest class such as 0.5, "
        f"got {text!r}"
    )
