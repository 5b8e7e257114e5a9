"""Short names for runs: the settings in which they differ, as few as tell them apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

LONGEST = 64
"""Characters of a label."""

_SHORT = {"stage.nuisance": "stage", "transfer.mode": "transfer", "classifier.backbone": "classifier"}
_FIRST = ("stage.nuisance", "stage.translator", "transfer.mode", "classifier.backbone", "classifier.loss",
          "training.epochs", "training.sampling", "training.mixing", "training.head_correction")  # fmt: skip
_GROUPS = ("stage", "transfer", "classifier", "training")
_VALUE = 36


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; an empty mapping has none.

    >>> flat({"stage": {"nuisance": "none", "policy_options": {}}, "augmentation": "none"})
    {'stage.nuisance': 'none', 'augmentation': 'none'}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted keys whose values are not alike in all of `settings`, in order of importance; a missing one is None."""
    keys = list(dict.fromkeys(key for one in settings for key in one))
    return sorted((key for key in keys if len({repr(one.get(key)) for one in settings}) > 1), key=_importance)


def _importance(key: str) -> tuple[int, int]:
    group = key.split(".")[0]
    return (
        _GROUPS.index(group) if group in _GROUPS else len(_GROUPS),
        _FIRST.index(key) if key in _FIRST else len(_FIRST),
    )


def telling(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of `differing` that labels name: of each group of settings as few as tell apart what all of it does.

    `stage.translator` goes where `stage.nuisance` already says it; what `training` changes beside `stage` stays.
    """
    kept: list[str] = []
    keys = differing(settings)
    for group in dict.fromkeys(key.split(".")[0] for key in keys):
        own = [key for key in keys if key.split(".")[0] == group]
        chosen: list[str] = []
        for key in own:
            if _parts(settings, [*chosen, key]) > _parts(settings, chosen):
                chosen.append(key)
        for key in list(chosen[1:]):
            fewer = [other for other in chosen if other != key]
            chosen = fewer if _parts(settings, fewer) == _parts(settings, own) else chosen
        kept += chosen
    return kept


def _parts(settings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    """How many different settings there are as far as `keys` go."""
    return len({tuple(repr(one.get(key)) for key in keys) for one in settings})


def labels_of(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each of several different settings by dotted key; empty texts where they are alike.

    What most of them have, or "none" where no value is in the majority, goes without saying.

    >>> plain, oracle = {"stage.nuisance": "none", "training.lr": 0.1}, {"stage.nuisance": "true", "training.lr": 0.2}
    >>> labels_of([plain, oracle]), labels_of([plain, oracle, {**plain, "training.lr": 0.2}])
    (['lr=0.1', 'stage=oracle, lr=0.2'], ['lr=0.1', 'stage=oracle', 'stage=none'])
    """
    keys = telling(settings)
    if not keys:
        return [""] * len(settings)
    names, columns = _names(keys), {key: [one.get(key) for one in settings] for key in keys}
    usual = {key: _usual(values) for key, values in columns.items()}
    texts = {key: _values(values, key) for key, values in columns.items()}
    found = []
    for place in range(len(settings)):
        said = [key for key in keys if repr(columns[key][place]) != usual[key]] or keys[:1]
        found.append(shortened(", ".join(f"{names[key]}={texts[key][place]}" for key in said), LONGEST))
    return distinct(found)


def _usual(values: Sequence[Any]) -> str | None:
    """The value, by its `repr`, that need not be told; None where each is told."""
    often = Counter(map(repr, values))
    value, count = often.most_common(1)[0]
    return value if 2 * count > len(values) else next((word for word in ("None", "'none'") if word in often), None)


def _names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or all of it where two would be called alike."""
    short = {key: _SHORT.get(key) or key.rsplit(".", 1)[-1] for key in keys}
    often = Counter(short.values())
    return {key: name if often[name] == 1 else key for key, name in short.items()}


def _values(values: Sequence[Any], key: str) -> list[str]:
    """The values of one key as words; of paths as many last parts as tell them apart."""
    words = [_word(value, key) for value in values]
    for last in range(1, 9):
        cut = ["/".join(PurePath(word).parts[-last:]) if "/" in word else word for word in words]
        if len(set(cut)) == len(set(words)):
            break
    return [shortened(word, _VALUE) for word in cut]


def _word(value: Any, key: str) -> str:
    if key == "stage.nuisance":
        return "+".join("oracle" if part.strip() == "true" else part.strip() for part in str(value).split("+"))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(_word(part, "") for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())


def shortened(text: str, limit: int) -> str:
    """`text`, or its beginning and end with "…" between where it is longer than `limit`.

    >>> shortened("translators/redraw-2", 12)
    'trans…draw-2'
    """
    tail = limit // 2
    return text if len(text) <= limit else f"{text[: limit - tail - 1].rstrip()}…{text[-tail:].lstrip()}"


def distinct(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """`names`, those that occurred before (or are `taken`) with a number behind: "a", "a (2)"."""
    used, found = set(taken), []
    for name in names:
        number, chosen = 1, name
        while chosen in used:
            number += 1
            chosen = f"{name} ({number})"
        used.add(chosen)
        found.append(chosen)
    return found


def lines_of(text: str, width: int) -> str:
    """`text` in lines of about `width` characters, broken behind blanks, commas and plus signs."""
    lines = [""]
    for word in re.findall(r"[^+\s]*[+\s]?", text):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)
