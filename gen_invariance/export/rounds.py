"""The units of an export, planned and carried out: originals first, then rounds of new images."""

from __future__ import annotations

import hashlib
import heapq
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gen_invariance.data.readers.pictures import UnusablePictureError
from gen_invariance.errors import DataError, OutputError, printable
from gen_invariance.export.formats.base import Entry, Format, Row
from gen_invariance.export.manifest import read_unit
from gen_invariance.export.settings import target_sizes
from gen_invariance.export.units import UNIT_PIXELS, Item, Job, RunUnits, Unit, cut_by_pixels


def carry_out(job: Job, entries: Sequence[Entry], run: RunUnits, *, progress: bool) -> None:
    """Carry out all units that are not recorded yet.

    Originals are looked at first: which can be read, how many has each class, and how they look. Then rounds of new
    images follow until no class lacks any, or no tries are left. The plan of each round follows from the records of
    those before, so a killed export finds it again.

    Raises:
        DataError: no image can be used; an original has changed since it was looked at.
        OutputError: a new image would get the name of an original.
    """
    settings = job.settings
    _forget_damaged_units(job)
    refuse_changed_originals(job.data, job.output.folder, entries, read_rows(job, "a"))
    _run_missing(job, run, _make_units(job, "a", [(entry, -1) for entry in entries]), "originals", progress)
    sources, ranges = _sources_and_ranges(job, entries)
    goals = target_sizes([len(rows) for rows in sources], settings)
    missing = [goal - len(rows) for goal, rows in zip(goals, sources, strict=True)]
    by_key = {source.entry.key: source for rows in sources for source in rows}
    taken = _names_like_results(job, entries)
    for number in range(settings.tries):
        draws = []
        for label, rows in enumerate(sources):
            draws += next_draws(rows, missing[label], settings.per_source)
        if not draws:
            break
        units = _make_units(
            job, f"b{number}", [(source.entry, copy) for source, copy in draws], ranges, [s.pixels for s, _ in draws]
        )
        _run_missing(job, run, units, f"new images, round {number + 1}", progress)
        for row in read_rows(job, f"b{number}"):
            source = by_key[row["source"]]
            source.drawn += 1
            if row["status"] == "kept":
                source.kept += 1
                missing[row["label"]] -= 1
            if row["file"] in taken:
                raise OutputError(f"a new image would replace the original {row['file']}; choose another seed")


def _forget_damaged_units(job: Job) -> None:
    """Remove the records of units whose files are not in the output any more, so that they are done again."""
    for path in sorted((job.output.state / "units").glob("[!.]*.jsonl")):
        rows = [row for row in read_unit(path) if row["status"] == "kept"]
        if not job.data.holds_unit(job.output, path.stem, rows):
            path.unlink()


def refuse_changed_originals(data: Format, out: Path, entries: Sequence[Entry], rows: Iterable[Row]) -> None:
    """Raise `DataError` where an original that `rows` say was kept in `out` has other bytes or pixels now."""
    by_key = {entry.key: entry for entry in entries}

    def has_changed(row: Row) -> bool:
        try:
            return hashlib.sha256(data.read(by_key[row["source"]])).hexdigest() != row["sha256"]
        except (OSError, KeyError, UnusablePictureError):
            return True

    kept = (row for row in rows if row["kind"] == "original" and row["status"] == "kept")
    changed = next(filter(has_changed, kept), None)
    if changed is not None:
        raise DataError(
            f"cannot resume {printable(out)}: {printable(changed['source'])} is not the image it was when "
            "the export began; restore it, or choose a new folder"
        )


def read_rows(job: Job, prefix: str = "") -> Iterator[Row]:
    """Rows of all recorded units whose names begin with `prefix`, in order, one unit in memory at a time."""
    for path in sorted((job.output.state / "units").glob(f"{prefix}*.jsonl")):
        yield from read_unit(path)


