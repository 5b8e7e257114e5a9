"""Jobs that may need one another, carried out one by one or on worker processes; a failed job stops no other."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from threading import RLock
from typing import Generic, TypeVar

import torch
from tqdm import tqdm

from gen_invariance.errors import RunError

J = TypeVar("J")


@dataclass(frozen=True)
class Done(Generic[J]):
    """A job that ended: what it returned, or the error it ended with (one line)."""

    job: J
    answer: str = ""
    error: str | None = None


def run_jobs(
    jobs: Sequence[J], do: Callable[[J, str | None], str], *, needs: Callable[[J], Sequence[J]], processes: int = 1
) -> Iterator[Done[J]]:
    """Carry out `jobs`, each after those it needs, and yield them as they end.

    Args:
        jobs: hashable, each behind those it needs; for several processes also picklable.
        do: carries out a job. Its second argument is the error of a job that this one needed, or None. An exception it
            raises is the job's error.
        needs: the jobs that have to end first; those that are not among `jobs` are taken to be done.
        processes: 1 works in this process, more start as many workers of one torch thread each.

    Raises:
        RunError: a worker process died.
    """
    if processes == 1:
        yield from _one_by_one(jobs, do, needs)
    else:
        yield from _side_by_side(jobs, do, needs, processes)


def _one_by_one(
    jobs: Sequence[J], do: Callable[[J, str | None], str], needs: Callable[[J], Sequence[J]]
) -> Iterator[Done[J]]:
    errors: dict[J, str | None] = {}
    for job in jobs:
        done = _outcome(job, do, _first_error(needs(job), errors))
        errors[job] = done.error
        yield done


def _side_by_side(
    jobs: Sequence[J], do: Callable[[J, str | None], str], needs: Callable[[J], Sequence[J]], processes: int
) -> Iterator[Done[J]]:
    waiting, left = set(jobs), list(jobs)
    errors: dict[J, str | None] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        running: dict[Future[Done[J]], J] = {}
        try:
            while running or left:
                ready = [job for job in left if waiting.isdisjoint(needs(job))]
                left = [job for job in left if not waiting.isdisjoint(needs(job))]
                running |= {pool.submit(_outcome, job, do, _first_error(needs(job), errors)): job for job in ready}
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    done = future.result()
                    errors[job] = done.error
                    waiting.discard(job)
                    yield done
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():  # what they were doing is done again next time
                worker.terminate()
            if isinstance(error, Exception):
                raise RunError(f"a worker process died ({error}); run the same command again to go on") from error
            raise


def _first_error(needed: Sequence[J], errors: Mapping[J, str | None]) -> str | None:
    return next((errors[job] for job in needed if errors.get(job)), None)


def _outcome(job: J, do: Callable[[J, str | None], str], error: str | None) -> Done[J]:
    try:
        return Done(job, do(job, error))
    except Exception as problem:
        words = " ".join(str(problem).split())
        return Done(job, error=f"{type(problem).__name__}: {words}")


def start_worker() -> None:
    """Make a new process a worker: one torch thread, Ctrl-C left to the main process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(RLock())  # its own would be a semaphore of the system, which a stopped worker leaves behind
