"""Fit a translator on (long-tailed) images: one visible loop, on accelerate.

Everything random in a step is drawn for the whole batch from a generator named by (seed, step) and then shared out
to the processes, so a resumed run, and a run on more processes, see the same numbers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.devices import accelerator_on
from gen_invariance.errors import CheckpointError, OutputError, RunError, SettingsError, first_line
from gen_invariance.files import atomic_write, cannot_write
from gen_invariance.nuisance.protocol import Draw, Nuisance, draw_to, select_rows
from gen_invariance.run import MISFITS, Run
from gen_invariance.stopping import signals_noted
from gen_invariance.translator.bank import fill_bank
from gen_invariance.translator.fit_settings import FitSettings, class_members
from gen_invariance.translator.quality.monitor import Watch, Watcher

KEPT_GRID = "kept.png"
"""Sample grid of the weights that a watched fit keeps."""


class Objective(Protocol):
    """What `fit_translator` minimises: a translator, its adversary, their optimisers, and the loss terms."""

    translator: nn.Module
    discriminator: nn.Module
    optimizers: Mapping[str, torch.optim.Optimizer]

    def learning_rate_at(self, step: int) -> Mapping[str, float]:
        """Learning rate of each optimiser, by name."""
        ...

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """All randomness of one step, with leading B."""
        ...

    def forward(self, images: Tensor, draw: Draw) -> dict[str, Tensor]:
        """The one forward pass that both updates share."""
        ...

    def discriminator_terms(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named, weighted loss terms of the adversary."""
        ...

    def translator_terms(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named, weighted loss terms of the translator."""
        ...


def fit_translator(
    objective: Objective,
    data: ImageData,
    settings: FitSettings,
    *,
    run: Run,
    progress: bool | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """Fit, save to `run.path / "translator"`, and return the translator in eval mode.

    Args:
        objective: made over an untrained translator; it owns the optimisers.
        data: the training set; only the chosen classes are looked at.
        settings: see `FitSettings`.
        run: where checkpoints, metrics and sample grids go. If it holds a checkpoint, fitting goes on from there.
        progress: show a progress bar; None shows one on a terminal only.
        watch: gives the figures of the translator after a step, for `settings.watch_every`; see `watch`.
        say: gets a line when the fit collapses, and when it stops early.

    Raises:
        SettingsError: no class is large enough, the batch does not divide over the processes, or nobody watches.
        RunError: a loss term became NaN or infinite; names the term and the step.
    """
    with accelerator_on(data.device, mixed_precision=settings.mixed_precision) as accelerator:
        translator, discriminator = objective.translator.train(), objective.discriminator.train()
        translator.to(accelerator.device)
        discriminator.to(accelerator.device)
        data = data.to(accelerator.device)
        if settings.batch_size % accelerator.num_processes:
            raise SettingsError(
                f"fit.batch_size {settings.batch_size} does not divide over {accelerator.num_processes} processes"
            )
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        watcher = Watcher(settings, watch, run=run, accelerator=accelerator, say=say)
        members = watcher.fitted(class_members(data, settings), data.groups)
        average = _moving_average(translator, settings.average) if settings.average else None
        fitting = _Fitting(objective, average, watcher, data, members, settings, run, accelerator)
        start = fitting.restore()
        # Under fp16 the wrapped optimisers undo the loss scale and skip steps whose gradients overflowed.
        optimizers = {name: accelerator.prepare_optimizer(each) for name, each in objective.optimizers.items()}

        bar = tqdm(total=settings.steps, initial=start, desc="fit", disable=None if progress is None else not progress)
        over = start > 0 and (watcher.out_of_time(start) or watcher.out_of_patience(start))
        with signals_noted(active=accelerator.num_processes == 1) as stop_asked, bar:
            for step in range(start, start if over else settings.steps):
                generator = run.generator("fit", step)
                images = draw_images(data, members, settings, generator)
                draw = objective.sample(images.shape, generator=generator)
                images, draw = (
                    images[share],
                    draw_to(select_rows(draw, torch.arange(settings.batch_size)[share]), images),
                )
                for name, rate in objective.learning_rate_at(step).items():
                    for group in optimizers[name].param_groups:
                        group["lr"] = rate

                with accelerator.autocast():
                    out = objective.forward(images, draw)
                    discriminator_terms = objective.discriminator_terms(out)
                update_weights(discriminator, optimizers["discriminator"], discriminator_terms, accelerator)

                discriminator.requires_grad_(False)  # its weight gradients would be computed only to be dropped
                with accelerator.autocast():
                    translator_terms = objective.translator_terms(out)
                update_weights(translator, optimizers["translator"], translator_terms, accelerator)
                discriminator.requires_grad_(True)

                if average is not None:
                    average.update_parameters(translator)
                bar.update()
                if fitting.look(step + 1, {**discriminator_terms, **translator_terms}, bar, asked=stop_asked()):
                    break
        return fitting.finish()


@dataclass(frozen=True)
class _Fitting:
    """What stands beside the steps of a fit: what is written during it, what it goes on from, what is kept."""

    objective: Objective
    average: AveragedModel | None
    watcher: Watcher
    data: ImageData
    members: list[Tensor]
    settings: FitSettings
    run: Run
    accelerator: Accelerator

    def look(self, done: int, terms: Mapping[str, Tensor], bar: tqdm, *, asked: bool) -> bool:
        """What is written after `done` steps: figures, a metrics line, a sample grid, a checkpoint, each at its own
        pace; all of them after the last step. When `asked` to stop, a checkpoint in any case.

        Returns:
            Whether this was the last step.
        """
        settings = self.settings
        last = self.watcher.out_of_time(done) or done == settings.steps

        def due(every: int) -> bool:
            return every > 0 and (last or done % every == 0)

        paces = (settings.watch_every, settings.log_every, settings.sample_every, settings.checkpoint_every)
        if not (asked or any(map(due, paces))):
            return False
        numbers = {name: float(value.detach()) for name, value in terms.items()}
        stop_if_not_finite(numbers, step=done)
        _stop_if_broken(self.objective, step=done)
        if due(settings.watch_every):
            with self._shown() as translator:
                self.watcher.look(translator, done)
            last = last or self.watcher.out_of_patience(done)
        if self.accelerator.is_main_process:
            if due(settings.log_every):
                bar.set_postfix({name: f"{value:.3f}" for name, value in numbers.items()}, refresh=False)
                self.run.log(step=done, **numbers)
            if due(settings.sample_every):
                self._write_grid(f"step-{done:08d}.png")
            if asked or due(settings.checkpoint_every):
                self.run.save(done, self._state())
        return asked or last

    def finish(self) -> nn.Module:
        """The translator with the weights that are kept, saved, in eval mode."""
        translator, best = self.objective.translator, self.watcher.best
        if best is not None:
            translator.load_state_dict(best)
        elif self.average is not None:
            translator.load_state_dict(self.average.module.state_dict())
        translator.eval()
        fill_bank(translator, self.data, self.members, self.run)
        if self.accelerator.is_main_process:
            save_translator(translator, self.run.path / "translator")
            if best is not None:
                write_grid(self.run.path / "samples" / KEPT_GRID, translator, self.data, self.members, self.run)
        self.accelerator.wait_for_everyone()
        return translator

    @contextmanager
    def _shown(self) -> Iterator[nn.Module]:
        """What is looked at: the average of the weights if there is one, in eval mode, its bank full."""
        translator = self.objective.translator if self.average is None else self.average.module
        translator.eval()
        fill_bank(translator, self.data, self.members, self.run)
        yield translator
        translator.train()

    def _write_grid(self, name: str) -> None:
        with self._shown() as translator:
            write_grid(self.run.path / "samples" / name, translator, self.data, self.members, self.run)

    def _state(self) -> dict[str, object]:
        objective, scaler = self.objective, self.accelerator.scaler
        return {
            **({} if scaler is None else {"scaler": scaler.state_dict()}),
            "translator": objective.translator.state_dict(),
            "discriminator": objective.discriminator.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in objective.optimizers.items()},
            **({} if self.average is None else {"average": self.average.state_dict()}),
            **self.watcher.state(),
        }

    def restore(self) -> int:
        """Load the newest checkpoint, if any; returns the number of steps already done."""
        objective, state = self.objective, self.run.load_latest()
        if state is None:
            return 0
        try:
            objective.translator.load_state_dict(state["translator"])
            objective.discriminator.load_state_dict(state["discriminator"])
            for name, optimizer in objective.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.watcher.restore(state)
        except MISFITS as error:
            raise CheckpointError(
                f"the checkpoint in {self.run.path} does not fit this translator ({first_line(error)}); "
                "use the settings it was fitted with"
            ) from error
        return int(state["step"])


def _moving_average(translator: nn.Module, decay: float) -> AveragedModel:
    """An average that rises to `decay`, so that a short fit is not ruled by its first steps."""

    def step(kept: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        done = int(count)
        torch._foreach_lerp_(kept, current, 1 - min(decay, (1 + done) / (10 + done)))

    return AveragedModel(translator, multi_avg_fn=step)


def update_weights(
    module: nn.Module, optimizer: torch.optim.Optimizer, terms: Mapping[str, Tensor], accelerator: Accelerator
) -> None:
    """One step down the sum of `terms`, gradients averaged over the processes.

    The networks are used through several methods, which a wrapper around `forward` would not see; averaging the
    gradients by hand does what such a wrapper would.
    """
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(torch.stack(list(terms.values())).sum())
    if accelerator.num_processes > 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
    optimizer.step()


def draw_images(data: ImageData, members: list[Tensor], settings: FitSettings, generator: torch.Generator) -> Tensor:
    """A class-balanced batch, float (B, C, H, W) in [0, 1]: a class uniformly, then one of its images."""
    sizes = torch.tensor([len(rows) for rows in members])
    starts = sizes.cumsum(0) - sizes
    classes = torch.randint(len(members), (settings.batch_size,), generator=generator)
    within = (torch.rand(settings.batch_size, generator=generator) * sizes[classes]).long()
    images = data.float_images(torch.cat(members)[starts[classes] + within])
    if settings.flip:
        mirrored = torch.rand(settings.batch_size, generator=generator) < 0.5
        images = torch.where(mirrored.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)
    return images


def stop_if_not_finite(terms: Mapping[str, float], *, step: int) -> None:
    """Raise `RunError` that names the first loss term which is NaN or infinite."""
    broken = [name for name, value in terms.items() if not np.isfinite(value)]
    if broken:
        raise RunError(
            f"fitting stopped at step {step}: loss term {broken[0]!r} is {terms[broken[0]]}; "
            "lower the learning rate or check the images, the last checkpoint is kept"
        )


def _stop_if_broken(objective: Objective, *, step: int) -> None:
    """Terms may be finite although the update after them was not; such weights must not reach a checkpoint."""
    for what in ("translator", "discriminator"):
        if not all(bool(weight.isfinite().all()) for weight in getattr(objective, what).parameters()):
            raise RunError(
                f"fitting stopped at step {step}: a weight of the {what} is NaN or infinite; "
                "lower the learning rate, the last checkpoint is kept"
            )


def save_translator(translator: nn.Module, folder: Path) -> None:
    """`save_pretrained` into a temporary folder, then renamed to `folder`: whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        translator.save_pretrained(temporary)
        for weights in temporary.rglob("*.safetensors"):  # their writer lets nobody else read them
            shutil.copymode(temporary / "config.json", weights)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except SafetensorError as error:  # its writer's own kind for a full disk
        raise OutputError(f"cannot write {folder}: {error}; free some space or choose another folder") from error
    except OSError as error:
        raise cannot_write(folder, error) from error


@torch.no_grad()
def write_grid(
    path: Path, translator: Nuisance, data: ImageData, members: list[Tensor], run: Run, *, draws: int = 7
) -> None:
    """A PNG grid: first column untouched images, one class a row (8 at most), then `draws` translations of each."""
    images = data.float_images(torch.stack([own[0] for own in members[:8]]))
    repeated = images.repeat_interleave(draws, 0)
    draw = translator.sample(repeated.shape, generator=run.generator("grid"))
    training = translator.training
    translator.eval()
    translated = translator.apply(repeated, draw).unflatten(0, (len(images), draws))
    translator.train(training)
    cells = torch.cat([images[:, None], translated], dim=1).cpu()
    with atomic_write(path) as temporary:
        Image.fromarray(tile(cells)).save(temporary, format="PNG")


def tile(cells: Tensor, *, enlarge: int | None = None, gap: int = 1) -> np.ndarray:
    """Images (R, S, C, H, W) in [0, 1] as one uint8 RGB picture, R rows of S, white gaps, small images enlarged."""
    rows, columns, channels, height, _ = cells.shape
    enlarge = enlarge or max(1, round(64 / height))
    cells = cells.expand(-1, -1, 3, -1, -1) if channels == 1 else cells
    large = cells.repeat_interleave(enlarge, 3).repeat_interleave(enlarge, 4)
    framed = torch.nn.functional.pad(large, (gap, gap, gap, gap), value=1.0)
    picture = framed.permute(0, 3, 1, 4, 2).reshape(rows * framed.shape[3], columns * framed.shape[4], 3)
    return to_uint8(picture.clamp(0, 1)).numpy()
