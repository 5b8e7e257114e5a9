"""eKLD by class as a `torchmetrics` metric, to log in any loop; needs the extra `torchmetrics`.

Its figures are those of `measure.invariance`; this module only gathers them over batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gen_invariance.torchvision_guard  # noqa: F401  (torchmetrics leads to torchvision)
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.measure.accuracy import mean_by_class, mean_over
from gen_invariance.measure.rounds import kl_divergence

from torchmetrics import Metric  # isort: skip  (after the guard)

AVERAGES = ("macro", "none")


class ExpectedKL(Metric):
    """eKLD_c = E over x of class c, E over T, of KL( p(.|x) || p(.|T x) ), in nats (Zhou et al. 2022); 0 is invariance.

        metric = ExpectedKL(num_classes=10)
        metric.update(model(images), model(nuisance.apply(images, draw)), labels)
        self.log("val/ekld", metric)

    Args:
        num_classes: K.
        average: "macro" is the mean over the classes that have images; "none" gives all classes, float64 (K,), NaN for
            those without images.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        SettingsError: `num_classes` below 1 or an unknown `average`.

    Example:
        >>> import torch
        >>> from gen_invariance import ExpectedKL
        >>> metric, logits = ExpectedKL(num_classes=2), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> metric.update(logits, logits, torch.tensor([0, 1]))
        >>> metric.compute().item()
        0.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    total: Tensor
    count: Tensor

    def __init__(self, num_classes: int, *, average: str = "macro", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1 or average not in AVERAGES:
            raise SettingsError(
                f"ExpectedKL: num_classes must be at least 1 and average {' or '.join(AVERAGES)}, got {num_classes} "
                f"and {average!r}"
            )
        self.num_classes, self.average = num_classes, average
        self.add_state("total", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> ExpectedKL:
        try:
            return super()._apply(fn, *args, **kwargs)
        except TypeError:  # a device without float64, as Apple's
            self.total, self._defaults["total"] = self.total.float(), self._defaults["total"].float()
            return super()._apply(fn, *args, **kwargs)

    def update(self, logits: Tensor, moved: Tensor, labels: Tensor) -> None:
        """Take in one batch; call again with other draws of the same images for a better mean over T.

        Args:
            logits: (B, K) of the images as they are.
            moved: (B, K) of the same images under the nuisance.
            labels: int64 (B,).

        Raises:
            ShapeError: shapes that do not belong together.
            RangeError: a label outside [0, K).
        """
        labels = torch.as_tensor(labels, device=logits.device)
        if logits.shape != (len(labels), self.num_classes) or moved.shape != logits.shape or labels.ndim != 1:
            raise ShapeError(
                f"ExpectedKL: expected two sets of logits (B, {self.num_classes}) and labels (B,), got "
                f"{tuple(logits.shape)}, {tuple(moved.shape)} and {tuple(labels.shape)}"
            )
        both = (F.log_softmax(value.detach().float(), dim=1) for value in (logits, moved))
        mean, count = mean_by_class(kl_divergence(*both), labels, self.num_classes)
        self.total += torch.where(count > 0, mean * count, 0.0).to(self.total)
        self.count += count.to(self.count.device)

    def compute(self) -> Tensor:
        """Float64 scalar ("macro") or (K,) ("none"), nats."""
        ekld = self.total / self.count
        return ekld if self.average == "none" else ekld.new_tensor(mean_over(ekld))
