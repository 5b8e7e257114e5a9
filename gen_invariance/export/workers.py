"""Units of work carried out: in this process, where decoding, translating and encoding overlap, or in several."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from gen_invariance.errors import RunError
from gen_invariance.export.units import Job, Unit, load, placed, store, translate

_AHEAD = 2  # units decoded before they are needed, and results not yet written; bounds the memory
_THREADS = 4


class Workers:
    """Who carries out units: this process, or several that live as long as the `with` block.

    Args:
        job: what all units share.
        processes: 1 is this process.
    """

    def __init__(self, job: Job, *, processes: int = 1) -> None:
        self._job, self._processes = job, processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, units: Iterable[Unit]) -> Iterator[str]:
        """Carry out `units`; yields the name of each when it is recorded.

        Raises:
            RunError: a worker process died.
        """
        if self._processes == 1:
            yield from _overlapped(placed(self._job), units)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork of a process that used torch's threads may hang
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=context, initializer=start_worker, initargs=(self._job,)
            )
        yield from _shared_out(self._pool, units, waiting=2 * self._processes)


def _overlapped(job: Job, units: Iterable[Unit]) -> Iterator[str]:
    """While one unit is translated, the next ones are decoded and the last ones encoded and written."""
    with (
        _one_thread(job.device),
        ThreadPoolExecutor(_THREADS) as pictures,
        ThreadPoolExecutor(1) as loader,
        ThreadPoolExecutor(1) as writer,
    ):
        waiting: deque[tuple[Unit, Future]] = deque()
        writing: deque[tuple[Unit, Future]] = deque()

        def advance() -> None:
            unit, loading = waiting.popleft()
            loaded = loading.result()
            results = translate(job, unit, loaded) if unit.kind == "generated" else None
            writing.append((unit, writer.submit(store, job, unit, loaded, results, pictures)))

        for unit in units:
            waiting.append((unit, loader.submit(load, job, unit, pictures)))
            if len(waiting) > _AHEAD:
                advance()
            yield from _finished(writing, leave=_AHEAD)
        while waiting:
            advance()
            yield from _finished(writing, leave=_AHEAD)
        yield from _finished(writing, leave=0)


def _finished(writing: deque[tuple[Unit, Future]], *, leave: int) -> Iterator[str]:
    while len(writing) > leave:
        unit, future = writing.popleft()
        future.result()
        yield unit.name


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


_worker_job: Job | None = None  # a worker process serves one job all its life


def start_worker(job: Job) -> None:
    """What a worker process does first."""
    global _worker_job
    torch.set_num_threads(1)
    _worker_job = placed(job)


def one_unit(unit: Unit) -> str:
    """What a worker process does for a unit: the same steps as in one process, one after another."""
    with ThreadPoolExecutor(_THREADS) as pictures:
        loaded = load(_worker_job, unit, pictures)
        results = translate(_worker_job, unit, loaded) if unit.kind == "generated" else None
        store(_worker_job, unit, loaded, results, pictures)
    return unit.name


def _shared_out(pool: ProcessPoolExecutor, units: Iterable[Unit], *, waiting: int) -> Iterator[str]:
    """Units go to processes as these become free; few wait, so memory does not grow with their number."""
    pending: set[Future] = set()
    try:
        for unit in units:
            pending.add(pool.submit(one_unit, unit))
            if len(pending) >= waiting:
                done, pending = wait(pending, return_when="FIRST_COMPLETED")
                yield from [future.result() for future in done]
        yield from [future.result() for future in pending]
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died (killed, or out of memory); the same command with resume=true goes on from there"
        ) from error
