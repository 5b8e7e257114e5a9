"""What `gen-invariance --help` and `gen-invariance VERB --help` print, read off the config files and their comments."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_USAGE = """gen-invariance: learn a nuisance where data is plenty, give it to tail classes, measure invariance.

usage: gen-invariance VERB [SETTING=VALUE ...] [--help] [--cfg job]

{verbs}

  gen-invariance VERB --help     what a verb does, and all its settings
  gen-invariance VERB --cfg job  the settings it would run with, and nothing else
  gen-invariance --version

A setting is changed by naming it: seed=1 data=fashion_mnist data.path=FOLDER fit.steps=500 (no dashes, no spaces).
"""


def config_folder() -> Path:
    """configs/ inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def usage(verbs: Iterable[str]) -> str:
    """The page that names all verbs."""
    lines = "\n".join(f"  {verb:9} {_header(verb).splitlines()[0]}" for verb in verbs)
    return _USAGE.format(verbs=lines)


def _header(verb: str) -> str:
    """The leading comment of the verb's config, without the signs."""
    lines = (config_folder() / f"{verb}.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("# ").removeprefix("#") for line in lines if line.startswith("#"))


def groups_of(verb: str) -> list[tuple[str, str]]:
    """The verb's groups of settings, each with its default choice."""
    text = (config_folder() / f"{verb}.yaml").read_text(encoding="utf-8")
    return re.findall(r"^  - (\w+): (\w+)$", text, flags=re.MULTILINE)


def verb_help(verb: str) -> str:
    """What a verb does, its choices and all its settings."""
    folder = config_folder()
    text = (folder / f"{verb}.yaml").read_text(encoding="utf-8")
    groups = groups_of(verb)
    chunks = [f"gen-invariance {verb}: {_header(verb)}\n"]
    if groups:
        chunks.append("choices (the first is the default):")
        for group, default in groups:
            names = sorted(path.stem for path in (folder / group).glob("*.yaml"))
            chunks.append(f"  {group}={' | '.join([default, *(name for name in names if name != default)])}")
        chunks.append("")
    body = [line for line in text.splitlines() if not line.startswith(("#", "defaults:", "  - "))]
    chunks += ["settings:", *(f"  {line}" for line in body), ""]
    for group, default in groups:
        chunks += [f"settings of {group} (here {default}):", *_group_lines(folder / group / f"{default}.yaml"), ""]
    return "\n".join(chunks)


def _group_lines(path: Path) -> list[str]:
    """The settings of one group file, those it inherits first."""
    text = path.read_text(encoding="utf-8")
    inherited = re.search(r"^defaults: \[(\w+), _self_\]$", text, flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "defaults:"))]
    own = [f"  {path.parent.name}.{line}" if not line.startswith(" ") else f"  {line}" for line in lines]
    if inherited is None:
        return own
    names = {line.split(":")[0] for line in own}
    base = [line for line in _group_lines(path.with_name(f"{inherited[1]}.yaml")) if line.split(":")[0] not in names]
    return base + own
