"""What `gen-invariance --help` and `gen-invariance VERB --help` print, read off the config files and their comments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
    package = Path(__file__).resolve().parent.parent
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


def sections_of(verb: str) -> list[str]:
    """Names of the verb's own settings that hold further ones, such as "fit" of `fit.steps`."""
    text = (config_folder() / f"{verb}.yaml").read_text(encoding="utf-8")
    return re.findall(r"^(\w+):[ \t]*(?:#.*)?\n(?=  \w)", text, flags=re.MULTILINE)


def verb_help(verb: str, words: Iterable[str] = ()) -> str:
    """What a verb does, its choices and all its settings; those of the groups as chosen in `words` (GROUP=CHOICE)."""
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
    chunks += ["settings:", *_listed(_settings_in(text)), ""]
    for group, default in groups:
        named = next((word.partition("=")[2] for word in words if word.startswith(f"{group}=")), default)
        chosen = named if (folder / group / f"{named}.yaml").is_file() else default
        path = folder / group / f"{chosen}.yaml"
        everywhere = "@package _global_" in path.read_text(encoding="utf-8")  # its settings are those of other groups
        lines = _listed(_group_settings(path), before="" if everywhere else f"{group}.")
        chunks += [f"settings of {group} (here {chosen}):", *lines, ""] if lines else []
    return "\n".join(chunks)


def _group_settings(path: Path) -> dict[str, tuple[str, str]]:
    """Settings of one group file over those it inherits."""
    text = path.read_text(encoding="utf-8")
    inherited = re.search(r"^defaults: \[(\w+), _self_\]$", text, flags=re.MULTILINE)
    base = _group_settings(path.with_name(f"{inherited[1]}.yaml")) if inherited else {}
    return base | _settings_in(text)


def _settings_in(text: str) -> dict[str, tuple[str, str]]:
    """Value and comment of each setting of a config file, by the dotted name a command line uses."""
    import yaml

    found: dict[str, tuple[str, str]] = {}
    parents: list[str] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith(("#", "defaults:", "  - ")):
            continue
        setting, _, comment = line.strip().partition(" #")
        name, _, value = setting.partition(":")
        parents = [*parents[: (len(line) - len(line.lstrip())) // 2], name]
        if value.strip():
            shown = _leaves(".".join(parents), yaml.safe_load(value)) if value.strip().startswith("{") else {}
            found |= {
                key: (text, comment.strip()) for key, text in (shown or {".".join(parents): value.strip()}).items()
            }
    return found


def _leaves(name: str, value: Any) -> dict[str, str]:
    """The settings of a mapping written on one line; options whose names depend on another setting stay together."""
    import yaml

    if isinstance(value, dict) and value and not name.endswith("_options"):
        return {key: text for inner in value for key, text in _leaves(f"{name}.{inner}", value[inner]).items()}
    return {name: yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()}


def _listed(settings: Mapping[str, tuple[str, str]], *, before: str = "") -> list[str]:
    """The settings, one a line, comments in a column."""
    lines = []
    for name, (value, comment) in settings.items():
        shown = f"{before}{name}: {'(must be given)' if value == '???' else value}"
        lines.append(f"  {shown:38}  # {comment}" if comment else f"  {shown}")
    return lines
