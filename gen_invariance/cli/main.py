"""The command line: `gen-invariance VERB [settings]`.

Composes the settings of a verb (`configs`), checks them (`settings`), and hands them to the verb (`verbs`). Bad input
ends in one line and exit code 2, a failed run in one line and exit code 1.
"""

from __future__ import annotations

import difflib
import gc
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from gen_invariance.cli.help import format_usage, format_verb_help
from gen_invariance.cli.recipe import name_library_model, pretrained_words
from gen_invariance.cli.streams import lasting_streams
from gen_invariance.cli.verbs import VERBS, printable
from gen_invariance.configs import compose_verb, default_choices
from gen_invariance.errors import GenInvarianceError, SettingsError, is_out_of_memory
from gen_invariance.experiment.settings import Task
from gen_invariance.settings import TextKind, get_defaults, get_descriptions, get_texts
from gen_invariance.stopping import Terminated, sigterm_raises

_PEER_GONE = "connection (closed|reset|refused)|broken pipe|gloo|nccl"
"""What collectives say in the processes that are left."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the installed command."""
    gc.set_threshold(20_000)  # by default a quarter of the imports goes into looking for garbage in what stays
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Carry out one command line; returns the exit code."""
    with lasting_streams() as out, sigterm_raises():
        code = _run(arguments)
        out.flush()
        if code == 0 and out.failure is not None and not isinstance(out.failure, BrokenPipeError):
            return _fail(f"all is done, but the standard output cannot be written ({out.failure})", 2)
        return code


def _run(arguments: list[str]) -> int:
    verb, words = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    after_stop = VERBS[verb].after_stop if verb in VERBS else "run the same command again"
    try:
        if verb in ("-h", "--help", "help"):
            print(format_usage(VERBS), end="")
        elif verb == "--version":
            from importlib.metadata import version

            print(f"gen_invariance {version('gen_invariance')}")
        else:
            _run_verb(verb, words)
    except GenInvarianceError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        return _fail(f"stopped; {after_stop}", 143 if isinstance(stop, Terminated) else 130)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or 'a file'}; check the path, rights and space", 2)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            reason = f" ({str(error)[:200]})" if str(error) else ""
            return _fail(f"out of memory{reason}; use a smaller batch size, image size or network", 1)
        if os.environ.get("WORLD_SIZE", "1") != "1" and re.search(_PEER_GONE, str(error), re.IGNORECASE):
            return _fail(f"another process of this run died; {after_stop}", 1)
        raise
    return 0


def _fail(message: str, code: int) -> int:
    print(f"gen-invariance: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _run_verb(name: str, words: Sequence[str]) -> None:
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingsError(f"unknown verb {name!r}, choose one of {', '.join(VERBS)}{hint}")
    verb = VERBS[name]
    changes = [word for word in words if word not in ("-h", "--help", "--cfg", "job")]
    dashed = [word for word in changes if word.startswith("-")]
    if dashed:
        raise SettingsError(f"{name} knows no option {dashed[0]}; settings have no dashes: seed=1 out=FOLDER")
    if {"-h", "--help"} & set(words):
        print(format_verb_help(name, verb.settings, changes), end="")
        return
    only_shown = "--cfg" in words
    config = compose(name, changes, missing_is_error=not only_shown)
    if only_shown:
        import yaml

        print(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), end="")
        return
    if name == "train" and (added := pretrained_words(name_library_model(changes))):
        print(f"for a pretrained classifier: {' '.join(added)} (say otherwise to change it)", flush=True)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {printable(str(message))}", file=sys.stderr)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata and large pictures are no concern of the user's
        verb(config)


def compose(name: str, words: Sequence[str], *, missing_is_error: bool = True) -> dict[str, Any]:
    """The settings of the verb called `name` as plain values, under what `words` (KEY=VALUE, or an action first) say.

    Raises:
        SettingsError: a misspelt key or choice, a value that cannot be read, or a missing one.
    """
    kind = VERBS[name].settings
    if name == "train":
        words = name_library_model(words)
        words = [*pretrained_words(words), *words]
    if words and words[0] in VERBS[name].actions:
        words = [f"action={words[0]}", *words[1:]]
    _check_keys(name, kind, words)
    texts = {key: text for key, text in get_texts(kind).items() if key not in default_choices(name)}
    texts |= {f"data_options.{key}": text for key, text in get_texts(Task).items()}
    for key in {word.partition("=")[0].lstrip("+") for word in words} - texts.keys():
        if _is_option(key, get_descriptions(kind)):
            texts[key] = TextKind(is_only=False, is_list=True)
    return compose_verb(name, words, get_defaults(kind), texts=texts, missing_is_error=missing_is_error)


def _check_keys(name: str, kind: type, words: Sequence[str]) -> None:
    """`SettingsError` for a word that names no setting, with the nearest one."""
    known = get_descriptions(kind)
    groups = default_choices(name)
    for word in words:
        key, equals, value = word.partition("=")
        key = key.lstrip("+")
        if equals and key in groups and re.fullmatch(r"\s*\[\s*\]\s*", value):
            raise SettingsError(f"{key}=[] leaves {key} without settings; write {key}=NAME, or leave it out")
        if key.startswith("~") or not equals or key in groups or _is_known(key, known):
            continue  # what is no KEY=VALUE is said when it is parsed
        near = difflib.get_close_matches(key, [*known, *groups], n=1)
        hint = f", did you mean {near[0]}" if near else ""
        raise SettingsError(f"{name} has no setting {key!r}{hint}; see gen-invariance {name} --help")


def _is_known(key: str, known: Mapping[str, str]) -> bool:
    """Whether `key` is a setting, or an option in one."""
    return key in known or _is_option(key, known)


def _is_option(key: str, known: Mapping[str, str]) -> bool:
    """Whether `key` lies in a setting that holds options by name (the last known one on its way)."""
    parents = [key[:end] for end, letter in enumerate(key) if letter == "."]
    holders = [parent for parent in parents if parent in known]
    return bool(holders) and key not in known and not any(other.startswith(f"{holders[-1]}.") for other in known)


if __name__ == "__main__":
    main()
