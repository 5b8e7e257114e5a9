"""The subset order with honest uncertainty: certain, refuted or undecided.

Subset A is below B when B's backbone separates every class pair that A's does. Each cell (subset, pair) is yes
(lower bound at or above the threshold), no (upper bound below it) or undecided. Then A is *certainly* below B when
at every pair A is no or B is yes; this is *refuted* when at some pair A is yes and B is no; else it is undecided. The
certain relation is transitive whatever the cells are: if B is not yes at a pair, A is no there; if B is yes, it is
not no, hence what is above B is yes. With simultaneous bounds, certain is contained in the truth and the truth in
"not refuted", with probability at least 1 - alpha.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gen_invariance.errors import CheckpointError, SettingsError, ShapeError
from gen_invariance.files import read_regular
from gen_invariance.order.bootstrap import CellBounds
from gen_invariance.order.preorder import Preorder
from gen_invariance.order.sets import START, Subset, pair_mask, subset_name

_FORMAT = "gen_invariance subset order 1"
_ARRAYS = {"pairs": np.int64, "estimate": float, "yes": bool, "no": bool, "threshold": float, "chance": bool}
MIN_TEST_SAMPLES = 10


def inclusion(lower_set: np.ndarray, upper_set: np.ndarray) -> np.ndarray:
    """Whether row a of `lower_set` is contained in row b of `upper_set`; bool (n, P) each, bool (n, n) back.

    One matrix product counts, for all pairs of rows, the members of a that b lacks.
    """
    missing = lower_set.astype(np.float32) @ (~upper_set).astype(np.float32).T
    return missing == 0


@dataclass(frozen=True)
class SubsetOrder:
    """The measured order of class subsets.

    Attributes:
        subsets: n subsets (sorted class indices), the start as the empty tuple.
        pairs: int64 (P, 2), the pairs that count.
        estimate: float (n, P), measured separability.
        yes, no: bool (n, P), certain cells; never both.
        threshold: float (P,), in (0.5, 1].
        chance: bool (n, P), cells whose bounds contain one half.
        class_names: K names.
        mode, head: transfer mode and head; orders of different ones are never compared.
        about: JSON-able facts (seeds, alpha, budget, ...), printed with the order.
        notes: sentences a reader must see (one seed, degenerate threshold, refused classes).
    """

    subsets: tuple[Subset, ...]
    pairs: np.ndarray
    estimate: np.ndarray
    yes: np.ndarray
    no: np.ndarray
    threshold: np.ndarray
    chance: np.ndarray
    class_names: tuple[str, ...]
    mode: str = "frozen"
    head: str = "ncm"
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = (len(self.subsets), len(self.pairs))
        for name in ("estimate", "yes", "no", "chance"):
            if getattr(self, name).shape != shape:
                raise ShapeError(f"{name} is {getattr(self, name).shape}, expected (subsets, pairs) = {shape}")
        if (self.yes & self.no).any():
            raise SettingsError("a cell is marked both separated and not separated; bounds are inconsistent")
        if len(set(self.subsets)) < len(self.subsets):
            raise SettingsError("a subset is given twice; the order compares different subsets")

    @cached_property
    def separated(self) -> np.ndarray:
        """Sep: estimated separated pairs, bool (n, P)."""
        return self.estimate >= self.threshold

    @property
    def separated_counts(self) -> np.ndarray:
        """|Sep| of each subset, int64 (n,)."""
        return self.separated.sum(axis=1)

    @property
    def source_rows(self) -> list[int]:
        """Rows of all subsets but the start."""
        return [row for row, subset in enumerate(self.subsets) if subset != START]

    @property
    def sources(self) -> list[Subset]:
        """All subsets but the start."""
        return self._named(self.source_rows)

    @cached_property
    def certain(self) -> Preorder:
        """The relation that holds at the stated level."""
        leq = inclusion(~self.no, self.yes)
        np.fill_diagonal(leq, True)
        return Preorder(leq, height=self.separated_counts)

    @cached_property
    def estimated(self) -> Preorder:
        """Inclusion of the estimated separated pairs; contains `certain`."""
        return Preorder(inclusion(self.separated, self.separated), height=self.separated_counts)

    @cached_property
    def refuted(self) -> np.ndarray:
        """Pairs of subsets whose relation is certainly false, bool (n, n)."""
        refuted = self.yes.astype(np.float32) @ self.no.astype(np.float32).T > 0
        np.fill_diagonal(refuted, False)
        return refuted

    def state(self, below: Subset, above: Subset) -> str:
        """What is known of `below` being below `above`: "certain", "refuted" or "undecided"."""
        a, b = self.index(below), self.index(above)
        if self.certain.leq[a, b]:
            return "certain"
        return "refuted" if self.refuted[a, b] else "undecided"

    def index(self, subset: Sequence[int]) -> int:
        """Row of `subset`, whatever the order its classes are given in."""
        try:
            return self.subsets.index(tuple(sorted(subset)))
        except ValueError as error:
            raise SettingsError(f"{list(subset)} was not measured; it is not among the {len(self)} subsets") from error

    def __len__(self) -> int:
        return len(self.subsets)

    def _relation(self, relation: str) -> Preorder:
        if relation not in ("certain", "estimated"):
            raise SettingsError(f"relation is {relation!r}, expected 'certain' or 'estimated'")
        return self.certain if relation == "certain" else self.estimated

    def _named(self, indices: Sequence[int]) -> list[Subset]:
        return [self.subsets[index] for index in indices]

    def classes(self, *, relation: str = "certain") -> list[tuple[Subset, ...]]:
        """Subsets that separate the same pairs, together."""
        return [tuple(self._named(members)) for members in self._relation(relation).classes()]

    def covers(self, *, relation: str = "certain") -> list[tuple[Subset, Subset]]:
        """Hasse edges (below, above), one representative of each class."""
        return [(self.subsets[a], self.subsets[b]) for a, b in self._relation(relation).covers()]

    def maximal(self, *, relation: str = "certain") -> list[Subset]:
        """Subsets that nothing is strictly above."""
        return self._named(self._relation(relation).maximal())

    def minimal(self, *, relation: str = "certain") -> list[Subset]:
        """Subsets that nothing is strictly below."""
        return self._named(self._relation(relation).minimal())

    def chains(self, *, relation: str = "certain", limit: int = 100) -> list[list[Subset]]:
        """Maximal chains, bottom first, at most `limit`."""
        return [self._named(chain) for chain in self._relation(relation).chains(limit=limit)]

    def linear_extension(self, *, relation: str = "certain") -> list[Subset]:
        """All subsets in one canonical total order that respects the relation, fewest separated pairs first."""
        return self._named(self._relation(relation).linear_extension())

    def generalises_to(self, target: Sequence[int]) -> list[str]:
        """For each subset: "certain", "refuted", "undecided", or "trivial" for a target without a pair.

        A subset generalises to a target when it separates all of the target's pairs. This respects the order: what
        is above a subset that generalises generalises too.

        Raises:
            SettingsError: the target has a pair that is not among the measured ones.
        """
        target = tuple(sorted(set(target)))
        mask = pair_mask(target, self.pairs)
        if len(target) < 2:
            return ["trivial"] * len(self)
        if mask.sum() < len(target) * (len(target) - 1) // 2:
            raise SettingsError(
                f"target {list(target)} has pairs outside the measured ones; choose among those classes"
            )
        yes, no = self.yes[:, mask].all(axis=1), self.no[:, mask].any(axis=1)
        return ["certain" if y else "refuted" if n else "undecided" for y, n in zip(yes, no, strict=True)]

    def sufficient_for(self, target: Sequence[int]) -> list[Subset]:
        """The minimal subsets that certainly generalise to `target`: the cheapest answers to "train on what?"."""
        good = np.array([state == "certain" for state in self.generalises_to(target)])
        undercut = (self.certain.strict & good[:, None]).any(axis=0)
        return self._named(np.flatnonzero(good & ~undercut))

    def gained(self, below: Subset, above: Subset) -> np.ndarray:
        """Pairs that `above` separates and `below` does not (estimates), int64 (g, 2)."""
        return self.pairs[self.separated[self.index(above)] & ~self.separated[self.index(below)]]

    def counts(self) -> dict[str, int]:
        """Ordered pairs of different subsets: certain, refuted, undecided; and unordered incomparable ones."""
        off = ~np.eye(len(self), dtype=bool)
        certain, refuted = self.certain.leq & off, self.refuted & off
        return {
            "certain": int(certain.sum()),
            "refuted": int(refuted.sum()),
            "undecided": int((off & ~certain & ~refuted).sum()),
            "incomparable": int((refuted & refuted.T).sum() // 2),
        }

    def name(self, subset: Subset) -> str:
        """The subset by class names."""
        return subset_name(subset, self.class_names)

    def robust_edges(self, other: SubsetOrder) -> list[tuple[Subset, Subset]]:
        """Certain strict edges that are certain in `other` too, for example under another image budget.

        Raises:
            SettingsError: the orders differ in mode, head or pairs.
        """
        for what in ("mode", "head"):
            if getattr(self, what) != getattr(other, what):
                raise SettingsError(
                    f"orders of {what} {getattr(self, what)!r} and {getattr(other, what)!r} cannot be compared: "
                    "the order does not exist without its mode and head; measure both alike"
                )
        if not np.array_equal(self.pairs, other.pairs):
            raise SettingsError("the two orders are over different class pairs; measure both on the same pairs")
        shared = [subset for subset in self.subsets if subset in other.subsets]
        here, there = ([order.subsets.index(subset) for subset in shared] for order in (self, other))
        both = self.certain.strict[np.ix_(here, here)] & other.certain.strict[np.ix_(there, there)]
        return [(shared[low], shared[high]) for low, high in np.argwhere(both).tolist()]

    def to_json(self) -> str:
        """The order as JSON; `from_json` gives an equal object back."""
        arrays = {name: getattr(self, name).tolist() for name in _ARRAYS}
        rest = {name: getattr(self, name) for name in ("subsets", "class_names", "mode", "head", "about", "notes")}
        return json.dumps({"format": _FORMAT, **arrays, **rest})

    @staticmethod
    def from_json(text: str) -> SubsetOrder:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: not such a text.
        """
        try:
            read = json.loads(text)
            if read.pop("format") != _FORMAT:
                raise KeyError("another format")
            shape = (len(read["subsets"]), len(read["pairs"]))
            shapes = {"pairs": (-1, 2), "threshold": (-1,)}
            for name, kind in _ARRAYS.items():
                read[name] = np.array(read[name], dtype=kind).reshape(shapes.get(name, shape))
            read["subsets"] = tuple(tuple(subset) for subset in read["subsets"])
            for name in ("class_names", "notes"):
                read[name] = tuple(read[name])
            return SubsetOrder(**read)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"this is not a subset order ({error}); give the order.json that a run wrote"
            ) from error

    @staticmethod
    def load(path: Path | str) -> SubsetOrder:
        """Read `order.json`."""
        try:
            return SubsetOrder.from_json(read_regular(path).decode("utf-8", "replace"))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}; check the path") from error


