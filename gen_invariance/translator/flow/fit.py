"""Fit a flow translator: one visible loop, on accelerate, as `fit.fit_translator`, without an adversary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

import gen_invariance.torchvision_guard  # noqa: F401

# isort: split
from diffusers.training_utils import EMAModel

from gen_invariance.data.images import ImageData
from gen_invariance.devices import accelerator_on
from gen_invariance.errors import CheckpointError, RunError, SettingsError
from gen_invariance.nuisance.protocol import Draw, draw_to, select_rows
from gen_invariance.run import Run
from gen_invariance.stopping import signals_noted
from gen_invariance.translator.bank import fill_bank
from gen_invariance.translator.fit import (
    KEPT_GRID,
    FitSettings,
    class_members,
    draw_images,
    save_translator,
    stop_if_not_finite,
    update_weights,
    write_grid,
)
from gen_invariance.translator.flow.model import FlowTranslator
from gen_invariance.translator.flow.view import content_view, sample_view
from gen_invariance.translator.quality.monitor import Watch, Watcher


@dataclass(frozen=True)
class FlowSettings:
    """What fitting minimises, and how.

    Attributes:
        learning_rate: of Adam at its highest; it rises over the first twentieth of the steps, then falls to 0
            by a cosine.
        code_weight: of the mean squared style code, which keeps codes near 0.
        code_noise: standard deviation of the noise on the style codes while fitting. With `code_weight` it limits what
            a code can hold.
        average: the largest decay of the moving average of the weights, which is what is kept; it rises to it.

    Raises:
        SettingsError: a value out of its range.
    """

    learning_rate: float = 2e-3
    code_weight: float = 0.01
    code_noise: float = 0.1
    average: float = 0.995

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0 or (name == "learning_rate" and value == 0) or (name == "average" and value > 1):
                raise SettingsError(
                    f"flow.{name} must be {'in [0, 1]' if name == 'average' else 'positive'}, got {value}"
                )


def fit_flow(
    translator: FlowTranslator,
    data: ImageData,
    loop: FitSettings,
    settings: FlowSettings,
    *,
    run: Run,
    progress: bool | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> FlowTranslator:
    """Fit, save to `run.path / "translator"`, and return the translator in eval mode, its bank full.

    Args:
        translator: untrained.
        data: the training set; only the classes that `loop` chooses are looked at.
        loop: steps, batch size, classes, how often to look.
        settings: see `FlowSettings`.
        run: where checkpoints, metrics and sample grids go. If it holds a checkpoint, fitting goes on from there.
        progress: show a progress bar; None shows one on a terminal only.
        watch: gives the figures of the translator after a step, for `loop.watch_every`; see `watch`.
        say: gets a line when the fit collapses, and when it stops early.

    Raises:
        SettingsError: no class is large enough, the batch does not divide over the processes, or nobody watches.
        RunError: a loss term, or a weight, became NaN or infinite; names the term and the step.
    """
    with accelerator_on(data.device, mixed_precision=loop.mixed_precision) as accelerator:
        if loop.batch_size % accelerator.num_processes:
            raise SettingsError(
                f"fit.batch_size {loop.batch_size} does not divide over {accelerator.num_processes} processes"
            )
        translator.to(accelerator.device).train()
        data = data.to(accelerator.device)
        watcher = Watcher(loop, watch, run=run, accelerator=accelerator, say=say)
        members = watcher.fitted(class_members(data, loop), data.groups)
        state = _State(translator, settings, run, accelerator, watcher)
        share = slice(accelerator.process_index, None, accelerator.num_processes)

        bar = tqdm(
            total=loop.steps, initial=state.start, desc="flow", disable=None if progress is None else not progress
        )
        over = state.start > 0 and (watcher.out_of_time(state.start) or watcher.out_of_patience(state.start))
        with signals_noted(active=accelerator.num_processes == 1) as stop_asked, bar:
            for step in range(state.start, state.start if over else loop.steps):
                generator = run.generator("fit", step)
                images = draw_images(data, members, loop, generator)
                draw = sample_step(translator, images.shape, generator=generator)
                images, draw = images[share], draw_to(select_rows(draw, torch.arange(loop.batch_size)[share]), images)
                for group in state.optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, loop.steps, settings.learning_rate)
                with accelerator.autocast():
                    terms = flow_terms(translator, images, draw, settings)
                update_weights(translator, state.optimizer, terms, accelerator)
                state.average.step(translator.parameters())
                bar.update()
                if _look(step + 1, terms, state, data, members, loop, asked=stop_asked()):
                    break
        if watcher.best is None:
            state.average.copy_to(translator.parameters())
        else:
            translator.load_state_dict(watcher.best)
        translator.eval()
        fill_bank(translator, data, members, run)
        if accelerator.is_main_process:
            save_translator(translator, run.path / "translator")
            if watcher.best is not None:
                write_grid(run.path / "samples" / KEPT_GRID, translator, data, members, run)
        accelerator.wait_for_everyone()
        return translator


def sample_step(translator: FlowTranslator, shape: torch.Size, *, generator: torch.Generator) -> Draw:
    """All randomness of one step for images of `shape` = (B, C, H, W).

    Returns:
        `noise` (B, 2, C, H, W) of the image and of the view, `time` (B,) in (0, 1], `code` (B, S) noise on the style,
        `mirror` bool (B, 2) and `shift` int64 (B, 2) of the copy that the style is read off, and what `sample_view`
        gives.
    """
    count, *image = shape
    return {
        "noise": torch.randn(count, 2, *image, generator=generator),
        "time": 1 - torch.rand(count, generator=generator),
        "code": torch.randn(count, translator.config.style_dim, generator=generator),
        "mirror": torch.rand(count, 2, generator=generator) < 0.5,
        "shift": torch.randint(max(image), (count, 2), generator=generator),
        **sample_view(shape, generator=generator),
    }


def flow_terms(translator: FlowTranslator, images: Tensor, draw: Draw, settings: FlowSettings) -> dict[str, Tensor]:
    """Weighted loss terms: flow matching (see `flow`), and the size of the style codes."""
    config, noise = translator.config, draw["noise"]
    code = translator.style(scrambled(images, draw["mirror"], draw["shift"]))
    style = code + settings.code_noise * draw["code"]
    view = content_view(images, removes=config.removes, draw=draw) + config.view_noise * noise[:, 1]
    target, time = images * 2 - 1, draw["time"]
    along = torch.lerp(target, noise[:, 0], time.view(-1, 1, 1, 1))
    end = translator.end(along, time, view, style)
    return {
        "end": (end - target).square().mean(),
        "code": settings.code_weight * code.square().mean(),
    }


def scrambled(images: Tensor, mirror: Tensor, shift: Tensor) -> Tensor:
    """Copies that keep the style but not the shape's place: mirrored along both axes, and shifted round the borders.

    Args:
        images: (B, C, H, W).
        mirror: bool (B, 2), along height and width.
        shift: int64 (B, 2), pixels.
    """
    for axis, size in ((2, images.shape[2]), (3, images.shape[3])):
        place = torch.arange(size, device=images.device)
        sign = 1 - 2 * mirror[:, axis - 2, None].to(place)
        index = (sign * place + shift[:, axis - 2, None]) % size
        index = index[:, None, :, None] if axis == 2 else index[:, None, None, :]
        images = images.gather(axis, index.expand_as(images))
    return images


def learning_rate_at(step: int, steps: int, highest: float) -> float:
    """Up in a line over the first twentieth of `steps`, then down to 0 by a cosine."""
    warmup = max(steps // 20, 1)
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


class _State:
    """What a checkpoint holds: weights, their average, the optimiser, and how many steps are done."""

    def __init__(
        self, translator: FlowTranslator, settings: FlowSettings, run: Run, accelerator: Accelerator, watcher: Watcher
    ) -> None:
        self.translator, self.run, self.accelerator, self.watcher = translator, run, accelerator, watcher
        optimizer = torch.optim.Adam(translator.parameters(), lr=settings.learning_rate, fused=True)
        self.average = EMAModel(
            translator.parameters(), decay=settings.average, use_ema_warmup=True, power=2 / 3, foreach=True
        )
        self.average.to(accelerator.device)
        self.start = self._restore(optimizer)
        # Under fp16 the wrapped optimiser undoes the loss scale and skips steps whose gradients overflowed.
        self.optimizer = accelerator.prepare_optimizer(optimizer)

    def save(self, step: int) -> None:
        scaler = self.accelerator.scaler
        parts = {
            "translator": self.translator.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({} if scaler is None else {"scaler": scaler.state_dict()}),
            **self.watcher.state(),
        }
        self.run.save(step, parts)

    def _restore(self, optimizer: torch.optim.Optimizer) -> int:
        state = self.run.load_latest()
        if state is None:
            return 0
        try:
            self.translator.load_state_dict(state["translator"])
            self.average.load_state_dict(state["average"])
            self.average.to(self.accelerator.device)
            optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.watcher.restore(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint in {self.run.path} does not fit this translator ({str(error).splitlines()[0]}); "
                "use the settings it was fitted with"
            ) from error
        return int(state["step"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The translator with the average of its weights, in eval mode."""
        self.average.store(self.translator.parameters())
        self.average.copy_to(self.translator.parameters())
        self.translator.eval()
        yield
        self.translator.train()
        self.average.restore(self.translator.parameters())


