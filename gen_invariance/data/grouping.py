"""Groups: images that show the same thing, such as a track, a patient or an object. Numbered, taken in turn, held out.

Two images of one group are no two examples: a few-shot class of five images should show five things where it can, and
a group on both sides of a split makes the held-out figures too good.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

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

    def numbered(keys: Iterable[Hashable]) -> Tensor:
        return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)

    return tuple(None if keys is None else numbered(keys) for keys in parts)


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


def places_among(keys: Tensor, order: Tensor) -> Tensor:
    """The place of each image among those of its key, int64 (N,) from 0, when they are taken in `order`.

    Args:
        keys: int64 (N,), not negative.
        order: int64 (N,), a permutation.

    >>> places_among(torch.tensor([0, 0, 1]), torch.tensor([2, 1, 0])).tolist()
    [1, 0, 0]
    """
    by_key = order[torch.argsort(keys[order], stable=True)]
    counts = torch.bincount(keys)
    starts = counts.cumsum(0) - counts
    places = torch.empty_like(by_key)
    places[by_key] = torch.arange(len(keys)) - starts[keys[by_key]]
    return places


def order_in_turn(labels: Tensor, groups: Tensor, shuffled: Tensor, *, generator: torch.Generator) -> Tensor:
    """A permutation, int64 (N,), that takes the images of each class in turn over its groups.

    First come one image of every group of a class, groups in random order, then a second of those that have one, ...

    Args:
        labels: int64 (N,).
        groups: int64 (N,), from 0 without gaps.
        shuffled: int64 (N,), the order of images within a group.
        generator: CPU generator of the order of the groups, which is another one in each class.
    """
    _, pairs = (labels * (int(groups.max()) + 1 if len(groups) else 1) + groups).unique(return_inverse=True)
    number = int(pairs.max()) + 1 if len(pairs) else 0
    rank = torch.randperm(number, generator=generator)
    return torch.argsort(places_among(pairs, shuffled) * number + rank[pairs])


def hold_groups(
    labels: Tensor, groups: Tensor, *, wanted: Tensor, generator: torch.Generator, most: Tensor | None = None
) -> Tensor:
    """Which images to hold out, bool (N,): whole groups, about wanted[c] images of class c, never all its groups.

    Groups come in random order, and one is held out when that brings the classes it shows nearer to what is wanted,
    so a class whose groups show it alone is off by half its largest group at most. A class of which nothing is held
    out then gives its smallest group, if it has two. Groups of several classes may leave that impossible.

    Args:
        labels: int64 (N,), in [0, K).
        groups: int64 (N,), from 0 without gaps.
        wanted: int64 (K,); 0 asks for nothing of a class.
        generator: CPU generator.
        most: int64 (K,), images that may be held out of each class; None for no bound.
    """
    content = _content(labels, groups)
    held = _HeldGroups(content, wanted.tolist(), None if most is None else most.tolist())
    order = torch.randperm(len(content), generator=generator).tolist()
    for group in order:
        if held.may_take(group) and held.gain(group) > 0:
            held.take(group)
    by_size = sorted(order, key=lambda group: sum(content[group].values()))
    for group in by_size:
        if any(held.lacks(label) for label in content[group]) and held.may_take(group):
            held.take(group)
    chosen = torch.zeros(len(content), dtype=torch.bool)
    chosen[sorted(held.taken)] = True
    return chosen[groups]


def _content(labels: Tensor, groups: Tensor) -> list[dict[int, int]]:
    """For each group, from 0, how many images of which class it holds."""
    pairs, counts = torch.stack([groups, labels]).unique(dim=1, return_counts=True)
    content: list[dict[int, int]] = [{} for _ in range(int(groups.max()) + 1 if len(groups) else 0)]
    for group, label, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
        content[group][label] = count
    return content


class _HeldGroups:
    """The groups held out so far, and what that means for each class."""

    def __init__(self, content: list[dict[int, int]], wanted: list[int], most: list[int] | None) -> None:
        self.content, self.wanted, self.most, self.taken = content, wanted, most, set()
        self.images = [0] * len(wanted)
        self.left = [0] * len(wanted)  # groups of a class that are not held out
        for classes in content:
            for label in classes:
                self.left[label] += 1

    def may_take(self, group: int) -> bool:
        """Whether every class of `group` keeps another group, and stays within its bound."""
        return group not in self.taken and all(
            self.left[label] > 1 and (self.most is None or self.images[label] + count <= self.most[label])
            for label, count in self.content[group].items()
        )

    def gain(self, group: int) -> int:
        """By how many images `group` brings its classes nearer to what is wanted."""
        away = [(self.images[label] - self.wanted[label], count) for label, count in self.content[group].items()]
        return sum(abs(off) - abs(off + count) for off, count in away)

    def lacks(self, label: int) -> bool:
        """Whether something is wanted of a class, and nothing held."""
        return self.wanted[label] > 0 and not self.images[label]

    def take(self, group: int) -> None:
        self.taken.add(group)
        for label, count in self.content[group].items():
            self.images[label] += count
            self.left[label] -= 1
