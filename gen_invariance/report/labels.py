"""Short names for runs: the settings in which they differ, as few as tell them apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

LONGEST = 64
"""Characters of a label."""

NOTHING_TRANSLATED = "nothing translated"
"""What is said behind the name of a nuisance that the stage was to give and gave to nobody."""

_SHORT = {"stage.nuisance": "stage", "transfer.mode": "transfer", "classifier.backbone": "classifier"}
_IMPORTANCE = ("stage.nuisance", "stage.translator", "stage", "transfer.mode", "transfer", "classifier.backbone",
               "classifier.loss", "classifier", "training.epochs", "training.sampling", "training.mixing",
               "training.head_correction", "training")  # fmt: skip
"""Keys of settings, and groups of the others, in the order in which labels name them."""
_LONGEST_VALUE = 36


def flatten_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; an empty mapping has none.

    >>> flatten_settings({"stage": {"nuisance": "none", "policy_options": {}}, "augmentation": "none"})
    {'stage.nuisance': 'none', 'augmentation': 'none'}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted keys whose values are not alike in all of `settings`, in order of importance; a missing one is None."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return sorted((key for key in keys if _count_kinds(settings, [key]) > 1), key=_importance)


def _importance(key: str) -> int:
    names = [name for name in (key, key.split(".")[0]) if name in _IMPORTANCE]
    return _IMPORTANCE.index(names[0]) if names else len(_IMPORTANCE)


def telling_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of `differing_keys` that labels name: as few of each group as tell apart what all of it does.

    `stage.translator` goes where `stage.nuisance` already says it; what `training` changes beside `stage` stays.
    """
    groups: dict[str, list[str]] = {}
    for key in differing_keys(settings):
        groups.setdefault(key.split(".")[0], []).append(key)
    kept: list[str] = []
    for keys in groups.values():
        needed: list[str] = []
        for key in keys:
            if _count_kinds(settings, [*needed, key]) > _count_kinds(settings, needed):
                needed.append(key)
        for key in needed[1:]:
            fewer = [other for other in needed if other != key]
            if _count_kinds(settings, fewer) == _count_kinds(settings, keys):
                needed = fewer
        kept += needed
    return kept


def _count_kinds(settings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    """How many different settings there are as far as `keys` go."""
    return len({tuple(repr(one.get(key)) for key in keys) for one in settings})


def make_labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each of several different settings by dotted key; empty texts where they are alike.

    What most of them have, or "none" where no value is in the majority, goes without saying.

    >>> plain, oracle = {"stage.nuisance": "none", "training.lr": 0.1}, {"stage.nuisance": "true", "training.lr": 0.2}
    >>> make_labels([plain, oracle]), make_labels([plain, oracle, {**plain, "training.lr": 0.2}])
    (['lr=0.1', 'stage=oracle, lr=0.2'], ['lr=0.1', 'stage=oracle', 'stage=none'])
    """
    keys = telling_keys(settings)
    if not keys:
        return [""] * len(settings)
    names = _short_names(keys)
    columns = {key: [one.get(key) for one in settings] for key in keys}
    usual = {key: _usual_value(values) for key, values in columns.items()}
    words = {key: _format_values(values, key) for key, values in columns.items()}
    labels = []
    for index in range(len(settings)):
        unusual = [key for key in keys if repr(columns[key][index]) != usual[key]] or keys[:1]
        labels.append(shorten(", ".join(f"{names[key]}={words[key][index]}" for key in unusual), LONGEST))
    return make_distinct(labels)


def _usual_value(values: Sequence[Any]) -> str | None:
    """The value, by its `repr`, that need not be told; None where each is told."""
    often = Counter(map(repr, values))
    value, count = often.most_common(1)[0]
    return value if 2 * count > len(values) else next((word for word in ("None", "'none'") if word in often), None)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or all of it where two would be called alike."""
    short = {key: _SHORT.get(key) or key.rsplit(".", 1)[-1] for key in keys}
    often = Counter(short.values())
    return {key: name if often[name] == 1 else key for key, name in short.items()}


def _format_values(values: Sequence[Any], key: str) -> list[str]:
    """The values of one key as words; of paths as many last parts as tell them apart."""
    words = [_format_value(value, key) for value in values]
    for last in range(1, 9):
        cut = ["/".join(PurePath(word).parts[-last:]) if "/" in word else word for word in words]
        if len(set(cut)) == len(set(words)):
            break
    return [shorten(word, _LONGEST_VALUE) for word in cut]


def _format_value(value: Any, key: str) -> str:
    if key == "stage.nuisance":
        return "+".join("oracle" if part.strip() == "true" else part.strip() for part in str(value).split("+"))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(_format_value(part, "") for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())


def shorten(text: str, limit: int) -> str:
    """`text`, or its beginning and end with "…" between where it is longer than `limit`.

    >>> shorten("translators/redraw-2", 12)
    'trans…draw-2'
    """
    tail = limit // 2
    return text if len(text) <= limit else f"{text[: limit - tail - 1].rstrip()}…{text[-tail:].lstrip()}"


def make_distinct(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """`names`, those that occurred before (or are `taken`) with a number behind: "a", "a (2)"."""
    used, unique = set(taken), []
    for name in names:
        number, numbered = 1, name
        while numbered in used:
            number += 1
            numbered = f"{name} ({number})"
        used.add(numbered)
        unique.append(numbered)
    return unique


def wrap_name(text: str, width: int) -> str:
    """`text` in lines of about `width` characters, broken behind blanks, commas and plus signs."""
    lines = [""]
    for word in re.findall(r"[^+\s]*[+\s]?", text):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)
