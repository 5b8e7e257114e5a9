"""The demo's page: what was learned, on whom it was used, and whether invariance arrived."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gen_invariance.benchmark.demo import BASELINE, LEARNED, ORACLE, DemoSettings, demo_frame, fit_folder
from gen_invariance.experiment.task import Prepared, prepare
from gen_invariance.measure.class_size import class_size_association
from gen_invariance.nuisance.generic import RandAugment
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.report.class_figures import accuracy_by_class, class_size_bars, ekld_against_class_size
from gen_invariance.report.drawing import method_styles
from gen_invariance.report.figures import Widths, distribution_histogram, image_grid, widths_with_interval
from gen_invariance.report.pages import Picture
from gen_invariance.report.report_page import write_report
from gen_invariance.run import named_generator
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.spatial import CAPS, UNITS, SpatialTranslator

_DRAWS = 9


def write_demo_report(out: Path, settings: DemoSettings) -> Path:
    """Draw everything and write `out`/report/report.html."""
    frame = demo_frame(out, settings)
    rotated = frame[frame["benchmark"] == settings.rotated.name]
    prepared = prepare(settings.rotated, seed=0)
    spatial = {
        task: [load_translator(fit_folder(out, task, "spatial", seed)) for seed in range(settings.seeds)]
        for task in (["rotated", "upright"] if settings.control else ["rotated"])
    }
    munit = load_translator(fit_folder(out, "rotated", "munit", 0))
    figures = [
        _grid(prepared, spatial["rotated"][0], munit),
        _angles(prepared, spatial["rotated"]),
        _widths(spatial),
        _sizes(prepared),
        *_by_class(rotated),
    ]
    notes = [*_explanation(settings), *_associations(rotated), *_control(frame, settings)]
    return write_report(
        out / "report",
        title="Giving a learned nuisance to the tail: rotated, long-tailed digits",
        frame=frame,
        figures=figures,
        notes=notes,
        command="gen-invariance demo",
        baseline=BASELINE,
        references=[ORACLE],
    )


def _explanation(settings: DemoSettings) -> list[str]:
    return [
        "scikit-learn's digits, each turned once by a random angle, were cut to a long tail of 110 to 5 training "
        "images a class; all other images are test images. Every method trains the same small network for "
        f"{settings.epochs} epochs on crops of the padded image, with class-balanced sampling in the last 40 % of "
        "them (DRS). With the stage, half of the rows of classes below 45 images come from a second, class-balanced "
        "stream, and are left as they are (balanced stream), or given generic augmentation (RandAugment, tail), a "
        "nuisance learned from classes of 20 images or more, or the true rotation (oracle). RandAugment on every row "
        "is what one would do without a stage. "
        f"{settings.seeds} seeds; each draws class order, images, angles and initial weights.",
        "The spatial translator is told the family of transformations by hand (rotation, scale, gain, bias) and "
        "learns only how far each of them swings. With every angle in the data nothing opposes the bonus on the "
        "width, so it runs to its cap of 180 degrees, which is the truth here; a rotation limited to a part of the "
        "circle comes out too narrow, since each image already carries its own angle. MUNIT is told nothing; it is "
        "not known to learn rotation, and is shown whichever way it falls.",
    ]


def _grid(prepared: Prepared, spatial: Nuisance, munit: Nuisance) -> Picture:
    """One image of each of the five smallest classes under four nuisances, a row each."""
    smallest = prepared.train.counts.argsort()[:5]
    rows = torch.stack([(prepared.train.labels == label).nonzero()[0, 0] for label in smallest])
    images = prepared.train.float_images(rows)
    sources: dict[str, Nuisance] = {
        "true rotation": prepared.nuisance,
        "spatial, learned": spatial,
        "MUNIT, learned": munit,
        "RandAugment": RandAugment(),
    }
    lines, labels = [], []
    for name, nuisance in sources.items():
        for image, label in list(zip(images, smallest.tolist(), strict=True))[:2]:
            lines.append(torch.cat([image[None], _draws(nuisance, image, name)]))
            labels.append(f"{name}, digit {prepared.train.class_names[label]}")
    png = image_grid(lines, row_labels=labels, column_labels=["source"])
    return Picture(
        title="Translated tail images",
        caption=f"Left: an image of a tail class. Right: {_DRAWS} draws of each nuisance for it (seed 0).",
        alt="Grid of digit images: each row shows one tail image and its translations by one nuisance.",
        png=png,
    )


def _draws(nuisance: Nuisance, image: Tensor, name: str) -> Tensor:
    repeated = image.expand(_DRAWS, *image.shape)
    draw = nuisance.sample(repeated.shape, generator=named_generator(0, "report", name))
    return nuisance.apply(repeated, draw)


def _angles(prepared: Prepared, spatial: list[SpatialTranslator]) -> Picture:
    learned = np.concatenate(
        [
            translator.parameters_of(translator.sample((4000,), generator=named_generator(seed, "angles")))["rotation"]
            for seed, translator in enumerate(spatial)
        ]
    )
    true = prepared.nuisance.sample((4000 * len(spatial),), generator=named_generator(0, "angles"))["degrees"]
    distance = _kolmogorov(learned, true.numpy())
    return Picture(
        title="Learned and true angles",
        caption=f"Angles that the learned spatial nuisance draws (all seeds) over the true ones. Largest distance of "
        f"the two distribution functions: {distance:.3f}.",
        alt=f"Histogram of learned over true rotation angles; Kolmogorov distance {distance:.3f}.",
        png=distribution_histogram(learned, true, name="rotation", unit="degrees"),
    )


def _kolmogorov(first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance between two empirical distribution functions."""
    points = np.sort(np.concatenate([first, second]))
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def _widths(spatial: dict[str, list[SpatialTranslator]]) -> Picture:
    entries = []
    for name in spatial["rotated"][0].operations:
        values = {task: [fitted.widths()[name] for fitted in fits] for task, fits in spatial.items()}
        unit = UNITS[name] if UNITS[name] != "factor" else "log factor"
        entries.append(
            Widths(
                name=name,
                values=values["rotated"],
                unit=unit,
                true=CAPS["rotation"] if name == "rotation" else 0.0,
                control=values.get("upright"),
            )
        )
    return Picture(
        title="What the spatial translator learned",
        caption="Half-width of each operation, a point a seed. The control is the same fit on digits that nobody "
        "turned: the width it finds there is the false width to expect from nothing.",
        alt="Learned widths of rotation, scale, gain and bias, beside the control without nuisance and the truth.",
        png=widths_with_interval(entries),
    )


