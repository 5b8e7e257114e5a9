"""`choose_augmentation`: candidates race on simulated tails of a data set's own training images."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from gen_invariance.data.images import ImageData
from gen_invariance.errors import RunError
from gen_invariance.files import write_json
from gen_invariance.jobs import run_jobs
from gen_invariance.referee.candidates import Candidate, default_candidates, read_candidates
from gen_invariance.referee.choice import CHOICE_FILE, Choice, make_choice
from gen_invariance.referee.features import build_frozen
from gen_invariance.referee.race import Table, ends_round, find_survivors, rank_candidates
from gen_invariance.referee.settings import RefereeSettings
from gen_invariance.referee.train import is_quick
from gen_invariance.referee.work import Job, Work, carry_out, unpack
from gen_invariance.run import Run
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
    if settings.weights is None:  # a pretrained backbone wants its images as they are
        data = _shrink(data, settings.image_size)
    chosen = default_candidates(_guess_kind(data)) if candidates is None else read_candidates(candidates)
    left_out = {
        candidate.name: f"{each.kind} {_LONG_FIT}"
        for candidate in chosen
        for each in candidate.translators
        if not is_quick(each)
    }
    racing = tuple(candidate for candidate in chosen if candidate.name not in left_out)
    config = {
        "data": {"name": data.name, "digest": data.digest},
        "candidates": [candidate.identity() for candidate in racing],
        "choose": settings.identity(),
        "flip_safe": flip_safe,
    }
    Work(settings, racing, seed, flip_safe, "", data=data).scored_labels(1)  # refuses data that are too small
    if settings.weights is not None:
        build_frozen(settings, data)  # refuses weights that are not there
    with _open_run(out, config, seed=seed, resume=resume) as run, TemporaryDirectory(prefix="choose-") as folder:
        work = Work(settings, racing, run.seed, flip_safe, folder, data=data)
        race = _Race(work, run, left_out, progress=progress, say=say)
        choice = race.run()
        if run.path is not None:
            write_json(run.path / CHOICE_FILE, {**choice.to_json(), "asked": race.asked})
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


def _read_ended(run: Run) -> dict[str, Any] | None:
    """What a run that ended says of itself; None for one that did not, or whose file is damaged."""
    try:
        saved = json.loads((run.path / CHOICE_FILE).read_text(encoding="utf-8")) if run.path is not None else {}
        return {"asked": saved["asked"], "splits": int(saved["splits"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


class _Race:
    """The state of a comparison: what was scored, who is still in it, how long it took."""

    def __init__(
        self,
        work: Work,
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
        self.table = Table({}, {}, shared=work.from_features)
        rows = run.metrics()
        self.known = {(row.get("split"), row.get("candidate")): row for row in rows if "right" in row}
        self.seconds = sum(float(row["seconds"]) for row in rows if "prepared" in row)
        self.trainings = 0
        self.ended = _read_ended(run)
        self.started = time.perf_counter()
        trained = sum(float(row["seconds"]) for row in self.known.values())
        self.before = (self.seconds + trained) / self.settings.processes
        self.bar = tqdm(desc="choose", total=0, disable=None if progress is None else not progress)
        self.shared = work if self.settings.processes == 1 else work.share()

    def run(self) -> Choice:
        """Make splits until the budget or their number is used up."""
        split = 0
        with self.bar:
            while split < self._limit():
                going_on = self._find_survivors(split)
                if split and not self._fits(split + 1, going_on):
                    break
                self.dropped |= {name: split for name in self.alive if name not in going_on}
                self.alive, split = going_on, split + 1
                self._make_split(split)
                self.say(self._describe(split))
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

    def _limit(self) -> int:
        """Splits at most: a run that ended goes on only when it is asked for more time, or for more splits."""
        if self.ended is not None and self.ended["asked"] == self.asked:
            return int(self.ended["splits"])
        return self.settings.splits

    @property
    def asked(self) -> dict[str, Any]:
        """What may be changed when a run goes on."""
        return {"budget": self.settings.budget, "splits": self.settings.splits}

    def _fits(self, split: int, names: Sequence[str]) -> bool:
        """Whether a split is there already, or will end within the budget."""
        missing = [name for name in names if (split, name) not in self.known]
        if not missing:
            return True
        used = self.before + time.perf_counter() - self.started
        return used + len(missing) * self._pace() <= self.settings.seconds

    def _pace(self) -> float:
        """Seconds that a training takes, its share of the fits included."""
        return self.seconds / max(self.trainings, 1) / self.settings.processes

    def _make_split(self, split: int) -> None:
        labels: Any = self.table.labels
        labels[split] = self.work.scored_labels(split)
        missing = [name for name in self.alive if (split, name) not in self.known]
        for name in self.alive:
            if name not in missing:
                self._enter(split, name, self.known[split, name])
        self.bar.total = self.bar.n + len(missing)
        do: Any = functools.partial(carry_out, self.shared)
        jobs = self.work.list_jobs(split, missing)
        for done in run_jobs(jobs, do, needs=self.work.needs, processes=self.settings.processes):
            if done.error is not None:
                self._leave_out(done.job, done.error)
                continue
            answer = json.loads(done.answer)
            if done.job.kind != "train":
                self.log.log(step=split, split=split, prepared=done.job.name, **answer)
                self.seconds += answer["seconds"]
                continue
            self.log.log(step=split, split=split, candidate=done.job.name, **answer)
            self._enter(split, done.job.name, answer)
            self._show(split)

    def _enter(self, split: int, name: str, answer: dict[str, Any]) -> None:
        figures: Any = self.table.figures
        figures.setdefault(name, {})[split] = unpack(answer["right"], len(self.table.labels[split]))
        self.seconds += float(answer["seconds"])
        self.trainings += 1

    def _leave_out(self, job: Job, error: str) -> None:
        if job.kind != "train":
            return  # the trainings that need it say so
        if not self.learned[job.name]:
            raise RunError(f"candidate {job.name!r} could not be trained on split {job.split}: {error}")
        self.left_out[job.name] = error
        self.alive.remove(job.name)
        self.table.figures.pop(job.name, None)  # type: ignore[attr-defined]

    def _find_survivors(self, split: int) -> list[str]:
        """Who goes on after this split."""
        if not split or not ends_round(split):
            return self.alive
        return find_survivors(self.table, self.alive, self.learned.__getitem__)

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
