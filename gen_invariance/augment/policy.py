"""Which classes get the nuisance, and how often: a probability for each class, from its training count.

Every policy takes the training images of each class, int64 (K,), and returns a plain float32 tensor (K,), which may be
edited before it goes to the stage. Empty classes get probability 0; a probability outside [0, 1] is a `SettingsError`.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_invariance.errors import SettingsError
from gen_invariance.settings import check_options


def policy(name: str, counts: Tensor, **options: Any) -> Tensor:
    """The probability table of the policy called `name`.

    Args:
        name: "linear_ramp", "hard_cutoff", "auto", "head", "everywhere" or "curve"; see the functions of these names.
        counts: training images of each class, int64 (K,).
        options: of that policy.

    Returns:
        float32 (K,) in [0, 1].

    Raises:
        SettingsError: unknown name or option, or one out of its range.

    >>> policy("hard_cutoff", torch.tensor([500, 60, 8]), cutoff=60)
    tensor([0.0000, 0.5000, 0.5000])
    """
    policies = {function.__name__: function for function in (linear_ramp, hard_cutoff, auto, head, everywhere, curve)}
    if name not in policies:
        raise SettingsError(f"unknown policy {name!r}; choose one of {', '.join(policies)}")
    parameters = list(inspect.signature(policies[name]).parameters.values())[1:]
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise SettingsError(
                f"policy {name} needs policy_options.{parameter.name}; sizes are numbers of training images"
            )
    return policies[name](counts, **check_options(policies[name], options, f"policy {name}"))


def linear_ramp(counts: Tensor, *, threshold: float, maximum: float = 1.0) -> Tensor:
    """`maximum` for the smallest class, falling linearly with class size to 0 at `threshold` images.

    The rule of Zhou et al. 2022, p_c = (T - n_c) / (T - n_min); where T <= n_min nobody is below the threshold and
    all probabilities are 0 (the formula itself would divide by zero or exceed 1).
    """
    _check_probability(maximum, "maximum")
    counts = counts.cpu().double()
    smallest = counts[counts > 0].min() if (counts > 0).any() else counts.new_tensor(0.0)
    if threshold <= smallest:
        return torch.zeros_like(counts, dtype=torch.float32)
    ramp = ((threshold - counts) / (threshold - smallest)).clamp(0, 1) * maximum
    return torch.where(counts > 0, ramp, 0.0).float()


def hard_cutoff(counts: Tensor, *, cutoff: float, probability: float = 0.5) -> Tensor:
    """`probability` for classes of at most `cutoff` images, 0 for larger ones.

    Zhou et al. 2022, Algorithm 1.
    """
    return _where((counts > 0) & (counts <= cutoff), probability)


def auto(counts: Tensor, *, maximum: float = 0.5) -> Tensor:
    """A ramp that needs no number: `maximum` for the smallest class, 0 from the mean class size on.

    Classes above the mean size are those that a balanced data set of the same total would have to shrink; they can
    learn the nuisance from their own images.
    """
    return linear_ramp(counts, threshold=_mean_size(counts), maximum=maximum)


def head(counts: Tensor, *, probability: float = 0.5) -> Tensor:
    """`probability` for classes of at least the mean class size, 0 for smaller ones.

    These are the classes that `auto` leaves out.
    """
    return _where((counts > 0) & (counts >= _mean_size(counts)), probability)


def everywhere(counts: Tensor, *, probability: float = 0.5) -> Tensor:
    """`probability` for every class that has images."""
    return _where(counts > 0, probability)


def curve(counts: Tensor, *, sizes: tuple[float, ...], probabilities: tuple[float, ...]) -> Tensor:
    """A curve of one's own: straight lines over the logarithm of class size between some points.

    Args:
        counts: training images of each class, (K,).
        sizes: class sizes, ascending, each at least 1.
        probabilities: at these sizes; the first and the last hold beyond them.

    Raises:
        SettingsError: lists of different lengths, sizes that do not ascend, or probabilities outside [0, 1].

    >>> curve(torch.tensor([1, 10, 100, 1000]), sizes=(10, 1000), probabilities=(0.8, 0.0))
    tensor([0.8000, 0.8000, 0.4000, 0.0000])
    """
    if not sizes or len(sizes) != len(probabilities) or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
        raise SettingsError(
            "policy curve: sizes must ascend from 1 or more, with one probability each, got "
            f"{list(sizes)} and {list(probabilities)}"
        )
    for value in probabilities:
        _check_probability(value, "probabilities")
    values = np.interp(np.log(counts.clamp(min=1).numpy()), np.log(sizes), probabilities)
    return torch.where(counts > 0, torch.from_numpy(values), 0.0).float()


def _mean_size(counts: Tensor) -> float:
    """The mean size of the classes that have images; 0 where none has."""
    present = counts[counts > 0].double()
    return float(present.mean()) if len(present) else 0.0


def _where(classes: Tensor, probability: float) -> Tensor:
    _check_probability(probability, "probability")
    return torch.where(classes, float(probability), 0.0).float()


def _check_probability(value: float, what: str) -> None:
    if not 0 <= value <= 1:
        raise SettingsError(f"policy: {what} must lie in [0, 1], got {value}")
