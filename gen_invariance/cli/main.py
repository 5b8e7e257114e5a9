"""The command line: `gen-invariance VERB [settings]`. The only file that knows Hydra.

Composes the settings of a verb and hands them on to it (`verbs`). Bad input ends in one line and exit code 2, a
failed run in one line and exit code 1.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from gen_invariance.cli.help import config_folder, groups_of, sections_of, usage, verb_help
from gen_invariance.cli.verbs import VERBS, printable
from gen_invariance.errors import GenInvarianceError, SettingsError, is_out_of_memory
from gen_invariance.settings import typed
from gen_invariance.stopping import Terminated, sigterm_raises


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the installed command."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Carry out one command line; returns the exit code."""
    with sigterm_raises():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        if verb in ("-h", "--help", "help"):
            print(usage(VERBS), end="")
        elif verb == "--version":
            from importlib.metadata import version

            print(f"gen_invariance {version('gen_invariance')}")
        else:
            _run_verb(verb, rest)
        sys.stdout.flush()
    except GenInvarianceError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        return _fail(f"stopped{_GOES_ON.get(verb, _AGAIN)}", 143 if isinstance(stop, Terminated) else 130)
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or 'a file'}; check the path, rights and space", 2)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return _fail(f"out of memory ({str(error)[:200]}); use a smaller batch size, image size or network", 1)
        if os.environ.get("WORLD_SIZE", "1") != "1" and re.search(_PEER_GONE, str(error), re.IGNORECASE):
            return _fail(f"another process of this run died{_GOES_ON.get(verb, _AGAIN)}", 1)
        raise
    return 0


