"""What happens along the order: gains per cover, falls on chains, pairs gained and lost against the start, and
whether a subset above another also carries more invariance to classes that neither saw.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import roc_auc_score

from gen_invariance.order.relation import SubsetOrder
from gen_invariance.order.sets import START, Subset


@dataclass(frozen=True)
class CoverGain:
    """One step up the order.

    Attributes:
        below, above: the two subsets.
        certain: whether the step is certain.
        pairs_gained: pairs that `above` separates and `below` does not.
        classes_added: classes of `above` minus classes of `below` (negative when a smaller source is above).
        images_added: likewise for training images.
        gain: mean difference of target accuracy over seeds.
        half_width: of its 95 % Student interval over paired seeds; NaN with one seed.
    """

    below: Subset
    above: Subset
    certain: bool
    pairs_gained: int
    classes_added: int
    images_added: int
    gain: float
    half_width: float

    @property
    def gain_per_image(self) -> float:
        """Accuracy gained for each further image; NaN when none was added."""
        return self.gain / self.images_added if self.images_added > 0 else math.nan


def cover_gains(order: SubsetOrder, accuracy: np.ndarray, *, images: np.ndarray) -> list[CoverGain]:
    """Gain of target accuracy, (R, n), at each cover of the estimated order; `images` (n,) as trained on."""
    found = []
    for below, above in order.covers(relation="estimated"):
        a, b = order.index(below), order.index(above)
        mean, half = paired_interval(accuracy[:, b] - accuracy[:, a])
        gained = len(order.gained(below, above))
        certain = bool(order.certain.leq[a, b])
        added = int(images[b] - images[a])
        found.append(CoverGain(below, above, certain, gained, len(above) - len(below), added, mean, half))
    return found


def paired_interval(differences: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of the Student interval of finite `differences`; NaN half-width below two of them."""
    values = differences[np.isfinite(differences)]
    if not len(values):
        return math.nan, math.nan
    if len(values) == 1:
        return float(values[0]), math.nan
    half = stats.t.isf((1 - level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


@dataclass(frozen=True)
class ChainFit:
    """How monotone a target's accuracy is on one maximal chain.

    Attributes:
        chain: subsets, bottom first.
        violations: share of steps at which accuracy falls.
        isotonic_r2: R^2 of the best non-decreasing fit; NaN for a constant accuracy.
        sufficient: first element that certainly generalises to the target, or None.
    """

    chain: tuple[Subset, ...]
    violations: float
    isotonic_r2: float
    sufficient: Subset | None


def chain_fits(order: SubsetOrder, accuracy: np.ndarray, *, target: Subset, limit: int = 50) -> list[ChainFit]:
    """Monotonicity of the seed-mean `accuracy`, (R, n), on maximal chains of at least two elements."""
    states = order.generalises_to(target)
    mean = accuracy.mean(axis=0)
    if not np.isfinite(mean).all():
        return []
    found = []
    for chain in order.chains(relation="estimated", limit=limit):
        if len(chain) < 2:
            continue
        rows = [order.index(subset) for subset in chain]
        values = mean[rows]
        spread = float(np.square(values - values.mean()).sum())
        misfit = float(np.square(values - isotonic_regression(values)).sum())
        enough = next((s for s, row in zip(chain, rows, strict=True) if states[row] == "certain"), None)
        falls = float((np.diff(values) < 0).mean())
        found.append(ChainFit(tuple(chain), falls, 1 - misfit / spread if spread > 0 else math.nan, enough))
    return found


@dataclass(frozen=True)
class StartComparison:
    """Pairs gained and lost against the untouched start; training is harmful somewhere iff a certain pair is lost.

    Attributes:
        subset: the source.
        gained, lost: pairs by the estimates.
        harmful: "certain" when the start being below is refuted, "no" when it is certain, else "undecided".
    """

    subset: Subset
    gained: int
    lost: int
    harmful: str


def against_start(order: SubsetOrder) -> list[StartComparison]:
    """Every source against the start; empty when the start was not measured."""
    if START not in order.subsets:
        return []
    start = order.index(START)
    words = {"certain": "no", "refuted": "certain", "undecided": "undecided"}
    return [
        StartComparison(
            subset,
            int((order.separated[row] & ~order.separated[start]).sum()),
            int((order.separated[start] & ~order.separated[row]).sum()),
            words[order.state(START, subset)],
        )
        for row, subset in enumerate(order.subsets)
        if subset != START
    ]


def nested_subsets(order: SubsetOrder) -> dict[str, list[tuple[Subset, Subset]] | int]:
    """Whether "more classes never hurts" holds: nested sources by whether they obey the estimated order.

    Returns:
        obey and disobey: pairs (smaller, larger) of sources with smaller inside larger; `refuted`: those disobeying
        with certainty; `edges_not_nested`: strict estimated edges between sources that are not nested.
    """
    nested = [(a, b) for a in order.subsets for b in order.subsets if START not in (a, b) and set(a) < set(b)]
    leq, index = order.estimated.leq, {subset: row for row, subset in enumerate(order.subsets)}
    obey = [(a, b) for a, b in nested if leq[index[a], index[b]]]
    disobey = [pair for pair in nested if pair not in set(obey)]
    edges = [(order.subsets[a], order.subsets[b]) for a, b in np.argwhere(order.estimated.strict)]
    loose = sum(START not in edge and not set(edge[0]) < set(edge[1]) for edge in edges)
    refuted = [(a, b) for a, b in disobey if order.refuted[index[a], index[b]]]
    return {"obey": obey, "disobey": disobey, "refuted": refuted, "edges_not_nested": int(loose)}


def seen_half_unseen(order: SubsetOrder) -> dict[str, float]:
    """Mean separability of pairs with both, one or no class in the source; NaN where there is none."""
    inside = np.stack([np.isin(order.pairs, subset).sum(axis=1) for subset in order.subsets if subset != START])
    rows = [row for row, subset in enumerate(order.subsets) if subset != START]
    values = order.estimate[rows]
    return {
        name: float(values[inside == count].mean()) if (inside == count).any() else math.nan
        for name, count in (("seen", 2), ("half_seen", 1), ("unseen", 0))
    }


def separated_against_accuracy(order: SubsetOrder, accuracy: np.ndarray) -> float:
    """Spearman correlation of the number of separated pairs with the seed-mean target accuracy, (R, n)."""
    counts, mean = order.separated_counts, accuracy.mean(axis=0)
    if len(np.unique(counts)) < 2 or len(np.unique(mean)) < 2:
        return math.nan
    return float(stats.spearmanr(counts, mean).statistic)


def agreement_with_accuracy(order: SubsetOrder, non_inferior: np.ndarray) -> float:
    """AUC of "share of the target's pairs that the source separates" for the tested accuracy relation, off-diagonal.

    `non_inferior` is bool (n, n) over the sources without the start, in order.
    """
    sources = [row for row, subset in enumerate(order.subsets) if subset != START]
    shares, truth = [], []
    for column, b in enumerate(sources):
        mask = np.isin(order.pairs, order.subsets[b]).all(axis=1)
        for line, a in enumerate(sources):
            if a != b and mask.any():
                shares.append(order.separated[a, mask].mean())
                truth.append(non_inferior[line, column])
    return float(roc_auc_score(truth, shares)) if len(set(truth)) == 2 else math.nan


@dataclass(frozen=True)
class InvarianceAlong:
    """Does a subset above another carry more invariance to the classes that neither saw?

    Attributes:
        steps: ordered pairs of sources compared (strict edges with at least one class unseen by both).
        more_invariant: share of them at which the upper one's eKLD is lower on those classes.
        mean_change: mean over steps of log(eKLD above / eKLD below); negative is more invariant.
        seed_half_width: half-width of its 95 % interval over seeds; NaN with one seed.
        spearman: of the number of separated pairs with eKLD on each source's unseen classes.
        spearman_within_size: the same within sources of equal size, weighted by their pairs.
    """

    steps: int
    more_invariant: float
    mean_change: float
    seed_half_width: float
    spearman: float
    spearman_within_size: float


def invariance_along(order: SubsetOrder, ekld: np.ndarray, *, relation: str = "estimated") -> InvarianceAlong:
    """Compare eKLD, (R, n, K) in nats with NaN where not measured, along strict edges of the order."""
    preorder = order.estimated if relation == "estimated" else order.certain
    classes = range(ekld.shape[2])
    changes = []
    for a, b in np.argwhere(preorder.strict):
        unseen = [c for c in classes if c not in order.subsets[a] and c not in order.subsets[b]]
        if unseen and START not in (order.subsets[a], order.subsets[b]):
            low, high = (ekld[:, row][:, unseen].mean(axis=1) for row in (a, b))
            changes.append(np.log(np.maximum(high, 1e-9) / np.maximum(low, 1e-9)))
    table = np.array(changes).reshape(len(changes), len(ekld))
    mean, half = paired_interval(table.mean(axis=0)) if len(changes) else (math.nan, math.nan)
    better = float((table.mean(axis=1) < 0).mean()) if len(changes) else math.nan
    return InvarianceAlong(len(changes), better, mean, half, *_unseen_correlation(order, ekld))


def _unseen_correlation(order: SubsetOrder, ekld: np.ndarray) -> tuple[float, float]:
    rows = [n for n, s in enumerate(order.subsets) if s != START and len(s) < ekld.shape[2]]
    unseen = [[c for c in range(ekld.shape[2]) if c not in order.subsets[n]] for n in rows]
    value = np.array([ekld[:, n][:, c].mean() for n, c in zip(rows, unseen, strict=True)])
    counts = order.separated_counts[rows].astype(float)
    sizes = np.array([len(order.subsets[n]) for n in rows])
    total = weight = 0.0
    for size in np.unique(sizes):
        part = sizes == size
        rho = _spearman(counts[part], value[part])
        if math.isfinite(rho):
            pairs = part.sum() * (part.sum() - 1) / 2
            total, weight = total + rho * pairs, weight + pairs
    return _spearman(counts, value), total / weight if weight else math.nan


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    keep = np.isfinite(first) & np.isfinite(second)
    if keep.sum() < 3:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(first[keep], second[keep]).statistic)
