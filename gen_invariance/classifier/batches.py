"""The rows, draws and gates of each training step, addressed by step, and this process's share of them.

Everything random is drawn for the whole batch from a generator named by (seed, step): a resumed run repeats an
uninterrupted one, and more processes see the same rows with the same draws. Work is shared, randomness is not: each
process augments its own rows only, except under mixing, whose partners may be anyone's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gen_invariance.augment.stage import Gate, TailAugment
from gen_invariance.classifier.mixing import build_mixing
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.data.images import ImageData
from gen_invariance.data.loader import ResidentLoader
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Nuisance, draw_to, select_rows
from gen_invariance.run import Run

Mix = Callable[..., tuple[Tensor, Tensor]]
"""`mix(images, labels, generator=...)` -> images and (soft) labels; applied last, after the stage."""

Choose = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]
"""`choose(candidates, labels, rows)` -> images; see `objective.choose_hardest`."""


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
        self.staged = 0  # rows that the stage worked on, over all processes, until somebody sets it back
        common: dict[str, Any] = {"batch_size": settings.batch_size, "seed": run.seed, "num_epochs": settings.epochs}
        common["num_samples"] = settings.epoch_images or None
        self.rows = ResidentLoader(data, rule=settings.rule(), **common)
        self.balanced = ResidentLoader(data, rule="class_balanced", stream="stage", **common)
        self.foreground = ResidentLoader(data, rule="class_balanced", stream="foreground", **common)
        self.per_epoch = self.rows.steps_per_epoch
        self.labels = data.labels.cpu()  # gates look at labels on the CPU, without waiting for the device
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
        rows, generator = self.rows.indices(step), self.run.generator("train", step)
        spare = len(rows) <= self.share.start
        share = slice(0, 1) if spare else self.share
        if self.mix is None:
            return replace(self._augment(rows, share, step, choose, generator), spare=spare)
        whole = slice(None)
        batch = self._augment(rows, whole, step, choose, generator)
        images, labels = batch.images, batch.labels
        if float(torch.rand((), generator=generator)) < self.settings.mixing_probability:
            others: tuple[Tensor, ...] = ()
            if self.settings.mixing == "cmo":
                front = self._augment(self.foreground.indices(step), whole, step, choose, generator)
                others = (front.images, front.labels)
            images, labels = self.mix(images, labels, *others, generator=generator)
        return replace(batch, images=images[share], labels=labels[share], spare=spare)

    def _augment(
        self, rows: Tensor, share: slice, step: int, choose: Choose | None, generator: torch.Generator
    ) -> Batch:
        """The `share` of `rows` after the stage and plain augmentation.

        The stage comes first: a translator was fitted on images as they are stored, and that is what it gets here.
        """
        images, labels = self._pick(self.data, rows[share])
        shape = (len(rows), *images.shape[1:])
        plain = self._draw_augmentation(shape, share, generator)
        if self.stage is None or not self.settings.stage_is_on(step // self.per_epoch):
            return Batch(plain(images), labels, whole=len(rows))
        self.stage.refresh_cache(step)
        balanced = self.settings.stage_source == "balanced"
        source_rows = self.balanced.indices(step) if balanced else rows
        gates = self._draw_gates(shape, self.labels[source_rows.cpu()], generator)
        self.staged += int(gates[0].rows.sum())
        gates = [gate.share(share) for gate in gates]
        source = None
        if balanced or self.source is not None:
            source = self._pick(self.source or self.data, source_rows[share])
        before = images if source is None else source[0]
        candidates = []
        for gate in gates:
            moved, new_labels = self.stage.apply_gate(images, labels, gate, source=source, indices=source_rows[share])
            candidates.append(plain(moved))
        gated = gates[0].rows.nonzero().squeeze(1).to(images.device)
        images = candidates[0]
        if choose is not None and len(candidates) > 1:
            images = choose(candidates, new_labels, gated)
        if not self.settings.consistency:
            return Batch(images, new_labels, whole=len(rows))
        return Batch(images, new_labels, whole=len(rows), clean=plain(before)[gated], clean_rows=gated)

    def _draw_augmentation(
        self, shape: tuple[int, ...], share: slice, generator: torch.Generator
    ) -> Callable[[Tensor], Tensor]:
        """Draw the plain augmentation of a batch; returns what gives it to the images of `share`."""
        if self.augmentation is None:
            return lambda images: images
        draw = select_rows(self.augmentation.sample(shape, generator=generator), torch.arange(shape[0])[share])
        return lambda images: self.augmentation.apply(images, draw_to(draw, images))

    def _draw_gates(self, shape: tuple[int, ...], labels: Tensor, generator: torch.Generator) -> list[Gate]:
        """`worst_of` gates that open for the same rows, each with a draw of its own."""
        first = self.stage.sample(shape, labels, generator=generator, indexed=True)
        nuisance = self.stage.cache or self.stage.nuisance
        size, more = (int(first.rows.sum()), *shape[1:]), range(self.settings.worst_of - 1)
        return [first, *(Gate(first.rows, nuisance.sample(size, generator=generator)) for _ in more)]

    def _pick(self, data: ImageData, rows: Tensor) -> tuple[Tensor, Tensor]:
        return data.float_images(rows), data.labels[rows]
