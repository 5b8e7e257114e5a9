"""Simulated tails: large classes cut down to tail sizes, and what is held back of them to score on.

The tail of a data set has too few images to tell what helps it. Its large classes have enough: half of them are cut
down to sizes of the real tail, training then meets them as it meets the tail, and images that were cut away tell how
well that went. Classes that stay large are scored too, for what helps a cut class may cost them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gen_invariance.data.grouping import hold_groups
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import ranks_in_class
from gen_invariance.errors import DataError
from gen_invariance.referee.settings import RefereeSettings
from gen_invariance.run import named_generator

_LEAST = 8
"""Images of a class that can be cut, or held back from, at least."""
_LEAST_HELD = 10
"""Held-back images of a large class, where a third of it is as many."""


@dataclass(frozen=True)
class SimulatedTail:
    """One split.

    Attributes:
        number: of the split, from 1.
        train_rows: int64, rows of the whole set that are trained on, ascending.
        score_rows: int64, rows that are held back to score on, ascending; disjoint from those, by groups too.
        cut: int64, the classes that were cut, ascending.
        scored: int64, all classes that are scored, ascending; `cut` among them.
    """

    number: int
    train_rows: Tensor
    score_rows: Tensor
    cut: Tensor
    scored: Tensor


def find_large_classes(data: ImageData, settings: RefereeSettings) -> Tensor:
    """The classes that can be cut and scored, int64, largest first.

    Those are the larger half of the classes, if they have `settings.head_from` images, or else, where fewer than two
    do, the larger half of those with 8 or more. A class whose images show one group only cannot be parted.

    Raises:
        DataError: fewer than two classes are large enough.
    """
    counts = data.counts
    divisible = counts if data.groups is None else torch.where(_count_groups(data) > 1, counts, 0)
    order = torch.argsort(divisible, descending=True, stable=True)
    present = int((counts > 0).sum())
    for least in (max(settings.head_from, _LEAST), _LEAST):
        enough = order[divisible[order] >= least]
        # All of two or three classes: one is cut, another one stays.
        half = enough[: max(2, -(-present // 2))]
        if len(half) >= 2:
            return half
    raise DataError(
        f"{data.name}: {len(enough)} class(es) with {_LEAST} images or more that can be parted, simulated tails need "
        "two; too few images to choose an augmentation by"
    )


def _count_groups(data: ImageData) -> Tensor:
    """Groups of each class, int64 (K,)."""
    pairs = torch.stack([data.labels.cpu(), data.groups.cpu()]).unique(dim=1)
    return torch.bincount(pairs[0], minlength=data.num_classes)


def simulate_tail(data: ImageData, settings: RefereeSettings, *, number: int, seed: int = 0) -> SimulatedTail:
    """The split of that `number`, from 1; a function of its arguments.

    Splits come in pairs: what the first of a pair cuts stays whole in the second, and the other way round. Sizes are
    those of the classes that are not large, spread evenly; where all classes are large, those of their smaller half.

    Raises:
        DataError: fewer than two classes are large enough, or nothing can be held back of them.
    """
    large = find_large_classes(data, settings)
    generator = named_generator(seed, "referee", "split", number)
    cut = _choose_cut(large, settings, number=number, seed=seed)
    counts = data.counts
    held_of = _count_held(counts, large, settings)
    sizes = _draw_sizes(counts, large, len(cut), generator=generator)
    keep = counts - held_of
    keep[cut] = keep[cut].minimum(sizes)
    labels = data.labels.cpu()
    if data.groups is None:
        ranks = ranks_in_class(labels, generator=generator)
        train = ranks < keep[labels]
        held = (ranks >= keep[labels]) & (ranks < (keep + settings.score_images)[labels]) & torch.isin(labels, large)
    else:
        train, held = _part_groups(data, large, cut, keep, settings, generator=generator)
    scored = torch.bincount(labels[held], minlength=data.num_classes).nonzero().squeeze(1)
    if len(scored) < 2 or not torch.isin(cut, scored).any():
        raise DataError(_too_few(data, held))
    return SimulatedTail(
        number,
        train.nonzero().squeeze(1),
        held.nonzero().squeeze(1),
        cut[torch.isin(cut, scored)].sort().values,
        scored,
    )


def hold_back(data: ImageData, settings: RefereeSettings, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows that may be trained on, and rows held back from every large class for all splits; int64, ascending.

    Raises:
        DataError: see `simulate_tail`.
    """
    large = find_large_classes(data, settings)
    generator = named_generator(seed, "referee", "held back")
    keep = data.counts - _count_held(data.counts, large, settings)
    labels = data.labels.cpu()
    if data.groups is None:
        rest = ranks_in_class(labels, generator=generator) < keep[labels]
        return rest.nonzero().squeeze(1), (~rest).nonzero().squeeze(1)
    none = torch.zeros(0, dtype=torch.int64)
    rest, held = _part_groups(data, large, none, keep, settings, generator=generator)
    if int((torch.bincount(labels[held], minlength=len(keep)) > 0).sum()) < 2:
        raise DataError(_too_few(data, held))
    return rest.nonzero().squeeze(1), held.nonzero().squeeze(1)


