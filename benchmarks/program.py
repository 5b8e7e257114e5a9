"""What the programs of benchmarks/, studies/ and tests/stress/ share: KEY=VALUE settings, tables, results by line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gen_invariance.stats import mean_interval, paired_difference


def read_settings(doc: str | None, words: Sequence[str] | None = None, **defaults: Any) -> SimpleNamespace:
    """The KEY=VALUE words of the command line over `defaults`; each is read as the kind of thing its default is.

    A default that is a class must be given; a tuple is a list with commas; None stands for text that may be missing.
    Bad words end the program in one line, `--help` prints `doc`.
    """
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        sys.exit(doc)
    given = dict(word.partition("=")[::2] for word in words)
    unknown = [name for name in given if name not in defaults]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; choose {', '.join(f'{name}=' for name in defaults)}")
    missing = [name for name, default in defaults.items() if isinstance(default, type) and name not in given]
    if missing:
        sys.exit(f"give {', '.join(f'{name}=' for name in missing)}")
    read = {name: _read(given[name], defaults[name], name) for name in given}
    return SimpleNamespace(**{**defaults, **read})


def _read(word: str, default: Any, name: str) -> Any:
    kind = default if isinstance(default, type) else type(default)
    if kind is bool:
        return word.lower() == "true"
    if kind is tuple:
        return tuple(part for part in word.split(",") if part)
    try:
        return word if default is None else kind(word)
    except ValueError:
        sys.exit(f"{name} must be {kind.__name__}, got {word!r}")


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def read_lines(path: Path) -> list[dict]:
    """The JSON lines of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_line(path: Path, row: dict) -> None:
    """Add a JSON line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def format_mean(values: Sequence[float], *, scale: float = 1, digits: int = 1) -> str:
    """Mean and 95 % interval; of one value, that alone."""
    found = mean_interval(scale * np.asarray(values, dtype=float))
    return f"{found.mean:.{digits}f}" + (f" ± {found.half_width:.{digits}f}" if len(values) > 1 else "")


def format_gap(values: Sequence[float], others: Sequence[float], *, scale: float = 1, digits: int = 1) -> str:
    """Mean and 95 % interval of the paired difference; of one pair, its difference alone."""
    found = paired_difference(scale * np.asarray(values, dtype=float), scale * np.asarray(others, dtype=float))
    return f"{found.mean:+.{digits}f}" + (f" ± {found.half_width:.{digits}f}" if len(values) > 1 else "")
