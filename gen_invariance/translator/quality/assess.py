"""How good is a translator, without labels for the nuisance: figures with intervals, and a plain verdict.

Works for any nuisance. What is asked: does a translated image keep its class (a judge that saw neither the image nor
the translator)? Does it look like another real image? Do draws differ? Are they copies of training images? Does the
nuisance act alike on all classes? Each figure stands beside what untouched images get, which is also what a nuisance
that does nothing gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.data.grouping import check_groups, hold_groups
from gen_invariance.errors import DataError, RangeError, SettingsError, ShapeError
from gen_invariance.nuisance.protocol import Nuisance, draw_to, select_rows
from gen_invariance.stats import bootstrap_ratio, half_sample_interval, permutation_p_value
from gen_invariance.translator.quality.measures import (
    between_class_share,
    copy_ratio,
    describe_change,
    kernel_distance,
    neighbour_scores,
    spread_of_draws,
    spread_within_classes,
)
from gen_invariance.translator.quality.verdict import Figure, Verdict, judge_figures

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
        figures = {
            name: {
                "value": _plain(figure.estimate.value),
                "low": _plain(figure.estimate.low),
                "high": _plain(figure.estimate.high),
                "untouched": _plain(figure.floor),
            }
            for name, figure in self.figures.items()
        }
        return {
            "verdict": self.verdict.word,
            "strength": self.verdict.strength,
            "reasons": list(self.verdict.reasons),
            "figures": figures,
            "class_p_value": _plain(self.class_p_value),
            "agreement_by_class": [_plain(value) for value in self.agreement_by_class.tolist()],
            "accuracy_by_class": [_plain(value) for value in self.accuracy_by_class.tolist()],
            "count_by_class": self.count_by_class.tolist(),
        }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.no_grad()
def assess(
    nuisance: Nuisance,
    images: Tensor,
    labels: Tensor,
    *,
    judge: Callable[[Tensor], Tensor],
    features: Callable[[Tensor], Tensor],
    bank: Tensor,
    bank_rows: Tensor,
    num_classes: int,
    generator: torch.Generator,
    sources: Tensor | None = None,
    draws: int = 4,
    neighbours: int = 5,
    failures: int = 8,
    batch_size: int = 256,
    groups: Tensor | None = None,
) -> Quality:
    """Look at `draws` translations of each image.

    Figures: `agreement` (judged class stays), `accuracy` (judged class is the true one), `accuracy_kept` (that over
    the accuracy on the images as they are), `kernel_distance`, `precision`, `density`, `recall`, `coverage` (one half
    of the images, translated, against the other half, both ways), `feature_diversity` and `diversity` (mean distance
    of two draws of one image, in features and in pixels, over that of two real images of one class), `near_copies`
    (share), `class_share` (how much of the variety of what translations change lies between classes).

    Args:
        nuisance: learned or hand-written.
        images: float (N, C, H, W) in [0, 1]; the judge must not have been trained on them.
        labels: int64 (N,).
        judge: images to logits (B, K).
        features: images to features (B, D), on any scale; standardised over `images`.
        bank: float (M, C, H, W), what the translator may have memorised.
        bank_rows: int64 (N,), row of `bank` that each image is, -1 for none.
        num_classes: K.
        generator: CPU generator of draws, halves and intervals.
        sources: float (N, C, H, W), what is translated in place of `images`: the same images before the nuisance in
            the data acted on them, when that nuisance is looked at. The rest still compares with `images`.
        draws: translations of each image, 2 or more.
        neighbours: k of precision, recall, density and coverage.
        failures: worst rows to name.
        batch_size: images at a time.
        groups: int64 (N,), images of one number show the same thing; the halves then share no group.

    Raises:
        DataError: fewer than 4 * neighbours images, or groups that leave a half with fewer than 2 * neighbours.
        RangeError: the nuisance gives NaN or leaves [0, 1].
        ShapeError: it changes the shape.
        SettingsError: fewer than two draws.
    """
    if draws < 2:
        raise SettingsError(f"quality needs at least 2 draws of each image, got {draws}")
    if len(images) < 4 * neighbours:
        raise DataError(
            f"quality needs at least {4 * neighbours} images that the judge has not seen, got {len(images)}; "
            "hold out more, or lower head_from"
        )

    def in_batches(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        return torch.cat([function(part) for part in rows.split(batch_size)]).double()

    sources = images if sources is None else sources
    moved = translations(nuisance, sources, draws=draws, generator=generator, batch_size=batch_size)
    before = F.log_softmax(in_batches(judge, images), 1)
    after = F.log_softmax(in_batches(judge, moved.flatten(0, 1)), 1).unflatten(0, (draws, len(images)))
    right_before, right = (before.argmax(1) == labels).double(), (after.argmax(2) == labels).double()
    same = (after.argmax(2) == before.argmax(1)).double()

    real = in_batches(features, images)
    centre, scale = real.mean(0), real.std(0).clamp_min(1e-6)
    real = (real - centre) / scale
    fake = (in_batches(features, moved.flatten(0, 1)).unflatten(0, (draws, len(images))) - centre) / scale

    figures = {
        "agreement": Figure(bootstrap_ratio(same.mean(0), generator=generator), 1.0),
        "accuracy": Figure(bootstrap_ratio(right.mean(0), generator=generator), float(right_before.mean())),
        "accuracy_kept": Figure(bootstrap_ratio(right.mean(0), right_before, generator=generator), 1.0),
        **match_of(real, fake, neighbours=neighbours, generator=generator, groups=groups),
    }
    pixels = moved.flatten(2)
    for name, drawn, rows in (("feature_diversity", fake, real), ("diversity", pixels, images.flatten(1))):
        scale = torch.full((len(images),), spread_within_classes(rows, labels))
        figures[name] = Figure(bootstrap_ratio(spread_of_draws(drawn), scale, generator=generator), 0.0)
    copied = copy_ratio(pixels.flatten(0, 1), bank.flatten(1), bank_rows.repeat(draws)) < NEAR_COPY
    plain = copy_ratio(images.flatten(1), bank.flatten(1), bank_rows) < NEAR_COPY
    copied = copied.unflatten(0, (draws, len(images))).double().mean(0)
    figures["near_copies"] = Figure(bootstrap_ratio(copied, generator=generator), float(plain.double().mean()))
    figures["class_share"], p_value = class_share(describe_change(sources, moved[0]), labels, generator=generator)

    # A judge that is wrong about the image itself says nothing about its translations.
    loss = -after.gather(2, labels.expand(draws, -1)[..., None])[..., 0]
    loss = torch.where(right_before.bool(), loss, -1.0)
    worst, draw = loss.max(0)
    order = worst.argsort(descending=True)[:failures]
    order = order[worst[order] > 0]
    member = F.one_hot(labels, num_classes).double()
    count = member.sum(0)
    return Quality(
        figures=figures,
        agreement_by_class=(same.mean(0) @ member / count).cpu(),
        accuracy_by_class=(right.mean(0) @ member / count).cpu(),
        count_by_class=count.long().cpu(),
        class_p_value=p_value,
        worst=order.cpu(),
        worst_images=moved[draw[order], order].cpu(),
        worst_judged=after.argmax(2)[draw[order], order].cpu(),
        verdict=judge_figures(figures, chance=1 / max(int((count > 0).sum()), 1)),
    )


@torch.no_grad()
def translations(
    nuisance: Nuisance, images: Tensor, *, draws: int, generator: torch.Generator, batch_size: int = 256
) -> Tensor:
    """`draws` translations of each image, (S, N, C, H, W), checked.

    Raises:
        RangeError: NaN, infinite, or outside [0, 1].
        ShapeError: another shape than the images.
    """
    rounds = []
    for _ in range(draws):
        draw = nuisance.sample(images.shape, generator=generator)
        parts = []
        for rows in torch.arange(len(images)).split(batch_size):
            own = images[rows.to(images.device)]
            parts.append(nuisance.apply(own, draw_to(select_rows(draw, rows), own)))
        rounds.append(torch.cat(parts))
    moved = torch.stack(rounds)
    if moved.shape[1:] != images.shape:
        raise ShapeError(
            f"the nuisance turns {tuple(images.shape)} into {tuple(moved.shape[1:])}; it must keep the shape"
        )
    if not moved.isfinite().all() or moved.amin() < -1e-6 or moved.amax() > 1 + 1e-6:
        raise RangeError("the nuisance gives pixels that are NaN or outside [0, 1]; fit the translator again")
    return moved


def match_of(
    real: Tensor, fake: Tensor, *, neighbours: int, generator: torch.Generator, groups: Tensor | None = None
) -> dict[str, Figure]:
    """Kernel distance, precision, density, recall and coverage of translations against images they are not made of.

    Args:
        real: features (N, D).
        fake: features (S, N, D) of translations of the same images.
        neighbours: k.
        generator: of the halves and the intervals.
        groups: int64 (N,), which the halves must not share; None for none.

    Raises:
        DataError: groups that leave a half with fewer than 2 * neighbours images.
    """
    first, second = _halves(len(real), groups, least=2 * neighbours, generator=generator)
    sides, half = ((first, second), (second, first)), len(first)
    everything = torch.cat([real[None], fake])
    scores = [[neighbour_scores(real[b], each[a], neighbours=neighbours) for a, b in sides] for each in everything]
    figures = {}
    for name in ("precision", "density", "recall", "coverage"):
        values = torch.stack([torch.cat([getattr(side, name) for side in sides]) for sides in scores])
        figures[name] = Figure(bootstrap_ratio(values[1:].mean(0), generator=generator), float(values[0].mean()))

    def distance(rows: Tensor) -> float:
        a, b = first[rows], second[rows]
        return (
            sum(kernel_distance(real[b], each[a]) + kernel_distance(real[a], each[b]) for each in fake) / len(fake) / 2
        )

    floor = kernel_distance(real[first], real[second])
    figures["kernel_distance"] = Figure(half_sample_interval(distance, half, generator=generator, resamples=40), floor)
    return figures


def _halves(count: int, groups: Tensor | None, *, least: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two random sets of rows below `count`, of one size, that share no row and no group."""
    order = torch.randperm(count, generator=generator)
    if groups is None:
        return order[: count // 2], order[count // 2 : 2 * (count // 2)]
    labels, wanted = torch.zeros(count, dtype=torch.int64), torch.tensor([count // 2])
    held = hold_groups(labels, check_groups(groups, labels), wanted=wanted, generator=generator)[order]
    half = int(min(held.sum(), (~held).sum()))
    if half < least:
        raise DataError(
            f"quality compares two halves of images that share no group, and the smaller has {half} images of {least} "
            "needed; hold out more groups, or lower head_from"
        )
    return order[held][:half], order[~held][:half]


def class_share(styles: Tensor, labels: Tensor, *, generator: torch.Generator, most: int = 400) -> tuple[Figure, float]:
    """`between_class_share` of styles (N, D) with its interval, and its p-value under shuffled labels.

    At most `most` rows take part, chosen by `generator`.
    """
    rows = torch.randperm(len(labels), generator=generator)[:most].to(labels.device)
    styles, labels = styles[rows], labels[rows]

    def of_rows(chosen: Tensor) -> float:
        chosen = chosen.to(labels.device)
        return between_class_share(styles[chosen], labels[chosen])

    p_value = permutation_p_value(lambda shuffled: between_class_share(styles, shuffled), labels, generator=generator)
    return Figure(half_sample_interval(of_rows, len(labels), generator=generator), 0.0), p_value
