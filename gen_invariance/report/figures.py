"""Figures as PNG bytes; with `class_figures` and `drawing` the only importer of matplotlib in this room.

Each function makes a `matplotlib.figure.Figure` of its own with the Agg canvas: no pyplot, no global state. Pictures
are 9 inches wide at 200 dots per inch, so text stays legible at 900 pixels on a screen and in print. A method keeps
its colour, marker and line in all figures that are given the same `styles`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from gen_invariance.errors import DataError, ShapeError
from gen_invariance.files import atomic_write
from gen_invariance.report.class_figures import accuracy_by_class, class_size_bars, ekld_against_class_size
from gen_invariance.report.drawing import (
    COLOURS,
    DPI,
    GREY,
    INK,
    WIDTH,
    MethodStyle,
    canvas,
    clean,
    finite,
    label,
    legend_above,
    method_styles,
    png_bytes,
    tiles,
)
from gen_invariance.stats import mean_interval

__all__ = [
    "MethodStyle",
    "Widths",
    "accuracy_by_class",
    "class_size_bars",
    "distribution_histogram",
    "ekld_against_class_size",
    "image_grid",
    "method_styles",
    "save_png",
    "training_curves",
    "widths_with_interval",
]


@dataclass(frozen=True)
class Widths:
    """Learned widths of one parameter over seeds, for `widths_with_interval`.

    Attributes:
        name: the parameter.
        values: (R,), one width for each seed.
        unit: of the widths.
        true: width of the nuisance that is in the data, when it is known.
        control: (R,), widths learned on data without the nuisance: what to expect from nothing.
    """

    name: str
    values: ArrayLike
    unit: str = ""
    true: float | None = None
    control: ArrayLike | None = None


def save_png(path: Path | str, png: bytes) -> None:
    """Write a picture, whole or not at all.

    Raises:
        OutputError: read-only or full disk.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(png)


def image_grid(
    rows: Sequence[Any], *, row_labels: Sequence[str], column_labels: Sequence[str] = (), title: str = ""
) -> bytes:
    """Images in a grid, one row for each entry of `rows`.

    Args:
        rows: each (M, C, H, W) with C of 1 or 3, or (M, H, W); uint8, or float in [0, 1]. Rows may differ in M.
        row_labels: one for each row.
        column_labels: for the leading columns; may be shorter than a row.
        title: above the grid.

    Raises:
        DataError: no image.
        ShapeError: axes, sizes or labels do not fit.
    """
    arrays = [tiles(row) for row in rows]
    if not any(len(row) for row in arrays):
        raise DataError("an image grid needs at least one image, got none")
    if len(row_labels) != len(arrays):
        raise ShapeError(f"an image grid of {len(arrays)} rows needs as many row labels, got {len(row_labels)}")
    sizes = {row.shape[1:3] for row in arrays}
    if len(sizes) > 1:
        raise ShapeError(f"all images of a grid must have one size, got {sorted(sizes)}; resize them first")
    mosaic, pitch = _mosaic(arrays)
    columns = max(map(len, arrays))

    # Everything is placed in inches, so that labels have the room they need and images stay square to the pixel.
    shown = [label(text, limit=34) for text in row_labels]
    left, above = 0.25 + 0.092 * max(map(len, shown)), 0.1 + 0.3 * bool(column_labels) + 0.35 * bool(title)
    cell = min(0.95, (WIDTH - left - 0.1) / columns)
    wide, tall = cell * mosaic.shape[1] / pitch[1], cell * mosaic.shape[0] / pitch[1]
    height = tall + above + 0.1
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    axes = figure.add_axes((left / WIDTH, 0.1 / height, wide / WIDTH, tall / height))
    axes.imshow(mosaic, interpolation="nearest", aspect="auto")
    axes.set_yticks((np.arange(len(arrays)) + 0.5) * pitch[0] - 0.5, shown)
    step = max(1, int(np.ceil(0.1 * max(map(len, column_labels), default=1) / cell)))
    places = np.arange(0, min(len(column_labels), columns), step)
    axes.set_xticks((places + 0.5) * pitch[1] - 0.5, [label(column_labels[k]) for k in places])
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=11)
    axes.spines[:].set_visible(False)
    figure.text(0.012, 1 - 0.08 / height, label(title, limit=90), va="top", fontsize=13)
    return png_bytes(figure)


