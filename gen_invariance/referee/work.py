"""The jobs of a comparison: fits, views and trainings, each a function of the data, the seed and the settings alone."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.data.images import ImageData
from gen_invariance.devices import has_bfloat16
from gen_invariance.errors import RunError
from gen_invariance.files import write_json
from gen_invariance.measure.predict import as_predict, predict_logits
from gen_invariance.referee.candidates import Candidate, Translator
from gen_invariance.referee.features import Views, build_frozen, cache_held, compute_views, score_head
from gen_invariance.referee.settings import RefereeSettings
from gen_invariance.referee.simulate import cut_classes, hold_back, simulate_tail
from gen_invariance.referee.train import (
    Fitted,
    fit_candidate_translator,
    make_train_settings,
    train_candidate,
    translator_key,
)
from gen_invariance.run import named_generator
from gen_invariance.translator.io import load_translator, save_translator

ONCE = 0
"""Split of what is done once for all: with a pretrained backbone fits and views are."""


@dataclass(frozen=True)
class Job:
    """Something to do: `train` a candidate on a split, `fit` a translator on it, or compute a candidate's `views`."""

    split: int
    name: str
    kind: Literal["fit", "views", "train"] = "train"


@dataclass(frozen=True)
class Work:
    """What jobs need; picklable. Worker processes read the images from `folder`, everybody else has them."""

    settings: RefereeSettings
    candidates: tuple[Candidate, ...]
    seed: int
    flip_safe: bool
    folder: str
    data: ImageData | None = field(default=None, compare=False)
    device: str = "cpu"

    @property
    def from_features(self) -> bool:
        """Whether heads are trained on features of a pretrained backbone."""
        return self.settings.weights is not None

    def share(self) -> Work:
        """The same for worker processes."""
        data = self.data
        arrays = {"images": data.images, "labels": data.labels}
        if data.groups is not None:
            arrays["groups"] = data.groups
        np.savez(Path(self.folder) / "images.npz", **{name: value.cpu().numpy() for name, value in arrays.items()})
        write_json(Path(self.folder) / "names.json", [data.name, list(data.class_names)])
        return replace(self, data=None, device=str(data.device))

    def read(self) -> ImageData:
        """The images."""
        return self.data if self.data is not None else _read_shared(self.folder).to(self.device)

    def find(self, name: str) -> Candidate:
        """The candidate called `name`."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def scored_labels(self, split: int) -> np.ndarray:
        """Class of each image that a split is scored on, int64 (M,).

        Raises:
            DataError: see `simulate_tail`.
        """
        data = self.read()
        if self.from_features:
            rows = hold_back(data, self.settings, seed=self.seed)[1]
        else:
            rows = simulate_tail(data, self.settings, number=split, seed=self.seed).score_rows
        return data.labels.cpu()[rows].numpy()

    def list_jobs(self, split: int, names: Sequence[str]) -> list[Job]:
        """What has to be done for the candidates `names` on a split, each behind what it needs."""
        trainings = [Job(split, name) for name in names]
        views = [job for training in trainings for job in self.needs(training) if job.kind == "views"]
        fits = [job for each in (*views, *trainings) for job in self.needs(each) if job.kind == "fit"]
        missing = [job for job in dict.fromkeys([*fits, *views]) if not self.place(job).exists()]
        return [*missing, *trainings]

    def needs(self, job: Job) -> list[Job]:
        """The fits or views that a job needs."""
        if job.kind == "fit":
            return []
        if self.from_features and job.kind == "train":
            return [Job(ONCE, job.name, "views")]
        return [Job(job.split, translator_key(each), "fit") for each in self.find(job.name).translators]

    def place(self, job: Job) -> Path:
        """Where the result of a fit or of views lies."""
        if job.kind == "views":
            number = [candidate.name for candidate in self.candidates].index(job.name)
            return Path(self.folder) / f"views-{number}.npz"
        return Path(self.folder) / f"{job.name}-{job.split}"


@functools.lru_cache(maxsize=1)
def _read_shared(folder: str) -> ImageData:
    name, class_names = json.loads((Path(folder) / "names.json").read_text(encoding="utf-8"))
    with np.load(Path(folder) / "images.npz", allow_pickle=False) as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return ImageData(**tensors, class_names=tuple(class_names), name=name)


def carry_out(work: Work, job: Job, error: str | None) -> str:
    """Do a job; JSON of its seconds and, of a training, which images were named right.

    Args:
        work: what it needs.
        job: the job.
        error: of a job that it needed.

    Raises:
        RunError: with that error.
    """
    if error is not None:
        raise RunError(f"its translator could not be fitted ({error})")
    started = time.perf_counter()
    answer = {"right": pack(_train(work, job))} if job.kind == "train" else {}
    if job.kind == "fit":
        _fit(work, job)
    elif job.kind == "views":
        _compute_views(work, job)
    return json.dumps({**answer, "seconds": round(time.perf_counter() - started, 3)})


def pack(right: np.ndarray) -> str:
    """Bool (M,) as text."""
    return np.packbits(right).tobytes().hex()


def unpack(text: str, count: int) -> np.ndarray:
    """`count` bools out of what `pack` made."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


