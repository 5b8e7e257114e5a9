"""The one reader of `configs/`: files over those they inherit from, composed by Hydra. The only importer of Hydra.

Files hold what differs from the defaults of the settings classes; `merge_defaults` puts these below.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gen_invariance.errors import SettingsError
from gen_invariance.settings import MISSING, TextKind


def config_folder() -> Path:
    """configs/ inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def group_names() -> tuple[str, ...]:
    """The groups of settings: folders of `configs/`."""
    return tuple(sorted(path.name for path in config_folder().iterdir() if path.is_dir()))


def choice_names(group: str, *, folder: Path | str | None = None) -> tuple[str, ...]:
    """The choices of a group, sorted; files that only others inherit from (`_base.yaml`) are left out."""
    files = sorted((Path(folder or config_folder()) / group).glob("*.yaml"))
    return tuple(path.stem for path in files if not path.stem.startswith("_"))


def read_choice(group: str, name: str, *, folder: Path | str | None = None) -> dict[str, Any]:
    """Settings of one choice of a group, over those it inherits.

    Args:
        group: a folder of `configs/`, such as "translator".
        name: a choice of it.
        folder: another folder than `configs/`.

    Raises:
        SettingsError: no such choice, or a file that cannot be read.
    """
    folder = Path(folder or config_folder())
    known = choice_names(group, folder=folder)
    if name not in known:
        raise SettingsError(f"no {group} {name!r}; choose {', '.join(known)}")
    changed = tuple(path.stat().st_mtime_ns for path in sorted((folder / group).glob("*.yaml")))
    return copy.deepcopy(_read_choice(folder, group, name, changed))


@functools.lru_cache(maxsize=512)
def _read_choice(folder: Path, group: str, name: str, changed: tuple[int, ...]) -> dict[str, Any]:
    """The same, kept until a file of the group was `changed`."""
    values = _compose(folder, f"{group}/{name}", [])
    return values.get(group, values)


def read_summary(*parts: str, folder: Path | str | None = None) -> str:
    """The leading comment of a config file, lines kept, without its signs; `parts` are its path below `configs/`."""
    path = Path(folder or config_folder(), *parts[:-1], f"{parts[-1]}.yaml")
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line[1:].removeprefix(" ") for line in lines if not line.startswith("# @package"))


def default_choices(verb: str) -> dict[str, str]:
    """The groups that a verb's file lists, each with its default choice."""
    from omegaconf import OmegaConf

    listed: Any = OmegaConf.load(config_folder() / f"{verb}.yaml").get("defaults", [])
    return {group: choice for entry in listed if entry != "_self_" for group, choice in entry.items()}


def compose_verb(
    verb: str,
    words: Sequence[str],
    defaults: Mapping[str, Any],
    *,
    texts: Mapping[str, TextKind] = MappingProxyType({}),
    missing_is_error: bool = True,
) -> dict[str, Any]:
    """The settings of a verb as plain values: defaults, under its files, under what `words` say.

    Args:
        verb: a file of `configs/`.
        words: KEY=VALUE in Hydra's grammar; GROUP=CHOICE picks a file of a group.
        defaults: of the verb's settings, nested; `settings.MISSING` where there is none.
        texts: settings that take text, which is taken as it is typed: the grammar knows no letters but ASCII.
        missing_is_error: whether settings that are still missing are an error.

    Raises:
        SettingsError: a misspelt key or choice, a value that cannot be read, or a missing one.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = default_choices(verb)
    choices, changes, typed = [], [], {}
    for key, value, is_literal in _parse(words, texts):
        typed.pop(key, None)
        if is_literal:  # set at the end: OmegaConf would look for ${...} in it
            typed[key] = value
        elif key in groups and not isinstance(value, Mapping):
            if value not in choice_names(key):
                raise SettingsError(f"{key} has no choice {value!r}; choose one of {', '.join(choice_names(key))}")
            choices.append(f"{key}={value}")
        else:
            changes.append((key, value))
    try:
        config = OmegaConf.merge(OmegaConf.create(dict(defaults)), _compose(config_folder(), verb, choices))
        for key, value in changes:
            OmegaConf.update(config, key, value, merge=True)
        composed: Any = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"cannot read the settings: {reason}; write KEY=VALUE, lists as [a,b]") from error
    for key, value in typed.items():
        *parents, name = key.split(".")
        functools.reduce(_go_into, parents, composed)[name] = value
    missing = next(_missing(composed), None) if missing_is_error else None
    if missing is not None:
        raise SettingsError(f"{verb} needs {missing}=...; see gen-invariance {verb} --help")
    return composed


def _go_into(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The mapping called `name` in `values`, made where there is none."""
    if not isinstance(values.get(name), dict):
        values[name] = {}
    return values[name]


def _parse(words: Sequence[str], texts: Mapping[str, TextKind]) -> Iterator[tuple[str, Any, bool]]:
    """Key and value of each KEY=VALUE, and whether the value is as it was typed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for word in words:
        key, equals, typed = word.partition("=")
        key = key.lstrip("+")
        text = texts.get(key) if equals else None
        if text is not None and text.is_only and not _has_own_meaning(typed, text):
            yield key, typed, True
            continue
        try:
            (override,) = OverridesParser.create().parse_overrides([word])
            value = override.value()
            is_readable = not override.is_sweep_override()  # a, b
        except (HydraException, ValueError):
            is_readable = False
        if is_readable and override.is_delete():
            raise SettingsError(f"settings cannot be taken away ({word}); write KEY=VALUE")
        if is_readable:
            yield override.key_or_group, value, False
        elif text is not None:
            yield key, _read_list(typed) if text.is_list else typed, True
        else:
            raise SettingsError(
                f"cannot read {word}; write KEY=VALUE, a list as [a,b], a mapping as '{{a: 1}}' with its quotes"
            )


def _has_own_meaning(value: str, text: TextKind) -> bool:
    """Whether a value is more than the text it is typed as: null, in quotes, or a list where there may be one.

    ./null is a folder called null.
    """
    brackets = ["''", '""', "[]"] if text.is_list else ["''", '""']
    return value in ("null", MISSING) or _is_within(value, brackets)


def _is_within(value: str, brackets: Sequence[str]) -> bool:
    return len(value) > 1 and value[0] + value[-1] in brackets


def _read_list(value: str) -> Any:
    """[a,b], [[1,b],[c]] as lists of texts and whole numbers; any other text as it is."""
    if not _is_within(value, ["[]"]):
        return int(value) if re.fullmatch(r"-?\d{1,18}", value, re.ASCII) else value
    words, depth = [""], 0
    for letter in value[1:-1]:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return [_read_list(word.strip()) for word in words]


def _missing(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _missing(value, f"{before}{name}.")
        elif value == MISSING:
            yield before + name


def _compose(folder: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What Hydra makes of a file and the choices of its groups."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(Path(folder).resolve()), version_base="1.3"):
            config: Any = OmegaConf.to_container(compose(config_name=name, overrides=list(overrides)))
            return config
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise SettingsError(f"cannot read the settings: {str(error).splitlines()[0]}") from error
