"""One call for the whole study: measure class subsets, order them, draw the order, write the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.files import write_text
from gen_invariance.measure.invariance import measure_invariance
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.order import sets
from gen_invariance.order.analysis import AnalysisSettings, OrderStudy, analyse
from gen_invariance.order.backbone import MODES, SourceSettings, SourceTrainer
from gen_invariance.order.curriculum import Curriculum, climb
from gen_invariance.order.identity import cell_settings
from gen_invariance.order.measure import FitBackbone, Plan, measure_cells
from gen_invariance.order.separability import HEADS
from gen_invariance.order.sets import START, Subset
from gen_invariance.order.table import collect
from gen_invariance.report.diagram import write_diagram
from gen_invariance.report.order_page import write_order_page
from gen_invariance.run import Run, first_process_first, is_first_process, named_generator

CHOICES = ("list", "pairs", "size", "random", "head", "tail", "all")
_ACCURACY_SOURCES = 60  # beyond this many sources, accuracy on each other's classes is not computed


@dataclass(frozen=True)
class OrderSettings:
    """What is measured and how it is read.

    Attributes:
        choose: how subsets are chosen: "list" (`subsets`), "pairs" (all of size 2), "size" (all of size `size`),
            "random" (`count` of `smallest` to `largest` classes), "head" or "tail" (prefixes of the class sizes, of
            `sizes` classes), or "all" (the full lattice, at most 12 classes).
        subsets: for "list", each by class names or indices; for the others, further subsets to add.
        size, count, smallest, largest, sizes: see `choose`; largest and sizes default to what the classes allow.
        seeds: training seeds, the same for every subset.
        seed: of the choice of subsets, of the split between source and head images, and of the bootstraps.
        mode: "frozen" (heads on frozen features), "partial", "full" or "joint" (fine-tuning to each pair and
            target; costs one training for each).
        last_stages: for "partial".
        head: "ncm", "knn", "logistic" or "own" (binary sources only); other modes use their own head.
        shots: labelled samples of each class for heads; None for the whole pool.
        pool: images of each class kept for heads, which no source sees.
        fewest_seeds: subsets with fewer good seeds are left out.
        source: how backbones are trained.
        analysis: how the measurements are read.
        draws: transformations of each image for eKLD.
        invariance_images: test images of each class for eKLD.
        curriculum: also train up the longest chain against jumping to its top.
        device: "auto" (what accelerate finds) or a torch device.

    Raises:
        SettingsError: a value outside its range.
    """

    choose: str = "random"
    subsets: tuple[tuple[int | str, ...], ...] = ()
    size: int = 2
    count: int = 20
    smallest: int = 2
    largest: int | None = None
    sizes: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    seed: int = 0
    mode: str = "frozen"
    last_stages: int = 1
    head: str = "ncm"
    shots: int | None = None
    pool: int = 50
    fewest_seeds: int = 1
    source: SourceSettings = field(default_factory=SourceSettings)
    analysis: AnalysisSettings = field(default_factory=AnalysisSettings)
    draws: int = 5
    invariance_images: int = 20
    curriculum: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("sizes", "seeds"):  # a config gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "subsets", tuple(tuple(subset) for subset in self.subsets))
        for name, value, allowed in (
            ("choose", self.choose, CHOICES),
            ("mode", self.mode, MODES),
            ("head", self.head, HEADS),
        ):
            if value not in allowed:
                raise SettingsError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingsError(f"seeds are {list(self.seeds)}, expected one or more different numbers")
        for name in ("pool", "fewest_seeds", "draws", "invariance_images"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.shots is not None and self.shots < 1:
            raise SettingsError(f"shots is {self.shots}, expected at least 1, or None for the whole pool")


def choose_subsets(settings: OrderSettings, *, class_names: Sequence[str], counts: Tensor) -> tuple[Subset, ...]:
    """The sources that `settings` ask for; held-out classes are in none of the chosen ones.

    Raises:
        SettingsError: as `sets` says, or the same subset twice.
    """
    total = len(class_names)
    free = [c for c in range(total) if c not in settings.analysis.heldout_classes]
    largest = len(free) if settings.largest is None else settings.largest
    makers: dict[str, Callable[[], tuple[Subset, ...]]] = {
        "list": lambda: (),
        "pairs": lambda: sets.subsets_of_size(len(free), 2),
        "size": lambda: sets.subsets_of_size(len(free), settings.size),
        "all": lambda: sets.all_subsets(len(free)),
        "random": lambda: sets.random_subsets(
            len(free),
            settings.count,
            sizes=(settings.smallest, largest),
            generator=named_generator(settings.seed, "order subsets"),
        ),
        "head": lambda: sets.prefix_subsets(counts[free].tolist(), end="head", sizes=_sizes(settings, len(free))),
        "tail": lambda: sets.prefix_subsets(counts[free].tolist(), end="tail", sizes=_sizes(settings, len(free))),
    }
    made = [tuple(free[c] for c in subset) for subset in makers[settings.choose]()]
    smallest = 1 if settings.source.single else 2
    return sets.canonical_subsets([*made, *settings.subsets], class_names=class_names, smallest=smallest)


def _sizes(settings: OrderSettings, classes: int) -> tuple[int, ...]:
    return settings.sizes or tuple(range(2, classes + 1))


def run_order(
    train: ImageData,
    test: ImageData,
    folder: Path | str,
    settings: OrderSettings | None = None,
    *,
    nuisance: Nuisance | None = None,
    fit_backbone: FitBackbone | None = None,
    resume: bool = False,
    progress: bool = False,
    command: str = "",
) -> OrderStudy:
    """Measure which class subsets generalise to which, and write everything into `folder`.

    Written: `cells/` (features of each subset and seed), `order.json`, `order.svg/.png/.dot/.txt`, `subsets.csv`,
    `predictors.csv`, `order.html`. Measuring goes on where a killed run stopped.

    Args:
        train: images sources and heads are made from; all classes.
        test: images everything is measured on, at least 10 of each class for certain statements.
        folder: run folder.
        settings: see `OrderSettings`.
        nuisance: measure eKLD of each class under it as well, with a logistic head on frozen features.
        fit_backbone: (subset, seed) to a function from images to features, instead of the built-in training.
        resume: continue the run in `folder`.
        progress: show a bar.
        command: shown on the page.

    Raises:
        SettingsError, DataError, ShapeError: what does not fit, in one line.
    """
    settings = OrderSettings() if settings is None else settings
    _check_data(train, test)
    sources = choose_subsets(settings, class_names=train.class_names, counts=train.counts)
    _check_sources(sources, settings)
    place = _join(settings.device)
    device = place.device if settings.device == "auto" else torch.device(settings.device)
    # An "own" decision does not exist for the start, which has no head.
    subsets = sources if settings.head == "own" else (START, *sources)
    trainer = SourceTrainer(train, settings.source, pool=settings.pool, data_seed=settings.seed, device=device)
    config = cell_settings(settings, nuisance) | {"train": train.digest, "test": test.digest}
    run = _shared_run(Path(folder), settings.seed, config, resume=resume)
    plan = Plan(
        mode=settings.mode,
        last_stages=settings.last_stages,
        head_rows=trainer.head_rows,
        targets=_targets(sources, train.num_classes, settings.head),
        shots=settings.shots,
    )
    measure_cells(
        run.path,
        subsets=subsets,
        seeds=settings.seeds,
        train=trainer.train,
        test=test.to(device),
        plan=plan,
        fit_backbone=fit_backbone or trainer.fit,
        trainer=trainer if fit_backbone is None else None,
        invariance=_invariance(nuisance, test.to(device), settings) if nuisance is not None else None,
        progress=progress,
    )
    measured = collect(
        run.path,
        subsets=subsets,
        seeds=settings.seeds,
        class_names=train.class_names,
        targets=plan.targets,
        head=settings.head,
        mode=settings.mode,
        fewest_seeds=settings.fewest_seeds,
    )
    about = {"budget": settings.source.budget, "data": train.name, "seed_list": list(measured.seeds)}
    head = settings.head if settings.mode == "frozen" else "linear"
    study = analyse(measured, settings.analysis, mode=settings.mode, head=head, about=about)
    if PartialState().is_main_process:
        climbs = _climb(trainer, study, test.to(device), settings) if settings.curriculum else []
        write_study(run.path, study, title=f"Subset order of {train.name}", climbs=climbs, command=command)
    PartialState().wait_for_everyone()
    return study


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


def _join(device: str) -> PartialState:
    """This process's place among those that were launched together; without an accelerator accelerate must be told."""
    cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    return PartialState(cpu=cpu)


