"""`TrainSettings`: how a classifier is trained. Everything random about a run follows from them and the seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat

from gen_invariance.data.settings import DelayedRule, second_phase
from gen_invariance.errors import SettingsError
from gen_invariance.settings import BelowOne, Count, CountOrZero, Fraction, Rows, settings_class


def _check_point(value: float) -> float:
    if 0 <= value < 1 or (value >= 1 and value.is_integer()):
        return value
    raise ValueError("must be a share of training in [0, 1) or a whole epoch")


Point = Annotated[float, AfterValidator(_check_point)]
"""A point in training: a share of it in [0, 1), or a whole number of epochs."""


_ADDED_LATER = {"optimizer": "sgd", "views": 0, "spread": 0.0, "head_start": "random", "keep": "last"}
"""Settings that runs made before have not; at these values they have the same identity."""


@settings_class("training")
class TrainSettings:
    """How to train. Defaults are those of the CIFAR-LT protocol (Zhou et al. 2022) except the number of epochs.

    Points in training (`warmup`, `milestones`, `second_phase`) are shares of it, in (0, 1), and so move with `epochs`;
    a whole number means that epoch, whatever `epochs` is. What waits for the second phase (delayed sampling, a stage, a
    second loss) is refused if it would never start.

    Reference: `worst_of` is Robey et al. 2020; `consistency` is KL( p(x) || p(Tx) ) with p(x) held fixed, a mean over
    the batch (Xie et al. 2020); delayed sampling is Cao et al. 2019.

    Raises:
        SettingsError: a value out of its range, or settings that exclude each other.

    Example:
        >>> from gen_invariance import TrainSettings
        >>> TrainSettings(epochs=20, sampling="class_balanced").epochs
        20
    """

    epochs: Count = 200
    """passes over the training set: each has as many draws as there are images, under every rule"""
    batch_size: Rows = 128
    """images a step, over all processes and parts"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd or adamw"""
    learning_rate: PositiveFloat = 0.1
    """peak rate, 0.1 for SGD and 0.001 for AdamW are usual; a transfer plan may bring its own"""
    momentum: BelowOne = 0.9
    """of SGD; the first beta of AdamW"""
    weight_decay: NonNegativeFloat = 2e-4
    """of the optimiser; a transfer plan brings its own"""
    schedule: Literal["step", "cosine"] = "step"
    """step (factors 0.01 and 0.0001 after the milestones) or cosine, both after a linear warm-up"""
    warmup: Point = 0.025
    """length of the linear warm-up, a share of training or whole epochs; so are the next two"""
    milestones: tuple[Point, Point] = (0.8, 0.9)
    """after which step lowers the rate"""
    sampling: Literal["instance", "class_balanced", "square_root", "progressive", "effective_number", "delayed"] = (
        "instance"
    )
    """how classes are drawn; delayed is instance, then class_balanced in the second phase"""
    second_phase: Point | None = None
    """where delayed re-sampling, re-weighting and a later stage begin; null: the first milestone"""
    epoch_images: Annotated[int, Field(ge=0, le=10**8)] = 0
    """draws of an epoch; 0: as many as there are training images"""
    stage_from: Literal["start", "second_phase"] = "start"
    """when the stage begins"""
    stage_source: Literal["batch", "balanced"] = "batch"
    """batch (rows are translated in place) or balanced (replaced by translated rows of a class-balanced stream)"""
    stage_bank: CountOrZero = 0
    """translations of an image, on average, drawn ahead and used several times; 0: each step draws"""
    stage_bank_epochs: Count = 10
    """after which all of them have been replaced"""
    worst_of: Count = 1
    """draws of each row the stage works on, of which the hardest is kept"""
    consistency: NonNegativeFloat = 0.0
    """weight of KL( p(x) || p(Tx) ) on those rows"""
    mixing: Literal["none", "mixup", "remix", "cutmix", "cmo"] = "none"
    """none, mixup, remix, cutmix or cmo, after the stage"""
    mixing_options: Mapping[str, Any] = field(default_factory=dict)
    """of that mixing"""
    mixing_probability: Fraction = 1.0
    """share of the steps that are mixed"""
    average_decay: BelowOne = 0.0
    """of the moving average of the weights, which training returns then; 0.999 is usual, 0 for none"""
    views: CountOrZero = 0
    """with a frozen backbone: augmented views of each image, whose features are computed once; 0: each step augments"""
    spread: NonNegativeFloat = 0.0
    """with views: strength of the within-class spread that smaller classes are given by larger ones; 0: none"""
    head_start: Literal["random", "class_means"] = "random"
    """class_means: a cosine head starts at the classes' mean features"""
    keep: Literal["last", "best"] = "last"
    """last epoch, or best: that of the highest balanced accuracy on validation images (data.validation_fraction)"""
    accumulate: Count = 1
    """parts a batch goes through the network in; the gradient is that of the whole, but batch norm sees the parts"""
    head_correction: Literal["none", "crt", "lws", "tau_norm", "logit_adjustment"] = "none"
    """what is done to the head after the last epoch: crt, lws, tau_norm or logit_adjustment"""
    head_correction_options: Mapping[str, Any] = field(default_factory=dict)
    """of that correction"""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """no, bf16 or fp16 (GPU)"""
    capture: bool = False
    """replay steps of SGD as CUDA graphs: on one GPU, in float32 or bf16, in one part; tried on no GPU yet"""
    log_every: Count = 1
    """epochs between lines of metrics"""
    checkpoint_every: Count = 10
    """epochs between checkpoints"""

    def __post_init__(self) -> None:
        if self.milestone_epochs[0] > self.milestone_epochs[1]:
            raise SettingsError(f"training.milestones must name the earlier one first, got {list(self.milestones)}")
        if self.sampling == "delayed":
            self.require_second_phase("delayed re-sampling (training.sampling=delayed)")
        if self.consistency and self.mixing != "none":
            raise SettingsError(
                f"training.consistency compares x with Tx and cannot do so after mixing={self.mixing}; drop one of them"
            )

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
        first, second = self.milestones
        return self._to_epoch(first), self._to_epoch(second)

    def _to_epoch(self, point: float) -> int:
        """The whole number of epochs before a point in training; a share leaves an epoch on either side."""
        if point == 0 or point >= 1:
            return int(point)
        return min(max(round(point * self.epochs), 1), max(self.epochs - 1, 1))

    @property
    def second_phase_start(self) -> int:
        """First epoch of the second phase, counted from 0."""
        return self.milestone_epochs[0] if self.second_phase is None else self._to_epoch(self.second_phase)

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
        """The settings that decide the result, for a run's config: not how often to log and save, nor graphs."""
        values = {k: v for k, v in asdict(self).items() if k not in ("log_every", "checkpoint_every", "capture")}
        return {k: v for k, v in values.items() if k not in _ADDED_LATER or v != _ADDED_LATER[k]}


def cosine_decay(progress: float) -> float:
    """The factor on a learning rate after the share `progress` of training: from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
