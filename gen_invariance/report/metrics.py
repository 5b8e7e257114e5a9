"""How metrics are called and read, and the published figures that could be verified."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a metric is called, scaled and compared when people read it.

    Attributes:
        label: words for tables and axes.
        unit: shown after the label; empty when the figure is a plain number.
        higher_is_better: None where neither direction is better.
        scale: figures are multiplied by it before they are shown (100 for shares in percent).
        decimals: digits after the point, at that scale.
    """

    label: str
    unit: str = ""
    higher_is_better: bool | None = None
    scale: float = 1.0
    decimals: int = 3

    @property
    def title(self) -> str:
        """Label with unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def show(self, value: float) -> str:
        """`value` at this metric's scale and precision; "n/a" when it is unknown."""
        return f"{value * self.scale:.{self.decimals}f}" if math.isfinite(value) else "n/a"


METRICS: dict[str, Metric] = {
    "balanced_accuracy": Metric("Balanced accuracy", "%", True, 100, 1),
    "many_accuracy": Metric("Many-shot accuracy", "%", True, 100, 1),
    "medium_accuracy": Metric("Medium-shot accuracy", "%", True, 100, 1),
    "few_accuracy": Metric("Few-shot accuracy", "%", True, 100, 1),
    "accuracy": Metric("Accuracy", "%", True, 100, 1),
    "agreement": Metric("Agreement", "%", True, 100, 1),
    "mean_ekld": Metric("Mean eKLD", "nats", False),
    "few_ekld": Metric("Few-shot eKLD", "nats", False),
    "calibration_error": Metric("Calibration error", "%", False, 100, 1),
    "many_calibration_error": Metric("Many-shot calibration error", "%", False, 100, 1),
    "medium_calibration_error": Metric("Medium-shot calibration error", "%", False, 100, 1),
    "few_calibration_error": Metric("Few-shot calibration error", "%", False, 100, 1),
    "ekld": Metric("eKLD", "nats", False),
    "mean_learned_ekld": Metric("Mean eKLD, learned nuisance", "nats", False),
    "learned_ekld": Metric("eKLD, learned nuisance", "nats", False),
    "fit_seconds": Metric("Fitting the nuisance", "s", False, 1, 1),
    "train_seconds": Metric("Training the classifier", "s", False, 1, 1),
}
"""Metrics by record name, in the order in which tables show them."""


def metric_info(name: str) -> Metric:
    """The entry of `METRICS`, or a plain one made from the name for a metric that is not listed."""
    return METRICS.get(name) or Metric(name.replace("_", " ").capitalize())


def progress_line(totals: Mapping[str, float]) -> str:
    """Accuracies and eKLD of one cell by record name as words for a terminal; what was not measured is left out.

    >>> progress_line({"balanced_accuracy": 0.5, "many_accuracy": 0.9, "few_accuracy": 0.123, "mean_ekld": 1.0})
    'balanced 0.500, many 0.900, few 0.123, mean eKLD 1.00'
    """
    named = {name: f"{name}_accuracy" for name in ("balanced", "many", "few")}
    words = [f"{name} {totals[metric]:.3f}" for name, metric in named.items() if metric in totals]
    eklds = {"mean": "mean_ekld", "few-shot": "few_ekld"}
    words += [f"{name} eKLD {totals[metric]:.2f}" for name, metric in eklds.items() if metric in totals]
    return ", ".join(words)


@dataclass(frozen=True)
class Published:
    """A figure from the literature, at the scale of records (shares in [0, 1]), and where it was read."""

    metric: str
    value: float
    source: str

    @property
    def text(self) -> str:
        """The figure with the digits of the source, which are more than our own figures deserve."""
        info = metric_info(self.metric)
        return f"{self.value * info.scale:.4g} {info.unit}".strip()


_SOURCE = "Zhou et al., ICLR 2022 (arXiv 2203.09739), error {error} % as listed on the paper's Papers-with-Code page"

PUBLISHED: dict[tuple[str, str], Published] = {
    ("cifar10_lt_if100", "ce_drs+git"): Published("balanced_accuracy", 0.7876, _SOURCE.format(error="21.24")),
    ("cifar100_lt_if100", "ce_drs+git"): Published("balanced_accuracy", 0.4435, _SOURCE.format(error="55.65")),
}
"""Verified figures by (benchmark, arm): the rows CE+DRS+GIT of the paper. The CIFAR test sets are balanced, so accuracy
is balanced accuracy.

Figures that could not be checked are left out: a table shows them as not available, never from memory.
"""
