"""Translators against generic augmentation and the oracle, on long-tailed digits under several nuisances.

    python -m studies.translators out=runs/translators            # about 90 minutes on one CPU core
    python -m studies.translators out=runs/translators seeds=5 only=rotation45,mix methods="DRS,DRS + redraw"

Cells that are finished are skipped, so a stopped comparison goes on. Prints the table; writes records, table.md,
summary.csv and report.html below `out`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from gen_invariance.benchmark.arms import Arm
from gen_invariance.benchmark.demo import ROTATED, TRANSLATORS, DemoSettings, make_demo_arms
from gen_invariance.benchmark.grid import GridCell, load_grid, run_grid
from gen_invariance.benchmark.registry import Benchmark, TranslatorFit
from gen_invariance.experiment.build import StageSettings
from gen_invariance.experiment.cell import MeasureSettings, Method
from gen_invariance.experiment.task import Task
from gen_invariance.files import write_text
from gen_invariance.report.gains import Scale, gain_tables
from gen_invariance.report.report_page import ReportSettings, write_report
from gen_invariance.report.tables import to_markdown

DRAWS = 5
TASKS: dict[str, Task] = {
    "rotation180": ROTATED,
    "rotation45": replace(ROTATED, nuisance_options={"degrees": 45.0}),
    "lighting": replace(ROTATED, nuisance="lighting", nuisance_options={}),
    "background": replace(ROTATED, nuisance="background", nuisance_options={"levels": 200}),
    "thickness": replace(
        ROTATED, nuisance="thickness", nuisance_options={"dilate_sides": (2, 3), "erode_sides": (1, 2)}
    ),
    "mix": replace(ROTATED, nuisance="mix", nuisance_options={}),
}
MEASURE = MeasureSettings(draws=DRAWS, invariance_images=None)
FITS: dict[str, dict[str, Any]] = {
    "spatial": {"steps": 300, "batch_size": 64},
    "redraw": {"steps": 400, "batch_size": 64},
    "flow": {"steps": 800, "batch_size": 32},
    "munit": {"steps": 400, "batch_size": 16},
}
# Wide MUNITs take hours on a CPU; this is the demonstration's.
CHANGES: dict[str, dict[str, Any]] = {
    "munit": TRANSLATORS["munit"],
    # What the nuisance may change is named by hand; strokes only where they are the nuisance.
    "thickness-flow": {"network": {"removes": ("tone", "sign", "thickness")}},
}


def methods() -> list[Method]:
    """DRS and what the tail is given; the translators alone and before RandAugment."""
    plain = make_demo_arms(DemoSettings())[0].method
    stages = {
        "DRS": ("none", None),
        "DRS + RandAugment": ("randaugment", None),
        "DRS + true nuisance": ("true", None),
        "DRS + redraw": ("translator", "redraw"),
        "DRS + redraw + RandAugment": ("translator+randaugment", "redraw"),
        "DRS + true nuisance + RandAugment": ("true+randaugment", None),
        "DRS + spatial": ("translator", "spatial"),
        "DRS + flow": ("translator", "flow"),
        "DRS + flow + RandAugment": ("translator+randaugment", "flow"),
        "DRS + MUNIT": ("translator", "munit"),
    }
    policy = {"policy": "hard_cutoff", "policy_options": {"cutoff": 44, "probability": 0.5}}
    return [
        replace(plain, name=name, stage=StageSettings(stage, **policy), translator=translator)
        for name, (stage, translator) in stages.items()
    ]


def make_arm(task: str, method: Method) -> Arm:
    """`method` on the task of that name, with the translator to fit for it."""
    kind = method.translator
    if kind is None:
        return Arm(method.name, method)
    changes = {"network": {}, "objective": {}} | CHANGES.get(kind, {}) | CHANGES.get(f"{task}-{kind}", {})
    loop = {**FITS[kind], "flip": False, "sample_every": 10**9}
    return Arm(method.name, method, TranslatorFit(kind, kind, changes["network"], changes["objective"], loop))


def make_study_cells(tasks: Sequence[str], wanted: Sequence[str], seeds: int) -> list[GridCell]:
    """The cells of the tasks and methods of these names; a seed draws class order, images and weights at once."""
    arms = [method for method in methods() if not wanted or method.name in wanted]
    cells = []
    for name in tasks:
        training, classifier = arms[0].training, arms[0].classifier
        benchmark = Benchmark(name, "translators compared", TASKS[name], classifier, training, measure=MEASURE)
        for seed in range(seeds):
            cells += [GridCell(benchmark, make_arm(name, method), order=seed, seed=seed) for method in arms]
    return cells


def gains(frame: pd.DataFrame) -> str:
    """What the arms gain over DRS, as a share of what the true nuisance gains, on every task."""
    scale = Scale("DRS", "DRS + true nuisance", generic=False)
    return to_markdown(gain_tables(frame, scale=scale, metrics=("few_accuracy", "few_ekld")))


def main(out: Path, seeds: int, only: str, wanted: str) -> None:
    """Run what is missing, then report."""
    torch.set_num_threads(1)
    tasks = [name for name in TASKS if not only or name in only.split(",")]
    cells = make_study_cells(tasks, wanted.split(",") if wanted else (), seeds)
    run_grid(cells, out, say=lambda line: print(line, flush=True))
    frame = load_grid(cells, out)
    for name in tasks:
        settings = ReportSettings(
            title=f"Translators on long-tailed digits: {name}",
            baseline="DRS",
            references=("DRS + true nuisance", "DRS + true nuisance + RandAugment"),
        )
        write_report(frame[frame["benchmark"] == name], out / name, settings)
        print(f"\n# {name}\n\n" + (out / name / "table.md").read_text(encoding="utf-8"))
    write_text(out / "gains.md", gains(frame))
    print(gains(frame))


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    out, seeds = Path(given.get("out", "runs/translators")), int(given.get("seeds", 3))
    main(out, seeds, given.get("only", ""), given.get("methods", ""))
