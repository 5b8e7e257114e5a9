"""Monitor a translator while it is fitted: is it any good yet, has it collapsed, is the time up?

A fifth of the images of each class is held out from the fit. Every so many steps `assess` translates them, the figures
are logged, the two ways in which an adversarial fit goes wrong are named (draws of one image no longer differ;
translated images lose their class), and the weights of the best evaluation are kept. The judge comes from outside:
whoever fits trains it once and hands it in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from gen_invariance.data.grouping import hold_groups
from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError, SettingsError
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import Run, named_generator
from gen_invariance.translator.quality.assess import Judge, Memory, assess
from gen_invariance.translator.quality.verdict import RULES
from gen_invariance.translator.samples import find_class_members
from gen_invariance.translator.settings import AssessSettings, FitSettings, parse_seconds

Evaluate = Callable[[Nuisance, int], Mapping[str, float]]
"""Gives figures of the translator after a step, by name, among them those of `compute_score`."""

HELD_OUT = 5
"""One in so many images of each class is held out."""

_RULES = {rule.figure: rule for rule in RULES}
_SETTINGS = AssessSettings(failures=0)
_RECOVERED = 1.1  # a collapse is over above this many times its limit


@dataclass(frozen=True)
class Collapse:
    """A way in which a fit goes wrong: `figure` below `limit`."""

    name: str
    figure: str
    limit: float
    meaning: str


COLLAPSES = (
    Collapse("mode collapse", "diversity", _RULES["diversity"].limit, "draws of one image hardly differ"),
    Collapse("identity collapse", "accuracy_kept", _RULES["accuracy_kept"].limit, "translated images lose their class"),
)


def compute_score(figures: Mapping[str, float]) -> float:
    """One number in [0, 1] for finding the best weights: 0 for an identity or a lost class, about 1 for the nuisance.

    The harmonic mean of `accuracy_kept`, `precision`, `coverage` (as shares of what untouched images get) and
    `diversity` over 0.05, each cut at 1: what is good in three ways does not make up for a failure in the fourth.
    """
    parts = [figures["accuracy_kept"], figures["precision"], figures["coverage"]]
    parts.append(figures["diversity"] / _RULES["diversity"].fine)
    if not all(part > 0 for part in parts):  # NaN, too
        return 0.0
    return len(parts) / sum(1 / min(part, 1.0) for part in parts)


def split_members(
    members: list[Tensor], *, seed: int, groups: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """(rows to fit on, rows held out) of each class; a class of fewer than `HELD_OUT` images keeps them all.

    With `groups`, int64 (N,) for all rows of the set, whole groups are held out, see `grouping.hold_groups`.
    """
    counts = torch.tensor([len(rows) for rows in members])
    if groups is None:
        masks = []
        for index, rows in enumerate(members):
            mask = torch.zeros(len(rows), dtype=torch.bool)
            shuffled = torch.randperm(len(rows), generator=named_generator(seed, "held out", index))
            mask[shuffled[: len(rows) // HELD_OUT]] = True
            masks.append(mask)
    else:
        labels, rows = torch.arange(len(members)).repeat_interleave(counts), torch.cat(members).cpu()
        masks = hold_groups(
            labels,
            groups.cpu()[rows],
            wanted=counts // HELD_OUT,
            generator=named_generator(seed, "held out", "groups"),
        ).split(counts.tolist())
    fitted = [rows[~mask.to(rows.device)] for rows, mask in zip(members, masks, strict=True)]
    held_out = [rows[mask.to(rows.device)] for rows, mask in zip(members, masks, strict=True)]
    return fitted, held_out


def split_for_judge(data: ImageData, settings: FitSettings, *, seed: int) -> tuple[ImageData, ImageData]:
    """(what the judge learns from, what it judges): the fitted and the held-out images of the chosen classes.

    `data` is the training set, `settings` and `seed` are those of the fit.

    Raises:
        DataError: fewer than two classes, or too few images held out.
    """
    members = find_class_members(data, settings)
    parts = split_members(members, seed=seed, groups=data.groups)
    held_out, least = sum(map(len, parts[1])), 4 * _SETTINGS.neighbours
    if len(members) < 2 or held_out < least:
        raise DataError(
            f"{data.name}: monitoring a fit needs two classes and {least} held-out images, got {len(members)} and "
            f"{held_out}; choose more classes, or set fit.watch_every=0"
        )
    classes = [int(data.labels[rows[0]]) for rows in members]
    learned, judged = (data.subset(torch.cat(part)).select_classes(classes) for part in parts)
    return learned, judged


def make_evaluator(seen: ImageData, held_out: ImageData, *, judge: Judge, seed: int, most: int = 400) -> Evaluate:
    """Evaluation by `assess`: precision and coverage as shares of what untouched images get.

    Args:
        seen: what the judge was trained on, see `split_for_judge`.
        held_out: the images to translate.
        judge: see `assess`.
        seed: of the draws, which are the same every time, so that evaluations differ by the translator alone.
        most: most images that are translated, and a fifth of those that copies are looked for in.
    """

    def some(data: ImageData, name: str, count: int) -> ImageData:
        rows = torch.randperm(len(data), generator=named_generator(seed, "watch", name))[:count].sort().values
        return data.subset(rows)

    images = some(held_out, "images", most)
    memory = Memory(some(seen, "bank", 5 * most).float_images())

    def evaluate(nuisance: Nuisance, step: int) -> dict[str, float]:
        generator = named_generator(seed, "watch", "assess")
        quality = assess(nuisance, images, judge=judge, memory=memory, generator=generator, settings=_SETTINGS)
        figures = {name: figure.estimate.value for name, figure in quality.figures.items()}
        for name in ("precision", "coverage"):
            figures[name] /= quality.figures[name].floor or math.nan
        return figures

    return evaluate


class QualityMonitor:
    """What stops a fit before its last step, and which weights of it are kept.

    Attributes:
        best: weights of the evaluation with the highest score, on the CPU; None before the first one.
        best_step: after which step that was.
    """

    def __init__(
        self,
        settings: FitSettings,
        evaluate: Evaluate | None,
        *,
        run: Run,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        if settings.watch_every and evaluate is None:
            raise SettingsError(
                "fit.watch_every needs a judge, which only the verb fit trains; set it to 0, or give `evaluate`"
            )
        self.settings, self.run, self.accelerator = settings, run, accelerator
        self._evaluate, self._say = evaluate, say
        self.best: dict[str, Tensor] | None = None
        self.best_step, self._best_score, self._stale = 0, -math.inf, 0
        self._collapsed = dict.fromkeys((each.name for each in COLLAPSES), False)
        self._limit = math.inf if settings.budget is None else parse_seconds(settings.budget)
        self._used, self._since = 0.0, time.monotonic()

    def fitted(self, members: list[Tensor], groups: Tensor | None) -> list[Tensor]:
        """The part of `members` that is fitted on: all of it, unless some is held out for evaluation.

        `groups`, of all rows of the set where they are known, are held out whole.
        """
        if not self.settings.watch_every:
            return members
        return split_members(members, seed=self.run.seed, groups=groups)[0]

    def state(self) -> dict[str, Any]:
        """For a checkpoint; empty unless there is a budget, or the quality is monitored."""
        state: dict[str, Any] = {}
        if self.settings.budget is not None:
            state["seconds"] = self._seconds()
        if self.settings.watch_every:
            state["watch"] = {
                "best": self.best or {},
                "best_step": self.best_step,
                "best_score": self._best_score,
                "stale": self._stale,
                "collapsed": self._collapsed,
            }
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` put into a checkpoint, of a monitored fit where this one is; else `KeyError`."""
        self._used, self._since = float(state.get("seconds", 0.0)), time.monotonic()
        if self.settings.watch_every:
            saved = state["watch"]
            self.best = saved["best"] or None
            self.best_step, self._best_score = int(saved["best_step"]), float(saved["best_score"])
            self._stale, self._collapsed = int(saved["stale"]), dict(saved["collapsed"])

    def out_of_time(self, step: int) -> bool:
        """Whether the budget is used up; says so."""
        if self._limit == math.inf or not self._agreed(self._seconds() >= self._limit):
            return False
        self._log(step, f"stopped, fit.budget={self.settings.budget} is used up")
        return True

    def out_of_patience(self, step: int) -> bool:
        """Whether there were `patience` evaluations without a better score; says so."""
        patience = self.settings.patience
        if not patience or not self._agreed(self._stale >= patience):
            return False
        self._log(step, f"stopped, no better score in {self._stale} evaluations since step {self.best_step}")
        return True

    def evaluate(self, translator: nn.Module, step: int) -> None:
        """Log the figures, name a collapse, keep the weights if they are the best so far."""
        figures = dict(self._evaluate(translator, step))
        score = compute_score(figures)
        if self.accelerator.is_main_process:
            named = {f"quality_{name}": value for name, value in figures.items()}
            self.run.log(step=step, quality_score=score, **named)
        for collapse in COLLAPSES:
            self._log_collapse(collapse, figures[collapse.figure], step)
        if score > self._best_score:
            self.best = {name: value.detach().cpu().clone() for name, value in translator.state_dict().items()}
            self.best_step, self._best_score, self._stale = step, score, 0
        else:
            self._stale += 1

    def _log_collapse(self, collapse: Collapse, value: float, step: int) -> None:
        """Log when a collapse begins and when it is over, and nothing in between."""
        was = self._collapsed[collapse.name]
        now = not value >= collapse.limit * (_RECOVERED if was else 1.0)  # NaN is a collapse
        self._collapsed[collapse.name] = now
        if now and not was:
            bound = f"{collapse.figure} {value:.3g}, below {collapse.limit:g}"
            self._log(step, f"{collapse.name}: {collapse.meaning} ({bound})")
        if was and not now:
            self._log(step, f"no {collapse.name} any more ({collapse.figure} {value:.3g})")

    def _seconds(self) -> float:
        return self._used + time.monotonic() - self._since

    def _log(self, step: int, text: str) -> None:
        if self.accelerator.is_main_process:
            self.run.log(step=step, note=text)
            self._say(f"step {step}: {text}")

    def _agreed(self, stop: bool) -> bool:
        """What the first process thinks: all have to stop after the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        return bool(broadcast(torch.tensor([float(stop)], device=self.accelerator.device)))
