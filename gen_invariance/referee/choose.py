"""`choose_augmentation`: candidates race on simulated tails of a data set's own training images."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from gen_invariance.data.images import ImageData
from gen_invariance.errors import RunError
from gen_invariance.files import write_json
from gen_invariance.jobs import run_jobs
from gen_invariance.measure.predict import as_predict, predict_logits
from gen_invariance.referee.candidates import Candidate, Translator, default_candidates, read_candidates
from gen_invariance.referee.choice import CHOICE_FILE, Choice, make_choice
from gen_invariance.referee.race import Table, ends_round, find_survivors, rank_candidates
from gen_invariance.referee.settings import RefereeSettings
from gen_invariance.referee.simulate import SimulatedTail, simulate_tail
from gen_invariance.referee.train import (
    fit_candidate_translator,
    is_quick,
    make_train_settings,
    train_candidate,
    translator_key,
)
from gen_invariance.run import Run, named_generator
from gen_invariance.translator.io import load_translator, save_translator
from gen_invariance.translator.redraw.parts import pick_rows
from gen_invariance.translator.redraw.tone import guess_kind

_LONG_FIT = "is fitted in minutes or hours; fit it first, and give its folder"


def _say_nothing(line: str) -> None:
    """Drop `line`."""


def choose_augmentation(
    data: ImageData,
    candidates: Sequence[str | Candidate] | None = None,
    settings: RefereeSettings | None = None,
    *,
    out: Path | str | Run | None = None,
    seed: int = 0,
    resume: bool = False,
    flip_safe: bool = False,
    progress: bool | None = None,
    say: Callable[[str], None] = _say_nothing,
) -> Choice:
    """Which candidate is expected to help most on `data`, and by how many points of balanced accuracy.

    Some of the large classes are cut down to sizes of the tail (`simulate_tail`), a small network is trained with each
    candidate on what is left, and scored on images that were held back, over cut and uncut classes. That is repeated
    with other classes and sizes; after every second time only the best third goes on. Candidates share splits, initial
    weights and batches, so gains are paired differences (`race`). Test images are never looked at, and translators are
    fitted on the cut images alone.

    Args:
        data: training images, whole; never validation or test images. Trained on their device.
        candidates: words (`read_candidate`) or candidates; None takes generic ones and `redraw` in several uses.
        settings: see `RefereeSettings`; None for the defaults.
        out: run folder for scores and choice.json, or a run that is open already; None keeps nothing.
        seed: of splits and trainings.
        resume: go on with the run that is in `out`, also with a larger budget or more splits.
        flip_safe: whether a mirrored image keeps its label.
        progress: show a bar with the present ranking and the time left; None shows one on a terminal only.
        say: gets a line for each split.

    Raises:
        SettingsError: an unknown candidate; a folder that holds a run without `resume`, or one of other data.
        DataError: too few images or classes to cut.
        RunError: trainings of a candidate that is not learned failed, or a worker died.

    Example:
        >>> from gen_invariance import RefereeSettings, choose_augmentation, load_source, make_long_tailed
        >>> train = make_long_tailed(load_source("digits"), largest=60, imbalance=20, rest_is_test=True).train
        >>> quick = RefereeSettings(splits=1, steps=20)
        >>> choice = choose_augmentation(train, ["none", "randaugment@every_row"], quick)
        >>> len(choice.ranking)
        2
    """
    settings = settings or RefereeSettings()
    data = _shrink(data, settings.image_size)
    chosen = default_candidates(_guess_kind(data)) if candidates is None else read_candidates(candidates)
    left_out = {
        candidate.name: f"{each.kind} {_LONG_FIT}"
        for candidate in chosen
        for each in candidate.translators
        if not is_quick(each)
    }
    racing = tuple(candidate for candidate in chosen if candidate.name not in left_out)
    simulate_tail(data, settings, number=1, seed=seed)  # refuses data that are too small before anything is written
    config = {
        "data": {"name": data.name, "digest": data.digest},
        "candidates": [candidate.identity() for candidate in racing],
        "choose": settings.identity(),
        "flip_safe": flip_safe,
    }
    with _open_run(out, config, seed=seed, resume=resume) as run, TemporaryDirectory(prefix="choose-") as folder:
        work = _Work(settings, racing, run.seed, flip_safe, folder, data=data)
        race = _Race(work, run, left_out, progress=progress, say=say)
        choice = race.run()
        if run.path is not None:
            write_json(run.path / CHOICE_FILE, choice.to_json())
        return choice


@contextmanager
def _open_run(out: Path | str | Run | None, config: dict[str, Any], *, seed: int, resume: bool) -> Iterator[Run]:
    if isinstance(out, Run):
        yield out
        return
    with Run.open(out, kind="choose", seed=seed, config=config, resume=resume) as run:
        yield run


def _shrink(data: ImageData, side: int | None) -> ImageData:
    return data if side is None or max(data.images.shape[2:]) <= side else data.resized(side)


def _guess_kind(data: ImageData) -> str:
    return guess_kind(data.float_images(pick_rows(data)))


@dataclass(frozen=True)
class _Job:
    """A training of a candidate on a split, or the fit of a translator on it."""

    split: int
    name: str
    is_fit: bool = False


@dataclass(frozen=True)
class _Work:
    """What jobs need; picklable. Worker processes read the images from `folder`, everybody else has them."""

    settings: RefereeSettings
    candidates: tuple[Candidate, ...]
    seed: int
    flip_safe: bool
    folder: str
    data: ImageData | None = field(default=None, compare=False)
    device: str = "cpu"

    def share(self) -> _Work:
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

    def translators(self, name: str) -> tuple[Translator, ...]:
        """Those of the candidate called `name`."""
        return next(candidate.translators for candidate in self.candidates if candidate.name == name)

    def jobs(self, split: int, names: Sequence[str]) -> list[_Job]:
        """What has to be done for the candidates `names` on a split, fits first."""
        keys = dict.fromkeys(translator_key(each) for name in names for each in self.translators(name))
        fits = [_Job(split, key, is_fit=True) for key in keys]
        return [*fits, *(_Job(split, name) for name in names)]

    def needs(self, job: _Job) -> list[_Job]:
        """The fits that a training needs."""
        if job.is_fit:
            return []
        return [_Job(job.split, translator_key(each), is_fit=True) for each in self.translators(job.name)]


@functools.lru_cache(maxsize=1)
def _read_shared(folder: str) -> ImageData:
    name, class_names = json.loads((Path(folder) / "names.json").read_text(encoding="utf-8"))
    with np.load(Path(folder) / "images.npz", allow_pickle=False) as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return ImageData(**tensors, class_names=tuple(class_names), name=name)


def _carry_out(work: _Work, job: _Job, error: str | None) -> str:
    """Do a job; JSON of its seconds and, of a training, which images were named right."""
    if error is not None:
        raise RunError(f"its translator could not be fitted ({error})")
    started = time.perf_counter()
    data = work.read()
    tail = simulate_tail(data, work.settings, number=job.split, seed=work.seed)
    train = data.subset(tail.train_rows)
    seed = _training_seed(work.seed, job.split)
    answer: dict[str, Any] = {}
    if job.is_fit:
        _fit(work, job, train, seed)
    else:
        answer["right"] = _pack(_train(work, job, train, data.subset(tail.score_rows), seed))
    return json.dumps({**answer, "seconds": round(time.perf_counter() - started, 3)})


def _training_seed(seed: int, split: int) -> int:
    """Seed of all trainings on a split."""
    return int(torch.randint(2**31, (), generator=named_generator(seed, "referee", "training", split)))


def _fit(work: _Work, job: _Job, train: ImageData, seed: int) -> None:
    wanted = next(
        each for candidate in work.candidates for each in candidate.translators if translator_key(each) == job.name
    )
    translator = fit_candidate_translator(
        wanted, train, seed=seed, flip_safe=work.flip_safe, fit_steps=work.settings.fit_steps
    )
    save_translator(translator.cpu(), _translator_folder(work, job.split, job.name))


def _translator_folder(work: _Work, split: int, key: str) -> Path:
    return Path(work.folder) / f"{key}-{split}"


def _train(work: _Work, job: _Job, train: ImageData, scored: ImageData, seed: int) -> np.ndarray:
    """Train the candidate of a job; which of the `scored` images it names right, bool (M,)."""
    candidate = next(each for each in work.candidates if each.name == job.name)
    fitted = {}
    for each in candidate.translators:
        key = translator_key(each)
        fitted[key] = load_translator(_translator_folder(work, job.split, key)).to(train.device)
    model = train_candidate(
        candidate,
        train,
        make_train_settings(work.settings),
        seed=seed,
        backbone=work.settings.backbone,
        flip_safe=work.flip_safe,
        fitted=fitted,
    )
    with as_predict(model) as predict:
        answers = predict_logits(predict, scored.images).argmax(1)
    return (answers == scored.labels).cpu().numpy()


def _pack(right: np.ndarray) -> str:
    return np.packbits(right).tobytes().hex()


def _unpack(text: str, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


class _Race:
    """The state of a comparison: what was scored, who is still in it, how long it took."""

    def __init__(
        self,
        work: _Work,
        run: Run,
        left_out: dict[str, str],
        *,
        progress: bool | None,
        say: Callable[[str], None],
    ) -> None:
        self.work, self.settings, self.log, self.say = work, work.settings, run, say
        self.left_out = dict(left_out)
        self.alive = [candidate.name for candidate in work.candidates]
        self.learned = {candidate.name: candidate.learned for candidate in work.candidates}
        self.dropped: dict[str, int] = {}
        self.table = Table({}, {})
        rows = run.metrics()
        self.known = {(row.get("split"), row.get("candidate")): row for row in rows if "right" in row}
        self.seconds = sum(float(row["seconds"]) for row in rows if "fit" in row)
        self.trainings = 0
        self.started = time.perf_counter()
        trained = sum(float(row["seconds"]) for row in self.known.values())
        self.before = (self.seconds + trained) / self.settings.processes
        self.bar = tqdm(desc="choose", total=0, disable=None if progress is None else not progress)
        self.shared = work if self.settings.processes == 1 else work.share()

    def run(self) -> Choice:
        """Make splits until the budget or their number is used up."""
        split = 0
        with self.bar:
            for split in range(1, self.settings.splits + 1):
                if split > 1 and not self._fits(split):
                    split -= 1
                    break
                self._make_split(split)
                self.say(self._describe(split))
                if ends_round(split) and split < self.settings.splits:
                    self._drop(split)
        if not any(not self.learned[name] for name in self.table.figures):
            raise RunError(f"no candidate could be trained: {'; '.join(self.left_out.values())}")
        return make_choice(
            self.table,
            self.work.candidates,
            level=self.settings.level,
            dropped=self.dropped,
            left_out=self.left_out,
            enough=split == self.settings.splits,
            seconds=self.seconds,
        )

    def _fits(self, split: int) -> bool:
        """Whether a split is there already, or will end within the budget."""
        missing = [name for name in self.alive if (split, name) not in self.known]
        if not missing:
            return True
        used = self.before + time.perf_counter() - self.started
        return used + len(missing) * self._pace() <= self.settings.seconds

    def _pace(self) -> float:
        """Seconds that a training takes, its share of the fits included."""
        return self.seconds / max(self.trainings, 1) / self.settings.processes

    def _make_split(self, split: int) -> None:
        data = self.work.read()
        tail = simulate_tail(data, self.settings, number=split, seed=self.work.seed)
        self.table.labels[split] = data.labels[tail.score_rows.to(data.device)].cpu().numpy()  # type: ignore[index]
        missing = [name for name in self.alive if (split, name) not in self.known]
        for name in self.alive:
            if name not in missing:
                self._enter(split, name, self.known[split, name], tail)
        self.bar.total = self.bar.n + len(missing)
        do: Any = functools.partial(_carry_out, self.shared)
        jobs = self.work.jobs(split, missing)
        for done in run_jobs(jobs, do, needs=self.work.needs, processes=self.settings.processes):
            if done.error is not None:
                self._leave_out(done.job, done.error)
                continue
            answer = json.loads(done.answer)
            if done.job.is_fit:
                self.log.log(step=split, split=split, fit=done.job.name, **answer)
                self.seconds += answer["seconds"]
                continue
            self.log.log(step=split, split=split, candidate=done.job.name, **answer)
            self._enter(split, done.job.name, answer, tail)
            self._show(split)

    def _enter(self, split: int, name: str, answer: dict[str, Any], tail: SimulatedTail) -> None:
        figures: Any = self.table.figures
        figures.setdefault(name, {})[split] = _unpack(answer["right"], len(tail.score_rows))
        self.seconds += float(answer["seconds"])
        self.trainings += 1

    def _leave_out(self, job: _Job, error: str) -> None:
        if job.is_fit:
            return  # the trainings that need it say so
        if not self.learned[job.name]:
            raise RunError(f"candidate {job.name!r} could not be trained on split {job.split}: {error}")
        self.left_out[job.name] = error
        self.alive.remove(job.name)
        self.table.figures.pop(job.name, None)  # type: ignore[attr-defined]

    def _drop(self, split: int) -> None:
        kept = find_survivors(self.table, self.alive, self.learned.__getitem__)
        self.dropped |= {name: split for name in self.alive if name not in kept}
        self.alive = kept

    def _show(self, split: int) -> None:
        self.bar.update()
        if not self.bar.disable:
            left = self.settings.seconds - self.before - (time.perf_counter() - self.started)
            ranked = rank_candidates(self.table)
            self.bar.set_postfix_str(f"split {split}, best {', '.join(ranked[:2])}, {max(left, 0):.0f} s left")

    def _describe(self, split: int) -> str:
        ranked = [name for name in rank_candidates(self.table) if name in self.alive]
        shown = ", ".join(f"{name} {self.table.balanced(name, split):.1f}" for name in ranked)
        return f"split {split}: {shown}"
