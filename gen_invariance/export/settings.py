"""What an export is asked for, and how many images that is for each class."""

from __future__ import annotations

import math
import re
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat

from gen_invariance.errors import SettingsError
from gen_invariance.settings import Count, Fraction, Rows, Side, Workers, settings_class


@settings_class("export")
class ResultSettings:
    """Which results are made, and which of them are kept."""

    target: str | int | float = "median"
    """images of every class: median, max, a number, or a ratio of the largest class such as 0.5"""
    results: Literal["native", "square"] = "native"
    """native: whole pictures of their source's size, file format and quality; square: PNG squares of data.image_size"""
    restore_size: bool | None = None
    """deprecated: true is results=native, false is results=square"""
    originals: Literal["copy", "link", "reference"] = "copy"
    """copy, link, or reference (in the manifest only)"""
    near_copy: Fraction = 0.004
    """reject results that differ less from their source, mean over pixels in [0, 1]"""
    off_distribution: NonNegativeFloat | None = 0.5
    """reject results whose brightness, contrast or sharpness lies so far outside the originals'; null keeps all"""
    per_source: Count | None = 10
    """results from one source at most, so that a handful of images does not fill a class; null: as many as it takes"""
    tries: Count = 5
    """how often rejected results are made up for"""
    batch_size: Rows = 64
    """images translated at once, and images of a new tar shard"""
    seed: int = 0
    """of all draws"""

    def __post_init__(self) -> None:
        target_size([1], self.target)
        if self.restore_size is not None:
            results = "native" if self.restore_size else "square"
            warnings.warn(f"restore_size is deprecated: use results={results}", DeprecationWarning, stacklevel=4)
            object.__setattr__(self, "results", results)
            object.__setattr__(self, "restore_size", None)


@settings_class("export")
class ExportSettings(ResultSettings):
    """What an export writes; none of these settings is about speed, all of them decide the result.

    Example:
        >>> from gen_invariance import ExportSettings
        >>> ExportSettings(target="max").target
        'max'
    """

    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the images lacking to the target that is made"""
    image_size: Side | None = None
    """side at which the translator was fitted, where it needs that; null: it takes pictures as they are"""

    def identity(self) -> dict[str, Any]:
        """The settings as JSON-able values; of an export of squares as before other results could be had."""
        values = asdict(self) | {"restore_size": False}
        unneeded = "results" if self.results == "square" else "restore_size"
        return {name: value for name, value in values.items() if name != unneeded}


@settings_class("export")
class WorkerSettings:
    """Who does the work; the result does not depend on these settings, except on the kind of device.

    Example:
        >>> from gen_invariance import WorkerSettings
        >>> WorkerSettings(processes=2).processes
        2
    """

    device: str = "cpu"
    """where to translate"""
    processes: Workers = 1
    """workers; the result does not depend on their number"""
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: as many actors of a Ray cluster, extra ray"""
    ray_address: str | None = None
    """of a running cluster; null takes RAY_ADDRESS, or starts one on this machine"""


def target_sizes(counts: Sequence[int], settings: ExportSettings) -> list[int]:
    """How many images each class is brought to, from the images it has and `target` and `strength`."""
    size = target_size([count for count in counts if count], settings.target)
    return [count + math.ceil(settings.strength * max(size - count, 0)) for count in counts]


def is_capped(count: int, goal: int, settings: ResultSettings) -> bool:
    """Whether `per_source` keeps a class of `count` images from its goal."""
    return settings.per_source is not None and goal - count > count * settings.per_source > 0


def target_size(counts: Sequence[int], target: str | int | float) -> int:
    """Images that `target` asks for in every class.

    Args:
        counts: images of each class that has any.
        target: see `ExportSettings`; numbers may come as text, ratios are written with a decimal point.

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
        f"export.target must be median, max, a number of images, or a ratio of the largest class such as 0.5, "
        f"got {text!r}"
    )
