"""A nuisance kept beside a module instead of inside it, and the random numbers drawn for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import named_generator


class FrozenReference:
    """A nuisance that no module tree sees: in eval mode, its weights frozen, with a copy on each device in use.

    Args:
        nuisance: hand-written or learned, or a composition of both.
    """

    def __init__(self, nuisance: Nuisance) -> None:
        self.nuisance = nuisance
        self._copies: dict[torch.device, Nuisance] = {}
        for network in _networks(nuisance):
            network.eval().requires_grad_(False)

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a module's `.to`, `.half`, ... to the networks in the nuisance."""
        for network in _networks(self.nuisance):
            network._apply(function)
        self._copies.clear()

    def on(self, device: torch.device) -> Nuisance:
        """The nuisance where the images are; a loop on several devices in one process gets a copy for each."""
        tensors = (chain(network.parameters(), network.buffers()) for network in _networks(self.nuisance))
        if all(tensor.device == device for tensor in chain.from_iterable(tensors)):
            return self.nuisance
        if device not in self._copies:
            copied = copy.deepcopy(self.nuisance)
            for network in _networks(copied):
                network.to(device)
            self._copies[device] = copied
        return self._copies[device]


class Stream:
    """The generator a stage draws from when a call brings none.

    Each rank of a distributed run gets its own stream, and so does each worker of a `DataLoader` in each epoch: workers
    begin with copies of one stage. Rank and worker are asked for at the draw, since many loops build their modules
    before the processes meet.

    Args:
        seed: rank 0, and a run without ranks, draw from `torch.Generator().manual_seed(seed)`; workers from streams
            that depend on their loader's seed, too.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self._rank_and_worker = seed, (0, None)
        self._generator = torch.Generator().manual_seed(seed)

    def generator(self) -> torch.Generator:
        """The generator, by now of this rank and worker."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        worker = torch.utils.data.get_worker_info()
        rank = torch.distributed.get_rank() if distributed else self._rank_and_worker[0]
        rank_and_worker = (rank, None if worker is None else worker.seed)
        if rank_and_worker != self._rank_and_worker:
            self._rank_and_worker = rank_and_worker
            words = (rank,) if worker is None else (rank, "worker", worker.seed)
            self._generator.set_state(named_generator(self.seed, "stage", *words).get_state())
        return self._generator


def _networks(nuisance: Any) -> Iterator[nn.Module]:
    if isinstance(nuisance, nn.Module):
        yield nuisance
    else:  # a composition of nuisances keeps its parts under this name
        for part in getattr(nuisance, "nuisances", ()):
            yield from _networks(part)
