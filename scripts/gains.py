"""What each arm of a grid gains: its share of the oracle's gain, and what it adds to generic augmentation.

    python scripts/gains.py out=runs/letters        # after gen-invariance benchmark run ... out=runs/letters
    python scripts/gains.py out=runs/letters orders=0-2 only=letters16_rot_lt,letters16_bg_lt

Prints a table for Markdown: figures as mean and 95 % interval over class orders (training seeds averaged within one),
shares of the difference between oracle and baseline, and of arms that have generic augmentation at their end the paired
difference to generic augmentation alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from gen_invariance.benchmark.records import load_records, measured
from gen_invariance.measure.statistics import mean_interval, paired_difference

COLUMNS = {
    "few_accuracy": ("few-shot accuracy (%)", "points", 100, 1),
    "few_ekld": ("few-shot eKLD (nats)", "nats", 1, 3),
    "balanced_accuracy": ("balanced accuracy (%)", "points", 100, 1),
}


def gains_table(
    frame: pd.DataFrame,
    methods: Sequence[str],
    *,
    baseline: str = "ce_drs",
    oracle: str = "ce_drs+oracle",
    generic: str = "ce_drs+randaugment",
    metrics: Sequence[str] = ("few_accuracy", "few_ekld"),
) -> str:
    """Figures of every benchmark side by side, Markdown.

    Args:
        frame: records, as from `load_records`.
        methods: rows, those that were measured.
        baseline, oracle: their difference is 100 %.
        generic: what arms that end like it are held against.
        metrics: keys of `COLUMNS`.
    """
    heads = ["nuisance", "the tail is given", "repeats"]
    for metric in metrics:
        title, unit, _, _ = COLUMNS[metric]
        heads += [
            title,
            "over the baseline",
            "share of the oracle's gain",
            f"over {generic.rsplit('+', 1)[1].strip()} ({unit})",
        ]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    rows = measured(frame)
    rows = rows[rows["class_index"].isna() & rows["metric"].isin(metrics)]
    rows = rows.assign(unit=rows["order"].fillna(rows["seed"]))
    for name, own in rows.groupby("benchmark", sort=False):
        values = own.pivot_table(index="unit", columns=["metric", "method"], values="value", aggfunc="mean")
        for method in (method for method in methods if (metrics[0], method) in values):
            shown = values[(metrics[0], method)].dropna()
            cells = [str(name), method, str(len(shown))]
            for metric in metrics:
                cells += _cells(values[metric], method, metric, baseline, oracle, generic)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(
    values: pd.DataFrame, method: str, metric: str, baseline: str, oracle: str, generic: str
) -> tuple[str, str, str, str]:
    """Mean, difference to the baseline, share of the oracle's gain, difference to generic augmentation."""
    _, _, scale, digits = COLUMNS[metric]
    values = scale * values.dropna(subset=[method, baseline, oracle])
    found = mean_interval(values[method].to_numpy())
    own, whole = values[method] - values[baseline], values[oracle] - values[baseline]
    gain = paired_difference(values[method].to_numpy(), values[baseline].to_numpy())
    share = "–" if method == baseline else f"{100 * own.mean() / whole.mean():.0f} %"
    over = "–"
    if method != generic and method.endswith(generic.removeprefix(baseline)):
        over = _signed(paired_difference(values[method].to_numpy(), values[generic].to_numpy()), digits)
    return (
        f"{found.mean:.{digits}f} ± {found.half_width:.{digits}f}",
        "–" if method == baseline else _signed(gain, digits),
        share,
        over,
    )


def _signed(found: object, digits: int) -> str:
    return f"{found.mean:+.{digits}f} ± {found.half_width:.{digits}f}".replace("-", "−")


def numbers(text: str) -> list[int]:
    """0-2 or 0,3,5."""
    low, _, high = text.partition("-")
    return list(range(int(low), int(high) + 1)) if high else [int(word) for word in text.split(",")]


def main(given: dict[str, str]) -> None:
    unknown = set(given) - {"out", "only", "orders", "metrics"}
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; choose out=, only=, orders=, metrics=")
    frame = load_records(Path(given.get("out", "runs/benchmark")) / "records")
    if "orders" in given:
        frame = frame[frame["order"].isin(numbers(given["orders"]))]
    if "only" in given:
        frame = frame[frame["benchmark"].isin(given["only"].split(","))]
    metrics = given.get("metrics", "few_accuracy,few_ekld").split(",")
    known = list(dict.fromkeys(frame["method"]))
    print(gains_table(frame, sorted(known, key=_place), metrics=metrics), end="")


def _place(method: str) -> tuple[int, str]:
    """The baseline, what anybody has, the oracle, then the learned ones."""
    first = ["ce_drs", "ce_drs+randaugment", "ce_drs+oracle", "ce_drs+oracle+randaugment"]
    return (first.index(method) if method in first else len(first), method)


if __name__ == "__main__":
    main(dict(word.split("=", 1) for word in sys.argv[1:]))
