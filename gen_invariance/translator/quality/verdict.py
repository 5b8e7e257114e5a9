"""From figures to a word: may a translator be used? The thresholds stand in one table, `RULES`.

A gain in points of accuracy, measured in simulated tails, decides where there is one (`judge_by_gain`); without one the
figures of `assess` decide (`judge_figures`). A translator whose fit found nothing in the images is refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gen_invariance.errors import CheckpointError, RangeError
from gen_invariance.files import read_json, read_regular
from gen_invariance.stats import Estimate

QUALITY_FILE = "quality.json"
"""Where the verdict on a translator lies: beside its folder, or in the run folder that holds it."""

USE, LOWER, DO_NOT = "use", "use with lower strength", "do not use"
STRENGTH = {USE: 1.0, LOWER: 0.5, DO_NOT: 0.0}
"""What `policy=auto` multiplies its probabilities with."""


@dataclass(frozen=True)
class Figure:
    """One figure on a translator.

    Attributes:
        estimate: value and interval over images.
        floor: the same figure of real images left as they are, against other real images; NaN where there is none.
    """

    estimate: Estimate
    floor: float

    def to_json(self) -> dict[str, float | None]:
        """Plain numbers; NaN as null."""
        values = {name: getattr(self.estimate, name) for name in ("value", "low", "high")} | {"untouched": self.floor}
        return {name: nan_to_none(value) for name, value in values.items()}


def nan_to_none(value: float) -> float | None:
    """`value`, or None, which JSON knows, where it is not finite."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Rule:
    """A threshold of the verdict.

    Attributes:
        figure: key of `Quality.figures`.
        fine: at this value or better the rule has nothing against the translator.
        limit: beyond it the translator is not to be used. Where `fine` is the smaller of the two, less is better.
        good, partly, bad: what is said in the three cases.
        against: what the bounds are of: the figure "itself", its "share" of what untouched images get, or its "excess"
            over that.
    """

    figure: str
    fine: float
    limit: float
    good: str
    partly: str
    bad: str
    against: str = "itself"


RULES = (
    Rule(
        "accuracy_kept",
        fine=0.9,
        limit=0.7,
        good="Translated images keep their class",
        partly="Some translated images lose their class",
        bad="Translated images lose their class",
    ),
    Rule(
        "precision",
        fine=0.8,
        limit=0.5,
        good="Translated images look like real ones",
        partly="Some translated images do not look like real ones",
        bad="Translated images do not look like real ones",
        against="share",
    ),
    Rule(
        "coverage",
        fine=0.7,
        limit=0.4,
        good="Translated images cover the variety of real ones",
        partly="Translated images miss part of the variety of real ones",
        bad="Translated images miss most of the variety of real ones",
        against="share",
    ),
    Rule(
        "diversity",
        fine=0.05,
        limit=0.03,
        good="Draws of one image differ",
        partly="Draws of one image differ little, so little is gained",
        bad="Draws of one image hardly differ, so nothing is gained",
    ),
    Rule(
        "near_copies",
        fine=0.05,
        limit=0.2,
        good="Translations are not copies of training images",
        partly="Some translations are copies of training images",
        bad="Translations are copies of training images",
        against="excess",
    ),
    Rule(
        "class_share",
        fine=0.1,
        limit=0.3,
        good="The nuisance acts alike on all classes",
        partly="The nuisance acts somewhat differently on different classes",
        bad="The nuisance acts differently on different classes",
    ),
)
"""The whole of the verdict; see `judge_figures` for how the rules are read."""

LEAST_JUDGE_GAIN = 2.0
"""A judge below this many times chance accuracy cannot tell whether classes are kept."""


