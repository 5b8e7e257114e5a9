"""Which classes get the nuisance, and how often: a probability for each class, from its training count.

Every policy returns a plain float32 tensor (K,), which may be edited before it goes to the stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gen_invariance.errors import SettingsError
from gen_invariance.settings import options_of


def linear_ramp(counts: Tensor, *, threshold: float, maximum: float = 1.0) -> Tensor:
    """`maximum` for the smallest class, falling linearly with class size to 0 at `threshold` images.

    The rule of Zhou et al. 2022, p_c = (T - n_c) / (T - n_min); where T <= n_min nobody is below the threshold and
    all probabilities are 0 (the formula itself would divide by zero or exceed 1).

    Args:
        counts: training images of each class, (K,); empty classes get probability 0.
        threshold: T, images.
        maximum: probability of the smallest class.

    Returns:
        float32 (K,) in [0, `maximum`].

    Raises:
        SettingsError: `maximum` outside [0, 1].
    """
    _check_probability(maximum, "maximum")
    counts = counts.double()
    smallest = counts[counts > 0].min() if (counts > 0).any() else counts.new_tensor(0.0)
    if threshold <= smallest:
        return torch.zeros(len(counts))
    ramp = ((threshold - counts) / (threshold - smallest)).clamp(0, 1) * maximum
    return torch.where(counts > 0, ramp, 0.0).float()


def hard_cutoff(counts: Tensor, *, cutoff: float, probability: float = 0.5) -> Tensor:
    """`probability` for classes of at most `cutoff` images, 0 for larger ones (Zhou et al. 2022, Algorithm 1).

    Args:
        counts: training images of each class, (K,); empty classes get probability 0.
        cutoff: the largest size that still counts as tail, images.
        probability: of the chosen classes.

    Returns:
        float32 (K,).

    Raises:
        SettingsError: `probability` outside [0, 1].
    """
    _check_probability(probability, "probability")
    chosen = (counts > 0) & (counts <= cutoff)
    return torch.where(chosen, float(probability), 0.0).float()


def auto(counts: Tensor, *, maximum: float = 0.5) -> Tensor:
    """A ramp that needs no number: `maximum` for the smallest class, 0 from the mean class size on.

    Classes above the mean size are those that a balanced data set of the same total would have to shrink; they can
    learn the nuisance from their own images.
    """
    present = counts[counts > 0].double()
    if not len(present):
        return torch.zeros(len(counts))
    return linear_ramp(counts, threshold=float(present.mean()), maximum=maximum)


def head(counts: Tensor, *, probability: float = 0.5) -> Tensor:
    """`probability` for classes of at least the mean class size, 0 for smaller ones: the classes `auto` leaves out.

    Args:
        counts: training images of each class, (K,).
        probability: of the chosen classes.

    Returns:
        float32 (K,).

    Raises:
        SettingsError: `probability` outside [0, 1].
    """
    _check_probability(probability, "probability")
    present = counts[counts > 0].double()
    threshold = float(present.mean()) if len(present) else 1.0
    return torch.where(counts >= threshold, float(probability), 0.0).float()


def curve(counts: Tensor, *, sizes: tuple[float, ...], probabilities: tuple[float, ...]) -> Tensor:
    """A curve of one's own: probabilities at some class sizes, straight lines over the logarithm of size between them.

    Args:
        counts: training images of each class, (K,); empty classes get probability 0.
        sizes: class sizes, ascending, each at least 1.
        probabilities: at these sizes; the first and the last hold beyond them.

    Returns:
        float32 (K,).

    Raises:
        SettingsError: lists of different lengths, sizes that do not ascend, or probabilities outside [0, 1].

    >>> curve(torch.tensor([1, 10, 100, 1000]), sizes=(10, 1000), probabilities=(0.8, 0.0)).tolist()
    [0.800000011920929, 0.800000011920929, 0.4000000059604645, 0.0]
    """
    if not sizes or len(sizes) != len(probabilities) or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
        raise SettingsError(
            "policy curve: sizes must ascend from 1 or more, with one probability each, got "
            f"{list(sizes)} and {list(probabilities)}"
        )
    for value in probabilities:
        _check_probability(value, "probabilities")
    found = np.interp(np.log(counts.clamp(min=1).numpy()), np.log(sizes), probabilities)
    return torch.where(counts > 0, torch.from_numpy(found), 0.0).float()


def edited(probability: Tensor, changes: Mapping[str, float], class_names: Sequence[str]) -> Tensor:
    """`probability` with the classes named in `changes` set to the given values.

    Raises:
        SettingsError: an unknown class name, or a value outside [0, 1].
    """
    result = probability.clone()
    for name, value in changes.items():
        if name not in class_names:
            raise SettingsError(f"policy: no class is called {name!r}; classes are {', '.join(class_names)}")
        _check_probability(value, name)
        result[list(class_names).index(name)] = value
    return result


def build_policy(name: str, counts: Tensor, **options: float) -> Tensor:
    """The probability table of the policy called `name`: linear_ramp, hard_cutoff, auto, head, everywhere, or curve.

    Raises:
        SettingsError: unknown name or option.
    """
    policies = {
        "linear_ramp": linear_ramp, "hard_cutoff": hard_cutoff, "auto": auto, "head": head, "everywhere": _everywhere,
        "curve": curve,
    }  # fmt: skip
    if name not in policies:
        raise SettingsError(f"unknown policy {name!r}; choose one of {', '.join(policies)}")
    required = {"linear_ramp": ("threshold",), "hard_cutoff": ("cutoff",), "curve": ("sizes", "probabilities")}
    for option in required.get(name, ()):
        if option not in options:
            raise SettingsError(f"policy {name} needs policy_options.{option}; sizes are numbers of training images")
    return policies[name](counts, **options_of(policies[name], options, f"policy {name}"))


def _everywhere(counts: Tensor, *, probability: float = 0.5) -> Tensor:
    """`probability` for every class that has images."""
    return hard_cutoff(counts, cutoff=float("inf"), probability=probability)


def _check_probability(value: float, what: str) -> None:
    if not 0 <= value <= 1:
        raise SettingsError(f"policy: {what} must lie in [0, 1], got {value}")