def _mosaic(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[int, int]]:
    """All images on one white sheet, and the distance in pixels from one to the next, down and across."""
    height, width = arrays[0].shape[1:3]
    gap = max(1, round(max(height, width) / 12))
    columns = max(map(len, arrays))
    sheet = np.ones((len(arrays) * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for n, row in enumerate(arrays):
        for m, tile in enumerate(row):
            top, left = n * (height + gap), m * (width + gap)
            sheet[top : top + height, left : left + width] = tile
    return sheet, (height + gap, width + gap)


def distribution_histogram(
    learned: ArrayLike, true: ArrayLike | None, *, name: str, unit: str = "", bins: int = 36, title: str = ""
) -> bytes:
    """Samples of a learned parameter over samples of the true one, as densities on shared bins.

    Args:
        learned: draws, any shape, in `unit`.
        true: draws of the nuisance that is in the data; left out when it is unknown.
        name: of the parameter.
        unit: of both.
        bins: how many.
        title: above the axes.

    Raises:
        DataError: no finite learned draw.
    """
    ours = finite(learned)
    theirs = finite([] if true is None else true)
    if not len(ours):
        raise DataError(f"no finite draw of {name} to show; check the learned nuisance")
    everything = np.concatenate([ours, theirs])
    low, high = everything.min(), everything.max()
    edges = np.linspace(low, high, bins + 1) if high > low else np.linspace(low - 0.5, low + 0.5, bins + 1)
    figure, axes = canvas(3.6)
    if len(theirs):
        axes.hist(theirs, edges, density=True, color=GREY, label=f"True, in the data (sd {theirs.std():.3g})")
    outline = {"histtype": "step", "color": COLOURS[0], "lw": 2.4}
    axes.hist(ours, edges, density=True, label=f"Learned (sd {ours.std():.3g})", **outline)
    axes.set_xlabel(f"{name} ({unit})" if unit else name)
    axes.set_ylabel("Density")
    axes.set_title(label(title, limit=90), loc="left", fontsize=13)
    legend_above(figure, axes)
    return png_bytes(figure)


def training_curves(rows: Sequence[Mapping[str, Any]], *, keys: Sequence[str] | None = None, x: str = "step") -> bytes:
    """Logged numbers against the step, one small panel each.

    Args:
        rows: as `Run.metrics` gives them; a row may lack a key.
        keys: which to draw; all numeric ones but `x` when left out.
        x: the key on the horizontal axis.

    Raises:
        DataError: nothing to draw.
    """
    table = pd.DataFrame([row for row in rows if x in row])
    numeric = [name for name in table if name != x and pd.api.types.is_numeric_dtype(table[name])]
    keys = list(keys) if keys is not None else numeric
    if not keys or table.empty or not set(keys) <= set(numeric):
        raise DataError(f"no training curve to draw: rows with {x!r} hold {numeric or 'no number'}, asked for {keys}")
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.2 * lines), dpi=DPI, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axes, key in zip(grid, keys, strict=False):
        known = table[[x, key]].dropna()
        axes.plot(known[x], known[key], color=COLOURS[0], lw=1.4, marker="o" if len(known) < 2 else "")
        axes.set_title(label(key, limit=26), loc="left", fontsize=11)
        clean(axes)
    for axes in grid[len(keys) :]:
        axes.remove()
    for axes in grid[max(0, len(keys) - columns) : len(keys)]:  # the panel below may be one of the removed
        axes.tick_params(labelbottom=True)
    figure.supxlabel(x.capitalize(), fontsize=11)
    return png_bytes(figure)


def widths_with_interval(widths: Sequence[Widths], *, level: float = 0.95) -> bytes:
    """Learned widths of each parameter: a point a seed, the mean with its interval, beside truth and control.

    Each parameter has an axis of its own, from 0, in its own unit.

    Raises:
        DataError: no parameter.
    """
    if not widths:
        raise DataError("no learned width to show; give at least one parameter")
    figure = Figure(figsize=(WIDTH, 0.6 + 1.05 * len(widths)), dpi=DPI, layout="constrained")
    for axes, entry in zip(figure.subplots(len(widths), squeeze=False).ravel(), widths, strict=True):
        lanes = [("learned", entry.values, COLOURS[0], "o")]
        lanes += [("no nuisance in data", entry.control, COLOURS[1], "s")] if entry.control is not None else []
        for lane, (_, values, colour, marker) in enumerate(lanes):
            seeds = finite(values)
            interval = mean_interval(seeds, level)
            axes.plot(seeds, np.full(len(seeds), lane), marker, color=colour, alpha=0.45, ms=5, mew=0)
            spread = None if np.isnan(interval.half_width) else [interval.half_width]
            look = {"color": colour, "marker": marker, "ms": 9, "mfc": "white", "mew": 2, "capsize": 5, "elinewidth": 2}
            axes.errorbar([interval.mean], [lane], xerr=spread, zorder=3, **look)
        if entry.true is not None:
            axes.axvline(entry.true, color=INK, ls="--", lw=1.6, label="true width of the nuisance in the data")
        axes.set_yticks(range(len(lanes)), [lane[0] for lane in lanes])
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(left=min(0, axes.get_xlim()[0]) if axes.get_xlim()[0] < 0 else 0)
        clean(axes, grid="x")
        title = f"{entry.name} ({entry.unit})" if entry.unit else entry.name
        axes.set_title(label(title, limit=60), loc="left", fontsize=12)
    marked = [axes for axes in figure.axes if axes.get_legend_handles_labels()[0]]
    if marked:
        legend_above(figure, marked[0])
    return png_bytes(figure)
