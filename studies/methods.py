"""Long-tail methods on EMNIST letters, each with and without the stage: table, summary and records.

    python -m studies.methods data=emnist_letters.npz out=docs/results/methods work=runs/methods
    python -m studies.methods data=emnist_letters.npz set=all methods=ce,ce_drs,ldam_drw out=...

The set "ten": ten letters at 14x14, cut to 110 ... 5 images a class, turned by any angle; 60 epochs. The set "all": 26
letters, 200 ... 4 images, turned by up to 90 degrees; 20 epochs. Five seeds each. Every row of every method is cropped
out of the image padded by two pixels, before what the method does to it.
Stopped and started again, it goes on with what is missing.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.program import read_settings
from gen_invariance.benchmark.arms import Arm, read_arm
from gen_invariance.benchmark.grid import load_grid, make_cells, run_grid
from gen_invariance.benchmark.registry import Benchmark
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.experiment.settings import ClassifierSettings, MeasureSettings, StageSettings, Task
from gen_invariance.files import write_text
from gen_invariance.records import measured, write_csv
from gen_invariance.report.metrics import metric_info
from gen_invariance.report.summary import prepare_results
from gen_invariance.report.tables import method_tables, to_markdown
from gen_invariance.stats import paired_difference

METHODS = [
    "ce", "ce_drs", "ce_drw", "class_balanced", "square_root", "progressive", "effective_number", "focal", "ldam",
    "ldam_drw", "balanced_softmax", "logit_adjustment", "logit_adjustment_posthoc", "vector_scaling", "crt",
    "tau_norm", "lws", "mixup", "remix", "cutmix", "cmo", "randaugment", "trivialaugment",
]  # fmt: skip
BASELINE = "ce_drs"
FIT = {"steps": 300, "batch_size": 64, "sample_every": 10**9}
LEARNED, TRUE = " + stage", " + true nuisance"
"""What the tables add to a method with the stage: a learned nuisance, or the one in the data (a reference)."""


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


def make_benchmark(data: Path, name: str, *, epochs: int, work: Path) -> Benchmark:
    """The set `name` of letters cut out of the file `data`, with how every method trains on it."""
    shape = SETS[name]
    file = "letters.npz" if name == "all" else "ten_letters.npz"
    task = Task(
        source="npz",
        path=str(smaller(data, work / file, shape["letters"])),
        image_size=14,
        largest=shape["largest"],
        imbalance=shape["imbalance"],
        many_above=shape["many"],
        nuisance="rotation",
        nuisance_options={"degrees": shape["degrees"]},
    )
    training = TrainSettings(
        epochs=epochs, batch_size=64, schedule="cosine", warmup=0.05, second_phase=0.6, log_every=epochs,
        checkpoint_every=epochs,
    )  # fmt: skip
    return Benchmark(
        name=f"emnist_letters_{name}",
        summary=f"EMNIST letters ({name}), rotated by up to {shape['degrees']:g} degrees",
        task=task,
        classifier=ClassifierSettings("small_conv"),
        training=training,
        augmentation="crop_flip",
        nuisances={"crop_flip": {"padding": 2}},
        stage=StageSettings(policy="hard_cutoff", policy_options={"cutoff": shape["many"], "probability": 0.5}),
        fit=FIT,
        measure=MeasureSettings(draws=3, invariance_images=None),
    )


def make_arms(methods: Iterable[str], benchmark: Benchmark) -> list[Arm]:
    """Each method without and with the stage; the baseline also with the true nuisance."""
    names = []
    for method in methods:
        names += [method, f"{method}+spatial"]
        if method == BASELINE:
            names.append(f"{method}+oracle")
    return [read_arm(name, benchmark) for name in names]


def measure(benchmark: Benchmark, methods: Sequence[str], work: Path, *, seeds: int) -> pd.DataFrame:
    """The records of all cells, those that `work` lacks measured now; the arms as the tables call them."""
    arms = make_arms(methods, benchmark)
    cells = []
    for seed in range(seeds):  # one seed draws the class order, the images and the weights
        cells += make_cells([benchmark], lambda _: arms, orders=[seed], seeds=[seed])
    run_grid(cells, work, say=lambda line: print(line, flush=True))
    frame = load_grid(cells, work)
    names = frame["method"].str.replace("+spatial", LEARNED).str.replace("+oracle", TRUE)
    return frame.assign(method=names, benchmark=benchmark.summary)


def stage_table(frame: pd.DataFrame) -> str:
    """Each method without -> with the stage, as Markdown: means over seeds, and the paired difference with interval."""
    names = ("balanced_accuracy", "many_accuracy", "few_accuracy", "mean_ekld", "train_seconds")
    names = [name for name in names if name in set(frame["metric"])]
    totals = frame[frame["class_index"].isna() & frame["metric"].isin(names)]
    values = totals.set_index(["method", "metric", "seed"])["value"].unstack()
    head = []
    for name in names:
        head.append(metric_info(name).title)
        if name != names[-1]:
            head.append("difference")
    lines = [f"| Method | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for method in dict.fromkeys(frame["method"]):
        if (method + LEARNED, names[0]) not in values.index:
            continue
        cells = [method.replace("_", r"\_")]
        for name in names:
            info, plain, staged = metric_info(name), values.loc[(method, name)], values.loc[(method + LEARNED, name)]
            cells.append(f"{info.show(plain.mean())} → {info.show(staged.mean())}")
            if name != names[-1]:
                gap = paired_difference(staged, plain)
                shown = f"{gap.mean * info.scale:+.{info.decimals}f} ± {gap.half_width * info.scale:.{info.decimals}f}"
                cells.append(shown.replace("-", "−"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    given = read_settings(
        __doc__, data=Path, out=Path("runs/methods/results"), work=Path("runs/methods"), methods=tuple(METHODS),
        seeds=5, set="ten", epochs=0,
    )  # fmt: skip
    torch.set_num_threads(1)

    epochs = given.epochs or SETS[given.set]["epochs"]
    benchmark = make_benchmark(given.data, given.set, epochs=epochs, work=given.work)
    frame = measure(benchmark, given.methods, given.work, seeds=given.seeds)

    baseline = BASELINE if BASELINE in given.methods else None
    results = prepare_results(frame, baseline=baseline)
    table = to_markdown(method_tables(results, references=[BASELINE + TRUE]))
    table += f"\n## Without → with the stage\n\n{stage_table(frame)}"
    print(table)
    write_text(given.out / "table.md", table)
    classes = ["class_index", "class_name", "class_count", "group"]
    summary = results.summary
    write_csv(summary[summary["class_index"].isna()].drop(columns=classes), given.out / "summary.csv")
    totals = measured(frame)
    totals = totals[totals["class_index"].isna()].drop(columns=[*classes, "versions"])
    write_csv(totals, given.out / "records.csv")


if __name__ == "__main__":
    main()
