"""Class sizes that a source cannot fill: images repeated, each time for a draw of its own, or as many as there are.

Kuzushiji-49 has classes of a few hundred images, and its long-tailed versions give any class 4,800: there an image is
used again, and the nuisance acts on every use of it anew. Carried to the end, every class has the same few images and
the long tail is in the number of draws alone, which tells what is learned from draws apart from what is learned from
images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import (
    class_order,
    counts_by_class,
    exponential_counts,
    long_tailed_indices,
    ranks_in_class,
    step_counts,
    zipf_counts,
)
from gen_invariance.data.split import LongTailSplit, make_long_tailed
from gen_invariance.errors import SettingsError
from gen_invariance.run import named_generator

if TYPE_CHECKING:
    from gen_invariance.data.readers.base import Source

Shortage = Literal["error", "repeat", "cap"]
SHORTAGES: tuple[str, ...] = ("error", "repeat", "cap")


def make_filled(
    source: Source | tuple[ImageData, ImageData | None],
    *,
    shortage: Shortage,
    base_images: int | None = None,
    profile: str = "exponential",
    largest: int | None = None,
    imbalance: float = 100.0,
    power: float = 2.0,
    smallest: int = 1,
    validation_fraction: float = 0.0,
    rest_is_test: bool = False,
    shuffle_order: bool = True,
    fill_tail: bool = False,
    seed: int = 0,
) -> LongTailSplit:
    """As `split.make_long_tailed`, for class sizes that some classes have too few images for.

    Args:
        source: training images, and test images or None.
        shortage: "repeat" uses images of a class in turn until it has its size; "cap" takes all there are.
        base_images: different images of each class at most, for "repeat"; None for as many as there are.
        profile: "exponential", "step" or "zipf".
        largest: images of the largest class; must be given.
        imbalance: largest / smallest class, of "exponential" and "step".
        power: exponent of "zipf".
        smallest: least class size of "zipf".
        validation_fraction: share of the source's training images to hold out.
        rest_is_test: training images that are not used become the test set.
        shuffle_order: draw which class is how large; otherwise class 0 is the largest.
        fill_tail: with "cap", fill classes up towards the size of the largest; see `split.make_long_tailed`.
        seed: root of the order, the held-out images and the chosen images.

    Returns:
        The split. With "repeat" `train_indices` names rows several times.

    Raises:
        SettingsError: no `largest`, a profile without sizes, or `base_images` with "cap".
        DataError: as `split.make_long_tailed`.

    Reference:
        Zhou et al., "Do Deep Networks Transfer Invariances Across Classes?", ICLR 2022, section 2 and its code.
    """
    _check(shortage, base_images, profile, largest)
    base = make_long_tailed(
        source,
        profile="none",
        largest=base_images,
        validation_fraction=validation_fraction,
        rest_is_test=rest_is_test,
        seed=seed,
    )
    num_classes = base.train.num_classes
    by_rank = class_sizes(profile, num_classes, largest=largest, imbalance=imbalance, power=power, smallest=smallest)
    shuffled = class_order(num_classes, generator=named_generator(seed, "longtail", "order"))
    order = shuffled if shuffle_order else torch.arange(num_classes)
    counts = counts_by_class(by_rank, order)
    labels, groups = base.train.labels.cpu(), base.train.groups
    generator = named_generator(seed, "longtail", "subset")
    if shortage == "cap":
        counts = counts.minimum(base.train.counts)
        if fill_tail:
            counts = base.train.counts.clamp(max=int(counts.max()))
        order = torch.argsort(counts, descending=True, stable=True)
        rows = long_tailed_indices(labels, counts, generator=generator, groups=groups)
    else:
        rows = _in_turn(labels, counts, groups, generator=generator)
    indices = base.train_indices[rows]
    return replace(base, train=base.train.subset(rows), train_indices=indices, counts=counts, order=order)


def _check(shortage: str, base_images: int | None, profile: str, largest: int | None) -> None:
    if shortage not in ("repeat", "cap"):
        raise SettingsError(f"shortage must be one of {', '.join(SHORTAGES)}, got {shortage!r}")
    if base_images is not None and (shortage == "cap" or base_images < 1):
        raise SettingsError(f"base_images needs shortage=repeat and at least 1, got {base_images} and {shortage!r}")
    if largest is None or profile == "none":
        raise SettingsError(
            f"shortage={shortage} needs class sizes: set largest and a profile other than none, "
            f"got largest={largest} and profile={profile!r}"
        )


def class_sizes(
    profile: str, num_classes: int, *, largest: int, imbalance: float, power: float, smallest: int
) -> Tensor:
    """Class sizes by rank, int64 (K,), of the profile "exponential", "step" or "zipf"; see `longtail`.

    Raises:
        SettingsError: another profile, or sizes that cannot be.
    """
    shapes: dict[str, tuple[Any, dict[str, Any]]] = {
        "exponential": (exponential_counts, {"imbalance": imbalance}),
        "step": (step_counts, {"imbalance": imbalance}),
        "zipf": (zipf_counts, {"power": power, "smallest": smallest}),
    }
    if profile not in shapes:
        raise SettingsError(f"unknown profile {profile!r}; choose one of {', '.join(shapes)}")
    function, options = shapes[profile]
    return function(num_classes, largest=largest, **options)


def _in_turn(labels: Tensor, counts: Tensor, groups: Tensor | None, *, generator: torch.Generator) -> Tensor:
    """Rows so that class c has counts[c], its images used in turn; int64 (sum of counts,), by class."""
    parts = []
    places = None if groups is None else ranks_in_class(labels, generator=generator, groups=groups)
    for label, count in enumerate(counts.tolist()):
        own = (labels == label).nonzero().flatten()
        order = torch.randperm(len(own), generator=generator) if places is None else places[own].argsort()
        own = own[order]
        parts.append(own[torch.arange(count) % len(own)])
    return torch.cat(parts)
