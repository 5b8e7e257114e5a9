"""A grid of (benchmark, arm, class order, training seed): what is missing is measured, what failed is recorded.

A cell's figures depend on its settings, its order and its seed alone, so cells may be measured in any order, by any
process or machine, and again. A folder holds `records/`, the run folders of the cells and of the translators they
share (`cells/`, `fits/`), and the report. Killed at any moment, the same command goes on with what is left.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch

from gen_invariance.benchmark.arms import Arm
from gen_invariance.benchmark.registry import Benchmark, TranslatorFit
from gen_invariance.data.identity import tie_folder
from gen_invariance.data.readers.registry import load_source
from gen_invariance.data.settings import SourceSettings
from gen_invariance.errors import CheckpointError, GenInvarianceError, RunError, SettingsError
from gen_invariance.experiment.cell import CellInputs, cell_digest, run_cell
from gen_invariance.experiment.launch import Say, say_nothing
from gen_invariance.experiment.settings import Task
from gen_invariance.experiment.task import Prepared, prepare
from gen_invariance.files import read_json, refuse_strangers, write_json
from gen_invariance.jobs import run_jobs
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.records import Cell, Record, RecordWriter, finished_cells, load_records, provenance, row_cells
from gen_invariance.report.metrics import progress_line
from gen_invariance.run import Run, config_digest
from gen_invariance.settings import read_settings
from gen_invariance.translator.quality.verdict import read_verdict
from gen_invariance.translator.settings import FitSettings


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
        fits: dict[str, Any] = {"fit": self.arm.fit, "learned": self.learned, "given": self.arm.given}
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

    @property
    def fit_folder(self) -> str | None:
        """Run folder of the translator that its arm has fitted, below the grid's."""
        return None if self.arm.fit is None else _name_fit_folder(self.benchmark, self.arm.fit, self.order)


@dataclass(frozen=True)
class _Job:
    """A cell to measure, or (without one) a translator to fit; jobs are told apart by their run folders."""

    name: str
    benchmark: Benchmark = field(compare=False)
    order: int = field(compare=False)
    cell: GridCell | None = field(default=None, compare=False)
    fit: TranslatorFit | None = field(default=None, compare=False)
    needs: tuple[str, ...] = field(default=(), compare=False)


def make_cells(
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
    say: Say = say_nothing,
) -> list[str]:
    """Measure the cells that `out` lacks; a line for each that failed.

    Args:
        cells: from `make_cells`.
        out: folder; a grid that was stopped there goes on.
        processes: workers of one torch thread each; 1 works in this process.
        shard: (i, n) does the i-th of n parts, from 0, so that n machines share the work. A part holds whole
            (benchmark, order) groups, since these share images and translators.
        device: where to compute.
        say: is told what is done, a line at a time.

    Raises:
        DataNotFoundError: files of a benchmark are missing; names them.
        DataError: the data are not those that `out` was begun on.
        RunError: a worker process died.
    """
    out = Path(out)
    refuse_strangers(out)
    for benchmark in {cell.benchmark.name: cell.benchmark for cell in cells}.values():
        if benchmark.missing():
            load_source(benchmark.task.source, benchmark.task.path)  # downloads it, or says what to put where
    done = finished_cells(out / "records")
    missing = [cell for cell in _select_shard(cells, *shard) if cell.key not in done]
    jobs = {job.name: job for job in _list_jobs(missing, out)}
    say(f"{len(cells)} cells, {len(missing)} to measure and {len(jobs) - len(missing)} translators to fit")
    for line in dict.fromkeys(line for cell in missing for line in _find_warnings(cell, out)):
        say(line)
    noted = set()
    for cell in missing:
        if cell.benchmark.name not in noted:
            noted.add(cell.benchmark.name)
            for line in _find_duplicates(out, cell.benchmark, cell.order):
                say(f"{cell.benchmark.name}: {line}")
    if processes > 1:
        _prepare.cache_clear()  # the workers read for themselves
    results = run_jobs(
        list(jobs.values()),
        functools.partial(_carry_out, str(out), str(device)),
        needs=lambda job: [jobs[name] for name in job.needs if name in jobs],
        processes=processes,
    )
    failed = []
    for number, ended in enumerate(results, start=1):
        line = ended.answer if ended.error is None else f"{ended.job.name} failed: {ended.error}"
        say(f"[{number}/{len(jobs)}] {line}")
        if ended.error is not None and ended.job.cell is not None:
            failed.append(f"{ended.job.name}: {ended.error}")
    return failed


