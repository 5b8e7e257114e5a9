"""Transfer of a pretrained backbone: which blocks train, from when on, and at which rate.

A `TransferPlan` is settings only. `apply(model, epoch=...)` puts the model into the state of that epoch, from nothing
but the epoch, so a resumed run needs no stored schedule; `parameter_groups(model)` gives the optimiser every group
from the first step on, with its learning rate written into it, so any torch scheduler works on it. Importing this
module needs no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from gen_invariance.errors import SettingsError
from gen_invariance.settings import CountOrZero, Width, settings_class

if TYPE_CHECKING:
    from gen_invariance.classifier.model import Classifier

# Thresholds of "auto": a rule of thumb of ours, without a source. 500 images a class is the size of CIFAR-100, whose
# networks are usually trained as a whole; a tenth of that counts as small.
FEW_PER_CLASS, MANY_PER_CLASS = 50, 500
TAIL_BELOW = 20
"""`auto`: a class of fewer images is of the tail, which tuning of the backbone harms first (LIFT, Shi et al. 2024)."""
SGD_RATE = 0.1
"""Rate of the head where a plan names none."""
DISTANT_BELOW = 0.5
"""`auto`: a target is distant when `heads.measure_similarity` is nearer to chance (0) than to perfect (1)."""


@settings_class("transfer")
class TransferPlan:
    """What trains, from when on, at which rate.

    The head always trains; "frozen" trains nothing else, "none" is no plan. "joint" trains all blocks on several tasks,
    see `joint`; "lora" trains low-rank adapters of all blocks, see `lora`; "auto" is replaced by `resolve`. Gradual
    unfreezing (`epochs_per_stage`) is that of Howard and Ruder 2018, the head alone first (`head_epochs`) is linear
    probing and then fine-tuning, Kumar et al. 2022.

    Raises:
        SettingsError: a value out of its range, or `last_stages` without mode "partial".

    Example:
        >>> from gen_invariance import TransferPlan
        >>> TransferPlan("frozen").mode
        'frozen'
    """

    mode: Literal["none", "frozen", "partial", "full", "joint", "lora", "auto"] = "full"
    """none (no plan), frozen (the head only), partial (with the last blocks), full, joint, lora (adapters), or auto"""
    last_stages: CountOrZero | None = None
    """how many of the last blocks train, for partial only"""
    lr: PositiveFloat | None = None
    """learning rate of the head; null: 0.1 under SGD, training.learning_rate under AdamW"""
    backbone_lr_scale: PositiveFloat = 1.0
    """backbone rates are this times lr ..."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """... times this for each block further from the head; the last block has it once"""
    weight_decay: NonNegativeFloat = 2e-4
    """of every group; none for the backbone under pull_to_start, which replaces it"""
    head_epochs: CountOrZero = 0
    """epochs that the head trains alone"""
    epochs_per_stage: CountOrZero = 0
    """then one more block trains, from the last one backwards, every so many epochs; 0 for all at once"""
    pull_to_start: NonNegativeFloat = 0.0
    """strength of L2-SP, a penalty on the distance of backbone weights to their start"""
    batch_norm: Literal["train", "eval"] = "train"
    """eval keeps the statistics of blocks that train, as those of the others always are"""
    lora_rank: Width = 8
    """rank of the adapters of lora"""
    reason: str = ""
    """why auto chose this plan"""

    def __post_init__(self) -> None:
        if (self.mode == "partial") != (self.last_stages is not None):
            raise SettingsError(
                f"mode {self.mode} with last_stages={self.last_stages}; last_stages belongs to partial, and only to it"
            )

    def identity(self) -> dict[str, object]:
        """The settings that decide the result, for a run's config."""
        left_out = {"reason"} if self.mode == "lora" else {"reason", "lora_rank"}
        values = {**asdict(self), "lr": self.head_rate}  # as before there was null
        return {name: value for name, value in values.items() if name not in left_out}

    @property
    def head_rate(self) -> float:
        """Learning rate of the head."""
        return SGD_RATE if self.lr is None else self.lr

    # ---- what trains

    def trained_blocks(self, model: Classifier, *, epoch: int | None = None) -> tuple[str, ...]:
        """Blocks that train in `epoch`, input to output; without an epoch, those that train at some time.

        Raises:
            SettingsError: the plan is still "auto", the backbone declares no blocks or has fewer than `last_stages`.
        """
        if self.mode == "auto":
            raise SettingsError("this plan still says auto; call plan.resolve(model, num_images=..., similarity=...)")
        blocks = model.require_blocks()
        number = len(blocks)
        if self.mode == "frozen":
            number = 0
        elif self.last_stages is not None:
            number = self.last_stages
        if number > len(blocks):
            raise SettingsError(
                f"cannot train the last {number} blocks, the backbone has {len(blocks)} ({', '.join(blocks)}); lower "
                "last_stages"
            )
        if epoch is not None:
            number = min(number, self._count_thawed(epoch, len(blocks)))
        return blocks[len(blocks) - number :]

    def _count_thawed(self, epoch: int, blocks: int) -> int:
        """How many of all `blocks` the schedule allows to train in `epoch`."""
        if epoch < self.head_epochs:
            return 0
        return 1 + (epoch - self.head_epochs) // self.epochs_per_stage if self.epochs_per_stage else blocks

    def apply(self, model: Classifier, *, epoch: int = 0) -> None:
        """Put `model`, in place, into its state of `epoch`: gradients and eval mode of each block.

        Call it before the first step and at the start of each epoch. Blocks that do not train have no gradients (so
        optimisers skip them, momentum and weight decay included) and stay in eval mode at every `model.train()`.
        """
        trained = self.trained_blocks(model, epoch=epoch)
        for block in model.blocks:
            for name, parameter in model.block_parameters(block).items():
                trains = block in trained and (self.mode != "lora" or "lora_" in name)
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None
        model.head.requires_grad_(True)
        fixed = self.batch_norm == "eval" or self.mode == "lora"
        model.keep_in_eval([block for block in model.blocks if fixed or block not in trained])

    # ---- rates

    def parameter_groups(self, model: Classifier) -> list[dict]:
        """Groups for an optimiser: one for each block, input to output, then the head; all there from step 0.

        Each has `params`, `lr`, `weight_decay` and `name`. Blocks that never train are there at rate 0.
        """
        trained = self.trained_blocks(model)
        groups = []
        for depth, block in zip(range(len(model.blocks), 0, -1), model.blocks, strict=True):
            rate = self.head_rate * self.backbone_lr_scale * self.layer_decay**depth
            groups.append(
                {
                    "params": list(model.block_parameters(block).values()),
                    "lr": rate if block in trained else 0.0,
                    "weight_decay": 0.0 if self.pull_to_start else self.weight_decay,
                    "name": block,
                }
            )
        head = list(model.head.parameters())
        return [*groups, {"params": head, "lr": self.head_rate, "weight_decay": self.weight_decay, "name": "head"}]

    def describe(self, model: Classifier) -> str:
        """A table, one line a group: parameters, when it trains, rate, weight decay, batch-norm state.

        Example:
            >>> from gen_invariance.classifier.backbones import build_classifier
            >>> plan = TransferPlan("partial", last_stages=1, lr=0.1, backbone_lr_scale=0.1)
            >>> print(plan.describe(build_classifier("small_conv", num_classes=10, channels=1)))
            transfer: partial, last 1 of 4 blocks
            group  parameters  trains        lr    weight decay  batch norm
            conv1         352  never         0     -             eval
            conv2      18,560  never         0     -             eval
            conv3      73,984  never         0     -             eval
            conv4     147,712  from epoch 0  0.01  0.0002        train
            head        1,290  from epoch 0  0.1   0.0002        -
        """
        title = f"transfer: {self.mode}"
        if self.mode == "partial":
            title += f", last {self.last_stages} of {len(model.blocks)} blocks"
        if self.mode == "lora":
            title += f", adapters of rank {self.lora_rank}"
        if self.reason:
            title += f" ({self.reason})"
        rows = [("group", "parameters", "trains", "lr", "weight decay", "batch norm")]
        rows += [self._describe_group(model, group) for group in self.parameter_groups(model)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [title]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            cells[1] = row[1].rjust(widths[1])
            lines.append("  ".join(cells).rstrip())
        if self.pull_to_start:
            lines.append(f"backbone weights are pulled to their start with {self.pull_to_start:g}")
        return "\n".join(lines)

    def _describe_group(self, model: Classifier, group: dict) -> tuple[str, ...]:
        name, start = group["name"], self._find_start(model, group["name"])
        size = sum(parameter.numel() for parameter in group["params"])
        norm = "-"
        if model.has_batch_norm(name):
            norm = "eval" if start is None or self.mode == "lora" else self.batch_norm
        if start is None:
            return name, f"{size:,}", "never", f"{group['lr']:.4g}", "-", norm
        return name, f"{size:,}", f"from epoch {start}", f"{group['lr']:.4g}", f"{group['weight_decay']:.4g}", norm

    def _find_start(self, model: Classifier, block: str) -> int | None:
        """The epoch from which `block` (or "head") trains, None for never."""
        if block == "head":
            return 0
        trained = self.trained_blocks(model)
        if block not in trained:
            return None
        return self.head_epochs + self.epochs_per_stage * (len(trained) - 1 - trained.index(block))

    # ---- auto

    def resolve(
        self, model: Classifier, *, num_images: int, similarity: float, counts: Sequence[int] | None = None
    ) -> TransferPlan:
        """This plan itself, or for "auto" the mode that suits the target, with the reason.

        With `counts` the tail decides: where the features tell the classes apart, the head alone trains as long as the
        smallest class has fewer than `TAIL_BELOW` images or the median one fewer than `FEW_PER_CLASS`. Otherwise, as
        without `counts`, a large target trains all blocks, a distant one all but the early third, whose edges and blobs
        serve any images, a small similar one the last block, a medium similar one the last half.

        Args:
            model: the classifier with the target's head.
            num_images: target training images.
            similarity: of the target to the source in [0, 1], by `heads.measure_similarity` on its features.
            counts: training images of each class; the median takes the place of the mean then.

        Raises:
            SettingsError: no images, or a similarity outside [0, 1].
        """
        if self.mode != "auto":
            return self
        if num_images < 1 or not 0 <= similarity <= 1:
            raise SettingsError(
                f"auto needs num_images >= 1 and similarity in [0, 1], got {num_images} and {similarity}"
            )
        sizes = sorted(int(count) for count in counts or () if count > 0)
        each = statistics.median(sizes) if sizes else num_images / model.num_classes
        facts = f"{each:.0f} images a class, similarity {similarity:.2f}"
        if sizes:
            facts = f"a median of {each:.0f} images a class, the smallest {sizes[0]}, similarity {similarity:.2f}"
            reason = self._find_tail(sizes, each)
            if similarity >= DISTANT_BELOW and reason:
                return replace(self, mode="frozen", reason=f"auto: {facts}; {reason}, the head alone trains")
        mode, last, words = self._choose_depth(len(model.blocks), each, similarity)
        return replace(self, mode=mode, last_stages=last, reason=f"auto: {facts}; {words}")

    @staticmethod
    def _find_tail(sizes: Sequence[int], median: float) -> str:
        """Why the backbone should stay as it is, or nothing."""
        small = sum(size < TAIL_BELOW for size in sizes)
        if small:
            return f"{small} of {len(sizes)} classes have fewer than {TAIL_BELOW}"
        return "a small and similar target" if median < FEW_PER_CLASS else ""

    @staticmethod
    def _choose_depth(
        blocks: int, each: float, similarity: float
    ) -> tuple[Literal["full", "partial"], int | None, str]:
        """Mode, last stages, and why, for `each` images a class."""
        if each >= MANY_PER_CLASS:
            return "full", None, "a large target, all blocks train"
        if similarity < DISTANT_BELOW:
            last, words = blocks - math.ceil(blocks / 3), "a distant target, early blocks kept, the rest trains"
        elif each < FEW_PER_CLASS:
            last, words = 1, "a small and similar target, the last block trains"
        else:
            last, words = math.ceil(blocks / 2), "a similar target of medium size, the last half trains"
        return "partial", min(last, blocks), words
