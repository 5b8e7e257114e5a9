"""Groups: images that show the same thing, such as a track, a patient or an object. Numbered, taken in turn, held out.

Two images of one group are no two examples: a few-shot class of five images should show five things where it can, and
a group on both sides of a split makes the held-out figures too good.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
import torch
from torch import Tensor

from gen_invariance.errors import ShapeError


def number_groups(*parts: Iterable[Hashable] | None) -> tuple[Tensor | None, ...]:
    """The keys of each part as numbers, int64 (N,), by first appearance; a key has one number in all parts.

    None stays None: a part of which the groups are not known.

    >>> number_groups(["b", "a", "b"], None, ["a", "c"])
    (tensor([0, 1, 0]), None, tensor([1, 2]))
    """
    numbers: dict[Hashable, int] = {}

    def number(keys: Iterable[Hashable]) -> Tensor:
        return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)

    return tuple(None if keys is None else number(keys) for keys in parts)


def check_groups(groups: Tensor, labels: Tensor) -> Tensor:
    """`groups` on the CPU, renumbered from 0 without gaps.

    Raises:
        ShapeError: not int64 (N,) for N labels.
    """
    if groups.dtype != torch.int64 or groups.shape != labels.shape:
        raise ShapeError(
            f"groups must be int64 ({len(labels)},), got {groups.dtype} {tuple(groups.shape)}; "
            "give one group number for each image"
        )
    return groups.cpu().unique(return_inverse=True)[1]


def ranks_by_key(keys: Tensor, order: Tensor) -> Tensor:
    """The rank of each image among those of its key, int64 (N,) from 0, when they are taken in `order`.

    Args:
        keys: int64 (N,), not negative.
        order: int64 (N,), a permutation.

    >>> ranks_by_key(torch.tensor([0, 0, 1]), torch.tensor([2, 1, 0])).tolist()
    [1, 0, 0]
    """
    by_key = order[torch.argsort(keys[order], stable=True)]
    counts = torch.bincount(keys)
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(by_key)
    ranks[by_key] = torch.arange(len(keys)) - starts[keys[by_key]]
    return ranks


def order_in_turn(labels: Tensor, groups: Tensor, shuffled: Tensor, *, generator: torch.Generator) -> Tensor:
    """A permutation, int64 (N,), that takes the images of each class in turn over its groups.

    First come one image of every group of a class, groups in random order, then a second of those that have one, ...

    Args:
        labels: int64 (N,).
        groups: int64 (N,).
        shuffled: int64 (N,), the order of images within a group.
        generator: CPU generator of the order of the groups, which is another one in each class.
    """
    if not len(labels):
        return shuffled
    groups = check_groups(groups, labels)
    _, pairs = (labels * (int(groups.max()) + 1) + groups).unique(return_inverse=True)
    number = int(pairs.max()) + 1
    rank = torch.randperm(number, generator=generator)
    return torch.argsort(ranks_by_key(pairs, shuffled) * number + rank[pairs])


def hold_groups(
    labels: Tensor, groups: Tensor, *, wanted: Tensor, generator: torch.Generator, most: Tensor | None = None
) -> Tensor:
    """Which images to hold out, bool (N,): whole groups, about wanted[c] images of class c, never all its groups.

    Groups come in random order, and one is held out when that brings the classes it shows nearer to what is wanted,
    so a class whose groups show it alone is off by half its largest group at most. A class of which nothing is held
    out then gives its smallest group, if it has two. Groups of several classes may leave that impossible.

    Args:
        labels: int64 (N,), in [0, K), on the CPU.
        groups: int64 (N,).
        wanted: int64 (K,); 0 asks for nothing of a class.
        generator: CPU generator.
        most: int64 (K,), images that may be held out of each class; None for no bound.
    """
    groups = check_groups(groups, labels)
    if not len(labels):
        return torch.zeros(0, dtype=torch.bool)
    pairs, numbers = torch.stack([groups, labels]).unique(dim=1, return_counts=True)
    ends = torch.bincount(pairs[0]).cumsum(0).tolist()
    classes = np.split(pairs[1].numpy(), ends[:-1])  # the classes that each group shows
    counts = np.split(numbers.numpy(), ends[:-1])  # and how many images of each
    asked, limit = wanted.numpy(), np.full(len(wanted), len(labels)) if most is None else most.numpy()
    images = np.zeros(len(asked), np.int64)  # held out of each class so far
    left = np.bincount(pairs[1].numpy(), minlength=len(asked))  # groups of a class that are not held out
    held = torch.zeros(len(ends), dtype=torch.bool)

    def can_hold(group: int) -> bool:
        within = images[classes[group]] + counts[group] <= limit[classes[group]]
        return not held[group] and bool((left[classes[group]] > 1).all() and within.all())

    def hold(group: int) -> None:
        held[group] = True
        images[classes[group]] += counts[group]
        left[classes[group]] -= 1

    order = torch.randperm(len(ends), generator=generator).tolist()
    for group in order:
        off = images[classes[group]] - asked[classes[group]]
        gain = np.abs(off) - np.abs(off + counts[group])
        if gain.sum() > 0 and can_hold(group):
            hold(group)
    for group in sorted(order, key=lambda group: counts[group].sum()):
        lacking = (asked[classes[group]] > 0) & (images[classes[group]] == 0)
        if lacking.any() and can_hold(group):
            hold(group)
    return held[groups]
