"""`Choice`: the ranking of candidates, which of them is used, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gen_invariance.referee.candidates import Candidate
from gen_invariance.referee.race import PairedGain, Table, find_gain, find_reference, rank_candidates

CHOICE_FILE = "choice.json"


@dataclass(frozen=True)
class Ranked:
    """A candidate with what it is expected to gain.

    Attributes:
        name: in words.
        learned: whether it gives a translator.
        accuracy: balanced accuracy on its splits, in points.
        gain: over the best candidate that is not learned.
        gain_over_none: over plain crops; NaN where that is not among the candidates.
        splits: simulated tails it was trained on.
        dropped_after: the split after which it was left behind; None for one that went to the end.
    """

    name: str
    learned: bool
    accuracy: float
    gain: PairedGain
    gain_over_none: PairedGain
    splits: int
    dropped_after: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "learned": self.learned,
            "accuracy": round(self.accuracy, 3),
            "gain": self.gain.to_json(),
            "gain_over_none": self.gain_over_none.to_json(),
            "splits": self.splits,
            "dropped_after": self.dropped_after,
        }


@dataclass(frozen=True)
class Choice:
    """What `choose_augmentation` found.

    Attributes:
        chosen: the candidate to use. A learned one only if its interval over the best of the others lies above 0.
        reason: one sentence on that.
        generic: name of the candidate that is used where nothing learned is, see `race.find_reference`.
        ranking: all candidates that were trained, best first.
        splits: simulated tails that were made.
        left_out: candidates that could not be trained, and why.
        enough: whether more time could not have changed what was asked for: all splits were made.
        seconds: what trainings took, over all processes.
    """

    chosen: Candidate
    reason: str
    generic: str
    ranking: tuple[Ranked, ...]
    splits: int
    left_out: Mapping[str, str] = field(default_factory=dict)
    enough: bool = True
    seconds: float = field(default=0.0, compare=False)

    def gain_of(self, name: str) -> PairedGain:
        """What the candidate of that name gains over the best that is not learned; KeyError for another name."""
        return {each.name: each.gain for each in self.ranking}[name]

    @property
    def best_learned(self) -> Ranked | None:
        """The first learned candidate of the ranking."""
        return next((each for each in self.ranking if each.learned), None)

    def lines(self) -> list[str]:
        """The ranking as text, a line a candidate, and the reason."""
        width = max(len(each.name) for each in self.ranking)
        head = f"{'candidate':<{width}}  accuracy  gain over {self.generic} in points, interval  splits"
        rows = [_format_row(each, width, self.chosen.name) for each in self.ranking]
        left = [f"left out: {name} ({why})" for name, why in self.left_out.items()]
        return [head, *rows, *left, self.reason]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `choice.json`."""
        return {
            "format": 1,
            "chosen": self.chosen.name,
            "candidate": self.chosen.identity(),
            "reason": self.reason,
            "generic": self.generic,
            "ranking": [each.to_json() for each in self.ranking],
            "splits": self.splits,
            "left_out": dict(self.left_out),
            "enough": self.enough,
            "seconds": round(self.seconds, 1),
        }


def _format_row(row: Ranked, width: int, chosen: str) -> str:
    gain = "-" if row.gain.against == row.name else str(row.gain)
    note = "" if row.dropped_after is None else f", dropped after {row.dropped_after}"
    mark = "  <- chosen" if row.name == chosen else ""
    return f"{row.name:<{width}}  {row.accuracy:8.1f}  {gain:<24}  {row.splits}{note}{mark}"


def make_choice(
    table: Table,
    candidates: Sequence[Candidate],
    *,
    level: float,
    dropped: Mapping[str, int],
    left_out: Mapping[str, str],
    enough: bool,
    seconds: float,
) -> Choice:
    """The choice by what was scored: a learned candidate if its interval over the generic one lies above 0.

    The generic one is what would be used instead (`find_reference`), and the learned one is ahead of all that are not.

    Args:
        table: scores of the candidates that were trained.
        candidates: all of them.
        level: of the intervals.
        dropped: candidate -> split after which it was left behind.
        left_out: candidate -> why it was not trained.
        enough: see `Choice`.
        seconds: see `Choice`.
    """
    by_name = {candidate.name: candidate for candidate in candidates if candidate.name in table.figures}
    ranked = rank_candidates(table)
    plain = [name for name in ranked if not by_name[name].learned]
    # One that was dropped early was measured less, so it does not set the mark.
    generic = find_reference(table, [name for name in plain if name not in dropped] or plain)
    rows = [_describe(table, by_name[name], generic, level, dropped.get(name)) for name in ranked]
    ahead = ranked[: ranked.index(plain[0])]
    proven = [row for row in rows if row.learned and row.gain.low > 0 and row.name in ahead]
    chosen = by_name[proven[0].name if proven else generic]
    splits = max(map(len, table.figures.values()))
    return Choice(
        chosen,
        _explain(rows, chosen, generic, splits),
        generic,
        tuple(rows),
        splits,
        left_out=dict(left_out),
        enough=enough,
        seconds=seconds,
    )


def _describe(table: Table, candidate: Candidate, generic: str, level: float, dropped: int | None) -> Ranked:
    name, splits = candidate.name, table.figures[candidate.name]
    none = find_gain(table, name, "none", level=level) if "none" in table.figures else None
    return Ranked(
        name,
        candidate.learned,
        sum(table.balanced(name, split) for split in splits) / len(splits),
        find_gain(table, name, generic, level=level),
        none or PairedGain(math.nan, math.nan, math.nan, "none", 0),
        len(splits),
        dropped,
    )


def _explain(rows: Sequence[Ranked], chosen: Candidate, generic: str, splits: int) -> str:
    tails = f"on {splits} simulated tail{'s' if splits > 1 else ''}"
    row = next(row for row in rows if row.name == chosen.name)
    if chosen.learned:
        return (
            f"{chosen.name} gains {row.gain} points of balanced accuracy over {generic}, {_role(rows, generic)}, "
            f"{tails}, so it is used."
        )
    nearest = next((row for row in rows if row.learned), None)
    if nearest is None:
        return f"{generic} is {_role(rows, generic)} {tails}; no translator was among the candidates."
    return (
        f"No translator gains over {generic}, {_role(rows, generic)}, by more than its interval {tails} "
        f"(nearest: {nearest.name}, {nearest.gain} points), so none is used."
    )


def _role(rows: Sequence[Ranked], generic: str) -> str:
    best = next(row.name for row in rows if not row.learned)
    if best == generic:
        return "the best that is not learned"
    return f"within a standard error of {best}, the best that is not learned"
