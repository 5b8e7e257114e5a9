"""Jobs that may need one another, carried out one by one or on worker processes; a failed job stops no other."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
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
    errors: dict[J, str | None] = {}

    def find_error(job: J) -> str | None:
        return next((errors[needed] for needed in needs(job) if errors.get(needed)), None)

    if processes == 1:
        for job in jobs:
            done = _carry_out(job, do, find_error(job))
            errors[job] = done.error
            yield done
        return
    known = set(jobs)
    order = TopologicalSorter({job: [needed for needed in needs(job) if needed in known] for job in jobs})
    order.prepare()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        running: set[Future[Done[J]]] = set()
        try:
            while order.is_active():
                running |= {pool.submit(_carry_out, job, do, find_error(job)) for job in order.get_ready()}
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for done in [future.result() for future in ended]:
                    errors[done.job] = done.error
                    order.done(done.job)
                    yield done
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():  # what they were doing is done again next time
                worker.terminate()
            if isinstance(error, Exception):
                raise RunError(f"a worker process died ({error}); run the same command again to go on") from error
            raise


def _carry_out(job: J, do: Callable[[J, str | None], str], error: str | None) -> Done[J]:
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
