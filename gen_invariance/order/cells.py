"""Measure every (subset, seed) once and keep it: features, targets, invariance; a killed run goes on where it was.

Each cell is one `.npz` file under `cells/`, or an entry in memory. With several processes (`accelerate launch`) the
cells are shared out; only files are exchanged.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from gen_invariance.classifier.heads import fit_logistic
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import ranks_in_class
from gen_invariance.data.readers.arrays import DAMAGED
from gen_invariance.errors import SettingsError
from gen_invariance.files import atomic_write
from gen_invariance.order.separability import Features, pack_hits
from gen_invariance.order.sets import START, Subset, subset_name
from gen_invariance.order.settings import Mode
from gen_invariance.order.source import FittedSource, SourceTrainer, in_batches
from gen_invariance.run import named_generator

Cell = dict[str, np.ndarray]

FitBackbone = Callable[[Subset, int], Callable[[Tensor], Tensor]]
"""Maps (subset, seed) to a function from images (B, C, H, W) to features (B, D)."""

Invariance = Callable[[Callable[[Tensor], Tensor], int], np.ndarray]
"""Maps (predict, seed) to eKLD of each class, (K,) in nats; `predict` maps images to logits (B, K)."""

_LOG = logging.getLogger(__name__)


class Cells:
    """Measured cells by (subset, seed): files under `folder`, or in memory without a folder."""

    def __init__(self, folder: Path | str | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._memory: dict[tuple[Subset, int], Cell] = {}

    def path(self, subset: Subset, seed: int) -> Path:
        """The file of a cell; subsets of any size give short, distinct names."""
        name = "start" if subset == START else hashlib.sha256(repr(subset).encode()).hexdigest()[:12]
        return self.folder / "cells" / f"{name}-seed{seed}.npz"

    def read(self, subset: Subset, seed: int, names: Iterable[str] | None = None) -> Cell | None:
        """The arrays of one cell, or those of `names`; None where it is missing or damaged."""
        if self.folder is None:
            return self._memory.get((subset, seed))
        try:
            with np.load(self.path(subset, seed), allow_pickle=False) as file:
                return {name: file[name] for name in names or file.files if name in file.files}
        except (*DAMAGED, KeyError):
            return None

    def is_whole(self, subset: Subset, seed: int) -> bool:
        """Whether a cell is there and undamaged."""
        cell = self.read(subset, seed, ("seconds", "diverged"))
        return cell is not None and {"seconds", "diverged"} <= set(cell)

    def write(self, subset: Subset, seed: int, cell: Cell) -> None:
        """Keep one cell."""
        if self.folder is None:
            self._memory[subset, seed] = cell
            return
        with atomic_write(self.path(subset, seed)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **cell)


@dataclass(frozen=True)
class Plan:
    """What one cell consists of.

    Attributes:
        train: labelled images heads may be fitted on (`head_rows`).
        test: images that nothing is chosen on.
        head_rows: rows of the training set that heads may see, int64.
        targets: subsets whose accuracy is measured, besides all pairs.
        mode: how a backbone serves a target.
        last_stages: blocks that mode "partial" trains.
        shots: labelled samples of each class for heads, drawn by seed; None takes all of `head_rows`.
        trainer: needed by modes other than "frozen".
        invariance: measures eKLD of a backbone with a logistic head, or None.

    Raises:
        SettingsError: a mode that needs a trainer has none.
    """

    train: ImageData
    test: ImageData
    head_rows: Tensor
    targets: tuple[Subset, ...] = ()
    mode: Mode = "frozen"
    last_stages: int = 1
    shots: int | None = None
    trainer: SourceTrainer | None = None
    invariance: Invariance | None = None

    def __post_init__(self) -> None:
        if self.mode != "frozen" and self.trainer is None:
            raise SettingsError(
                f"mode {self.mode!r} fine-tunes backbones and needs the built-in trainer; use mode 'frozen'"
            )

    def rows(self, seed: int) -> Tensor:
        """The rows of `head_rows` that heads see under a seed, with groups one of each group first."""
        if self.shots is None:
            return self.head_rows
        labels = self.train.labels.cpu()[self.head_rows]
        if self.train.groups is not None:
            groups = self.train.groups.cpu()[self.head_rows]
            generator = named_generator(seed, "order shots", "groups")
            return self.head_rows[ranks_in_class(labels, generator=generator, groups=groups) < self.shots]
        kept = []
        for label in labels.unique().tolist():
            rows = self.head_rows[labels == label]
            order = torch.randperm(len(rows), generator=named_generator(seed, "order shots", label))
            kept.append(rows[order[: self.shots]])
        return torch.cat(kept)


def measure_cells(
    cells: Cells,
    plan: Plan,
    *,
    subsets: Sequence[Subset],
    seeds: Sequence[int],
    fit_backbone: FitBackbone,
    progress: bool = False,
) -> int:
    """Measure all cells that are not there yet; how many this process measured.

    Args:
        cells: where they are kept.
        plan: what one consists of.
        subsets: including the start ().
        seeds: the same for every subset.
        fit_backbone: trains or loads one backbone.
        progress: show a bar.
    """
    state = PartialState()
    jobs = itertools.product(seeds, subsets)
    missing = [(seed, subset) for seed, subset in jobs if not cells.is_whole(subset, seed)]
    state.wait_for_everyone()  # everyone has looked before anyone writes, so all share out alike
    alone = state.num_processes == 1 or cells.folder is None
    share = missing if alone else missing[state.process_index :: state.num_processes]
    for seed, subset in tqdm(share, desc="subsets x seeds", disable=not progress, unit="backbone"):
        began = time.perf_counter()
        cell = _measure_cell(fit_backbone(subset, seed), seed, plan)
        seconds = time.perf_counter() - began
        cells.write(subset, seed, {**cell, "subset": np.array(subset, dtype=np.int64), "seconds": np.array(seconds)})
        _LOG.info("measured %s seed %d in %.1f s", subset_name(subset), seed, seconds)
    state.wait_for_everyone()
    return len(share)


def extract_features(source: Callable[[Tensor], Tensor], train: ImageData, rows: Tensor, test: ImageData) -> Features:
    """Features of `rows` of `train` and of all of `test`, with their labels."""
    return Features(
        in_batches(source, train, rows).flatten(1),
        train.labels.cpu()[rows],
        in_batches(source, test).flatten(1),
        test.labels.cpu(),
        num_classes=train.num_classes,
        train_groups=None if train.groups is None else train.groups.cpu()[rows],
    )


def _measure_cell(source: Callable[[Tensor], Tensor], seed: int, plan: Plan) -> Cell:
    train, test, rows = plan.train, plan.test, plan.rows(seed)
    features = extract_features(source, train, rows, test)
    diverged = bool(getattr(source, "diverged", False)) or not features.usable
    cell: Cell = {
        "train_features": _shrink(features.train),
        "train_labels": features.train_labels.numpy(),
        "test_features": _shrink(features.test),
        "test_labels": features.test_labels.numpy(),
        "diverged": np.array(diverged),
        "images": np.array(int(getattr(source, "images", 0))),
    }
    if features.train_groups is not None:
        cell["train_groups"] = features.train_groups.numpy()
    if diverged:
        return cell
    if isinstance(source, FittedSource) and source.subset != START:
        cell["probabilities"] = in_batches(source.probabilities, train, rows).numpy()
        cell["test_probabilities"] = in_batches(source.probabilities, test).numpy().astype(np.float16)
    if plan.mode != "frozen":
        cell |= _adapt(source, rows, plan, seed=seed)
    if plan.invariance is not None:
        cell["ekld"] = np.asarray(plan.invariance(_logistic_predict(source, features), seed), dtype=float)
    return cell


def _shrink(features: Tensor) -> np.ndarray:
    """Half precision where the values fit, which halves the cache."""
    half = features.half()
    return (half if torch.isfinite(half).all() or not torch.isfinite(features).all() else features).numpy()


def _adapt(source: Any, rows: Tensor, plan: Plan, *, seed: int) -> Cell:
    """Hits and target accuracy after fine-tuning a copy of the backbone to every pair and every target."""
    classes, labels = plan.test.num_classes, plan.test.labels.cpu()
    hits = torch.zeros(len(labels), classes, dtype=torch.bool)
    accuracy = np.full(len(plan.targets), np.nan)
    for target in [*itertools.combinations(range(classes), 2), *plan.targets]:
        predict = plan.trainer.adapt(source, target, rows, mode=plan.mode, last_stages=plan.last_stages, seed=seed)
        asked = torch.isin(labels, torch.tensor(target)).nonzero().flatten()
        right = in_batches(predict, plan.test, asked) == labels[asked]
        if len(target) == 2:
            other = torch.where(labels[asked] == target[0], target[1], target[0])
            hits[asked, other] = right
        if target in plan.targets:
            shares = [right[labels[asked] == label].double().mean() for label in target]
            accuracy[plan.targets.index(target)] = float(torch.stack(shares).mean())
    return {"hits": pack_hits(hits), "accuracy": accuracy}


def _logistic_predict(source: Callable[[Tensor], Tensor], features: Features) -> Callable[[Tensor], Tensor]:
    """Images to logits (B, K): a logistic head over all classes on the frozen features."""
    head = fit_logistic(features.train.float(), features.train_labels, strength=0.1, balanced=False)

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return head.scores(source(images).flatten(1).cpu().float()).to(images.device)

    return predict
