"""`make_long_tailed`: training, validation and test images of a long-tailed benchmark that share no image.

Where the source knows its groups (`ImageData.groups`), the parts cut out of it share no group either.

A split is a function of the source and the seed. Its indices can be saved beside the results, so that a figure can
be traced to the very images it was measured on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_invariance.data.grouping import hold_groups
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import (
    class_order,
    counts_by_class,
    cut_indices,
    exponential_counts,
    long_tailed_indices,
    ranks_in_class,
    split_indices,
    step_counts,
    zipf_counts,
)
from gen_invariance.data.readers.arrays import load_arrays
from gen_invariance.data.readers.base import Source
from gen_invariance.data.settings import LongTailSettings
from gen_invariance.devices import check_memory
from gen_invariance.errors import DataError, SettingsError, printable
from gen_invariance.files import atomic_write
from gen_invariance.run import named_generator

_ROW_BYTES = 32  # of the numbers of an image, while they are drawn
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
    settings: LongTailSettings | None = None,
    *,
    seed: int = 0,
    **changes: Any,
) -> LongTailSplit:
    """A long-tailed training set cut out of `source`, with validation and test images that share none of it.

    Validation images are held out first, stratified, so they follow the source's class sizes; the long tail is
    then cut out of the rest (the way K49-LT was made).

    A source with groups is cut by them: whole groups are held out, images of a class are taken in turn over its
    groups, and with `rest_is_test` about half of each class's images, in whole groups, stay out of the training images
    (fewer where `largest` needs them). Then every group without a training image is tested on, and images that were
    not chosen out of a group that was are not used.

    With `largest` None the largest class has the most images that fit. With `rest_is_test` that leaves half of each
    class (rounded down) for the test set.

    Where a class has fewer images than it should, `shortage="repeat"` uses its images in turn, for nuisances that act
    on every use anew; `base_images` bounds how many different images a class has. Carried to the end, every class has
    the same few images and the long tail is in the number of draws alone, which tells what is learned from draws apart
    from what is learned from images. `train_indices` then names rows several times. `shortage="cap"` takes the images
    there are.

    `fill_tail` fills every class up to the size of the largest, or as far as its images go. The images of the cut are
    among those of the filled set.

    Args:
        source: a `Source`, or a pair of training images and test images (or None).
        settings: the tail and what is held out; None takes the defaults.
        seed: root of the class order, the held-out images and the chosen images.
        changes: fields of `settings` to replace, such as `largest=100`.

    Raises:
        SettingsError: a setting out of its range, or one that does not fit another.
        DataError: too few images, no test part, or one with other classes.

    Reference:
        Zhou et al., "Do Deep Networks Transfer Invariances Across Classes?", ICLR 2022, section 2 and its code.

    Example:
        >>> from gen_invariance import load_source, make_long_tailed
        >>> split = make_long_tailed(load_source("digits"), largest=60, imbalance=20, rest_is_test=True)
        >>> sorted(split.train.counts.tolist())
        [3, 4, 5, 8, 11, 15, 22, 30, 43, 60]
    """
    if settings is None or changes:
        settings = replace(settings or LongTailSettings(), **changes)
    train, test = source if isinstance(source, tuple) else (source.train, source.test)
    train.require_every_class()
    labels, groups = train.labels.cpu(), None if train.groups is None else train.groups.cpu()
    generator = named_generator(seed, "longtail", "validation")
    kept, held_out = split_indices(labels, fraction=settings.validation_fraction, generator=generator, groups=groups)
    if settings.rest_is_test and groups is not None:
        kept = _leave_test_groups(labels, groups, kept, settings, seed=seed)
    if settings.shortage == "error":
        chosen, counts, order = _cut_tail(train, kept, settings, seed=seed)
        used = chosen
    else:
        used = _base_images(train, kept, settings, seed=seed)
        chosen, counts, order = _fill_tail(train, used, settings, seed=seed)
    if settings.rest_is_test:
        rest = _untouched(len(labels), torch.cat([used, held_out]), groups)
        test = _rest_as_test(train, rest)
    else:
        rest, test = None, _own_test(train, test)
    if settings.test_images is not None:
        generator = named_generator(seed, "longtail", "test")
        wanted = test.counts.clamp(max=settings.test_images)
        rows = long_tailed_indices(test.labels.cpu(), wanted, generator=generator, groups=test.groups)
        rest, test = None if rest is None else rest[rows], test.subset(rows)
    return LongTailSplit(
        train=train.subset(chosen),
        validation=train.subset(held_out),
        test=test,
        train_indices=chosen,
        validation_indices=held_out,
        test_indices=rest,
        counts=counts,
        order=order,
    )


def _cut_tail(
    train: ImageData, kept: Tensor, settings: LongTailSettings, *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, class counts and class order of a tail whose classes have all the images they should."""
    labels, groups = _labels_groups(train, kept)
    available = torch.bincount(labels, minlength=train.num_classes)
    halved = settings.rest_is_test and settings.largest is None and groups is None
    room = available - available // 2 if halved else available
    order = _choose_order(settings, room, seed=seed)
    counts = _choose_counts(settings, room, order)
    _check_enough(train, available, counts)
    if settings.fill_tail:
        counts = available.clamp(max=int(counts.max()))
    return kept[cut_indices(labels, counts, cut=settings.cut, seed=seed, groups=groups)], counts, order


