"""`make_long_tailed`: training, validation and test images of a long-tailed benchmark that share no image.

Where the source knows its groups (`ImageData.groups`), the parts cut out of it share no group either.

A split is a function of the source and the seed. Its indices can be saved beside the results, so that a figure can
be traced to the very images it was measured on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from gen_invariance.data.cuts import cut_indices
from gen_invariance.data.grouping import check_groups, hold_groups
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import (
    class_order,
    counts_by_class,
    exponential_counts,
    split_indices,
    step_counts,
    zipf_counts,
)
from gen_invariance.data.readers.arrays import load_arrays
from gen_invariance.errors import DataError, SettingsError, printable
from gen_invariance.files import atomic_write
from gen_invariance.run import named_generator

if TYPE_CHECKING:
    from gen_invariance.data.readers.base import Source

Profile = Literal["exponential", "step", "zipf", "none"]
PROFILES: tuple[str, ...] = ("exponential", "step", "zipf", "none")
_INDEX_KEYS = ("train_indices", "validation_indices", "test_indices", "counts", "order")


@dataclass(frozen=True)
class LongTailSplit:
    """Disjoint training, validation and test images of one long-tailed data set.

    Attributes:
        train: the long-tailed training images.
        validation: held-out images; empty when no fraction was asked for.
        test: the source's own test images, or what was left of its training images.
        train_indices: int64, rows of the source's training images.
        validation_indices: int64, rows of the source's training images.
        test_indices: int64, rows of the source's training images; None when the source's own test part is used.
        counts: int64 (K,), training images of each class.
        order: int64 (K,), order[rank] is the class with the rank-th largest count.
    """

    train: ImageData
    validation: ImageData
    test: ImageData
    train_indices: Tensor
    validation_indices: Tensor
    test_indices: Tensor | None
    counts: Tensor
    order: Tensor


def make_long_tailed(
    source: Source | tuple[ImageData, ImageData | None],
    *,
    profile: Profile = "exponential",
    largest: int | None = None,
    imbalance: float = 100.0,
    power: float = 2.0,
    smallest: int = 1,
    validation_fraction: float = 0.0,
    rest_is_test: bool = False,
    shuffle_order: bool = True,
    cut: str = "own",
    fill_tail: bool = False,
    seed: int = 0,
) -> LongTailSplit:
    """A long-tailed training set cut out of `source`, with validation and test images that share none of it.

    Validation images are held out first, stratified, so they follow the source's class sizes; the long tail is
    then cut out of the rest (the way K49-LT was made).

    A source with groups is cut by them: whole groups are held out, images of a class are taken in turn over its
    groups, and with `rest_is_test` about half of each class's images, in whole groups, stay out of the training images
    (fewer where `largest` needs them). Then every group without a training image is tested on, and images that were
    not chosen out of a group that was are not used.

    Args:
        source: a `Source`, or a pair of training images and test images (or None).
        profile: "exponential", "step", "zipf", or "none" (class sizes stay, capped by `largest`).
        largest: images of the largest class; None takes the most that fits. With `rest_is_test`, None leaves
            half of each class (rounded down) for the test set.
        imbalance: largest / smallest class, of "exponential" and "step".
        power: exponent of "zipf".
        smallest: least class size of "zipf".
        validation_fraction: share of the source's training images to hold out, in [0, 1).
        rest_is_test: training images that were not chosen become the test set.
        shuffle_order: draw which class is how large; otherwise class 0 is the largest.
        cut: rule by which images are chosen, see `cuts.cut_indices`.
        fill_tail: cut, then fill every class up to the size of the largest, or as far as its images go. The images of
            the cut are among those of the filled set.
        seed: root of the order, the held-out images and the chosen images.

    Raises:
        SettingsError: a setting out of its range, or one that does not fit another.
        DataError: too few images, no test part, or one with other classes.
    """
    if profile not in PROFILES:
        raise SettingsError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}")
    if largest is not None and largest < 1:
        raise SettingsError(f"largest must be at least 1, got {largest}; leave it out for the most that fits")
    train, test = source if isinstance(source, tuple) else (source.train, source.test)
    train.require_every_class()
    labels, groups = train.labels.cpu(), None if train.groups is None else train.groups.cpu()

    generator = named_generator(seed, "longtail", "validation")
    kept, held_out = split_indices(labels, fraction=validation_fraction, generator=generator, groups=groups)
    shape = _Shape(profile, train.num_classes, imbalance, power, smallest)
    if rest_is_test and groups is not None:
        needed = _needed(shape, largest, shuffle_order, seed)
        kept = _without_test_groups(labels, groups, kept, needed=needed, seed=seed)
    available = torch.bincount(labels[kept], minlength=train.num_classes)
    halved = rest_is_test and largest is None and groups is None
    room = available - available // 2 if halved else available

    order = _choose_order(room, profile=profile, shuffle=shuffle_order, seed=seed)
    counts = _choose_counts(shape, room, order, largest)
    _check_enough(train, available, counts)
    if fill_tail:
        counts = available.clamp(max=int(counts.max()))
    of_kept = None if groups is None else groups[kept]
    chosen = kept[cut_indices(labels[kept], counts, cut=cut, seed=seed, groups=of_kept)]

    rest = _untouched(len(labels), torch.cat([chosen, held_out]), groups) if rest_is_test else None
    return LongTailSplit(
        train=train.subset(chosen),
        validation=train.subset(held_out),
        test=_own_test(train, test) if rest is None else _rest_as_test(train, rest),
        train_indices=chosen,
        validation_indices=held_out,
        test_indices=rest,
        counts=counts,
        order=order,
    )


@dataclass(frozen=True)
class _Shape:
    """A profile with everything but the size of its largest class."""

    profile: str
    num_classes: int
    imbalance: float
    power: float
    smallest: int

    def counts(self, largest: int) -> Tensor:
        if self.profile == "exponential":
            return exponential_counts(self.num_classes, largest=largest, imbalance=self.imbalance)
        if self.profile == "step":
            return step_counts(self.num_classes, largest=largest, imbalance=self.imbalance)
        return zipf_counts(self.num_classes, largest=largest, power=self.power, smallest=self.smallest)


def _choose_order(room: Tensor, *, profile: str, shuffle: bool, seed: int) -> Tensor:
    if profile == "none":
        return torch.argsort(room, descending=True, stable=True)
    if shuffle:
        return class_order(len(room), generator=named_generator(seed, "longtail", "order"))
    return torch.arange(len(room))


def _choose_counts(shape: _Shape, room: Tensor, order: Tensor, largest: int | None) -> Tensor:
    """Counts by class, int64 (K,); the largest that fits `room` when no size is given."""
    if shape.profile == "none":
        return room if largest is None else room.clamp(max=largest)
    if largest is None:
        largest = _largest_that(lambda size: bool((counts_by_class(shape.counts(size), order) <= room).all()), room)
    return counts_by_class(shape.counts(largest), order)


def _needed(shape: _Shape, largest: int | None, shuffle: bool, seed: int) -> Tensor:
    """Training images that the settings ask for of each class, int64 (K,); 0 where they take what there is."""
    none = torch.zeros(shape.num_classes, dtype=torch.int64)
    if largest is None or shape.profile == "none":
        return none
    order = _choose_order(none, profile=shape.profile, shuffle=shuffle, seed=seed)
    return counts_by_class(shape.counts(largest), order)


def _without_test_groups(labels: Tensor, groups: Tensor, kept: Tensor, *, needed: Tensor, seed: int) -> Tensor:
    """`kept` less about half of each class's images, in whole groups, that are left for the test set."""
    available = torch.bincount(labels[kept], minlength=len(needed))
    reserved = hold_groups(
        labels[kept],
        check_groups(groups[kept], kept),
        wanted=available // 2,
        most=(available - needed).clamp(min=0),
        generator=named_generator(seed, "longtail", "test groups"),
    )
    return kept[~reserved]