def training_seed(seed: int, split: int) -> int:
    """Seed of all trainings and fits on a split."""
    return int(torch.randint(2**31, (), generator=named_generator(seed, "referee", "training", split)))


def _training_rows(work: Work, split: int) -> Tensor:
    """Rows that a fit, or a training from scratch, may see."""
    data = work.read()
    if work.from_features:
        return hold_back(data, work.settings, seed=work.seed)[0]
    return simulate_tail(data, work.settings, number=split, seed=work.seed).train_rows


def _fit(work: Work, job: Job) -> None:
    translators = [each for candidate in work.candidates for each in candidate.translators]
    wanted: Translator = next(each for each in translators if translator_key(each) == job.name)
    translator = fit_candidate_translator(
        wanted,
        work.read().subset(_training_rows(work, job.split)),
        seed=training_seed(work.seed, job.split),
        flip_safe=work.flip_safe,
        fit_steps=work.settings.fit_steps,
    )
    save_translator(translator.cpu(), work.place(job))


def _load_fitted(work: Work, job: Job) -> Fitted:
    """The translators of a job's candidate."""
    keys = [translator_key(each) for each in work.find(job.name).translators]
    return {key: load_translator(work.place(Job(job.split, key, "fit"))).to(work.read().device) for key in keys}


def _train(work: Work, job: Job) -> np.ndarray:
    """Train the candidate of a job; which of the held-back images it names right, bool (M,)."""
    if work.from_features:
        return _train_head(work, job)
    data = work.read()
    tail = simulate_tail(data, work.settings, number=job.split, seed=work.seed)
    scored = data.subset(tail.score_rows)
    model = train_candidate(
        work.find(job.name),
        data.subset(tail.train_rows),
        _read_training(work),
        seed=training_seed(work.seed, job.split),
        backbone=work.settings.backbone,
        flip_safe=work.flip_safe,
        fitted=_load_fitted(work, job),
    )
    with as_predict(model) as predict:
        answers = predict_logits(predict, scored.images).argmax(1)
    return (answers == scored.labels).cpu().numpy()


def _read_training(work: Work) -> TrainSettings:
    precision = work.settings.mixed_precision
    if precision == "auto":
        precision = "bf16" if has_bfloat16(work.read().device) else "no"
    return replace(make_train_settings(work.settings), mixed_precision=precision)


def _compute_views(work: Work, job: Job) -> None:
    data = work.read()
    rest, held = hold_back(data, work.settings, seed=work.seed)
    model = build_frozen(work.settings, data)
    views = compute_views(
        model,
        work.find(job.name),
        data.subset(rest),
        _load_fitted(work, job),
        work.settings,
        seed=work.seed,
        flip_safe=work.flip_safe,
    )
    views.save(work.place(job), held=cache_held(model, data.subset(held)))


def _train_head(work: Work, job: Job) -> np.ndarray:
    data = work.read()
    rest, held = hold_back(data, work.settings, seed=work.seed)
    labels = data.labels.cpu()
    views, held_features = Views.load(work.place(work.needs(job)[0]))
    return score_head(
        views,
        work.find(job.name),
        labels[rest],
        cut_classes(data.subset(rest), work.settings, number=job.split, seed=work.seed),
        (held_features, labels[held]),
        num_classes=data.num_classes,
        seed=training_seed(work.seed, job.split),
    )
