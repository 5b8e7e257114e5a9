"""The rows, draws and gates of each training step, addressed by step, and this process's share of them.

Everything random is drawn for the whole batch from a generator named by (seed, step): a resumed run repeats an
uninterrupted one, and more processes see the same rows with the same draws. Work is shared, randomness is not: each
process augments its own rows only, except under mixing, whose partners may be anyone's.

A GPU is asked for the steps of a block at once: their rows, gates and draws are decided on the CPU and sent together,
and all their gated rows go through the nuisance in one pass. Which steps make a block depends on the step alone, so a
run that goes on in the middle of one computes it again as it was. On a CPU, for which nobody waits, it is one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen_invariance.augment.cache import TranslationBank
from gen_invariance.augment.stage import Gate, TailAugment
from gen_invariance.classifier.blocks import Block, RowsPlan, StepPlan
from gen_invariance.classifier.mixing import build_mixing
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.data.images import ImageData, to_float
from gen_invariance.data.loader import ResidentLoader
from gen_invariance.devices import send
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Nuisance, draw_for, select_rows
from gen_invariance.run import Run

Mix = Callable[..., tuple[Tensor, Tensor]]
"""`mix(images, labels, generator=...)` -> images and (soft) labels; applied last, after the stage."""

Choose = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]
"""`choose(candidates, labels, rows)` -> images; see `objective.choose_hardest`."""


_BLOCK_STEPS, _BLOCK_BYTES = 64, 2**27  # on a GPU: steps at most, and memory that their translations may take
_PASS_VALUES = 2**23  # of images that go through a nuisance together: 2,730 of 3 x 32 x 32


def _steps_of_block(data: ImageData, settings: TrainSettings) -> int:
    """How many steps are prepared at once: one on a CPU."""
    if data.device.type == "cpu":
        return 1
    batch = 4 * settings.batch_size * settings.worst_of * data.images[0].numel()
    return max(1, min(_BLOCK_STEPS, _BLOCK_BYTES // batch))


@dataclass(frozen=True)
class Batch:
    """This process's rows of one step.

    Attributes:
        images: float (B, C, H, W) in [0, 1], augmented.
        labels: int64 (B,), or soft (B, K) after mixing.
        whole: rows of the whole batch, over all processes.
        clean: float (M, C, H, W), rows the stage worked on as they were before it; None where nobody asked.
        clean_rows: int64 (M,), their indices in `images`.
        spare: the step had no row for this process; it gets one all the same, which must not count in the loss.
    """

    images: Tensor
    labels: Tensor
    whole: int
    clean: Tensor | None = None
    clean_rows: Tensor | None = None
    spare: bool = False

    def split(self, parts: int) -> list[Batch]:
        """The batch in `parts` pieces of about one size, fewer where there are fewer rows."""
        if parts == 1:
            return [self]
        size = -(-len(self.labels) // parts)
        return [self._piece(start, start + size) for start in range(0, len(self.labels), size)]

    def _piece(self, start: int, stop: int) -> Batch:
        piece = replace(self, images=self.images[start:stop], labels=self.labels[start:stop])
        if self.clean is None:
            return piece
        inside = (self.clean_rows >= start) & (self.clean_rows < stop)
        return replace(piece, clean=self.clean[inside], clean_rows=self.clean_rows[inside] - start)


class Batches:
    """Augmented batches of a run.

    Args:
        data: training images, on the device that trains.
        settings: of the training.
        run: names the generators.
        stage: gives tail classes the nuisance.
        augmentation: plain augmentation of every row, after the stage.
        mix: used instead of the mixing that `settings` names.
        stage_source: what the stage acts on, row for row `data`; None takes `data` itself.
        process, processes: which share of each batch is wanted.
        block_steps: how many steps are prepared at once; None decides by the device.

    Raises:
        SettingsError: settings of the stage without a stage, or a source of another size.
    """

    def __init__(
        self,
        data: ImageData,
        settings: TrainSettings,
        run: Run,
        *,
        stage: TailAugment | None = None,
        augmentation: Nuisance | None = None,
        mix: Mix | None = None,
        stage_source: ImageData | None = None,
        process: int = 0,
        processes: int = 1,
        block_steps: int | None = None,
    ) -> None:
        if stage is None and (settings.worst_of > 1 or settings.consistency):
            name = "worst_of" if settings.worst_of > 1 else "consistency"
            raise SettingsError(f"training.{name} works on what the stage does, and there is no stage; choose one")
        if stage_source is not None and stage_source.images.shape != data.images.shape:
            raise SettingsError(
                f"the stage's source must hold the training images row for row: {tuple(stage_source.images.shape)} "
                f"against {tuple(data.images.shape)}"
            )
        self.data, self.settings, self.run, self.stage, self.augmentation = data, settings, run, stage, augmentation
        self.source = None if stage_source is None else stage_source.to(data.device)
        if mix is None and settings.mixing != "none":
            mix = build_mixing(settings.mixing, counts=data.counts, **settings.mixing_options)
        self.mix = mix
        self.share = slice(process, None, processes)
        self._block: Block | None = None
        self.block_steps = _steps_of_block(data, settings) if block_steps is None else block_steps
        self.rows_of_pass = max(1, _PASS_VALUES // data.images[0].numel())
        self.staged = 0  # rows that the stage worked on, over all processes, until somebody sets it back
        common: dict[str, Any] = {"batch_size": settings.batch_size, "seed": run.seed, "num_epochs": settings.epochs}
        common["num_samples"] = settings.epoch_images or None
        self.rows = ResidentLoader(data, rule=settings.rule(), **common)
        self.balanced = ResidentLoader(data, rule="class_balanced", stream="stage", **common)
        self.foreground = ResidentLoader(data, rule="class_balanced", stream="foreground", **common)
        self.per_epoch = self.rows.steps_per_epoch
        self.labels = data.labels.cpu()  # gates look at labels on the CPU, without waiting for the device
        self.source_labels = self.labels if self.source is None else self.source.labels.cpu()
        if stage is None and settings.stage_bank:
            raise SettingsError("training.stage_bank holds translations that the stage gives, and there is no stage")
        if stage is not None:
            bank: dict[str, Any] = {"versions": settings.stage_bank}
            bank["period"] = settings.stage_bank_epochs * self.per_epoch
            bank["uses"] = self._uses() if settings.stage_bank else None
            stage.enable_cache((self.source or data).images, data.labels, seed=run.seed, **bank)

    def _uses(self) -> Tensor:
        """How often the stage meets each image in an epoch it works in, float64 (N,)."""
        loader = self.balanced if self.settings.stage_source == "balanced" else self.rows
        epochs = [epoch for epoch in range(self.settings.epochs) if self.settings.stage_is_on(epoch)]
        return loader.expected_uses(epochs or [0])

    def at(self, step: int, *, choose: Choose | None = None) -> Batch:
        """This process's augmented rows of `step`; `choose` picks an image where `settings.worst_of` draws several."""
        plan = self._block_of(step).plans[step]
        if self.mix is None:
            return replace(self._augment(step, plan.front, choose), spare=plan.spare)
        batch = self._augment(step, plan.front, choose)
        images, labels = batch.images, batch.labels
        if plan.mixed:
            others: tuple[Tensor, ...] = ()
            if plan.foreground is not None:
                front = self._augment(step, plan.foreground, choose)
                others = (front.images, front.labels)
            generator = torch.Generator().set_state(plan.generator.get_state())  # the step may be asked for again
            images, labels = self.mix(images, labels, *others, generator=generator)
        return replace(batch, images=images[plan.share], labels=labels[plan.share], spare=plan.spare)

    def _block_of(self, step: int) -> Block:
        """The block that `step` lies in, made when its first step is asked for; blocks end with their epoch."""
        if self._block is None or step not in self._block.plans:
            epoch, within = divmod(step, self.per_epoch)
            first = step - within % self.block_steps
            last = min(first + self.block_steps, (epoch + 1) * self.per_epoch)
            self._block = None  # before the next one is made, so that there is memory for one only
            plans, rows_of_pass = {each: self._plan(each) for each in range(first, last)}, self.rows_of_pass
            self._block = Block(plans, self.data.device, rows_of_pass=rows_of_pass)
        return self._block

    # ---- on the CPU

    def _plan(self, step: int) -> StepPlan:
        """All that is random about `step`, drawn in the order in which it always was."""
        rows, generator = self.rows.indices_here(step), self.run.generator("train", step)
        spare = len(rows) <= self.share.start
        share = slice(0, 1) if spare else self.share
        if self.mix is None:
            return StepPlan(self._draw(rows, share, step, generator), share, spare, generator)
        front = self._draw(rows, slice(None), step, generator)
        mixed, foreground = float(torch.rand((), generator=generator)) < self.settings.mixing_probability, None
        if mixed and self.settings.mixing == "cmo":
            foreground = self._draw(self.foreground.indices_here(step), slice(None), step, generator)
        return StepPlan(front, share, spare, generator, mixed, foreground)

    def _draw(self, rows: Tensor, share: slice, step: int, generator: torch.Generator) -> RowsPlan:
        """What the `share` of `rows` meets: draws of the plain augmentation first, then those of the stage."""
        shape, plain = (len(rows), *self.data.images.shape[1:]), None
        if self.augmentation is not None:
            drawn = self.augmentation.sample(shape, generator=generator)
            plain = select_rows(drawn, torch.arange(len(rows))[share])
        labels = self.labels[rows[share]]
        if self.stage is None or not self.settings.stage_is_on(step // self.per_epoch):
            return RowsPlan(len(rows), rows[share], labels, plain)
        balanced = self.settings.stage_source == "balanced"
        source_rows = self.balanced.indices_here(step) if balanced else rows
        gates = self._draw_gates(shape, self.labels[source_rows], generator)
        staged = int(gates[0].rows.sum())
        gates = [gate.share(share) for gate in gates]
        gated = gates[0].rows.nonzero().squeeze(1)
        sources = source_rows[share]
        if balanced or self.source is not None:
            labels = labels.index_copy(0, gated, self.source_labels[sources[gated]])
        return RowsPlan(
            len(rows), rows[share], labels, plain, gated, sources, tuple(gate.draw for gate in gates), staged
        )

    def _draw_gates(self, shape: tuple[int, ...], labels: Tensor, generator: torch.Generator) -> list[Gate]:
        """`worst_of` gates that open for the same rows, each with a draw of its own."""
        first = self.stage.sample(shape, labels, generator=generator, indexed=True)
        nuisance = self.stage.cache or self.stage.nuisance
        size, more = (int(first.rows.sum()), *shape[1:]), range(self.settings.worst_of - 1)
        return [first, *(Gate(first.rows, nuisance.sample(size, generator=generator)) for _ in more)]

    # ---- on the device

    def _augment(self, step: int, plan: RowsPlan, choose: Choose | None) -> Batch:
        """The rows of `plan` after the stage and plain augmentation.

        The stage comes first: a translator was fitted on images as they are stored, and that is what it gets here.
        """
        here = self._block.on_device(plan)
        images, labels = to_float(self.data.images.index_select(0, here.rows)), here.labels

        def plain(images: Tensor) -> Tensor:
            if plan.plain is None:
                return images
            return self.augmentation.apply(images, draw_for(self.augmentation, plan.plain, images))

        if plan.gated is None:
            return Batch(plain(images), labels, whole=plan.whole)
        self.stage.refresh_cache(step)
        self.staged += plan.staged
        candidates = []
        for number in range(len(plan.draws)):
            moved = images
            if len(plan.gated):
                translated = self._translated(plan, number).to(images.dtype)
                # Each candidate is a copy; of one the images, which are new, are written into.
                moved = images if len(plan.draws) == 1 and not self.settings.consistency else images.clone()
                moved.index_copy_(0, here.gated, translated)
            candidates.append(plain(moved))
        chosen = candidates[0]
        if choose is not None and len(candidates) > 1:
            chosen = choose(candidates, labels, here.gated)
        if not self.settings.consistency:
            return Batch(chosen, labels, whole=plan.whole)
        if self.source is not None or self.settings.stage_source == "balanced":
            images = (self.source or self.data).float_images(send(plan.sources, self.data.device))
        return Batch(chosen, labels, whole=plan.whole, clean=plain(images)[here.gated], clean_rows=here.gated)

    def _translated(self, plan: RowsPlan, number: int) -> Tensor:
        """The translations of the gated rows of `plan` under their draw `number`, float (G, C, H, W).

        A bank is another one at each step; of all else the rows of the whole block are translated together.
        """
        images = (self.source or self.data).images
        if isinstance(self.stage.cache, TranslationBank):
            return self.stage.translate(images, plan.sources[plan.gated], plan.draws[number])
        return self._block.translated(plan, number, partial(self.stage.translate, images))
