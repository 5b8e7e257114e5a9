"""Fit a translator on the large classes of an image set: one public call, and one visible loop on accelerate.

Everything random in a step is drawn for the whole batch from a generator named by (seed, step) and then shared out
to the processes, so a resumed run, and a run on more processes, see the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from gen_invariance.data.identity import tie_run
from gen_invariance.data.images import ImageData
from gen_invariance.data.storage import check_batch
from gen_invariance.devices import MovingAverage, are_finite, plain_defaults, send, use_accelerator
from gen_invariance.errors import CheckpointError, RunError, SettingsError, first_line
from gen_invariance.nuisance.protocol import draw_to, select_rows
from gen_invariance.run import MISFITS, Run, first_process_first, is_first_process
from gen_invariance.settings import check_value
from gen_invariance.stopping import signals_noted
from gen_invariance.translator.io import save_translator
from gen_invariance.translator.objective import Objective
from gen_invariance.translator.quality.monitor import Evaluate, QualityMonitor
from gen_invariance.translator.registry import build_objective, find_kind, initial_weights_from
from gen_invariance.translator.samples import KEPT_GRID, draw_balanced_rows, fill_bank, find_class_members, write_grid
from gen_invariance.translator.settings import FitSettings

SMALLEST_SIDE = 4
"""Pixels of the smallest side of images that a translator can be fitted on."""


def _say_nothing(line: str) -> None:
    """Drop `line`."""


@plain_defaults()
def fit_translator(
    name: str,
    data: ImageData,
    settings: FitSettings | None = None,
    *,
    network: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    out: Path | str | Run | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool | None = None,
    evaluate: Evaluate | None = None,
    say: Callable[[str], None] = _say_nothing,
) -> nn.Module:
    """Fit the translator called `name` on the chosen classes of `data`; returns it in eval mode.

    Args:
        name: "redraw", "spatial", "munit", "flow" or "pose"; "img2img" wraps a pipeline and fits nothing.
        data: training images; the translator is fitted on their device.
        settings: steps, batch size, classes; None for the defaults.
        network: settings of the translator, without `channels`.
        objective: settings of what is minimised, those of the translator's settings class.
        out: folder of the run: settings, metrics, checkpoints, sample grids, and the result in `out`/translator. A
            `Run` that is open already is written into, with its seed. None saves nothing.
        seed: of initial weights and all draws.
        resume: go on with the run in `out`.
        progress: show a progress bar; None shows one on a terminal only.
        evaluate: gives the figures of the translator after a step, for `settings.watch_every`; see
            `quality.monitor.make_evaluator`.
        say: gets a line when the fit collapses, and when it stops early.

    Raises:
        DataError: `data` are not those that the run in `out` began with.
        SettingsError: an unknown name; a setting that does not exist, is out of range, or that this translator does
            not have; no class is large enough; images of fewer than `SMALLEST_SIDE` pixels a side.
        RunError: a loss term, or a weight, became NaN or infinite; names the term and the step.

    Example:
        >>> from gen_invariance import fit_translator, load_source, make_long_tailed
        >>> train = make_long_tailed(load_source("digits"), largest=60, imbalance=20, rest_is_test=True).train
        >>> translator = fit_translator("redraw", train, FitSettings(steps=2), progress=False)
        >>> draw = translator.sample((8, 1, 16, 16), generator=torch.Generator().manual_seed(0))
        >>> translator.apply(train.float_images()[:8], draw).shape
        torch.Size([8, 1, 16, 16])
    """
    settings = settings or FitSettings()
    network = dict(check_value(network, Mapping | None, "translator.network") or {})
    objective = dict(check_value(objective, Mapping | None, "translator.objective") or {})
    kind = find_kind(check_value(name, str, "translator.name"))
    kind.check_loop(name, settings)
    sides = data.images.shape[2:]
    if min(sides) < SMALLEST_SIDE:
        raise SettingsError(
            f"a translator is fitted on images of {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels or more, got {sides[0]} x "
            f"{sides[1]}; set data.image_size"
        )
    identity = {
        "data": {"name": data.name, "counts": data.counts.tolist(), "image_shape": list(data.images.shape[1:])},
        "translator": {"name": name, "network": network, "objective": objective},
        "fit": settings.identity(),
    }
    with _open_run(out, data, seed=seed, identity=identity, resume=resume) as run:
        if kind.objective:
            target = build_objective(name, data, network=network, settings=objective, seed=run.seed)
            return fit_objective(target, data, settings, run=run, progress=progress, evaluate=evaluate, say=say)
        with initial_weights_from(run.seed):
            translator = kind.build(data, network)
        options = kind.read_settings(objective)
        members = find_class_members(data, settings)
        own = run if is_first_process() else Run(None, kind=run.kind, seed=run.seed)  # all fit, the first one writes
        if kind.fit:
            kind.load("fit")(translator, data, settings, options, run=own, progress=progress)
        translator.to(data.device)
        with first_process_first():  # nobody goes on before the translator is there
            write_grid(f"step-{settings.steps if kind.fit else 0:08d}.png", translator, data, members, own)
            _save(translator, own)
        return translator


@contextmanager
def _open_run(
    out: Run | Path | str | None, data: ImageData, *, seed: int, identity: dict[str, Any], resume: bool
) -> Iterator[Run]:
    if isinstance(out, Run):
        yield out
        return
    with Run.open(out, kind="fit", seed=seed, config=identity, resume=resume) as run:
        tie_run(run, {"train": data})
        yield run


def _save(translator: nn.Module, run: Run) -> None:
    if run.path is not None:
        save_translator(translator, run.path / "translator")


def fit_objective(
    objective: Objective,
    data: ImageData,
    settings: FitSettings,
    *,
    run: Run,
    progress: bool | None = None,
    evaluate: Evaluate | None = None,
    say: Callable[[str], None] = _say_nothing,
) -> nn.Module:
    """The loop behind `fit_translator`, over any objective, one of the user's own for instance.

    Args:
        objective: made over an untrained translator; it owns the optimisers.
        data: the training set; only the chosen classes are looked at.
        settings: see `FitSettings`.
        run: where checkpoints, metrics, grids and the result go. If it holds a checkpoint, fitting goes on from there.
        progress: show a progress bar; None shows one on a terminal only.
        evaluate: as for `fit_translator`.
        say: as for `fit_translator`.

    Raises:
        SettingsError: no class is large enough, the batch does not divide over the processes, or nobody evaluates.
        RunError: a loss term, or a weight, became NaN or infinite; names the term and the step.
    """
    with use_accelerator(data.device, mixed_precision=settings.mixed_precision) as accelerator:
        if settings.batch_size % accelerator.num_processes:
            raise SettingsError(
                f"fit.batch_size {settings.batch_size} does not divide over {accelerator.num_processes} processes"
            )
        check_batch(data.images, settings.batch_size // accelerator.num_processes, where="fit")
        networks = _networks(objective)
        for network in networks.values():
            network.to(accelerator.device).train()
        translator, discriminator = objective.translator, objective.discriminator
        data = data.to(accelerator.device)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        monitor = QualityMonitor(settings, evaluate, run=run, accelerator=accelerator, say=say)
        members = monitor.fitted(find_class_members(data, settings), data.groups)
        fit = _Fit(objective, _moving_average(objective, settings), monitor, data, members, settings, run, accelerator)
        start = fit.restore()
        # Under fp16 the wrapped optimisers undo the loss scale and skip steps whose gradients overflowed.
        optimizers = {name: accelerator.prepare_optimizer(each) for name, each in objective.optimizers.items()}

        bar = tqdm(total=settings.steps, initial=start, desc="fit", disable=None if progress is None else not progress)
        over = start > 0 and (monitor.out_of_time(start) or monitor.out_of_patience(start))
        with signals_noted(active=accelerator.num_processes == 1) as stop_asked, bar:
            for step in range(start, start if over else settings.steps):
                generator = run.generator("fit", step)
                images = draw_images(data, members, settings, generator)
                draw = objective.sample(images.shape, generator=generator)
                images = images[share]
                draw = draw_to(select_rows(draw, torch.arange(settings.batch_size)[share]), images)
                for name, rate in objective.compute_learning_rates(step, settings.steps).items():
                    for group in optimizers[name].param_groups:
                        group["lr"] = rate

                terms: dict[str, Tensor] = {}
                with accelerator.autocast():
                    out = objective.forward(images, draw)
                if discriminator is not None:
                    with accelerator.autocast():
                        terms |= objective.discriminator_terms(out)
                    update_weights(discriminator, optimizers["discriminator"], terms, accelerator)
                    discriminator.requires_grad_(False)  # its weight gradients would be computed only to be dropped
                with accelerator.autocast():
                    translator_terms = objective.translator_terms(out)
                update_weights(translator, optimizers["translator"], translator_terms, accelerator)
                if discriminator is not None:
                    discriminator.requires_grad_(True)

                fit.update_average()
                bar.update()
                if fit.write_due(step + 1, terms | translator_terms, bar, asked=stop_asked()):
                    break
        return fit.finish()


def _networks(objective: Objective) -> dict[str, nn.Module]:
    networks = {"translator": objective.translator}
    if objective.discriminator is not None:
        networks["discriminator"] = objective.discriminator
    return networks


@dataclass(frozen=True)
class _Fit:
    """What is read and written around the steps of a fit: checkpoints, metrics, sample grids, the kept weights."""

    objective: Objective
    average: MovingAverage | None
    monitor: QualityMonitor
    data: ImageData
    members: list[Tensor]
    settings: FitSettings
    run: Run
    accelerator: Accelerator

    def update_average(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.objective.translator)

    def write_due(self, done: int, terms: Mapping[str, Tensor], bar: tqdm, *, asked: bool) -> bool:
        """Write what is due after `done` steps: figures, a metrics line, a sample grid, a checkpoint, each at its own
        interval; all of them after the last step. When `asked` to stop, a checkpoint in any case.

        Returns:
            Whether this was the last step.
        """
        settings = self.settings
        last = self.monitor.out_of_time(done) or done == settings.steps

        def due(every: int) -> bool:
            return every > 0 and (last or done % every == 0)

        intervals = (settings.watch_every, settings.log_every, settings.sample_every, settings.checkpoint_every)
        if not (asked or any(map(due, intervals))):
            return False
        values = torch.stack([value.detach().float() for value in terms.values()]).tolist()
        numbers = dict(zip(terms, values, strict=True))
        _stop_if_not_finite(numbers, _networks(self.objective), step=done)
        if due(settings.watch_every):
            with self._evaluated_weights() as translator:
                self.monitor.evaluate(translator, done)
            last = last or self.monitor.out_of_patience(done)
        if self.accelerator.is_main_process:
            if due(settings.log_every):
                bar.set_postfix({name: f"{value:.3f}" for name, value in numbers.items()}, refresh=False)
                self.run.log(step=done, **numbers)
            if due(settings.sample_every):
                with self._evaluated_weights() as translator:
                    write_grid(f"step-{done:08d}.png", translator, self.data, self.members, self.run)
            if asked or due(settings.checkpoint_every):
                self.run.save(done, self._state(), is_due=due(settings.checkpoint_every))
        return asked or last

    def finish(self) -> nn.Module:
        """The translator with the weights that are kept, as its objective concludes, saved, in eval mode."""
        translator, best = self.objective.translator, self.monitor.best
        if best is not None:
            translator.load_state_dict(best)
        elif self.average is not None:
            translator.load_state_dict(self.average.module.state_dict())
        translator.eval()
        fill_bank(translator, self.data, self.members, self.run)
        conclude, changed = getattr(self.objective, "conclude", None), False
        if conclude is not None:
            changed = conclude(self.data, torch.cat(self.members), generator=self.run.generator("conclude"))
        if self.accelerator.is_main_process:
            _save(translator, self.run)
            if best is not None or changed:
                write_grid(KEPT_GRID, translator, self.data, self.members, self.run)
        self.accelerator.wait_for_everyone()
        return translator

    @contextmanager
    def _evaluated_weights(self) -> Iterator[nn.Module]:
        """The average of the weights if there is one, in eval mode, its bank full."""
        translator = self.objective.translator if self.average is None else self.average.module
        translator.eval()
        fill_bank(translator, self.data, self.members, self.run)
        yield translator
        translator.train()

    def _state(self) -> dict[str, object]:
        state = {name: network.state_dict() for name, network in _networks(self.objective).items()}
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.objective.optimizers.items()}
        state |= {"optimizers": optimizers, **self.monitor.state()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state

    def restore(self) -> int:
        """Load the newest checkpoint, if any; returns the number of steps already done."""
        state = self.run.load_latest()
        if state is None:
            return 0
        try:
            for name, network in _networks(self.objective).items():
                network.load_state_dict(state[name])
            for name, optimizer in self.objective.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.monitor.restore(state)
        except MISFITS as error:
            raise CheckpointError(
                f"the checkpoint in {self.run.path} does not fit this translator ({first_line(error)}); "
                "use the settings it was fitted with"
            ) from error
        return int(state["step"])


def _moving_average(objective: Objective, settings: FitSettings) -> MovingAverage | None:
    """The average of the translator's weights; by default it rises to its decay, so that a short fit is not ruled by
    its first steps.
    """
    if objective.average_decay is None and not settings.average:
        return None
    decay = objective.average_decay or (lambda updates: min(settings.average, (1 + updates) / (10 + updates)))
    return MovingAverage(objective.translator, decay)


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
    images = data.float_images(draw_balanced_rows(members, settings.batch_size, generator=generator))
    if settings.flip:
        mirrored = torch.rand(settings.batch_size, generator=generator) < 0.5
        images = torch.where(send(mirrored, images.device).view(-1, 1, 1, 1), images.flip(3), images)
    return images


def _stop_if_not_finite(terms: Mapping[str, float], networks: Mapping[str, nn.Module], *, step: int) -> None:
    """Raise `RunError` for a loss term or a weight that is NaN or infinite.

    Terms may be finite although the update after them was not; such weights must not reach a checkpoint.
    """
    for name, value in terms.items():
        if not np.isfinite(value):
            raise RunError(
                f"fitting stopped at step {step}: loss term {name!r} is {value}; "
                "lower the learning rate or check the images, the last checkpoint is kept"
            )
    for name, network in networks.items():
        if not are_finite(network.parameters()):
            raise RunError(
                f"fitting stopped at step {step}: a weight of the {name} is NaN or infinite; "
                "lower the learning rate, the last checkpoint is kept"
            )