@dataclass(frozen=True)
class Gain:
    """What a translator gains in simulated tails of the data it was fitted on, in points of balanced accuracy.

    Attributes:
        points: the mean gain, paired.
        low, high: its 95 % interval.
        against: what it was compared with, such as "trivialaugment@every_row".

    Raises:
        RangeError: a number that is not finite, or ends of the interval the wrong way round.
    """

    points: float
    low: float
    high: float
    against: str

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.points, self.low, self.high))) or self.low > self.high:
            raise RangeError(
                f"gain: {self.points} [{self.low}, {self.high}] is no estimate with an interval; give finite numbers, "
                "low up to high"
            )

    def __str__(self) -> str:
        """As in the sentence of `judge_by_gain`: "+2.1 [+0.8, +3.4]"."""
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


@dataclass(frozen=True)
class Verdict:
    """What to do, and why.

    Attributes:
        word: "use", "use with lower strength" or "do not use".
        reasons: sentences, the decisive ones first.
        gain: what decided, where it was measured; None where figures decided.
    """

    word: str
    reasons: tuple[str, ...]
    gain: Gain | None = None

    @property
    def first_reason(self) -> str:
        """The decisive reason without its full stop, to be quoted within a sentence."""
        return self.reasons[0].rstrip(".") if self.reasons else "no reason is given"

    def lines(self) -> list[str]:
        """As a terminal shows it: a measured gain first, then the word and the reasons."""
        first, rest = (self.reasons[:1], self.reasons[1:]) if self.gain else ((), self.reasons)
        return [*first, self.word, *(f"  {reason}" for reason in rest)]

    @property
    def strength(self) -> float:
        """Factor on the probabilities of `policy=auto`."""
        return STRENGTH[self.word]


def judge_figures(figures: Mapping[str, Figure], *, chance: float, rules: Sequence[Rule] = RULES) -> Verdict:
    """The verdict by `rules`: the worst that any of them says.

    A value beyond `limit` means "do not use" only if its whole interval is; otherwise, and between `fine` and `limit`,
    "use with lower strength". A figure that is not defined cannot speak for the translator: "lower strength" too.
    `chance` is the accuracy of guessing.
    """
    reasons = [_apply(rule, figures[rule.figure]) for rule in rules]
    judge = figures["accuracy"].floor
    if not judge >= LEAST_JUDGE_GAIN * chance:
        reasons.append((LOWER, f"The judge names only {judge:.0%} of real images right, too few to be trusted."))
    reasons.sort(key=lambda reason: STRENGTH[reason[0]])
    return Verdict(reasons[0][0], tuple(text for _, text in reasons))


def judge_by_gain(gain: Gain, reasons: Sequence[str] = ()) -> Verdict:
    """The verdict where the gain was measured: use what gains for certain, and nothing else.

    Args:
        gain: in simulated tails of the data.
        reasons: what figures say beside it, as an explanation.

    >>> judge_by_gain(Gain(2.1, 0.8, 3.4, "trivialaugment")).reasons[0]
    'In simulated tails of these data it gains +2.1 [+0.8, +3.4] balanced points over trivialaugment.'
    >>> judge_by_gain(Gain(0.4, -0.5, 1.3, "trivialaugment")).word
    'do not use'
    """
    sentence = f"In simulated tails of these data it gains {gain} balanced points over {gain.against}."
    if gain.low > 0:
        return Verdict(USE, (sentence, *reasons), gain)
    sentence = f"{sentence[:-1]}: its interval is not above 0." if gain.high > 0 else sentence
    return Verdict(DO_NOT, (sentence, *reasons), gain)


def describe_unidentified(areas: Mapping[str, Sequence[float]]) -> str:
    """A sentence on the parameters that a fit could not decide; "" where it decided all.

    `areas`: by parameter, area under the ROC curve and its interval, see `discern.tell_apart`.
    """
    if not areas:
        return ""
    named = [f"{name} (AUC {value:.2f} [{low:.2f}, {high:.2f}])" for name, (value, low, high) in areas.items()]
    what = "it grew to its limit" if len(named) == 1 else "they grew to their limits"
    return (
        f"Not identified: {', '.join(named)}; {what}, and the images do not show that they hold such changes: a small "
        "network has to fail to tell them (AUC 0.5)."
    )


