"""Train a classifier on long-tailed images: one visible loop, on accelerate.

A step is: a batch by the sampling rule, plain augmentation for every row, the stage for the tail, mixing, loss.
Everything random in a step is drawn for the whole batch from a generator named by (seed, step), so a resumed run
repeats an uninterrupted one, and more processes see the same rows with the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.backbones import Classifier
from gen_invariance.data.images import ImageData
from gen_invariance.data.loader import ResidentLoader
from gen_invariance.data.sampling import DelayedRule, second_phase
from gen_invariance.errors import CheckpointError, RunError, SettingsError
from gen_invariance.nuisance.protocol import Nuisance, draw_to, select_rows
from gen_invariance.run import Run

Mix = Callable[..., tuple[Tensor, Tensor]]
"""`mix(images, labels, generator=...)` -> images and (soft) labels; applied last, after the stage."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Defaults are those of the CIFAR-LT protocol (Zhou et al. 2022) except the number of epochs.

    Attributes:
        epochs: passes over the training set (an epoch has as many draws as there are images, under every rule).
        batch_size: images a step, over all processes.
        learning_rate: peak rate of SGD.
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
        mixed_precision: "no", "bf16" or "fp16" (GPU).
        log_every, checkpoint_every: epochs between metrics lines and checkpoints.

    Raises:
        SettingsError: a value out of its range.
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
    mixed_precision: str = "no"
    log_every: int = 1
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("epochs", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0 or not 0 <= self.momentum < 1 or self.weight_decay < 0 or self.warmup < 0:
            raise SettingsError(
                "train: learning_rate must be positive, momentum in [0, 1), weight_decay and warmup not negative, got "
                f"{self.learning_rate}, {self.momentum}, {self.weight_decay}, {self.warmup}"
            )
        choices = {
            "schedule": ("step", "cosine"),
            "stage_from": ("start", "second_phase"),
            "stage_source": ("batch", "balanced"),
            "mixed_precision": ("no", "bf16", "fp16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SettingsError(f"train.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @property
    def second_phase_start(self) -> int:
        """First epoch of the second phase."""
        return self.milestones[0] if self.second_phase is None else self.second_phase

    def rule(self) -> str | DelayedRule:
        """The sampling rule as the loader takes it."""
        return DelayedRule(self.second_phase_start) if self.sampling == "delayed" else self.sampling

    def stage_is_on(self, epoch: int) -> bool:
        """Whether the stage works in `epoch`; the same predicate that switches the sampling rule."""
        return self.stage_from == "start" or second_phase(epoch, start=self.second_phase_start)

    def learning_rate_at(self, progress: float) -> float:
        """Learning rate after `progress` epochs (whole and part)."""
        if progress < self.warmup:
            epoch = math.floor(progress) + 1 if self.schedule == "step" else progress + 1 / self.epochs
            return self.learning_rate * min(1.0, epoch / self.warmup)
        if self.schedule == "cosine":
            done = (progress - self.warmup) / max(self.epochs - self.warmup, 1)
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.learning_rate * (1.0, 0.01, 0.0001)[sum(progress >= milestone for milestone in self.milestones)]

    def identity(self) -> dict[str, object]:
        """The settings that decide the result, for a run's config; how often to look is left out."""
        return {k: v for k, v in asdict(self).items() if k not in ("log_every", "checkpoint_every")}


def fit_classifier(
    model: Classifier,
    train: ImageData,
    settings: TrainSettings,
    *,
    loss: nn.Module,
    run: Run,
    stage: TailAugment | None = None,
    base: Nuisance | None = None,
    mix: Mix | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    progress: bool | None = None,
) -> Classifier:
    """Train `model` in place and return it in eval mode, as it is after the last epoch.

    Args:
        model: images in [0, 1] to logits.
        train: long-tailed training images; live on the accelerator as uint8.
        settings: see `TrainSettings`.
        loss: `loss(logits, labels)` -> scalar; see `losses.build_loss`.
        run: where checkpoints and metrics go. If it holds a checkpoint, training goes on from there.
        stage: gives tail classes the nuisance.
        base: plain augmentation of every row, before the stage (crops and flips, for instance).
        mix: see `Mix`.
        evaluate: figures to log every `log_every` epochs, on validation data; they decide nothing.
        progress: show a progress bar; None shows one on a terminal only.

    Raises:
        RunError: the loss became NaN or infinite; names the step.
    """
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=train.device.type == "cpu")
    model.to(accelerator.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    epochs_done = _restore(model, optimizer, run)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    loss = loss.to(accelerator.device)
    stage = stage.to(accelerator.device) if stage is not None else None
    batches = _Batches(train.to(accelerator.device), settings, run, stage=stage, base=base, accelerator=accelerator)

    per_epoch = batches.per_epoch
    start, steps = epochs_done * per_epoch, settings.epochs * per_epoch
    bar = tqdm(total=steps, initial=start, desc="train", disable=None if progress is None else not progress)
    total = torch.zeros((), device=accelerator.device)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step / per_epoch)
        images, labels, generator = batches.at(step)
        if mix is not None:
            images, labels = mix(images, labels, generator=generator)

        with accelerator.autocast():
            value = loss(wrapped(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(value)
        optimizer.step()

        total += value.detach()
        bar.update()
        if (step + 1) % per_epoch == 0:
            _end_epoch(
                (step + 1) // per_epoch, total / per_epoch, model, optimizer, settings, run, accelerator, evaluate
            )
            total.zero_()
    bar.close()
    return model.eval()


class _Batches:
    """Rows, augmentation draws and gates of each step, addressed by step."""

    def __init__(
        self,
        train: ImageData,
        settings: TrainSettings,
        run: Run,
        *,
        stage: TailAugment | None,
        base: Nuisance | None,
        accelerator: Accelerator,
    ) -> None:
        self.train, self.settings, self.run, self.stage, self.base = train, settings, run, stage, base
        self.share = slice(accelerator.process_index, None, accelerator.num_processes)
        several = accelerator.num_processes > 1  # an incomplete batch could leave a process without rows
        common = {"batch_size": settings.batch_size, "seed": run.seed, "num_epochs": settings.epochs}
        self.rows = ResidentLoader(train, rule=settings.rule(), drop_last=several, **common)
        self.balanced = ResidentLoader(train, rule="class_balanced", stream="stage", drop_last=several, **common)
        self.per_epoch = self.rows.steps_per_epoch
        self.labels = train.labels.cpu()  # gates look at labels on the CPU, without waiting for the device

    def at(self, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Images and labels of this process at `step`, augmented, and the generator for what is left to draw."""
        rows, generator = self.rows.indices(step), self.run.generator("train", step)
        images, labels = self._pick(rows)
        if self.base is not None:
            draw = self.base.sample((len(rows), *images.shape[1:]), generator=generator)
            images = self.base.apply(images, draw_to(select_rows(draw, torch.arange(len(rows))[self.share]), images))
        if self.stage is not None and self.settings.stage_is_on(step // self.per_epoch):
            source_rows = self.balanced.indices(step) if self.settings.stage_source == "balanced" else rows
            gate = self.stage.sample(
                (len(rows), *images.shape[1:]), self.labels[source_rows.cpu()], generator=generator
            ).share(self.share)
            source = self._pick(source_rows) if self.settings.stage_source == "balanced" else None
            images, labels = self.stage.apply(images, labels, gate, source=source)
        return images, labels, generator

    def _pick(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        own = rows[self.share]
        return self.train.float_images(own), self.train.labels[own]


def _end_epoch(
    epoch: int,
    mean_loss: Tensor,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    run: Run,
    accelerator: Accelerator,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
) -> None:
    """After `epoch` epochs: look at the loss, log, save."""
    last = epoch == settings.epochs
    value = float(mean_loss)
    if not math.isfinite(value):
        raise RunError(
            f"training stopped in epoch {epoch}: the loss is {value}; lower train.learning_rate, "
            "the last checkpoint is kept"
        )
    if not accelerator.is_main_process:
        return
    if last or epoch % settings.log_every == 0:
        figures = dict(evaluate(model.eval())) if evaluate is not None else {}
        model.train()
        run.log(step=epoch, loss=value, learning_rate=settings.learning_rate_at(epoch - 1), **figures)
    if last or epoch % settings.checkpoint_every == 0:
        run.save(epoch, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def _restore(model: Classifier, optimizer: torch.optim.Optimizer, run: Run) -> int:
    """Load the newest checkpoint, if any; returns the number of epochs already done."""
    state = run.load_latest()
    if state is None:
        return 0
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint in {run.path} does not fit this model ({str(error).splitlines()[0]}); "
            "use the settings it was trained with"
        ) from error
    return int(state["step"])
