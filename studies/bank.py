"""A bank of translations against drawing them at every step, at equal everything else: does reuse cost accuracy?

    python -m studies.bank out=runs/bank seeds=5      # about 15 minutes of one CPU core

Long-tailed digits under rotation and on backgrounds, the fitted translators of `studies.translators`; each training
with a bank has the seed, the weights to start from, the rows and the gates of the one without. Finished cells are
skipped. Writes OUT/cells.jsonl and OUT/table.md: paired differences, mean and 95 % Student interval over seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gen_invariance.experiment.cell import CellInputs, Method, run_cell
from gen_invariance.experiment.task import prepare
from gen_invariance.files import write_text
from gen_invariance.nuisance.protocol import Draw, Nuisance
from gen_invariance.settings import settings_of
from gen_invariance.stats import mean_interval, paired_difference
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.fit_settings import FitSettings
from gen_invariance.translator.io import load_translator
from studies.translators import MEASURE, TASKS, make_arm, methods

BANKS = {"on the fly": (0, 10), "4 versions, 20 epochs": (4, 20), "2 versions, 40 epochs": (2, 40)}
"""Translations of each image in the bank, and epochs after which all have been replaced."""

PAIRS = [("rotation180", "redraw"), ("rotation180", "munit"), ("background", "redraw"), ("background", "munit")]
SHOWN = {
    "balanced_accuracy": ("balanced accuracy, %", "points", 100, 1),
    "few_accuracy": ("few-shot accuracy, %", "points", 100, 1),
    "few_ekld": ("few-shot eKLD, nats", "nats", 1, 3),
}


class Counted:
    """A nuisance that counts the images it was given."""

    def __init__(self, nuisance: Nuisance) -> None:
        self.nuisance, self.images = nuisance, 0

    def sample(self, shape: torch.Size, *, generator: torch.Generator) -> Draw:
        return self.nuisance.sample(shape, generator=generator)

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        self.images += len(images)
        return self.nuisance.apply(images, draw)


def arms(kind: str) -> Iterator[tuple[str, Method]]:
    base = next(method for method in methods() if method.translator == kind and method.stage.nuisance == "translator")
    for bank, (versions, epochs) in BANKS.items():
        training = replace(base.training, stage_bank=versions, stage_bank_epochs=epochs)
        yield bank, replace(base, name=f"{base.name}, {bank}", training=training)


def fitted(out: Path, task: str, kind: str, seed: int) -> Path:
    """The folder of the translator of that kind on a task, fitted now if it is not there."""
    folder = out / "fits" / f"{task}-{kind}-{seed}"
    fit = make_arm(task, next(method for method in methods() if method.translator == kind)).fit
    fit_translator(
        kind,
        prepare(TASKS[task], seed=seed).train,
        settings_of(FitSettings, fit.loop, "fit"),
        network=fit.network,
        objective=fit.objective,
        out=folder,
        seed=seed,
        resume=True,
        progress=False,
    )
    return folder


def main(out: Path, seeds: int) -> None:
    torch.set_num_threads(1)
    path = out / "cells.jsonl"
    for seed in range(seeds):
        for name, kind in PAIRS:
            folder = fitted(out, name, kind, seed)
            for bank, method in arms(kind):
                cell = {"nuisance": name, "translator": kind, "bank": bank, "seed": seed}
                if any(cell.items() <= row.items() for row in rows_of(path)):
                    continue
                words = "".join(letter if letter.isalnum() else "-" for letter in f"{name}-{kind}-{bank}-{seed}")
                translator = Counted(load_translator(folder))
                inputs = CellInputs(prepare(TASKS[name], seed=seed), translator=translator)
                records = run_cell(
                    TASKS[name], method, inputs, seed=seed, folder=out / "cells" / words, measure=MEASURE
                )
                found = {record.metric: record.value for record in records if record.class_index is None}
                cell |= {"translated": translator.images, **{metric: found[metric] for metric in SHOWN}}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(cell) + "\n")
                print(cell, flush=True)
    table = table_of(rows_of(path))
    write_text(out / "table.md", table + "\n")
    print(table)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table_of(rows: list[dict]) -> str:
    """Figures drawn on the fly; of the banks how often a translation is used, and paired differences."""
    heads = ["nuisance", "translator", "translations", "seeds", "uses of each", *(shown[0] for shown in SHOWN.values())]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, kind in PAIRS:
        pair = [row for row in rows if (row["nuisance"], row["translator"]) == (name, kind)]
        of = {bank: {row["seed"]: row for row in pair if row["bank"] == bank} for bank in BANKS}
        fresh = of["on the fly"]
        for bank, found in of.items():
            seeds = sorted(found.keys() & fresh.keys())
            if not seeds:
                continue
            uses = sum(fresh[seed]["translated"] for seed in seeds) / sum(found[seed]["translated"] for seed in seeds)
            cells = []
            for metric, (_, unit, scale, digits) in SHOWN.items():
                own, other = ([scale * part[seed][metric] for seed in seeds] for part in (found, fresh))
                if bank == "on the fly":
                    value = mean_interval(own)
                    cells.append(f"{value.mean:.{digits}f} ± {value.half_width:.{digits}f}")
                else:
                    value = paired_difference(own, other)
                    cells.append(f"{value.mean:+.{digits}f} ± {value.half_width:.{digits}f} {unit}")
            lines.append("| " + " | ".join([name, kind, bank, str(len(seeds)), f"{uses:.1f}", *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    main(Path(given.get("out", "runs/bank")), int(given.get("seeds", 5)))
