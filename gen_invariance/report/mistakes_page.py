"""The page of a classifier's mistakes: the most confused classes, the worst images, the confusion matrix."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gen_invariance.data.images import to_float
from gen_invariance.measure.calibration import most_confused
from gen_invariance.report.pages import data_uri, write_page

WORST_IMAGES = 36
"""Pictures on the page at most."""

MOST_CELLS = 60
"""Classes up to which the whole matrix is on the page; of more there are the pairs, and the CSV file beside it."""

_SIDE = 96


@dataclass(frozen=True)
class Mistake:
    """An image that is named wrong.

    Attributes:
        image: (C, H, W), uint8 or float in [0, 1].
        name: file or row.
        label, predicted: classes.
        probability: of `predicted`.
        own: probability of `label`.
    """

    image: Tensor
    name: str
    label: int
    predicted: int
    probability: float
    own: float


def write_mistakes_page(
    out: Path | str,
    *,
    title: str,
    about: str,
    class_names: Sequence[str],
    counts: Sequence[int],
    confusion: Tensor,
    mistakes: Sequence[Mistake],
    figures: Mapping[str, str],
) -> Path:
    """Write the page to the file `out` and return its path; it is one file without scripts and links.

    Args:
        out: path of the page.
        title: heading.
        about: which images these are, a sentence.
        class_names: K.
        counts: training images of each class.
        confusion: int64 (K, K), from `confusion_matrix`.
        mistakes: worst first.
        figures: words and figures for the table on top.
    """
    names = list(class_names)
    pairs = most_confused(confusion)
    total, wrong = int(confusion.sum()), int(confusion.sum() - confusion.diag().sum())
    return write_page(
        "mistakes.html.j2",
        out,
        title=title,
        about=about,
        figures=list(figures.items()),
        total=total,
        wrong=wrong,
        pairs=[(names[p.label], names[p.predicted], p.images, f"{p.share:.0%}", counts[p.label]) for p in pairs],
        mistakes=[
            {
                "picture": data_uri(_thumbnail(each.image)),
                "name": each.name,
                "label": names[each.label],
                "predicted": names[each.predicted],
                "probability": f"{each.probability:.2f}",
                "own": f"{each.own:.2f}",
            }
            for each in mistakes[:WORST_IMAGES]
        ],
        matrix=_matrix(confusion, names, counts) if len(names) <= MOST_CELLS else [],
        names=names,
        shown=min(len(mistakes), WORST_IMAGES),
    )


def _matrix(confusion: Tensor, names: Sequence[str], counts: Sequence[int]) -> list[dict[str, object]]:
    """Rows of the table, largest class first; each cell with its count and its shade in percent."""
    order = sorted(range(len(names)), key=lambda label: (-counts[label], label))
    totals = confusion.sum(1).clamp_min(1).tolist()
    return [
        {
            "name": names[row],
            "number": place,
            "train": counts[row],
            "cells": [
                (int(confusion[row, column]), round(100 * int(confusion[row, column]) / totals[row]), row == column)
                for column in order
            ],
        }
        for place, row in enumerate(order, start=1)
    ]


def _thumbnail(image: Tensor) -> bytes:
    """PNG of an image, at most `_SIDE` pixels wide and high; small ones are enlarged without smoothing."""
    pixels = (to_float(image.detach().cpu()[None])[0] * 255).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))
    factor = _SIDE / max(picture.size)
    kind = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    scaled = picture.resize(tuple(max(1, round(length * factor)) for length in picture.size), kind)
    buffer = io.BytesIO()
    scaled.save(buffer, "PNG")
    return buffer.getvalue()
