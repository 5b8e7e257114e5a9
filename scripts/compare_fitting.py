"""Quality against processor time: MUNIT fitted as the recipe does it, and as the package does.

    python scripts/compare_fitting.py out=runs/fitting                # about 20 minutes on one CPU core
    python scripts/compare_fitting.py out=runs/fitting seconds=60 only=small,small-32 seed=1

Both see the same long-tailed digits on backgrounds; one judge, trained on other images, looks at both with the figures
of `gen-invariance inspect`. Writes a JSON line for each look and prints when each arm first was as good as the recipe
is at its end. Processor time of the looks is not counted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from plain_recipe import PlainImages, PlainMunit
from torch import Tensor
from torch.utils.data import DataLoader, WeightedRandomSampler

from gen_invariance.benchmark.demo import DemoSettings
from gen_invariance.benchmark.inspect import InspectSettings, head_classes, train_judge
from gen_invariance.benchmark.task import Task, prepare
from gen_invariance.data.images import ImageData
from gen_invariance.data.sampling import epoch_indices
from gen_invariance.data.split import split_indices
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import named_generator
from gen_invariance.translator.build import build_objective
from gen_invariance.translator.munit import MunitTranslator
from gen_invariance.translator.quality import assess

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
        channels=data.images.shape[1],
        seed=seed,
        network=how["network"],
        learning_rate=how["learning_rate"],
        discriminator_layers=3 if how["network"] else 4,
        weights=how.get("weights"),
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


def look_with(task: Task, seed: int) -> tuple[ImageData, callable]:
    """The images of the head classes to fit on, and what looks at a translator."""
    head = head_classes(prepare(task, seed=seed).train, head_from=20)
    seen, held = split_indices(head.labels, fraction=0.3, generator=named_generator(seed, "held"))
    judge = train_judge(head.subset(seen), InspectSettings(), seed=seed)

    def look(nuisance: Nuisance) -> dict[str, float]:
        quality = assess(
            nuisance, head.float_images(held), head.labels[held], judge=judge, features=judge.features,
            bank=head.float_images(), bank_rows=held, num_classes=head.num_classes,
            generator=named_generator(seed, "assess"),
        )  # fmt: skip
        return {name: quality.figures[name].estimate.value for name in FIGURES}

    return head, look


def main(out: Path, seconds: float, seed: int, only: str) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    rotated = DemoSettings().rotated
    task = Task(**{**vars(rotated), "nuisance": "background", "nuisance_options": {"levels": 200}})
    head, look = look_with(task, seed)
    for name, how in ARMS.items():
        if only and name not in only.split(","):
            continue
        budget = seconds if how is None else seconds / 3
        steps = fit_recipe(head, seed) if how is None else fit_ours(head, seed, how)
        used, due, number = 0.0, budget / 64, 0
        while used < budget:
            started = time.process_time()
            nuisance = next(steps)
            used, number = used + time.process_time() - started, number + 1
            if used >= due or used >= budget:
                started = time.process_time()
                fill_bank(nuisance, head, seed)
                used += time.process_time() - started
                due *= 2**0.5
                line = {"arm": name, "seed": seed, "step": number, "seconds": round(used, 2), **look(nuisance)}
                with (out / f"fitting-{seed}.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(line, flush=True)
    if any(json.loads(line)["arm"] == "recipe" for line in (out / f"fitting-{seed}.jsonl").read_text().splitlines()):
        print(summary(out / f"fitting-{seed}.jsonl"))


def summary(path: Path) -> str:
    """When each arm first had the recipe's last figures, without and with its diversity."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = [row for row in rows if row["arm"] == "recipe"][-1]
    lines = [f"recipe: {last['seconds']:.0f} s, {last['step']} steps, diversity {last['diversity']:.2f}"]
    for arm in [name for name in ARMS if name != "recipe"]:
        good = [
            row
            for row in rows
            if row["arm"] == arm
            and row["accuracy_kept"] >= last["accuracy_kept"]
            and row["kernel_distance"] <= last["kernel_distance"]
            and row["coverage"] >= last["coverage"]
        ]
        for words, found in (
            ("", good),
            ("as diverse: ", [row for row in good if row["diversity"] >= last["diversity"]]),
        ):
            for row in found[:1]:
                lines.append(
                    f"{arm}: {words}{row['seconds']:.1f} s, {row['step']} steps, diversity {row['diversity']:.2f}"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    main(
        Path(given.get("out", "runs/fitting")),
        float(given.get("seconds", 720)),
        int(given.get("seed", 0)),
        given.get("only", ""),
    )
