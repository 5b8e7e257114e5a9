"""`run_order`: measure which class subsets generalise to which, order them, and write everything into a run folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.experiment.evaluate import resolve_nuisance
from gen_invariance.experiment.launch import Say, choose_device, prepare_on_device, say_nothing, shows_progress
from gen_invariance.experiment.settings import OrderRun
from gen_invariance.measure.invariance import measure_invariance
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.order import sets
from gen_invariance.order.analysis.curriculum import Curriculum, climb
from gen_invariance.order.analysis.study import OrderStudy, analyse
from gen_invariance.order.cells import Cells, FitBackbone, Plan, measure_cells
from gen_invariance.order.identity import describe_value
from gen_invariance.order.measurements import collect
from gen_invariance.order.sets import START, Subset
from gen_invariance.order.settings import Head, OrderSettings
from gen_invariance.order.source import SourceTrainer
from gen_invariance.records import Record, RecordWriter, provenance
from gen_invariance.report.order_page import write_study
from gen_invariance.run import Run, config_digest, is_first_process, named_generator

_ACCURACY_SOURCES = 60  # beyond this many sources, accuracy on each other's classes is not computed
_OF_THE_READING = {"analysis", "curriculum", "fewest_seeds"}
_OF_EACH_CELL = {"head", "choose", "subsets", "size", "count", "smallest", "largest", "sizes", "seeds"}


def run_order(
    settings: OrderRun | None = None,
    *,
    images: tuple[ImageData, ImageData] | None = None,
    nuisance: Nuisance | None = None,
    fit_backbone: FitBackbone | None = None,
    command: str = "",
    say: Say = say_nothing,
) -> OrderStudy:
    """Measure which class subsets generalise to which, order them and look along the order.

    Written into `settings.out`: `cells/` (features of each subset and seed), `order.json`, `order.svg/.png/.dot/.txt`,
    `subsets.csv`, `predictors.csv`, `order.html` and `records/`. Measuring goes on where a killed run stopped.

    Args:
        settings: see `OrderRun`.
        images: training images (sources and heads are made from them; all classes) and test images (at least 10 of
            each class for certain statements), in place of those of `settings.data`.
        nuisance: in place of `settings.nuisance`: eKLD of each class is measured under it, with a logistic head on
            frozen features.
        fit_backbone: (subset, seed) to a function from images to features, instead of the built-in training.
        command: shown on the page.
        say: is told what is unusual about the data.

    Raises:
        SettingsError, DataError, ShapeError: what does not fit, in one line.

    Example:
        >>> import torch
        >>> from gen_invariance import OrderRun, OrderSettings, load_source, run_order
        >>> digits = load_source("digits").train
        >>> images = digits.subset(torch.arange(900)), digits.subset(torch.arange(900, 1797))
        >>> order = OrderSettings(choose="list", subsets=((0, 1), (2, 3, 4)), seeds=(0,), pool=10, draws=1)
        >>> len(run_order(OrderRun(order=order, out=None, progress=False), images=images).order)
        3
    """
    settings = OrderRun() if settings is None else settings
    order, device = settings.order, choose_device(settings.device)
    data = settings.data.identity() if images is None else [part.digest for part in images]
    if images is None:
        prepared = prepare_on_device(
            settings.data, seed=settings.seed, device=settings.device, progress=settings.progress, say=say
        )
        images = prepared.train, prepared.test
        if settings.nuisance is not None:
            options, folder = settings.nuisance_options, settings.translator
            nuisance = resolve_nuisance(settings.nuisance, options, folder, prepared, device)
    train, test = images
    _check_data(train, test)
    sources = choose_subsets(order, class_names=train.class_names, counts=train.counts, seed=settings.seed)
    _check_sources(sources, order)
    # An "own" decision does not exist for the start, which has no head.
    subsets = sources if order.head == "own" else (START, *sources)
    PartialState(cpu=device.type == "cpu")  # joins the processes of a launcher
    trainer = SourceTrainer(train, order.source, pool=order.pool, data_seed=settings.seed, device=device)
    test = test.to(device)
    plan = Plan(
        train=trainer.train,
        test=test,
        head_rows=trainer.head_rows,
        targets=_list_targets(sources, train.num_classes, order.head),
        mode=order.mode,
        last_stages=order.last_stages,
        shots=order.shots,
        trainer=trainer if fit_backbone is None else None,
        invariance=None if nuisance is None else _measure_invariance(nuisance, test, order),
    )
    identity = describe_cells(settings, nuisance)
    config = {**identity, "train": train.digest, "test": test.digest}
    with Run.open(settings.out, kind="order", seed=settings.seed, config=config, resume=settings.resume) as run:
        cells = Cells(run.path)
        progress = shows_progress(settings.progress)
        fit = fit_backbone or trainer.fit
        measure_cells(cells, plan, subsets=subsets, seeds=order.seeds, fit_backbone=fit, progress=progress)
        study = _read_cells(cells, plan, settings, subsets)
        if is_first_process():
            if order.curriculum:
                study = replace(study, curricula=_climb(trainer, study, test, order))
            if run.path is not None:
                write_study(run.path, study, title=f"Subset order of {train.name}", command=command)
                analysis = describe_value({**asdict(order.analysis), "seed": settings.seed})
                digest = config_digest({"data": data, "cells": identity, "analysis": analysis})
                write_records(run.path / "records", study, config_digest=digest, data_digest=train.digest)
        PartialState().wait_for_everyone()
    return study


def _read_cells(cells: Cells, plan: Plan, settings: OrderRun, subsets: tuple[Subset, ...]) -> OrderStudy:
    """The study that the measured cells give."""
    order = settings.order
    measured = collect(
        cells, plan, subsets=subsets, seeds=order.seeds, head=order.head, fewest_seeds=order.fewest_seeds
    )
    return analyse(
        measured,
        order.analysis,
        mode=order.mode,
        head=order.head if order.mode == "frozen" else "linear",
        seed=settings.seed,
        about={"budget": order.source.budget, "data": plan.train.name, "seed_list": list(measured.seeds)},
    )


def choose_subsets(
    settings: OrderSettings, *, class_names: Sequence[str], counts: Tensor, seed: int = 0
) -> tuple[Subset, ...]:
    """The sources that `settings` ask for; held-out classes are in none of the chosen ones.

    Raises:
        SettingsError: as `sets` says, or the same subset twice.
    """
    free = [label for label in range(len(class_names)) if label not in settings.analysis.heldout_classes]
    sizes = settings.sizes or tuple(range(2, len(free) + 1))
    made: tuple[Subset, ...] = ()
    if settings.choose == "pairs":
        made = sets.subsets_of_size(len(free), 2)
    elif settings.choose == "size":
        made = sets.subsets_of_size(len(free), settings.size)
    elif settings.choose == "all":
        made = sets.all_subsets(len(free))
    elif settings.choose == "random":
        largest = len(free) if settings.largest is None else settings.largest
        generator = named_generator(seed, "order subsets")
        made = sets.random_subsets(len(free), settings.count, sizes=(settings.smallest, largest), generator=generator)
    elif settings.choose in ("head", "tail"):
        made = sets.prefix_subsets(counts[free].tolist(), end=settings.choose, sizes=sizes)
    chosen = [tuple(free[index] for index in subset) for subset in made]
    smallest = 1 if settings.source.single else 2
    return sets.canonical_subsets([*chosen, *settings.subsets], class_names=class_names, smallest=smallest)


def describe_cells(settings: OrderRun, nuisance: Nuisance | None) -> dict[str, Any]:
    """The settings behind every cell, JSON-able.

    Cells are kept by (subset, seed), so a run may be resumed with more subsets or seeds, or read again with another
    threshold or head. Modes other than "frozen" keep answers to chosen targets, so there all of these count.
    """
    left_out = _OF_THE_READING | _OF_EACH_CELL if settings.order.mode == "frozen" else _OF_THE_READING
    config = {key: describe_value(value) for key, value in asdict(settings.order).items() if key not in left_out}
    return {**config, "seed": settings.seed, "nuisance": describe_value(nuisance)}


def write_records(folder: Path, study: OrderStudy, *, config_digest: str, data_digest: str) -> None:
    """Append the study's figures to `folder`, one cell for each subset and training seed."""
    common = {"config_digest": config_digest, "data_digest": data_digest, **provenance()}
    writer = RecordWriter(folder)
    records = (Record(**figure, **common) for figure in list_figures(study))
    for _, cell in itertools.groupby(records, key=lambda record: record.cell):
        writer.write_cell(cell)


