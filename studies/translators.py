"""Translators against generic augmentation and the oracle, on long-tailed digits under several nuisances.

    python -m studies.translators out=runs/translators            # about 90 minutes on one CPU core
    python -m studies.translators out=runs/translators seeds=5 only=rotation45,mix methods="DRS,DRS + redraw"

Cells that are finished are skipped, so a stopped comparison goes on. Prints the table; writes records, table.md,
summary.csv and report.html below `out`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pandas as pd
import torch

from gen_invariance.benchmark.demo import ROTATED, TRANSLATORS, DemoSettings, make_demo_arms
from gen_invariance.experiment.build import StageSettings
from gen_invariance.experiment.cell import CellInputs, MeasureSettings, Method, cell_digest, run_cell
from gen_invariance.experiment.task import Task, prepare
from gen_invariance.files import write_json, write_text
from gen_invariance.records import Cell, RecordWriter, finished_cells, load_records
from gen_invariance.report.gains import Scale, gain_tables
from gen_invariance.report.report_page import ReportSettings, write_report
from gen_invariance.report.tables import to_markdown
from gen_invariance.run import Run
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.fit_settings import FitSettings
from gen_invariance.translator.io import load_translator

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
FITS = {
    "spatial": FitSettings(steps=300, batch_size=64),
    "redraw": FitSettings(steps=400, batch_size=64),
    "flow": FitSettings(steps=800, batch_size=32),
    "munit": FitSettings(steps=400, batch_size=16),
}
# Wide MUNITs take hours on a CPU; this is the demonstration's.
CHANGES = {
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


def fitted(out: Path, name: str, kind: str, task: Task, seed: int) -> Path:
    """The fitted translator of (task, seed), fitted now if it is not there."""
    folder = out / "fits" / f"{name}-{kind}-{seed}"
    if not (folder / "seconds.json").exists():
        started = perf_counter()
        changes = CHANGES.get(f"{name}-{kind}", CHANGES.get(kind, {}))
        config = {"task": task.identity(), "translator": kind, "fit": FITS[kind].identity(), **changes}
        with Run.open(folder, kind="fit", seed=seed, config=config, resume=True) as run:
            fit_translator(kind, prepare(task, seed=seed).train, FITS[kind], out=run, progress=False, **changes)
        write_json(folder / "seconds.json", {"seconds": perf_counter() - started})
    return folder


def gains(out: Path) -> str:
    """What the arms gain over DRS, as a share of what the true nuisance gains, on every task."""
    frames = [
        load_records(out / name / "records").assign(benchmark=name)
        for name in TASKS
        if (out / name / "records").is_dir()
    ]
    scale = Scale("DRS", "DRS + true nuisance", generic=False)
    return to_markdown(gain_tables(pd.concat(frames), scale=scale, metrics=("few_accuracy", "few_ekld")))


def main(out: Path, seeds: int, only: str, wanted: str) -> None:
    """Run what is missing, then report."""
    chosen = [method for method in methods() if not wanted or method.name in wanted.split(",")]
    torch.set_num_threads(1)
    for seed in range(seeds):
        for name, task in TASKS.items():
            task_out = out / name
            done = finished_cells(task_out / "records") if (task_out / "records").is_dir() else set()
            for method in chosen:
                digest = cell_digest(task, method, draws=DRAWS)
                if (only and name not in only.split(",")) or Cell(task.name, digest, method.name, seed) in done:
                    continue
                folder = fitted(out, name, method.translator, task, seed) if method.translator else None
                seconds = json.loads((folder / "seconds.json").read_text())["seconds"] if folder else None
                words = "".join(letter if letter.isalnum() else "-" for letter in method.name)
                records = run_cell(
                    task,
                    method,
                    CellInputs(
                        prepare(task, seed=seed),
                        translator=load_translator(folder) if folder else None,
                        fit_seconds=seconds,
                    ),
                    seed=seed,
                    folder=out / "cells" / f"{name}-{words}-{seed}",
                    measure=MeasureSettings(draws=DRAWS, invariance_images=None),
                )
                RecordWriter(task_out / "records").write_cell(records)
                found = {record.metric: record.value for record in records if record.class_index is None}
                print(
                    f"{name} seed {seed} {method.name}: few-shot {found['few_accuracy']:.3f}, "
                    f"few-shot eKLD {found['few_ekld']:.3f}",
                    flush=True,
                )
    for name in TASKS:
        if (out / name / "records").is_dir():
            settings = ReportSettings(
                title=f"Translators on long-tailed digits: {name}",
                baseline="DRS",
                references=("DRS + true nuisance", "DRS + true nuisance + RandAugment"),
            )
            write_report(out / name, out / name / "report", settings)
            print(f"\n# {name}\n\n" + (out / name / "report" / "table.md").read_text(encoding="utf-8"))
    write_text(out / "gains.md", gains(out))
    print(gains(out))


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    out, seeds = Path(given.get("out", "runs/translators")), int(given.get("seeds", 3))
    main(out, seeds, given.get("only", ""), given.get("methods", ""))
