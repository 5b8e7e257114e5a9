"""Sampling rules of long-tailed training: how likely each class is drawn, and which images make an epoch.

An epoch's list is a function of (seed, epoch) only, so nothing has to be saved to resume, and every rank can compute
the whole list and take its share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gen_invariance.data.images import check_labels
from gen_invariance.data.settings import rule_name
from gen_invariance.devices import plain_defaults
from gen_invariance.errors import DataError, SettingsError
from gen_invariance.run import named_generator


def sampling_probabilities(counts: Tensor, *, rule: str, progress: float = 0.0, beta: float = 0.9999) -> Tensor:
    """The probability that a draw is of class c, float64 (K,), summing to 1; empty classes get 0.

    "instance" is proportional to n_c, "class_balanced" equal for all classes, "square_root" proportional to
    sqrt(n_c), "progressive" is (1 - t) instance + t class_balanced with t = `progress`, and "effective_number"
    weights each image by (1 - beta) / (1 - beta^n_c).

    Args:
        counts: int64 (K,), images of each class.
        rule: one of `RULES`.
        progress: t in [0, 1], 0 in the first epoch, 1 in the last.
        beta: in [0, 1); towards 1 the rule approaches "class_balanced".

    Raises:
        SettingsError: unknown rule, or `progress` or `beta` out of range.
        DataError: no class has an image.

    Reference:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, Eq. 1 and 2;
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, Eq. 2.

    >>> sampling_probabilities(torch.tensor([9, 1]), rule="square_root").tolist()
    [0.75, 0.25]
    """
    rule_name(rule)
    if not (0 <= progress <= 1 and 0 <= beta < 1):
        raise SettingsError(f"progress must lie in [0, 1] and beta in [0, 1), got {progress} and {beta}")
    number = counts.detach().cpu().double()
    if not (number > 0).any():
        raise DataError("no class has an image to sample; give a data set that is not empty")
    present = (number > 0).double()
    instance, balanced = number / number.sum(), present / present.sum()
    if rule == "progressive":
        return (1 - progress) * instance + progress * balanced
    if rule == "effective_number":
        # n_c times the image weight; expm1 keeps the precision that 1 - beta^n loses for beta near 1.
        effective = number if beta == 0 else number * (1 - beta) / -torch.expm1(number.clamp(min=1) * math.log(beta))
        return effective / effective.sum()
    weights = {"instance": instance, "class_balanced": balanced, "square_root": number.sqrt()}[rule]
    return weights / weights.sum()


@plain_defaults()
def epoch_indices(
    labels: Tensor,
    *,
    rule: str,
    epoch: int,
    seed: int,
    num_epochs: int = 1,
    num_samples: int | None = None,
    num_classes: int | None = None,
    stream: str = "loader",
) -> Tensor:
    """The images of one epoch in order, int64 (num_samples,); a function of its arguments only.

    "instance" goes through random permutations, so no image comes twice before each came once. The other rules
    draw a class by `sampling_probabilities`, then one of its images, with replacement. "progressive" moves from
    "instance" in epoch 0 to "class_balanced" in the last one.

    Args:
        labels: int64 (N,), in [0, K).
        rule: one of `RULES`.
        epoch: counted from 0.
        seed: root of the random numbers.
        num_epochs: epochs of the whole run.
        num_samples: draws of the epoch; None is N.
        num_classes: K; None takes the largest label.
        stream: separates loaders that share a seed.

    Raises:
        SettingsError: unknown rule, negative epoch, or no sample.
        DataError: no image.
        RangeError: a label outside [0, K).
    """
    if epoch < 0 or num_epochs < 1 or (num_samples is not None and num_samples < 1):
        raise SettingsError(
            f"epoch must be 0 or more, num_epochs and num_samples at least 1, got {epoch}, {num_epochs}, {num_samples}"
        )
    labels = check_sampled(labels, num_classes)
    wanted = len(labels) if num_samples is None else num_samples
    progress = min(epoch / max(num_epochs - 1, 1), 1.0)
    counts = torch.bincount(labels, minlength=num_classes or 0)
    probabilities = sampling_probabilities(counts, rule=rule, progress=progress)

    generator = named_generator(seed, stream, epoch)
    if rule == "instance":
        rounds = [torch.randperm(len(labels), generator=generator) for _ in range(-(-wanted // len(labels)))]
        return torch.cat(rounds)[:wanted]
    drawn = _draw_classes(probabilities, wanted, generator=generator)
    within = torch.rand(wanted, dtype=torch.float64, generator=generator).mul_(counts[drawn]).long()
    starts = counts.cumsum(0) - counts
    return torch.argsort(labels, stable=True)[starts[drawn] + within]


def _draw_classes(probabilities: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """`count` classes by inverting the distribution function; a class of probability 0 is never drawn."""
    distribution = probabilities.cumsum(0)
    distribution = distribution / distribution[-1]  # ends in exactly 1, which no uniform number reaches
    return torch.searchsorted(distribution, torch.rand(count, dtype=torch.float64, generator=generator), right=True)


def check_sampled(labels: Tensor, num_classes: int | None = None) -> Tensor:
    """`labels` by `check_labels`, of which there must be one at least, or `DataError`."""
    if not labels.numel():
        raise DataError("there is no label to sample from; give a data set that is not empty")
    return check_labels(labels, num_classes)
