"""Long-tail methods on EMNIST letters, each with and without the stage: table, summary and records.

    python -m studies.methods emnist_letters.npz --out docs/results/methods --work runs/methods
    python -m studies.methods emnist_letters.npz --set all --methods ce ce_drs ldam_drw --out ...

The set "ten": ten letters at 14x14, cut to 110 ... 5 images a class, turned by any angle; 60 epochs. The set "all": 26
letters, 200 ... 4 images, turned by up to 90 degrees; 20 epochs. Five seeds each. Every row of every method is cropped
out of the image padded by two pixels, before what the method does to it.
Stopped and started again, it goes on with what is missing.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gen_invariance.benchmark.methods import Comparison, in_order, run_comparison, stage_table, with_stage
from gen_invariance.classifier.train import TrainSettings
from gen_invariance.cli.help import config_folder
from gen_invariance.experiment.build import ClassifierSettings, StageSettings
from gen_invariance.experiment.cell import Method
from gen_invariance.experiment.task import Task
from gen_invariance.files import write_text
from gen_invariance.records import measured, write_csv
from gen_invariance.report.summary import summarise
from gen_invariance.report.tables import method_tables, to_markdown

METHODS = [
    "ce", "ce_drs", "ce_drw", "class_balanced", "square_root", "progressive", "effective_number", "focal", "ldam",
    "ldam_drw", "balanced_softmax", "logit_adjustment", "logit_adjustment_posthoc", "vector_scaling", "crt",
    "tau_norm", "lws", "mixup", "remix", "cutmix", "cmo", "randaugment", "trivialaugment",
]  # fmt: skip
BASELINE = "ce_drs"


SETS = {
    "ten": {"letters": "ABEFGHKRST", "largest": 110, "imbalance": 22, "degrees": 180.0, "many": 44, "epochs": 60},
    "all": {"letters": None, "largest": 200, "imbalance": 50, "degrees": 90.0, "many": 100, "epochs": 20},
}


def smaller(source: Path, target: Path, letters: str | None, *, test_images: int = 100) -> Path:
    """`source` with the classes called by one of `letters` and `test_images` a class, so that eKLD is affordable."""
    arrays = dict(np.load(source))
    names = [str(name) for name in arrays["class_names"]]
    chosen = [number for number, name in enumerate(names) if letters is None or name in letters]
    kept = {"class_names": np.array([names[number] for number in chosen])}
    for part, most in (("train", None), ("test", test_images)):
        rows = np.sort(np.concatenate([np.flatnonzero(arrays[f"{part}_labels"] == n)[:most] for n in chosen]))
        kept[f"{part}_images"] = arrays[f"{part}_images"][rows]
        kept[f"{part}_labels"] = np.searchsorted(chosen, arrays[f"{part}_labels"][rows])
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **kept)
    return target


def cropped(method: Method) -> Method:
    """`method` with a crop of every row before its own augmentation."""
    words = ["crop_flip", *(word for word in (method.augmentation,) if word != "none")]
    return replace(method, augmentation="+".join(words), augmentation_options={"crop_flip": {"padding": 2}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="emnist_letters.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/methods/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/methods"))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", choices=SETS, default="ten")
    parser.add_argument("--epochs", type=int, help="instead of the set's")
    given = parser.parse_args()
    torch.set_num_threads(1)

    chosen = SETS[given.set]
    epochs = given.epochs or chosen["epochs"]
    name = "letters.npz" if given.set == "all" else "ten_letters.npz"
    task = Task(
        source="npz", path=str(smaller(given.data, given.work / name, chosen["letters"])), image_size=14,
        largest=chosen["largest"], imbalance=chosen["imbalance"], many_above=chosen["many"],
        nuisance="rotation", nuisance_options={"degrees": chosen["degrees"]},
    )  # fmt: skip
    training = TrainSettings(
        epochs=epochs, batch_size=64, schedule="cosine", warmup=0.05, second_phase=0.6, log_every=epochs,
        checkpoint_every=epochs,
    )  # fmt: skip
    stage = StageSettings("translator", "hard_cutoff", {"cutoff": chosen["many"], "probability": 0.5})
    methods = with_stage(
        given.methods, config_folder() / "method", stage=stage, reference=BASELINE,
        training=training, classifier=ClassifierSettings("small_conv"),
    )  # fmt: skip
    methods = tuple(cropped(method) for method in methods)
    comparison = Comparison(task, methods, seeds=given.seeds)
    frame = in_order(run_comparison(comparison, given.work, say=lambda line: print(line, flush=True)), methods)
    frame["benchmark"] = f"EMNIST letters ({given.set}), rotated by up to {chosen['degrees']:g} degrees"

    baseline = BASELINE if BASELINE in given.methods else None
    summary = summarise(frame, baseline=baseline)
    table = to_markdown(method_tables(frame, summary, baseline=baseline, references=[f"{BASELINE} + true nuisance"]))
    table += f"\n## Without → with the stage\n\n{stage_table(frame)}"
    print(table)
    write_text(given.out / "table.md", table)
    classes = ["class_index", "class_name", "class_count", "group"]
    write_csv(summary[summary["class_index"].isna()].drop(columns=classes), given.out / "summary.csv")
    totals = measured(frame)
    totals = totals[totals["class_index"].isna()].drop(columns=[*classes, "versions"])
    write_csv(totals, given.out / "records.csv")


if __name__ == "__main__":
    main()
