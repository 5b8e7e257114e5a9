"""Long-tailed class counts, the choice of images for them, stratified splits, and many/medium/few groups.

Everything here is a function of its arguments: the same generator seed picks the same images on every machine.
Images are always chosen without replacement; a published benchmark had to correct its figures because its subset
was drawn with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gen_invariance.data.grouping import hold_groups, order_in_turn, ranks_by_key
from gen_invariance.data.images import check_labels
from gen_invariance.errors import DataError, RangeError, SettingsError
from gen_invariance.run import named_generator

CUTS: tuple[str, ...] = ("own", "cao", "first")


def _truncate(values: Sequence[float]) -> Tensor:
    """Whole parts as int64; the nudge keeps an exact 5 that floats compute as 4.999999999 at 5."""
    return torch.tensor([math.floor(value * (1 + 1e-9)) for value in values], dtype=torch.int64)


def _check_counts(num_classes: int, largest: int, imbalance: float = 1.0) -> None:
    if num_classes < 1:
        raise SettingsError(f"num_classes must be at least 1, got {num_classes}; give the number of classes")
    if largest < 1:
        raise SettingsError(f"largest must be at least 1, got {largest}; give the head class an image")
    if not (math.isfinite(imbalance) and imbalance >= 1):
        raise SettingsError(f"imbalance must be 1 or more (largest / smallest class), got {imbalance}; 100 is usual")
    if largest * (1 + 1e-9) < imbalance:
        raise SettingsError(
            f"imbalance={imbalance:g} with a largest class of {largest} leaves the smallest class no image; "
            f"set imbalance to at most {largest}"
        )


def exponential_counts(num_classes: int, *, largest: int, imbalance: float) -> Tensor:
    """Class counts that fall exponentially, int64 (K,), largest first: floor(largest * imbalance^(-r / (K - 1))).

    With largest 5000 (500) and imbalance 100 these are the counts of CIFAR-10-LT (CIFAR-100-LT).

    Raises:
        SettingsError: no class, or a smallest class without an image.

    Reference:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, section 5.1.

    >>> exponential_counts(10, largest=5000, imbalance=100).tolist()
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    _check_counts(num_classes, largest, imbalance)
    steps = max(num_classes - 1, 1)
    # Python floats, not torch.pow: a vectorised pow may differ in the last bit between machines.
    return _truncate([largest * imbalance ** (-rank / steps) for rank in range(num_classes)])


def step_counts(num_classes: int, *, largest: int, imbalance: float, head_share: float = 0.5) -> Tensor:
    """Class counts with one step, int64 (K,): a `head_share` of classes (at least one) with `largest`, then the tail.

    Raises:
        SettingsError: no class, a smallest class without an image, or `head_share` outside (0, 1].

    Reference:
        Buda et al., "A systematic study of the class imbalance problem", Neural Networks 2018, section 3.1.

    >>> step_counts(4, largest=100, imbalance=10).tolist()
    [100, 100, 10, 10]
    """
    _check_counts(num_classes, largest, imbalance)
    if not 0 < head_share <= 1:
        raise SettingsError(f"head_share must lie in (0, 1], got {head_share}; 0.5 makes half of the classes large")
    num_head = max(1, int(_truncate([num_classes * head_share])))
    return _truncate([largest] * num_head + [largest / imbalance] * (num_classes - num_head))


def zipf_counts(num_classes: int, *, largest: int, power: float, smallest: int = 1) -> Tensor:
    """Class counts that follow Zipf's law, int64 (K,): max(floor(largest * r^-power), smallest) for r = 1..K.

    K = 49, largest 4800, power 2, smallest 5 are the counts of K49-LT (Zhou et al., ICLR 2022).

    Raises:
        SettingsError: no class, a negative power, or `smallest` outside [1, largest].

    >>> zipf_counts(5, largest=100, power=2.0, smallest=5).tolist()
    [100, 25, 11, 6, 5]
    """
    _check_counts(num_classes, largest)
    if not (math.isfinite(power) and power >= 0):
        raise SettingsError(f"power must be 0 or more, got {power}; 2.0 is the exponent of K49-LT")
    if not 1 <= smallest <= largest:
        raise SettingsError(f"smallest must lie in [1, {largest}], got {smallest}; it is the size of the last classes")
    return _truncate([largest * rank**-power for rank in range(1, num_classes + 1)]).clamp(min=smallest)