def _find_warnings(cell: GridCell, out: Path) -> Iterator[str]:
    """A line for the cell's translator, given or fitted already, where the verdict on it is "do not use"."""
    if cell.arm.given is not None:
        yield from _warn_of(cell.arm.given.folder, f"{cell.benchmark.name}: {cell.arm.name}")
    if cell.fit_folder is not None and (out / cell.fit_folder / "seconds.json").exists():
        yield from _warn_of(out / cell.fit_folder, f"{cell.benchmark.name}, order {cell.order}: {cell.arm.name}")


def _warn_of(folder: Path | str, where: str) -> Iterator[str]:
    try:
        verdict = read_verdict(folder)
    except CheckpointError as error:  # whether the translator can be loaded, its cells say
        yield f"warning: {where}: {error}"
        return
    if verdict is not None and verdict.strength == 0:
        yield (
            f"warning: {where}: the verdict on this translator is '{verdict.word}': {verdict.first_reason}; it is "
            "measured all the same"
        )


def _select_shard(cells: Sequence[GridCell], index: int, parts: int) -> Iterator[GridCell]:
    if not 0 <= index < parts:
        raise SettingsError(f"shard must be i/n with 0 <= i < n, got {index}/{parts}; the first of four is 0/4")
    groups: dict[tuple[str, int], int] = {}
    for cell in cells:
        number = groups.setdefault((cell.benchmark.name, cell.order), len(groups))
        if number % parts == index:
            yield cell


def _list_jobs(cells: Sequence[GridCell], out: Path) -> Iterator[_Job]:
    """Missing fits and cells; a cell needs the translator of its arm and the one it is measured against."""
    listed = set()
    for cell in cells:
        fits = {}
        for fit in (cell.arm.fit, cell.learned):
            if fit is not None:
                fits[_name_fit_folder(cell.benchmark, fit, cell.order)] = fit
        for name, fit in fits.items():
            if name not in listed and not (out / name / "seconds.json").exists():
                listed.add(name)
                yield _Job(name, cell.benchmark, cell.order, fit=fit)
        yield _Job(cell.folder, cell.benchmark, cell.order, cell=cell, needs=tuple(fits))


def _name_fit_folder(benchmark: Benchmark, fit: TranslatorFit, order: int) -> str:
    path = None if benchmark.task.path is None else Path(benchmark.task.path).name
    digest = config_digest({"task": {**benchmark.task.identity(), "path": path}, "fit": fit.identity()})
    return f"fits/{benchmark.name}/{fit.choice}-{digest[:8]}/order{order}"


@functools.lru_cache(maxsize=2)  # the cut, and the cut with its tail filled up
def _prepare(text: str, order: int) -> Prepared:
    """Images of a task given as JSON, kept for the next job on them."""
    return prepare(Task(**json.loads(text)), seed=order, describe_source=True)


def _to_text(task: Task) -> str:
    return json.dumps(asdict(task), default=str)


def _prepare_on(out: Path, task: Task, order: int, device: str) -> Prepared:
    """The images of a task; they must come from the data that the grid in `out` was begun on."""
    prepared = _prepare(_to_text(task), order)
    read = {each.name: getattr(task, each.name) for each in fields(SourceSettings) if each.name != "map_from"}
    read["path"] = None if task.path is None else Path(task.path).name
    tie_folder(out, f"{task.source}-{config_digest(read)[:8]}", prepared.source)
    return prepared.to(device)


def _find_duplicates(out: Path, benchmark: Benchmark, order: int) -> list[str]:
    """What is wrong with the images of a benchmark, a line each."""
    try:
        _prepare(_to_text(benchmark.task), order)
    except GenInvarianceError:  # the job on them meets it, too, and says it
        return []
    return _prepare_on(out, benchmark.task, order, "cpu").duplicates.lines()


