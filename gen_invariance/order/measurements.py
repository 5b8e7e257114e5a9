"""From measured cells to one table: hits of every seed and subset, target accuracy, invariance."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gen_invariance.errors import DataError, SettingsError
from gen_invariance.order.cells import Cell, Cells, Plan
from gen_invariance.order.separability import Features, pack_hits, pair_hits, pair_scores, target_accuracy, unpack_hits
from gen_invariance.order.sets import START, Subset, pair_columns, subset_name
from gen_invariance.order.settings import Head
from gen_invariance.run import named_generator


@dataclass(frozen=True)
class Measurements:
    """All that was measured, with the same seeds for every subset.

    Attributes:
        subsets: n, the start first when it was measured.
        seeds: R.
        hits: uint8 (R, n, M, ceil(K / 8)), packed.
        test_labels: int64 (M,).
        accuracy: float (R, n, m), class-balanced accuracy on each target.
        targets: m subsets.
        ekld: float (R, n, K) in nats, or None.
        images: int (n,), training images of each source (mean over seeds).
        class_names: K.
        cells: what was read, for `cached`.
        notes: what a reader must know: diverged cells, excluded subsets, seeds left out.
    """

    subsets: tuple[Subset, ...]
    seeds: tuple[int, ...]
    hits: np.ndarray
    test_labels: np.ndarray
    accuracy: np.ndarray
    targets: tuple[Subset, ...]
    ekld: np.ndarray | None
    images: np.ndarray
    class_names: tuple[str, ...]
    cells: Cells
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def all_classes(self) -> Subset:
        """The subset of all classes."""
        return tuple(range(self.num_classes))

    def cached(self, subset: Subset, seed: int) -> Cell:
        """The arrays of one cell."""
        cell = self.cells.read(subset, seed)
        if cell is None:
            raise DataError(f"the measurement of {subset_name(subset)} with seed {seed} is gone; measure it again")
        return cell

    def features(self, subset: Subset, seed: int) -> Features:
        """Cached features of one cell."""
        return cell_features(self.cached(subset, seed), self.num_classes)

    def on_target(self, target: Subset) -> np.ndarray:
        """Accuracy on `target`, (R, n).

        Raises:
            SettingsError: it was not measured.
        """
        if target not in self.targets:
            raise SettingsError(f"accuracy on {subset_name(target, self.class_names)} was not measured; add the target")
        return self.accuracy[:, :, self.targets.index(target)]

    def pair_tables(self) -> Iterator[np.ndarray]:
        """Pair separability of every seed, each (n, P), without the bootstrap."""
        labels = torch.from_numpy(self.test_labels)
        for row in self.hits:
            unpacked = torch.from_numpy(unpack_hits(row, self.num_classes))
            yield np.array([pair_scores(hits, labels, self.num_classes) for hits in unpacked])


def cell_features(cell: Cell, num_classes: int) -> Features:
    """The features of a cell; with the source's own two-class decision when it has one."""
    binary = "probabilities" in cell and cell["probabilities"].shape[1] == 2
    return Features(
        torch.from_numpy(cell["train_features"]).float(),
        torch.from_numpy(cell["train_labels"]),
        torch.from_numpy(cell["test_features"]).float(),
        torch.from_numpy(cell["test_labels"]),
        num_classes=num_classes,
        train_side=torch.from_numpy(cell["probabilities"][:, 1]) if binary else None,
        test_side=torch.from_numpy(cell["test_probabilities"][:, 1]).float() if binary else None,
        train_groups=torch.from_numpy(cell["train_groups"]) if "train_groups" in cell else None,
    )


def collect(
    cells: Cells, plan: Plan, *, subsets: Sequence[Subset], seeds: Sequence[int], head: Head, fewest_seeds: int = 1
) -> Measurements:
    """Read the cells of `subsets` and `seeds` and compute hits and target accuracy under `head`.

    Diverged or missing cells are never a zero: subsets with fewer than `fewest_seeds` good seeds are left out, the
    others are compared on the seeds that all of them have, and both are said in `notes`.

    Raises:
        DataError: fewer than one source, or no common seed, is left.
    """
    good = {subset: [seed for seed in seeds if _is_good(cells, subset, seed)] for subset in subsets}
    kept = tuple(subset for subset in subsets if len(good[subset]) >= fewest_seeds)
    common = tuple(seed for seed in seeds if all(seed in good[subset] for subset in kept))
    if not common or all(subset == START for subset in kept):
        missing = len(subsets) * len(seeds) - sum(map(len, good.values()))
        raise DataError(
            f"{missing} of {len(subsets) * len(seeds)} measurements are missing or diverged and no seed is common "
            "to enough subsets; lower the learning rate or add seeds"
        )
    hits, accuracy, ekld, images = [], [], [], []
    for seed, subset in itertools.product(common, kept):
        cell = cells.read(subset, seed)
        packed, on_targets = _answers(cell, plan, head=head, seed=seed)
        hits.append(packed)
        accuracy.append(on_targets)
        ekld.append(cell.get("ekld"))
        images.append(int(cell["images"]))
    shape = (len(common), len(kept))
    class_names = plan.train.class_names
    measured = all(value is not None for value in ekld)
    return Measurements(
        subsets=kept,
        seeds=common,
        hits=np.array(hits).reshape(*shape, *hits[0].shape),
        test_labels=cell["test_labels"],
        accuracy=np.array(accuracy).reshape(*shape, len(plan.targets)),
        targets=plan.targets,
        ekld=np.array(ekld).reshape(*shape, len(class_names)) if measured else None,
        images=np.array(images).reshape(shape).mean(axis=0).round().astype(int),
        class_names=class_names,
        cells=cells,
        notes=_missing_notes(good, kept, common, seeds=seeds, class_names=class_names),
    )


def _is_good(cells: Cells, subset: Subset, seed: int) -> bool:
    cell = cells.read(subset, seed, ("diverged",))
    return cell is not None and not bool(cell["diverged"])


def _missing_notes(
    good: dict[Subset, list[int]],
    kept: tuple[Subset, ...],
    common: tuple[int, ...],
    *,
    seeds: Sequence[int],
    class_names: Sequence[str],
) -> tuple[str, ...]:
    notes = []
    missing = [(subset, seed) for subset in good for seed in seeds if seed not in good[subset]]
    if missing:
        shown = ", ".join(f"{subset_name(subset, class_names)} seed {seed}" for subset, seed in missing[:8])
        notes.append(f"{len(missing)} diverged or missing runs: {shown}" + (", ..." if len(missing) > 8 else ""))
    notes += [f"{subset_name(s, class_names)} is left out: too few good seeds" for s in good if s not in kept]
    if len(common) < len(seeds):
        notes.append(f"subsets are compared on the {len(common)} of {len(seeds)} seeds that all of them have")
    return tuple(notes)


def _answers(cell: Cell, plan: Plan, *, head: Head, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed hits (M, ceil(K / 8)) and accuracy on each target (m,) of one cell."""
    if plan.mode != "frozen":
        return cell["hits"], cell["accuracy"]
    num_classes = plan.train.num_classes
    features = cell_features(cell, num_classes)
    hits = pair_hits(features, head, generator=named_generator(seed, "order logistic"))
    scores = pair_scores(hits, features.test_labels, num_classes)
    accuracy = []
    for target in plan.targets:
        if len(target) == 2:
            accuracy.append(float(scores[pair_columns(np.array([target]), num_classes)[0]]))
        else:
            accuracy.append(target_accuracy(features, target, head))
    return pack_hits(hits), np.array(accuracy)
