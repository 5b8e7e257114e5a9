"""From scores on splits to gains with intervals, and which candidates go on: pure functions of arrays.

All candidates of a split share images, initial weights and batches, so they are compared by paired differences. Few
splits say little of how much differences vary from split to split, so the variance of one pair is moderated by that of
all pairs (Smyth 2004): with s^2 over S splits and the prior s0^2 of weight d0,

    v = ((S - 1) s^2 + d0 s0^2) / (S - 1 + d0),   mean +- t(S - 1 + d0) sqrt(v / S).

The prior is the mean variance of all pairs with the same reference; it is never below what the finite number of scored
images alone would give.

Reference: Smyth, "Linear models and empirical Bayes methods for assessing differential expression", 2004, section 3;
Jamieson and Talwalkar, "Non-stochastic best arm identification", AISTATS 2016 (successive halving).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from gen_invariance.translator.quality.verdict import Gain

PRIOR_WEIGHT = 4
"""Degrees of freedom that the prior variance counts as."""

_UNKNOWN = 2.0  # of the images' share: variance of a split where no pair was seen on two

Figures = Mapping[str, Mapping[int, NDArray[np.bool_]]]
"""Candidate -> split -> which scored images it named right, bool (M,)."""


@dataclass(frozen=True)
class PairedGain:
    """How much one candidate gains over another, in points of balanced accuracy (0.01 of it), with its interval.

    Attributes:
        points: mean paired difference.
        low, high: ends of the interval.
        against: name of the other.
        splits: on which both were trained.
    """

    points: float
    low: float
    high: float
    against: str
    splits: int

    def to_json(self) -> dict[str, float | str | int | None]:
        """Plain values; NaN as null."""
        ends = {name: getattr(self, name) for name in ("points", "low", "high")}
        plain = {name: round(value, 3) if math.isfinite(value) else None for name, value in ends.items()}
        return {**plain, "against": self.against, "splits": self.splits}

    def to_gain(self) -> Gain | None:
        """As a verdict keeps it; None where nothing is known."""
        if not self.splits or not all(map(math.isfinite, (self.points, self.low, self.high))):
            return None
        return Gain(self.points, self.low, self.high, self.against)

    def __str__(self) -> str:
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


@dataclass(frozen=True)
class Table:
    """Scores of candidates on splits.

    Attributes:
        figures: which images were named right.
        labels: split -> class of each scored image, int64 (M,).
        shared: whether all splits are scored on the same images, so that more splits do not average these out.
    """

    figures: Figures
    labels: Mapping[int, NDArray[np.int64]]
    shared: bool = False

    def balanced(self, name: str, split: int) -> float:
        """Balanced accuracy of a candidate on a split, in points."""
        return 100 * float(_class_means(self.figures[name][split], self.labels[split])[0].mean())

    def common(self, one: str, other: str) -> list[int]:
        """Splits on which both were trained, ascending."""
        return sorted(set(self.figures[one]) & set(self.figures[other]))

    def differences(self, one: str, other: str) -> NDArray[np.float64]:
        """Balanced accuracy of `one` less that of `other`, in points, a number a common split."""
        return np.array([self.balanced(one, at) - self.balanced(other, at) for at in self.common(one, other)])

    def image_variance(self, one: str, other: str) -> float:
        """Variance of such a difference that comes from the finite number of scored images, mean over splits."""
        found = []
        for split in self.common(one, other):
            steps = self.figures[one][split].astype(float) - self.figures[other][split]
            found.append(1e4 * _variance_of_mean(steps, self.labels[split]))
        return float(np.mean(found)) if found else math.nan


def _class_means(
    values: NDArray[np.generic], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean of `values` by class, for classes that occur, and their counts."""
    _, number = np.unique(labels, return_inverse=True)
    counts = np.bincount(number)
    return np.bincount(number, weights=values.astype(float)) / counts, counts