def _untouched(number: int, used: Tensor, groups: Tensor | None) -> Tensor:
    """Rows of `number` images that are not `used`, and share no group with those that are; int64, ascending."""
    free = torch.ones(number, dtype=torch.bool)
    free[used] = False
    if groups is not None:
        free &= ~torch.isin(groups, groups[used])
    return free.nonzero().flatten()


def _largest_that(fits: Callable[[int], bool], room: Tensor) -> int:
    """The largest size up to the fullest class for which `fits` holds; sizes too small for the profile do fit."""

    def fits_or_too_small(size: int) -> bool:
        try:
            return fits(size)
        except SettingsError:
            return True

    low, high = 1, int(room.max())
    while low < high:  # counts grow with the size, so bisect
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits_or_too_small(middle) else (low, middle - 1)
    return low


def _check_enough(data: ImageData, available: Tensor, counts: Tensor) -> None:
    short = (available < counts).nonzero().flatten().tolist()
    if short:
        raise DataError(
            f"{data.name}: class {data.class_names[short[0]]!r} has {int(available[short[0]])} images to choose "
            f"from, {int(counts[short[0]])} were asked for; lower largest or leave it out"
        )


def _own_test(train: ImageData, test: ImageData | None) -> ImageData:
    if test is None:
        raise DataError(f"{train.name} has no test images; set rest_is_test=true to test on images not trained on")
    if test.class_names != train.class_names:
        raise DataError(
            f"{train.name}: training and test images show different classes ({train.num_classes} and "
            f"{test.num_classes}); set rest_is_test=true to test on the training classes"
        )
    return test


def _rest_as_test(train: ImageData, rest: Tensor) -> ImageData:
    test = train.subset(rest)
    empty = (test.counts == 0).nonzero().flatten().tolist()
    if empty and train.groups is None:
        raise DataError(
            f"{train.name}: no image of class {train.class_names[empty[0]]!r} is left for the test set; lower largest"
        )
    if empty:
        own = train.groups[train.labels == empty[0]].unique()
        raise DataError(
            f"{train.name}: no whole group of class {train.class_names[empty[0]]!r} is left for the test set, it has "
            f"{len(own)}; lower largest or validation_fraction, or add images of other groups"
        )
    return test


def save_split(path: Path | str, split: LongTailSplit) -> None:
    """Write the split's indices, counts and order to `path`, an .npz file, whole or not at all."""
    values = {key: getattr(split, key) for key in _INDEX_KEYS}
    arrays = {key: value.numpy().astype("<i8") for key, value in values.items() if value is not None}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_split_indices(path: Path | str) -> dict[str, Tensor]:
    """What `save_split` wrote: int64 tensors by name; "test_indices" is there when the rest was the test set.

    Raises:
        DataNotFoundError: no such file.
        DataError: not a file of `save_split`, or a damaged one.
    """
    arrays = load_arrays(path, _INDEX_KEYS)
    needed = set(_INDEX_KEYS) - {"test_indices"}
    if not needed <= arrays.keys() or any(array.dtype.kind != "i" or array.ndim != 1 for array in arrays.values()):
        raise DataError(
            f"{printable(path)} lacks the arrays of a saved split ({', '.join(sorted(needed))}); write it again"
        )
    return {key: torch.from_numpy(array.astype(np.int64)) for key, array in arrays.items()}
