"""Candidates: what a person could do about a tail, in words.

`none`, `trivialaugment@every_row`, `redraw@everywhere`, `redraw:tone.colour:0.5@tail:0.7+trivialaugment@every_row`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gen_invariance import configs
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.translator.quality.verdict import translator_folder, weights_digest
from gen_invariance.translator.redraw.tone import KINDS as REDRAW_KINDS
from gen_invariance.translator.registry import KINDS, find_kind

EVERY_ROW = "every_row"
"""`WORD@every_row` augments every row of every batch, after the stage."""

POLICIES: Mapping[str, tuple[str, str]] = {
    "everywhere": ("everywhere", "probability"),
    "tail": ("auto", "maximum"),
    "head": ("head", "probability"),
}
"""Where the stage acts, as words say it: a policy of `augment.policy`, and the option that holds the probability."""

PROBABILITY = 0.7
"""Of the stage, unless the words say otherwise."""


@dataclass(frozen=True)
class Translator:
    """A translator that is fitted where it is judged, or one that is fitted already.

    Attributes:
        kind: as in configs, such as "redraw"; of one that is fitted already, "".
        network: settings of the translator.
        objective: settings of what it learns from.
        folder: of one that is fitted already.
    """

    kind: str = ""
    network: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None

    def identity(self) -> dict[str, Any]:
        """What decides the result: of a folder its weights, not where it lies."""
        if self.folder is not None:
            return {"weights": weights_digest(self.folder)}
        return {"kind": self.kind, "network": dict(self.network), "objective": dict(self.objective)}


Part = str | Translator | Nuisance


@dataclass(frozen=True)
class Candidate:
    """What a training does to its images beside plain crops.

    Attributes:
        name: in words.
        stage: what the stage gives, in order: translators, names of `nuisance.build`, or nuisances of one's own.
        policy: where the stage acts, a policy of `augment.policy`.
        policy_options: of that policy.
        every_row: what every row of every batch gets after the stage: names, or nuisances of one's own.

    Example:
        >>> from gen_invariance import Candidate, Rotation
        >>> Candidate("turned", stage=(Rotation(30),)).learned
        False
    """

    name: str
    stage: tuple[Part, ...] = ()
    policy: str = "everywhere"
    policy_options: Mapping[str, Any] = field(default_factory=lambda: {"probability": PROBABILITY})
    every_row: tuple[str | Nuisance, ...] = ()

    @property
    def translators(self) -> tuple[Translator, ...]:
        """Those that the stage gives."""
        return tuple(part for part in self.stage if isinstance(part, Translator))

    @property
    def learned(self) -> bool:
        """Whether it gives a translator."""
        return bool(self.translators)

    def identity(self) -> dict[str, Any]:
        """What decides its figures, JSON-able; a nuisance of one's own is known by its description alone."""
        return {
            "name": self.name,
            "stage": [_describe(part) for part in self.stage],
            "policy": [self.policy, dict(self.policy_options)] if self.stage else None,
            "every_row": [_describe(part) for part in self.every_row],
        }


def _describe(part: Part) -> Any:
    if isinstance(part, Translator):
        return part.identity()
    if isinstance(part, str):
        return part
    text = repr(part)
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # an address would be another one in the next process


def read_candidate(words: str) -> Candidate:
    """The candidate that `words` describe: WORD@WHERE+WORD@every_row+..., or `none`.

    A WORD is a name of `nuisance.build`, a translator of `configs/translator` or the folder of a fitted one (with a
    slash in it). A translator by name may have a kind, parts and a strength: `redraw:photo`, `redraw:tone.colour`,
    `redraw:0.5`. WHERE is `everywhere`, `tail`, `head` or `every_row`, and may have a probability: `redraw@tail:0.5`.

    Raises:
        SettingsError: a word that is none of these.

    >>> read_candidate("redraw:0.5@tail+trivialaugment@every_row").policy
    'auto'
    """
    stage: list[Part] = []
    every_row: list[str | Nuisance] = []
    places = set()
    for word in words.split("+"):
        what, _, where = word.strip().partition("@")
        if what == "none" and not where:
            continue
        if where == EVERY_ROW:
            every_row.append(_check_nuisance(what, words))
            continue
        places.add(where or "everywhere")
        stage.append(_read_translator(what, words) or _check_nuisance(what, words))
    if len(places) > 1:
        raise SettingsError(f"candidate {words!r}: the stage acts in one place, not in {' and '.join(sorted(places))}")
    policy, options = _read_place(next(iter(places), "everywhere"), words)
    return Candidate(words, tuple(stage), policy, options, tuple(every_row))


