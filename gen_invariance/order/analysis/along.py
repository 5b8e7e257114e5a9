"""What happens along the order: gains per cover, falls on chains, pairs gained and lost against the start, and
whether a subset above another also carries more invariance to classes that neither saw.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import roc_auc_score

from gen_invariance.order.analysis.scoring import mean_within, spearman
from gen_invariance.order.relation import SubsetOrder
from gen_invariance.order.sets import START, Subset, pair_mask
from gen_invariance.stats import mean_interval


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
    gains = []
    for below, above in order.covers(relation="estimated"):
        a, b = order.index(below), order.index(above)
        gain = mean_interval(accuracy[:, b] - accuracy[:, a])
        gains.append(
            CoverGain(
                below=below,
                above=above,
                certain=bool(order.certain.leq[a, b]),
                pairs_gained=len(order.gained(below, above)),
                classes_added=len(above) - len(below),
                images_added=int(images[b] - images[a]),
                gain=gain.mean,
                half_width=gain.half_width,
            )
        )
    return gains


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
    fits = []
    for chain in order.chains(relation="estimated", limit=limit):
        if len(chain) < 2:
            continue
        rows = [order.index(subset) for subset in chain]
        values = mean[rows]
        spread = float(np.square(values - values.mean()).sum())
        misfit = float(np.square(values - isotonic_regression(values)).sum())
        fits.append(
            ChainFit(
                chain=tuple(chain),
                violations=float((np.diff(values) < 0).mean()),
                isotonic_r2=1 - misfit / spread if spread > 0 else math.nan,
                sufficient=next((order.subsets[row] for row in rows if states[row] == "certain"), None),
            )
        )
    return fits


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
    harmful = {"certain": "no", "refuted": "certain", "undecided": "undecided"}
    return [
        StartComparison(
            subset,
            gained=len(order.gained(START, subset)),
            lost=len(order.gained(subset, START)),
            harmful=harmful[order.state(START, subset)],
        )
        for subset in order.sources
    ]


def nested_subsets(order: SubsetOrder) -> dict[str, list[tuple[Subset, Subset]] | int]:
    """Whether "more classes never hurts" holds: nested sources by whether they obey the estimated order.

    Returns:
        obey and disobey: pairs (smaller, larger) of sources with smaller inside larger; `refuted`: those disobeying
        with certainty; `edges_not_nested`: strict estimated edges between sources that are not nested.
    """
    obey, disobey, refuted = [], [], []
    edges_not_nested = 0
    for small, large in itertools.permutations(order.sources, 2):
        a, b = order.index(small), order.index(large)
        if not set(small) < set(large):
            edges_not_nested += int(order.estimated.strict[a, b])
        elif order.estimated.leq[a, b]:
            obey.append((small, large))
        else:
            disobey.append((small, large))
            if order.refuted[a, b]:
                refuted.append((small, large))
    return {"obey": obey, "disobey": disobey, "refuted": refuted, "edges_not_nested": edges_not_nested}


def seen_half_unseen(order: SubsetOrder) -> dict[str, float]:
    """Mean separability of pairs with both, one or no class in the source; NaN where there is none."""
    rows = order.source_rows
    inside = np.stack([np.isin(order.pairs, order.subsets[row]).sum(axis=1) for row in rows])
    values = order.estimate[rows]
    means = {}
    for name, count in (("seen", 2), ("half_seen", 1), ("unseen", 0)):
        of_kind = values[inside == count]
        means[name] = float(of_kind.mean()) if len(of_kind) else math.nan
    return means


def separated_against_accuracy(order: SubsetOrder, accuracy: np.ndarray) -> float:
    """Spearman correlation of the number of separated pairs with the seed-mean target accuracy, (R, n)."""
    return spearman(order.separated_counts, accuracy.mean(axis=0))


def agreement_with_accuracy(order: SubsetOrder, non_inferior: np.ndarray) -> float:
    """AUC of "share of the target's pairs that the source separates" for the tested accuracy relation, off-diagonal.

    `non_inferior` is bool (n, n) over the sources without the start, in order.
    """
    rows = order.source_rows
    shares, truth = [], []
    for column, target in enumerate(rows):
        mask = pair_mask(order.subsets[target], order.pairs)
        for line, source in enumerate(rows):
            if source != target and mask.any():
                shares.append(order.separated[source, mask].mean())
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


def invariance_along(order: SubsetOrder, ekld: np.ndarray) -> InvarianceAlong:
    """Compare eKLD, (R, n, K) in nats with NaN where not measured, along strict edges of the estimated order."""
    everything = set(range(ekld.shape[2]))
    changes = []
    for a, b in np.argwhere(order.estimated.strict):
        unseen = sorted(everything - set(order.subsets[a]) - set(order.subsets[b]))
        if unseen and START not in (order.subsets[a], order.subsets[b]):
            low, high = (np.maximum(ekld[:, row][:, unseen].mean(axis=1), 1e-9) for row in (a, b))
            changes.append(np.log(high / low))
    table = np.array(changes).reshape(len(changes), len(ekld))
    better = float((table.mean(axis=1) < 0).mean()) if changes else math.nan
    change = mean_interval(table.mean(axis=0) if changes else [])

    rows = [row for row in order.source_rows if len(order.subsets[row]) < len(everything)]
    values = np.array([ekld[:, row][:, sorted(everything - set(order.subsets[row]))].mean() for row in rows])
    counts = order.separated_counts[rows].astype(float)
    sizes = np.array([len(order.subsets[row]) for row in rows])
    return InvarianceAlong(
        steps=len(changes),
        more_invariant=better,
        mean_change=change.mean,
        seed_half_width=change.half_width,
        spearman=spearman(counts, values),
        spearman_within_size=mean_within(spearman, counts, values, sizes),
    )
