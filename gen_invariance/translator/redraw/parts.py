"""Which operations of the family the data show.

Handwriting varies of itself. An operation takes part where its parameter varies within classes by more than that:

| standard deviation within classes | digits | letters | from | under the nuisance |
|---|---|---|---|---|
| log stroke width | .08 to .10 | .12 to .16 | .145 | thickness .21 to .33; lighting, which clips strokes, .15 to .20 |
| slope, by congealing | .06 to .15 | .20 to .24 | .18 | shears within .5: .22 to .29 |
| place, shares of the side | .03 to .04 | .04 to .05 | .06 | shifts within 15 %: .07 to .09 |

Letters slant of themselves as much as a shear makes digits slant. The data show it, so it is drawn, too.
Figures of `measure_spreads`, on two class orders that are not reported elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.run import named_generator
from gen_invariance.translator.redraw.congeal import PoseGrid, congeal
from gen_invariance.translator.redraw.shape import move_to_centre, read_place, read_width
from gen_invariance.translator.redraw.tone import extract_figure, read_tone, take_out

SHOWS = {"stroke": 0.145, "slant": 0.18, "place": 0.06}
"""Spread within classes from which on an operation takes part."""

_CLASSES, _IMAGES = 5, 40  # looked at for the slant, whose poses are many
_TURNED = 0.7  # concentration of the density of angles below which a shear is not told from a turn


def find_shown_parts(images: Tensor, labels: Tensor) -> tuple[str, ...]:
    """Which of stroke, slant and place vary within classes of figures (N, C, H, W) by more than handwriting does."""
    spreads = measure_spreads(images, labels)
    return tuple(part for part, least in SHOWS.items() if spreads[part] >= least)


def measure_spreads(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Standard deviation within classes of log stroke width, slope and place (the mean of its two)."""
    figures = extract_figure(take_out(images, read_tone(images, kind="figure"), kind="figure"), kind="figure")
    place = read_place(figures)
    return {
        "stroke": float(_within(read_width(figures)[:, None], labels)),
        "slant": _slope_spread(move_to_centre(figures, place), labels),
        "place": float(_within(place, labels).mean()),
    }


def pick_rows(data: ImageData, *, most: int = 600) -> Tensor:
    """At most `most` rows, the largest classes first, as evenly from classes as they come; the same at every call."""
    labels = data.labels.cpu()
    rank = torch.zeros(len(data), dtype=torch.int64)
    for label in range(data.num_classes):
        rows = (labels == label).nonzero().squeeze(1)
        rank[rows] = torch.arange(len(rows))
    least = sorted(data.counts.tolist(), reverse=True)[: max(2, data.num_classes // 2)][-1]
    head = (data.counts.cpu()[labels] >= least).nonzero().squeeze(1)
    return head[rank[head].argsort(stable=True)][:most].sort().values


def _within(values: Tensor, labels: Tensor) -> Tensor:
    """Standard deviation of each column of (N, P) about the means of its classes."""
    member = torch.nn.functional.one_hot(labels).to(values)
    means = (member.T @ values) / member.sum(0).clamp(min=1)[:, None]
    return (values - means[labels]).std(0)


def _slope_spread(figures: Tensor, labels: Tensor) -> float:
    """Of a few images of the largest classes, by congealing with shears; 0 where turns hide them."""
    from gen_invariance.translator.redraw.pose import SLOPES, shrink  # diffusers, for which `pick_rows` need not wait

    counts = torch.bincount(labels)
    largest = counts.argsort(descending=True, stable=True)[:_CLASSES].tolist()
    classes = [shrink(figures[labels == label][:_IMAGES].cpu()) for label in largest if counts[label] > 1]
    if not classes:
        return 0.0
    aligned = congeal(classes, generator=named_generator(0, "family"), grid=PoseGrid(slopes=SLOPES))
    if aligned.concentration < _TURNED:
        return 0.0
    return float(torch.cat([poses[:, 2] for poses in aligned.poses]).std())
