"""Which parts of photographs the data show.

A part takes part where its reading varies within classes by what an eye would notice, and where little of its variance
lies between classes (an intraclass correlation, from a one-way analysis of variance; over means of groups where they
are known, as images of one track are no independent witnesses). What tells classes apart must not be redrawn. The
geometry takes part where images of a class can be aligned: where more of their pairs than chance agree better, once
registered, than nearly all pairs of different classes do.

| reading | least within | gtsrb: within, between | cifar10 | clothing10_dev, 64 px |
|---|---|---|---|---|
| tone: mean of luminance | .04 | .165, .16 | .128, .15 | .096, .08 |
| colour: cast of the channels | .015 | .024, .36 | .048, .23 | .059, .05 |
| contrast: quantiles, standardised | .1 | .33, .09 | .34, .08 | .31, .05 |
| light: log of a quarter | .06 | .17, .04 | .18, .09 | .12, .03 |
| sharpness: log | .12 | .28, .14 | .24, .05 | .31, .08 |
| noise | .003 | .011, .16 | .008, .25 | .006, .05 |
| geometry: pairs aligned | .25 | .44 | .09 | .16 |

Between at most .3. Contrast, light and noise wait to be asked for even so: a light field gained nothing on traffic
signs (measured with prototypes), and all of them together made some signs unreadable. Figures of `split_variance` on
2,000 training images of each set and of `register.read_geometry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.translator.redraw.tone import Tone

MOST_BETWEEN = 0.3
"""Share of a reading's variance that may lie between classes."""
LEAST_WITHIN = {"tone": 0.04, "colour": 0.015, "contrast": 0.1, "light": 0.06, "sharpness": 0.12, "noise": 0.003}
"""Standard deviation of a reading within classes from which on it is worth redrawing."""
ON_REQUEST = ("contrast", "light", "noise")
"""Parts that take part only where somebody names them."""
LEAST_ALIGNED = 0.25
"""Share of pairs of a class that have to be aligned; 5 % are by chance."""


@dataclass(frozen=True)
class Evidence:
    """What the data show of one part, and whether it takes part by default."""

    part: str
    shown: bool
    numbers: Mapping[str, float]

    @property
    def kept(self) -> bool:
        """Whether it takes part without being named."""
        return self.shown and self.part not in ON_REQUEST

    @property
    def note(self) -> str:
        """The decision in words."""
        shown = ", ".join(f"{name} {value:.3g}" for name, value in self.numbers.items())
        asked = "is shown and waits to be asked for" if self.shown else "is left out"
        return f"{self.part} {'takes part' if self.kept else asked}: {shown}"


def weigh_parts(
    tone: Tone, readings: Mapping[str, Tensor], labels: Tensor, groups: Tensor | None = None
) -> list[Evidence]:
    """Evidence for the tone and each of `readings` (N, ...) of photographs of the classes `labels` (N,)."""
    found = []
    for part, values in {"tone": tone.ground.mean(1, keepdim=True), **readings}.items():
        if part == "colour":  # what it has beyond the tone, and what tells red things from blue ones
            values = tone.ground - tone.ground.mean(1, keepdim=True)
        within, between = split_variance(values.reshape(len(labels), -1), labels, groups)
        varies = within >= LEAST_WITHIN[part] and between <= MOST_BETWEEN
        found.append(Evidence(part, varies, {"spread within classes": within, "share between classes": between}))
    return found


def split_variance(values: Tensor, labels: Tensor, groups: Tensor | None = None) -> tuple[float, float]:
    """Standard deviation within classes (root mean square over columns), and the share of variance between classes.

    The share is the intraclass correlation, variances summed over the columns of `values` (N, P). With `groups` (N,) it
    is that of the means of each class's groups; where no class has two of them it is 1, as nothing is known.
    """
    deviation = _about_means(values, labels).square().mean(0).mean().sqrt()
    if groups is not None:
        pairs, number = torch.unique(torch.stack([labels, groups], dim=1), dim=0, return_inverse=True)
        values, labels = _means(values, number)[0], pairs[:, 0]
    known, number = torch.unique(labels, return_inverse=True)
    means, counts = _means(values, number)
    classes, total = len(known), len(values)
    if total == classes or classes < 2:
        return float(deviation), 1.0 if classes > 1 else 0.0
    inside = (values - means[number]).square().sum(0) / (total - classes)
    outside = (counts[:, None] * (means - values.mean(0)).square()).sum(0) / (classes - 1)
    usual = (total - float(counts.square().sum()) / total) / (classes - 1)
    between = ((outside - inside) / usual).clamp(min=0)
    return float(deviation), float(between.sum() / (between + inside).sum().clamp(min=1e-12))


def _about_means(values: Tensor, labels: Tensor) -> Tensor:
    number = torch.unique(labels, return_inverse=True)[1]
    return values - _means(values, number)[0][number]


def _means(values: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Means of rows of the same number, and how many there are."""
    counts = torch.bincount(number).to(values)
    sums = torch.zeros(len(counts), values.shape[1], dtype=values.dtype).index_add_(0, number, values)
    return sums / counts[:, None], counts


def photo_candidates(data: ImageData) -> tuple[str, ...]:
    """Parts that can be read off images of that many channels."""
    colour = ("colour",) if data.images.shape[1] > 1 else ()
    return ("tone", *colour, "contrast", "light", "sharpness", "noise", "geometry")
