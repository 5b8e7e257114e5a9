"""A nuisance kept beside a module instead of inside it, and the random numbers drawn for it."""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gen_invariance.devices import with_index
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import named_generator

_CALLS, _SAMPLED = 256, 4096


class FrozenReference:
    """A nuisance that no module tree sees: in eval mode, its weights frozen, with a copy for each device in use.

    Its weights are in no state dict, so they must survive what happens to the module that holds it: the nuisance that
    was given is never changed, and where another device or precision is wanted a copy goes there.

    Args:
        nuisance: hand-written or learned, or a composition of both.
    """

    def __init__(self, nuisance: Nuisance) -> None:
        self._given = nuisance
        self._device: torch.device | None = None  # that of the module, where it was moved
        self._dtype: torch.dtype | None = None  # that of the module, where it was cast
        self._copies: dict[torch.device, Nuisance] = {}
        for network in _networks(nuisance):
            network.eval().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}

    @property
    def nuisance(self) -> Nuisance:
        """The nuisance, on the device and in the precision of the module that holds it."""
        example = next(self._weights(), None)
        return self._given if example is None else self.on(self._device or example.device)

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Follow a module's `.to`, `.half`, ... to where its weights go.

        `function` sees a probe instead of the weights: `to_empty` would leave memory as it finds it, and a module sent
        to the meta device gets its own weights back from a state dict, which these are not in.
        """
        example = next((each for each in self._weights() if each.is_floating_point()), None)
        if example is None:
            return
        device, dtype = self._device or example.device, self._dtype or example.dtype
        with torch.no_grad():
            changed = function(torch.zeros(1, dtype=dtype, device=device))
        if not changed.is_meta:
            self._device = changed.device
            if changed.dtype != dtype:
                self._dtype = changed.dtype
        self._copies.clear()

    def on(self, device: torch.device) -> Nuisance:
        """The nuisance where the images are; a loop on several devices in one process gets a copy for each."""
        device = with_index(device)
        weights = list(self._weights())
        if all(each.device == device and each.dtype == self._as_cast(each) for each in weights):
            return self._given
        if device not in self._copies:
            if device.type != "meta" and any(each.is_meta for each in weights):
                raise SettingsError(
                    f"stage: the {type(self._given).__name__} was made on the meta device and has no weights; load or "
                    'make it outside of torch.device("meta") and init_empty_weights'
                )
            with torch.inference_mode(False):  # a copy made for a prediction serves a training, too
                copied = copy.deepcopy(self._given)
                for network in _networks(copied):
                    network._apply(lambda each: each.to(device=device, dtype=self._as_cast(each)))
            self._copies[device] = copied
        return self._copies[device]

    def _weights(self) -> Iterator[Tensor]:
        return chain.from_iterable(map(_tensors, _networks(self._given)))

    def _as_cast(self, weight: Tensor) -> torch.dtype:
        return self._dtype if self._dtype is not None and weight.is_floating_point() else weight.dtype


@torch.compiler.disable
def refuse_vmap(*values: Any, where: str) -> None:
    """Raise `SettingsError` for tensors that `torch.func.vmap` maps over: rows are chosen by their values."""
    for value in values:
        if isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value):
            raise SettingsError(
                f"{where}: it chooses and draws for each row of a batch and cannot be mapped by torch.func.vmap; "
                "give it all rows as one batch before"
            )


def refuse_scripting(where: str) -> NoReturn:
    """Raise `SettingsError`: torch.jit.script compiles a module as it is written, and nuisances are Python."""
    raise SettingsError(
        f"{where}: it draws at random in Python and cannot be scripted; script the model without it, or trace it in "
        "eval mode"
    )


class _Call(NamedTuple):
    key: bytes
    turn: int
    state: Tensor


class Stream:
    """Where a stage draws from when a call brings no generator.

    Without a seed numbers come from torch's global stream, as those of dropout and of other augmentations do: stages
    beside each other draw independently, and `torch.manual_seed` makes a run repeatable. With one they come from a
    generator of the stage's own that leaves the global stream alone. Either way each rank of a distributed run gets its
    own stream, and so does each worker of a `DataLoader` in each epoch: workers begin with copies of one stage. Rank
    and worker are asked for at the draw, since many loops build their modules before the processes meet.

    Activation checkpointing computes a part of a model again during the backward pass, and needs the same numbers. It
    puts back the global stream, but no other: so calls on other generators are remembered for a while, and one that is
    made during a backward pass draws what the call it repeats drew.

    Args:
        seed: of the stage's own generator; None for the global stream.
        words: tell stages of one seed apart, which would draw the same rows otherwise.
    """

    def __init__(self, seed: int | None, *words: object) -> None:
        self.seed, self._words, self._rank_and_worker = seed, tuple(map(str, words)), (0, None)
        self._generator = torch.Generator() if seed is None else named_generator(seed, "stage", *self._words)
        self._forget()

    def _forget(self) -> None:
        self._calls: deque[_Call] = deque(maxlen=_CALLS)
        self._turn, self._backward = 0, (-1, {})

    def __getstate__(self) -> dict[str, Any]:
        # A generator cannot be sent to a process that is spawned.
        own = {name: value for name, value in self.__dict__.items() if name not in ("_calls", "_turn", "_backward")}
        return {**own, "_generator": self._generator.get_state().numpy().tobytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        kept = torch.frombuffer(bytearray(state["_generator"]), dtype=torch.uint8)
        self._generator = torch.Generator().set_state(kept)
        self._forget()

    def generator(self) -> torch.Generator:
        """The generator of one draw, by now of this rank and worker."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.seed is None:
            # Ranks are often given one seed; what each takes from it must differ.
            number = int(torch.randint(2**62, (), generator=torch.default_generator, device="cpu"))
            return named_generator(number, "stage", torch.distributed.get_rank() if distributed else 0)
        worker = torch.utils.data.get_worker_info()
        rank = torch.distributed.get_rank() if distributed else self._rank_and_worker[0]
        rank_and_worker = (rank, None if worker is None else worker.seed)
        if rank_and_worker != self._rank_and_worker:
            self._rank_and_worker = rank_and_worker
            words = (*self._words, rank) if worker is None else (*self._words, rank, "worker", worker.seed)
            self._generator.set_state(named_generator(self.seed, "stage", *words).get_state())
        return self._generator

    def of_call(self, given: torch.Generator | None, *seen: Any) -> torch.Generator:
        """The generator for one call: `given` or the stage's own, or a copy as it was when the call was made first.

        Args:
            given: what the caller brought.
            seen: tensors and other things that tell the call from others.
        """
        if given is None and self.seed is None:
            return self.generator()
        generator = self.generator() if given is None else given
        key, task = _digest(*seen), torch._C._current_graph_task_id()  # which backward pass, -1 outside of one
        if task < 0:
            if self._backward[0] >= 0:
                self._turn, self._backward = self._turn + 1, (-1, {})
            self._calls.append(_Call(key, self._turn, generator.get_state()))
            return generator
        if self._backward[0] != task:
            self._backward = task, {}
        alike = [call for call in self._calls if call.key == key]
        if not alike:
            return generator  # of no call before: it is a first one
        # Parts are computed again from the last to the first. Calls before another backward pass are of another step.
        alike = [call.state for call in alike if call.turn == alike[-1].turn]
        repeated = self._backward[1].get(key, 0) + 1
        self._backward[1][key] = repeated
        return torch.Generator().set_state(alike[-min(repeated, len(alike))])