def class_order(num_classes: int, *, generator: torch.Generator) -> Tensor:
    """A random order of the classes, int64 (K,): order[rank] is the class that gets the rank-th largest count."""
    return torch.randperm(num_classes, generator=generator)


def counts_by_class(counts_by_rank: Tensor, order: Tensor) -> Tensor:
    """Counts (K,) by rank moved to their classes, so that result[order[rank]] = counts_by_rank[rank].

    >>> counts_by_class(torch.tensor([9, 5, 1]), torch.tensor([2, 0, 1])).tolist()
    [5, 1, 9]
    """
    return torch.zeros_like(counts_by_rank).index_copy(0, order, counts_by_rank)


def ranks_in_class(labels: Tensor, *, generator: torch.Generator, groups: Tensor | None = None) -> Tensor:
    """The rank of each image, 0 to n_c - 1, in a random order of its class; int64 (N,).

    With `groups`, int64 (N,), the first ranks of a class go to images of different groups, as long as it has any.
    """
    order = torch.randperm(len(labels), generator=generator)
    if groups is not None:
        order = order_in_turn(labels, groups, order, generator=generator)
    return ranks_by_key(labels, order)


def long_tailed_indices(
    labels: Tensor, counts: Tensor, *, generator: torch.Generator, groups: Tensor | None = None
) -> Tensor:
    """Which images to keep so that class c has counts[c] of them; int64 (sum of counts,), ascending.

    Chosen without replacement. From one generator seed a smaller count picks a subset of what a larger one picks.

    Args:
        labels: int64 (N,), in [0, K).
        counts: int64 (K,), images wanted of each class; 0 leaves a class out.
        generator: CPU generator.
        groups: int64 (N,), images of one number show the same thing. They are then taken in turn over the groups of a
            class, so that n images show min(n, number of groups) different things.

    Raises:
        DataError: a class has fewer images than asked for.

    >>> labels = torch.tensor([0, 0, 0, 1, 1])
    >>> labels[long_tailed_indices(labels, torch.tensor([2, 1]), generator=torch.Generator())].tolist()
    [0, 0, 1]
    """
    labels = check_labels(labels, len(counts))
    if (counts < 0).any():
        raise RangeError(f"counts must be 0 or more, got {int(counts.min())}; give the number of images of each class")
    available = torch.bincount(labels, minlength=len(counts))
    if (available < counts).any():
        short = int((available < counts).nonzero()[0])
        raise DataError(
            f"class {short} has {int(available[short])} images, {int(counts[short])} were asked for; "
            "lower largest, or shuffle the class order with another seed"
        )
    return (ranks_in_class(labels, generator=generator, groups=groups) < counts[labels]).nonzero().flatten()


def cut_indices(labels: Tensor, counts: Tensor, *, cut: str = "own", seed: int, groups: Tensor | None = None) -> Tensor:
    """The images that a cut keeps, counts[c] of class c; int64 (sum of counts,), ascending.

    Published long-tailed CIFAR figures come from two cuts: that of Cao et al., whose loader shuffles each class by
    NumPy's legacy generator, and the first images of each class in the order of the files. A smaller count picks a
    subset of what a larger one picks, under every rule.

    Args:
        labels: int64 (N,), in [0, K), in the order of the files.
        counts: int64 (K,), images wanted of each class.
        cut: "own" (drawn, in turn over groups), "cao" (each class in turn shuffled by
            `numpy.random.RandomState(seed)`; their tables are of seed 0), or "first" (the first images of each class,
            whatever the seed).
        seed: of "own" and "cao".
        groups: int64 (N,), see `longtail.long_tailed_indices`; only "own" looks at them.

    Raises:
        SettingsError: an unknown rule.
        DataError: a class has fewer images than asked for.

    Reference:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019: the data
        sets of their code.
    """
    if cut not in CUTS:
        raise SettingsError(f"data.cut must be one of {', '.join(CUTS)}, got {cut!r}")
    drawn = long_tailed_indices(labels, counts, generator=named_generator(seed, "longtail", "subset"), groups=groups)
    if cut == "own":
        return drawn  # the others pass its checks, too
    # The legacy generator, for its stream is what the published cut was drawn from.
    shuffling = np.random.RandomState(seed)
    kept = []
    for label, count in enumerate(counts.tolist()):
        rows = np.flatnonzero(labels.cpu().numpy() == label)
        if cut == "cao":
            shuffling.shuffle(rows)
        kept.append(rows[:count])
    return torch.from_numpy(np.sort(np.concatenate(kept)))


