"""How a run was started: on which device, in how many processes, at a terminal or not; and the images it works on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from gen_invariance.data.identity import split_parts, tie_run
from gen_invariance.data.split import LongTailSplit, save_split
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.settings import RunSettings, Task
from gen_invariance.experiment.task import Prepared, prepare
from gen_invariance.run import Run, is_first_process

Say = Callable[[str], None]
"""Takes one line on what is done."""


def say_nothing(line: str) -> None:
    """The `Say` of a caller who wants no lines."""


def choose_device(name: str) -> torch.device:
    """The device that the setting `device` names: "auto" (the GPU, where there is one), "cpu", "cuda" or "cuda:1".

    Of several processes of a launcher each takes the GPU of its local rank: that of accelerate, which makes it the
    current one only later, when images would lie on the first GPU already.

    Raises:
        SettingsError: another name, a CUDA device that is not there, or one GPU for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SettingsError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"torch finds no CUDA device for device={name}; use device=cpu or device=auto")
    return _of_local_rank(device)


def _of_local_rank(device: torch.device) -> torch.device:
    """`device`, or this process's own GPU where a launcher started several."""
    if device.type != "cuda" or os.environ.get("WORLD_SIZE", "1") == "1":
        return device
    if device.index is not None:
        raise SettingsError(f"device={device} is one GPU, and the launcher started several processes; use device=cuda")
    rank, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= found:
        raise SettingsError(f"process {rank} of this machine has no GPU, torch finds {found}; start as many processes")
    return torch.device("cuda", rank)


def shows_progress(progress: bool | None) -> bool:
    """The setting `progress`, where None stands for a bar on a terminal and none elsewhere."""
    return sys.stderr.isatty() if progress is None else progress


@contextmanager
def open_run_folder(
    settings: RunSettings, kind: str, identity: Mapping[str, Any], split: LongTailSplit
) -> Iterator[Run]:
    """The run in `settings.out`, with the split of its data in it; of several processes the first makes it.

    A run that goes on is refused where its training images, or for "train" any of its images, have changed.

    Args:
        settings: folder, seed, and whether an earlier run goes on.
        kind: what is run.
        identity: the settings that decide the result.
        split: of the data.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from accelerate import PartialState

        PartialState(cpu=choose_device(settings.device).type == "cpu")  # joins the processes of the launcher
    with Run.open(
        settings.out,
        kind=kind,
        seed=settings.seed,
        config=identity,
        resume=settings.resume,
        allow_changed_settings=settings.allow_changed_settings,
    ) as run:
        tie_run(run, split_parts(split) if kind == "train" else {"train": split.train}, split=split)
        if is_first_process():
            save_split(run.path / "split.npz", split)
        yield run


def prepare_on_device(
    task: Task,
    *,
    seed: int,
    device: str,
    need_test: bool = True,
    progress: bool | None = None,
    say: Say = say_nothing,
) -> Prepared:
    """The images of `task` for `seed` on the device of that name; `say` is told what is wrong with them."""
    chosen_device = choose_device(device)
    prepared = prepare(task, seed=seed, need_test=need_test, progress=shows_progress(progress))
    for line in (*prepared.notes, *prepared.duplicates.lines()):
        say(line)
    return prepared.to(chosen_device)