def _digest(*seen: Any) -> bytes:
    """A short name for what a call sees: the global stream, shapes, and some thousand of the values."""
    digest = hashlib.blake2b(torch.get_rng_state().numpy(), digest_size=16)
    for each in seen:
        if isinstance(each, Tensor):
            flat = each.detach().reshape(-1)
            values = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy() if len(values) else b"")
            each = (each.dtype, tuple(each.shape))
        digest.update(repr(each).encode())
    return digest.digest()


def bring_to(nuisance: Nuisance, device: torch.device) -> Nuisance:
    """`nuisance`, or a copy of it where its weights lie elsewhere; it is not changed, for it may be in training."""
    elsewhere = any(each.device != with_index(device) for network in _networks(nuisance) for each in _tensors(network))
    return FrozenReference(copy.deepcopy(nuisance)).on(device) if elsewhere else nuisance


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return chain(network.parameters(), network.buffers())


def describe_kind(nuisance: Any) -> str:
    """The kind of `nuisance` and its settings, as far as it has any, in words that depend on nothing else."""
    parts = getattr(nuisance, "nuisances", None)
    if parts is not None:
        return f"{type(nuisance).__name__}({', '.join(map(describe_kind, parts))})"
    if is_dataclass(nuisance):
        settings = [f"{each.name}={getattr(nuisance, each.name)!r}" for each in fields(nuisance)]
        return f"{type(nuisance).__name__}({', '.join(settings)})"
    return type(nuisance).__name__


def _networks(nuisance: Any) -> Iterator[nn.Module]:
    if isinstance(nuisance, nn.Module):
        yield nuisance
    else:  # a composition of nuisances keeps its parts under this name
        for part in getattr(nuisance, "nuisances", ()):
            yield from _networks(part)
