"""`run_compare`: is a classifier better for having been trained on an augmented copy of a set?

The same plain training on both, as many updates each, classes drawn evenly and every row augmented in both, so that
neither more steps nor re-sampling nor what anybody gets for free is taken for a gain. Seeds are paired: initial weights
are shared.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from gen_invariance.classifier.train import fit_classifier
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import shot_groups
from gen_invariance.errors import DataError, SettingsError
from gen_invariance.experiment.build import build_model
from gen_invariance.experiment.evaluate import make_records
from gen_invariance.experiment.launch import Say, choose_device, say_nothing
from gen_invariance.experiment.settings import ClassifierSettings, CompareRun
from gen_invariance.export.formats.base import Format, open_format
from gen_invariance.export.inputs import read_test_images, read_training_images
from gen_invariance.files import write_json
from gen_invariance.measure.accuracy import measure_accuracy
from gen_invariance.nuisance.build import build_augmentation
from gen_invariance.records import RecordWriter, finished_cells, load_records, provenance
from gen_invariance.referee.train import make_train_settings
from gen_invariance.run import Run, config_digest
from gen_invariance.stats import PairedDifference, paired_difference

ARMS = ("original", "augmented")
_METRICS = {"balanced_accuracy": "balanced", "many_accuracy": "many-shot", "few_accuracy": "few-shot"}


@dataclass(frozen=True)
class Comparison:
    """What `run_compare` found.

    Attributes:
        folder: of the run, with records/ and compare.json.
        means: of each metric ("balanced_accuracy", "many_accuracy", "few_accuracy") the mean accuracy on the original
            and on the augmented set, in [0, 1].
        differences: augmented minus original, over seeds, in [0, 1].
    """

    folder: Path
    means: Mapping[str, tuple[float, float]]
    differences: Mapping[str, PairedDifference]

    @property
    def word(self) -> str:
        """The verdict: "better" or "worse" where the whole interval says so, else "no difference shown"."""
        gain = self.differences["balanced_accuracy"]
        return "better" if gain.low > 0 else "worse" if gain.high < 0 else "no difference shown"

    def lines(self) -> list[str]:
        """For a terminal, in points."""
        lines = [f"{self.word}: accuracy on the test images in %, trained on the original -> on the augmented set"]
        for metric, (before, after) in self.means.items():
            gain = self.differences[metric]
            lines.append(
                f"  {_METRICS[metric]}: {100 * before:.1f} -> {100 * after:.1f}, difference {100 * gain.mean:+.1f} ± "
                f"{100 * gain.half_width:.1f} ({gain.count} seeds, 95 %)"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain numbers in points."""
        found = {}
        for metric, (before, after) in self.means.items():
            gain = self.differences[metric]
            numbers = (before, after, gain.mean, gain.low, gain.high)
            names = ("original", "augmented", "difference", "low", "high")
            found[metric] = {name: round(100 * float(number), 4) for name, number in zip(names, numbers, strict=True)}
        return {"verdict": self.word, "seeds": self.differences["balanced_accuracy"].count, "points": found}


@dataclass(frozen=True)
class _Sets:
    """The images of both arms and those both are tested on; class numbers are those of the original."""

    original: ImageData
    augmented: ImageData
    test: ImageData
    groups: Mapping[str, Tensor]

    @property
    def train(self) -> ImageData:
        """What classes are named and counted by."""
        return self.original

    def identity(self) -> dict[str, str]:
        return {name: getattr(self, name).digest for name in (*ARMS, "test")}