def _sizes(prepared: Prepared) -> Picture:
    return Picture(
        title="The long tail",
        caption="Training images of each class (seed 0; other seeds draw another order of the classes).",
        alt="Bars of training images for each digit, from 110 down to 5.",
        png=class_size_bars(prepared.train.counts, prepared.groups, class_names=prepared.train.class_names),
    )


def _by_class(frame: pd.DataFrame) -> list[Picture]:
    styles = method_styles(frame["method"].unique())
    draw: list[tuple[str, str, str, Callable[..., bytes]]] = [
        (
            "Accuracy by class size",
            "Test accuracy of classes by their rank in training size; bars are 95 % intervals over seeds.",
            "Accuracy of each method against class rank.",
            accuracy_by_class,
        ),
        (
            "Invariance by class size",
            "Expected KL divergence under rotation (0 is perfect invariance) against training images of the class.",
            "eKLD of each method against class size on a log axis, with fitted lines.",
            ekld_against_class_size,
        ),
    ]
    return [Picture(title, caption, alt, function(frame, styles=styles)) for title, caption, alt, function in draw]


def _associations(frame: pd.DataFrame) -> list[str]:
    """Does eKLD still fall with class size?"""
    parts = []
    for method, rows in frame[frame["metric"] == "ekld"].groupby("method", sort=False):
        table = rows.pivot_table(index="seed", columns="class_index", values=["class_count", "value"])
        found = class_size_association(
            table["class_count"].to_numpy(), table["value"].to_numpy(), generator=named_generator(0, "association")
        )
        low, high = found.spearman.low, found.spearman.high
        parts.append(f"{method}: {found.spearman.value:+.2f} [{low:+.2f}, {high:+.2f}]")
    return ["Rank correlation of class size and eKLD, with 95 % bootstrap intervals over classes: " + "; ".join(parts)]


def _control(frame: pd.DataFrame, settings: DemoSettings) -> list[str]:
    if not settings.control:
        return []
    rows = frame[(frame["benchmark"] == settings.upright.name) & (frame["metric"] == "few_accuracy")]
    table = rows.pivot_table(index="seed", columns="method", values="value")
    plain, learned = (table[name] for name in (BASELINE, LEARNED))
    difference = learned - plain
    return [
        "Control, digits that nobody turned: few-shot accuracy "
        f"{plain.mean():.3f} plain and {learned.mean():.3f} with the widths learned there "
        f"(difference {difference.mean():+.3f}, seeds {', '.join(f'{value:+.3f}' for value in difference)})."
    ]
