"""From measured cells to one table: hits of every seed and subset, target accuracy, invariance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gen_invariance.errors import DataError, SettingsError
from gen_invariance.order.measure import cell_path
from gen_invariance.order.separability import Features, pack_hits, pair_hits, pair_scores, target_accuracy, unpack_hits
from gen_invariance.order.sets import START, Subset, class_pairs, subset_name
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
        folder: the run folder, for `cached`.
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
    folder: Path
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def cached(self, subset: Subset, seed: int) -> dict[str, np.ndarray]:
        """The arrays of one cell."""
        with np.load(cell_path(self.folder, subset, seed), allow_pickle=False) as cell:
            return {name: cell[name] for name in cell.files}

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


def cell_features(cell: dict[str, np.ndarray], num_classes: int) -> Features:
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
    folder: Path,
    *,
    subsets: Sequence[Subset],
    seeds: Sequence[int],
    class_names: Sequence[str],
    targets: Sequence[Subset],
    head: str,
    mode: str = "frozen",
    fewest_seeds: int = 1,
) -> Measurements:
    """Read the cells of `subsets` and `seeds` and compute hits and target accuracy under `head`.

    Diverged or missing cells are never a zero: subsets with fewer than `fewest_seeds` good seeds are left out, the
    others are compared on the seeds that all of them have, and both are said in `notes`.

    Raises:
        DataError: fewer than one source, or no common seed, is left.
    """
    good = {subset: [seed for seed in seeds if _is_good(cell_path(folder, subset, seed))] for subset in subsets}
    missing = [(subset, seed) for subset in subsets for seed in seeds if seed not in good[subset]]
    kept = tuple(subset for subset in subsets if len(good[subset]) >= max(fewest_seeds, 1))
    common = tuple(seed for seed in seeds if all(seed in good[subset] for subset in kept))
    if not common or all(subset == START for subset in kept):
        raise DataError(
            f"{len(missing)} of {len(subsets) * len(seeds)} measurements are missing or diverged and no seed is common "
            "to enough subsets; lower the learning rate or add seeds"
        )
    notes = _missing_notes(missing, kept, common, seeds=seeds, subsets=subsets, class_names=class_names)
    hits, accuracy, ekld, images = [], [], [], []
    labels = np.empty(0)
    for seed in common:
        row = []
        for subset in kept:
            with np.load(cell_path(folder, subset, seed), allow_pickle=False) as file:
                cell = {name: file[name] for name in file.files}
            packed, values = _answers(cell, targets, head=head, mode=mode, num_classes=len(class_names), seed=seed)
            row.append(packed)
            accuracy.append(values)
            ekld.append(cell.get("ekld"))
            images.append(int(cell["images"]))
            labels = cell["test_labels"]
        hits.append(row)
    shape = (len(common), len(kept))
    measured = all(value is not None for value in ekld)
    return Measurements(
        subsets=kept,
        seeds=common,
        hits=np.array(hits),
        test_labels=labels,
        accuracy=np.array(accuracy).reshape(*shape, len(targets)),
        targets=tuple(targets),
        ekld=np.array(ekld).reshape(*shape, len(class_names)) if measured else None,
        images=np.array(images).reshape(shape).mean(axis=0).round().astype(int),
        class_names=tuple(class_names),
        folder=Path(folder),
        notes=tuple(notes),
    )


def _is_good(path: Path) -> bool:
    if not path.exists():
        return False
    with np.load(path, allow_pickle=False) as cell:
        return not bool(cell["diverged"])


def _missing_notes(
    missing: list[tuple[Subset, int]],
    kept: tuple[Subset, ...],
    common: tuple[int, ...],
    *,
    seeds: Sequence[int],
    subsets: Sequence[Subset],
    class_names: Sequence[str],
) -> list[str]:
    notes = []
    if missing:
        shown = ", ".join(f"{subset_name(subset, class_names)} seed {seed}" for subset, seed in missing[:8])
        notes.append(f"{len(missing)} diverged or missing runs: {shown}" + (", ..." if len(missing) > 8 else ""))
    for subset in subsets:
        if subset not in kept:
            notes.append(f"{subset_name(subset, class_names)} is left out: too few good seeds")
    if len(common) < len(seeds):
        notes.append(f"subsets are compared on the {len(common)} of {len(seeds)} seeds that all of them have")
    return notes


def _answers(
    cell: dict[str, np.ndarray], targets: Sequence[Subset], *, head: str, mode: str, num_classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Packed hits (M, ceil(K / 8)) and accuracy on each target (m,) of one cell."""
    if mode != "frozen":
        return cell["hits"], cell["accuracy"]
    features = cell_features(cell, num_classes)
    hits = pair_hits(features, head, generator=named_generator(seed, "order logistic"))
    pairs = pair_scores(hits, features.test_labels, num_classes)
    column = {tuple(pair): place for place, pair in enumerate(class_pairs(num_classes).tolist())}
    accuracy = [
        pairs[column[target]] if len(target) == 2 else _large_target(features, target, head) for target in targets
    ]
    return pack_hits(hits), np.array(accuracy)


def _large_target(features: Features, target: Subset, head: str) -> float:
    return float("nan") if head == "own" else target_accuracy(features, target, head)


def pair_tables(measured: Measurements) -> Iterator[np.ndarray]:
    """Pair separability of every seed, each (n, P), without the bootstrap."""
    labels = torch.from_numpy(measured.test_labels)
    for row in measured.hits:
        tables = [
            pair_scores(torch.from_numpy(unpack_hits(cell, measured.num_classes)), labels, measured.num_classes)
            for cell in row
        ]
        yield np.array(tables)
