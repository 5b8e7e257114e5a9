"""The demonstration: rotated, long-tailed digits, eight ways to train on them, and a report with pictures.

scikit-learn's digits (real handwriting, inside the package) are cut to a long tail and each is turned by a random
angle. Translators learn that nuisance from head classes; the stage gives it to the tail while a classifier trains.
A control without any rotation shows what a fit reports when there is nothing to learn.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from threading import RLock
from time import perf_counter

import pandas as pd
import torch
from tqdm import tqdm

from gen_invariance.classifier.train import TrainSettings
from gen_invariance.data.images import ImageData
from gen_invariance.errors import RunError, SettingsError
from gen_invariance.experiment.build import ClassifierSettings, StageSettings
from gen_invariance.experiment.cell import CellInputs, MeasureSettings, Method, cell_digest, run_cell
from gen_invariance.experiment.task import Task, prepare
from gen_invariance.files import write_json
from gen_invariance.records import Cell, RecordWriter, finished_cells, load_records
from gen_invariance.report.metrics import progress_line
from gen_invariance.run import Run

BASELINE, LEARNED, ORACLE = "DRS", "DRS + learned, spatial", "DRS + true nuisance"
_TAIL = {"cutoff": 44, "probability": 0.5}  # classes below 45 images, half of the rows


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs.

    Attributes:
        seeds: how many; each draws its own class order, images, angles and initial weights.
        epochs: of each classifier, at least 2; 67 are about 800 steps, where longer training brings nothing more.
        spatial_steps, munit_steps: of the two fits.
        draws: transformations of each test image for eKLD.
        processes: worker processes of one torch thread each.
        control: also run the arms without rotation in the data.

    Raises:
        SettingsError: a value that is too small.
    """

    seeds: int = 5
    epochs: int = 67
    spatial_steps: int = 300
    munit_steps: int = 400
    draws: int = 5
    processes: int = 2
    control: bool = True

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 2 if name == "epochs" else 1  # re-sampling needs a phase before it
            if name != "control" and value < least:
                raise SettingsError(f"demo.{name} must be at least {least}, got {value}")

    @property
    def rotated(self) -> Task:
        """Digits under uniform rotation."""
        return Task(
            source="digits",
            largest=110,
            imbalance=22,
            rest_is_test=True,
            nuisance="rotation",
            nuisance_options={"degrees": 180.0},
            many_above=44,
            few_below=20,
        )

    @property
    def upright(self) -> Task:
        """The control: the same digits, nothing acted on them."""
        return replace(self.rotated, nuisance="identity", nuisance_options={})

    def methods(self) -> list[Method]:
        """The arms. All but the first and the one with plain augmentation alone share the stage's balanced stream."""
        training = TrainSettings(
            epochs=self.epochs,
            batch_size=32,
            schedule="cosine",
            warmup=0.05,
            sampling="delayed",
            second_phase=0.6,
            stage_source="balanced",
            checkpoint_every=self.epochs,
        )

        def method(name: str, nuisance: str, translator: str | None = None, *, every_row: str = "none") -> Method:
            stage = StageSettings(nuisance, "hard_cutoff", _TAIL)
            plain = "crop_flip" if every_row == "none" else f"crop_flip+{every_row}"
            network = ClassifierSettings("small_conv")
            return Method(name, stage, training, network, translator, plain, {"crop_flip": {"padding": 2}})

        return [
            method(BASELINE, "none"),
            method("DRS + balanced stream", "identity"),
            method("DRS + RandAugment, every row", "none", every_row="randaugment"),
            method("DRS + RandAugment, tail", "randaugment"),
            method("DRS + learned, MUNIT", "translator", "munit"),
            method(LEARNED, "translator", "spatial"),
            method(f"{LEARNED} + RandAugment, every row", "translator", "spatial", every_row="randaugment"),
            method(ORACLE, "true"),
        ]

    def fit_settings(self, translator: str) -> dict[str, object]:
        """How a translator is fitted: network, objective, loop."""
        if translator == "spatial":
            return {
                "network": {},
                "objective": {},
                "loop": {"steps": self.spatial_steps, "batch_size": 64},
            }
        return {
            "network": {"width": 16, "residual_blocks": 2},
            "objective": {"learning_rate": 5e-4, "discriminator_width": 16, "discriminator_layers": 3},
            "loop": {"steps": self.munit_steps, "batch_size": 16},
        }


