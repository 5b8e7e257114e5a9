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

from gen_invariance.errors import GenInvarianceError, RunError, SettingsError
from gen_invariance.errors import printable as shown
from gen_invariance.export.units import Job, Unit
from gen_invariance.export.workers import one_unit, start_worker

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
        """Carry out a unit of `job`, a list of one reference, as Ray would fetch a bare one each time; its name."""
        if not self._ready:
            start_worker(ray.get(job[0]))
            self._ready = True
        return one_unit(unit)


class RayWorkers:
    """Actors that live as long as the `with` block, and the local cluster that is started where there is none.

    Input and output must lie at the same place on all machines of the cluster. `device="cuda"` takes one GPU for each
    actor.

    Args:
        job: what all units share.
        workers: how many.
        address: of a running cluster; None takes that of `RAY_ADDRESS`, else starts one on this machine.
    """

    def __init__(self, job: Job, *, workers: int, address: str | None = None) -> None:
        self._job, self._workers, self._address = job, workers, address
        self._pool: ActorPool | None = None
        self._actors: list = []
        self._shared: list[ray.ObjectRef] = []
        self._own = not ray.is_initialized()

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        if self._pool is not None and self._own:
            ray.shutdown()

    def run(self, units: Iterable[Unit]) -> Iterator[str]:
        """Carry out `units`; yields the name of each when it is recorded.

        Raises:
            SettingsError: no cluster answers at the address.
            RunError: a unit killed its workers, or they write to another disk than this machine reads.
        """
        if self._pool is None:
            self._start()
        try:
            for name in self._pool.map_unordered(lambda actor, unit: actor.do.remote(self._shared, unit), units):
                if not (self._job.state / "units" / f"{name}.jsonl").is_file():
                    raise RunError(
                        f"workers of the Ray cluster write to another {shown(self._job.out)} than this machine sees; "
                        "choose an output folder on a disk that all machines share"
                    )
                yield name
        except RayTaskError as error:
            if isinstance(error.cause, GenInvarianceError | OSError):
                raise error.cause from error
            raise
        except RayError as error:
            reason = shown(str(error).strip().splitlines()[-1])[:200]
            raise RunError(
                f"a worker of the Ray cluster died and could not be replaced, killed or out of memory ({reason}); the "
                "same command with resume=true goes on from there"
            ) from error

    def _start(self) -> None:
        """Join or start the cluster, and start the actors."""
        if self._own:
            self._connect()
        gpus = 1 if self._job.device.startswith("cuda") else 0
        options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": _RETRIES}
        actor, self._shared = ray.remote(**options)(_Worker), [ray.put(self._job)]
        self._actors = [actor.remote() for _ in range(self._workers)]
        self._pool = ActorPool(self._actors)

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = self._address or os.environ.get("RAY_ADDRESS")
        try:
            if address:
                _check_open(address)
                ray.init(address=address, **quiet)
            else:
                ray.init("local", num_cpus=self._workers, include_dashboard=False, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            reason = shown(str(error).strip().split("\n")[0])[:200]
            raise SettingsError(
                f"cannot join the Ray cluster at {address or 'this machine'} ({reason}); check ray_address, or leave it"
            ) from error


def _check_open(address: str) -> None:
    """Raise `OSError` unless something listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()
