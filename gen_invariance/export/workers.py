"""Who carries out units: this process, where decoding, translating and encoding overlap, or several."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial

import torch

from gen_invariance.data.readers.pictures import without_remarks_of_pillow
from gen_invariance.errors import RunError
from gen_invariance.export.settings import WorkerSettings
from gen_invariance.export.units import THREADS, Decoded, Finished, Job, Result, RunUnits, Unit, run_unit, start_worker

_AHEAD = 2  # pieces decoded before they are needed, and results not yet written; bounds the memory


@contextmanager
def start_workers(job: Job, settings: WorkerSettings) -> Iterator[RunUnits]:
    """What carries out the units of `job`; worker processes live as long as the `with` block."""
    if settings.engine == "ray":
        from gen_invariance.export.ray import start_ray_workers  # an extra, and slow to import

        with start_ray_workers(job, workers=settings.processes, address=settings.ray_address) as run:
            yield run
        return
    if settings.processes == 1:
        yield partial(_run_overlapped, job)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that used torch's threads may hang
    pool = ProcessPoolExecutor(settings.processes, mp_context=context, initializer=start_worker, initargs=(job,))
    try:
        yield partial(_run_in_pool, pool, waiting=2 * settings.processes)
    finally:
        pool.shutdown(cancel_futures=True)


def _run_overlapped(job: Job, units: Iterable[Unit]) -> Iterator[str]:
    """While one piece is translated, the next ones are decoded and the last ones encoded and written."""
    with (
        without_remarks_of_pillow(),
        _one_thread(job.device),
        ThreadPoolExecutor(THREADS) as pictures,
        ThreadPoolExecutor(1) as decoder,
        ThreadPoolExecutor(1) as writer,
    ):
        job = job.on_device()
        decoding: deque[tuple[Unit, Unit | None, Future]] = deque()
        writing: deque[Future] = deque()
        finished: list[Finished] = []  # of the unit that is being written, by the one writer

        def write(piece: Unit, unit: Unit | None, decoded: list[Decoded], results: list[Result]) -> str | None:
            finished.extend(job.encode(piece, decoded, results, pictures))
            if unit is None:
                return None
            job.store(unit, finished)
            finished.clear()
            return unit.name

        def translate_next() -> None:
            piece, unit, future = decoding.popleft()
            decoded = future.result()
            writing.append(writer.submit(write, piece, unit, decoded, job.translate(piece, decoded)))

        for unit in units:
            *others, last = unit.pieces()
            for piece in (*others, last):
                done = unit if piece is last else None  # with its last piece a unit is written
                decoding.append((piece, done, decoder.submit(job.decode, piece, pictures)))
                if len(decoding) > _AHEAD:
                    translate_next()
                yield from _written(writing, leave=_AHEAD)
        while decoding:
            translate_next()
            yield from _written(writing, leave=_AHEAD)
        yield from _written(writing, leave=0)


def _written(writing: deque[Future], *, leave: int) -> Iterator[str]:
    """Names of units that are recorded, once no more than `leave` pieces wait to be written."""
    while len(writing) > leave:
        name = writing.popleft().result()
        if name is not None:
            yield name


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """One thread for the translator on a CPU: how many there are may change the last bit of a pixel."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_in_pool(pool: ProcessPoolExecutor, units: Iterable[Unit], *, waiting: int) -> Iterator[str]:
    """Units go to processes as these become free; few wait, so memory does not grow with their number."""
    pending: set[Future] = set()
    try:
        for unit in units:
            pending.add(pool.submit(run_unit, unit))
            if len(pending) >= waiting:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from [future.result() for future in done]
        yield from [future.result() for future in pending]
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died (killed, or out of memory); the same command with resume=true goes on from there"
        ) from error
