"""How per-class eKLD moves with class size: rank correlation and slope with intervals, by benchmark and method."""

from __future__ import annotations

import numpy as np
import pandas as pd

from gen_invariance.measure.class_size import class_size_association
from gen_invariance.report.summary import repetitions
from gen_invariance.run import named_generator


def pivot_classes(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Class sizes and figures of one method, float64 (seeds, classes) each; 0 and NaN where there is none."""
    sizes = table.pivot(index="seed", columns="class_index", values="class_count").fillna(0)
    values = table.pivot(index="seed", columns="class_index", values="value")
    return sizes.to_numpy(float), values.to_numpy(float)


def size_effects(frame: pd.DataFrame, *, metric: str = "ekld", resamples: int = 1000) -> pd.DataFrame:
    """One row a benchmark and method: spearman, slope (nats for a tenfold class size), their intervals, classes used.

    Classes of all orders are pooled; intervals are over classes resampled within orders
    (`measure.class_size.class_size_association`). Negative: larger classes are more invariant.
    """
    figures = repetitions(frame)
    figures = figures[(figures["metric"] == metric) & figures["class_index"].notna()]
    rows = []
    for (benchmark, method), table in figures.groupby(["benchmark", "method"], sort=False):
        sizes, values = pivot_classes(table)
        generator = named_generator(0, "size effect", benchmark, method)
        association = class_size_association(sizes, values, generator=generator, resamples=resamples)
        row = {"benchmark": benchmark, "method": method, "metric": metric, "classes": association.used}
        for name, interval in (("spearman", association.spearman), ("slope", association.slope)):
            row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        rows.append(row)
    columns = ["spearman", "spearman_low", "spearman_high", "slope", "slope_low", "slope_high"]
    return pd.DataFrame(rows, columns=["benchmark", "method", "metric", "classes", *columns])


def size_effect_table(effects: pd.DataFrame) -> str:
    """The rows of `size_effects` as Markdown."""
    head = "| Benchmark | Method | Spearman of class size and eKLD | eKLD for a tenfold class size (nats) | Classes |"
    lines = [head, "|---|---|---|---|---|"]
    for row in effects.itertuples(index=False):
        spearman = f"{row.spearman:+.2f} [{row.spearman_low:+.2f}, {row.spearman_high:+.2f}]"
        slope = f"{row.slope:+.2f} [{row.slope_low:+.2f}, {row.slope_high:+.2f}]"
        names = f"{row.benchmark} | {row.method}".replace("_", r"\_")
        lines.append(f"| {names} | {spearman} | {slope} | {row.classes} |".replace("-", "−"))
    return "\n".join(lines) + "\n"