def run_compare(settings: CompareRun, *, say: Say = say_nothing) -> Comparison:
    """Train the same classifier on both sets for each seed, and test it; finished trainings are not repeated.

    Args:
        settings: see `CompareRun`.
        say: gets a line for each seed.

    Raises:
        SettingsError: settings that do not fit each other; the run folder of others.
        DataError: sets of other classes, without test images, or that cannot be read.
        RunError: a training failed.
    """
    sets = _read_sets(settings)
    device = choose_device(settings.device)
    new = len(sets.augmented) - len(sets.original)
    say(
        f"{len(sets.original)} original images, {new:+d} in the augmented set, {len(sets.test)} test images; "
        f"{len(settings.seeds)} seeds, {settings.steps} steps of {settings.batch_size} images each"
    )
    config = {**settings.identity(), "data": sets.identity()}
    digest = config_digest(config)
    name = Path(settings.original).name or "images"
    with Run.open(settings.out, kind="compare", seed=0, config=config, resume=settings.resume) as run:
        folder = run.path / "records"
        done = {(cell.method, cell.seed) for cell in finished_cells(folder)} if folder.is_dir() else set()
        writer = RecordWriter(folder)
        for seed in settings.seeds:
            for arm in ARMS:
                if (arm, seed) in done:
                    continue
                started = time.perf_counter()
                scores = _train_and_test(getattr(sets, arm).to(device), sets.test.to(device), settings, seed)
                common = {"benchmark": name, "method": arm, "seed": seed, "config_digest": digest, **provenance()}
                common |= {"seconds": time.perf_counter() - started, "data_digest": getattr(sets, arm).digest}
                writer.write_cell(make_records(scores, None, sets, common=common))
            found = _compare(load_records(folder), (seed,), run.path)
            before, after = (100 * value for value in found.means["balanced_accuracy"])
            say(f"seed {seed}: balanced accuracy {before:.1f} -> {after:.1f}")
        comparison = _compare(load_records(folder), settings.seeds, run.path)
        write_json(run.path / "compare.json", comparison.to_json())
    return comparison


def _read_sets(settings: CompareRun) -> _Sets:
    original, augmented = _open(settings, settings.original), _open(settings, settings.augmented)
    if sorted(original.class_names) != sorted(augmented.class_names):
        raise DataError(
            f"{settings.original} has the classes {', '.join(original.class_names[:5])}..., {settings.augmented} "
            f"{', '.join(augmented.class_names[:5])}...; compare two sets of the same classes"
        )
    size = settings.image_size
    parts = [read_training_images(each, image_size=size) for each in (original, augmented)]
    if settings.test is None:
        test = read_test_images(original, image_size=size)
    else:
        test = read_training_images(_open(settings, settings.test), image_size=size)
    if test is None:
        raise DataError(
            f"{settings.original} has no test part; give test=FOLDER with images that are in neither set, in class "
            "folders of the same names"
        )
    names = original.class_names
    unknown = sorted(set(test.class_names) - set(names))
    if unknown:
        raise DataError(f"the test images are of a class {unknown[0]!r} that {settings.original} lacks; rename it")
    channels = max(part.images.shape[1] for part in (*parts, test))
    first, second, third = (_renumbered(part, names, channels) for part in (*parts, test))
    if first.images.shape[1:] != second.images.shape[1:] or first.images.shape[1:] != third.images.shape[1:]:
        raise SettingsError("images of the sets differ in size; set image_size=N to scale all of them to N x N")
    return _Sets(first, second, third, shot_groups(first.counts))


def _open(settings: CompareRun, path: str) -> Format:
    columns = {"table": ("path_column", "label_column"), "huggingface": ("image_column", "label_column")}
    options = {name: getattr(settings, name) for name in columns.get(settings.source, ())}
    return open_format(settings.source, path, **options)


def _renumbered(data: ImageData, names: tuple[str, ...], channels: int) -> ImageData:
    """The same images under the class numbers of `names`, grey ones repeated into `channels`."""
    number = torch.tensor([names.index(name) for name in data.class_names])
    images = data.images.expand(-1, channels, -1, -1).contiguous()
    return ImageData(images, number[data.labels], names, data.name)


def _train_and_test(train: ImageData, test: ImageData, settings: CompareRun, seed: int) -> Any:
    training = make_train_settings(settings, sampling="class_balanced")
    chosen = ClassifierSettings(backbone=settings.backbone, weights=settings.weights)
    model = fit_classifier(
        build_model(chosen, train, seed=seed),
        train,
        training,
        augmentation=build_augmentation(settings.augmentation, flip=settings.flip),
        seed=seed,
        progress=settings.progress,
    )
    return measure_accuracy(model, test.images, test.labels, num_classes=test.num_classes)


def _compare(records: pd.DataFrame, seeds: tuple[int, ...], folder: Path) -> Comparison:
    means, differences = {}, {}
    for metric in _METRICS:
        rows = records[(records["metric"] == metric) & records["class_name"].isna()]
        by_arm = rows.pivot_table(index="seed", columns="method", values="value").reindex(list(seeds))
        if by_arm.empty or not set(ARMS) <= set(by_arm.columns) or by_arm.isna().all().any():
            continue  # a group without classes, or without test images
        before, after = (by_arm[arm].to_numpy() for arm in ARMS)
        means[metric] = (float(before.mean()), float(after.mean()))
        differences[metric] = paired_difference(after, before)
    return Comparison(folder, means, differences)
