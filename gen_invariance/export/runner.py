"""`export_dataset`: plan, carry out, and finish; a killed one goes on where it was, to the same bytes.

originals  ->  are they readable, how many has each class, what do they look like
rounds     ->  as many new images as classes lack; rejected ones are made up for by other draws
finish     ->  index of the format, manifest, preview page; the working folder goes last
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from gen_invariance.errors import DataError, OutputError, printable
from gen_invariance.export.formats.base import RESERVED, Entry, Format, Output, Row
from gen_invariance.export.manifest import read_manifest, write_manifest
from gen_invariance.export.output import STATE, keep_apart, lock_output, mark_done, open_output, reopen
from gen_invariance.export.preview import write_preview
from gen_invariance.export.rounds import carry_out, read_rows, refuse_changed_originals
from gen_invariance.export.settings import ExportSettings, WorkerSettings, is_capped, target_sizes
from gen_invariance.export.units import Job, Predict, translator_token
from gen_invariance.export.workers import start_workers
from gen_invariance.nuisance.protocol import Nuisance


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
        capped: those of them that `per_source` keeps from it.
        per_source: results from one source at most.
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
    capped: tuple[str, ...] = ()
    per_source: int | None = None


def export_dataset(
    data: Format,
    nuisance: Nuisance,
    out: Path | str,
    settings: ExportSettings | None = None,
    *,
    workers: WorkerSettings | None = None,
    predict: Predict | None = None,
    resume: bool = False,
    progress: bool = False,
) -> ExportSummary:
    """Write a copy of `data` in which small classes have grown by translated images of their own.

        data = open_format("folder", "photos")
        summary = export_dataset(data, load_translator("runs/fit"), "photos-balanced", ExportSettings(target="median"))

    Args:
        data: see `open_format`; never written to.
        nuisance: a translator, or a hand-written nuisance.
        out: a new or empty folder, or one to resume.
        settings: see `ExportSettings`.
        workers: device and processes, see `WorkerSettings`.
        predict: images float (B, C, H, W) in [0, 1] to logits (B, K), class numbers as in `data.class_names`; results
            it takes for another class are rejected.
        resume: go on with the export that is in `out`.
        progress: show a bar.

    Raises:
        OutputError: `out` holds other files, lies in the input or around it, or cannot be written.
        SettingsError: `out` holds an export and `resume` is off, or one of other data or settings.
        DataError: no image can be used; an original has changed since the export in `out` began.
        RunError: a worker died.

    Example:
        >>> import numpy as np
        >>> images = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
        >>> np.savez("few.npz", train_images=images, train_labels=np.arange(12) // 9)
        >>> from gen_invariance import ExportSettings, Rotation, export_dataset, open_format
        >>> settings = ExportSettings(target="max", off_distribution=None)
        >>> export_dataset(open_format("npz", "few.npz"), Rotation(20), "balanced", settings).after
        (9, 9)
    """
    settings, workers = settings or ExportSettings(), workers or WorkerSettings()
    out = Path(out).expanduser()
    keep_apart(data.path, out)
    entries, token = data.entries(), translator_token(nuisance)
    _check_names(data, entries)
    identity = {
        "form": data.name,
        "entries": _digest(entries),
        "translator": token,
        "classifier": translator_token(predict) if isinstance(predict, nn.Module) else predict is not None,
        "settings": settings.identity(),
    }
    done = open_output(out, identity, resume=resume)
    if done:
        refuse_changed_originals(data, out, entries, read_manifest(out))
    if done and not all(data.holds_image(out, row) for row in read_manifest(out) if row["status"] == "kept"):
        reopen(out, identity)
        done = False
    if not done:
        output = Output(out, out / STATE, settings.originals)
        job = Job(data, output, settings, nuisance, token, predict, workers.device)
        with lock_output(out):
            with start_workers(job, workers) as run:
                carry_out(job, entries, run, progress=progress)
            by_key = {entry.key: entry for entry in entries}
            data.finish(output, (row for row in read_rows(job) if row["status"] == "kept"), by_key)
            write_manifest(out, _rows_with_files(job))
            write_preview(out, data, by_key)
            mark_done(out, identity)
    return _summarise(out, data, settings)


def _check_names(data: Format, entries: Sequence[Entry]) -> None:
    """Refuse originals whose place in the output is one of the files that every export writes."""
    for entry in entries:
        name = "" if entry.ignored or entry.problem else data.file_name(entry, None).partition("/")[0]
        if name in RESERVED:
            raise DataError(
                f"{printable(data.path)}: the export writes a file called {name}, as {printable(entry.key)} asks for; "
                "rename it"
            )


def _digest(entries: Sequence[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr((entry.key, entry.label, entry.part, entry.ignored)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _rows_with_files(job: Job) -> Iterator[Row]:
    """All rows, with where each image is in the finished output; then a row for each class that lacks images."""
    index, names = 0, job.data.class_names
    before, after = [0] * len(names), [0] * len(names)
    for row in read_rows(job):
        generated, kept = row["kind"] == "generated", row["status"] == "kept"
        if kept and (generated or job.settings.originals != "reference"):
            row["file"] = job.data.manifest_file(row, index)
            index += generated
        if kept and row["part"] == "train":
            before[row["label"]] += not generated
            after[row["label"]] += 1
        yield row
    goals = target_sizes(before, job.settings)
    for label, (goal, count) in enumerate(zip(goals, after, strict=True)):
        if count < goal:
            about = {"class": names[label], "label": label, "part": "train", "kind": "class", "status": "short"}
            why = _why_short(before[label], goal, job.settings)
            yield about | {"file": "", "source": "", "reason": f"lacks {goal - count} of {goal} images: {why}"}


def _why_short(count: int, goal: int, settings: ExportSettings) -> str:
    if is_capped(count, goal, settings):
        return f"per_source={settings.per_source}, and it has {count}"
    return f"results were rejected (tries={settings.tries})" if count else "it has none"


def _summarise(out: Path, data: Format, settings: ExportSettings) -> ExportSummary:
    """Counts and lists from the manifest."""
    before, after = [0] * len(data.class_names), [0] * len(data.class_names)
    listed: dict[str, list[tuple[str, str]]] = {"unusable": [], "ignored": [], "rejected": []}
    for row in read_manifest(out):
        if row["status"] in listed:
            listed[row["status"]].append((row["source"], row["reason"]))
        if row["status"] == "kept" and row["part"] == "train":
            if row["label"] not in range(len(after)):
                raise OutputError(f"{out / 'manifest.jsonl'} is damaged (a label of no class); delete this folder")
            after[row["label"]] += 1
            before[row["label"]] += row["kind"] == "original"
    goals = list(zip(data.class_names, target_sizes(before, settings), before, after, strict=True))
    return ExportSummary(
        out,
        data.class_names,
        before=tuple(before),
        after=tuple(after),
        rejected=len(listed["rejected"]),
        problems=tuple(listed["unusable"]),
        ignored=tuple(listed["ignored"]),
        short=tuple((name, goal - count) for name, goal, _, count in goals if count < goal),
        copied_in="" if settings.originals == "reference" else data.copied_whole,
        capped=tuple(name for name, goal, old, count in goals if count < goal and is_capped(old, goal, settings)),
        per_source=settings.per_source,
    )