def _fail(message: str, code: int) -> int:
    print(f"gen-invariance: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _run_verb(verb: str, rest: list[str]) -> None:
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingsError(f"unknown verb {verb!r}, choose one of {', '.join(VERBS)}{hint}")
    wanted = {"help": {"-h", "--help"} & set(rest), "cfg": "--cfg" in rest}
    overrides = [word for word in rest if word not in ("-h", "--help", "--cfg", "job")]
    dashed = [word for word in overrides if word.startswith("-")]
    if dashed:
        raise SettingsError(f"{verb} knows no option {dashed[0]}; settings have no dashes: seed=1 out=FOLDER")
    removed = [word for word in overrides if word.startswith("~")]
    if removed:
        raise SettingsError(f"settings cannot be taken away ({removed[0]}); write KEY=VALUE")
    groups = dict(groups_of(verb))
    emptied = [
        name
        for name, _, value in (word.partition("=") for word in overrides)
        if name in groups and re.fullmatch(r"\s*\[\s*\]\s*", value)
    ]
    if emptied:  # Hydra would take the whole group away
        name = emptied[0]
        raise SettingsError(f"{name}=[] leaves {name} without settings; write {name}=NAME, or leave it out")
    if wanted["help"]:
        print(verb_help(verb, overrides), end="")
        return
    config = _compose(verb, overrides, missing_is_error=not wanted["cfg"])
    if wanted["cfg"]:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return
    _check_plain(verb, config)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {printable(str(message))}", file=sys.stderr)
    VERBS[verb](config)


def _compose(verb: str, overrides: list[str], *, missing_is_error: bool = True) -> dict[str, Any]:
    """The verb's settings as plain values.

    Raises:
        SettingsError: a misspelt key or choice, a value that cannot be read, or a missing one.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if overrides and overrides[0] in _ACTIONS.get(verb, ()):
        overrides = [f"action={overrides[0]}", *overrides[1:]]
    # `translator=FOLDER` is a value where the verb has no such group; Hydra would look for a choice of that name.
    own = dict(groups_of(verb))
    values = [word for word in overrides if (name := word.split("=")[0]) not in own and _is_group(name)]
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = compose(config_name=verb, overrides=[_opened(word) for word in overrides if word not in values])
            for override in OverridesParser.create().parse_overrides(values):
                config[override.key_or_group] = override.value()
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=missing_is_error)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:  # the last two: `data=3`
        raise SettingsError(_one_line(verb, error)) from error


def _is_group(name: str) -> bool:
    return name.isidentifier() and (config_folder() / name).is_dir()


def _opened(word: str) -> str:
    """`word` with a sign that lets it add keys, where it sets options whose names depend on another setting.

    A regular expression, which only `group` takes, is put into the quotes that Hydra wants around one.
    """
    group = re.fullmatch(r"(data(?:_options)?\.group=)(?![\w.-]*$|'.*'$|\".*\"$)(.*)", word)
    if group:
        expression = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (found[2] and r"\'"), group[2])
        word = f"{group[1]}'{expression}'"
    return f"++{word}" if re.match(r"(\w+\.)*\w+_options(\.\w+)*=", word) else word


def _one_line(verb: str, error: Exception) -> str:
    """What Hydra says on several lines, on one."""
    text = str(error)
    unreadable = getattr(error, "override", None)
    if unreadable is not None:
        return f"cannot read {unreadable}; write KEY=VALUE, a list as [a,b], a mapping as '{{a: 1}}' with its quotes"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{verb} needs {missing[1]}=...; see gen-invariance {verb} --help"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        full = re.search(r"full_key: (\S+)", str(error.__cause__))
        key = max(unknown[1], full[1] if full else "", key=len)  # Hydra names the start or the whole of it
        return f"{verb} has no setting {key!r}{_nearest(verb, key)}; see gen-invariance {verb} --help"
    choice = re.search(r"Could not find '([^']+)'", text)
    if choice:
        group, _, name = choice[1].partition("/")
        names = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
        return f"{group} has no choice {name!r}; choose one of {', '.join(names)}" if names else text.splitlines()[0]
    return f"cannot read the settings: {text.splitlines()[0]}; write KEY=VALUE, lists as [a,b]"


def _keys(config: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield before + name
        if isinstance(value, dict):
            yield from _keys(value, f"{before}{name}.")


def _nearest(verb: str, key: str) -> str:
    """A hint at the setting that was probably meant."""
    config = _compose(verb, [], missing_is_error=False)
    near = difflib.get_close_matches(key, list(_keys(config)), n=1)
    return f", did you mean {near[0]}" if near else ""


def _check_plain(verb: str, config: dict[str, Any]) -> None:
    """Give the settings that belong to no group their kind, in place."""
    groups = dict(groups_of(verb))
    for name in (*groups, *sections_of(verb)):
        if not isinstance(config.get(name, {}), dict):
            raise SettingsError(f"{name} must be a group of settings, got {config[name]!r}; write {name}.KEY=VALUE")
    for name, value in config.items():
        hint = _PLAIN.get(f"{verb} {name}", _PLAIN.get(name))
        if hint is not None and name not in groups:
            config[name] = typed(value, hint, name)


_PLAIN: dict[str, Any] = {
    **dict.fromkeys(("seed", "draws", "batch_size"), int),
    **dict.fromkeys(("out", "device", "augmentation", "run", "nuisance", "split", "title"), str),
    **dict.fromkeys(
        ("method", "baseline", "translator", "inspect out", "order nuisance", "augment classifier"), str | None
    ),
    **dict.fromkeys(("resume", "allow_changed_settings"), bool),
    "progress": bool | None,
    "records": str | list[str],
    "references": list[str],
    **dict.fromkeys(("benchmark benchmark", "benchmark methods"), str | list[str]),
    **dict.fromkeys(("benchmark orders", "benchmark seeds"), int | str | list),
    **dict.fromkeys(("benchmark learned", "benchmark augmentation", "data_root"), str | None),
    "benchmark processes": int,
    **dict.fromkeys(
        (
            f"{group}_options"
            for group in ("data", "classifier", "training", "stage", "fit", "measure", "translator", "nuisance")
        ),
        dict,
    ),
}
"""What the settings that belong to no group are, in every verb that has them, or in one ("VERB NAME")."""

_GOES_ON = {
    **dict.fromkeys(("fit", "train"), "; the same command with resume=true goes on from the last checkpoint"),
    **dict.fromkeys(("augment", "order"), "; the same command with resume=true goes on with what is left"),
    **dict.fromkeys(("demo", "benchmark"), "; the same command goes on with what is left"),
}
"""What can be done after Ctrl-C or SIGTERM."""

_ACTIONS = {"benchmark": ("run", "list", "report")}
"""Words that may follow a verb and stand for action=WORD."""

_PEER_GONE = "connection (closed|reset|refused)|broken pipe|gloo|nccl"
"""What collectives say in the processes that are left."""

_AGAIN = "; run the same command again"

if __name__ == "__main__":
    main()
