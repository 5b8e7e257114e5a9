"""`TrainSettings`: how a classifier is trained. Everything random about a run follows from them and the seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gen_invariance.classifier.mixing import MIXINGS
from gen_invariance.data.sampling import DelayedRule, second_phase
from gen_invariance.errors import SettingsError

CORRECTIONS = ("none", "crt", "lws", "tau_norm", "logit_adjustment")
"""What may be done to the head layer after training, see `correction.correct_head`."""

_CHOICES = {
    "schedule": ("step", "cosine"),
    "stage_from": ("start", "second_phase"),
    "stage_source": ("batch", "balanced"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "mixing": ("none", *MIXINGS),
    "head_correction": CORRECTIONS,
}
_RANGES = {
    **dict.fromkeys(("epochs", "batch_size", "log_every", "checkpoint_every", "worst_of", "accumulate"), (1, math.inf)),
    **dict.fromkeys(("weight_decay", "warmup", "consistency", "stage_bank"), (0, math.inf)),
    "stage_bank_epochs": (1, math.inf),
    **dict.fromkeys(("momentum", "average_decay"), (0, 1 - 1e-12)),
    "learning_rate": (1e-300, math.inf),
    "mixing_probability": (0, 1),
}


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Defaults are those of the CIFAR-LT protocol (Zhou et al. 2022) except the number of epochs.

    Attributes:
        epochs: passes over the training set (an epoch has as many draws as there are images, under every rule).
        batch_size: images a step, over all processes and parts.
        learning_rate: peak rate of SGD; a transfer plan brings its own rates, which take its place.
        momentum: of SGD.
        weight_decay: of SGD.
        schedule: "step" (linear warm-up, then factors 0.01 and 0.0001 after the two milestones) or "cosine".
        warmup: epochs of linear warm-up.
        milestones: the two epochs after which "step" lowers the rate.
        sampling: a sampling rule, or "delayed" (instance, then class-balanced in the second phase: DRS).
        second_phase: first epoch of the second phase; None means the first milestone.
        stage_from: "start" or "second_phase": when the stage begins.
        stage_source: "batch" (gated rows are translated in place) or "balanced" (gated rows are replaced by
            translated rows of a second, class-balanced stream).
        stage_bank: translations of an image, on average, that are drawn ahead and used several times; 0 draws at
            every step. Images that come more often get more of them. Quicker, another training; not with plain
            augmentation before the stage.
        stage_bank_epochs: epochs after which the bank's translations have been replaced.
        worst_of: draws of each gated row, of which the one with the highest loss is kept (Robey et al. 2020).
        consistency: weight of KL( p(x) || p(Tx) ) on gated rows, a mean over the batch, p(x) held fixed.
        mixing: "none", "mixup", "remix", "cutmix" or "cmo"; after the stage.
        mixing_options: of that mixing.
        mixing_probability: share of the steps that are mixed.
        average_decay: decay of the exponential moving average of the weights, which is what training returns; 0 for
            none.
        accumulate: parts that a batch goes through the network in. The gradient is that of the whole batch, except
            that batch norm sees the parts.
        head_correction: one of `CORRECTIONS`, carried out after the last epoch.
        head_correction_options: of that correction.
        mixed_precision: "no", "bf16" or "fp16" (GPU).
        log_every, checkpoint_every: epochs between metrics lines and checkpoints.

    Raises:
        SettingsError: a value out of its range, or settings that exclude each other.
    """

    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 2e-4
    schedule: str = "step"
    warmup: int = 5
    milestones: tuple[int, int] = (160, 180)
    sampling: str = "instance"
    second_phase: int | None = None
    stage_from: str = "start"
    stage_source: str = "batch"
    stage_bank: int = 0
    stage_bank_epochs: int = 10
    worst_of: int = 1
    consistency: float = 0.0
    mixing: str = "none"
    mixing_options: Mapping[str, Any] = field(default_factory=dict)
    mixing_probability: float = 1.0
    average_decay: float = 0.0
    accumulate: int = 1
    head_correction: str = "none"
    head_correction_options: Mapping[str, Any] = field(default_factory=dict)
    mixed_precision: str = "no"
    log_every: int = 1
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high or not math.isfinite(value):
                allowed = _in_words(low, high)
                raise SettingsError(f"training.{name} must be {allowed}, got {value}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise SettingsError(f"training.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if len(self.milestones) != 2 or not 0 <= self.milestones[0] <= self.milestones[1]:
            raise SettingsError(
                f"training.milestones must be two epochs, the earlier one first, got {list(self.milestones)}"
            )
        if self.second_phase is not None and self.second_phase < 0:
            raise SettingsError(f"training.second_phase must be epoch 0 or later, got {self.second_phase}")
        if self.consistency and self.mixing != "none":
            raise SettingsError(
                f"training.consistency compares x with Tx and cannot do so after mixing={self.mixing}; drop one of them"
            )

    @property
    def second_phase_start(self) -> int:
        """First epoch of the second phase."""
        return self.milestones[0] if self.second_phase is None else self.second_phase

    def in_second_phase(self, epoch: int) -> bool:
        """Whether `epoch` is in the second phase: the one predicate for sampling, stage and loss."""
        return second_phase(epoch, start=self.second_phase_start)

    def rule(self) -> str | DelayedRule:
        """The sampling rule as the loader takes it."""
        return DelayedRule(self.second_phase_start) if self.sampling == "delayed" else self.sampling

    def stage_is_on(self, epoch: int) -> bool:
        """Whether the stage works in `epoch`."""
        return self.stage_from == "start" or self.in_second_phase(epoch)

    def learning_rate_at(self, progress: float) -> float:
        """Learning rate after `progress` epochs (whole and part)."""
        return self.learning_rate * self.schedule_at(progress)

    def schedule_at(self, progress: float) -> float:
        """The factor on every learning rate after `progress` epochs (whole and part)."""
        if progress < self.warmup:
            epoch = math.floor(progress) + 1 if self.schedule == "step" else progress + 1 / self.epochs
            return min(1.0, epoch / self.warmup)
        if self.schedule == "cosine":
            done = (progress - self.warmup) / max(self.epochs - self.warmup, 1)
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return (1.0, 0.01, 0.0001)[sum(progress >= milestone for milestone in self.milestones)]

    def identity(self) -> dict[str, object]:
        """The settings that decide the result, for a run's config; how often to look is left out."""
        return {k: v for k, v in asdict(self).items() if k not in ("log_every", "checkpoint_every")}


def _in_words(low: float, high: float) -> str:
    if high == math.inf:
        return f"at least {low}" if low in (0, 1) else "positive and finite"
    return "in [0, 1]" if high == 1 else "in [0, 1)"
