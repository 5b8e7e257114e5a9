"""The pictures of the demonstration's page: the long tail, what was learned, and what it makes of tail images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.nuisance.generic import RandAugment
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.report.class_figures import class_size_bars
from gen_invariance.report.figures import Widths, distribution_histogram, image_grid, widths_with_interval
from gen_invariance.report.pages import Picture
from gen_invariance.run import named_generator
from gen_invariance.translator.spatial import CAPS, UNITS, SpatialTranslator

_DRAWS = 9


@dataclass(frozen=True, eq=False)
class DemoFits:
    """What was learned, and from what.

    Attributes:
        train: training images of seed 0.
        groups: bool masks (K,) of its classes by group.
        true: the nuisance in the images.
        spatial: a fitted translator for each seed.
        control: the same, fitted on images without the nuisance; may be empty.
        munit: fitted on the images of seed 0.
    """

    train: ImageData
    groups: Mapping[str, Tensor]
    true: Nuisance
    spatial: Sequence[SpatialTranslator]
    control: Sequence[SpatialTranslator]
    munit: Nuisance


def draw_fits(fits: DemoFits) -> list[Picture]:
    """Pictures of tail images under each nuisance, of learned angles and widths, and of the class sizes."""
    sizes = Picture(
        title="The long tail",
        caption="Training images of each class (seed 0; other seeds draw another order of the classes).",
        alt="Bars of training images for each digit, from 110 down to 5.",
        png=class_size_bars(fits.train.counts, fits.groups, class_names=fits.train.class_names),
    )
    return [_draw_tail_images(fits), _draw_angles(fits), _draw_widths(fits), sizes]


def _draw_tail_images(fits: DemoFits) -> Picture:
    """An image of each of the two smallest classes under four nuisances, a row each."""
    nuisances: dict[str, Nuisance] = {
        "true rotation": fits.true,
        "spatial, learned": fits.spatial[0],
        "MUNIT, learned": fits.munit,
        "RandAugment": RandAugment(),
    }
    rows, labels = [], []
    for name, nuisance in nuisances.items():
        for label in fits.train.counts.argsort()[:2].tolist():
            image = fits.train.float_images((fits.train.labels == label).nonzero()[:1, 0])
            repeated = image.expand(_DRAWS, -1, -1, -1)
            draw = nuisance.sample(repeated.shape, generator=named_generator(0, "report", name))
            rows.append(torch.cat([image, nuisance.apply(repeated, draw)]))
            labels.append(f"{name}, digit {fits.train.class_names[label]}")
    return Picture(
        title="Translated tail images",
        caption=f"Left: an image of a tail class. Right: {_DRAWS} draws of each nuisance for it (seed 0).",
        alt="Grid of digit images: each row shows one tail image and its translations by one nuisance.",
        png=image_grid(rows, row_labels=labels, column_labels=["source"]),
    )


def _draw_angles(fits: DemoFits) -> Picture:
    draws = [
        translator.read_parameters(translator.sample((4000,), generator=named_generator(seed, "angles")))["rotation"]
        for seed, translator in enumerate(fits.spatial)
    ]
    learned = np.concatenate(draws)
    true = fits.true.sample((len(learned),), generator=named_generator(0, "angles"))["degrees"].numpy()
    distance = float(ks_2samp(learned, true, method="asymp").statistic)
    return Picture(
        title="Learned and true angles",
        caption=f"Angles that the learned spatial nuisance draws (all seeds) over the true ones. Largest distance of "
        f"the two distribution functions: {distance:.3f}.",
        alt=f"Histogram of learned over true rotation angles; Kolmogorov distance {distance:.3f}.",
        png=distribution_histogram(learned, true, name="rotation", unit="degrees"),
    )


def _draw_widths(fits: DemoFits) -> Picture:
    widths = [
        Widths(
            name=name,
            values=[fitted.widths()[name] for fitted in fits.spatial],
            unit="log factor" if UNITS[name] == "factor" else UNITS[name],
            true=CAPS["rotation"] if name == "rotation" else 0.0,
            control=[fitted.widths()[name] for fitted in fits.control] or None,
        )
        for name in fits.spatial[0].operations
    ]
    return Picture(
        title="What the spatial translator learned",
        caption="Half-width of each operation, a point a seed. The control is the same fit on digits that nobody "
        "turned: the width it finds there is the false width to expect from nothing.",
        alt="Learned widths of rotation, scale, gain and bias, beside the control without nuisance and the truth.",
        png=widths_with_interval(widths),
    )
