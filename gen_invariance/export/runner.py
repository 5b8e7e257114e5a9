"""`export`: plan, carry out, and finish; a killed one goes on where it was, to the same bytes.

    originals  ->  are they readable, how many has each class, what do they look like
    rounds     ->  as many new images as classes lack; rejected ones are made up for by other draws
    finish     ->  index of the form, manifest, preview page; the working folder goes last

The plan of each round follows from the records of those before, so nothing but the records has to be kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from gen_invariance.errors import CheckpointError, DataError, OutputError, SettingsError
from gen_invariance.errors import printable as shown
from gen_invariance.export.formats.base import Entry, Finish, Form, Row
from gen_invariance.export.manifest import read_manifest, read_unit, write_manifest
from gen_invariance.export.preview import write_preview
from gen_invariance.export.settings import ExportSettings, goals_of
from gen_invariance.export.units import Job, Predict, Unit, token_of
from gen_invariance.export.workers import Workers
from gen_invariance.files import cannot_write, write_json
from gen_invariance.nuisance.protocol import Nuisance

if TYPE_CHECKING:
    from gen_invariance.export.ray import RayWorkers

ENGINES = ("local", "ray")
_STATE = ".gen_invariance"
_DONE = ".gen_invariance.json"


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        out: the output folder.
        class_names: K names.
        before, after: images of each class, of the training part.
        rejected: results that the filters kept out.
        problems: (source, reason) of each image that could not be used.
        ignored: (file, reason) of each file that is no image of a class.
        short: (class, images missing) of each class that did not reach the target.
        copied_in: what images that could not be used came into the output with, "shards" or "arrays"; "" if they are
            not in it.
    """

    out: Path
    class_names: tuple[str, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    rejected: int
    problems: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...]
    short: tuple[tuple[str, int], ...]
    copied_in: str = ""