def split_indices(
    labels: Tensor, *, fraction: float, generator: torch.Generator, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(kept, held out): a stratified split of all images, int64 indices, ascending, disjoint.

    About `fraction` of each class is held out; a class with two or more images keeps at least one on each side, a
    class with a single image keeps it. With `fraction` 0 nothing is held out.

    With `groups`, int64 (N,), no group is on both sides: whole groups are held out, never all of a class, and a class
    of a single group keeps it. How near each class comes to `fraction` is up to its groups, see
    `grouping.hold_groups`.

    Raises:
        SettingsError: `fraction` outside [0, 1).

    >>> kept, held_out = split_indices(torch.tensor([0, 0, 0, 0, 1]), fraction=0.25, generator=torch.Generator())
    >>> len(kept), len(held_out)
    (4, 1)
    """
    if not 0 <= fraction < 1:
        raise SettingsError(f"the held-out fraction must lie in [0, 1), got {fraction}; 0.1 holds out a tenth")
    labels = check_labels(labels)
    counts = torch.bincount(labels)
    wanted = (counts.double() * fraction).add(0.5).long() if fraction else torch.zeros_like(counts)
    held = wanted.clamp(min=int(fraction > 0)).minimum((counts - 1).clamp(min=0))
    if groups is None:
        out = ranks_in_class(labels, generator=generator) < held[labels]
    else:
        out = hold_groups(labels, groups, wanted=held, generator=generator)
    return (~out).nonzero().flatten(), out.nonzero().flatten()


def class_groups(counts: Tensor, *, many_above: int = 100, few_below: int = 20) -> dict[str, Tensor]:
    """Which classes are many-, medium- and few-shot by training count; each bool (K,), exactly one true for a class.

    Reference:
        Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019 (more than 100, fewer than 20).

    >>> {name: group.tolist() for name, group in class_groups(torch.tensor([101, 20, 19])).items()}
    {'many': [True, False, False], 'medium': [False, True, False], 'few': [False, False, True]}
    """
    if few_below > many_above + 1:
        raise SettingsError(f"few_below={few_below} overlaps many_above={many_above}; set few_below <= many_above")
    many, few = counts > many_above, counts < few_below
    return {"many": many, "medium": ~(many | few), "few": few}


def shot_groups(counts: Tensor, *, many_above: int | None = 100, few_below: int | None = 20) -> dict[str, Tensor]:
    """Many-, medium- and few-shot classes, each bool (K,), by bounds where these fit the set, else by thirds.

    Thirds of the classes, largest first, are taken where a bound is None, or where the bounds would leave no class
    many-shot or none few-shot; classes of one size stay together where that leaves neither end empty. A set whose
    classes are all of one size keeps its bounds: it has no small classes.

    Args:
        counts: training images of each class, (K,).
        many_above: bound of many-shot classes, training images, see `class_groups`; None is thirds.
        few_below: bound of few-shot classes, training images; None is thirds.

    >>> {name: group.int().tolist() for name, group in shot_groups(torch.tensor([900, 300, 90, 60, 50])).items()}
    {'many': [1, 1, 0, 0, 0], 'medium': [0, 0, 1, 1, 0], 'few': [0, 0, 0, 0, 1]}
    """
    bounded = many_above is not None and few_below is not None
    groups = class_groups(counts, many_above=many_above, few_below=few_below) if bounded else class_groups(counts)
    equal = len(counts) < 2 or bool((counts == counts[0]).all())
    if equal or (bounded and groups["many"].any() and groups["few"].any()):
        return groups
    ranks = torch.argsort(torch.argsort(counts, descending=True, stable=True)).double()
    tied_ranks = torch.stack([ranks[counts == count].mean() for count in counts])
    for rank in (tied_ranks, ranks):
        third = (rank * 3 / len(counts)).floor()
        groups = {name: third == number for number, name in enumerate(("many", "medium", "few"))}
        if groups["many"].any() and groups["few"].any():
            return groups
    return {"many": ranks == 0, "medium": torch.zeros_like(groups["few"]), "few": ranks == 1}  # of two classes
