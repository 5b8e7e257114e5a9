"""What the fitted translators of studies.translators are like: identity kept, match, recovery, cost.

    python -m studies.inspect_translators out=runs/translators            # after studies.translators, same `out`
    python -m studies.inspect_translators out=runs/translators seeds=3 kinds=redraw,spatial

Looks at every fit below `out`/fits with the measures of `gen-invariance inspect`, and writes `out`/quality.jsonl (a
line for each fit; those that are there are skipped) and `out`/quality.md, which it prints. Only training images are
looked at. Recovery is the Kolmogorov distance of the drawn parameter to the true one; of rotations beside it the range
that holds 95 % of the drawn angles.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import process_time

import pandas as pd
import torch

from gen_invariance.experiment.inspect import Truth, inspect_translator
from gen_invariance.experiment.task import Prepared, prepare
from gen_invariance.files import write_text
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import named_generator
from gen_invariance.stats import mean_interval
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.inspection import Inspection
from gen_invariance.translator.quality.measures import kolmogorov_distance
from studies.translators import FITS, TASKS

FIGURES = ("accuracy_kept", "precision", "coverage", "diversity")


def look(name: str, kind: str, seed: int, folder: Path) -> dict[str, object]:
    """One line of the result."""
    prepared, translator = prepare(TASKS[name], seed=seed), load_translator(folder)
    truth = Truth(prepared.nuisance, prepared.originals("train"))
    found = inspect_translator(translator, prepared.train, truth=truth, seed=seed)
    figures = {figure: found.quality.figures[figure].estimate.value for figure in FIGURES}
    true = {f"true {figure}": found.oracle.figures[figure].estimate.value for figure in FIGURES}
    return {
        "task": name,
        "translator": kind,
        "seed": seed,
        "verdict": found.quality.verdict.word,
        **figures,
        **true,
        **recovery(found, translator, prepared),
        "fit_seconds": json.loads((folder / "seconds.json").read_text())["seconds"],
        "images_per_second": throughput(translator, prepared),
    }


def recovery(found: Inspection, translator: Nuisance, prepared: Prepared) -> dict[str, float]:
    """Distances of drawn parameters to the true ones, by parameter."""
    distances = {}
    for parameter in found.parameters:
        if parameter.name == "rotation" and parameter.true is not None:
            low, high = parameter.drawn.flatten().quantile(torch.tensor([0.025, 0.975])).tolist()
            distances |= {"rotation distance": parameter.distance[0], "rotation range": high - low}
        if parameter.name == "ground" and "level" in prepared.draws["train"]:
            levels = prepared.draws["train"]["level"].float() / 255
            distances["ground distance"] = kolmogorov_distance(parameter.drawn, levels)
    return distances


def throughput(translator: Nuisance, prepared: Prepared) -> float:
    """Translated images a second of processor time, batches of 64."""
    images = prepared.train.float_images(torch.arange(64))
    generator = named_generator(0, "throughput")
    with torch.no_grad():
        translator.apply(images, translator.sample(images.shape, generator=generator))
        started = process_time()
        for _ in range(20):
            translator.apply(images, translator.sample(images.shape, generator=generator))
    return 20 * len(images) / (process_time() - started)


def table(rows: list[dict[str, object]]) -> str:
    """Mean and 95 % interval over seeds, Markdown."""
    frame = pd.DataFrame(rows)
    columns = [name for name in frame.columns if name not in ("task", "translator", "seed", "verdict")]
    shown = []
    for (task, kind), group in frame.groupby(["task", "translator"], sort=False):
        entry = {"nuisance": task, "translator": kind, "verdicts": ", ".join(group["verdict"])}
        for column in columns:
            values = group[column].dropna().tolist()
            found = mean_interval(values) if values else None
            entry[column] = "–" if found is None else f"{found.mean:.3g} ± {found.half_width:.2g}".replace(" ± nan", "")
        shown.append(entry)
    head = list(shown[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(str(entry[name]) for name in head) + " |" for entry in shown]
    return "\n".join(lines) + "\n"


def main(out: Path, kinds: list[str], seeds: int) -> None:
    """Look at what was not looked at yet, then print the table."""
    torch.set_num_threads(1)
    path = out / "quality.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seen = {(row["task"], row["translator"], row["seed"]) for row in rows}
    for name in TASKS:
        for kind in kinds:
            for folder in sorted((out / "fits").glob(f"{name}-{kind}-*")):
                seed = int(folder.name.rsplit("-", 1)[1])
                if (name, kind, seed) in seen or seed >= seeds or not (folder / "seconds.json").exists():
                    continue
                rows.append(look(name, kind, seed, folder))
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    order = {name: place for place, name in enumerate(TASKS)}
    rows.sort(key=lambda row: (order[row["task"]], list(FITS).index(row["translator"]), row["seed"]))
    text = table(rows)
    write_text(out / "quality.md", text)
    print(text)


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    wanted = given["kinds"].split(",") if "kinds" in given else list(FITS)
    main(Path(given.get("out", "runs/translators")), wanted, int(given.get("seeds", 10**9)))