def cut_classes(data: ImageData, settings: RefereeSettings, *, number: int, seed: int = 0) -> Tensor:
    """The rows that the split of that `number` leaves in training where nothing is to be held back, int64, ascending.

    Args:
        data: what may be trained on, see `hold_back`.
        settings: see `RefereeSettings`.
        number: of the split, from 1.
        seed: of the classes that are cut, and of their images.
    """
    large = find_large_classes(data, settings)
    generator = named_generator(seed, "referee", "split", number)
    cut = _choose_cut(large, settings, number=number, seed=seed)
    keep = data.counts.clone()
    keep[cut] = keep[cut].minimum(_draw_sizes(data.counts, large, len(cut), generator=generator))
    labels = data.labels.cpu()
    groups = None if data.groups is None else data.groups.cpu()
    free = torch.ones(len(labels), dtype=torch.bool)
    if groups is not None:
        free = _limit_groups(data, free, cut, keep, generator=generator)
    rows = free.nonzero().squeeze(1)
    ranks = ranks_in_class(labels[rows], generator=generator, groups=None if groups is None else groups[rows])
    return rows[ranks < keep[labels[rows]]]


def _too_few(data: ImageData, held: Tensor) -> str:
    classes = len(data.labels.cpu()[held].unique())
    return (
        f"{data.name}: images of {classes} class(es) can be held back without parting a group, simulated tails need "
        "two; too few groups to choose an augmentation by"
    )


def _choose_cut(large: Tensor, settings: RefereeSettings, *, number: int, seed: int) -> Tensor:
    """Which of the `large` classes are cut: a random share, and in every second split as many of the others.

    Neighbours in size are parted, so that both halves of a pair hold classes of all sizes.
    """
    wanted = min(max(1, round(settings.cut_share * len(large))), len(large) - 1)
    generator = named_generator(seed, "referee", "cut", (number - 1) // 2)
    share = torch.rand(len(large), generator=generator)
    # Ranks in pairs: the first of each pair in one half, the second in the other, by a coin.
    coins = torch.rand(-(-len(large) // 2), generator=generator) < 0.5
    is_first = torch.arange(len(large)) % 2 == 0
    side = is_first == coins.repeat_interleave(2)[: len(large)]
    if number % 2 == 0:
        side = ~side
    priority = torch.where(side, 0.0, 2.0) + share
    return large[priority.argsort()[:wanted]]


def _count_held(counts: Tensor, large: Tensor, settings: RefereeSettings) -> Tensor:
    """Images to hold back of each class if it is not cut, int64 (K,)."""
    share = (counts * settings.held_back).ceil().long()
    held = share.maximum((counts // 3).clamp(max=_LEAST_HELD)).clamp(max=settings.score_images)
    chosen = torch.zeros_like(counts)
    chosen[large] = held[large]
    return chosen


def _draw_sizes(counts: Tensor, large: Tensor, number: int, *, generator: torch.Generator) -> Tensor:
    """Sizes for `number` classes, int64: quantiles of the sizes of the tail, in random order."""
    is_tail = counts > 0
    is_tail[large] = False
    sizes = counts[is_tail].sort().values
    if not len(sizes):
        sizes = counts[large].sort().values[: max(1, len(large) // 2)]
    at = (torch.arange(number) + torch.rand(number, generator=generator)) / number * len(sizes)
    return sizes[at.long().clamp(max=len(sizes) - 1)][torch.randperm(number, generator=generator)]


def _part_groups(
    data: ImageData,
    large: Tensor,
    cut: Tensor,
    keep: Tensor,
    settings: RefereeSettings,
    *,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Which images are trained on, and which are held back, bool (N,) each; no group is on both sides.

    A cut class shows as many groups as a tail class of its size does: about as many images of each.
    """
    labels, groups, counts = data.labels.cpu(), data.groups.cpu(), data.counts
    wanted = (counts - keep).clamp(min=0)
    wanted[cut] = (counts[cut] // 2).minimum(wanted[cut])
    most = torch.where(torch.isin(torch.arange(len(counts)), large), counts, 0)
    held = hold_groups(labels, groups, wanted=wanted, most=most, generator=generator)
    if not held.any():  # every group shows a small class as well
        held = hold_groups(labels, groups, wanted=wanted, most=counts // 2, generator=generator)
    # In turn over groups, as a cut by groups does, but over no more of them than a tail class has.
    allowed = _limit_groups(data, ~held, cut, keep, generator=generator)
    train = torch.zeros(len(labels), dtype=torch.bool)
    rows = allowed.nonzero().squeeze(1)
    ranks = ranks_in_class(labels[rows], generator=generator, groups=groups[rows])
    is_cut = torch.isin(labels[rows], cut)
    train[rows[~is_cut | (ranks < keep[labels[rows]])]] = True
    scored = held & torch.isin(labels, large)
    rows = scored.nonzero().squeeze(1)
    ranks = ranks_in_class(labels[rows], generator=generator, groups=groups[rows])
    score = torch.zeros_like(scored)
    score[rows[ranks < settings.score_images]] = True
    return train, score


def _limit_groups(data: ImageData, free: Tensor, cut: Tensor, keep: Tensor, *, generator: torch.Generator) -> Tensor:
    """`free` rows, bool (N,), less those of cut classes that lie in more groups than a class of that size shows."""
    if not len(cut):
        return free
    counts, number = data.counts, _count_groups(data)
    is_small = (counts > 0) & (counts <= int(keep[cut].max()))
    each = counts[is_small].double() / number[is_small].clamp(min=1) if is_small.any() else torch.ones(1).double()
    images_a_group = float(each.mean())
    labels, groups = data.labels.cpu(), data.groups.cpu()
    free = free.clone()
    for label in cut.tolist():
        mine = (labels == label) & free
        shown = groups[mine].unique()
        shown = shown[torch.randperm(len(shown), generator=generator)]
        need = max(1, round(int(keep[label]) / images_a_group))
        # Enough groups for the size, whatever the tail says.
        sizes = torch.tensor([int((groups[mine] == group).sum()) for group in shown.tolist()]).cumsum(0)
        need = max(need, int((sizes < int(keep[label])).sum()) + 1)
        free &= ~((labels == label) & torch.isin(groups, shown[need:]))
    return free