def refuse_unidentified(verdict: Verdict, problem: str) -> Verdict:
    """`verdict`, or "do not use" where the fit has a `problem`: parameters that the images did not decide."""
    return Verdict(DO_NOT, (problem, *verdict.reasons), verdict.gain) if problem else verdict


def _apply(rule: Rule, figure: Figure) -> tuple[str, str]:
    """What one rule says, and in which words."""
    estimate, floor = figure.estimate, figure.floor
    unit = floor if rule.against == "share" else 1.0
    if not math.isfinite(estimate.value) or not math.isfinite(floor) or not unit > 0:
        return LOWER, f"{rule.figure} is not defined for these images, so it cannot speak for the translator."
    start = floor if rule.against == "excess" else 0.0
    value, low, high = ((each - start) / unit for each in (estimate.value, estimate.low, estimate.high))
    sign = 1.0 if rule.fine >= rule.limit else -1.0
    of = {"itself": "", "share": " of what untouched images get", "excess": " more than untouched images"}[rule.against]
    numbers = (
        f"{rule.figure} {value:.2f} [{low:.2f}, {high:.2f}]{of}; "
        f"fine {'from' if sign > 0 else 'up to'} {rule.fine:g}, not beyond {rule.limit:g}"
    )
    if sign * value >= sign * rule.fine:
        return USE, f"{rule.good} ({numbers})."
    if max(sign * low, sign * high) < sign * rule.limit:
        return DO_NOT, f"{rule.bad} ({numbers})."
    return LOWER, f"{rule.partly} ({numbers})."


def translator_folder(path: Path | str) -> Path:
    """The folder with the translator's config: `path` itself, or `path`/translator if `path` is a run folder."""
    folder = Path(path)
    inside = folder / "translator"
    return inside if not (folder / "config.json").is_file() and (inside / "config.json").is_file() else folder


def weights_digest(path: Path | str) -> str:
    """SHA-256 over the weights of a saved translator; its config may name the folder it came from."""
    digest = hashlib.sha256()
    for file in sorted(translator_folder(path).rglob("*.safetensors")):
        digest.update(read_regular(file))
    return digest.hexdigest()


def read_verdict(translator: Path | str) -> Verdict | None:
    """The verdict that `inspect` left in the translator's folder or the run folder around it; None without one.

    A translator that nobody inspected is refused where its own config names parameters that its fit did not identify.

    Raises:
        CheckpointError: the file is damaged, or speaks of other weights.
    """
    folder = translator_folder(translator)
    path = next((each for each in quality_files(folder) if each.is_file()), None)
    if path is None:
        problem = describe_unidentified(_read_unidentified(folder))
        return Verdict(DO_NOT, (problem,)) if problem else None
    try:
        saved = read_json(path)
        gain = None if saved.get("gain") is None else Gain(**saved["gain"])
        verdict, digest = Verdict(saved["verdict"], tuple(map(str, saved["reasons"])), gain), saved["translator_digest"]
        STRENGTH[verdict.word]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RangeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); run gen-invariance inspect again") from error
    if digest != weights_digest(folder):
        raise CheckpointError(
            f"{path} speaks of other weights than those in {folder}; run gen-invariance inspect again"
        )
    return verdict


def _read_unidentified(folder: Path) -> dict[str, list[float]]:
    """What the config of a saved translator names; nothing where there is none, or it is damaged: loading says that."""
    try:
        named = read_json(folder / "config.json").get("not_identified") or {}
        return {str(name): [float(value), float(low), float(high)] for name, (value, low, high) in named.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def quality_files(folder: Path) -> tuple[Path, ...]:
    """Where a verdict on the translator in `folder` may lie."""
    around = (folder.parent / QUALITY_FILE,) if folder.name == "translator" else ()
    return (folder / QUALITY_FILE, *around)
