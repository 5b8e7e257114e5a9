"""A grid of (benchmark, arm, class order, training seed): what is missing is measured, what failed is recorded.

A cell's figures depend on its settings, its order and its seed alone, so cells may be measured in any order, by any
process or machine, and again. A folder holds `records/`, the run folders of the cells and of the translators they
share (`cells/`, `fits/`), and the report. Killed at any moment, the same command goes on with what is left.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch

from gen_invariance.benchmark.arms import Arm
from gen_invariance.benchmark.jobs import run_jobs
from gen_invariance.benchmark.registry import Benchmark, TranslatorFit, translator_fit
from gen_invariance.data.readers.registry import load_source
from gen_invariance.errors import GenInvarianceError, RunError, SettingsError
from gen_invariance.experiment.cell import CellInputs, cell_digest, run_cell
from gen_invariance.experiment.task import Prepared, Task, prepare
from gen_invariance.files import write_json
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.records import Cell, Record, RecordWriter, finished_cells, load_records, provenance
from gen_invariance.report.metrics import progress_line
from gen_invariance.run import Run, config_digest
from gen_invariance.settings import settings_of


@dataclass(frozen=True)
class GridCell:
    """One cell; picklable."""

    benchmark: Benchmark
    arm: Arm
    order: int
    seed: int
    learned: TranslatorFit | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the settings, without order and seed."""
        fits = {"fit": self.arm.fit, "learned": self.learned, "given": self.arm.given}
        more = {name: fit.identity() for name, fit in fits.items() if fit is not None}
        measure = asdict(self.benchmark.measure)
        return cell_digest(
            self.benchmark.task, self.arm.method, draws=self.benchmark.measure.draws, measure=measure, **more
        )

    @property
    def key(self) -> Cell:
        """As in the records."""
        return Cell(self.benchmark.name, self.digest, self.arm.name, self.seed, self.order)

    @property
    def folder(self) -> str:
        """Run folder below the grid's."""
        words = "".join(letter if letter.isalnum() else "-" for letter in self.arm.name)
        return f"cells/{self.benchmark.name}/{words}-{self.digest[:8]}/order{self.order}-seed{self.seed}"


@dataclass(frozen=True)
class _Job:
    """A cell to measure, or (without one) a translator to fit."""

    name: str  # folder of the run, which tells jobs apart
    benchmark: Benchmark
    order: int
    cell: GridCell | None = None
    fit: TranslatorFit | None = None
    needs: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Job) and self.name == other.name


def grid_cells(
    benchmarks: Sequence[Benchmark],
    arms: Callable[[Benchmark], Sequence[Arm]],
    *,
    orders: Sequence[int],
    seeds: Sequence[int],
    learned: Callable[[Benchmark], TranslatorFit | None] = lambda benchmark: None,
) -> list[GridCell]:
    """All cells, those on the same images beside each other.

    Args:
        benchmarks: to measure on.
        arms: to compare on a benchmark.
        orders: numbers of class orders; images and their draws follow from them.
        seeds: of training.
        learned: translator that invariance is measured against, too.
    """
    return [
        GridCell(benchmark, arm, order, seed, learned(benchmark))
        for benchmark in benchmarks
        for order in orders
        for arm in arms(benchmark)
        for seed in seeds
    ]


