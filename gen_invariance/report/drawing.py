"""What all figures share: canvas, method styles, labels that any class name survives, axes and legends.

Colours are those of Okabe and Ito (2008), which people with a colour vision deficiency tell apart; markers and line
styles repeat the distinction for print without colour.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from gen_invariance.errors import ShapeError
from gen_invariance.report.labels import distinct, lines_of, shortened

WIDTH, DPI = 9.0, 200
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
GREY, INK = "#B8B8B8", "#222222"
_MARKERS = "osD^vPXh"
_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn in every figure."""

    colour: str
    marker: str
    line: str


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """A style for each method, by order of first appearance; make it once for all figures of a report.

    Example:
        >>> method_styles(["DRS", "oracle"])["DRS"].colour
        '#0072B2'
    """
    names = list(dict.fromkeys(methods))
    return {
        name: MethodStyle(COLOURS[n % 8], _MARKERS[(n + n // 8) % 8], _LINES[(n + n // 8) % 4])
        for n, name in enumerate(names)
    }


def canvas(height: float) -> tuple[Figure, Axes]:
    """A figure of full width and `height` inches with one clean axes."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    clean(axes)
    return figure, axes


def clean(axes: Axes, *, grid: str = "y") -> None:
    """No box, a quiet grid, text that stays legible."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#E4E4E4", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    axes.xaxis.label.set_size(12)
    axes.yaxis.label.set_size(12)


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG, without a time stamp, so equal figures are equal files."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def label(text: object, *, limit: int = 22) -> str:
    """`text` as matplotlib can draw it: on one line, at most `limit` characters, `$` as itself, no missing glyph.

    Characters that the font lacks (kana, say) are spelt as their code point: U+3042.
    """
    plain = " ".join(
        "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in str(text)).split()
    )
    spelt = "".join(letter if _has_glyph(letter) else f"U+{ord(letter):04X}" for letter in plain)
    cut = spelt if len(spelt) <= limit else spelt[: limit - 1].rstrip() + "…"
    return cut.replace("$", r"\$")


def legend_names(methods: Sequence[str], *, limit: int = 64, width: int = 38) -> dict[str, str]:
    """What each method is called in a legend: drawable, in lines of about `width` characters, never two alike."""
    cut = [shortened(label(name, limit=10**6).replace(r"\$", "$"), limit) for name in methods]
    named = zip(methods, distinct(cut), strict=True)
    return {method: lines_of(name, width).replace("$", r"\$") for method, name in named}


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
    places, longest = range(0, len(names), step), max(map(len, names), default=0)
    upright = longest + 1 > 95 * step / max(len(names), 1)  # 95 characters fit in one line under the axes
    axes.set_xticks(places, [names[k] for k in places], rotation=90 if upright else 0)
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


def numbers(values: Any) -> NDArray[np.float64]:
    """A tensor, array or list as float64 on the CPU."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def finite(values: Any) -> NDArray[np.float64]:
    """The finite entries of `values`, flattened."""
    flat = numbers(values).ravel()
    return flat[np.isfinite(flat)]


def tiles(images: Any) -> NDArray[np.float64]:
    """Images (M, C, H, W) or (M, H, W), uint8 or float in [0, 1], as (M, H, W, 3) in [0, 1].

    Raises:
        ShapeError: other axes or channel counts.
    """
    array = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    scaled = array / 255 if array.dtype == np.uint8 else np.nan_to_num(array.astype(np.float64)).clip(0, 1)
    if scaled.ndim == 3:
        scaled = scaled[:, None]
    if scaled.ndim != 4 or scaled.shape[1] not in (1, 3):
        raise ShapeError(
            f"a row of images must be (M, C, H, W) with C of 1 or 3, or (M, H, W), got {array.shape}; "
            "put the channel axis second"
        )
    return np.broadcast_to(scaled.transpose(0, 2, 3, 1), (len(scaled), *scaled.shape[2:], 3))


def group_names(groups: Mapping[str, Any] | Sequence[str], num_classes: int) -> list[str]:
    """Group of each class, from a list of K names or from masks (K,) by name.

    Raises:
        ShapeError: the length is not K, or a class is in no group or in several.
    """
    if not isinstance(groups, Mapping):
        if len(groups) != num_classes:
            raise ShapeError(f"got {len(groups)} group names for {num_classes} classes; give one for each class")
        return list(groups)
    masks = np.stack([numbers(mask) for mask in groups.values()]) if groups else np.zeros((0, num_classes))
    if masks.shape[1:] != (num_classes,) or (masks.astype(bool).sum(axis=0) != 1).any():
        raise ShapeError(
            f"group masks must put each of {num_classes} classes in exactly one group; check their lengths"
        )
    return [list(groups)[k] for k in masks.argmax(axis=0)]