def _make_units(
    job: Job,
    prefix: str,
    items: Sequence[Item],
    ranges: np.ndarray | None = None,
    pixels: Sequence[int] = (),
) -> list[Unit]:
    """`items` in units, whoever works on them: images that share a unit may share a batch.

    A unit has as many as the batch size says, and fewer where native results of these `pixels` would be too large.
    """
    size, kind = job.settings.batch_size, "original" if ranges is None else "generated"
    parts = []
    for start in range(0, len(items), size):
        end = min(start + size, len(items))
        cuts = cut_by_pixels(pixels[start:end], most=UNIT_PIXELS) if job.is_native else []
        parts += pairwise([start, *(start + cut for cut in cuts), end])
    return [
        Unit(f"{prefix}-{number:07d}", kind, tuple(items[start:end]), ranges, tuple(pixels[start:end]))
        for number, (start, end) in enumerate(parts)
    ]


def _run_missing(job: Job, run: RunUnits, units: Sequence[Unit], label: str, progress: bool) -> None:
    """Carry out the units that have no record yet."""
    sizes = {unit.name: len(unit.items) for unit in units}
    missing = [unit for unit in units if not job.record_path(unit.name).is_file()]
    with tqdm(total=sum(sizes.values()), desc=label, unit="image", disable=not progress) as bar:
        bar.update(bar.total - sum(len(unit.items) for unit in missing))
        for name in run(missing):
            bar.update(sizes[name])


@dataclass
class Source:
    """A usable training image: how many pixels it has, and how many results were drawn of it and kept so far."""

    entry: Entry
    pixels: int = 0
    drawn: int = 0
    kept: int = 0


def _sources_and_ranges(job: Job, entries: Sequence[Entry]) -> tuple[list[list[Source]], np.ndarray]:
    """Usable training images of each class in the order they serve as sources, and the range of their statistics."""
    sources: list[list[Source]] = [[] for _ in job.data.class_names]
    statistics, problem = [], ""
    for entry, row in zip(entries, read_rows(job, "a"), strict=True):
        if row["reason"] and not problem:
            problem = f"; the first of {len(entries)} files, {printable(entry.key)}: {row['reason']}"
        if row["status"] == "kept" and row["part"] == "train":
            sources[entry.label].append(Source(entry, row["width"] * row["height"]))
            statistics.append(row["statistics"])
    if not statistics:
        problem = problem or ", and no file in a class"
        raise DataError(f"{printable(job.data.path)} holds no image that can be used{problem}")

    def place(source: Source) -> bytes:  # random but fixed, so that a class that needs few does not favour "a..."
        return hashlib.sha256(f"{job.settings.seed}/{source.entry.key!a}".encode()).digest()

    for rows in sources:
        rows.sort(key=place)
    return sources, np.quantile(np.asarray(statistics), [0.01, 0.99], axis=0)


def next_draws(sources: Sequence[Source], missing: int, per_source: int | None) -> list[tuple[Source, int]]:
    """At most `missing` pairs of source and number of its draw: those drawn least often first, in their order.

    No source gets more draws than it may still have results: `per_source` is the number of those at most.
    """
    most = sys.maxsize if per_source is None else per_source
    waiting = [(source.drawn, place, most - source.kept) for place, source in enumerate(sources) if source.kept < most]
    heapq.heapify(waiting)
    draws: list[tuple[Source, int]] = []
    while waiting and len(draws) < missing:
        copy, place, left = waiting[0]
        draws.append((sources[place], copy))
        if left > 1:
            heapq.heapreplace(waiting, (copy + 1, place, left - 1))
        else:
            heapq.heappop(waiting)
    return draws


def _names_like_results(job: Job, entries: Sequence[Entry]) -> set[str]:
    """Names of originals that a new image might take: those that look like results of an export."""
    if job.data.name != "folder":
        return set()
    files = (entry.location[0] for entry in entries)
    return {file for file in files if re.search(r"__\d{3,}-[0-9a-f]{10}\.\w+$", file)}
