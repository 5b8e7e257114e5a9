"""`run_choose`: which augmentation helps on a data set, from settings to a run folder; the gain of one translator."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError, SettingsError
from gen_invariance.experiment.launch import Say, open_run_folder, prepare_on_device, say_nothing
from gen_invariance.experiment.settings import ChooseRun
from gen_invariance.referee.candidates import EVERY_ROW, Candidate, Translator, read_candidate
from gen_invariance.referee.choice import CHOICE_FILE, Choice
from gen_invariance.referee.choose import choose_augmentation
from gen_invariance.referee.settings import RefereeSettings
from gen_invariance.referee.simulate import simulate_tail
from gen_invariance.translator.quality.verdict import Gain, translator_folder

_GENERIC = "trivialaugment"
_LEAST_SCORED = 100
"""Held-back images below which no interval could be narrow enough to decide."""
_STEPS = 1000
"""Of one training when a single translator is looked at: more splits say more about it than longer ones."""


@dataclass(frozen=True)
class Chosen:
    """A choice and the run folder that holds it.

    Attributes:
        choice: with its ranking.
        folder: of the run.
    """

    choice: Choice
    folder: Path

    @property
    def file(self) -> Path:
        """The choice as JSON."""
        return self.folder / CHOICE_FILE


def run_choose(settings: ChooseRun, *, say: Say = say_nothing) -> Chosen:
    """Prepare the data, let the candidates race on simulated tails of its training images, and keep the ranking.

    Raises:
        SettingsError: an unknown candidate, settings that do not fit each other; the run folder of other settings.
        DataError: too few images or classes to choose by.
        RunError: a training failed.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise SettingsError(
            "candidates are compared by one process of the launcher; start this command without it, processes=4 makes "
            "several trainings at once"
        )
    prepared = prepare_on_device(
        settings.data, seed=settings.seed, device=settings.device, need_test=False, progress=settings.progress, say=say
    )
    identity = {
        "data": settings.data.identity(),
        "candidates": None if settings.candidates is None else list(settings.candidates),
        "choose": settings.referee.identity(),
    }
    with open_run_folder(settings, "choose", identity, prepared.split) as run:
        choice = choose_augmentation(
            prepared.train,
            settings.candidates,
            settings.referee,
            out=run,
            flip_safe=prepared.flip_safe,
            progress=settings.progress,
            say=say,
        )
    return Chosen(choice, run.path)


def judge_translator(
    translator: Path | str,
    data: ImageData,
    *,
    budget: str = "5min",
    flip_safe: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    say: Say = say_nothing,
) -> Gain | None:
    """What a saved translator gains on simulated tails of `data` over the best that is not learned.

    It is used everywhere, alone and with generic augmentation of every row; the better of the two counts. It was
    fitted before, so what it read off the images may be of some that are held back here.

    Args:
        translator: its folder.
        data: training images.
        budget: time for it.
        flip_safe: whether a mirrored image keeps its label.
        seed: of splits and trainings.
        progress: show a bar; None shows one on a terminal only.
        say: gets a line for each split, or on why nothing can be said.

    Returns:
        The gain in points of balanced accuracy, or None where there are too few images to tell.

    Raises:
        CheckpointError: no intact translator in the folder.
    """
    part = Translator(folder=str(translator_folder(translator)))
    candidates = [
        read_candidate("none"),
        read_candidate(f"{_GENERIC}@{EVERY_ROW}"),
        Candidate("translator@everywhere", (part,)),
        Candidate(f"translator@everywhere+{_GENERIC}@{EVERY_ROW}", (part,), every_row=(_GENERIC,)),
    ]
    settings = RefereeSettings(budget=budget, steps=_STEPS)
    try:
        scored = len(simulate_tail(data, settings, number=1, seed=seed).score_rows)
        if scored < _LEAST_SCORED:
            raise DataError(f"{scored} images can be held back, of {_LEAST_SCORED} that it takes")
        choice = choose_augmentation(
            data, candidates, settings, seed=seed, flip_safe=flip_safe, progress=progress, say=say
        )
    except DataError as error:
        say(f"note: no gain can be measured ({error}), figures decide")
        return None
    best = choice.best_learned
    if best is None:
        say(f"note: no gain can be measured ({'; '.join(choice.left_out.values())}), figures decide")
        return None
    return best.gain.to_gain()