def list_figures(study: OrderStudy) -> Iterator[dict[str, Any]]:
    """Separated pairs, accuracy on all classes and eKLD of each class, for every subset and seed, for records."""
    measured, order = study.measured, study.order
    benchmark = f"order-{order.about.get('data', 'data')}-{order.mode}-{order.head}"
    accuracy = measured.on_target(measured.all_classes)
    columns = sets.pair_columns(order.pairs, measured.num_classes)
    for line, (seed, table) in enumerate(zip(measured.seeds, measured.pair_tables(), strict=True)):
        separated = (table[:, columns] >= order.threshold).sum(axis=1)
        for row, subset in enumerate(order.subsets):
            common = {"benchmark": benchmark, "method": order.name(subset), "seed": seed}
            yield {**common, "metric": "separated_pairs", "value": float(separated[row])}
            yield {**common, "metric": "balanced_accuracy", "value": float(accuracy[line, row])}
            if measured.ekld is not None:
                for index, (name, value) in enumerate(zip(order.class_names, measured.ekld[line, row], strict=True)):
                    yield {**common, "metric": "ekld", "value": float(value), "class_index": index, "class_name": name}


def _check_data(train: ImageData, test: ImageData) -> None:
    if train.class_names != test.class_names or train.images.shape[1:] != test.images.shape[1:]:
        raise ShapeError(
            f"train and test differ in classes or image shape ({train.num_classes} of {tuple(train.images.shape[1:])} "
            f"against {test.num_classes} of {tuple(test.images.shape[1:])}); read both from one source"
        )
    if train.num_classes < 2:
        raise SettingsError("a subset order needs at least two classes")
    train.require_every_class()
    test.require_every_class()


