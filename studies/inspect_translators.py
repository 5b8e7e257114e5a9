"""What the fitted translators of studies.translators are like: identity kept, match, recovery, cost.

    python -m studies.inspect_translators out=runs/translators            # after studies.translators, same `out`
    python -m studies.inspect_translators out=runs/translators kinds=redraw,spatial

Looks at every fit of the grid in `out` with the measures of `gen-invariance inspect`, and writes `out`/quality.jsonl (a
line for each fit; those that are there are skipped) and `out`/quality.md, which it prints. Only training images are
looked at. Recovery is the Kolmogorov distance of the drawn parameter to the true one; of rotations beside it the range
that holds 95 % of the drawn angles.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import process_time

import pandas as pd
import torch

from benchmarks.program import append_line, markdown, read_lines, read_settings
from gen_invariance.benchmark.registry import read_benchmark
from gen_invariance.experiment.inspect import Truth, inspect_translator
from gen_invariance.experiment.task import Prepared, prepare
from gen_invariance.files import write_text
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import named_generator
from gen_invariance.stats import mean_interval
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.inspection import Inspection
from gen_invariance.translator.quality.measures import kolmogorov_distance

FIGURES = ("accuracy_kept", "precision", "coverage", "diversity")


def look(name: str, kind: str, order: int, folder: Path) -> dict[str, object]:
    """One line of the result."""
    prepared, translator = prepare(read_benchmark(name).task, seed=order), load_translator(folder)
    truth = Truth(prepared.nuisance, prepared.originals("train"))
    found = inspect_translator(translator, prepared.train, truth=truth, seed=order)
    figures = {figure: found.quality.figures[figure].estimate.value for figure in FIGURES}
    true = {f"true {figure}": found.oracle.figures[figure].estimate.value for figure in FIGURES}
    return {
        "benchmark": name,
        "translator": kind,
        "order": order,
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
    """Mean and 95 % interval over class orders, Markdown."""
    frame = pd.DataFrame(rows)
    columns = [name for name in frame.columns if name not in ("benchmark", "translator", "order", "verdict")]
    cells = []
    for (name, kind), group in frame.groupby(["benchmark", "translator"], sort=False):
        row = [name, kind, ", ".join(group["verdict"])]
        for column in columns:
            values = group[column].dropna().tolist()
            found = mean_interval(values) if values else None
            row.append("–" if found is None else f"{found.mean:.3g} ± {found.half_width:.2g}".replace(" ± nan", ""))
        cells.append(row)
    return markdown(["benchmark", "translator", "verdicts", *columns], cells)


def main() -> None:
    """Look at what was not looked at yet, then print the table."""
    given = read_settings(__doc__, out=Path("runs/translators"), kinds=())
    torch.set_num_threads(1)
    path = given.out / "quality.jsonl"
    rows = read_lines(path)
    seen = {(row["benchmark"], row["translator"], row["order"]) for row in rows}
    for done in sorted(given.out.glob("fits/*/*/order*/seconds.json")):
        folder = done.parent
        name, kind = folder.parts[-3], folder.parts[-2].rpartition("-")[0]
        order = int(folder.name.removeprefix("order"))
        if (name, kind, order) in seen or (given.kinds and kind not in given.kinds):
            continue
        rows.append(look(name, kind, order, folder))
        append_line(path, rows[-1])
        print(json.dumps(rows[-1]), flush=True)
    text = table(sorted(rows, key=lambda row: (row["benchmark"], row["translator"], row["order"])))
    write_text(given.out / "quality.md", text)
    print(text)


if __name__ == "__main__":
    main()