def _base_images(train: ImageData, kept: Tensor, settings: LongTailSettings, *, seed: int) -> Tensor:
    """Rows of the different images that a tail with a shortage may use."""
    labels, groups = _labels_groups(train, kept)
    counts = torch.bincount(labels, minlength=train.num_classes)
    if settings.base_images is not None:
        counts = counts.clamp(max=settings.base_images)
    elif settings.rest_is_test and groups is None:
        counts = counts - counts // 2
    return kept[cut_indices(labels, counts, seed=seed, groups=groups)]


def _fill_tail(
    train: ImageData, used: Tensor, settings: LongTailSettings, *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, class counts and class order of a tail with a shortage of images."""
    labels, groups = _labels_groups(train, used)
    available = torch.bincount(labels, minlength=train.num_classes)
    order = _choose_order(settings, available, seed=seed)
    counts = _choose_counts(settings, available, order)
    if settings.shortage == "repeat":
        total, side = int(counts.sum()), train.images.shape[1:].numel()
        advice = "choose a smaller data.largest"
        check_memory(total * (side + _ROW_BYTES), f"{total} images, repeated as shortage=repeat says,", advice)
        return used[_repeat_in_turn(labels, counts, groups, seed=seed)], counts, order
    counts = counts.minimum(available)
    if settings.fill_tail:
        counts = available.clamp(max=int(counts.max()))
    order = torch.argsort(counts, descending=True, stable=True)
    return used[cut_indices(labels, counts, seed=seed, groups=groups)], counts, order


def _labels_groups(train: ImageData, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    return train.labels.cpu()[rows], None if train.groups is None else train.groups.cpu()[rows]


def _repeat_in_turn(labels: Tensor, counts: Tensor, groups: Tensor | None, *, seed: int) -> Tensor:
    """Rows so that class c has counts[c], its images used in turn; int64 (sum of counts,), by class."""
    generator = named_generator(seed, "longtail", "subset")
    ranks = None if groups is None else ranks_in_class(labels, generator=generator, groups=groups)
    parts = []
    for label, count in enumerate(counts.tolist()):
        rows = (labels == label).nonzero().flatten()
        order = torch.randperm(len(rows), generator=generator) if ranks is None else ranks[rows].argsort()
        parts.append(rows[order][torch.arange(count) % len(rows)])
    return torch.cat(parts)


def _choose_order(settings: LongTailSettings, room: Tensor, *, seed: int) -> Tensor:
    if settings.profile == "none":
        return torch.argsort(room, descending=True, stable=True)
    if settings.shuffle_order:
        return class_order(len(room), generator=named_generator(seed, "longtail", "order"))
    return torch.arange(len(room))


def compute_class_sizes(settings: LongTailSettings, num_classes: int, *, largest: int) -> Tensor:
    """Class sizes by rank, int64 (K,), of a profile other than none; see `longtail`.

    Raises:
        SettingsError: sizes that cannot be, such as a class without an image.
    """
    if settings.profile == "zipf":
        return zipf_counts(num_classes, largest=largest, power=settings.power, smallest=settings.smallest)
    counts = exponential_counts if settings.profile == "exponential" else step_counts
    return counts(num_classes, largest=largest, imbalance=settings.imbalance)


def _choose_counts(settings: LongTailSettings, room: Tensor, order: Tensor) -> Tensor:
    """Counts by class, int64 (K,); the largest that fits `room` when no size is given."""
    largest = settings.largest
    if settings.profile == "none":
        return room if largest is None else room.clamp(max=largest)

    def counts_for(size: int) -> Tensor:
        return counts_by_class(compute_class_sizes(settings, len(room), largest=size), order)

    if largest is None:
        largest = _largest_that(lambda size: bool((counts_for(size) <= room).all()), room)
    return counts_for(largest)


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


def _leave_test_groups(
    labels: Tensor, groups: Tensor, kept: Tensor, settings: LongTailSettings, *, seed: int
) -> Tensor:
    """`kept` less about half of each class's images, in whole groups, that are left for the test set."""
    available = torch.bincount(labels[kept], minlength=int(labels.max()) + 1)
    needed = torch.zeros_like(available)
    if settings.shortage == "error" and settings.largest is not None and settings.profile != "none":
        needed = _choose_counts(settings, available, _choose_order(settings, available, seed=seed))
    reserved = hold_groups(
        labels[kept],
        groups[kept],
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


def _check_enough(data: ImageData, available: Tensor, counts: Tensor) -> None:
    short = (available < counts).nonzero().flatten().tolist()
    if short:
        raise DataError(
            f"{data.name}: class {data.class_names[short[0]]!r} has {int(available[short[0]])} images to choose "
            f"from, {int(counts[short[0]])} were asked for; lower largest or leave it out"
        )


def _own_test(train: ImageData, test: ImageData | None) -> ImageData:
    if test is None:
        raise DataError(f"{train.name} has no test images; set data.rest_is_test=true to test on images not trained on")
    if test.class_names != train.class_names:
        raise DataError(
            f"{train.name}: training and test images show different classes ({train.num_classes} and "
            f"{test.num_classes}); set data.rest_is_test=true to test on the training classes"
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
        groups = train.groups[train.labels == empty[0]].unique()
        raise DataError(
            f"{train.name}: no whole group of class {train.class_names[empty[0]]!r} is left for the test set, it has "
            f"{len(groups)}; lower largest or validation_fraction, or add images of other groups"
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
