"""Transfer of a pretrained backbone: which stages train, from when on, and at which rate.

A `TransferPlan` is settings only. `apply(model, epoch=...)` puts the model into the state of that epoch, from nothing
but the epoch, so a resumed run needs no stored schedule; `parameter_groups(model)` gives the optimiser every group
from the first step on, with its learning rate written into it, so any torch scheduler works on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gen_invariance.classifier.backbones import Classifier
from gen_invariance.data.images import check_images, to_float
from gen_invariance.errors import SettingsError

MODES = ("none", "frozen", "partial", "full", "joint", "auto")

FEW_PER_CLASS, MANY_PER_CLASS = 50, 500
"""`auto`: below the first a target set is small, from the second on it is large (images a class, mean)."""

DISTANT_BELOW = 0.5
"""`auto`: a target whose `heads.measure_similarity` is below this is distant."""


@dataclass(frozen=True)
class TransferPlan:
    """What trains, from when on, at which rate.

    Attributes:
        mode: "none" (no plan: all trains at the rate of the training), "frozen" (the head only), "partial" (the head
            and the last `last_stages` stages), "full" (all stages), "joint" (all stages under several
            heads, see `joint`), or "auto" (call `resolve` first).
        last_stages: k of "partial"; 0 is "frozen", all stages "full".
        lr: learning rate of the head.
        backbone_lr_scale: backbone rates are this times `lr` ...
        layer_decay: ... times this to the power of the depth; the last stage has depth 1.
        weight_decay: of every group; 0 for backbone groups under `pull_to_start`, which replaces it.
        head_epochs: the head trains alone so long before the rest joins (linear probing, then fine-tuning; Kumar et
            al. 2022).
        epochs_per_stage: thaw one more stage, from the output backwards, every so many epochs (gradual unfreezing;
            Howard and Ruder 2018); 0 thaws all that train at once.
        pull_to_start: strength of the pull of backbone weights to their start, see `PullToStart`; 0 for none.
        batch_norm: "train" updates the statistics of stages that train, "eval" keeps them; stages that do not train
            always keep theirs.
        reason: why `auto` chose this plan.

    Raises:
        SettingsError: a value out of its range, or `last_stages` without mode "partial".
    """

    mode: str = "full"
    last_stages: int | None = None
    lr: float = 0.1
    backbone_lr_scale: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 2e-4
    head_epochs: int = 0
    epochs_per_stage: int = 0
    pull_to_start: float = 0.0
    batch_norm: str = "train"
    reason: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingsError(f"no transfer mode {self.mode!r}; choose {', '.join(MODES)}")
        if (self.mode == "partial") != (self.last_stages is not None):
            raise SettingsError(
                f"mode {self.mode} with last_stages={self.last_stages}; last_stages belongs to partial, and only to it"
            )
        if self.batch_norm not in ("train", "eval"):
            raise SettingsError(f"no batch_norm policy {self.batch_norm!r}; choose train or eval")
        for name, low, high in (
            ("lr", 0, math.inf),
            ("backbone_lr_scale", 0, math.inf),
            ("layer_decay", 0, 1),
        ):
            if not low < getattr(self, name) <= high or not math.isfinite(getattr(self, name)):
                raise SettingsError(f"{name} must lie in ({low}, {high}], got {getattr(self, name)}")
        for name in ("last_stages", "head_epochs", "epochs_per_stage", "weight_decay", "pull_to_start"):
            if not (getattr(self, name) or 0) >= 0:
                raise SettingsError(f"{name} must be at least 0, got {getattr(self, name)}")

    # ---- what trains

    def trained_stages(self, model: Classifier, *, epoch: int | None = None) -> tuple[str, ...]:
        """Stages that train in `epoch`, input to output; without an epoch, those that train at some time.

        Raises:
            SettingsError: the plan is still "auto", the backbone declares no stages or has fewer than `last_stages`.
        """
        if self.mode == "auto":
            raise SettingsError("this plan still says auto; call plan.resolve(model, num_images=..., similarity=...)")
        stages = model.stages
        if not stages:
            raise SettingsError(
                "the backbone declares no stages; wrap it with Classifier(Backbone(..., stages=...), head)"
            )
        number = {"frozen": 0, "partial": self.last_stages}.get(self.mode, len(stages))
        if number > len(stages):
            raise SettingsError(
                f"cannot train the last {number} stages, the backbone has {len(stages)} ({', '.join(stages)}); lower "
                "last_stages"
            )
        if epoch is not None:
            number = min(number, self._thawed(epoch))
        return stages[len(stages) - number :]

    def _thawed(self, epoch: int) -> float:
        """How many stages the schedule allows to train in `epoch`."""
        if epoch < self.head_epochs:
            return 0
        return 1 + (epoch - self.head_epochs) // self.epochs_per_stage if self.epochs_per_stage else math.inf

    def apply(self, model: Classifier, *, epoch: int = 0) -> None:
        """Put `model`, in place, into its state of `epoch`: gradients and eval mode of each stage.

        Call it before the first step and at the start of each epoch. Stages that do not train have no gradients (so
        optimisers skip them, momentum and weight decay included) and stay in eval mode at every `model.train()`.
        """
        trained = self.trained_stages(model, epoch=epoch)
        for stage in model.stages:
            for parameter in model.stage_parameters(stage).values():
                parameter.requires_grad_(stage in trained)
                if stage not in trained:
                    parameter.grad = None
        model.head.requires_grad_(True)
        model.keep_in_eval([stage for stage in model.stages if stage not in trained or self.batch_norm == "eval"])

    # ---- rates

    def stage_lr(self, model: Classifier, stage: str) -> float:
        """Learning rate of `stage`; 0 if it never trains."""
        if stage not in self.trained_stages(model):
            return 0.0
        depth = len(model.stages) - model.stages.index(stage)
        return self.lr * self.backbone_lr_scale * self.layer_decay**depth

    def parameter_groups(self, model: Classifier) -> list[dict]:
        """Groups for an optimiser: one for each stage, input to output, then the head; all there from step 0.

        Each has `params`, `lr`, `weight_decay` and `name`. Stages that never train are there at rate 0.
        """
        decay = 0.0 if self.pull_to_start else self.weight_decay
        groups = [
            {
                "params": list(model.stage_parameters(stage).values()),
                "lr": self.stage_lr(model, stage),
                "weight_decay": decay,
                "name": stage,
            }
            for stage in model.stages
        ]
        head = {
            "params": list(model.head.parameters()),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "name": "head",
        }
        return [*groups, head]

    def describe(self, model: Classifier) -> str:
        """A table, one line a group: parameters, when it trains, rate, weight decay, batch-norm state.

        Example:
            >>> from gen_invariance.classifier.backbones import build_classifier
            >>> plan = TransferPlan("partial", last_stages=1, lr=0.1, backbone_lr_scale=0.1)
            >>> print(plan.describe(build_classifier("small_conv", num_classes=10, channels=1)))
            transfer: partial, last 1 of 4 stages
            group  parameters  trains        lr    weight decay  batch norm
            conv1         352  never         0     -             eval
            conv2      18,560  never         0     -             eval
            conv3      73,984  never         0     -             eval
            conv4     147,712  from epoch 0  0.01  0.0002        train
            head        1,290  from epoch 0  0.1   0.0002        -
        """
        depth = f", last {self.last_stages} of {len(model.stages)} stages" if self.mode == "partial" else ""
        title = f"transfer: {self.mode}{depth}" + (f" ({self.reason})" if self.reason else "")
        rows = [("group", "parameters", "trains", "lr", "weight decay", "batch norm")]
        for group in self.parameter_groups(model):
            stage = group["name"]
            start = 0 if stage == "head" else self._start(model, stage)
            size = f"{sum(parameter.numel() for parameter in group['params']):,}"
            decay = "-" if start is None else f"{group['weight_decay']:.4g}"
            norm = "-" if not self._has_batch_norm(model, stage) else "eval" if start is None else self.batch_norm
            when = "never" if start is None else f"from epoch {start}"
            rows.append((stage, size, when, f"{group['lr']:.4g}", decay, norm))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        # Numbers of parameters to the right, everything else to the left.
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            cells[1] = row[1].rjust(widths[1])
            lines.append("  ".join(cells).rstrip())
        pull = [f"backbone weights are pulled to their start with {self.pull_to_start:g}"] if self.pull_to_start else []
        return "\n".join([title, *lines, *pull])

    def _start(self, model: Classifier, stage: str) -> int | None:
        """The epoch from which `stage` trains, None for never."""
        trained = self.trained_stages(model)
        if stage not in trained:
            return None
        return self.head_epochs + self.epochs_per_stage * (len(trained) - 1 - trained.index(stage))

    @staticmethod
    def _has_batch_norm(model: Classifier, stage: str) -> bool:
        modules = model.head.modules() if stage == "head" else model.stage_modules(stage)
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)

    # ---- auto

    def resolve(self, model: Classifier, *, num_images: int, similarity: float) -> TransferPlan:
        """This plan itself, or for "auto" the mode that suits the target, with the reason.

        A large target trains all stages. A distant one keeps the early third, whose edges and blobs serve any images,
        and trains the rest. A small similar one trains the last stage, a medium similar one the last half.

        Args:
            model: the classifier with the target's head.
            num_images: target training images.
            similarity: of the target to the source in [0, 1], by `heads.measure_similarity` on its features.

        Raises:
            SettingsError: no images, or a similarity outside [0, 1].
        """
        if self.mode != "auto":
            return self
        if num_images < 1 or not 0 <= similarity <= 1:
            raise SettingsError(
                f"auto needs num_images >= 1 and similarity in [0, 1], got {num_images} and {similarity}"
            )
        count, each = len(model.stages), num_images / model.num_classes
        facts = f"{each:.0f} images a class, similarity {similarity:.2f}"
        if each >= MANY_PER_CLASS:
            return replace(self, mode="full", reason=f"auto: {facts}; a large target, all stages train")
        if similarity < DISTANT_BELOW:
            last, words = count - math.ceil(count / 3), "a distant target, early stages kept, the rest trains"
        elif each < FEW_PER_CLASS:
            last, words = 1, "a small and similar target, the last stage trains"
        else:
            last, words = math.ceil(count / 2), "a similar target of medium size, the last half trains"
        return replace(self, mode="partial", last_stages=min(last, count), reason=f"auto: {facts}; {words}")


class PullToStart(nn.Module):
    """L2-SP: a penalty on the distance of backbone weights to where they started (Li et al. 2018, equation 3).

    Make it before training and add `pull(model)` to the loss. The start is in its state dict, for resuming.

    Raises:
        SettingsError: a negative strength.
    """

    def __init__(self, model: Classifier, *, strength: float, head_strength: float = 0.0) -> None:
        super().__init__()
        if strength < 0 or head_strength < 0:
            raise SettingsError(f"strengths must be at least 0, got {strength} and {head_strength}")
        self.strength, self.head_strength = strength, head_strength
        for number, parameter in enumerate(model.backbone.parameters()):
            self.register_buffer(f"start{number}", parameter.detach().clone())

    def forward(self, model: Classifier) -> Tensor:
        """Strength / 2 * |backbone - start|^2 + head_strength / 2 * |head|^2, over what trains; a scalar."""
        total = torch.zeros((), device=self.start0.device)
        for start, parameter in zip(self.buffers(), model.backbone.parameters(), strict=True):
            if parameter.requires_grad:
                total = total + self.strength / 2 * (parameter - start).square().sum()
        if self.head_strength:
            total = total + self.head_strength / 2 * sum(p.square().sum() for p in model.head.parameters())
        return total


def cache_features(model: Classifier, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Features (N, D) of all `images` at once, for heads on a frozen backbone: each image passes it only once.

    Args:
        model: its backbone frozen, as mode "frozen" leaves it.
        images: uint8 (N, C, H, W), or float in [0, 1].
        batch_size: images at a time.

    Raises:
        SettingsError: part of the backbone still trains, so that stored features would go stale.
        ShapeError: images of another form.
    """
    training = any(p.requires_grad for p in model.backbone.parameters()) or any(
        m.training for m in model.backbone.modules()
    )
    if training:
        raise SettingsError("features can be stored for a frozen backbone only; apply TransferPlan('frozen') first")
    device = model.mean.device
    found = []
    with torch.no_grad():
        for part in images.split(batch_size):
            part = to_float(part.to(device))
            check_images(part, where="cache_features")
            found.append(model.features(part))
    return torch.cat(found) if found else torch.zeros(0, model.num_features, device=device)
