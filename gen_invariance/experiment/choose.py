"""`run_choose`: which augmentation helps on a data set, from settings to a run folder, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gen_invariance.experiment.launch import Say, open_run_folder, prepare_on_device, say_nothing
from gen_invariance.experiment.settings import ChooseRun
from gen_invariance.referee.choice import CHOICE_FILE, Choice
from gen_invariance.referee.choose import choose_augmentation


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