def _read_place(place: str, words: str) -> tuple[str, dict[str, float]]:
    where, _, share = place.partition(":")
    try:
        policy, option = POLICIES[where]
        probability = float(share) if share else PROBABILITY
    except (KeyError, ValueError):
        probability = -1.0
    if not 0 <= probability <= 1:
        raise SettingsError(
            f"candidate {words!r}: nothing can be given to {place!r}; choose {', '.join((*POLICIES, EVERY_ROW))}, with "
            "a probability if you like, such as tail:0.5"
        )
    return policy, {option: probability}


def _read_translator(word: str, words: str) -> Translator | None:
    """The translator that a word names; None where it names none."""
    if "/" in word:
        weights_digest(word)
        folder = translator_folder(word)
        if not (folder / "config.json").is_file():
            raise SettingsError(f"candidate {words!r}: no translator in {word}; give a folder that fit wrote")
        return Translator(folder=str(folder))
    name, *options = word.split(":")
    if name not in (*KINDS, *configs.choice_names("translator")):
        return None
    chosen = configs.read_choice("translator", name) if name in configs.choice_names("translator") else {}
    network = dict(chosen.get("network") or {})
    for option in options:
        if re.fullmatch(r"\d*\.?\d+", option):
            network["strength"] = float(option)
        elif option in REDRAW_KINDS:
            network["kind"] = option
        else:
            network["parts"] = tuple(option.split("."))
    kind = chosen.get("name", name)
    find_kind(kind)
    return Translator(kind, network, dict(chosen.get("objective") or {}))


def _check_nuisance(word: str, words: str) -> str:
    try:
        build_nuisance(word)
    except SettingsError as error:
        raise SettingsError(
            f"candidate {words!r}: {error}; or a translator, by folder or by name: "
            f"{', '.join(name for name in configs.choice_names('translator') if name != 'auto')}"
        ) from error
    return word


GENERIC = ("none", f"trivialaugment@{EVERY_ROW}", f"randaugment@{EVERY_ROW}")
"""What nobody has to learn."""

_AND_GENERIC = f"+trivialaugment@{EVERY_ROW}"
FIGURES = (
    "redraw@everywhere",
    "redraw@tail",
    f"redraw@everywhere{_AND_GENERIC}",
    f"redraw@tail{_AND_GENERIC}",
    f"redraw:0.5@everywhere{_AND_GENERIC}",
)
PHOTOS = (
    "redraw@everywhere",
    f"redraw@everywhere{_AND_GENERIC}",
    f"redraw@tail{_AND_GENERIC}",
    f"redraw:colour@everywhere:0.3{_AND_GENERIC}",
)


def default_candidates(kind: str) -> tuple[Candidate, ...]:
    """The candidates for images of a `kind`, "figure" or "photo": generic ones first."""
    return tuple(map(read_candidate, (*GENERIC, *(PHOTOS if kind == "photo" else FIGURES))))


def read_candidates(given: Sequence[str | Candidate]) -> tuple[Candidate, ...]:
    """The candidates of a list of words or candidates, `none` and names that came before left out of doubles.

    Raises:
        SettingsError: a word that is no candidate, two candidates of one name, or fewer than two.
    """
    candidates = tuple(read_candidate(each) if isinstance(each, str) else each for each in given)
    names = [candidate.name for candidate in candidates]
    double = [name for name in names if names.count(name) > 1]
    if double:
        raise SettingsError(f"choose.candidates names {double[0]!r} twice; give each candidate a name of its own")
    if all(candidate.learned for candidate in candidates):  # a learned one is measured against a generic one
        candidates = (read_candidate("none"), *candidates)
    if len(candidates) < 2:
        raise SettingsError(f"choose.candidates must name two candidates or more, got {list(names)}")
    return candidates
