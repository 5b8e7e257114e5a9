"""Long-tail methods on EMNIST letters, each with and without the stage: table, summary and records.

    python scripts/compare_methods.py emnist_letters.npz --out docs/results/methods --work runs/methods

Letters at 14x14, cut to 200 ... 4 images a class, turned by up to 90 degrees; 3 seeds. About 25 minutes on one core;
stopped and started again, it goes on with what is missing.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from gen_invariance.benchmark.methods import Comparison, in_order, run_comparison, with_stage
from gen_invariance.benchmark.records import measured, write_csv
from gen_invariance.benchmark.suite import ClassifierSettings, StageSettings
from gen_invariance.benchmark.summary import summarise
from gen_invariance.benchmark.tables import method_tables, to_markdown
from gen_invariance.benchmark.task import Task
from gen_invariance.classifier.train import TrainSettings
from gen_invariance.cli_help import config_folder
from gen_invariance.run import write_text

METHODS = [
    "ce", "ce_drs", "ce_drw", "class_balanced", "square_root", "progressive", "effective_number", "focal", "ldam",
    "ldam_drw", "balanced_softmax", "logit_adjustment", "logit_adjustment_posthoc", "vector_scaling", "crt",
    "tau_norm", "lws", "mixup", "remix", "cutmix", "cmo", "randaugment", "trivialaugment",
]  # fmt: skip
BASELINE = "ce_drs"


def fewer_test_images(source: Path, target: Path, *, per_class: int) -> Path:
    """`source` with the first `per_class` test images of each class, so that eKLD is affordable."""
    arrays = dict(np.load(source))
    labels = arrays["test_labels"]
    kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]))
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **{**arrays, "test_images": arrays["test_images"][kept], "test_labels": labels[kept]})
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="emnist_letters.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/methods/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/methods"))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)

    data = fewer_test_images(given.data, given.work / "letters.npz", per_class=100)
    task = Task(
        source="npz", path=str(data), image_size=14, largest=200, imbalance=50,
        nuisance="rotation", nuisance_options={"degrees": 90.0},
    )  # fmt: skip
    training = TrainSettings(
        epochs=given.epochs, batch_size=64, schedule="cosine", warmup=min(3, given.epochs),
        second_phase=round(0.6 * given.epochs), log_every=given.epochs, checkpoint_every=given.epochs,
    )  # fmt: skip
    stage = StageSettings("translator", "hard_cutoff", {"cutoff": 100, "probability": 0.5})
    methods = with_stage(
        given.methods, config_folder() / "method", stage=stage, reference=BASELINE,
        training=training, classifier=ClassifierSettings("small_conv"),
    )  # fmt: skip
    comparison = Comparison(task, methods, seeds=given.seeds)
    frame = in_order(run_comparison(comparison, given.work, say=lambda line: print(line, flush=True)), methods)
    frame["benchmark"] = "EMNIST letters, 200 to 4 images a class, rotated by up to 90 degrees"

    baseline = BASELINE if BASELINE in given.methods else None
    summary = summarise(frame, baseline=baseline)
    table = to_markdown(method_tables(frame, summary, baseline=baseline, references=[f"{BASELINE} + true nuisance"]))
    print(table)
    write_text(given.out / "table.md", table)
    write_csv(summary, given.out / "summary.csv")
    totals = measured(frame)
    write_csv(totals[totals["class_index"].isna()].drop(columns=["versions"]), given.out / "records.csv")


if __name__ == "__main__":
    main()
