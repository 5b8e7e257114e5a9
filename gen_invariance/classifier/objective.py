"""What a training step minimises: the loss over a batch that may lie on several processes or come in parts.

The gradient must be that of the whole batch, however it is shared out. So rows are summed, and the sum is divided by
what the rows of the *whole* batch weigh; a process or part with fewer or heavier rows then counts as it should.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from gen_invariance.classifier.batches import Batch
from gen_invariance.classifier.losses import CrossEntropy
from gen_invariance.classifier.model import Classifier


def row_losses(loss: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Weighted loss of each row, (B,); a loss that only gives a mean gives that mean for every row."""
    if isinstance(loss, CrossEntropy):
        return loss(logits, labels, reduction="none")
    return loss(logits, labels).expand(len(labels))


def row_weights(loss: nn.Module, labels: Tensor) -> Tensor:
    """What each row counts in the mean over rows, float32 (B,)."""
    return loss.row_weights(labels) if isinstance(loss, CrossEntropy) else torch.ones(len(labels), device=labels.device)


@torch.no_grad()
def choose_hardest(
    model: nn.Module, loss: nn.Module, candidates: Sequence[Tensor], labels: Tensor, rows: Tensor
) -> Tensor:
    """`candidates[0]` with each of `rows` taken from the candidate of highest loss; MRT of Robey et al. 2020, eq. 9.

    The model is evaluated in eval mode, so its batch-norm statistics do not see the draws that are thrown away.

    Args:
        model: images to logits; left in the mode it was in.
        loss: see `losses`.
        candidates: k versions (B, C, H, W) of a batch, alike outside `rows`.
        labels: int64 (B,).
        rows: int64 (M,), the rows that differ.
    """
    if len(candidates) == 1 or not len(rows):
        return candidates[0]
    training = model.training
    model.eval()
    versions = torch.stack([candidate[rows] for candidate in candidates])
    logits = model(versions.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    losses = row_losses(loss, logits, labels[rows].repeat(len(candidates))).view(len(candidates), len(rows))
    model.train(training)
    hardest = versions[losses.argmax(0), torch.arange(len(rows), device=rows.device)]
    return candidates[0].index_copy(0, rows, hardest)


def consistency_term(clean: Tensor, moved: Tensor) -> Tensor:
    """KL( p(x) || p(Tx) ) in nats, summed over rows; p(x) is a fixed target (Xie et al. 2020, equation 1).

    Args:
        clean: logits (M, K) of the images as they were.
        moved: logits (M, K) of the same images under the nuisance.
    """
    target = clean.detach().float().log_softmax(1)
    return F.kl_div(moved.float().log_softmax(1), target, reduction="sum", log_target=True)


def backward(
    model: nn.Module,
    batch: Batch,
    loss: nn.Module,
    *,
    accelerator: Accelerator,
    parts: int = 1,
    consistency: float = 0.0,
    penalty: nn.Module | None = None,
) -> Tensor:
    """Add the gradient of the whole batch to `model`; returns this process's share of the loss, detached.

    Args:
        model: as `accelerator.prepare` gave it.
        batch: this process's rows.
        loss: see `losses`.
        accelerator: of the run.
        parts: forward passes that the rows are split over.
        consistency: weight of `consistency_term`.
        penalty: a term on the weights alone, such as `L2SP`.
    """
    processes = accelerator.num_processes
    weight = accelerator.reduce(row_weights(loss, batch.labels).sum() * (not batch.spare))
    total = torch.zeros((), device=batch.labels.device)
    pieces = batch.split(parts)
    for number, piece in enumerate(pieces, start=1):
        last = number == len(pieces)
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                value = _share(model, piece, loss, weight / processes, consistency * processes / batch.whole)
                # Every process adds the whole penalty, and gradients are averaged over processes.
                if last and penalty is not None:
                    value = value + penalty()
            accelerator.backward(value)
        total += value.detach()
    return total


def _share(model: nn.Module, piece: Batch, loss: nn.Module, weight: Tensor, consistency: float) -> Tensor:
    """Loss of the rows in `piece`, over what the whole batch weighs."""
    images = piece.images if piece.clean is None else torch.cat([piece.images, piece.clean])
    logits = model(images.contiguous(memory_format=torch.channels_last))
    moved = logits[: len(piece.images)]
    value = row_losses(loss, moved, piece.labels).sum() / weight
    if piece.clean is not None and consistency:
        value = value + consistency * consistency_term(logits[len(piece.images) :], moved[piece.clean_rows])
    return value * 0 if piece.spare else value


class L2SP(nn.Module):
    """A penalty on the distance of a model's backbone weights to where they started (Li et al. 2018, equation 3).

    Make it before training and add `penalty()` to the loss. The start is in its state dict, for resuming.
    """

    def __init__(self, model: Classifier, *, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self._parameters_now = tuple(model.backbone.parameters())  # in a tuple they stay parameters of the model only
        for number, parameter in enumerate(self._parameters_now):
            self.register_buffer(f"start{number}", parameter.detach().clone())

    def forward(self) -> Tensor:
        """Strength / 2 * |backbone - start|^2 over what trains; a scalar."""
        total = torch.zeros((), device=self.start0.device)
        for start, parameter in zip(self.buffers(), self._parameters_now, strict=True):
            if parameter.requires_grad:
                total = total + self.strength / 2 * (parameter - start).square().sum()
        return total