def subset_order(
    bounds: CellBounds,
    *,
    subsets: Sequence[Subset],
    pairs: np.ndarray,
    threshold: float | np.ndarray,
    class_names: Sequence[str],
    test_counts: np.ndarray | None = None,
) -> SubsetOrder:
    """The three-valued order from cell bounds.

    Args:
        bounds: (n, P) estimates and bounds.
        subsets: n subsets, the start as ().
        pairs: int64 (P, 2).
        threshold: one number, or one for each pair, above 0.5 and at most 1.
        class_names: K names.
        test_counts: test samples of each class (K,); pairs with a class below 10 stay undecided.

    Raises:
        SettingsError: a threshold at or below chance or above 1.
    """
    threshold = np.broadcast_to(np.asarray(threshold, dtype=float), len(pairs)).copy()
    if len(threshold) and not (threshold.min() > 0.5 and threshold.max() <= 1):
        raise SettingsError(
            f"separation threshold is {threshold.min():g} to {threshold.max():g}, expected above 0.5 (chance) and at "
            "most 1; 0.95 is usual"
        )
    yes, no = bounds.lower >= threshold, bounds.upper < threshold
    notes = []
    if test_counts is not None:
        few = np.flatnonzero(np.asarray(test_counts) < MIN_TEST_SAMPLES)
        refused = np.isin(pairs, few).any(axis=1)
        if refused.any():
            yes, no = yes & ~refused, no & ~refused
            names = ", ".join(class_names[c] for c in few)
            notes.append(f"fewer than {MIN_TEST_SAMPLES} test samples, so no certain edge uses them: {names}")
    if bounds.seeds == 1:
        notes.append("seeds=1: bounds know of the test samples only; expect about a third of the edges to be noise")
    notes += _degenerate(bounds.estimate, threshold)
    return SubsetOrder(
        subsets=tuple(subsets),
        pairs=np.asarray(pairs, dtype=np.int64),
        estimate=np.asarray(bounds.estimate, dtype=float),
        yes=yes,
        no=no,
        threshold=threshold,
        chance=(bounds.lower <= 0.5) & (bounds.upper >= 0.5),
        class_names=tuple(class_names),
        about={"seeds": bounds.seeds, "alpha": bounds.alpha, "simultaneous": bounds.simultaneous},
        notes=tuple(notes),
    )


def _degenerate(estimate: np.ndarray, threshold: np.ndarray) -> list[str]:
    """A note where the threshold tells no subsets apart, with a better one."""
    separated = estimate >= threshold
    if not separated.size or (separated.any() and not separated.all()):
        return []
    grid = np.arange(0.505, 0.999, 0.01)
    kinds = [len(np.unique(estimate >= tau, axis=0)) for tau in grid]
    best = f"try a threshold of {grid[int(np.argmax(kinds))]:.3f}, which tells {max(kinds)} subsets apart"
    if not separated.any():
        return [f"degenerate: nothing separated; {best}"]
    return [f"degenerate: threshold too easy, everything separated; {best}"]
