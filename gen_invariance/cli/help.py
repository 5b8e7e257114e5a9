"""What `gen-invariance --help` and `gen-invariance VERB --help` print: config headers and descriptions of settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gen_invariance.configs import choice_names, compose_verb, default_choices, read_choice, read_summary
from gen_invariance.settings import MISSING, get_defaults, get_descriptions

_USAGE = """gen-invariance: learn a nuisance where data is plenty, give it to tail classes, measure invariance.

usage: gen-invariance VERB [SETTING=VALUE ...] [--help] [--cfg job]

{verbs}

  gen-invariance VERB --help     what a verb does, and all its settings
  gen-invariance VERB --cfg job  the settings it would run with, and nothing else
  gen-invariance --version

A setting is changed by naming it: seed=1 data=fashion_mnist data.path=FOLDER fit.steps=500 (no dashes, no spaces).
"""


def format_usage(verbs: Iterable[str]) -> str:
    """The page that names all verbs."""
    lines = "\n".join(f"  {verb:9} {read_summary(verb).splitlines()[0]}" for verb in verbs)
    return _USAGE.format(verbs=lines)


def format_verb_help(verb: str, kind: type, words: Sequence[str] = ()) -> str:
    """What a verb does, its choices and all its settings; those of the groups as chosen in `words` (GROUP=CHOICE).

    Args:
        verb: its name.
        kind: its settings class.
        words: KEY=VALUE; values that are no choice of a group are left out.
    """
    groups = default_choices(verb)
    chosen = dict(groups)
    for word in words:
        group, _, choice = word.partition("=")
        if group in groups and choice in choice_names(group):
            chosen[group] = choice
    config = compose_verb(
        verb, [f"{group}={choice}" for group, choice in chosen.items()], get_defaults(kind), missing_is_error=False
    )
    descriptions = get_descriptions(kind)
    own = {name: value for name, value in config.items() if name not in groups}
    sections = [f"gen-invariance {verb}: {read_summary(verb)}\n"]
    if groups:
        sections.append("choices (the first is the default):")
        for group, default in groups.items():
            others = [name for name in choice_names(group) if name != default]
            sections.append(f"  {group}={' | '.join([default, *others])}")
        sections.append("")
    sections += ["settings:", *_format_settings(own, descriptions), ""]
    for group, choice in chosen.items():
        # A choice of a group without settings of its own, such as `method`, sets those of other groups.
        values = {group: config[group]} if group in config else read_choice(group, choice)
        if values:
            about = [f"  # {line.strip()}" for line in read_summary(group, choice).splitlines()]
            sections += [f"settings of {group} (here {choice}):", *about, *_format_settings(values, descriptions), ""]
    return "\n".join(sections)


def _format_settings(values: Mapping[str, Any], descriptions: Mapping[str, str]) -> list[str]:
    """The settings, one a line, descriptions in a column."""
    lines = []
    for name, value in _leaves(values):
        shown = f"{name}: {'(must be given)' if value == MISSING else _format_value(value)}"
        description = " ".join(descriptions.get(name, "").split())
        lines.append(f"  {shown:38}  # {description}" if description else f"  {shown}")
    return lines


def _leaves(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; options by name, which are one setting, stay together."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value and not name.endswith("_options"):
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield before + name, value


def _format_value(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
