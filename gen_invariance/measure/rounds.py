"""Rounds of draws for invariance: each round transforms every image once, sums are kept by image.

The standard error of a class's eKLD has two parts: its images differ, and the draws of an image differ,

    SE^2 = (between + within / draws) / images.

More draws lower only the second part. A class is done when SE is as small as wanted, or when the draws' part is at
most `DRAWS_SHARE` of SE^2, so that even endless draws would lower SE by no more than about 5 %. A class that may stop
at a lucky moment is read slightly too low and too precise; at least `FEWEST` rounds for every class keep that small.

Stratified draws (`stratified`) vary less than independent ones, so `within / draws` is too large for them. Their effect
is measured by the halves of an image's rounds, odd and even. If the halves were independent, a quarter of the square of
their difference would be the draws' part; with stratified draws one half compensates the other, and it is less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.augment.cache import CodeCache, as_coded
from gen_invariance.augment.reference import bring_to
from gen_invariance.data.images import check_pixels, to_float
from gen_invariance.devices import doubled, plain_defaults, send
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.measure.accuracy import check_measured, mean_by_class
from gen_invariance.measure.predict import Predict, fill_device, predict_logits, refuse_broken
from gen_invariance.measure.stratified import StratifiedDraws
from gen_invariance.nuisance.protocol import Draw, Nuisance, draw_for, select_rows
from gen_invariance.run import named_generator

FEWEST = 4
"""Rounds before a class may stop."""

DRAWS_SHARE = 0.1
"""Of the squared standard error: what is left to gain by more draws when a class stops for that reason."""

_CODE_BYTES = 2**29


class Rounds:
    """Sums by image over rounds of draws, for one or more models that see the same transformed images.

    Args:
        predicts: images to logits.
        images, labels, nuisance, originals, num_classes, batch_size: see `measure_invariance`.

    Attributes:
        count: int64 (K,), images of each class, on the CPU.
    """

    def __init__(
        self,
        predicts: Sequence[Predict],
        images: Tensor,
        labels: Tensor,
        nuisance: Nuisance,
        *,
        originals: Tensor | None = None,
        num_classes: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        labels = check_measured(images, labels)
        if originals is not None and originals.shape != images.shape:
            raise ShapeError(f"measure: images {tuple(images.shape)} but originals {tuple(originals.shape)}")
        for given in (images, *(() if originals is None else (originals,))):
            check_pixels(given, where="measure")
        batch_size = fill_device(images) if batch_size is None else batch_size
        self.predicts, self.batch_size = predicts, batch_size
        self.nuisance = bring_to(nuisance, (images if originals is None else originals).device)
        self.clean = [
            F.log_softmax(predict_logits(predict, images, batch_size=batch_size), dim=1) for predict in predicts
        ]
        self.sources, self.labels = images if originals is None else originals, labels
        self.num_classes = self.clean[0].shape[1] if num_classes is None else num_classes
        _, self.count = mean_by_class(torch.zeros(len(images), device="cpu"), labels, self.num_classes)
        self._codes: CodeCache | None = None
        self._stratified: StratifiedDraws | None = None
        # Divergence, its square, equal answers, and divergence of odd rounds less that of even ones.
        self._sums = doubled(torch.zeros(4, len(predicts), len(images), dtype=torch.float32, device=images.device))
        self._rounds = torch.zeros(len(images), dtype=torch.int64, device="cpu")

    @property
    def divergence(self) -> Tensor:
        """Mean divergence of each image, float64 (models, N)."""
        return self._sums[0] / self._rounds.to(self._sums.device)

    @property
    def same(self) -> Tensor:
        """Share of draws that keep the answer, float64 (models, N)."""
        return self._sums[2] / self._rounds.to(self._sums.device)

    @property
    def by_class(self) -> Tensor:
        """Rounds of each class, int64 (K,)."""
        return torch.zeros(self.num_classes, dtype=torch.int64, device="cpu").scatter(0, self.labels, self._rounds)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` (N,) by class, float64 (K,)."""
        return mean_by_class(values, self.labels, self.num_classes)[0]

    def standard_error(self, values: Tensor) -> Tensor:
        """Standard error of that mean, over images, float64 (K,); NaN for fewer than two images."""
        mean, square = self.mean(values), self.mean(values**2)
        variance = (square - mean**2).clamp(min=0) * self.count / (self.count - 1).clamp(min=0)
        return (variance / self.count).sqrt()

    def run(
        self,
        draws: int,
        *,
        standard_error: float | None = None,
        stratified: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Up to `draws` rounds; with `standard_error` each class stops when it is done. Call once."""
        if draws < 1:
            raise SettingsError(f"measure: draws must be at least 1, got {draws}")
        generator = named_generator(0, "measure") if generator is None else generator
        coded = as_coded(self.nuisance) if draws > 1 else None
        if coded is not None:
            with plain_defaults():
                self._codes = CodeCache(coded, self.sources, max_bytes=_CODE_BYTES, block=self.batch_size)
        if stratified:
            self._stratified = StratifiedDraws(len(self.labels), generator=generator)
        active = torch.arange(len(self.labels), device="cpu")
        for number in range(1, draws + 1):
            # Drawn for all, so that what a class meets does not depend on which others have stopped.
            with plain_defaults():
                draw = self.nuisance.sample(self.sources.shape, generator=generator)
            if self._stratified is not None:
                draw = self._stratified.assign(draw)
            sign = 1 if number % 2 else -1
            broken = [self._add(rows, select_rows(draw, rows), sign=sign) for rows in active.split(self.batch_size)]
            refuse_broken(torch.cat(broken))  # once a round: asked at each batch, a GPU would be waited for
            self._rounds[active] += 1
            halves_are_equal = not stratified or number % 2 == 0
            if standard_error is not None and number >= FEWEST and halves_are_equal:
                active = active[~self._done(standard_error)[self.labels[active]]]
                if not len(active):
                    return

    def _add(self, rows: Tensor, draw: Draw, *, sign: int) -> Tensor:
        """Add a round's divergences of images `rows`, int64 (M,), under their `draw`; which answers are NaN, (M,)."""
        here, broken = send(rows, self.sources.device), []
        with plain_defaults():  # the models make their tensors where the caller wants them
            if self._codes is not None:
                moved = self._codes.translate(rows, draw)
            else:
                chunk = to_float(self.sources.index_select(0, here))
                moved = self.nuisance.apply(chunk, draw_for(self.nuisance, draw, chunk))
        for model, predict in enumerate(self.predicts):
            logits = predict(moved).float()
            broken.append(logits.isnan().any(1))
            answer = F.log_softmax(logits, dim=1)
            clean = self.clean[model][here]
            divergence = kl_divergence(clean, answer)
            same = (clean.argmax(1) == answer.argmax(1)).to(divergence)
            place = here.to(self._sums.device)
            self._sums[:, model, place] += torch.stack([divergence, divergence**2, same, sign * divergence])
        return torch.stack(broken).any(0)

    def _done(self, standard_error: float) -> Tensor:
        """Classes that need no more rounds, bool (K,)."""
        done = torch.ones(self.num_classes, dtype=torch.bool, device="cpu")
        for model in range(len(self.predicts)):
            error = self.standard_error(self.divergence[model])
            done &= (error <= standard_error) | (self._draws_part(model) <= DRAWS_SHARE * error**2)
        return done

    def _draws_part(self, model: int) -> Tensor:
        """The draws' part of the squared standard error of each class, float64 (K,)."""
        rounds = self._rounds.to(self._sums.device)
        within = (self._sums[1, model] / rounds - self.divergence[model] ** 2).clamp(min=0) / (rounds - 1)
        part = self.mean(within)
        if self._stratified is not None:
            halves = self.mean((self._sums[3, model] / rounds) ** 2)
            # One difference an image says little of a variance; a standard error of it is added.
            part = part.minimum(halves * (1 + (2 / self.count).sqrt()))
        return part / self.count


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row in nats, float64 (B,), from log-probabilities (B, K); exactly 0 for equal rows.

    A class to which p gives no probability adds nothing, whatever q says.
    """
    log_p, log_q = doubled(log_p), doubled(log_q)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1).clamp(min=0)
