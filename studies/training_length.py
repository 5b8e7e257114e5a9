"""Accuracy of an arm against the length of its training: where the plateau is that a benchmark's figures are taken at.

    python -m studies.training_length benchmark=gtsrb200_lt epochs=30,60,120 orders=10-12 data_root=DATA out=runs/length

Prints a Markdown table: balanced, many-shot and few-shot accuracy (mean and 95 % interval over orders) and seconds of
one core for each length. Use orders that nothing else is measured on. Stopped and started again, it goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gen_invariance.benchmark.arms import read_arm
from gen_invariance.benchmark.grid import load_grid, make_cells, run_grid
from gen_invariance.benchmark.registry import read_benchmark
from gen_invariance.benchmark.run import parse_numbers
from gen_invariance.files import write_text
from gen_invariance.stats import mean_interval

METRICS = ("balanced_accuracy", "many_accuracy", "few_accuracy")
KNOWN = ("benchmark", "epochs", "orders", "data_root", "out", "arm")


def row(given: dict[str, str], epochs: int) -> str:
    """Measure one length; a line of the table."""
    out = Path(given.get("out", "runs/length"))
    benchmark = read_benchmark(
        given["benchmark"], data_root=given.get("data_root"), changes={"training": {"epochs": epochs}}
    )
    arm = read_arm(given.get("arm", "ce_drs"), benchmark)
    cells = make_cells([benchmark], lambda _: [arm], orders=parse_numbers(given["orders"], "orders"), seeds=[0])
    run_grid(cells, out, say=lambda line: print(line, file=sys.stderr, flush=True))
    frame = load_grid(cells, out)
    frame = frame[frame["class_index"].isna()]
    shown = [str(epochs)]
    for metric in METRICS:
        found = mean_interval(100 * frame[frame["metric"] == metric]["value"].to_numpy(float))
        shown.append(f"{found.mean:.1f} ± {found.half_width:.1f}")
    seconds = frame[frame["metric"] == "train_seconds"]["value"].mean()
    return f"| {' | '.join([*shown, f'{seconds:.0f}'])} |"


def main(given: dict[str, str]) -> None:
    """Print the table, and write it to `out`/BENCHMARK.md."""
    unknown = set(given) - set(KNOWN)
    if unknown or not {"benchmark", "epochs", "orders"} <= set(given):
        sys.exit(f"give benchmark=, epochs= and orders=; known are {', '.join(KNOWN)}")
    torch.set_num_threads(1)
    heads = "| epochs | balanced accuracy (%) | many-shot (%) | few-shot (%) | training (s) |\n|---|---|---|---|---|\n"
    lines = [row(given, epochs) for epochs in parse_numbers(given["epochs"], "epochs")]
    table = heads + "\n".join(lines) + "\n"
    print(table, end="")
    write_text(Path(given.get("out", "runs/length")) / f"{given['benchmark']}.md", table)


if __name__ == "__main__":
    main(dict(word.split("=", 1) for word in sys.argv[1:]))
