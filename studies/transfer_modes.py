"""Transfer modes compared: a backbone trained on source classes moves to classes it has never seen.

The classes are split once; each seed draws its own images and initial weights, trains on the source classes and, for
each size of the target set, moves to the held-out classes in every mode. All arms see the same target images and take
the same number of steps; joint training shares its steps with the source.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.heads import HEADS, fit_head
from gen_invariance.classifier.joint import TaskLoss
from gen_invariance.classifier.losses import build_loss
from gen_invariance.classifier.model import Classifier, cache_features
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.data.images import ImageData
from gen_invariance.errors import RunError
from gen_invariance.experiment.train import resolve_plan
from gen_invariance.jobs import run_jobs
from gen_invariance.measure.accuracy import AccuracyScores, measure_accuracy, score_predictions
from gen_invariance.records import Cell, Record, RecordWriter, finished_cells, load_records, provenance
from gen_invariance.run import Run, config_digest, named_generator
from studies.transfer_effects import best_baseline, transfer_effect

SCRATCH, UNTOUCHED = "scratch", "untouched start"
"""The two baselines: training from nothing, and nearest class means on the source's features as they are."""


@dataclass(frozen=True)
class TransferComparison:
    """What is compared.

    Attributes:
        name: of the data, for records.
        source_classes: how many classes the source has; the others are the target's.
        source_images: images of each source class.
        target_images: the target sizes, images a class.
        test_images: test images a class.
        source_epochs: of training the source.
        steps: of every arm on the target.
        batch_size: of all training.
        learning_rate: of the source, of scratch, and of the head in every mode.
        backbone_lr_scale: the backbone's rate in the transfer modes, in parts of the head's.
        seeds: how many.
    """

    name: str
    source_classes: int
    source_images: int = 200
    target_images: tuple[int, ...] = (5, 20, 100)
    test_images: int = 100
    source_epochs: int = 10
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 0.05
    backbone_lr_scale: float = 0.2
    seeds: int = 3

    def plans(self) -> dict[str, TransferPlan]:
        """The transfer modes."""
        common = {"lr": self.learning_rate, "backbone_lr_scale": self.backbone_lr_scale}
        return {
            "frozen": TransferPlan("frozen", **common),
            "partial": TransferPlan("partial", last_stages=1, **common),
            "full": TransferPlan("full", **common),
            "joint": TransferPlan("joint", **common),
            "auto": TransferPlan("auto", **common),
        }

    @property
    def digest(self) -> str:
        """Of all settings but the seeds."""
        return config_digest({key: value for key, value in asdict(self).items() if key != "seeds"})

    def training(self, images: int, *, epochs: int | None = None) -> TrainSettings:
        """SGD with a cosine over `epochs`, or over `self.steps` steps on so many images."""
        epochs = epochs or -(-self.steps // -(-images // self.batch_size))
        return TrainSettings(
            epochs=epochs, batch_size=self.batch_size, learning_rate=self.learning_rate, schedule="cosine",
            warmup=0, log_every=epochs, checkpoint_every=epochs,
        )  # fmt: skip


def measure_missing(
    comparison: TransferComparison,
    arms: Iterable[str],
    work: Path,
    measure: Callable[[int, int, str], tuple[AccuracyScores, tuple[str, ...], str]],
    *,
    say: Callable[[str], None],
) -> pd.DataFrame:
    """All records of the comparison, those that `work` lacks measured now.

    Args:
        comparison: gives seeds and sizes.
        arms: what is compared.
        work: folder.
        measure: (seed, images a class, arm) to scores, class names and a remark.
        say: gets a line for each cell.

    Raises:
        RunError: a cell failed.
    """
    arms = list(arms)
    writer, done = RecordWriter(work / "records"), finished_cells(work / "records")
    cells = [
        Cell(_name_benchmark(comparison, images), comparison.digest, arm, seed)
        for seed in range(comparison.seeds)
        for images in comparison.target_images
        for arm in arms
    ]
    sizes = {_name_benchmark(comparison, images): images for images in comparison.target_images}

    def carry_out(cell: Cell, _: str | None) -> str:
        images = sizes[cell.benchmark]
        scores, names, remark = measure(cell.seed, images, cell.method)
        writer.write_cell(_make_records(cell, scores, names, images=images))
        return f"seed {cell.seed}, {images} images a class, {cell.method}: accuracy {scores.balanced:.3f} {remark}"

    for ended in run_jobs([cell for cell in cells if cell not in done], carry_out, needs=lambda cell: ()):
        if ended.error is not None:
            raise RunError(f"{ended.job}: {ended.error}")
        say(ended.answer)
    frame = load_records(work / "records")
    return frame[frame["config_digest"] == comparison.digest]


def run_transfer(
    comparison: TransferComparison,
    train: ImageData,
    test: ImageData,
    work: Path | str,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Measure what `work` lacks of the comparison and return all its records; see the module for what is done."""
    work = Path(work)

    @functools.lru_cache(maxsize=1)
    def prepare_seed(seed: int) -> _Seed:
        return _Seed(comparison, train, test, work / f"seed-{seed}", seed=seed)

    def measure(seed: int, images: int, arm: str) -> tuple[AccuracyScores, tuple[str, ...], str]:
        prepared = prepare_seed(seed)
        scores, remark = prepared.measure(arm, images)
        return scores, prepared.target_names, remark

    return measure_missing(comparison, [SCRATCH, UNTOUCHED, *comparison.plans()], work, measure, say=say)


class _Seed:
    """Source and target of one seed, the source trained."""

    def __init__(
        self, comparison: TransferComparison, train: ImageData, test: ImageData, folder: Path, *, seed: int
    ) -> None:
        self.comparison, self.folder, self.seed = comparison, folder, seed
        order = torch.randperm(train.num_classes, generator=named_generator(0, "transfer", "classes"))
        source, target = order[: comparison.source_classes], order[comparison.source_classes :]
        self.source = take(train, source, comparison.source_images, seed=seed)
        self.pool = take(train, target, max(comparison.target_images), seed=seed)
        self.test = take(test, target, comparison.test_images, seed=seed)
        self.target_names = self.pool.class_names
        settings = comparison.training(len(self.source), epochs=comparison.source_epochs)
        self.backbone = fitted(
            new_classifier(self.source, seed=seed), self.source, settings, folder / "source", seed=seed
        )

    def measure(self, arm: str, images: int) -> tuple[AccuracyScores, str]:
        """Scores on the target's test images of `arm` with so many target images a class; and a remark."""
        target = take(self.pool, torch.arange(self.pool.num_classes), images, seed=self.seed)
        if arm == UNTOUCHED:
            return head_scores("nearest_mean", features_of(self.backbone, target), target.labels,
                               features_of(self.backbone, self.test), self.test), ""  # fmt: skip
        settings, folder = self.comparison.training(len(target)), self.folder / f"{arm}-{images}"
        if arm == SCRATCH:
            return scratch_scores(self.comparison, target, self.test, folder, seed=self.seed), ""
        if arm == "joint":
            return self._joint(target, folder), ""
        model = new_classifier(target, seed=self.seed, start=self.backbone)
        plan = resolve_plan(self.comparison.plans()[arm], model, target)
        model = fitted(model, target, settings, folder, seed=self.seed, plan=plan)
        return _score(model, self.test), plan.reason

    def _joint(self, target: ImageData, folder: Path) -> AccuracyScores:
        """Source and target together, classes drawn evenly, each task under its own part of the head."""
        both = ImageData(
            torch.cat([self.source.images, target.images]),
            torch.cat([self.source.labels, target.labels + self.source.num_classes]),
            (*(f"source {name}" for name in self.source.class_names), *target.class_names),
        )
        task_of = (torch.arange(both.num_classes) >= self.source.num_classes).long()
        per_epoch = -(-len(both) // self.comparison.batch_size)
        epochs = max(1, round(self.comparison.steps / per_epoch))
        settings = replace(self.comparison.training(len(both), epochs=epochs), sampling="class_balanced")
        model = fitted(
            new_classifier(both, seed=self.seed, start=self.backbone), both, settings, folder, seed=self.seed,
            plan=self.comparison.plans()["joint"], loss=TaskLoss(both.counts, task_of=task_of),
        )  # fmt: skip
        return _score(lambda images: model(images)[:, self.source.num_classes :], self.test)


def new_classifier(data: ImageData, *, seed: int, start: Classifier | None = None) -> Classifier:
    """A small classifier for `data` from nothing, or with the backbone and normalisation of `start`."""
    model = build_classifier(
        "small_conv", num_classes=data.num_classes, channels=data.images.shape[1],
        generator=named_generator(seed, "classifier"),
    )  # fmt: skip
    if start is None:
        model.set_normalisation(*data.mean_std())
    else:
        kept = {key: value for key, value in start.state_dict().items() if not key.startswith("head.")}
        model.load_state_dict(kept, strict=False)
    return model


def fitted(
    model: Classifier,
    data: ImageData,
    settings: TrainSettings,
    folder: Path,
    *,
    seed: int,
    plan: TransferPlan | None = None,
    loss: nn.Module | None = None,
) -> Classifier:
    """`model` trained on `data` in the run folder `folder`; a run that was stopped there goes on."""
    loss = loss or build_loss("cross_entropy", counts=data.counts)
    with Run.open(folder, kind="transfer", seed=seed, config=settings.identity(), resume=True) as run:
        return fit_classifier(model, data, settings, loss=loss, plan=plan, out=run, progress=False)


def scratch_scores(
    comparison: TransferComparison, data: ImageData, test: ImageData, folder: Path, *, seed: int
) -> AccuracyScores:
    """Scores on `test` of the small classifier trained on `data` alone."""
    model = fitted(new_classifier(data, seed=seed), data, comparison.training(len(data)), folder, seed=seed)
    return _score(model, test)


def _score(model: Callable[[Tensor], Tensor], test: ImageData) -> AccuracyScores:
    return measure_accuracy(model, test.images, test.labels, num_classes=test.num_classes)


def take(data: ImageData, classes: Tensor, images: int, *, seed: int) -> ImageData:
    """`images` images of each of `classes`, drawn by `seed`, the classes renumbered in the order given."""
    rows = []
    for label in classes.tolist():
        of_class = (data.labels == label).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=named_generator(seed, "take", data.class_names[label]))
        rows.append(of_class[order[:images]])
    return data.subset(torch.cat(rows)).select_classes(classes)


def features_of(model: Classifier, data: ImageData) -> Tensor:
    """Features (N, D) of `data` under `model` as it is."""
    state = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    TransferPlan("frozen").apply(model.eval())
    features = cache_features(model, data.images)
    for parameter, trains in state:
        parameter.requires_grad_(trains)
    return features


def head_scores(head: str, features: Tensor, labels: Tensor, test_features: Tensor, test: ImageData) -> AccuracyScores:
    """Accuracy on `test` of the head of `heads.HEADS` fitted on stored features."""
    fitted = fit_head(head, features, labels)
    return score_predictions(fitted.classes[fitted.scores(test_features).argmax(1)], test.labels, test.num_classes)


def run_pretrained(
    name: str,
    train: ImageData,
    test: ImageData,
    work: Path | str,
    *,
    backbone: str,
    weights: str,
    input_size: int,
    comparison: TransferComparison,
    say: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Heads on the frozen features of a pretrained backbone against a small network trained from scratch.

    Each image passes the backbone once, whatever the number of heads, seeds and sizes.
    """
    everyone = torch.arange(train.num_classes)
    pool = take(train, everyone, 2 * max(comparison.target_images), seed=0)
    test = take(test, everyone, comparison.test_images, seed=0)
    model = build_classifier(
        backbone, num_classes=train.num_classes, channels=train.images.shape[1], weights=weights, input_size=input_size
    )
    say(f"{backbone}: features of {len(pool) + len(test)} images at {input_size} pixels")
    features, test_features = features_of(model, pool), features_of(model, test)

    def measure(seed: int, images: int, arm: str) -> tuple[AccuracyScores, tuple[str, ...], str]:
        rows = _few(pool, images, seed=seed)
        few = pool.subset(rows)
        if arm == SCRATCH:
            scores = scratch_scores(comparison, few, test, Path(work) / f"scratch-{images}-{seed}", seed=seed)
        else:
            scores = head_scores(arm, features[rows], few.labels, test_features, test)
        return scores, test.class_names, name

    return measure_missing(comparison, [SCRATCH, *HEADS], Path(work), measure, say=say)


def _few(pool: ImageData, images: int, *, seed: int) -> Tensor:
    """Rows of `images` images of each class of `pool`."""
    rows = []
    for label in range(pool.num_classes):
        own = (pool.labels == label).nonzero()[:, 0]
        rows.append(own[torch.randperm(len(own), generator=named_generator(seed, "few", label))[:images]])
    return torch.cat(rows)


def effects(frame: pd.DataFrame, baselines: Iterable[str]) -> pd.DataFrame:
    """Three-state effect of every arm against each baseline and against the better of them, and its classes.

    Returns:
        One row an arm and benchmark: benchmark, method, against, difference (mean over seeds), half_width, state, and
        helps, harms, undecided: how many classes are in each state (Holm over the classes).
    """
    rows = []
    for benchmark, part in frame.groupby("benchmark", sort=False):
        totals = part[part["metric"] == "balanced_accuracy"].pivot_table("value", "method", "seed", sort=False)
        classes = part[part["metric"] == "accuracy"].set_index(["method", "class_index", "seed"])["value"].unstack()
        names = [name for name in baselines if name in totals.index]
        for method in totals.index.difference(names, sort=False):
            against: Mapping[str, tuple] = {
                name: (totals.loc[name].to_numpy(), classes.loc[name].to_numpy()) for name in names
            }
            if len(names) > 1:
                against = {
                    **against,
                    "better of both": tuple(
                        best_baseline(dict(enumerate(values))) for values in zip(*against.values(), strict=True)
                    ),
                }
            for name, (total, by_class) in against.items():
                whole = transfer_effect(totals.loc[method].to_numpy(), total)
                each = transfer_effect(classes.loc[method].to_numpy(), by_class, holm=True)
                rows.append(
                    {
                        "benchmark": benchmark,
                        "method": method,
                        "against": name,
                        "difference": whole.difference.mean,
                        "half_width": whole.difference.half_width,
                        "state": str(whole.state),
                        **{word: int(np.sum(each.state == word)) for word in ("helps", "harms", "undecided")},
                    }
                )
    return pd.DataFrame(rows)


def _name_benchmark(comparison: TransferComparison, images: int) -> str:
    return f"{comparison.name}, {images} images a class"


def _make_records(cell: Cell, scores: AccuracyScores, names: tuple[str, ...], *, images: int) -> list[Record]:
    common = {**cell._asdict(), **provenance()}
    by_class = [
        Record(metric="accuracy", value=value, class_name=name, class_index=label, class_count=images, **common)
        for label, (name, value) in enumerate(zip(names, scores.accuracy.tolist(), strict=True))
    ]
    return [Record(metric="balanced_accuracy", value=scores.balanced, **common), *by_class]
