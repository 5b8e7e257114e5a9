"""How good is a translator, without labels for the nuisance: figures with intervals, and a plain verdict.

Works for any nuisance. What is asked: does a translated image keep its class (a judge that saw neither the image nor
the translator)? Does it look like another real image? Do draws differ? Are they copies of training images? Does the
nuisance act alike on all classes? Each figure stands beside what untouched images get, which is also what a nuisance
that does nothing gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.data.grouping import hold_groups
from gen_invariance.data.images import ImageData
from gen_invariance.devices import send
from gen_invariance.errors import DataError, RangeError, ShapeError
from gen_invariance.nuisance.protocol import Nuisance, draw_for, select_rows
from gen_invariance.stats import bootstrap_ratio, half_sample_interval, permutation_p_value
from gen_invariance.translator.quality.measures import (
    between_class_share,
    copy_ratio,
    describe_change,
    kernel_distance,
    neighbour_scores,
    spread_of_draws,
    spread_within_classes,
    unread_kernel_distance,
)
from gen_invariance.translator.quality.verdict import Figure, Verdict, judge_figures, nan_to_none, refuse_unidentified
from gen_invariance.translator.settings import AssessSettings

NEAR_COPY = 0.33
"""A translation less than this far from another training image, in units of that image's own nearest neighbour."""


@dataclass(frozen=True)
class Quality:
    """What `assess` found.

    Attributes:
        figures: by name, see `assess`.
        agreement_by_class: float64 (K,), share of translations whose judged class is that of the image; NaN where no
            image of the class was looked at.
        accuracy_by_class: float64 (K,), share of translations judged to be of the image's class.
        count_by_class: int64 (K,), images looked at.
        class_p_value: of `class_share` under shuffled labels.
        worst: int64 (F,), rows of the images with the translations that the judge gives the least chance to be of their
            class; of images that it names right, and of each image only the worst translation.
        worst_images: float (F, C, H, W), those translations.
        worst_judged: int64 (F,), what the judge takes them for.
        verdict: what to do.
    """

    figures: Mapping[str, Figure]
    agreement_by_class: Tensor
    accuracy_by_class: Tensor
    count_by_class: Tensor
    class_p_value: float
    worst: Tensor
    worst_images: Tensor
    worst_judged: Tensor
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; NaN as null."""
        return {
            "verdict": self.verdict.word,
            "strength": self.verdict.strength,
            "reasons": list(self.verdict.reasons),
            "gain": None if self.verdict.gain is None else asdict(self.verdict.gain),
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
            "class_p_value": nan_to_none(self.class_p_value),
            "agreement_by_class": [nan_to_none(value) for value in self.agreement_by_class.tolist()],
            "accuracy_by_class": [nan_to_none(value) for value in self.accuracy_by_class.tolist()],
            "count_by_class": self.count_by_class.tolist(),
        }


_BATCH = 256  # images at a time


class Judge(Protocol):
    """A classifier that tells whether translations keep their class; `classifier.backbones.Classifier` is one."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D), on any scale."""
        ...


@dataclass(frozen=True)
class Memory:
    """What a translator may have memorised.

    Attributes:
        images: float (M, C, H, W), training images.
        rows: int64 (N,), which of them each assessed image is, -1 for none; None where none of them is.
    """

    images: Tensor
    rows: Tensor | None = None