def _carry_out(out: str, device: str, job: _Job, error: str | None) -> str:
    """Do a job in `out`; the line says what came out. `error` is that of a translator that the job needs."""
    folder = Path(out)
    if job.cell is None:
        return _fit(folder / job.name, job, _prepare_on(folder, job.benchmark.task, job.order, device))
    writer = RecordWriter(folder / "records")
    try:
        if error is not None:
            raise RunError(f"its translator could not be fitted ({error})")
        records = _measure(folder, job.cell, device)
    except Exception as problem:
        writer.write_failure(_make_failure(job.cell), problem)
        raise
    writer.write_cell(records)
    totals = {record.metric: record.value for record in records if record.class_index is None}
    return (
        f"{job.benchmark.name}, order {job.order}, seed {job.cell.seed}: {job.cell.arm.name} - "
        f"{progress_line(totals)}, {records[0].seconds:.0f} s"
    )


def _make_failure(cell: GridCell) -> Record:
    about: dict[str, Any] = {"benchmark": cell.benchmark.name, "method": cell.arm.name, "config_digest": cell.digest}
    return Record(**about, seed=cell.seed, order=cell.order, metric="failed", value=1, **provenance())


def _measure(out: Path, cell: GridCell, device: str) -> list[Record]:
    benchmark, arm = cell.benchmark, cell.arm
    prepared = _prepare_on(out, benchmark.task, cell.order, device)
    if benchmark.measure.nuisance is not None:
        prepared = replace(prepared, nuisance=build_nuisance(benchmark.measure.nuisance))
    filled, translator, fit_seconds, learned = None, None, None, None
    if arm.method.more_real:
        filled = _prepare_on(out, replace(benchmark.task, fill_tail=True), cell.order, device)
    if arm.given is not None:
        translator = arm.given.load().to(device)
    elif arm.fit is not None:
        translator, fit_seconds = _load_fitted(out / _name_fit_folder(benchmark, arm.fit, cell.order), device)
    if cell.learned is not None:
        learned, _ = _load_fitted(out / _name_fit_folder(benchmark, cell.learned, cell.order), device)
    return run_cell(
        benchmark.task,
        arm.method,
        CellInputs(prepared, filled=filled, translator=translator, fit_seconds=fit_seconds, learned=learned),
        seed=cell.seed,
        folder=out / cell.folder,
        measure=benchmark.measure,
        benchmark=benchmark.name,
        order=cell.order,
        config_digest=cell.digest,
    )


def _load_fitted(folder: Path, device: str) -> tuple[Any, float]:
    """A translator that the grid fitted, and what that took."""
    from gen_invariance.translator.io import load_translator

    seconds = read_json(folder / "seconds.json")["seconds"]
    return load_translator(folder).to(device), seconds


def _fit(folder: Path, job: _Job, prepared: Prepared) -> str:
    from gen_invariance.translator.fit import fit_translator

    fit = job.fit
    loop = read_settings(FitSettings, {"flip": prepared.flip_safe, **fit.loop}, "fit")
    config = {"benchmark": job.benchmark.name, "fit": fit.identity()}
    started = perf_counter()
    with Run.open(folder, kind="fit", seed=job.order, config=config, resume=True) as run:
        fit_translator(
            fit.name, prepared.train, loop, network=fit.network, objective=fit.objective, out=run, progress=False
        )
    seconds = perf_counter() - started
    write_json(folder / "seconds.json", {"seconds": seconds})
    where = f"{job.benchmark.name}, order {job.order}"
    return "; ".join([f"{where}: {fit.choice} fitted in {seconds:.0f} s", *_warn_of(folder, fit.choice)])


def load_grid(cells: Sequence[GridCell], out: Path | str) -> pd.DataFrame:
    """The records of `cells` in `out`, failures included, methods in the order of the cells.

    Raises:
        DataNotFoundError: there are none.
    """
    frame = load_records(Path(out) / "records")
    wanted = {cell.key for cell in cells}
    frame = frame[[cell in wanted for cell in row_cells(frame)]]
    arms = list(dict.fromkeys((cell.benchmark.name, cell.arm.name) for cell in cells))
    ranks = [arms.index(arm) for arm in zip(frame["benchmark"], frame["method"], strict=True)]
    return frame.iloc[np.argsort(ranks, kind="stable")].reset_index(drop=True)
