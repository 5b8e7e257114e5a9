"""A training step as one CUDA graph: the program asks for all its kernels at once, not for one after another.

A step of a small network is some hundred kernels, each of which takes the GPU less time than the program takes to ask
for it. A graph is recorded for each form of batch, and replayed with new images, labels and rates where it reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gen_invariance.classifier.batches import Batch
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.transfer import TransferPlan

_WARM = 3  # steps of a form before it is recorded, in which libraries choose kernels and optimisers make their state


def can_capture(settings: TrainSettings, plan: TransferPlan | None, accelerator: Accelerator) -> bool:
    """Whether steps of this training are recorded: asked for, on one GPU, each step doing the same."""
    thaws = plan is not None and bool(plan.head_epochs or plan.epochs_per_stage)
    return (
        settings.capture
        and accelerator.device.type == "cuda"
        and accelerator.num_processes == 1
        and settings.mixed_precision != "fp16"  # whose scaler looks whether gradients overflowed
        and settings.accumulate == 1
        and settings.optimizer == "sgd"
        and not settings.consistency  # as many clean rows as the stage worked on
        and not thaws
    )


def place_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put learning rates where graphs can read them."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Give a group its rate; in its place, where a graph reads it."""
    if isinstance(group["lr"], Tensor) and group["lr"].device.type == "cuda":
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class CapturedSteps:
    """Carries out a step on batches, from a graph as soon as there is one for their form.

    Args:
        step: everything that a step does on the device with a batch; returns its loss, a scalar. It may depend on
            nothing but the batch, and on tensors that stay where they are.
        active: whether anything is recorded.
    """

    def __init__(self, step: Callable[[Batch], Tensor], *, active: bool) -> None:
        self.step, self.active = step, active
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """Carry out the step; the loss of `batch`."""
        if not self.active:
            return self.step(batch)
        form = tuple((tuple(each.shape), each.dtype) for each in (batch.images, batch.labels))
        if form not in self._graphs:
            self._seen[form] += 1
            if self._seen[form] <= _WARM:
                return self._warm_up(batch)
            self._graphs[form] = self._record(batch)
        graph, images, labels, loss = self._graphs[form]
        images.copy_(batch.images)
        labels.copy_(batch.labels)
        graph.replay()
        return loss

    def _warm_up(self, batch: Batch) -> Tensor:
        """A step beside the main stream, as CUDA wants it before a recording."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = self.step(batch)
        torch.cuda.current_stream().wait_stream(side)
        return loss

    def _record(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        """Record the step on copies of the batch, from which it will read; nothing is computed."""
        images, labels = batch.images.clone(), batch.labels.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step(Batch(images, labels, whole=batch.whole))
        return graph, images, labels, loss
