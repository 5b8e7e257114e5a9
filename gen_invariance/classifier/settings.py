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
    **dict.fromkeys(("weight_decay", "consistency", "stage_bank", "epoch_images"), (0, math.inf)),
    "stage_bank_epochs": (1, math.inf),
    **dict.fromkeys(("momentum", "average_decay"), (0, 1 - 1e-12)),
    "learning_rate": (1e-300, math.inf),
    "mixing_probability": (0, 1),
}


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Defaults are those of the CIFAR-LT protocol (Zhou et al. 2022) except the number of epochs.

    Points in training (`warmup`, `milestones`, `second_phase`) are shares of it, in (0, 1), and so move with `epochs`;
    a whole number means that epoch, whatever `epochs` is.

    Attributes:
        epochs: passes over the training set (an epoch has as many draws as there are images, under every rule).
        batch_size: images a step, over all processes and parts.
        learning_rate: peak rate of SGD; a transfer plan brings its own rates, which take its place.
        momentum: of SGD.
        weight_decay: of SGD.
        schedule: "step" (linear warm-up, then factors 0.01 and 0.0001 after the two milestones) or "cosine".
        warmup: linear warm-up, a share of training or whole epochs.
        milestones: the two points after which "step" lowers the rate, shares of training or whole epochs.
        sampling: a sampling rule, or "delayed" (instance, then class-balanced in the second phase: DRS).
        second_phase: where the second phase starts, a share of training or a whole epoch; None means the first
            milestone. What waits for it (delayed sampling, a stage, a second loss) is refused if it would never start.
        epoch_images: draws of an epoch; 0 takes as many as there are training images. Sets of several sizes are
            trained for equally many steps with it.
        stage_from: "start" or "second_phase": when the stage begins.
        stage_source: "batch" (gated rows are translated in place) or "balanced" (gated rows are replaced by
            translated rows of a second, class-balanced stream).
        stage_bank: translations of an image, on average, that are drawn ahead and used several times; 0 draws at
            every step. Images that come more often get more of them. Quicker, another training.
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
    warmup: float = 0.025
    milestones: tuple[float, float] = (0.8, 0.9)
    sampling: str = "instance"
    second_phase: float | None = None
    epoch_images: int = 0
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
        self._check_points()
        if self.consistency and self.mixing != "none":
            raise SettingsError(
                f"training.consistency compares x with Tx and cannot do so after mixing={self.mixing}; drop one of them"
            )

    def _check_points(self) -> None:
        """`SettingsError` for points in training that are none, or a second phase that cannot be."""
        for name, point in (("warmup", self.warmup), ("second_phase", self.second_phase)):
            if point is not None and not _is_point(point):
                raise SettingsError(
                    f"training.{name} must be a share of training in [0, 1) or a whole epoch, got {point}"
                )
        if (
            len(self.milestones) != 2
            or not all(map(_is_point, self.milestones))
            or self.milestone_epochs[0] > self.milestone_epochs[1]
        ):
            raise SettingsError(
                "training.milestones must be two shares of training in [0, 1) or two epochs, the earlier one first, "
                f"got {list(self.milestones)}"
            )
        if self.sampling == "delayed":
            self.require_second_phase("delayed re-sampling (training.sampling=delayed)")

    def require_second_phase(self, what: str) -> None:
        """Raise `SettingsError` unless there is a first and a second phase, the latter after the warm-up.

        Args:
            what: waits for the second phase; named in the error.
        """
        start, name = self.second_phase_start, "milestones" if self.second_phase is None else "second_phase"
        if start >= self.epochs:
            reason = f"would never start: the second phase begins after epoch {start} of {self.epochs}"
        elif start < 1:
            reason = "would have no first phase: the second phase begins with the first epoch"
        elif start < self.warmup_epochs:
            reason = f"would start after epoch {start}, before the warm-up of {self.warmup_epochs} epochs ends"
        else:
            return
        raise SettingsError(
            f"{what} {reason}; give training.{name} as a share of training, such as 0.6, or train for more epochs"
        )

    def check_phases(self, *, stage: bool = False, second_loss: bool = False) -> None:
        """Raise `SettingsError` if what waits for the second phase would never start.

        Args:
            stage: whether there is a stage, which may wait (`stage_from`).
            second_loss: whether the loss changes in the second phase (delayed re-weighting).
        """
        if stage and self.stage_from == "second_phase":
            self.require_second_phase("the stage (training.stage_from=second_phase)")
        if second_loss:
            self.require_second_phase("delayed re-weighting (classifier.second_loss_options)")

    @property
    def warmup_epochs(self) -> int:
        """Epochs of linear warm-up."""
        return round(self.warmup * self.epochs) if self.warmup < 1 else int(self.warmup)

    @property
    def milestone_epochs(self) -> tuple[int, int]:
        """Epochs after which "step" lowers the rate."""
        first, second = (self._epoch_of(point) for point in self.milestones)
        return first, second

    def _epoch_of(self, point: float) -> int:
        """The whole number of epochs before a point in training; a share leaves an epoch on either side."""
        if point == 0 or point >= 1:
            return int(point)
        return min(max(round(point * self.epochs), 1), max(self.epochs - 1, 1))

    @property
    def second_phase_start(self) -> int:
        """First epoch of the second phase, counted from 0."""
        return self.milestone_epochs[0] if self.second_phase is None else self._epoch_of(self.second_phase)

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
        warmup = self.warmup_epochs
        if progress < warmup:
            epoch = math.floor(progress) + 1 if self.schedule == "step" else progress + 1 / self.epochs
            return min(1.0, epoch / warmup)
        if self.schedule == "cosine":
            return cosine_decay((progress - warmup) / max(self.epochs - warmup, 1))
        return (1.0, 0.01, 0.0001)[sum(progress >= milestone for milestone in self.milestone_epochs)]

    def identity(self) -> dict[str, object]:
        """The settings that decide the result, for a run's config; how often to look is left out."""
        return {k: v for k, v in asdict(self).items() if k not in ("log_every", "checkpoint_every")}


def cosine_decay(progress: float) -> float:
    """The factor on a learning rate after the share `progress` of training: from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _is_point(value: float) -> bool:
    """Whether `value` is a share of training in [0, 1) or a whole number of epochs."""
    return 0 <= value < 1 or (value >= 1 and float(value).is_integer())


def _in_words(low: float, high: float) -> str:
    if high == math.inf:
        return f"at least {low}" if low in (0, 1) else "positive and finite"
    return "in [0, 1]" if high == 1 else "in [0, 1)"
