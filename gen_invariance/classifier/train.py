"""Train a classifier on long-tailed images: one visible loop, on accelerate.

A step is: a batch by the sampling rule, the stage for the tail, plain augmentation for every row, mixing, loss.
What there is beside it (a transfer plan, an average of the weights, a second loss, a correction of the head) is one
line each here and explained where it lives: `settings`, `batches`, `objective`, `transfer`, `correction`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.batches import Batch, Batches, Mix
from gen_invariance.classifier.capture import CapturedSteps, can_capture, place_rates, set_rate
from gen_invariance.classifier.correction import check_correction, correct_head
from gen_invariance.classifier.lora import add_lora, merge_lora
from gen_invariance.classifier.losses import CrossEntropy
from gen_invariance.classifier.model import Classifier
from gen_invariance.classifier.objective import L2SP, backward, choose_hardest
from gen_invariance.classifier.optimizer import build_optimizer
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.classifier.views import HeadOfViews, ViewBatches, check_views, start_at_class_means
from gen_invariance.data.identity import tie_run
from gen_invariance.data.images import ImageData
from gen_invariance.data.settings import rule_name
from gen_invariance.devices import MovingAverage, are_finite, use_accelerator
from gen_invariance.errors import CheckpointError, RunError, SettingsError, first_line
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import MISFITS, Run
from gen_invariance.stopping import signals_noted

__all__ = ["Mix", "TrainSettings", "fit_classifier"]

Evaluate = Callable[[nn.Module], Mapping[str, float]]


def fit_classifier(
    model: Classifier,
    data: ImageData,
    settings: TrainSettings | None = None,
    *,
    loss: nn.Module | None = None,
    second_loss: nn.Module | None = None,
    plan: TransferPlan | None = None,
    stage: TailAugment | None = None,
    stage_source: ImageData | None = None,
    augmentation: Nuisance | None = None,
    mix: Mix | None = None,
    evaluate: Evaluate | None = None,
    out: Run | Path | str | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool | None = None,
) -> Classifier:
    """Train `model` in place and return it in eval mode: as it is after the last epoch, averaged and corrected.

    Args:
        model: images in [0, 1] to logits; see `build_classifier`.
        data: long-tailed training images, on the device that shall train.
        settings: see `TrainSettings`; None takes its defaults.
        loss: `loss(logits, labels)` -> scalar, see `build_loss`; None is cross-entropy.
        second_loss: takes the place of `loss` in the second phase; with class weights, delayed re-weighting.
        plan: which blocks of a pretrained `model` train, from when on, at which rate; None trains all alike.
        stage: gives tail classes the nuisance.
        stage_source: what the stage acts on, row for row `data`; None takes `data` itself.
        augmentation: plain augmentation of every row, after the stage (crops and flips, RandAugment).
        mix: see `batches.Mix`; in place of the mixing that `settings` names.
        evaluate: figures to log every `log_every` epochs, on validation data; with `settings.keep` "best" the weights
            of the epoch with the highest "balanced_accuracy" among them are returned.
        out: run folder for checkpoints and metrics, or a run that is open already; None keeps nothing.
        seed: of everything random; that of a run that is open takes its place.
        resume: go on with the run that is in `out`, to the same weights as if it had never stopped.
        progress: show a progress bar; None shows one on a terminal only.

    Raises:
        RunError: the loss or a weight became NaN or infinite; names the epoch.
        DataError: `data` are not those that the run in `out` began with.
        SettingsError: settings that do not fit the model, the stage or the number of processes; a folder that holds a
            run without `resume`.
        CheckpointError: the run's checkpoint is of another model.

    Example:
        >>> from gen_invariance import ImageData, TrainSettings, build_classifier
        >>> data = ImageData(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 0, 0, 1, 1]), ("a", "b"))
        >>> model = build_classifier("small_conv", num_classes=2, channels=1)
        >>> model = fit_classifier(model, data, TrainSettings(epochs=1, warmup=0), progress=False)
        >>> model(data.float_images()).shape
        torch.Size([6, 2])
    """
    settings = TrainSettings() if settings is None else settings
    if plan is not None and plan.mode == "none":
        plan = None
    settings.check_phases(stage=stage is not None, second_loss=second_loss is not None)
    _check_fit(settings, plan=plan, mix=mix, evaluate=evaluate)
    loss = CrossEntropy(data.counts) if loss is None else loss
    with (
        _open_run(out, data, settings, seed=seed, resume=resume) as run,
        use_accelerator(data.device, mixed_precision=settings.mixed_precision) as accelerator,
    ):
        model.to(accelerator.device, memory_format=torch.channels_last).train()
        parts: dict[str, Any] = {"stage": stage, "augmentation": augmentation, "stage_source": stage_source}
        parts |= {"process": accelerator.process_index, "processes": accelerator.num_processes}
        batches = _build_batches(model, data, settings, run, mix=mix, parts=parts)
        state = _State(model, settings, run, batches, plan=plan, accelerator=accelerator)
        losses = [part.to(accelerator.device) for part in (loss, second_loss or loss)]
        stage = stage.to(accelerator.device) if stage is not None else None

        per_epoch = batches.per_epoch
        start, steps = state.restore(per_epoch), settings.epochs * per_epoch
        bar = _progress_bar(steps, start, progress=progress, accelerator=accelerator)
        total = state.loss_sum

        def carry_out(batch: Batch, second: bool) -> Tensor:
            state.optimizer.zero_grad(set_to_none=True)
            loss = backward(
                state.wrapped, batch, losses[second], accelerator=accelerator, parts=settings.accumulate,
                consistency=settings.consistency, penalty=state.penalty,
            )  # fmt: skip
            state.optimizer.step()
            return loss

        captured = [CapturedSteps(partial(carry_out, second=second), active=state.captures) for second in (False, True)]
        alone = accelerator.num_processes == 1
        with state.prepared(start // per_epoch), signals_noted(active=alone) as stop_asked:
            for step in range(start, steps):
                epoch = step // per_epoch
                if step % per_epoch == 0:
                    state.begin_epoch(epoch)
                state.set_rates(settings.schedule_at(step / per_epoch))
                second = settings.in_second_phase(epoch)
                batch = batches.at(step, choose=partial(choose_hardest, model, losses[second]))
                total += captured[second](batch)
                state.update_average()

                bar.update()
                if (step + 1) % per_epoch == 0:
                    state.end_epoch(epoch + 1, accelerator.reduce(total / per_epoch, "mean"), evaluate)
                    total.zero_()
                if stop_asked():
                    state.leave(step + 1, per_epoch)
                    bar.close()
                    break
        bar.close()
        if stage is not None:
            stage.disable_cache()
        state.finish(data, stage, stage_source)
        return model.eval()


def _check_fit(
    settings: TrainSettings, *, plan: TransferPlan | None, mix: Mix | None, evaluate: Evaluate | None
) -> None:
    """Raise `SettingsError` where settings need what is not given."""
    if settings.views or settings.spread:
        check_views(settings, mode="none" if plan is None else plan.mode, mix=mix)
    if settings.keep == "best" and evaluate is None:
        raise SettingsError("training.keep=best needs validation images; set data.validation_fraction, such as 0.2")


def _build_batches(
    model: Classifier, data: ImageData, settings: TrainSettings, run: Run, *, mix: Mix | None, parts: dict[str, Any]
) -> Batches | ViewBatches:
    """The batches of a training; a head that starts at class means is put there first."""
    if settings.head_start == "class_means":
        start_at_class_means(model, data)
    if settings.views:
        return ViewBatches(model, data, settings, run, **parts)
    return Batches(data, settings, run, mix=mix, **parts)


@contextmanager
def _open_run(
    out: Run | Path | str | None, data: ImageData, settings: TrainSettings, *, seed: int, resume: bool
) -> Iterator[Run]:
    if isinstance(out, Run):
        yield out
        return
    with Run.open(out, kind="train", seed=seed, config={"training": settings.identity()}, resume=resume) as run:
        tie_run(run, {"train": data})
        yield run


class _State:
    """All that changes while a classifier trains: weights, optimiser, average; how it is saved and restored."""

    def __init__(
        self,
        model: Classifier,
        settings: TrainSettings,
        run: Run,
        batches: Batches | ViewBatches,
        *,
        plan: TransferPlan | None,
        accelerator: Accelerator,
    ) -> None:
        if plan is not None and accelerator.num_processes > 1 and (plan.head_epochs or plan.epochs_per_stage):
            raise SettingsError(
                "a plan that thaws blocks later trains on one process; use head_epochs=0 or one process"
            )
        if settings.head_correction != "none":
            check_correction(model, settings.head_correction, settings.head_correction_options)
        self.model, self.settings, self.run, self.plan, self.accelerator = model, settings, run, plan, accelerator
        self.batches = batches
        self.has_adapters = plan is not None and plan.mode == "lora"
        if self.has_adapters:
            add_lora(model, rank=plan.lora_rank, generator=run.generator("lora"))
            model.to(accelerator.device)
        self.optimizer = build_optimizer(model, settings, plan)
        # The penalty is on the distance to where the model came from, so it is made before a checkpoint is loaded.
        self.penalty = None
        if plan is not None and plan.pull_to_start:
            self.penalty = L2SP(model, strength=plan.pull_to_start)
        self.average = None
        if settings.average_decay:
            self.average = MovingAverage(model, lambda updates: settings.average_decay, use_buffers=True)
        self.is_finished, self.captures = False, can_capture(settings, plan, accelerator)
        self.best: tuple[float, dict[str, Tensor]] | None = None  # with keep="best": score and weights of that epoch
        self.loss_sum = torch.zeros((), device=accelerator.device)  # over the steps of the present epoch

    @property
    def result(self) -> nn.Module:
        """The model that training would return now."""
        return self.model if self.average is None else self.average.module

    @contextmanager
    def prepared(self, epoch: int) -> Iterator[None]:
        """Model and optimiser wrapped for the accelerator; blocks that do not train must be known by then.

        Under mixed precision accelerate puts an autocast `forward` on the model itself. It goes at the end: a model
        that kept it would answer otherwise than the same weights loaded from a file.
        """
        self.begin_epoch(epoch)
        if self.captures:
            place_rates(self.optimizer, self.accelerator.device)
        own = {name: self.model.__dict__.get(name) for name in ("forward", "_original_forward")}
        trained = HeadOfViews(self.model) if self.settings.views else self.model
        self.wrapped, self.optimizer = self.accelerator.prepare(trained, self.optimizer)
        try:
            yield
        finally:
            for name, value in own.items():
                self.model.__dict__.pop(name, None)
                if value is not None:
                    self.model.__dict__[name] = value

    def begin_epoch(self, epoch: int) -> None:
        """Put the model into its state of `epoch`."""
        self.model.train()
        if self.plan is not None:
            self.plan.apply(self.model, epoch=epoch)

    def set_rates(self, factor: float) -> None:
        """Set every group's rate to its own times `factor`."""
        for group in self.optimizer.param_groups:
            set_rate(group, group["initial_lr"] * factor)

    def update_average(self) -> None:
        """Move the average, if there is one, towards the weights."""
        if self.average is not None:
            self.average.update_parameters(self.model)

    def end_epoch(self, epoch: int, mean_loss: Tensor, evaluate: Evaluate | None) -> None:
        """After `epoch` epochs: look at the loss, log, save."""
        settings, last, value = self.settings, epoch == self.settings.epochs, float(mean_loss)
        if not math.isfinite(value):
            raise RunError(_broken(epoch, f"the loss is {value}"))
        self._check_weights(epoch)
        staged, self.batches.staged = self.batches.staged, 0
        if not self.accelerator.is_main_process:
            return
        if last or epoch % settings.log_every == 0:
            figures = dict(evaluate(self.result.eval())) if evaluate is not None else {}
            self._remember_best(figures)
            self.model.train()
            about = {"sampling": rule_name(settings.rule(), epoch - 1), "staged_rows": staged}
            rate = settings.learning_rate_at(epoch - 1)
            self.run.log(step=epoch, loss=value, learning_rate=rate, **about, **figures)
        if self._is_due(epoch):
            self.save(epoch)

    def _remember_best(self, figures: Mapping[str, float]) -> None:
        """Keep the present weights where their balanced accuracy is not below the best before: later ones win ties."""
        score = figures.get("balanced_accuracy", -math.inf)
        if self.settings.keep == "best" and (self.best is None or score >= self.best[0]):
            weights = self.result.state_dict()
            self.best = (score, {name: value.detach().clone() for name, value in weights.items()})

    def leave(self, steps: int, per_epoch: int) -> None:
        """Save after `steps` steps, anywhere in an epoch."""
        epoch, begun = divmod(steps, per_epoch)
        self._check_weights(epoch + 1)
        self.save(epoch, steps=begun, is_due=begun == 0 and self._is_due(epoch))

    def _check_weights(self, epoch: int) -> None:
        """A step's loss may be finite although the update after it was not; such weights must not be saved."""
        if not are_finite(self.model.parameters()):
            raise RunError(_broken(epoch, "a weight is NaN or infinite"))

    def _is_due(self, epoch: int) -> bool:
        return epoch == self.settings.epochs or epoch % self.settings.checkpoint_every == 0

    def save(self, epoch: int, *, steps: int = 0, is_due: bool = True) -> None:
        """Write the checkpoint of `epoch` whole epochs and so many `steps` of the next.

        "model" is always what training would return (adapters apart), whatever else is needed to go on.
        """
        state: dict[str, Any] = {"model": self.result.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            state |= {"trained": self.model.state_dict(), "averaged": self.average.n_averaged}
        if self.penalty is not None:
            state["pull"] = self.penalty.state_dict()
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        if self.best is not None:
            state |= {"best_score": self.best[0], "best": self.best[1]}
        if steps:
            state |= {"steps_of_epoch": steps, "loss_sum": self.loss_sum, "staged": self.batches.staged}
        self.run.save(epoch, state, is_due=is_due)

    def restore(self, per_epoch: int) -> int:
        """Load the newest checkpoint, if any; returns the number of steps already done."""
        state = self.run.load_latest()
        if state is None:
            return 0
        try:
            self.is_finished = state["step"] > self.settings.epochs
            if self.is_finished:
                self._merge_adapters()
                self.model.load_state_dict(state["model"])
                return self.settings.epochs * per_epoch
            self.model.load_state_dict(state.get("trained", state["model"]))
            self._restore_rest(state)
            # With another batch size (`allow_changed_settings`), an epoch that was begun has other steps.
            begun = min(int(state.get("steps_of_epoch", 0)), per_epoch - 1)
        except MISFITS as error:
            raise CheckpointError(
                f"the checkpoint in {self.run.path} does not fit this model ({first_line(error)}); "
                "use the settings it was trained with"
            ) from error
        return int(state["step"]) * per_epoch + begun

    def _restore_rest(self, state: Mapping[str, Any]) -> None:
        self.loss_sum.copy_(state.get("loss_sum", self.loss_sum))
        self.batches.staged = int(state.get("staged", 0))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["model"])
            self.average.n_averaged.copy_(state["averaged"])
        if "best" in state:
            self.best = (float(state["best_score"]), dict(state["best"]))
        if self.penalty is not None:
            # Checkpoints of before `L2SP` was one module have a prefix.
            self.penalty.load_state_dict({name.removeprefix("pull."): value for name, value in state["pull"].items()})
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _merge_adapters(self) -> None:
        if self.has_adapters:
            merge_lora(self.model)
            self.has_adapters = False

    def finish(self, data: ImageData, stage: TailAugment | None, stage_source: ImageData | None) -> None:
        """Make the model what training returns: the average, adapters merged, the head corrected."""
        if self.is_finished:
            return
        if self.best is not None:
            self.model.load_state_dict(self.best[1])
        elif self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        kind, options = self.settings.head_correction, self.settings.head_correction_options
        if not self.has_adapters and kind == "none" and self.best is None:
            return
        self._merge_adapters()
        if kind != "none":
            correct_head(self.model, data, kind, run=self.run, stage=stage, stage_source=stage_source, options=options)
        if self.accelerator.is_main_process:
            self.run.save(self.settings.epochs + 1, {"model": self.model.state_dict()})


def _progress_bar(steps: int, start: int, *, progress: bool | None, accelerator: Accelerator) -> tqdm:
    hidden = None if progress is None else not progress
    return tqdm(total=steps, initial=start, desc="train", disable=hidden if accelerator.is_main_process else True)


def _broken(epoch: int, reason: str) -> str:
    return f"training stopped in epoch {epoch}: {reason}; lower training.learning_rate, the last checkpoint is kept"