@torch.no_grad()
def assess(
    nuisance: Nuisance,
    data: ImageData,
    *,
    judge: Judge,
    memory: Memory,
    generator: torch.Generator,
    settings: AssessSettings | None = None,
    sources: Tensor | None = None,
) -> Quality:
    """Translate each image of `data` several times, and measure what comes out.

    Figures: `agreement` (judged class stays), `accuracy` (judged class is the true one), `accuracy_kept` (that over
    the accuracy on the images as they are), `kernel_distance`, `precision`, `density`, `recall`, `coverage` (one half
    of the images, translated, against the other half, both ways), `feature_diversity` and `diversity` (mean distance
    of two draws of one image, in features and in pixels, over that of two real images of one class), `near_copies`
    (share), `class_share` (how much of the variety of what translations change lies between classes).

    Args:
        nuisance: learned or hand-written.
        data: N images that the judge was not trained on; halves of them that are compared share no group.
        judge: trained on other images.
        memory: training images, to find copies of.
        generator: CPU generator of draws, halves and intervals.
        settings: see `AssessSettings`; None for the defaults.
        sources: float (N, C, H, W), what is translated in place of `data`: the same images before the nuisance in the
            data acted on them, when that nuisance is assessed. The rest still compares with `data`.

    Raises:
        DataError: fewer than 4 * neighbours images, or groups that leave a half with fewer than 2 * neighbours.
        RangeError: the nuisance gives NaN or leaves [0, 1].
        ShapeError: it changes the shape.
    """
    settings = settings or AssessSettings()
    least = 4 * settings.neighbours
    if len(data) < least:
        raise DataError(
            f"quality needs at least {least} images that the judge has not seen, got {len(data)}; "
            "hold out more, or lower head_from"
        )
    images, labels, draws = data.float_images(), data.labels, settings.draws
    sources = images if sources is None else sources
    moved = translate(nuisance, sources, draws=draws, generator=generator)

    def in_batches(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Of the images (N, ...) and of their translations (S, N, ...), float64."""
        rows = torch.cat([images, moved.flatten(0, 1)]).split(_BATCH)
        values = torch.cat([function(part) for part in rows]).double()
        return values[: len(images)], values[len(images) :].unflatten(0, (draws, len(images)))

    before, after = (logits.log_softmax(-1) for logits in in_batches(judge))
    right_before, right = (before.argmax(1) == labels).double(), (after.argmax(2) == labels).double()
    same = (after.argmax(2) == before.argmax(1)).double()
    figures = {
        "agreement": Figure(bootstrap_ratio(same.mean(0), generator=generator), 1.0),
        "accuracy": Figure(bootstrap_ratio(right.mean(0), generator=generator), float(right_before.mean())),
        "accuracy_kept": Figure(bootstrap_ratio(right.mean(0), right_before, generator=generator), 1.0),
    }
    real, fake = in_batches(judge.features)
    centre, scale = real.mean(0), real.std(0).clamp_min(1e-6)
    real, fake = (real - centre) / scale, (fake - centre) / scale
    figures |= compare_distributions(
        real, fake, neighbours=settings.neighbours, generator=generator, groups=data.groups
    )
    figures["feature_diversity"] = compare_spreads(fake, real, labels, generator=generator)
    figures["diversity"] = compare_spreads(moved.flatten(2), images.flatten(1), labels, generator=generator)
    figures["near_copies"] = count_near_copies(images, moved, memory, generator=generator)
    changes = describe_change(sources, moved[0])
    figures["class_share"], p_value = measure_class_share(changes, labels, generator=generator)

    worst, draw = _find_worst(after, labels, right_before.bool(), most=settings.failures)
    member = F.one_hot(labels, data.num_classes).double()
    count = member.sum(0)
    verdict = judge_figures(figures, chance=1 / max(int((count > 0).sum()), 1))
    return Quality(
        figures=figures,
        agreement_by_class=(same.mean(0) @ member / count).cpu(),
        accuracy_by_class=(right.mean(0) @ member / count).cpu(),
        count_by_class=count.long().cpu(),
        class_p_value=p_value,
        worst=worst.cpu(),
        worst_images=moved[draw, worst].cpu(),
        worst_judged=after.argmax(2)[draw, worst].cpu(),
        verdict=refuse_unidentified(verdict, getattr(nuisance, "unidentified", "")),
    )


def _find_worst(log_probabilities: Tensor, labels: Tensor, right_before: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
    """Rows and draws with the largest loss in (S, N, K), the largest first, one draw an image.

    A judge that is wrong about the image itself says nothing about its translations.
    """
    loss = -log_probabilities.gather(2, labels.expand(len(log_probabilities), -1)[..., None])[..., 0]
    largest, draw = torch.where(right_before, loss, -1.0).max(0)
    rows = largest.argsort(descending=True)[:most]
    rows = rows[largest[rows] > 0]
    return rows, draw[rows]


@torch.no_grad()
def translate(nuisance: Nuisance, images: Tensor, *, draws: int, generator: torch.Generator) -> Tensor:
    """`draws` translations of each image, (S, N, C, H, W); raises unless they keep the shape and lie in [0, 1]."""
    rounds = []
    for _ in range(draws):
        draw = nuisance.sample(images.shape, generator=generator)
        parts = []
        for rows in torch.arange(len(images)).split(_BATCH):
            batch = images[send(rows, images.device)]
            parts.append(nuisance.apply(batch, draw_for(nuisance, select_rows(draw, rows), batch)))
        rounds.append(torch.cat(parts))
    moved = torch.stack(rounds)
    if moved.shape[1:] != images.shape:
        raise ShapeError(
            f"the nuisance turns {tuple(images.shape)} into {tuple(moved.shape[1:])}; it must keep the shape"
        )
    if not bool(((moved >= -1e-6) & (moved <= 1 + 1e-6)).all()):  # NaN is neither
        raise RangeError("the nuisance gives pixels that are NaN or outside [0, 1]; fit the translator again")
    return moved


def compare_distributions(
    real: Tensor, fake: Tensor, *, neighbours: int, generator: torch.Generator, groups: Tensor | None = None
) -> dict[str, Figure]:
    """Kernel distance, precision, density, recall and coverage of translations against images they are not made of.

    `real` are features (N, D), `fake` those (S, N, D) of translations of the same images; halves share no group.
    """
    first, second = _halves(len(real), groups, least=2 * neighbours, generator=generator)
    sides, half = ((first, second), (second, first)), len(first)
    everything = torch.cat([real[None], fake])
    scores = [[neighbour_scores(real[b], each[a], neighbours=neighbours) for a, b in sides] for each in everything]
    figures = {}
    for name in ("precision", "density", "recall", "coverage"):
        values = torch.stack([torch.cat([getattr(side, name) for side in sides]) for sides in scores])
        figures[name] = Figure(bootstrap_ratio(values[1:].mean(0), generator=generator), float(values[0].mean()))

    def distance(rows: Tensor) -> Tensor:
        a, b = (send(side[rows], real.device) for side in (first, second))
        both = (unread_kernel_distance(real[b], each[a]) + unread_kernel_distance(real[a], each[b]) for each in fake)
        return torch.stack(list(both)).sum() / len(fake) / 2

    floor = kernel_distance(real[first], real[second])
    figures["kernel_distance"] = Figure(half_sample_interval(distance, half, generator=generator, resamples=40), floor)
    return figures


def _halves(count: int, groups: Tensor | None, *, least: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two random sets of rows below `count`, of one size, that share no row and no group."""
    order = torch.randperm(count, generator=generator)
    if groups is None:
        return order[: count // 2], order[count // 2 : 2 * (count // 2)]
    labels, wanted = torch.zeros(count, dtype=torch.int64), torch.tensor([count // 2])
    first = hold_groups(labels, groups, wanted=wanted, generator=generator)[order]
    half = int(min(first.sum(), (~first).sum()))
    if half < least:
        raise DataError(
            f"quality compares two halves of images that share no group, and the smaller has {half} images of {least} "
            "needed; hold out more groups, or lower head_from"
        )
    return order[first][:half], order[~first][:half]


def compare_spreads(drawn: Tensor, real: Tensor, labels: Tensor, *, generator: torch.Generator) -> Figure:
    """Mean distance of two draws of one image (S, N, D), over that of two real images (N, D) of one class."""
    scale = torch.full((len(real),), spread_within_classes(real, labels))
    return Figure(bootstrap_ratio(spread_of_draws(drawn), scale, generator=generator), 0.0)


def count_near_copies(images: Tensor, moved: Tensor, memory: Memory, *, generator: torch.Generator) -> Figure:
    """Share of translations (S, N, C, H, W) that nearly are another image of `memory`; the floor is that of images."""
    draws, count = moved.shape[:2]
    rows = torch.full((count,), -1) if memory.rows is None else memory.rows
    known = memory.images.flatten(1)
    copied = copy_ratio(moved.flatten(0, 1).flatten(1), known, rows.repeat(draws)) < NEAR_COPY
    untouched = copy_ratio(images.flatten(1), known, rows) < NEAR_COPY
    share = copied.unflatten(0, (draws, count)).double().mean(0)
    return Figure(bootstrap_ratio(share, generator=generator), float(untouched.double().mean()))


def measure_class_share(
    styles: Tensor, labels: Tensor, *, generator: torch.Generator, most: int = 400
) -> tuple[Figure, float]:
    """`between_class_share` of styles (N, D) with its interval, and its p-value under shuffled labels.

    At most `most` rows take part, chosen by `generator`.
    """
    rows = torch.randperm(len(labels), generator=generator)[:most].to(labels.device)
    styles, labels = styles[rows].cpu(), labels[rows].cpu()  # hundreds of small questions: a GPU would be waited for

    def share_of_rows(chosen: Tensor) -> float:
        return between_class_share(styles[chosen], labels[chosen])

    p_value = permutation_p_value(lambda shuffled: between_class_share(styles, shuffled), labels, generator=generator)
    return Figure(half_sample_interval(share_of_rows, len(labels), generator=generator), 0.0), p_value
