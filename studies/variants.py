"""The same arms under changed settings of training: how long to train, what a bank of translations costs.

    python -m studies.variants benchmark=gtsrb200_lt variants="epochs=30;epochs=60;epochs=120" orders=10-12
    python -m studies.variants benchmark=digits_rot_lt,digits_bg_lt arms=ce_drs+redraw,ce_drs+munit_small orders=0-4 \
        variants="stage_bank=0;stage_bank=4 stage_bank_epochs=20;stage_bank=2 stage_bank_epochs=40" out=runs/bank

Prints a table, and writes it to OUT/table.md: mean and 95 % interval over class orders of the first variant, and of the
others the paired difference to it. For a choice of settings take orders that nothing else is measured on. Stopped and
started again, it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
import yaml

from benchmarks.program import format_gap, format_mean, markdown, read_settings
from gen_invariance.benchmark.run import run_benchmark
from gen_invariance.files import write_text

KEYS = ["benchmark", "method", "metric", "order"]
SHOWN = {
    "balanced_accuracy": ("balanced accuracy (%)", 100, 1),
    "many_accuracy": ("many-shot (%)", 100, 1),
    "few_accuracy": ("few-shot (%)", 100, 1),
    "few_ekld": ("few-shot eKLD (nats)", 1, 3),
    "train_seconds": ("training (s)", 1, 0),
}


def read_variant(text: str) -> dict[str, object]:
    """Settings of training out of "stage_bank=4 stage_bank_epochs=20"."""
    return {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in text.split())}


def table_rows(frames: dict[str, pd.DataFrame]) -> Iterator[list[object]]:
    """A row a benchmark, arm and variant."""
    totals = {
        variant: frame[frame["class_index"].isna()].set_index(KEYS)["value"].sort_index()
        for variant, frame in frames.items()
    }
    first = next(iter(totals.values()))
    for benchmark, arm in dict.fromkeys((benchmark, arm) for benchmark, arm, *_ in first.index):
        for variant, values in totals.items():
            cells = []
            for metric, (_, scale, digits) in SHOWN.items():
                own, base = values.loc[benchmark, arm, metric], first.loc[benchmark, arm, metric]
                if values is first:
                    cells.append(format_mean(own.to_numpy(), scale=scale, digits=digits))
                else:
                    both = own.index.intersection(base.index)
                    cells.append(format_gap(own[both].to_numpy(), base[both].to_numpy(), scale=scale, digits=digits))
            yield [benchmark, f"`{arm}`", variant, values.loc[benchmark, arm, "balanced_accuracy"].size, *cells]


def main() -> None:
    """Measure what is missing of each variant, then print the table."""
    given = read_settings(
        __doc__, benchmark=tuple, variants=str, arms=("ce_drs",), orders="0-2", data_root=None,
        out=Path("runs/variants"),
    )  # fmt: skip
    torch.set_num_threads(1)
    frames = {
        variant.strip(): run_benchmark(
            given.benchmark, given.arms, out=given.out / variant.strip().replace(" ", ","), orders=given.orders,
            data_root=given.data_root, training_options=read_variant(variant), say=print,
        )
        for variant in given.variants.split(";")
    }  # fmt: skip
    head = ["benchmark", "arm", "variant", "orders", *(title for title, _, _ in SHOWN.values())]
    table = markdown(head, table_rows(frames))
    print(table, end="")
    write_text(given.out / "table.md", table)


if __name__ == "__main__":
    main()