def run_grid(
    cells: Sequence[GridCell],
    out: Path | str,
    *,
    processes: int = 1,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Measure the cells that `out` lacks; a line for each that failed.

    Args:
        cells: from `grid_cells`.
        out: folder; a grid that was stopped there goes on.
        processes: workers of one torch thread each; 1 works in this process.
        shard: (i, n) does the i-th of n parts, from 0, so that n machines share the work. A part holds whole
            (benchmark, order) groups, since these share images and translators.
        device: where to compute.
        say: is told what is done, a line at a time.

    Raises:
        DataNotFoundError: files of a benchmark are missing; names them.
        RunError: a worker process died.
    """
    out = Path(out)
    for benchmark in {cell.benchmark.name: cell.benchmark for cell in cells}.values():
        if benchmark.missing():
            load_source(benchmark.task.source, benchmark.task.path)  # downloads it, or says what to put where
    done = finished_cells(out / "records")
    missing = [cell for cell in _of_shard(cells, *shard) if cell.key not in done]
    jobs = list(_jobs(missing, out))
    say(f"{len(cells)} cells, {len(missing)} to measure and {len(jobs) - len(missing)} translators to fit")
    for benchmark, order in {cell.benchmark.name: (cell.benchmark, cell.order) for cell in reversed(missing)}.values():
        for line in _notes(benchmark, order):
            say(f"{benchmark.name}: {line}")
    if processes > 1:
        _prepared.cache_clear()  # the workers read for themselves
    failed = []
    names = {job.name: job for job in jobs}
    results = run_jobs(
        jobs,
        functools.partial(_do, str(out), str(device)),
        needs=lambda job: [names[name] for name in job.needs if name in names],
        processes=processes,
    )
    for number, ended in enumerate(results, start=1):
        line = ended.answer if ended.error is None else f"{ended.job.name} failed: {ended.error}"
        say(f"[{number}/{len(jobs)}] {line}")
        if ended.error is not None and ended.job.cell is not None:
            failed.append(f"{ended.job.name}: {ended.error}")
    return failed


def _of_shard(cells: Sequence[GridCell], index: int, parts: int) -> Iterator[GridCell]:
    if not 0 <= index < parts:
        raise SettingsError(f"shard must be i/n with 0 <= i < n, got {index}/{parts}; the first of four is 0/4")
    groups: dict[tuple[str, int], int] = {}
    for cell in cells:
        number = groups.setdefault((cell.benchmark.name, cell.order), len(groups))
        if number % parts == index:
            yield cell


def _jobs(cells: Sequence[GridCell], out: Path) -> Iterator[_Job]:
    """Missing fits and cells; a cell needs the translator of its arm and the one it is measured against."""
    known = set()
    for cell in cells:
        needs = []
        for fit in (cell.arm.fit, cell.learned):
            if fit is None:
                continue
            name = _fit_folder(cell.benchmark, fit, cell.order)
            needs.append(name)
            if name not in known and not (out / name / "seconds.json").exists():
                known.add(name)
                yield _Job(name, cell.benchmark, cell.order, fit=fit)
        yield _Job(cell.folder, cell.benchmark, cell.order, cell=cell, needs=tuple(dict.fromkeys(needs)))


def _fit_folder(benchmark: Benchmark, fit: TranslatorFit, order: int) -> str:
    path = None if benchmark.task.path is None else Path(benchmark.task.path).name
    digest = config_digest({"task": {**benchmark.task.identity(), "path": path}, "fit": fit.identity()})
    return f"fits/{benchmark.name}/{fit.choice}-{digest[:8]}/order{order}"


@functools.lru_cache(maxsize=2)  # the cut, and the cut with its tail filled up
def _prepared(text: str, order: int) -> Prepared:
    """Images of a task given as JSON, kept for the next job on them."""
    return prepare(Task(**json.loads(text)), seed=order)


def _images(task: Task, order: int, device: str) -> Prepared:
    return _prepared(json.dumps(task.identity(), default=str), order).to(device)


def _notes(benchmark: Benchmark, order: int) -> list[str]:
    """What is wrong with the images of a benchmark, a line each."""
    try:
        return _images(benchmark.task, order, "cpu").duplicates.lines()
    except GenInvarianceError:  # the job on them meets it, too, and says it
        return []


def _do(out: str, device: str, job: _Job, error: str | None) -> str:
    task = job.benchmark.task
    prepared = functools.partial(_images, task, job.order, device)  # its errors are those of the job
    if job.cell is None:
        return _fit(Path(out) / job.name, job, prepared())
    writer = RecordWriter(Path(out) / "records")
    try:
        if error is not None:
            raise RunError(f"its translator could not be fitted ({error})")
        filled = None
        if job.cell.arm.method.more_real:
            filled = _images(replace(task, fill_tail=True), job.order, device)
        records = _measure(Path(out), job.cell, prepared(), filled)
    except Exception as problem:
        writer.write_failure(_failure(job.cell), problem)
        raise
    writer.write_cell(records)
    found = {record.metric: record.value for record in records if record.class_index is None}
    return (
        f"{job.benchmark.name}, order {job.order}, seed {job.cell.seed}: {job.cell.arm.name} - "
        f"{progress_line(found)}, {records[0].seconds:.0f} s"
    )


def _failure(cell: GridCell) -> Record:
    about = {"benchmark": cell.benchmark.name, "method": cell.arm.name, "config_digest": cell.digest}
    return Record(**about, seed=cell.seed, order=cell.order, metric="failed", value=1, **provenance())


def _measure(out: Path, cell: GridCell, prepared: Prepared, filled: Prepared | None) -> list[Record]:
    benchmark = cell.benchmark
    if benchmark.measure.nuisance is not None:
        prepared = replace(prepared, nuisance=build_nuisance(benchmark.measure.nuisance))
    if cell.arm.given is not None:
        translator, fit_seconds = cell.arm.given.load().to(prepared.train.device), None
    else:
        translator, fit_seconds = _loaded(out, benchmark, cell.arm.fit, cell.order, prepared)
    learned, _ = _loaded(out, benchmark, cell.learned, cell.order, prepared)
    return run_cell(
        benchmark.task,
        cell.arm.method,
        CellInputs(prepared, filled=filled, translator=translator, fit_seconds=fit_seconds, learned=learned),
        seed=cell.seed,
        folder=out / cell.folder,
        measure=benchmark.measure,
        benchmark=benchmark.name,
        order=cell.order,
        config_digest=cell.digest,
    )


def _loaded(
    out: Path, benchmark: Benchmark, fit: TranslatorFit | None, order: int, prepared: Prepared
) -> tuple[Any, float | None]:
    """The fitted translator and what fitting took; nothing for None."""
    if fit is None:
        return None, None
    from gen_invariance.translator.io import load_translator

    folder = out / _fit_folder(benchmark, fit, order)
    seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))["seconds"]
    return load_translator(folder).to(prepared.train.device), seconds


def _fit(folder: Path, job: _Job, prepared: Prepared) -> str:
    from gen_invariance.translator.fit import fit_translator
    from gen_invariance.translator.fit_settings import FitSettings

    fit = job.fit
    loop = settings_of(FitSettings, {"flip": prepared.flip_safe, **fit.loop}, "fit")
    config = {"benchmark": job.benchmark.name, "fit": fit.identity()}
    started = perf_counter()
    with Run.open(folder, kind="fit", seed=job.order, config=config, resume=True) as run:
        fit_translator(
            fit.name, prepared.train, loop, network=fit.network, objective=fit.objective, out=run, progress=False
        )
    seconds = perf_counter() - started
    write_json(folder / "seconds.json", {"seconds": seconds})
    return f"{job.benchmark.name}, order {job.order}: {fit.choice} fitted in {seconds:.0f} s"


def grid_records(cells: Sequence[GridCell], out: Path | str) -> pd.DataFrame:
    """The records of `cells` in `out`, failures included, methods in the order of the cells.

    Raises:
        DataNotFoundError: there are none.
    """
    frame = load_records(Path(out) / "records")
    wanted = {cell.key for cell in cells}
    numbers = {name: number for number, name in enumerate(dict.fromkeys((c.benchmark.name, c.arm.name) for c in cells))}
    keys = frame[["benchmark", "config_digest", "method", "seed", "order"]].itertuples(index=False)
    known = [Cell(b, d, m, int(s), None if pd.isna(o) else int(o)) in wanted for b, d, m, s, o in keys]
    frame = frame[known]
    place = [numbers[pair] for pair in zip(frame["benchmark"], frame["method"], strict=True)]
    return frame.iloc[pd.Series(place, dtype=int).argsort(kind="stable")].reset_index(drop=True)


def learned_of(choice: str | None, configs: Path | str) -> Callable[[Benchmark], TranslatorFit | None]:
    """For `grid_cells`: the translator of the file `choice` on each benchmark, or None."""
    return lambda benchmark: None if choice is None else translator_fit(choice, benchmark, configs)
