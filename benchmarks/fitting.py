"""Quality against processor time: MUNIT fitted as the recipe does it, and as the package does.

    python -m benchmarks.fitting out=runs/fitting seeds=3        # about 20 minutes of one CPU core a seed
    python -m benchmarks.fitting out=runs/fitting seconds=60 only=recipe,small-style
    python -m benchmarks.fitting out=runs/fitting summary=true   # the table again

All see the same long-tailed digits on backgrounds; one judge, trained on other images, looks at all with the figures
of `gen-invariance inspect`, and at the true nuisance on the images as they were. Writes a JSON line for each look to
OUT/fitting.jsonl and prints when each arm first was as good as the recipe is at its end: identity kept and coverage no
lower, kernel distance no higher, diversity no farther from that of the true nuisance. Then a step of each is timed, the
arms taking turns in one process; times to equal figures are steps times that. At last each arm's translator is given to
a classifier's tail classes, as `studies.translators` does. Finished arms are not run again.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, WeightedRandomSampler

from benchmarks.plain_recipe import PlainImages, PlainMunit
from benchmarks.program import append_line, format_gap, format_mean, markdown, read_lines, read_settings
from benchmarks.timing import Variant, measure
from gen_invariance.benchmark.arms import read_arm
from gen_invariance.benchmark.registry import Benchmark, read_benchmark
from gen_invariance.configs import config_folder
from gen_invariance.data.images import ImageData
from gen_invariance.data.sampling import epoch_indices
from gen_invariance.data.split import split_indices
from gen_invariance.experiment.cell import CellInputs, run_cell
from gen_invariance.experiment.inspect import select_head_classes, train_judge
from gen_invariance.experiment.settings import InspectSettings, Task
from gen_invariance.experiment.task import prepare
from gen_invariance.files import write_text
from gen_invariance.nuisance.intensity import Background
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import named_generator
from gen_invariance.translator.munit.model import MunitTranslator
from gen_invariance.translator.quality.assess import Memory, assess
from gen_invariance.translator.registry import build_objective

ARMS = {
    "recipe": None,  # width 64, two domains, batch 1
    "munit": {"network": {}, "batch": 16, "learning_rate": 1e-4},
    "small": {"network": {"width": 16, "residual_blocks": 2}, "batch": 16, "learning_rate": 5e-4},
    "small-32": {"network": {"width": 32, "residual_blocks": 2}, "batch": 16, "learning_rate": 5e-4},
    "small-bank": {
        "network": {"width": 16, "residual_blocks": 2, "bank_size": 1024}, "batch": 16, "learning_rate": 5e-4,
    },
    "small-style": {
        "network": {"width": 16, "residual_blocks": 2}, "batch": 16, "learning_rate": 5e-4, "weights": {"style": 5.0},
    },
    "small-bank-style": {
        "network": {"width": 16, "residual_blocks": 2, "bank_size": 1024}, "batch": 16, "learning_rate": 5e-4,
        "weights": {"style": 5.0},
    },
}  # fmt: skip

LEVELS = 200
SHOWN = {
    "accuracy_kept": "identity kept",
    "kernel_distance": "kernel distance",
    "coverage": "coverage",
    "diversity": "diversity",
}
TRAINED = {
    "balanced_accuracy": ("balanced accuracy, %", 100, 1),
    "few_accuracy": ("few-shot accuracy, %", 100, 1),
    "few_ekld": ("few-shot eKLD, nats", 1, 3),
}
FIGURES = ("accuracy_kept", "kernel_distance", "coverage", "diversity", "near_copies")


class Recipe:
    """The kept generator of the plain recipe as a nuisance."""

    def __init__(self, munit: PlainMunit) -> None:
        self.generator = munit.gens[0]

    def sample(self, shape: torch.Size, *, generator: torch.Generator) -> dict[str, Tensor]:
        return {"style": torch.randn(shape[0], 8, generator=generator)}

    @torch.no_grad()
    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        content, _ = self.generator.encode(images * 2 - 1)
        return (self.generator.decode(content, draw["style"]) + 1) / 2


def fit_recipe(data: ImageData, seed: int) -> Iterator[Nuisance]:
    """The recipe, one step at a time."""
    munit = PlainMunit(data.images.shape[1])
    weights = (1 / data.counts[data.labels]).tolist()
    sampler = WeightedRandomSampler(weights, 10**6, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(PlainImages(data.images, data.labels), batch_size=1, sampler=sampler)
    for (first, _), (second, _) in zip(loader, loader, strict=False):
        munit.step([first, second], [torch.randn(1, 8) for _ in range(2)], [torch.randn(1, 8) for _ in range(2)])
        yield Recipe(munit)


def fit_ours(data: ImageData, seed: int, how: dict) -> Iterator[MunitTranslator]:
    """The package's objective, stepped as `fit_translator` does."""
    objective = build_objective(
        "munit",
        data,
        seed=seed,
        network=how["network"],
        settings={
            "learning_rate": how["learning_rate"],
            "discriminator_layers": 3 if how["network"] else 4,
            "weights": how.get("weights", {}),
        },
    )
    for step in range(10**6):
        generator = named_generator(seed, "fit", step)
        rows = epoch_indices(
            data.labels, rule="class_balanced", epoch=step, seed=seed, num_samples=how["batch"], stream="fit"
        )
        images = data.float_images(rows)
        out = objective.forward(images, objective.sample(images.shape, generator=generator))
        update(objective, "discriminator", objective.discriminator_terms(out))
        objective.discriminator.requires_grad_(False)
        update(objective, "translator", objective.translator_terms(out))
        objective.discriminator.requires_grad_(True)
        yield objective.translator


