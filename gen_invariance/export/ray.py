"""Units of work carried out by actors of a Ray cluster, this machine or many; needs the extra `ray`.

Each actor does to a unit what a worker process does, so the bytes are the same. A worker that dies is started again and
its unit done once more, which writes the same files. Ray Data would add nothing here: which images share a batch, what
is written where, and what is done already are fixed by the units, and its blocks would only carry their names.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from gen_invariance.errors import GenInvarianceError, RunError, SettingsError, printable
from gen_invariance.export.units import Job, RunUnits, Unit, run_unit, start_worker

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util import ActorPool
except ImportError as missing:
    raise SettingsError('engine=ray needs Ray: pip install "gen_invariance[ray]", or use engine=local') from missing

_RETRIES = 3  # of one unit; a unit that kills every worker it meets must end


class _Worker:
    """An actor: one process with the translator in it, fetched with the first unit.

    What an actor is constructed with may be gone when it has to be started anew; what comes with a unit is kept.
    """

    def __init__(self) -> None:
        self._ready = False

    def do(self, job: list[ray.ObjectRef], unit: Unit) -> str:
        """Carry out a unit of `job`, a list of one reference, as Ray would fetch a bare one each time."""
        if not self._ready:
            start_worker(ray.get(job[0]))
            self._ready = True
        return run_unit(unit)


@contextmanager
def start_ray_workers(job: Job, *, workers: int, address: str | None = None) -> Iterator[RunUnits]:
    """What carries out units by `workers` actors, which live as long as the `with` block.

    Input and output must lie at the same place on all machines of the cluster. With `device="cuda"`
    actors share the GPUs of the cluster evenly. The cluster is that of `address` or `RAY_ADDRESS`, or one that is
    started on this machine and ends as well.

    Raises:
        SettingsError: no cluster answers at the address, or it has no GPU for `device="cuda"`.
    """
    joined = not ray.is_initialized()
    if joined:
        _join(workers, address or os.environ.get("RAY_ADDRESS"))
    gpus = _share_of_gpu(workers, started_here=joined) if job.device.startswith("cuda") else 0
    options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": _RETRIES}
    actors = [ray.remote(**options)(_Worker).remote() for _ in range(workers)]
    pool, shared = ActorPool(actors), [ray.put(job)]

    def run(units: Iterable[Unit]) -> Iterator[str]:
        """Raises `RunError` when a unit killed its workers, or they write to another disk than this machine reads."""
        try:
            for name in pool.map_unordered(lambda actor, unit: actor.do.remote(shared, unit), units):
                if not job.record_path(name).is_file():
                    raise RunError(
                        f"workers of the Ray cluster write to another {printable(job.output.folder)} than this machine "
                        "sees; choose an output folder on a disk that all machines share"
                    )
                yield name
        except RayTaskError as error:
            if isinstance(error.cause, GenInvarianceError | OSError):
                raise error.cause from error
            raise
        except RayError as error:
            reason = printable(str(error).strip().splitlines()[-1])[:200]
            raise RunError(
                f"a worker of the Ray cluster died and could not be replaced, killed or out of memory ({reason}); the "
                "same command with resume=true goes on from there"
            ) from error

    try:
        yield run
    finally:
        for actor in actors:
            ray.kill(actor)
        if joined:
            ray.shutdown()


def _share_of_gpu(workers: int, *, started_here: bool = False) -> float:
    """How much of a GPU each worker gets; of a whole one each, more workers than GPUs would wait for ever."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not gpus:
        if started_here:
            ray.shutdown()
        raise SettingsError("the Ray cluster has no GPU; use device=cpu, or join one that has with ray_address")
    return 1.0 if workers <= gpus else 1 / -(-workers // gpus)


def _join(workers: int, address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _check_open(address)
            ray.init(address=address, **quiet)
        else:
            ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        reason = printable(str(error).strip().split("\n")[0])[:200]
        raise SettingsError(
            f"cannot join the Ray cluster at {address or 'this machine'} ({reason}); check ray_address, or leave it"
        ) from error


def _check_open(address: str) -> None:
    """Raise `OSError` unless something listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()
