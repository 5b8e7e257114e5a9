"""Frozen settings classes made of plain values, such as a config file or a command line gives, types checked."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gen_invariance.errors import SettingsError

_T = TypeVar("_T")
_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", types.NoneType: "null"}


def settings_of(kind: type[_T], values: Mapping[str, Any], where: str) -> _T:
    """The dataclass `kind` made of `values`.

    Args:
        kind: a dataclass whose annotations are plain types, unions of them, tuples and mappings.
        values: by name; lists stand for tuples.
        where: what the values are called in errors, before the dot.

    Raises:
        SettingsError: an unknown name, a value of another type, or a number that is not finite.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where} must be {_in_words(Mapping)}, got {values!r}")
    hints = typing.get_type_hints(kind)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise SettingsError(f"{where} has no setting {unknown[0]!r}; choose of {', '.join(hints)}")
    return kind(**{name: typed(value, hints[name], f"{where}.{name}") for name, value in values.items()})


def options_of(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`options`, if `function` takes arguments of these names and kinds; lists become tuples.

    Raises:
        SettingsError: an unknown name, a value of another type, or a number that is not finite.
    """
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    known = [name for name in inspect.signature(function).parameters if name in hints]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise SettingsError(f"{where} has no option {unknown[0]!r}; choose of {', '.join(known) or 'none'}")
    checked = {name: typed(value, hints[name], f"{where}: {name}") for name, value in options.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in checked.items()}


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value`, if it is what `hint` says; a whole number where text is expected is taken as text (a folder 2024).

    Raises:
        SettingsError: it is not, or it is a number that is not finite.
    """
    if _fits(value, hint):
        return float(value) if hint is float else value  # so that 1 and 1.0 are the same settings
    if type(value) is int and _fits(str(value), hint):
        return str(value)
    raise SettingsError(f"{where} must be {_in_words(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin in (int, float):  # true and false are no numbers here
        return type(value) in (int, origin) and math.isfinite(value)
    if origin is tuple:
        if inner[-1:] == (Ellipsis,):
            inner = inner[:1] * len(value) if isinstance(value, list | tuple) else inner
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is list:
        return isinstance(value, list) and (not inner or all(_fits(entry, inner[0]) for entry in value))
    return isinstance(value, origin)


def _in_words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_in_words, inner))
    if origin in (tuple, list):
        return (
            f"a list of {len(inner)} values" if origin is tuple and Ellipsis not in inner else "a list such as [a, b]"
        )
    return _WORDS.get(origin, "a mapping such as {key: value}")