@torch.no_grad()
def fill_bank(translator: MunitTranslator, data: ImageData, seed: int) -> None:
    """Styles of images, every class with the same weight, for a translator that keeps some; then it draws from them."""
    if size := getattr(getattr(translator, "config", None), "bank_size", 0):
        rows = epoch_indices(data.labels, rule="class_balanced", epoch=0, seed=seed, num_samples=size, stream="bank")
        translator.bank.copy_(translator.style(data.float_images(rows)))
        translator.draw_from("bank")


def update(objective: object, name: str, terms: dict[str, Tensor]) -> None:
    objective.optimizers[name].zero_grad(set_to_none=True)
    sum(terms.values()).backward()
    objective.optimizers[name].step()


def look_with(task: Task, seed: int) -> tuple[ImageData, Callable[[Nuisance], dict], dict]:
    """The images of the head classes to fit on, what looks at a translator, and what it sees of the true nuisance."""
    prepared = prepare(task, seed=seed)
    both = (prepared.train, prepared.originals("train"))
    head, clean = (select_head_classes(images, head_from=20) for images in both)
    seen, held = split_indices(head.labels, fraction=0.3, generator=named_generator(seed, "held"))
    judge = train_judge(head.subset(seen), InspectSettings(), seed=seed)

    def look(nuisance: Nuisance, sources: ImageData = head) -> dict[str, float]:
        quality = assess(
            nuisance, head.subset(held), sources=sources.float_images(held), judge=judge,
            memory=Memory(head.float_images(), held), generator=named_generator(seed, "assess"),
        )  # fmt: skip
        return {name: quality.figures[name].estimate.value for name in FIGURES}

    return head, look, look(Background(levels=LEVELS), clean)


def steps_of(arm: str, data: ImageData, seed: int) -> Iterator[Nuisance]:
    return fit_recipe(data, seed) if ARMS[arm] is None else fit_ours(data, seed, ARMS[arm])


def fit_and_look(
    arm: str, head: ImageData, look: Callable, train: Callable[[Nuisance], dict], seed: int, budget: float
) -> Iterator[dict]:
    """Looks, at shares of the budget that grow by half octaves; with the last one what training gives."""
    steps, used, due, number = steps_of(arm, head, seed), 0.0, budget / 64, 0
    while used < budget:
        started = time.process_time()
        nuisance = next(steps)
        used, number = used + time.process_time() - started, number + 1
        if used >= due or used >= budget:
            fill_bank(nuisance, head, seed)
            due *= 2**0.5
            trained = train(nuisance) if used >= budget else {}
            yield {"arm": arm, "seed": seed, "step": number, "last": used >= budget, **look(nuisance), **trained}


def train_with(benchmark: Benchmark, seed: int, nuisance: Nuisance) -> dict[str, float]:
    """Figures of a classifier whose tail classes are given the nuisance."""
    method = read_arm("ce_drs+munit_small", benchmark, config_folder()).method
    inputs = CellInputs(prepare(benchmark.task, seed=seed), translator=nuisance)
    with tempfile.TemporaryDirectory() as folder:
        records = run_cell(
            benchmark.task, method, inputs, seed=seed, folder=Path(folder) / "run", measure=benchmark.measure
        )
    found = {record.metric: record.value for record in records if record.class_index is None}
    return {metric: found[metric] for metric in TRAINED}


def step_costs(arms: Sequence[str], head: ImageData) -> dict[str, float]:
    """Processor seconds of one step of each arm, medians."""
    steps = {arm: steps_of(arm, head, seed=0) for arm in arms}
    variants = [Variant(arm, "plain", partial(next, steps[arm]), repeats=3) for arm in arms]
    taken = measure(variants, rounds=7, device=torch.device("cpu"))
    return {arm: statistics.median(seconds) for arm, seconds in zip(arms, taken, strict=True)}


