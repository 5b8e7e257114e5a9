"""Figures of images and of learned parameters, as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from gen_invariance.data.images import to_float
from gen_invariance.errors import DataError, ShapeError
from gen_invariance.report.drawing import (
    COLOURS,
    DPI,
    GREY,
    INK,
    WIDTH,
    finite_values,
    format_label,
    legend_above,
    make_canvas,
    render_png,
)
from gen_invariance.stats import mean_interval


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


def image_grid(rows: Sequence[Any], *, row_labels: Sequence[str], column_labels: Sequence[str] = ()) -> bytes:
    """Images in a grid, one row for each entry of `rows`.

    Args:
        rows: each (M, C, H, W) with C of 1 or 3, or (M, H, W); uint8, or float in [0, 1]. Rows may differ in M.
        row_labels: one for each row.
        column_labels: for the leading columns; may be shorter than a row.

    Raises:
        DataError: no image.
        ShapeError: axes, sizes or labels do not fit.
    """
    arrays = [_to_colour(row) for row in rows]
    if not any(len(row) for row in arrays):
        raise DataError("an image grid needs at least one image, got none")
    if len(row_labels) != len(arrays):
        raise ShapeError(f"an image grid of {len(arrays)} rows needs as many row labels, got {len(row_labels)}")
    sizes = {row.shape[1:3] for row in arrays}
    if len(sizes) > 1:
        raise ShapeError(f"all images of a grid must have one size, got {sorted(sizes)}; resize them first")
    mosaic, pitch = _make_mosaic(arrays)
    columns = max(map(len, arrays))

    # Everything is placed in inches, so that labels have the room they need and images stay square to the pixel.
    names = [format_label(text, limit=34) for text in row_labels]
    left, above = 0.25 + 0.092 * max(map(len, names)), 0.1 + 0.3 * bool(column_labels)
    cell = min(0.95, (WIDTH - left - 0.1) / columns)
    wide, tall = cell * mosaic.shape[1] / pitch[1], cell * mosaic.shape[0] / pitch[1]
    height = tall + above + 0.1
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    axes = figure.add_axes((left / WIDTH, 0.1 / height, wide / WIDTH, tall / height))
    axes.imshow(mosaic, interpolation="nearest", aspect="auto")
    axes.set_yticks((np.arange(len(arrays)) + 0.5) * pitch[0] - 0.5, names)
    step = max(1, int(np.ceil(0.1 * max(map(len, column_labels), default=1) / cell)))
    labelled = np.arange(0, min(len(column_labels), columns), step)
    axes.set_xticks((labelled + 0.5) * pitch[1] - 0.5, [format_label(column_labels[k]) for k in labelled])
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=11)
    axes.spines[:].set_visible(False)
    return render_png(figure)


def _to_colour(images: Any) -> NDArray[np.float64]:
    """Images (M, C, H, W) or (M, H, W), uint8 or float, as (M, H, W, 3) in [0, 1]."""
    scaled = to_float(torch.as_tensor(images).detach().cpu()).double().nan_to_num().clamp(0, 1)
    if scaled.ndim == 3:
        scaled = scaled[:, None]
    if scaled.ndim != 4 or scaled.shape[1] not in (1, 3):
        raise ShapeError(
            f"a row of images must be (M, C, H, W) with C of 1 or 3, or (M, H, W), got {tuple(scaled.shape)}; "
            "put the channel axis second"
        )
    return scaled.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _make_mosaic(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[int, int]]:
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
    learned: ArrayLike, true: ArrayLike | None, *, name: str, unit: str = "", bins: int = 36
) -> bytes:
    """Samples of a learned parameter over samples of the true one, as densities on shared bins.

    Args:
        learned: draws, any shape, in `unit`.
        true: draws of the nuisance that is in the data; None when it is unknown.
        name: of the parameter.
        unit: of both.
        bins: how many.

    Raises:
        DataError: no finite learned draw.
    """
    drawn, expected = finite_values(learned), finite_values([] if true is None else true)
    if not len(drawn):
        raise DataError(f"no finite draw of {name} to show; check the learned nuisance")
    edges = np.histogram_bin_edges(np.concatenate([drawn, expected]), bins)
    figure, (axes,) = make_canvas(3.6)
    if len(expected):
        axes.hist(expected, edges, density=True, color=GREY, label=f"True, in the data (sd {expected.std():.3g})")
    outline = {"histtype": "step", "color": COLOURS[0], "lw": 2.4}
    axes.hist(drawn, edges, density=True, label=f"Learned (sd {drawn.std():.3g})", **outline)
    axes.set_xlabel(f"{name} ({unit})" if unit else name)
    axes.set_ylabel("Density")
    legend_above(figure, axes)
    return render_png(figure)


def widths_with_interval(widths: Sequence[Widths], *, level: float = 0.95) -> bytes:
    """Learned widths of each parameter: a point a seed, the mean with its interval, beside truth and control.

    Each parameter has an axis of its own, from 0, in its own unit.

    Raises:
        DataError: no parameter.
    """
    if not widths:
        raise DataError("no learned width to show; give at least one parameter")
    figure, panels = make_canvas(0.6 + 1.05 * len(widths), rows=len(widths), grid="x")
    for axes, entry in zip(panels, widths, strict=True):
        lanes = [("learned", entry.values, COLOURS[0], "o")]
        if entry.control is not None:
            lanes.append(("no nuisance in data", entry.control, COLOURS[1], "s"))
        for lane, (_, values, colour, marker) in enumerate(lanes):
            seeds = finite_values(values)
            interval = mean_interval(seeds, level)
            axes.plot(seeds, np.full(len(seeds), lane), marker, color=colour, alpha=0.45, ms=5, mew=0)
            spread = None if np.isnan(interval.half_width) else [interval.half_width]
            axes.errorbar(
                [interval.mean], [lane], xerr=spread, zorder=3, color=colour, marker=marker, ms=9, mfc="white", mew=2,
                capsize=5, elinewidth=2,
            )  # fmt: skip
        if entry.true is not None:
            axes.axvline(entry.true, color=INK, ls="--", lw=1.6, label="true width of the nuisance in the data")
        axes.set_yticks(range(len(lanes)), [name for name, *_ in lanes])
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(left=min(0, axes.get_xlim()[0]) if axes.get_xlim()[0] < 0 else 0)
        title = f"{entry.name} ({entry.unit})" if entry.unit else entry.name
        axes.set_title(format_label(title, limit=60), loc="left", fontsize=12)
    marked = [axes for axes in panels if axes.get_legend_handles_labels()[0]]
    if marked:
        legend_above(figure, marked[0])
    return render_png(figure)