def _shared_run(folder: Path, seed: int, config: dict[str, Any], *, resume: bool) -> Run:
    """The main process opens the folder; the others join what it made."""
    with first_process_first():
        return Run(folder, kind="order", seed=seed, config=config, resume=resume or not is_first_process())


def _targets(sources: tuple[Subset, ...], num_classes: int, head: str) -> tuple[Subset, ...]:
    """All classes, and each source's classes while that stays cheap."""
    everything = tuple(range(num_classes))
    each = [s for s in sources if len(s) >= 2 and (len(s) == 2 or head in ("ncm", "knn"))]
    return tuple(dict.fromkeys([everything, *(each if len(sources) <= _ACCURACY_SOURCES else [])]))


def _invariance(nuisance: Nuisance, test: ImageData, settings: OrderSettings) -> Callable[..., np.ndarray]:
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


def _climb(trainer: SourceTrainer, study: OrderStudy, test: ImageData, settings: OrderSettings) -> list[Curriculum]:
    """Every seed up the longest chain of the estimated order, without the start."""
    order = study.order
    chain = [order.subsets[row] for row in order.estimated.longest_chain() if order.subsets[row] != START]
    if len(chain) < 2:
        return []
    threshold = order.threshold if len(order.pairs) == len(sets.class_pairs(test.num_classes)) else 0.9
    head = settings.head if settings.head != "own" else "ncm"
    return [climb(trainer, chain, test=test, seed=s, threshold=threshold, head=head) for s in study.measured.seeds]


def write_study(
    folder: Path, study: OrderStudy, *, title: str, climbs: Sequence[Curriculum] = (), command: str = ""
) -> Path:
    """Write the order, its diagram, the tables and the page; the path of the page."""
    folder = Path(folder)
    write_text(folder / "order.json", study.order.to_json() + "\n")
    drawn = write_diagram(folder, study.order, title=title)["svg"].read_bytes()
    write_text(folder / "subsets.csv", study.table.to_csv(index=False))
    write_text(folder / "predictors.csv", study.predictors.to_csv(index=False))
    return write_order_page(folder / "order.html", study, title=title, diagram=drawn, climbs=climbs, command=command)
