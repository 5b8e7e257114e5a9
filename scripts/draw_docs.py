"""Draw the pictures of docs/how-it-works.md: real digits, real fits (MUNIT takes minutes on a CPU core).

python scripts/draw_docs.py                      # all of them, into docs/images
python scripts/draw_docs.py --munit-steps 100    # sooner, with a poorer MUNIT
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from gen_invariance.benchmark.demo import UPRIGHT
from gen_invariance.experiment.settings import Task
from gen_invariance.experiment.task import Prepared, prepare
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Background, Lighting
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.nuisance.thickness import Thickness
from gen_invariance.report.class_figures import class_size_bars
from gen_invariance.report.drawing import save_png
from gen_invariance.report.figures import image_grid
from gen_invariance.run import named_generator
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.settings import FitSettings

DRAWS = 9
TASK = Task(
    largest=110, imbalance=22, rest_is_test=True, nuisance="mix", nuisance_options={}, many_above=44, few_below=20
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepared = prepare(TASK, seed=0)
    train = prepared.train
    save_png(
        options.out / "long-tail.png",
        class_size_bars(train.counts, prepared.groups, class_names=train.class_names),
    )
    save_png(options.out / "nuisances.png", nuisances())
    with tempfile.TemporaryDirectory() as work:
        save_png(options.out / "tail-images.png", tail_images(prepared, Path(work)))


def nuisances() -> bytes:
    """One digit under draws of each hand-written nuisance."""
    data = prepare(UPRIGHT, seed=0).train
    image = data.float_images(torch.tensor([0]))[0]
    kinds = {"Rotation(30)": Rotation(30), "Lighting()": Lighting(), "Background()": Background()}
    kinds["Thickness()"] = Thickness()
    rows = [torch.cat([image[None], draws(nuisance, image, name)]) for name, nuisance in kinds.items()]
    return image_grid(rows, row_labels=list(kinds), column_labels=["image"])


def tail_images(prepared: Prepared, work: Path) -> bytes:
    """An image of each of two tail classes, and what the true nuisance and a learned one make of it."""
    loop = FitSettings(steps=400, batch_size=64)
    learned = fit_translator("redraw", prepared.train, loop, out=work / "redraw")
    tail = prepared.train.counts.argsort()[:2]
    rows, labels = [], []
    for name, nuisance in {"true nuisance": prepared.nuisance, "redraw, learned": learned}.items():
        for label in tail.tolist():
            image = prepared.train.float_images((prepared.train.labels == label).nonzero()[:1, 0])[0]
            rows.append(torch.cat([image[None], draws(nuisance, image, name)]))
            labels.append(f"{name}, digit {prepared.train.class_names[label]}")
    return image_grid(rows, row_labels=labels, column_labels=["before"])


def draws(nuisance: Nuisance, image: Tensor, name: str) -> Tensor:
    """`DRAWS` results of `nuisance` for one image, (DRAWS, C, H, W)."""
    repeated = image.expand(DRAWS, *image.shape)
    draw = nuisance.sample(repeated.shape, generator=named_generator(0, "pictures", name))
    return nuisance.apply(repeated, draw)


if __name__ == "__main__":
    main()