def _check_sources(sources: tuple[Subset, ...], settings: OrderSettings) -> None:
    if settings.head == "own" and any(len(source) != 2 for source in sources):
        raise SettingsError("head 'own' reuses a two-class decision; choose pairs as sources, or head 'ncm'")
    bad = [c for c in settings.analysis.heldout_classes if any(c in source for source in sources)]
    if bad:
        raise SettingsError(f"held-out class {bad[0]} is in a source; held-out pairs must be new to every source")


def _list_targets(sources: tuple[Subset, ...], num_classes: int, head: Head) -> tuple[Subset, ...]:
    """All classes, and each source's classes while that stays cheap."""
    targets = [tuple(range(num_classes))]
    if len(sources) <= _ACCURACY_SOURCES:
        targets += [s for s in sources if len(s) == 2 or (len(s) > 2 and head in ("ncm", "knn"))]
    return tuple(dict.fromkeys(targets))


def _measure_invariance(nuisance: Nuisance, test: ImageData, settings: OrderSettings) -> Callable[..., np.ndarray]:
    """EKLD by class on the first test images of each class; the same images and draws for every subset of a seed."""
    labels = test.labels.cpu()
    rows = [(labels == c).nonzero().flatten()[: settings.invariance_images] for c in range(test.num_classes)]
    part = test.subset(torch.cat(rows))

    def measure(predict: Callable[[Tensor], Tensor], seed: int) -> np.ndarray:
        scores = measure_invariance(
            predict,
            part.images,
            part.labels,
            nuisance,
            num_classes=test.num_classes,
            draws=settings.draws,
            generator=named_generator(seed, "order invariance"),
        )
        return scores.ekld.cpu().numpy()

    return measure


def _climb(
    trainer: SourceTrainer, study: OrderStudy, test: ImageData, settings: OrderSettings
) -> tuple[Curriculum, ...]:
    """Every seed up the longest chain of the estimated order, without the start."""
    order = study.order
    chain = [order.subsets[row] for row in order.estimated.longest_chain() if order.subsets[row] != START]
    if len(chain) < 2:
        return ()
    everywhere = len(order.pairs) == len(sets.class_pairs(test.num_classes))
    threshold = order.threshold if everywhere else settings.analysis.threshold
    head: Head = "ncm" if settings.head == "own" else settings.head
    return tuple(
        climb(trainer, chain, test=test, seed=seed, threshold=threshold, head=head) for seed in study.measured.seeds
    )
