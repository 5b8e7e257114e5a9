"""The output folder of an export: whether it may be written to, what was begun in it, and who writes to it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from gen_invariance.errors import CheckpointError, OutputError, SettingsError, printable
from gen_invariance.files import cannot_write, write_json

STATE = ".gen_invariance"
"""The working folder in the output, which goes when the export is done."""

_DONE = ".gen_invariance.json"
_BEGUN = f"{STATE}/export.json"


def keep_apart(source: Path, out: Path) -> None:
    """Raise `OutputError` when the output lies in the input, or around it."""
    read, written = source.resolve(), out.resolve()
    if not source.is_dir():
        return  # beside a table or an .npz file is a good place, and only a new or empty folder is written to
    if written == read or read in written.parents:
        raise OutputError(
            f"out={printable(out)} lies in the data that is read; choose a folder outside of {printable(read)}"
        )
    if written in read.parents:
        raise OutputError(f"out={printable(out)} holds the data that is read; choose another folder")


def open_output(out: Path, identity: Mapping[str, Any], *, resume: bool) -> bool:
    """Make or check the output folder; whether it holds the finished export already.

    Raises:
        OutputError: foreign files, or a folder that cannot be written.
        SettingsError: an export, and `resume` is off or data or settings are others.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    about = check_output(out, resume=resume)
    if about is None:
        write_json(out / _BEGUN, identity)
        return False
    _check_same(about, identity)
    _refuse_links(out)
    if about.name == _DONE:
        shutil.rmtree(out / STATE, ignore_errors=True)
        return True
    for path in out.rglob(".*.tmp"):  # what `atomic_write` left when the process was killed
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)
    return False


def check_output(out: Path, *, resume: bool) -> Path | None:
    """The file that says which export `out` belongs to; None for a folder that is free, or not there.

    Raises:
        OutputError: foreign files.
        SettingsError: an export, and `resume` is off.
    """
    try:
        names = set(os.listdir(out)) if out.is_dir() else set()
    except OSError as error:
        raise cannot_write(out, error) from error
    about = next((out / name for name in (_DONE, _BEGUN) if (out / name).is_file()), None)
    if about is not None and not resume:
        raise SettingsError(
            f"{printable(out)} already holds an export; add resume=true to go on with it, or choose another folder"
        )
    foreign = sorted(names - {STATE})
    if about is None and foreign:
        raise OutputError(
            f"{printable(out)} is not empty and holds no export (found {foreign[0]!r}); choose an empty or a new folder"
        )
    return about


def _refuse_links(out: Path) -> None:
    """Raise where a link in the output would lead what is written outside of it; originals may be links to files."""
    for folder, folders, files in os.walk(out):
        inside = [*folders, *(files if STATE in Path(folder).relative_to(out).parts else ())]
        link = next((Path(folder, name) for name in inside if Path(folder, name).is_symlink()), None)
        if link is not None:
            raise OutputError(f"{printable(link)} is a link, and an export writes nothing through links; remove it")


def _check_same(about: Path, identity: Mapping[str, Any]) -> None:
    try:
        old = json.loads(about.read_text(encoding="utf-8"))
        old_settings = dict(old["settings"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{printable(about)} is damaged ({error}); choose a new output folder") from error
    new = json.loads(json.dumps(identity))
    settings = new.pop("settings")
    changed = [name for name, value in settings.items() if old_settings.get(name) != value]
    changed += [name for name, value in new.items() if old.get(name) != value]
    if changed:
        words = {"entries": "data (images were added, removed or renamed)", "form": "format"}
        names = ", ".join(words.get(name, name) for name in changed)
        raise SettingsError(f"cannot resume {printable(about.parent)}: {names} changed; use the same or a new folder")


@contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """Keep a second export out of the folder; the lock falls with the process, however that ends."""
    lock = filelock.FileLock(out / STATE / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise OutputError(f"another export is writing to {printable(out)}; wait for it") from error
    with lock:
        yield


def reopen(out: Path, identity: Mapping[str, Any]) -> None:
    """Take the finished export for one that was begun, since files of it are gone; to be done again from the start."""
    write_json(out / _BEGUN, identity)
    (out / _DONE).unlink()


def mark_done(out: Path, identity: Mapping[str, Any]) -> None:
    """Say that the export is finished, and remove the working folder."""
    write_json(out / _DONE, identity)
    shutil.rmtree(out / STATE, ignore_errors=True)