def main(out: Path, seconds: float, seeds: int, arms: Sequence[str]) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "fitting.jsonl"
    changes = {"data": {"nuisance_options": {"levels": LEVELS}}}
    benchmark = read_benchmark("digits_bg_lt", config_folder(), changes=changes)
    for seed in range(seeds):
        head, look, truth = look_with(benchmark.task, seed)
        lines = [{"arm": "truth", "seed": seed, "last": True, **truth}]
        for arm in ["truth", *arms]:
            rows = [row for row in read_lines(path) if (row["arm"], row["seed"]) == (arm, seed)]
            if rows and rows[-1]["last"]:
                continue
            others = [row for row in read_lines(path) if row not in rows]  # an arm that was stopped starts again
            write_text(path, "".join(json.dumps(row) + "\n" for row in others))
            budget = seconds if arm == "recipe" else seconds / 4
            train = partial(train_with, benchmark, seed)
            for line in lines if arm == "truth" else fit_and_look(arm, head, look, train, seed, budget):
                append_line(path, line)
                print(line, flush=True)
    costs = step_costs(arms, look_with(benchmark.task, 0)[0])
    write_text(out / "costs.json", json.dumps(costs) + "\n")


def first_as_good(looks: list[dict], recipe: dict, truth: dict) -> dict | None:
    """The first look that is as good as the recipe's last in every figure."""

    def astray(row: dict) -> float:
        return abs(row["diversity"] - truth["diversity"])

    return next(
        (
            row
            for row in looks
            if row["accuracy_kept"] >= recipe["accuracy_kept"]
            and row["kernel_distance"] <= recipe["kernel_distance"]
            and row["coverage"] >= recipe["coverage"]
            and astray(row) <= astray(recipe)
        ),
        None,
    )


def summary(out: Path) -> str:
    """A table: for each seed and arm its figures when first as good as the recipe's last, and how much sooner."""
    rows, costs = read_lines(out / "fitting.jsonl"), json.loads((out / "costs.json").read_text())
    head = ["seed", "arm", "steps", "seconds", "times as soon as the recipe", *SHOWN.values()]
    cells = []
    for seed in sorted({row["seed"] for row in rows}):
        of = {arm: [row for row in rows if row["seed"] == seed and row["arm"] == arm] for arm in ("truth", *ARMS)}
        recipe, truth = of["recipe"][-1], of["truth"][-1]
        whole = recipe["step"] * costs["recipe"]
        for arm, looks in of.items():
            if not looks:
                continue
            row = looks[-1] if arm in ("truth", "recipe") else first_as_good(looks, recipe, truth)
            if row is None:
                cells.append([seed, arm, f"not within {looks[-1]['step']}", *[""] * (len(head) - 3)])
                continue
            spent = "" if arm == "truth" else f"{row['step'] * costs[arm]:.1f}"
            sooner = f"{whole / (row['step'] * costs[arm]):.1f}" if arm not in ("truth", "recipe") else ""
            cells.append([seed, arm, row.get("step", ""), spent, sooner, *(f"{row[name]:.2f}" for name in SHOWN)])
    steps = ", ".join(f"{arm} {cost * 1000:.0f}" for arm, cost in costs.items())
    return "\n".join([markdown(head, cells), f"Processor time of a step, ms: {steps}.", "", trained(rows)])


def trained(rows: list[dict]) -> str:
    """A table: what classifiers reach with each arm's last translator, mean and 95 % interval, paired."""
    of = {arm: {row["seed"]: row for row in rows if row["arm"] == arm and "few_ekld" in row} for arm in ARMS}
    lines = []
    for arm, found in of.items():
        seeds = sorted(found.keys() & of["recipe"].keys())
        if not seeds:
            continue
        cells = []
        for metric, (_, scale, digits) in TRAINED.items():
            own, other = ([part[seed][metric] for seed in seeds] for part in (found, of["recipe"]))
            if arm == "recipe":
                cells.append(format_mean(own, scale=scale, digits=digits))
            else:
                cells.append(format_gap(own, other, scale=scale, digits=digits))
        name = "the recipe's MUNIT" if arm == "recipe" else f"`{arm}`, difference to the recipe's"
        lines.append([name, len(seeds), *cells])
    return markdown(["the tail is given", "seeds", *(title for title, _, _ in TRAINED.values())], lines)


if __name__ == "__main__":
    given = read_settings(
        __doc__, out=Path("runs/fitting"), seeds=1, seconds=600.0, only=("recipe", "munit", "small"), summary=False
    )
    if not given.summary:
        main(given.out, given.seconds, given.seeds, given.only)
    write_text(given.out / "fitting.md", summary(given.out) + "\n")
    print(summary(given.out))
