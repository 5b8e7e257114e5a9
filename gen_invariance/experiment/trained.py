"""Classifiers out of run folders: with the data they were trained on (`open_run`), or for use (`load_classifier`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.model import Classifier
from gen_invariance.data.identity import DATA_FILE, PARTS, check_run_data, split_parts
from gen_invariance.data.readers.unlabelled import Picture, read_pictures
from gen_invariance.errors import CheckpointError, DataError, DataNotFoundError, SettingsError, ShapeError, first_line
from gen_invariance.experiment.build import build_model
from gen_invariance.experiment.launch import choose_device
from gen_invariance.experiment.settings import ClassifierSettings, Task
from gen_invariance.experiment.task import Prepared, prepare
from gen_invariance.files import read_json
from gen_invariance.measure.calibration import adjust_to_prior, estimate_prior
from gen_invariance.measure.predict import as_predict, predict_logits
from gen_invariance.run import MISFITS, Run
from gen_invariance.settings import read_settings

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
"""Of a folder that `export` wrote."""

Prior = str | Mapping[str, float]
"""How common classes are where a classifier is used: "trained", "uniform", "estimate", or shares by class name."""


@dataclass(frozen=True)
class TrainingRun:
    """What a folder that `train` wrote says of itself.

    Attributes:
        run: the folder.
        task: data settings, their path as it is found from here.
        stored: data settings as they were given.
        classifier: settings of the classifier.
        facts: what the run noted.
    """

    run: Run
    task: Task
    stored: Task
    classifier: ClassifierSettings
    facts: Mapping[str, Any]


def read_training_run(folder: Path | str) -> TrainingRun:
    """The settings of the training run in `folder`.

    Raises:
        DataNotFoundError: no run folder there.
        CheckpointError: not a training run, or its settings cannot be read.
    """
    folder = Path(folder).expanduser()
    about_path = folder / "run.json"
    if not about_path.is_file():
        raise DataNotFoundError(f"{folder} is not a run folder (no run.json); give the folder that train wrote")
    try:
        about = read_json(about_path)
        kind, seed, config = about["kind"], about["seed"], about["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{about_path} is damaged ({error}); train again") from error
    if kind != "train":
        raise CheckpointError(
            f"{folder} holds a '{kind}' run, not a trained classifier; give a folder that train wrote"
        )
    run = Run(folder, kind="train", seed=seed, config=config, resume=True)
    try:
        task = read_settings(Task, config["data"], "data")
        classifier = read_settings(ClassifierSettings, config["classifier"], "classifier")
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise CheckpointError(
            f"{about_path} does not hold the settings of a training run of this version ({error}); train again"
        ) from error
    facts = about.get("facts")
    found_at = None if task.path is None else run.locate(os.path.expanduser(task.path))
    return TrainingRun(run, replace(task, path=found_at), task, classifier, facts if isinstance(facts, Mapping) else {})


def open_run(
    folder: Path | str, *, device: torch.device | str = "cpu", parts: Sequence[str] = PARTS
) -> tuple[Classifier, Prepared, Task, Run]:
    """The classifier of a finished or stopped training run, in eval mode, and the data it was trained on.

    Args:
        folder: that `train` wrote.
        device: where to put model and images.
        parts: of the data ("train", "validation", "test") that must be those of the run.

    Raises:
        DataNotFoundError: no run folder there.
        DataError: the data have changed since.
        CheckpointError: not a training run, or its checkpoints are damaged.
    """
    found = read_training_run(folder)
    run = found.run
    prepared = prepare(found.task, seed=run.seed)
    check_run_data(run.path, split_parts(prepared.split, parts), split=prepared.split)
    prepared = prepared.to(device)
    model = build_model(replace(found.classifier, weights=None), prepared.train, seed=run.seed)
    _load_checkpoint(model, run)
    return model.to(device).eval(), prepared, found.stored, run


def _load_checkpoint(model: Classifier, run: Run) -> None:
    """Put the newest weights of `run` into `model`, which was built from its settings."""
    state = run.load_latest()
    if state is None:
        raise CheckpointError(
            f"{run.path} holds no intact checkpoint; resume the training: gen-invariance train ... resume=true"
        )
    try:
        model.load_state_dict(state["model"])
    except MISFITS as error:
        raise CheckpointError(
            f"the checkpoint in {run.path} does not fit its settings ({first_line(error)})"
        ) from error


# ---- to be used


@dataclass(frozen=True)
class TrainedClassifier:
    """A trained classifier with what it takes to use it; see `load_classifier`.

    Attributes:
        model: in eval mode; float images (B, C, H, W) in [0, 1] to logits (B, K). It normalises by itself.
        class_names: K names, in the order of the logits.
        counts: training images of each class, int64 (K,).
        shape: (C, H, W) of the images that it was trained on.
        prior: float64 (K,), how common classes are to it: the counts for plain cross-entropy on images as they come,
            uniform under balanced losses, balanced sampling or a corrected head. Sums to one.
        about: settings of the training, and facts on it.

    Example:
        >>> from gen_invariance import TrainedClassifier, build_classifier
        >>> model, even = build_classifier("small_conv", num_classes=2).eval(), torch.ones(2).double() / 2
        >>> classifier = TrainedClassifier(model, ("cat", "lynx"), torch.tensor([90, 10]), (3, 16, 16), even, {})
        >>> classifier.predict(torch.rand(4, 3, 16, 16), prior={"lynx": 1.0})[0].tolist()
        [0.0, 1.0]
    """

    model: Classifier
    class_names: tuple[str, ...]
    counts: Tensor
    shape: tuple[int, int, int]
    prior: Tensor
    about: Mapping[str, Any]

    def read(self, files: Sequence[Path | str]) -> tuple[Tensor, list[Picture]]:
        """Image files as the model wants them, uint8 (N, C, H, W), and of each file whether and why not it is there.

        The largest centred part of the right proportions is scaled to the training images' size, antialiased.
        """
        pictures = list(read_pictures([Path(file) for file in files], self.shape))
        pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
        return torch.stack(pixels) if pixels else torch.zeros(0, *self.shape, dtype=torch.uint8), pictures

    def predict(self, images: Tensor, *, prior: Prior = "trained", batch_size: int = 256) -> Tensor:
        """Probabilities of the classes, float64 (N, K), on the CPU.

        Args:
            images: uint8 (N, C, H, W), or float in [0, 1].
            prior: how common classes are among the images the model will see: "trained" leaves its answers as they are,
                "uniform", "estimate" (from these very images, `measure.calibration.estimate_prior`), or shares by class
                name, which need not sum to one; classes that it leaves out do not occur.
            batch_size: images at a time.

        Raises:
            SettingsError: an unknown prior or class.
            ShapeError: no images, or images of another number of channels.
        """
        if images.ndim == 4 and images.shape[1] != self.shape[0]:
            raise ShapeError(f"this classifier takes {self.shape[0]} channel(s), got images {tuple(images.shape)}")
        with as_predict(self.model) as predict:
            probabilities = predict_logits(predict, images, batch_size=batch_size).double().softmax(1).cpu()
        return self.adjust(probabilities, prior)

    def adjust(self, probabilities: Tensor, prior: Prior) -> Tensor:
        """Probabilities (N, K) of this classifier under another `prior`, see `predict`."""
        if isinstance(prior, str) and prior == "trained":
            return probabilities
        if isinstance(prior, str) and prior == "estimate":
            deployed = estimate_prior(probabilities, trained=self.prior)
        else:
            deployed = self.shares(prior)
        return adjust_to_prior(probabilities, trained=self.prior, deployed=deployed)

    def shares(self, prior: Prior) -> Tensor:
        """A prior as float64 (K,), summing to one; "estimate" has none without images."""
        if isinstance(prior, Mapping):
            unknown = [name for name in prior if name not in self.class_names]
            if unknown:
                raise SettingsError(
                    f"prior names {unknown[0]!r}, which is no class; the classes are {', '.join(self.class_names[:8])}"
                )
            values = torch.tensor([float(prior.get(name, 0.0)) for name in self.class_names], dtype=torch.float64)
            if not (torch.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
                raise SettingsError("prior must hold shares that are not negative, and not all zero")
            return values / values.sum()
        known = {"trained": self.prior, "uniform": torch.ones_like(self.prior), "training": self.counts.double()}
        if prior not in known:
            raise SettingsError(
                f"unknown prior {prior!r}; choose trained, uniform, training, estimate, or {{class: share, ...}}"
            )
        return known[prior] / known[prior].sum()


def load_classifier(folder: Path | str, *, device: str = "cpu") -> TrainedClassifier:
    """The classifier of a folder that `train` (or `export`) wrote, ready to be used; the training data are not needed.

    Args:
        folder: of a finished or stopped training.
        device: auto, cpu or cuda.

    Raises:
        DataNotFoundError: no such folder.
        CheckpointError: not a training run, or its checkpoints are damaged.

    Example:
        >>> import tempfile
        >>> from gen_invariance.experiment.settings import Task, TrainRun, ClassifierSettings
        >>> from gen_invariance.experiment.train import run_train
        >>> from gen_invariance import TrainSettings, load_classifier
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = run_train(TrainRun(
        ...         out=f"{folder}/run", progress=False, data=Task(largest=20, imbalance=4, rest_is_test=True),
        ...         classifier=ClassifierSettings(backbone="small_conv"), training=TrainSettings(epochs=1, warmup=0)))
        ...     classifier = load_classifier(run)
        >>> classifier.class_names[:3], classifier.shape
        (('0', '1', '2'), (1, 16, 16))
        >>> classifier.predict(torch.rand(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """
    folder = Path(folder).expanduser()
    if (folder / CONFIG_FILE).is_file() and not (folder / "run.json").exists():
        return _load_exported(folder, device=choose_device(device))
    found = read_training_run(folder)
    class_names, counts, shape = _read_inputs(found)
    model = build_classifier(
        found.classifier.backbone, num_classes=len(class_names), channels=shape[0], head=found.classifier.head
    )
    _load_checkpoint(model, found.run)
    return TrainedClassifier(
        model.to(choose_device(device)).eval(),
        class_names,
        counts,
        shape,
        trained_prior(found.run.config, counts),
        {"seed": found.run.seed, "config": found.run.config, "facts": dict(found.facts)},
    )


def _load_exported(folder: Path, *, device: torch.device) -> TrainedClassifier:
    """The classifier of a folder that `export` wrote, whatever library its tensors are named after."""
    try:
        config = read_json(folder / CONFIG_FILE)
        own, normalisation = config["gen_invariance"], config["pretrained_cfg"]
        shape, names = tuple(map(int, own["image_shape"])), tuple(map(str, config["label_names"]))
        model = build_classifier(
            own["backbone"], num_classes=len(names), channels=shape[0], head=own["head"], input_size=own["input_size"]
        )
        state = {own["names"].get(key, key): value for key, value in load_file(folder / WEIGHTS_FILE).items()}
        model.set_normalisation(normalisation["mean"], normalisation["std"])
        model.load_state_dict({"mean": model.mean, "std": model.std, **state})
        counts, prior = torch.tensor(own["counts"]), torch.tensor(own["prior"], dtype=torch.float64)
    except (OSError, SafetensorError, *MISFITS) as error:
        raise CheckpointError(
            f"{folder} holds no classifier that export wrote, or is damaged ({first_line(error)}); export it again"
        ) from error
    channels, height, width = shape
    return TrainedClassifier(
        model.to(device).eval(), names, counts, (channels, height, width), prior, dict(own["about"])
    )


def _read_inputs(found: TrainingRun) -> tuple[tuple[str, ...], Tensor, tuple[int, int, int]]:
    """Class names, training counts and image shape of a run; those that did not note them are read from the data."""
    try:
        pairs = read_json(found.run.path / DATA_FILE)["train"]["classes"]
        channels, height, width = (int(length) for length in found.facts["image_shape"])
        names, counts = tuple(str(name) for name, _ in pairs), torch.tensor([int(count) for _, count in pairs])
        return names, counts, (channels, height, width)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # of an earlier version
    try:
        train = prepare(found.task, seed=found.run.seed).train
    except DataError as error:
        raise CheckpointError(
            f"{found.run.path} was made by an earlier version, which did not note its classes, and its data cannot be "
            f"read ({error}); restore them, or train again"
        ) from error
    channels, height, width = train.images.shape[1:]
    return train.class_names, train.counts.cpu(), (channels, height, width)


_BALANCED_LOSSES = ("balanced_softmax", "logit_adjustment", "vector_scaling")
_BALANCED_RULES = ("class_balanced", "delayed", "progressive")  # at the end of training


def trained_prior(config: Mapping[str, Any], counts: Tensor) -> Tensor:
    """How common classes are to a classifier that was trained by these settings, float64 (K,), summing to one.

    Uniform where the loss, the sampling at the end, class weights or a correction of the head make it so; else the
    share of the training images, or the root of it under square-root sampling.
    """
    classifier, training = config.get("classifier", {}), config.get("training", {})
    options = classifier.get("second_loss_options") or classifier.get("loss_options") or {}
    rule = training.get("sampling", "instance")
    balanced = (
        training.get("head_correction", "none") != "none"
        or classifier.get("loss") in _BALANCED_LOSSES
        or isinstance(options.get("weights"), str)
        or rule in _BALANCED_RULES
    )
    weights = torch.ones(len(counts), dtype=torch.float64) if balanced else counts.double().clamp_min(1)
    if rule == "square_root" and not balanced:
        weights = weights.sqrt()
    return weights / weights.sum()
