"""What all figures share: canvas, method styles, labels that can show any class name, axes and legends.

Each figure is a `matplotlib.figure.Figure` of its own with the Agg canvas: no pyplot, no global state. Pictures are 9
inches wide at 200 dots per inch, so text stays legible at 900 pixels on a screen and in print.

Colours are those of Okabe and Ito (2008), which people with a colour vision deficiency tell apart; markers and line
styles repeat the distinction for print without colour.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from gen_invariance.files import atomic_write
from gen_invariance.report.labels import make_distinct, shorten, wrap_name
from gen_invariance.stats import to_floats

WIDTH, DPI = 9.0, 200
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
GREY, INK = "#B8B8B8", "#222222"
_MARKERS = "osD^vPXh"
_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn in every figure, and what it is called in legends."""

    colour: str
    marker: str
    line: str
    label: str


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """A style for each method, by order of first appearance; make it once for all figures of a report.

    Example:
        >>> method_styles(["DRS", "oracle"])["DRS"].colour
        '#0072B2'
    """
    labels = legend_names(list(dict.fromkeys(methods)))
    return {
        name: MethodStyle(COLOURS[n % 8], _MARKERS[(n + n // 8) % 8], _LINES[(n + n // 8) % 4], label)
        for n, (name, label) in enumerate(labels.items())
    }


def make_canvas(height: float, *, rows: int = 1, grid: str = "y") -> tuple[Figure, list[Axes]]:
    """A figure of full width and `height` inches with clean axes below each other, grid lines across `grid`."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(rows, squeeze=False).ravel())
    for axes in panels:
        _clean(axes, grid)
    return figure, panels


def _clean(axes: Axes, grid: str) -> None:
    """No box, a quiet grid, text that stays legible."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#E4E4E4", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    axes.xaxis.label.set_size(12)
    axes.yaxis.label.set_size(12)


def render_png(figure: Figure) -> bytes:
    """The figure as PNG, without a time stamp, so equal figures are equal files."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def save_png(path: Path | str, png: bytes) -> None:
    """Write a picture, whole or not at all.

    Raises:
        OutputError: read-only or full disk.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(png)


def format_label(text: object, *, limit: int = 22) -> str:
    """`text` as matplotlib can draw it: on one line, at most `limit` characters, `$` as itself."""
    drawable = make_drawable(text)
    cut = drawable if len(drawable) <= limit else drawable[: limit - 1].rstrip() + "…"
    return cut.replace("$", r"\$")


def make_drawable(text: object) -> str:
    """`text` on one line, letters that the font lacks (kana, say) spelt as their code point: U+3042."""
    visible = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in str(text))
    line = " ".join(visible.split())
    return "".join(letter if _has_glyph(letter) else f"U+{ord(letter):04X}" for letter in line)


def legend_names(methods: Sequence[str], *, limit: int = 64, width: int = 38) -> dict[str, str]:
    """What each method is called in a legend: drawable, in lines of about `width` characters, never two alike."""
    drawable = [shorten(make_drawable(name), limit) for name in methods]
    named = zip(methods, make_distinct(drawable), strict=True)
    return {method: wrap_name(name, width).replace("$", r"\$") for method, name in named}


@lru_cache(maxsize=4096)
def _has_glyph(letter: str) -> bool:
    return bool(get_font(findfont(FontProperties())).get_char_index(ord(letter)))


def plain_log(axis: Axis) -> None:
    """Ticks of a log axis as 1, 2, 5, 10, 20, ... in plain digits."""
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def class_ticks(axes: Axes, names: Sequence[str]) -> None:
    """One tick for each name at 0, 1, ...; upright names, on a taller figure, where they would touch side by side.

    Of more than 45 names only some are shown.
    """
    step = 1 if len(names) <= 45 else int(np.ceil(len(names) / 30))
    longest = max(map(len, names), default=0)
    upright = longest + 1 > 95 * step / max(len(names), 1)  # 95 characters fit in one line under the axes
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90 if upright else 0)
    if upright:
        axes.figure.set_figheight(axes.figure.get_figheight() + 0.095 * longest)


def legend_above(figure: Figure, axes: Axes, *, columns: int | None = None, title: str | None = None) -> None:
    """The legend outside, above the axes, where it can cover nothing."""
    handles, texts = axes.get_legend_handles_labels()
    longest = max((len(line) for text in texts for line in text.splitlines()), default=1)
    fitting = max(1, int(112 / (longest + 7)))
    figure.legend(
        handles,
        texts,
        loc="outside upper left",
        ncols=min(columns or len(texts), fitting, max(len(texts), 1)),
        frameon=False,
        fontsize=11,
        title=title,
        title_fontsize=11,
        alignment="left",
    )


def finite_values(values: Any) -> NDArray[np.float64]:
    """The finite entries of a tensor, array or list, flattened."""
    flat = to_floats(values).ravel()
    return flat[np.isfinite(flat)]
