"""Robust use of the stage: of several draws for a row, train on the one the classifier finds hardest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gen_invariance.classifier.objective import row_losses


@torch.no_grad()
def hardest(model: nn.Module, loss: nn.Module, candidates: Sequence[Tensor], labels: Tensor, rows: Tensor) -> Tensor:
    """`candidates[0]` with each of `rows` taken from the candidate of highest loss; MRT of Robey et al. 2020, eq. 9.

    The network looks in eval mode, so its batch-norm statistics see nothing of the draws that are thrown away.

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
    chosen = versions[losses.argmax(0), torch.arange(len(rows), device=rows.device)]
    return candidates[0].index_copy(0, rows, chosen)
