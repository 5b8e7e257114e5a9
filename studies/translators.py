"""Translators against generic augmentation and the oracle, on long-tailed digits under six nuisances; a grid.

    python -m studies.translators out=runs/translators            # about 90 minutes on one CPU core
    python -m studies.translators out=runs/translators orders=0-4 benchmark=digits_rot45_lt,digits_mix_lt

Cells that are finished are skipped. OUT/report is the page; `python -m studies.inspect_translators` looks at the fits.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.program import read_settings
from gen_invariance.benchmark.run import run_benchmark

BENCHMARKS = tuple(f"digits_{name}_lt" for name in ("rot", "rot45", "light", "bg", "dil", "mix"))
METHODS = (
    "ce_drs", "ce_drs+randaugment@every_row", "ce_drs+oracle", "ce_drs+redraw", "ce_drs+redraw+randaugment@every_row",
    "ce_drs+oracle+randaugment@every_row", "ce_drs+spatial", "ce_drs+flow", "ce_drs+flow+randaugment@every_row",
    "ce_drs+munit_small",
)  # fmt: skip
STEPS = {"spatial": 300, "redraw": 400, "flow": 800, "munit_small": 400}


def main() -> None:
    """Measure what is missing, then report."""
    given = read_settings(
        __doc__, out=Path("runs/translators"), orders="0-2", benchmark=BENCHMARKS, methods=METHODS, data_root=None
    )
    torch.set_num_threads(1)
    fits = {name: {"steps": steps} for name, steps in STEPS.items()}
    run_benchmark(
        given.benchmark, given.methods, out=given.out, orders=given.orders, fit_options=fits, data_root=given.data_root,
        measure_options={"draws": 5}, say=lambda line: print(line, flush=True),
    )  # fmt: skip


if __name__ == "__main__":
    main()
