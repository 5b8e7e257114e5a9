"""The units of an export, planned and carried out: originals first, then rounds of new images."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from gen_invariance.errors import DataError, OutputError, printable
from gen_invariance.export.formats.base import Entry, Row
from gen_invariance.export.manifest import read_unit
from gen_invariance.export.settings import target_sizes
from gen_invariance.export.units import Job, RunUnits, Unit


def carry_out(job: Job, entries: Sequence[Entry], run: RunUnits, *, progress: bool) -> None:
    """Carry out all units that are not recorded yet.

    Originals are looked at first: which can be read, how many has each class, and how they look. Then rounds of new
    images follow until no class lacks any, or no tries are left. The plan of each round follows from the records of
    those before, so a killed export finds it again.

    Raises:
        DataError: no image can be used.
        OutputError: a new image would get the name of an original.
    """
    settings = job.settings
    _run_missing(job, run, _make_units(job, "a", [(entry, -1) for entry in entries]), "originals", progress)
    sources, ranges = _sources_and_ranges(job, entries)
    have, used = [len(rows) for rows in sources], [0] * len(sources)
    goals = target_sizes(have, settings)
    taken = _names_like_results(job, entries)
    for number in range(settings.tries):
        items = []
        for label, rows in enumerate(sources):
            items += _next_draws(rows, used[label], goals[label] - have[label], settings.per_source)
        if not items:
            break
        units = _make_units(job, f"b{number}", items, ranges)
        _run_missing(job, run, units, f"new images, round {number + 1}", progress)
        for row in read_rows(job, f"b{number}"):
            used[row["label"]] += 1
            have[row["label"]] += row["status"] == "kept"
            if row["file"] in taken:
                raise OutputError(f"a new image would replace the original {row['file']}; choose another seed")


def read_rows(job: Job, prefix: str = "") -> Iterator[Row]:
    """Rows of all recorded units whose names begin with `prefix`, in order, one unit in memory at a time."""
    for path in sorted((job.output.state / "units").glob(f"{prefix}*.jsonl")):
        yield from read_unit(path)


def _make_units(
    job: Job, prefix: str, items: Sequence[tuple[Entry, int]], ranges: np.ndarray | None = None
) -> list[Unit]:
    """`items` in units of the batch size, whoever works on them: images that share a unit may share a batch."""
    size, kind = job.settings.batch_size, "original" if ranges is None else "generated"
    return [
        Unit(f"{prefix}-{number:07d}", kind, tuple(items[start : start + size]), ranges)
        for number, start in enumerate(range(0, len(items), size))
    ]


def _run_missing(job: Job, run: RunUnits, units: Sequence[Unit], label: str, progress: bool) -> None:
    """Carry out the units that have no record yet."""
    sizes = {unit.name: len(unit.items) for unit in units}
    missing = [unit for unit in units if not job.record_path(unit.name).is_file()]
    with tqdm(total=sum(sizes.values()), desc=label, unit="image", disable=not progress) as bar:
        bar.update(bar.total - sum(len(unit.items) for unit in missing))
        for name in run(missing):
            bar.update(sizes[name])


def _sources_and_ranges(job: Job, entries: Sequence[Entry]) -> tuple[list[list[Entry]], np.ndarray]:
    """Usable training images of each class in the order they serve as sources, and the range of their statistics."""
    sources: list[list[Entry]] = [[] for _ in job.data.class_names]
    statistics, problem = [], ""
    for entry, row in zip(entries, read_rows(job, "a"), strict=True):
        if row["reason"] and not problem:
            problem = f"; the first of {len(entries)} files, {printable(entry.key)}: {row['reason']}"
        if row["status"] == "kept" and row["part"] == "train":
            sources[entry.label].append(entry)
            statistics.append(row["statistics"])
    if not statistics:
        problem = problem or ", and no file in a class"
        raise DataError(f"{printable(job.data.path)} holds no image that can be used{problem}")
    for rows in sources:  # a random but fixed order, so that a class that needs few new images does not favour "a..."
        rows.sort(key=lambda entry: hashlib.sha256(f"{job.settings.seed}/{entry.key!a}".encode()).digest())
    return sources, np.quantile(np.asarray(statistics), [0.01, 0.99], axis=0)


def _next_draws(
    sources: Sequence[Entry], used: int, missing: int, per_source: int | None
) -> Iterator[tuple[Entry, int]]:
    """The next `missing` pairs of source and draw number: all sources once, then all of them again."""
    if not sources:
        return
    most = len(sources) * per_source if per_source else sys.maxsize
    for number in range(used, min(used + max(missing, 0), most)):
        copy, index = divmod(number, len(sources))
        yield sources[index], copy


def _names_like_results(job: Job, entries: Sequence[Entry]) -> set[str]:
    """Names of originals that a new image might take: those that look like results of an export."""
    if job.data.name != "folder":
        return set()
    files = (entry.location[0] for entry in entries)
    return {file for file in files if re.search(r"__\d{3,}-[0-9a-f]{10}\.png$", file)}
