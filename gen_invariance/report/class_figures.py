"""Figures by class, as PNG bytes: sizes, a metric by class, a metric against class size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from gen_invariance.errors import DataError, ShapeError
from gen_invariance.measure.class_size import ClassSizeAssociation, class_size_association
from gen_invariance.records import measured
from gen_invariance.report.drawing import (
    COLOURS,
    MethodStyle,
    class_ticks,
    format_label,
    legend_above,
    make_canvas,
    method_styles,
    plain_log,
    render_png,
)
from gen_invariance.report.metrics import Metric, metric_info
from gen_invariance.report.pages import Picture
from gen_invariance.report.size_effect import pivot_classes
from gen_invariance.report.summary import repetitions
from gen_invariance.run import named_generator
from gen_invariance.stats import mean_interval, to_floats

_GROUP_COLOURS = {"many": "#0072B2", "medium": "#56B4E9", "few": "#D55E00"}
_DODGE = 0.55  # share of a class's slot over which the methods' points are spread


def class_size_bars(
    counts: ArrayLike, groups: Mapping[str, ArrayLike], *, class_names: Sequence[str] | None = None
) -> bytes:
    """Training images of each class, largest first, coloured by group.

    Args:
        counts: (K,) numbers of training images.
        groups: bool masks (K,) by group name, as `data.longtail.class_groups` gives; each class is in one group.
        class_names: shown under the bars where there is room (up to 30 classes).

    Raises:
        ShapeError: lengths do not fit, or a class is in no group or in several.
    """
    sizes = to_floats(counts).astype(int)
    names = _name_groups(groups, len(sizes))
    if class_names is not None and len(class_names) != len(sizes):
        raise ShapeError(f"got {len(class_names)} class names for {len(sizes)} classes; give one for each class")
    order = np.argsort(-sizes, kind="stable")
    colours = {name: _GROUP_COLOURS.get(name, COLOURS[n % 8]) for n, name in enumerate(dict.fromkeys(names))}
    figure, (axes,) = make_canvas(3.6)
    ranks = np.arange(len(sizes))
    axes.bar(ranks, np.maximum(sizes[order], 0.5), width=0.85, color=[colours[names[k]] for k in order])
    axes.set_yscale("log")
    axes.set_ylim(0.8, max(sizes.max(initial=1), 1) * 2)
    plain_log(axes.yaxis)
    axes.set_ylabel("Training images (log)")
    axes.set_xlim(-0.7, len(sizes) - 0.3)
    if len(sizes) <= 20:
        for rank, size in zip(ranks, sizes[order], strict=True):
            axes.annotate(str(size), (rank, max(size, 0.8)), (0, 2), textcoords="offset points", ha="center")
    if class_names is not None and len(sizes) <= 30:
        class_ticks(axes, [format_label(class_names[k], limit=16) for k in order])
        axes.set_xlabel("Class")
    else:
        axes.set_xlabel("Rank of the class by size")
    for name, colour in colours.items():
        classes = "1 class" if names.count(name) == 1 else f"{names.count(name)} classes"
        axes.plot([], [], "s", ms=10, color=colour, label=f"{format_label(name)} ({classes})")
    legend_above(figure, axes)
    return render_png(figure)


def _name_groups(groups: Mapping[str, ArrayLike], num_classes: int) -> list[str]:
    """Group of each class, from masks (K,) by name."""
    masks = np.array([to_floats(mask) for mask in groups.values()]).reshape(len(groups), -1)
    if masks.shape[1:] != (num_classes,) or (masks.astype(bool).sum(axis=0) != 1).any():
        raise ShapeError(
            f"group masks must put each of {num_classes} classes in exactly one group; check their lengths"
        )
    return [list(groups)[group] for group in masks.argmax(axis=0)]


def accuracy_by_class(
    frame: pd.DataFrame,
    *,
    metric: str = "accuracy",
    styles: Mapping[str, MethodStyle] | None = None,
    level: float = 0.95,
) -> bytes:
    """A per-class metric of each method, classes ordered by training size; points with intervals over seeds.

    Classes are lined up by their rank in size within each seed, since seeds may shuffle which class is large.

    Args:
        frame: records of one benchmark with `class_index` and `class_count`.
        metric: any per-class metric.
        styles: from `method_styles`; made from the frame when left out.
        level: confidence of the intervals.

    Raises:
        DataError: the frame has no such record, or records of several benchmarks.
    """
    rows, styles = _per_class(frame, metric, styles)
    rows["rank"] = rows.groupby(["method", "seed"])["class_count"].rank(method="first", ascending=False) - 1
    info = metric_info(metric)
    methods = list(dict.fromkeys(rows["method"]))
    figure, (axes,) = make_canvas(4.6)
    for n, method in enumerate(methods):
        table = rows[rows["method"] == method].pivot(index="rank", columns="seed", values="value")
        interval = mean_interval(table.to_numpy() * info.scale, level)
        style, ranks = styles[method], table.index.to_numpy()
        look = {"color": style.colour, "ls": style.line, "label": style.label}
        if len(ranks) > 20:  # bars could not be told apart
            axes.plot(ranks, interval.mean, lw=1.8, **look)
            axes.fill_between(ranks, interval.low, interval.high, color=style.colour, alpha=0.13, lw=0)
            continue
        shift = (n - (len(methods) - 1) / 2) * _DODGE / len(methods)
        # A single seed has no interval: its points stand alone.
        spread = None if np.isnan(interval.half_width).all() else np.nan_to_num(interval.half_width)
        axes.errorbar(ranks + shift, interval.mean, yerr=spread, marker=style.marker, ms=5.5, lw=1.3, **look)
    _rank_ticks(axes, rows)
    axes.set_ylabel(info.title)
    _from_zero(axes, info)
    legend_above(figure, axes)
    return render_png(figure)


def _per_class(
    frame: pd.DataFrame, metric: str, styles: Mapping[str, MethodStyle] | None
) -> tuple[pd.DataFrame, Mapping[str, MethodStyle]]:
    """Per-class records of `metric`, and the styles to draw their methods in."""
    frame = repetitions(frame)
    rows = frame[(frame["metric"] == metric) & frame["class_index"].notna() & frame["class_count"].notna()].copy()
    if rows.empty:
        raise DataError(f"no record of {metric!r} with class_index and class_count to draw; measure it by class first")
    configurations = rows[["method", "config_digest"]].drop_duplicates()
    if rows["benchmark"].nunique() > 1 or configurations.duplicated(["method"]).any():
        raise DataError("one figure shows one benchmark in one configuration; select its records first")
    return rows, styles or method_styles(frame["method"])


def _rank_ticks(axes: Axes, rows: pd.DataFrame) -> None:
    """Ticks of classes lined up by size: training images, and the name where all seeds agree on it."""
    by_rank = rows.groupby("rank")
    sizes = by_rank["class_count"].median().round().astype(int)
    names = by_rank["class_name"].agg(lambda names: names.iloc[0] if names.nunique(dropna=False) == 1 else None)
    named = names.notna().all() and len(sizes) <= 30
    if named:
        class_ticks(axes, [f"{format_label(name, limit=14)} ({size})" for name, size in zip(names, sizes, strict=True)])
    else:
        class_ticks(axes, [str(size) for size in sizes])
    axes.set_xlabel("Class (training images)" if named else "Training images of the class, largest class first")


def _from_zero(axes: Axes, info: Metric) -> None:
    """Start the axis at zero; shares end at 100 %."""
    if info.unit == "%":
        axes.set_ylim(-2, 102)
    elif axes.get_ylim()[0] < 0.3 * axes.get_ylim()[1]:
        axes.set_ylim(bottom=min(0, *(line.get_ydata().min() for line in axes.lines if len(line.get_ydata()))))


def ekld_against_class_size(
    frame: pd.DataFrame,
    *,
    metric: str = "ekld",
    styles: Mapping[str, MethodStyle] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
) -> bytes:
    """A per-class metric against training size on a log axis: one point a class and seed, and a fitted line a method.

    The band is the percentile interval of the line over classes resampled within seeds (`class_size_association`);
    slopes in the legend are changes of the metric for a tenfold class size, with that interval.

    Args:
        frame: records of one benchmark with `class_index` and `class_count`.
        metric: any per-class metric.
        styles: from `method_styles`; made from the frame when left out.
        level: confidence of bands and slopes.
        resamples: of the bootstrap.

    Raises:
        DataError: the frame has no such record, or records of several benchmarks.
    """
    rows, styles = _per_class(frame, metric, styles)
    info = metric_info(metric)
    figure, (axes,) = make_canvas(5.0)
    for method, table in rows.groupby("method", sort=False):
        sizes, values = pivot_classes(table)
        association = class_size_association(
            sizes, values * info.scale, generator=named_generator(0, "figure", metric, method), resamples=resamples,
            level=level,
        )  # fmt: skip
        _draw_association(axes, association, sizes, values * info.scale, style=styles[method], level=level)
    axes.set_xscale("log")
    plain_log(axes.xaxis)
    axes.set_xlabel("Training images of the class (log)")
    axes.set_ylabel(info.title)
    _from_zero(axes, info)
    legend_above(figure, axes, columns=2, title=f"Change for a tenfold class size [{level:.0%} interval]")
    return render_png(figure)


def _draw_association(
    axes: Axes,
    association: ClassSizeAssociation,
    sizes: np.ndarray,
    values: np.ndarray,
    *,
    style: MethodStyle,
    level: float,
) -> None:
    """One method's classes as points, their fitted line, and the band of lines fitted to resampled classes."""
    known, slope = (sizes > 0) & np.isfinite(values), association.slope
    axes.plot(sizes[known], values[known], style.marker, color=style.colour, alpha=0.4, ms=4.5, mew=0)
    text = f"{style.label}: {slope.value:+.2f} [{slope.low:+.2f}, {slope.high:+.2f}]"
    axes.plot([], [], ls=style.line, marker=style.marker, color=style.colour, lw=2.2, label=text)
    if np.isnan(slope.low):  # one class, or all of one size: points alone
        return
    x = np.geomspace(sizes[known].min(), sizes[known].max(), 60)
    lines = association.lines[np.isfinite(association.lines).all(axis=1)]
    tail = (1 - level) / 2
    low, high = np.quantile(lines[:, :1] + lines[:, 1:] * np.log10(x), [tail, 1 - tail], axis=0)
    axes.fill_between(x, low, high, color=style.colour, alpha=0.14, lw=0)
    axes.plot(x, association.intercept + slope.value * np.log10(x), ls=style.line, color=style.colour, lw=2.2)


def class_pictures(frame: pd.DataFrame, *, level: float = 0.95) -> list[Picture]:
    """Accuracy and invariance by class size, for each benchmark of `frame` that has figures by class."""
    styles = method_styles(frame["method"].unique())
    accuracy = "Test accuracy of classes by their rank in training size; bars are {level:g} % intervals over seeds."
    ekld = "Expected KL divergence (0 is perfect invariance) against training images of the class, with fitted lines."
    drawings = {
        "accuracy": ("Accuracy by class size", accuracy.format(level=100 * level), accuracy_by_class),
        "ekld": ("Invariance by class size", ekld, ekld_against_class_size),
    }
    pictures = []
    for benchmark, rows in measured(frame).groupby("benchmark", sort=False):
        for metric, (shows, caption, draw) in drawings.items():
            if rows[rows["metric"] == metric]["value"].notna().any():
                alt = f"{shows} of each method on {benchmark}."
                png = draw(rows, styles=styles, level=level)
                pictures.append(Picture(f"{shows}: {benchmark}", caption, alt, png))
    return pictures