def _look(
    done: int,
    terms: dict[str, Tensor],
    state: _State,
    data: ImageData,
    members: list[Tensor],
    loop: FitSettings,
    *,
    asked: bool,
) -> bool:
    """What is written after `done` steps: figures, a metrics line, a sample grid, a checkpoint, each at its own pace;
    all of them after the last step. When `asked` to stop, a checkpoint in any case.

    Returns:
        Whether this was the last step.
    """
    watcher, run = state.watcher, state.run
    last = watcher.out_of_time(done) or done == loop.steps

    def due(every: int) -> bool:
        return every > 0 and (last or done % every == 0)

    if not (asked or any(map(due, (loop.watch_every, loop.log_every, loop.sample_every, loop.checkpoint_every)))):
        return False
    numbers = {name: float(value.detach()) for name, value in terms.items()}
    stop_if_not_finite(numbers, step=done)
    if not all(bool(weight.isfinite().all()) for weight in state.translator.parameters()):
        raise RunError(
            f"fitting stopped at step {done}: a weight of the translator is NaN or infinite; "
            "lower the learning rate, the last checkpoint is kept"
        )
    if due(loop.watch_every):
        with state.averaged():
            fill_bank(state.translator, data, members, run)
            watcher.look(state.translator, done)
        last = last or watcher.out_of_patience(done)
    if state.accelerator.is_main_process:
        if due(loop.log_every):
            run.log(step=done, **numbers)
        if due(loop.sample_every):
            with state.averaged():
                fill_bank(state.translator, data, members, run)
                write_grid(run.path / "samples" / f"step-{done:08d}.png", state.translator, data, members, run)
        if asked or due(loop.checkpoint_every):
            state.save(done)
    return asked or last