def export(
    data: Form,
    nuisance: Nuisance,
    out: Path | str,
    settings: ExportSettings | None = None,
    *,
    predict: Predict | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    processes: int = 1,
    engine: str = "local",
    ray_address: str | None = None,
    progress: bool = False,
) -> ExportSummary:
    """Write a copy of `data` in which small classes have grown by translated images of their own.

    Args:
        data: see `open_form`; never written to.
        nuisance: a translator, or a hand-written nuisance.
        out: a new or empty folder, or one to resume.
        settings: see `ExportSettings`.
        predict: images float (B, C, H, W) in [0, 1] to logits (B, K), class numbers as in `data.class_names`; results
            it takes for another class are rejected.
        resume: go on with the export that is in `out`.
        device: where to translate. Equal bytes can be expected on equal devices only.
        processes: workers; the result does not depend on their number.
        engine: "local" for processes of this machine, "ray" for actors of a Ray cluster, see `on_ray`.
        ray_address: of a running cluster; None finds one by `RAY_ADDRESS`, or starts one on this machine.
        progress: show a bar.

    Raises:
        OutputError: `out` holds other files, lies in the input or around it, or cannot be written.
        SettingsError: `out` holds an export and `resume` is off, or one of other data or settings.
        DataError: no image can be used.
        RunError: a worker died.
    """
    settings = settings or ExportSettings()
    if not isinstance(processes, int) or processes < 1:
        raise SettingsError(f"export: processes must be a whole number of at least 1, got {processes!r}")
    if engine not in ENGINES:
        raise SettingsError(f"export: engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    out = Path(out).expanduser()
    keep_apart(data.path, out)
    entries = data.entries()
    token = token_of(nuisance)
    job = Job(data, out, out / _STATE, settings, nuisance, token, predict, str(device))
    identity = {
        "form": data.name,
        "entries": _digest(entries),
        "translator": token,
        "classifier": token_of(predict) if isinstance(predict, torch.nn.Module) else predict is not None,
        "settings": settings.identity(),
    }
    if _begin(out, identity, resume=resume):
        return _summary(out, data, settings)
    with _alone(job.state):
        with _workers(job, processes=processes, engine=engine, ray_address=ray_address) as workers:
            _carry_out(job, entries, workers, progress=progress)
        _finish(job, entries)
        write_json(out / _DONE, identity)
    shutil.rmtree(job.state, ignore_errors=True)
    return _summary(out, data, settings)


def _workers(job: Job, *, processes: int, engine: str, ray_address: str | None) -> Workers | RayWorkers:
    if engine == "local":
        return Workers(job, processes=processes)
    from gen_invariance.export.ray import RayWorkers  # an extra, and slow to import

    return RayWorkers(job, workers=processes, address=ray_address)


def keep_apart(source: Path, out: Path) -> None:
    """Raise `OutputError` when the output lies in the input, or around it."""
    read, written = source.resolve(), out.resolve()
    if not source.is_dir():
        return  # beside a table or an .npz file is a good place, and only a new or empty folder is written to
    if written == read or read in written.parents:
        raise OutputError(f"out={shown(out)} lies in the data that is read; choose a folder outside of {shown(read)}")
    if written in read.parents:
        raise OutputError(f"out={shown(out)} holds the data that is read; choose another folder")


def _digest(entries: Sequence[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr((entry.key, entry.label, entry.part, entry.ignored)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _begin(out: Path, identity: dict, *, resume: bool) -> bool:
    """Make or check the output folder; True when it holds the finished export already."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in out.iterdir()}
    except OSError as error:
        raise cannot_write(out, error) from error
    about = check_output(out, names, resume=resume)
    if about is None:
        write_json(out / _STATE / "export.json", identity)
        return False
    _check_same(about, identity)
    if about.name == _DONE:
        shutil.rmtree(out / _STATE, ignore_errors=True)
        return True
    _sweep(out)
    return False


def check_output(out: Path, names: Collection[str], *, resume: bool) -> Path | None:
    """The file that says which export `out`, which holds `names`, belongs to; None for a free folder.

    Raises:
        OutputError: foreign files.
        SettingsError: an export, and `resume` is off.
    """
    about = next((out / name for name in (_DONE, f"{_STATE}/export.json") if (out / name).is_file()), None)
    if about is not None and not resume:
        raise SettingsError(
            f"{shown(out)} already holds an export; add resume=true to go on with it, or choose another folder"
        )
    foreign = sorted(set(names) - {_STATE})
    if about is None and foreign:
        raise OutputError(
            f"{shown(out)} is not empty and holds no export (found {foreign[0]!r}); choose an empty or a new folder"
        )
    return about


def _check_same(about: Path, identity: dict) -> None:
    try:
        old = json.loads(about.read_text(encoding="utf-8"))
        old_settings = old["settings"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{shown(about)} is damaged ({error}); choose a new output folder") from error
    new = json.loads(json.dumps(identity))
    changed = [name for name in new["settings"] if old_settings.get(name) != new["settings"][name]]
    changed += [name for name in new if name != "settings" and old.get(name) != new[name]]
    if changed:
        names = ", ".join(
            {"entries": "data (images were added, removed or renamed)"}.get(name, name) for name in changed
        )
        raise SettingsError(f"cannot resume {shown(about.parent)}: {names} changed; use the same or a new folder")


def _sweep(out: Path) -> None:
    """Remove what `atomic_write` left when the process was killed."""
    for path in out.rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Keep a second export out of the folder; the lock falls with the process, however that ends."""
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "lock", "w") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(f"another export is writing to {shown(state.parent)}; wait for it") from error
        yield


def _carry_out(job: Job, entries: Sequence[Entry], workers: Workers | RayWorkers, *, progress: bool) -> None:
    """All units of all rounds that are not recorded yet."""
    settings = job.settings
    with tqdm(total=len(entries), desc="originals", unit="image", disable=not progress) as bar:
        units = _units("a", "original", [(entry, -1) for entry in entries], settings.batch_size)
        _run(job, units, workers, bar)
    sources, ranges = _looked_over(job, entries)
    have = [len(rows) for rows in sources]
    goals = goals_of(have, settings)
    used = [0] * len(have)
    taken = _file_names(job, entries)
    for round_ in range(settings.tries):
        items = [
            item
            for label, rows in enumerate(sources)
            for item in _candidates(rows, used[label], goals[label] - have[label], settings)
        ]
        if not items:
            break
        units = _units(f"b{round_}", "generated", items, settings.batch_size, ranges)
        with tqdm(total=len(items), desc=f"new images, round {round_ + 1}", unit="image", disable=not progress) as bar:
            _run(job, units, workers, bar)
        for row in _rows(job, f"b{round_}"):
            used[row["label"]] += 1
            have[row["label"]] += row["status"] == "kept"
            if row["file"] in taken:
                raise OutputError(f"a new image would replace the original {row['file']}; choose another seed")


def _file_names(job: Job, entries: Sequence[Entry]) -> set[str]:
    """Names of originals that a new image might take: those that look like results of an export."""
    if job.form.name != "folder":
        return set()
    return {entry.place[0] for entry in entries if re.search(r"__\d{3,}-[0-9a-f]{10}\.png$", entry.place[0])}


def _units(
    prefix: str, kind: str, items: Sequence[tuple[Entry, int]], size: int, ranges: np.ndarray | None = None
) -> list[Unit]:
    """`items` in units of `size`, whoever works on them: images that share a unit may share a batch."""
    return [
        Unit(f"{prefix}-{number:07d}", kind, tuple(items[start : start + size]), ranges)
        for number, start in enumerate(range(0, len(items), size))
    ]


def _run(job: Job, units: Sequence[Unit], workers: Workers | RayWorkers, bar: tqdm) -> None:
    """Carry out the units that have no record yet."""
    sizes = {unit.name: len(unit.items) for unit in units}
    missing = [unit for unit in units if not (job.state / "units" / f"{unit.name}.jsonl").is_file()]
    bar.update(sum(sizes.values()) - sum(len(unit.items) for unit in missing))
    if missing:
        for name in workers.run(missing):
            bar.update(sizes[name])


def _rows(job: Job, prefix: str = "") -> Iterator[Row]:
    """Rows of all recorded units whose names begin with `prefix`, in order, one unit in memory at a time."""
    for path in sorted((job.state / "units").glob(f"{prefix}*.jsonl")):
        yield from read_unit(path)


def _looked_over(job: Job, entries: Sequence[Entry]) -> tuple[list[list[Entry]], np.ndarray]:
    """Usable training images of each class in the order they serve as sources, and the range of their statistics."""
    sources: list[list[Entry]] = [[] for _ in job.form.class_names]
    statistics, first = [], ""
    for entry, row in zip(entries, _rows(job, "a"), strict=True):
        first = first or (row["reason"] and f"; the first of {len(entries)} files, {shown(entry.key)}: {row['reason']}")
        if row["status"] == "kept" and row["part"] == "train":
            sources[entry.label].append(entry)
            statistics.append(row["statistics"])
    if not statistics:
        raise DataError(f"{shown(job.form.path)} holds no image that can be used{first or ', and no file in a class'}")
    for rows in sources:  # a random but fixed order, so that a class that needs few new images does not favour "a..."
        rows.sort(key=lambda entry: hashlib.sha256(f"{job.settings.seed}/{entry.key!a}".encode()).digest())
    return sources, np.quantile(np.asarray(statistics), [0.01, 0.99], axis=0)


def _candidates(
    sources: Sequence[Entry], used: int, missing: int, settings: ExportSettings
) -> Iterator[tuple[Entry, int]]:
    """The next `missing` pairs of source and draw number: all sources once, then all of them again."""
    if not sources:
        return
    most = len(sources) * settings.per_source if settings.per_source else sys.maxsize
    for number in range(used, min(used + max(missing, 0), most)):
        copy, place = divmod(number, len(sources))
        yield sources[place], copy


def _finish(job: Job, entries: Sequence[Entry]) -> None:
    """Index, manifest, preview; each written whole, and again where a kill came between."""
    by_key = {entry.key: entry for entry in entries}
    work = Finish(job.out, job.state, lambda: _rows(job), by_key, job.settings.originals)
    job.form.finish(work)
    write_manifest(job.out, _numbered(job))
    write_preview(job.out, job.form, by_key)


def _numbered(job: Job) -> Iterator[Row]:
    """All rows, with the place that each image has in the finished output."""
    number = 0
    for row in _rows(job):
        if row["status"] == "kept" and (row["kind"] == "generated" or job.settings.originals != "reference"):
            row["file"] = job.form.manifest_file(row, number)
        number += row["status"] == "kept" and row["kind"] == "generated"
        yield row


def _summary(out: Path, data: Form, settings: ExportSettings) -> ExportSummary:
    """Counts and lists from the manifest."""
    classes = len(data.class_names)
    before, after, rejected = [0] * classes, [0] * classes, 0
    problems, ignored = [], []
    for row in read_manifest(out):
        if row["status"] == "kept" and row["part"] == "train":
            if row["label"] not in range(classes):
                raise OutputError(f"{out / 'manifest.jsonl'} is damaged (a label of no class); delete this folder")
            after[row["label"]] += 1
            before[row["label"]] += row["kind"] == "original"
        rejected += row["status"] == "rejected"
        listed = {"unusable": problems, "ignored": ignored}.get(row["status"])
        if listed is not None:
            listed.append((row["source"], row["reason"]))
    goals = goals_of(before, settings)
    short = [
        (name, goal - count) for name, goal, count in zip(data.class_names, goals, after, strict=True) if count < goal
    ]
    copied_in = "" if settings.originals == "reference" else data.copied_whole
    found = (tuple(before), tuple(after), rejected, tuple(problems), tuple(ignored), tuple(short))
    return ExportSummary(out, data.class_names, *found, copied_in)
