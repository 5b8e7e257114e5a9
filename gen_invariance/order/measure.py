"""Measure every (subset, seed) once and keep it: features, targets, invariance; a killed run goes on where it was.

Each cell is one `.npz` file under `cells/`. With several processes (`accelerate launch`) the cells are dealt out;
only files are exchanged.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import positions_in_class
from gen_invariance.data.readers.arrays import DAMAGED
from gen_invariance.errors import SettingsError
from gen_invariance.files import atomic_write
from gen_invariance.order.backbone import FittedSource, SourceTrainer, in_batches
from gen_invariance.order.separability import Features
from gen_invariance.order.sets import START, Subset, subset_name
from gen_invariance.run import named_generator

FitBackbone = Callable[[Subset, int], Callable[[Tensor], Tensor]]
"""Maps (subset, seed) to a function from images (B, C, H, W) to features (B, D)."""

Invariance = Callable[[Callable[[Tensor], Tensor], int], np.ndarray]
"""Maps (predict, seed) to eKLD of each class, (K,) in nats; `predict` maps images to logits (B, K)."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What one cell consists of.

    Attributes:
        mode: "frozen", "partial", "full" or "joint".
        last_stages: stages that "partial" trains.
        head_rows: rows of the training set that heads may see, int64.
        targets: subsets that modes other than "frozen" adapt to, besides all pairs.
        shots: labelled samples of each class for heads, drawn by seed; None takes all of `head_rows`.
    """

    mode: str
    last_stages: int
    head_rows: Tensor
    targets: tuple[Subset, ...]
    shots: int | None = None


def cell_path(folder: Path, subset: Subset, seed: int) -> Path:
    """Where a cell is kept; subsets of any size give short, distinct names."""
    name = "start" if subset == START else hashlib.sha256(repr(subset).encode()).hexdigest()[:12]
    return Path(folder) / "cells" / f"{name}-seed{seed}.npz"


def measure_cells(
    folder: Path,
    *,
    subsets: Sequence[Subset],
    seeds: Sequence[int],
    train: ImageData,
    test: ImageData,
    plan: Plan,
    fit_backbone: FitBackbone,
    trainer: SourceTrainer | None = None,
    invariance: Invariance | None = None,
    progress: bool = False,
) -> int:
    """Measure all cells that are not there yet; how many this process measured.

    Args:
        folder: run folder; cells are written under it.
        subsets: including the start ().
        seeds: the same for every subset.
        train: labelled images heads may be fitted on (`plan.head_rows`).
        test: images that nothing is chosen on.
        plan: mode, targets, shots.
        fit_backbone: trains or loads one backbone.
        trainer: needed by modes other than "frozen".
        invariance: measures eKLD of a backbone with a logistic head, or None.
        progress: show a bar.

    Raises:
        SettingsError: a mode that needs a trainer has none.
    """
    if plan.mode != "frozen" and trainer is None:
        raise SettingsError(
            f"mode {plan.mode!r} fine-tunes backbones and needs the built-in trainer; use mode 'frozen'"
        )
    state = PartialState()
    jobs = [(seed, subset) for seed in seeds for subset in subsets]
    todo = [job for job in jobs if not _intact(cell_path(folder, job[1], job[0]))]
    state.wait_for_everyone()  # everyone has looked before anyone writes, so all deal alike
    mine = todo[state.process_index :: state.num_processes]
    for seed, subset in tqdm(mine, desc="subsets x seeds", disable=not progress, unit="backbone"):
        began = time.perf_counter()
        source = fit_backbone(subset, seed)
        cell = _measure_cell(source, seed, train, test, plan, trainer=trainer, invariance=invariance)
        cell |= {"subset": np.array(subset, dtype=np.int64), "seconds": np.array(time.perf_counter() - began)}
        path = cell_path(folder, subset, seed)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **cell)
        _LOG.info("measured %s seed %d in %.1f s", subset_name(subset), seed, float(cell["seconds"]))
    state.wait_for_everyone()
    return len(mine)


def _intact(path: Path) -> bool:
    """Whether a cell is there and whole; a damaged one is measured again."""
    try:
        with np.load(path, allow_pickle=False) as cell:
            return "seconds" in cell.files and cell["diverged"].shape == ()
    except (*DAMAGED, KeyError):
        return False


def _measure_cell(
    source: Callable[[Tensor], Tensor],
    seed: int,
    train: ImageData,
    test: ImageData,
    plan: Plan,
    *,
    trainer: SourceTrainer | None,
    invariance: Invariance | None,
) -> dict[str, np.ndarray]:
    rows = _shot_rows(train, plan, seed)
    features = Features(
        in_batches(source, train, rows).flatten(1),
        train.labels.cpu()[rows],
        in_batches(source, test).flatten(1),
        test.labels.cpu(),
        num_classes=train.num_classes,
        train_groups=None if train.groups is None else train.groups.cpu()[rows],
    )
    diverged = bool(getattr(source, "diverged", False)) or not features.usable
    cell = {
        "train_features": _small(features.train),
        "train_labels": features.train_labels.numpy(),
        "test_features": _small(features.test),
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
    if plan.mode != "frozen" and trainer is not None:
        cell |= _adapted(source, rows, test, plan, trainer=trainer, seed=seed)
    if invariance is not None:
        cell["ekld"] = np.asarray(invariance(logistic_predict(source, features, train.device), seed), dtype=float)
    return cell


def _shot_rows(train: ImageData, plan: Plan, seed: int) -> Tensor:
    if plan.shots is None:
        return plan.head_rows
    kept = []
    of_rows = train.labels.cpu()[plan.head_rows]
    if train.groups is not None:
        generator = named_generator(seed, "order shots", "groups")
        places = positions_in_class(of_rows, generator=generator, groups=train.groups.cpu()[plan.head_rows])
        return plan.head_rows[places < plan.shots]
    for label in of_rows.unique().tolist():
        rows = plan.head_rows[of_rows == label]
        order = torch.randperm(len(rows), generator=named_generator(seed, "order shots", label))
        kept.append(rows[order[: plan.shots]])
    return torch.cat(kept)


def _small(features: Tensor) -> np.ndarray:
    """Half precision where the values fit, which halves the cache."""
    half = features.half()
    return (half if torch.isfinite(half).all() or not torch.isfinite(features).all() else features).numpy()


def _adapted(
    source: Callable[[Tensor], Tensor], rows: Tensor, test: ImageData, plan: Plan, *, trainer: SourceTrainer, seed: int
) -> dict[str, np.ndarray]:
    """Hits and target accuracy after fine-tuning a copy of the backbone to every pair and every target."""
    classes = test.num_classes
    labels = test.labels.cpu()
    hits = torch.zeros(len(test), classes, dtype=torch.bool)
    pairs = [(i, j) for i in range(classes) for j in range(i + 1, classes)]
    accuracy = np.full(len(plan.targets), np.nan)
    for target in [*pairs, *plan.targets]:
        predict = trainer.adapt(source, target, rows, mode=plan.mode, last_stages=plan.last_stages, seed=seed)
        chosen = torch.isin(labels, torch.tensor(target)).nonzero().flatten()
        right = in_batches(predict, test, chosen) == labels[chosen]
        if len(target) == 2:
            other = torch.where(labels[chosen] == target[0], target[1], target[0])
            hits[chosen, other] = right
        if target in plan.targets:
            shares = [right[labels[chosen] == label].double().mean() for label in target]
            accuracy[plan.targets.index(target)] = float(torch.stack(shares).mean())
    return {"hits": np.packbits(hits.numpy(), axis=1), "accuracy": accuracy}


def logistic_predict(
    source: Callable[[Tensor], Tensor], features: Features, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Images to logits (B, K): an L2 logistic head over all classes on the frozen features."""
    from sklearn.linear_model import LogisticRegression

    inputs = features.train.float()
    mean, scale = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
    model = LogisticRegression(C=0.1, max_iter=300).fit(
        ((inputs - mean) / scale).numpy(), features.train_labels.numpy()
    )
    weight, bias = (torch.tensor(part, dtype=torch.float32) for part in (model.coef_, model.intercept_))
    if len(weight) == 1:  # two classes: scikit-learn keeps one row
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    mean, scale, weight, bias = (part.to(device) for part in (mean, scale, weight, bias))

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return (source(images).flatten(1) - mean) / scale @ weight.T + bias

    return predict