def _variance_of_mean(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Variance of the mean of class means of `values`, images being drawn; a class of one image takes the others'."""
    means, counts = _class_means(values, labels)
    squares, _ = _class_means(values**2, labels)
    several = counts > 1
    if not several.any():
        return math.nan
    unbiased = (squares - means**2) * counts / np.maximum(counts - 1, 1)
    unbiased[~several] = unbiased[several].mean()
    return float((unbiased / counts).sum() / len(counts) ** 2)


def find_gain(table: Table, name: str, against: str, *, level: float) -> PairedGain:
    """The gain of a candidate over another; NaN where they were never trained on one split."""
    if name == against:
        return PairedGain(0.0, 0.0, 0.0, against, len(table.figures[name]))
    differences = table.differences(name, against)
    count = len(differences)
    if not count:
        return PairedGain(math.nan, math.nan, math.nan, against, 0)
    floor = table.image_variance(name, against)
    prior = max(_prior_variance(table, against), floor) if len(table.figures) > 1 else floor
    own = float(differences.var(ddof=1)) if count > 1 else 0.0
    freedom = count - 1 + PRIOR_WEIGHT
    variance = ((count - 1) * own + PRIOR_WEIGHT * prior) / freedom
    of_mean = variance / count + (floor * (count - 1) / count if table.shared else 0.0)
    half = float(stdtrit(freedom, (1 + level) / 2)) * math.sqrt(of_mean)
    mean = float(differences.mean())
    return PairedGain(mean, mean - half, mean + half, against, count)


def _prior_variance(table: Table, against: str) -> float:
    """Mean variance over splits of the differences of all candidates to `against`."""
    found, weights, floors = [], [], []
    for other in table.figures:
        if other == against:
            continue
        differences = table.differences(other, against)
        if len(differences):
            floors.append(table.image_variance(other, against))
        if len(differences) > 1:
            found.append(differences.var(ddof=1))
            weights.append(len(differences) - 1)
    if found:
        return float(np.average(found, weights=weights))
    return _UNKNOWN * float(np.mean(floors)) if floors else math.nan


def rank_candidates(table: Table) -> list[str]:
    """Names, best first: by the mean difference to one that was trained on every split."""
    most = max(len(splits) for splits in table.figures.values())
    whole = [name for name, splits in table.figures.items() if len(splits) == most]
    anchor = max(whole, key=lambda name: np.mean([table.balanced(name, at) for at in table.figures[name]]))

    def place(name: str) -> float:
        differences = table.differences(name, anchor)
        return float(differences.mean()) if len(differences) else -math.inf

    return sorted(table.figures, key=place, reverse=True)


ROUND, KEPT = 2, 3
"""Splits of a round, a pair of which each cuts what the other leaves whole; one of so many candidates goes on."""


USUAL = "trivialaugment@every_row"
"""What a person would do without asking."""
_ONE_STANDARD_ERROR = 0.6827  # confidence of an interval of one standard error to either side, of normal errors


def find_reference(table: Table, plain: Sequence[str]) -> str:
    """The one of `plain`, candidates that are not learned, that is used where nothing learned is.

    It is the best of them, or `USUAL` where that is within one standard error of the best (the rule of Breiman et al.,
    "Classification and regression trees", 1984, section 3.4.3): few splits rank neighbours by chance, and short
    trainings underrate heavy augmentation.
    """
    best = next(name for name in rank_candidates(table) if name in plain)
    if USUAL not in plain or best == USUAL:
        return best
    ahead = find_gain(table, best, USUAL, level=_ONE_STANDARD_ERROR)
    return USUAL if ahead.low <= 0 else best


def find_survivors(table: Table, alive: Sequence[str], is_learned: Callable[[str], bool]) -> list[str]:
    """Those of `alive` that go on to the next round, in their order: the better third, and the best of either kind.

    Without the best that is not learned, and the best that is, nothing could be said of learning.
    """
    ranked = [name for name in rank_candidates(table) if name in alive]
    kept = set(ranked[: max(2, -(-len(ranked) // KEPT))])
    for learned in (True, False):
        kept |= set([name for name in ranked if is_learned(name) == learned][:1])
    plain = [name for name in ranked if not is_learned(name)]
    if plain:
        kept.add(find_reference(table, plain))
    return [name for name in alive if name in kept]


def ends_round(split: int) -> bool:
    """Whether the worse half is dropped after this split."""
    return split % ROUND == 0
