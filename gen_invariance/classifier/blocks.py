"""Steps of a training prepared together: what was decided about them on the CPU, and its copy on the device.

A GPU that is asked for a number, or given a tensor from ordinary memory, makes the program wait until it has done all
that it was asked before. So nothing is asked in a step: everything that depends on random numbers or labels is decided
on the CPU, for a block of steps, and sent in a few copies that nobody waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gen_invariance.devices import send
from gen_invariance.nuisance.protocol import Draw


@dataclass(frozen=True, eq=False)
class RowsPlan:
    """What happens to this process's rows of a batch, all on the CPU.

    Attributes:
        whole: rows of the whole batch, over all processes.
        rows: int64 (B,), images of the training set.
        labels: int64 (B,), with those of the source where a row is replaced.
        plain: draw of the plain augmentation for each row; None without.
        gated: int64 (G,), rows that the stage gives the nuisance; None where there is no stage, or not yet.
        sources: int64 (B,), images of the source; those of `gated` are translated.
        draws: of the nuisance, one for each candidate, leading G.
        staged: gated rows of the whole batch.
    """

    whole: int
    rows: Tensor
    labels: Tensor
    plain: Draw | None
    gated: Tensor | None = None
    sources: Tensor | None = None
    draws: tuple[Draw, ...] = ()
    staged: int = 0


@dataclass(frozen=True, eq=False)
class StepPlan:
    """A step.

    Attributes:
        front: its batch.
        share: this process's rows of what is mixed.
        spare: the step had no row for this process; see `batches.Batch`.
        generator: as it is after the draws of the step; mixing goes on with it.
        mixed: whether mixing acts.
        foreground: the second batch of "cmo".
    """

    front: RowsPlan
    share: slice
    spare: bool
    generator: torch.Generator
    mixed: bool = False
    foreground: RowsPlan | None = None

    def batches(self) -> list[RowsPlan]:
        """The one or two batches of the step."""
        return [self.front] if self.foreground is None else [self.front, self.foreground]


class _Here(NamedTuple):
    """Parts of a `RowsPlan` on the device."""

    rows: Tensor
    labels: Tensor
    gated: Tensor | None


class Block:
    """Consecutive steps, by number.

    Args:
        plans: of each step.
        device: where the images are.
        rows_of_pass: that are translated together at most, unless a batch has more; bounds the memory.
    """

    def __init__(self, plans: Mapping[int, StepPlan], device: torch.device, *, rows_of_pass: int) -> None:
        self.plans, self.device = plans, device
        self._batches = [batch for plan in plans.values() for batch in plan.batches()]
        self._here: dict[int, _Here] | None = None
        self._translations: dict[tuple[int, int], Tensor] = {}
        self._passes: dict[int, list[RowsPlan]] = {}  # the batches that are translated together with each
        rows, together = 0, []
        for batch in self._batches:
            count = 0 if batch.gated is None else len(batch.gated)
            if not together or rows + count > rows_of_pass:
                rows, together = 0, []
            rows += count
            if count:
                together.append(batch)
                self._passes[id(batch)] = together

    def on_device(self, plan: RowsPlan) -> _Here:
        """Rows, labels and gated rows of one of the block's batches; sent with those of all the others."""
        if self._here is None:
            rows, labels, gated = (
                _sent([getattr(batch, name) for batch in self._batches], self.device)
                for name in ("rows", "labels", "gated")
            )
            parts = (_Here(*each) for each in zip(rows, labels, gated, strict=True))
            self._here = {id(batch): here for batch, here in zip(self._batches, parts, strict=True)}
        return self._here[id(plan)]

    def translated(self, plan: RowsPlan, number: int, translate: Callable[[Tensor, Draw], Tensor]) -> Tensor:
        """Translations of the gated rows of `plan`, by its draw `number`; made with those of other steps.

        Args:
            plan: one of the block's batches, with a gated row at least.
            number: of the draw.
            translate: images of the source, int64 (M,), and a draw for each to translations.
        """
        if (id(plan), number) not in self._translations:
            batches = self._passes[id(plan)]
            sources = torch.cat([batch.sources[batch.gated] for batch in batches])
            draws = [batch.draws[number] for batch in batches]
            draw = {name: torch.cat([each[name] for each in draws]) for name in draws[0]}
            parts = translate(sources, draw).split([len(batch.gated) for batch in batches])
            self._translations |= {(id(batch), number): part for batch, part in zip(batches, parts, strict=True)}
        return self._translations[id(plan), number]


def _sent(parts: list[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """All that is there of `parts`, in one copy to `device`, and taken apart again."""
    present = [part for part in parts if part is not None]
    if not present:
        return list(parts)
    pieces = iter(send(torch.cat(present), device).split([len(part) for part in present]))
    return [None if part is None else next(pieces) for part in parts]