def run_demo(
    out: Path | str, settings: DemoSettings | None = None, *, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Run what is missing of the demo in `out`, write the report, and return its path.

    Args:
        out: folder; a demo that was stopped there goes on, with the same settings.
        settings: see `DemoSettings`.
        say: is told what is done and how far it is, a line at a time.

    Raises:
        RunError: a worker failed.
        SettingsError: `out` holds a demo with other settings.
    """
    from gen_invariance.report.demo_page import write_demo_report

    out, settings = Path(out), settings or DemoSettings()
    identity = {key: value for key, value in asdict(settings).items() if key != "processes"}
    Run(out, kind="demo", config=identity, resume=True)
    fits, cells = list(_missing_fits(out, settings)), list(_missing_cells(out, settings))
    say(
        f"{len(settings.methods())} methods x {settings.seeds} seeds on long-tailed digits; "
        f"{len(fits)} translators to fit, {len(cells)} classifiers to train, {settings.processes} processes"
    )
    started = perf_counter()
    _work(out, settings, fits, cells, say)
    say(f"computed in {perf_counter() - started:.0f} s; writing the report")
    return write_demo_report(out, settings)


@dataclass(frozen=True)
class _Job:
    """One unit of work for a worker process; picklable."""

    kind: str  # "fit" or "cell"
    task: str  # "rotated" or "upright"
    name: str  # translator, or method
    seed: int

    @property
    def folder(self) -> str:
        """Run folder below the demo's, without spaces or signs."""
        words = "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())
        return f"{self.kind}s/{self.task}-{words}-{self.seed}"


def _tasks(settings: DemoSettings) -> list[str]:
    return ["rotated", "upright"] if settings.control else ["rotated"]


def _methods(settings: DemoSettings, task: str) -> list[Method]:
    """All arms on rotated digits; on the control only the plain one and the one with learned widths."""
    return [
        method
        for method in settings.methods()
        if task == "rotated" or method.name in (BASELINE, LEARNED)
    ]


def _missing_fits(out: Path, settings: DemoSettings) -> Iterator[_Job]:
    for task in _tasks(settings):
        for translator in ("munit", "spatial") if task == "rotated" else ("spatial",):
            for seed in range(settings.seeds):
                job = _Job("fit", task, translator, seed)
                if not (out / job.folder / "seconds.json").exists():
                    yield job


def _missing_cells(out: Path, settings: DemoSettings) -> Iterator[_Job]:
    done = finished_cells(out / "records") if (out / "records").is_dir() else set()
    for task_name in _tasks(settings):
        task = getattr(settings, task_name)
        for method in _methods(settings, task_name):
            digest = cell_digest(task, method, draws=settings.draws)
            for seed in range(settings.seeds):
                if Cell(task.name, digest, method.name, seed) not in done:
                    yield _Job("cell", task_name, method.name, seed)


def _work(out: Path, settings: DemoSettings, fits: list[_Job], cells: list[_Job], say: Callable[[str], None]) -> None:
    """Run all jobs on worker processes; a cell starts as soon as the fit it needs is there."""
    total, done, waiting = len(fits) + len(cells), 0, set(fits)
    needs = {method.name: method.translator for method in settings.methods()}

    def ready(cell: _Job) -> bool:
        return needs[cell.name] is None or replace(cell, kind="fit", name=needs[cell.name]) not in waiting

    with ProcessPoolExecutor(settings.processes, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        running = {pool.submit(_do, str(out), settings, job): job for job in fits}
        left = cells
        try:
            while running or left:
                running |= {pool.submit(_do, str(out), settings, cell): cell for cell in left if ready(cell)}
                left = [cell for cell in left if not ready(cell)]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    done += 1
                    say(f"[{done}/{total}] {future.result()}")
                    waiting.discard(job)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, Exception):
                raise RunError(f"a demo process failed: {error}; run the same command again to go on") from error
            for worker in active_children():  # Ctrl-C: what they were doing is done again next time
                worker.terminate()
            raise


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which stops the workers
    tqdm.set_lock(RLock())  # its own would be a semaphore of the system, which a stopped worker leaves behind


def _do(out: str, settings: DemoSettings, job: _Job) -> str:
    """Carry out one job in a worker; the line says what came out."""
    task = getattr(settings, job.task)
    prepared = prepare(task, seed=job.seed)
    folder = Path(out) / job.folder
    if job.kind == "fit":
        return _fit(folder, settings, job, task, prepared.train)
    method = next(method for method in settings.methods() if method.name == job.name)
    translator, fit_seconds = None, None
    if method.translator is not None:
        from gen_invariance.translator.io import load_translator

        fitted = Path(out) / replace(job, kind="fit", name=method.translator).folder
        translator = load_translator(fitted)
        fit_seconds = json.loads((fitted / "seconds.json").read_text())["seconds"]
    records = run_cell(
        task,
        method,
        CellInputs(prepared, translator=translator, fit_seconds=fit_seconds),
        seed=job.seed,
        folder=folder,
        measure=MeasureSettings(draws=settings.draws, invariance_images=None),
    )
    RecordWriter(Path(out) / "records").write_cell(records)
    figures = {record.metric: record.value for record in records if record.class_index is None}
    return f"{task.name}, seed {job.seed}: {method.name} - {progress_line(figures)}"


def _fit(folder: Path, settings: DemoSettings, job: _Job, task: Task, train: ImageData) -> str:
    from gen_invariance.translator.fit import fit_translator
    from gen_invariance.translator.fit_settings import FitSettings

    how = settings.fit_settings(job.name)
    loop = FitSettings(**how["loop"], sample_every=10**9, log_every=25)
    started = perf_counter()
    config = {"task": task.identity(), "translator": job.name, **how}
    with Run.open(folder, kind="fit", seed=job.seed, config=config, resume=True) as run:
        translator = fit_translator(
            job.name, train, loop, network=how["network"], objective=how["objective"], out=run, progress=False
        )
    seconds = perf_counter() - started
    write_json(folder / "seconds.json", {"seconds": seconds})
    learned = ""
    if job.name == "spatial":
        learned = ", widths " + ", ".join(f"{name} {width:.3g}" for name, width in translator.widths().items())
    return f"{task.name}, seed {job.seed}: {job.name} translator fitted in {seconds:.0f} s{learned}"


def demo_frame(out: Path, settings: DemoSettings) -> pd.DataFrame:
    """Records of the demo in `out`, those of the present settings only, the arms in their order."""
    frame = load_records(out / "records")
    digests = {
        cell_digest(getattr(settings, task), method, draws=settings.draws)
        for task in _tasks(settings)
        for method in _methods(settings, task)
    }
    frame = frame[frame["config_digest"].isin(digests)]
    ranks = {method.name: rank for rank, method in enumerate(settings.methods())}
    return frame.iloc[frame["method"].map(ranks).argsort(kind="stable")].reset_index(drop=True)


def fit_folder(out: Path, task: str, translator: str, seed: int) -> Path:
    """Where the demo in `out` keeps that translator's run."""
    return out / _Job("fit", task, translator, seed).folder
