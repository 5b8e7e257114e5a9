"""Rounds of draws for invariance: one transformation of each image a round, sums by image, and when to stop.

The standard error of a class's eKLD has two parts: its images differ, and the draws of an image differ,

    SE^2 = (between + within / draws) / images.

More draws lower only the second part. A class is done when SE is as small as wanted, or when the draws' part is at
most `DRAWS_SHARE` of SE^2, so that even endless draws would lower SE by no more than about 5 %. A class that may stop
at a lucky moment is read slightly too low and too precise; `FEWEST` rounds for every class keep that small.

Draws that are dealt out (`dealing`) vary less than independent ones, so `within / draws` says too much about them. What
they do is seen in the halves of an image's rounds, odd and even: were they independent, a quarter of the square of
their difference would be the draws' part, and as one makes up for the other it is less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.augment.cache import CodeCache, as_coded
from gen_invariance.data.images import to_float
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.measure.accuracy import Predict, logits_of, mean_by_class, refuse_nan
from gen_invariance.measure.stratified import Dealer
from gen_invariance.nuisance.protocol import Nuisance, draw_to, select_rows
from gen_invariance.run import named_generator

FEWEST = 4
"""Rounds before a class may stop."""

DRAWS_SHARE = 0.1
"""Of the squared standard error: what is left to gain by more draws when a class stops for that reason."""

_CODE_BYTES = 2**29


class Rounds:
    """Sums by image over rounds of draws, for one or more models that meet the same transformed images.

    Args:
        predicts: images to logits.
        images, labels, nuisance, originals, num_classes, draws, batch_size, generator: see `measure_invariance`.
        spread: deal draws out, so that each image's own are spread; see `dealing`.

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
        originals: Tensor | None,
        num_classes: int | None,
        draws: int,
        batch_size: int,
        generator: torch.Generator | None,
        spread: bool = False,
    ) -> None:
        if draws < 1:
            raise SettingsError(f"measure: draws must be at least 1, got {draws}")
        if labels.shape != images.shape[:1]:
            raise ShapeError(f"measure: {len(images)} images but labels of shape {tuple(labels.shape)}")
        if originals is not None and originals.shape != images.shape:
            raise ShapeError(f"measure: images {tuple(images.shape)} but originals {tuple(originals.shape)}")
        self.predicts, self.nuisance, self.batch_size = predicts, nuisance, batch_size
        self.generator = named_generator(0, "measure") if generator is None else generator
        self.clean = [F.log_softmax(logits_of(predict, images, batch_size=batch_size), dim=1) for predict in predicts]
        self.sources, self.labels = images if originals is None else originals, labels.cpu()
        halves = as_coded(nuisance) if draws > 1 else None
        self.codes = None
        if halves is not None:
            self.codes = CodeCache(halves, self.sources, max_bytes=_CODE_BYTES, block=batch_size)
        self.num_classes = self.clean[0].shape[1] if num_classes is None else num_classes
        _, self.count = mean_by_class(torch.zeros(len(images)), labels, self.num_classes)
        self._dealer = Dealer(len(images), generator=self.generator) if spread else None
        # Divergence, its square, equal answers, and divergence of odd rounds less that of even ones.
        self._sums = torch.zeros(4, len(predicts), len(images), dtype=torch.float64, device=images.device)
        self._rounds = torch.zeros(len(images), dtype=torch.int64)

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
        return torch.zeros(self.num_classes, dtype=torch.int64).scatter(0, self.labels, self._rounds)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` (N,) by class, float64 (K,)."""
        return mean_by_class(values, self.labels, self.num_classes)[0]

    def standard_error(self, values: Tensor) -> Tensor:
        """Of that mean, over images, float64 (K,); NaN for fewer than two images."""
        mean, square = self.mean(values), self.mean(values**2)
        variance = (square - mean**2).clamp(min=0) * self.count / (self.count - 1).clamp(min=0)
        return (variance / self.count).sqrt()

    def run(self, draws: int, *, until: float | None = None) -> None:
        """Up to `draws` rounds; with `until` each class stops when it is done, the others go on."""
        active = torch.arange(len(self.labels))
        for number in range(1, draws + 1):
            self._round(active, sign=1 if number % 2 else -1)
            whole = self._dealer is None or number % 2 == 0  # as many odd rounds as even ones
            if until is not None and number >= FEWEST and whole:
                active = active[~self._done(until)[self.labels[active]]]
                if not len(active):
                    return

    def _done(self, until: float) -> Tensor:
        """Classes that need no more rounds, bool (K,)."""
        done = torch.ones(self.num_classes, dtype=torch.bool)
        for place in range(len(self.predicts)):
            error = self.standard_error(self.divergence[place])
            done &= (error <= until) | (self._of_draws(place) <= DRAWS_SHARE * error**2)
        return done

    def _of_draws(self, place: int) -> Tensor:
        """The draws' part of the squared standard error of each class, float64 (K,)."""
        rounds = self._rounds.to(self._sums.device)
        within = (self._sums[1, place] / rounds - self.divergence[place] ** 2).clamp(min=0) / (rounds - 1)
        part = self.mean(within)
        if self._dealer is not None:
            halves = self.mean((self._sums[3, place] / rounds) ** 2)
            # One difference an image is little to know a variance by; a standard error of it is added.
            part = part.minimum(halves * (1 + (2 / self.count).sqrt()))
        return part / self.count

    def _round(self, active: Tensor, *, sign: int) -> None:
        """One draw for each of the `active` images, int64 (M,)."""
        # Drawn for all, so that what a class meets does not depend on which others have stopped.
        draw = self.nuisance.sample(self.sources.shape, generator=self.generator)
        if self._dealer is not None:
            draw = self._dealer.deal(draw)
        for rows in active.split(self.batch_size):
            here = rows.to(self.sources.device)
            own = select_rows(draw, rows)
            if self.codes is not None:
                moved = self.codes.translate(here, own)
            else:
                chunk = to_float(self.sources.index_select(0, here))
                moved = self.nuisance.apply(chunk, draw_to(own, chunk))
            for place, predict in enumerate(self.predicts):
                answer = F.log_softmax(refuse_nan(predict(moved).float()), dim=1)
                clean = self.clean[place][here]
                divergence = kl_divergence(clean, answer)
                kept = (clean.argmax(1) == answer.argmax(1)).double()
                self._sums[:, place, here] += torch.stack([divergence, divergence**2, kept, sign * divergence])
        self._rounds[active] += 1


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row in nats, float64 (B,), from log-probabilities (B, K); exactly 0 for equal rows.

    A class to which p gives no probability adds nothing, whatever q says.
    """
    log_p, log_q = log_p.double(), log_q.double()
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1).clamp(min=0)
