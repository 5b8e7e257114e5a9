"""Transfer modes: letters to letters never seen, and ImageNet features to a few hundred colour images.

    python -m studies.transfer letters=emnist_letters.npz colour=cifar10_lt10.npz out=docs/results/transfer

A small network is trained on 16 classes of letters and moved to the other 10 in every mode; three target sizes,
three seeds, each with its own classes. Then heads on the packaged EfficientNet-Lite0. About 10 minutes on one core;
stopped and started again, it goes on with what is missing.
"""

from pathlib import Path

import pandas as pd
import torch

from benchmarks.program import read_settings
from gen_invariance.data.readers.registry import load_source
from gen_invariance.files import write_text
from gen_invariance.records import measured, write_csv
from gen_invariance.report.summary import prepare_results
from gen_invariance.report.tables import method_tables, to_markdown
from studies.transfer_modes import (
    SCRATCH,
    UNTOUCHED,
    TransferComparison,
    effects,
    run_pretrained,
    run_transfer,
)


def effect_table(table: pd.DataFrame) -> str:
    """The three states against the better baseline as Markdown; `effects.csv` has each baseline on its own."""
    table = table[(table["against"] == "better of both") | table["benchmark"].str.startswith("CIFAR")]
    lines = [
        "| Task | Mode | Against | Difference (points) | State | Classes helped / harmed / undecided |",
        "|---" * 6 + "|",
    ]
    for row in table.itertuples():
        gap = f"{100 * row.difference:+.1f} ± {100 * row.half_width:.1f}".replace("-", "−")
        counts = f"{row.helps} / {row.harms} / {row.undecided}"
        lines.append(f"| {row.benchmark} | {row.method} | {row.against} | {gap} | {row.state} | {counts} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    given = read_settings(
        __doc__, letters=Path, colour=Path, out=Path("runs/transfer/results"), work=Path("runs/transfer"), seeds=3
    )
    torch.set_num_threads(1)

    def say(line: str) -> None:
        print(line, flush=True)

    letters = load_source("npz", str(given.letters), image_size=14)
    comparison = TransferComparison("Letters, 16 classes to 10 others", source_classes=16, seeds=given.seeds)
    frame = run_transfer(comparison, letters.train, letters.test, given.work / "letters", say=say)
    colour = load_source("npz", str(given.colour))
    pretrained = TransferComparison(
        "CIFAR-10, ImageNet features", source_classes=1, target_images=(5, 20, 50), test_images=50, seeds=given.seeds
    )
    other = run_pretrained(
        "CIFAR-10", colour.train, colour.test, given.work / "colour", backbone="efficientnet_lite0",
        weights="DEFAULT", input_size=96, comparison=pretrained, say=say,
    )  # fmt: skip

    both = pd.concat([frame, other], ignore_index=True)
    states = pd.concat([effects(frame, [SCRATCH, UNTOUCHED]), effects(other, [SCRATCH])], ignore_index=True)
    results = prepare_results(both, baseline=SCRATCH)
    text = to_markdown(method_tables(results)) + "\n## Helps, harms, undecided\n\n" + effect_table(states)
    print(text)
    write_text(given.out / "table.md", text)
    write_csv(results.summary, given.out / "summary.csv")
    write_csv(states, given.out / "effects.csv")
    totals = measured(both)
    write_csv(totals[totals["class_index"].isna()].drop(columns=["versions"]), given.out / "records.csv")


if __name__ == "__main__":
    main()
