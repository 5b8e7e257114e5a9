"""Class subsets and class pairs: how sources are written, chosen and checked.

A subset is a sorted tuple of class indices. The empty tuple, `START`, stands for the backbone before any training
on a source; it is measured beside the sources, so the order does not credit training with what the start can do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from gen_invariance.errors import SettingsError

Subset = tuple[int, ...]
START: Subset = ()
"""The untouched start (random or pretrained backbone)."""

_LATTICE_CLASSES = 12
_ENUMERATED = 20_000


def class_pairs(num_classes: int) -> np.ndarray:
    """All unordered pairs i < j of `num_classes` classes, int64 (P, 2), in lexicographic order.

    >>> class_pairs(3).tolist()
    [[0, 1], [0, 2], [1, 2]]
    """
    return np.stack(np.triu_indices(num_classes, 1), axis=1).astype(np.int64)


def pair_columns(pairs: np.ndarray, num_classes: int) -> np.ndarray:
    """Where `pairs`, (Q, 2) with i < j, stand among `class_pairs(num_classes)`, int64 (Q,)."""
    number = np.zeros((num_classes, num_classes), dtype=np.int64)
    first, second = class_pairs(num_classes).T
    number[first, second] = np.arange(len(first))
    return number[pairs[:, 0], pairs[:, 1]]


def pair_mask(subset: Iterable[int], pairs: np.ndarray) -> np.ndarray:
    """Which of `pairs` (P, 2) have both classes in `subset`, bool (P,)."""
    return np.isin(pairs, list(subset)).all(axis=1)


def canonical_subsets(
    subsets: Iterable[Sequence[int | str]],
    *,
    class_names: Sequence[str],
    smallest: int = 2,
) -> tuple[Subset, ...]:
    """`subsets`, given by class index or name, as sorted tuples of indices, in the given order.

    Args:
        subsets: each a sequence of class indices or class names.
        class_names: K names, in label order.
        smallest: 2 for sources; 1 where one-class sources were asked for, or for targets.

    Raises:
        SettingsError: no subset, an unknown class, a class twice in one subset, fewer than `smallest` classes,
            or the same subset twice.
    """
    names = {str(name): index for index, name in enumerate(class_names)}
    canonical: list[Subset] = []
    for given in subsets:
        subset = tuple(sorted(_class_index(entry, names) for entry in given))
        if len(set(subset)) < len(subset):
            raise SettingsError(f"subset {list(given)} names a class twice; name each class once")
        if len(subset) < smallest:
            raise SettingsError(
                f"subset {list(given)} has {len(subset)} class(es), expected at least {smallest}: a single class "
                "has nothing to be told from; add a class or ask for one-vs-rest sources (single='one_vs_rest')"
            )
        if subset in canonical:
            raise SettingsError(f"subset {list(given)} is given twice; remove one")
        canonical.append(subset)
    if not canonical:
        raise SettingsError("no class subset was given; give at least one with two classes")
    return tuple(canonical)


def _class_index(entry: int | str, names: dict[str, int]) -> int:
    if isinstance(entry, str) and entry in names:
        return names[entry]
    if isinstance(entry, int | np.integer) and 0 <= entry < len(names):
        return int(entry)
    shown = ", ".join(itertools.islice(names, 8)) + (", ..." if len(names) > 8 else "")
    raise SettingsError(f"unknown class {entry!r}; use an index below {len(names)} or one of: {shown}")


def subsets_of_size(num_classes: int, size: int) -> tuple[Subset, ...]:
    """All subsets of `size` classes, lexicographic.

    Raises:
        SettingsError: the size does not fit, or there are too many to train one backbone each.
    """
    if not 2 <= size <= num_classes:
        raise SettingsError(f"subset size is {size}, expected 2 to {num_classes}")
    count = math.comb(num_classes, size)
    if count > _ENUMERATED:
        raise SettingsError(f"{count} subsets of size {size} are too many to measure; draw some with choose=random")
    return tuple(itertools.combinations(range(num_classes), size))


def all_subsets(num_classes: int) -> tuple[Subset, ...]:
    """Every subset with at least two classes, by size; only up to 12 classes."""
    if num_classes > _LATTICE_CLASSES:
        raise SettingsError(
            f"the full lattice of {num_classes} classes has 2^{num_classes} subsets; use at most "
            f"{_LATTICE_CLASSES} classes, or draw subsets with choose=random"
        )
    sizes = range(2, num_classes + 1)
    return tuple(itertools.chain.from_iterable(subsets_of_size(num_classes, size) for size in sizes))


def random_subsets(
    num_classes: int,
    count: int,
    *,
    sizes: tuple[int, int],
    generator: torch.Generator,
) -> tuple[Subset, ...]:
    """`count` different subsets: a size uniform in `sizes` (inclusive), then classes uniform; sorted by (size, id).

    Raises:
        SettingsError: sizes out of range, or fewer such subsets exist than asked for.
    """
    low, high = sizes
    if not 2 <= low <= high <= num_classes:
        raise SettingsError(f"sizes are {low} to {high}, expected 2 <= low <= high <= {num_classes}")
    left = {size: math.comb(num_classes, size) for size in range(low, high + 1)}
    if not 1 <= count <= sum(left.values()):
        raise SettingsError(f"asked for {count} subsets of {low} to {high} classes, there are {sum(left.values())}")
    subsets: set[Subset] = set()
    while len(subsets) < count:
        # Sizes that are used up are left out, so the loop ends even when every subset is asked for.
        open_sizes = [size for size, number in left.items() if number > 0]
        size = open_sizes[int(torch.randint(len(open_sizes), (1,), generator=generator))]
        subset = tuple(sorted(torch.randperm(num_classes, generator=generator)[:size].tolist()))
        left[size] -= subset not in subsets
        subsets.add(subset)
    return tuple(sorted(subsets, key=lambda subset: (len(subset), subset)))


def prefix_subsets(counts: Sequence[int], *, end: str, sizes: Sequence[int]) -> tuple[Subset, ...]:
    """The `k` largest (`end="head"`) or smallest (`end="tail"`) classes by training count, for each k of `sizes`.

    Equal counts are ordered by class index, so the same counts always give the same prefixes.

    >>> prefix_subsets([50, 9, 20], end="tail", sizes=[2, 3])
    ((1, 2), (0, 1, 2))
    """
    if end not in ("head", "tail"):
        raise SettingsError(f"prefix end is {end!r}, expected 'head' or 'tail'")
    if not sizes or not all(2 <= size <= len(counts) for size in sizes):
        raise SettingsError(f"prefix sizes are {list(sizes)}, expected sizes from 2 to {len(counts)}")
    ranked = np.argsort(counts if end == "tail" else -np.asarray(counts), kind="stable").tolist()
    return tuple(tuple(sorted(ranked[:size])) for size in sizes)


def subset_name(subset: Subset, class_names: Sequence[str] | None = None) -> str:
    """How a subset is written in figures and tables, for example "{cat, dog}"; the start is "start".

    >>> subset_name((0, 2), ("cat", "cow", "dog"))
    '{cat, dog}'
    """
    if not subset:
        return "start"
    return "{" + ", ".join(str(c) if class_names is None else class_names[c] for c in subset) + "}"
