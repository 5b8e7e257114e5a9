"""Settings classes: one declaration gives the checks, the defaults, the help text and the error messages.

A settings class is a frozen pydantic dataclass. Its fields carry their constraints as types (`Count`,
`Literal["step", "cosine"]`) and their description as the docstring below them:

>>> @settings_class("loop")
... class Loop:
...     steps: int = Field(default=300, ge=1, description="updates of the weights")
>>> Loop(steps=0)
Traceback (most recent call last):
...
gen_invariance.errors.SettingsError: loop.steps must be at least 1, got 0
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import BeforeValidator, Field, TypeAdapter
from pydantic.fields import FieldInfo

from gen_invariance.errors import SettingsError

_T = TypeVar("_T")
_CONFIG = pydantic.ConfigDict(
    strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, arbitrary_types_allowed=True
)
_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", types.NoneType: "null"}
_BOUND_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")

MISSING = "???"
"""Stands for the value of a setting without a default, as in OmegaConf."""

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number in [0, 1]."""

BelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1)."""

Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""Text that may look like a number, such as a folder called 2024."""


def _expand(value: Any) -> Any:
    value = str(value) if type(value) is int else value
    return os.path.expanduser(value) if isinstance(value, str) else value


Count = Annotated[int, Field(ge=1, le=10**9)]
"""How many of something."""

CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
"""How many of something, perhaps none."""

Rows = Annotated[int, Field(ge=1, le=10**6)]
"""Images or vectors at a time; whether they fit is asked where they are known."""

Side = Annotated[int, Field(ge=1, le=8192)]
"""Side of square images, in pixels."""

Width = Annotated[int, Field(ge=1, le=4096)]
"""Channels or units of a layer."""

Depth = Annotated[int, Field(ge=1, le=64)]
"""Layers or blocks."""

Halvings = Annotated[int, Field(ge=1, le=12)]
"""Layers that halve the sides: 12 bring the largest images down to a pixel or two."""

Workers = Annotated[int, Field(ge=1, le=1024)]
"""Processes of one machine."""

PathText = Annotated[str, BeforeValidator(_expand)]
"""Name of a file or folder; ~ is the home folder."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def settings_class(where: str) -> Callable[[type[_T]], type[_T]]:
    """Class decorator: a frozen dataclass that checks its fields when it is made.

    Args:
        where: what the settings are called in errors, before the dot.

    Raises:
        SettingsError: by the class, for a value of another type or outside of its range.
    """

    def decorate(cls: type[_T]) -> type[_T]:
        made: Any = pydantic.dataclasses.dataclass(frozen=True, config=_CONFIG)(cls)
        for base in cls.__mro__[1:]:  # pydantic reads the docstrings of a class's own fields only
            for name, field in getattr(base, "__pydantic_fields__", {}).items():
                own = made.__pydantic_fields__[name]
                own.description = own.description or field.description
        checked_init = made.__init__

        @functools.wraps(checked_init)
        def init(self: Any, *args: Any, **values: Any) -> None:
            named = dict(zip(made.__pydantic_fields__, args, strict=False))  # so that errors say the name
            values = {name: _lists_as_tuples(value) for name, value in (named | values).items()}
            try:
                checked_init(self, *args[len(named) :], **values)
            except pydantic.ValidationError as error:
                raise _settings_error(error, made, where, values) from None

        made.__init__ = init
        return made

    return decorate


def _lists_as_tuples(value: Any) -> Any:
    return tuple(map(_lists_as_tuples, value)) if isinstance(value, list) else value


def read_settings(kind: type[_T], values: Mapping[str, Any], where: str) -> _T:
    """The settings class `kind` made of plain values, such as a config file or a command line gives.

    Args:
        kind: a settings class, or a plain dataclass.
        values: by name, JSON-able; lists stand for tuples and mappings for nested settings.
        where: what the values are called in errors, before the dot.

    Raises:
        SettingsError: an unknown name, a value of another type or outside of its range.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where} must be {_describe_type(Mapping)}, got {values!r}")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise SettingsError(f"{where} has no setting {unknown[0]!r}; choose of {', '.join(known)}")
    if not hasattr(kind, "__pydantic_fields__"):
        hints = typing.get_type_hints(kind)
        return kind(**{name: check_value(value, hints[name], f"{where}.{name}") for name, value in values.items()})
    try:
        return TypeAdapter(kind).validate_json(_to_json(values, where))
    except pydantic.ValidationError as error:
        raise _settings_error(error, kind, where, values) from None


def check_options(
    function: Callable[..., Any], options: Mapping[str, Any], where: str, *, without: Sequence[str] = ()
) -> dict[str, Any]:
    """`options`, if `function` takes arguments of these names and kinds; lists become tuples.

    Args:
        function: or a class, whose constructor is meant; `**options` of a constructor are those of its base class.
        options: by name.
        where: what they belong to, in errors.
        without: arguments that are no options.

    Raises:
        SettingsError: an unknown name, a value of another type or outside of its range.
    """
    hints: dict[str, Any] = {}
    for owner in function.__mro__[:-1] if inspect.isclass(function) else (function,):
        declared = owner.__init__ if inspect.isclass(owner) and not is_settings_class(owner) else owner
        own = typing.get_type_hints(declared, include_extras=True)
        kinds = {name: parameter.kind for name, parameter in inspect.signature(owner).parameters.items()}
        hints |= {name: own[name] for name in kinds if name in own and name not in hints}
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            break
    known = [name for name in hints if name not in without]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise SettingsError(f"{where} has no option {unknown[0]!r}; choose of {', '.join(known) or 'none'}")
    checked = {name: check_value(value, hints[name], f"{where}: {name}") for name, value in options.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in checked.items()}


def check_value(value: Any, hint: Any, where: str) -> Any:
    """`value`, if it is what `hint` says; a whole number where text is expected is taken as text (a folder 2024).

    Raises:
        SettingsError: it is not, or it is a number that is not finite.
    """
    # A dataclass brings a configuration of its own; pydantic refuses a second one.
    adapter = TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else _CONFIG)
    try:
        return adapter.validate_json(_to_json(value, where)) if _is_plain(value) else adapter.validate_python(value)
    except pydantic.ValidationError as error:
        if type(value) is int:
            try:
                return adapter.validate_python(str(value))
            except pydantic.ValidationError:
                pass
        raise SettingsError(f"{where} {_expectation(error.errors()[0], hint)}, got {value!r}") from None


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple | Mapping)


def _to_json(values: Any, where: str) -> str:
    """As JSON, whose strict reading takes lists for tuples and whole numbers for floats, and nothing else."""
    try:
        return json.dumps(values, default=dict)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{where} must hold plain values: {error}") from error


def get_defaults(kind: type) -> dict[str, Any]:
    """The defaults of a settings class as plain values, nested; `MISSING` where there is none."""
    return {name: default for name, default, _ in _fields(kind)}


def _fields(kind: type) -> Iterator[tuple[str, Any, FieldInfo]]:
    """Name, default as a plain value and pydantic's field of each setting."""
    for name, field in kind.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if is_settings_class(field.annotation) and field.is_required():
            yield name, get_defaults(field.annotation), field
        else:
            value = MISSING if field.is_required() else field.get_default(call_default_factory=True)
            yield name, _plain(value), field


def is_settings_class(hint: Any) -> bool:
    """Whether `hint` is a class made by `settings_class`."""
    return isinstance(hint, type) and hasattr(hint, "__pydantic_fields__")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _plain(dataclasses.asdict(value))  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def get_descriptions(kind: type, *, before: str = "") -> dict[str, str]:
    """What each setting of `kind` is, by the dotted name that a command line uses; empty where nothing is said."""
    described: dict[str, str] = {}
    parents = [parent.__pydantic_fields__ for parent in kind.__mro__ if is_settings_class(parent)]  # type: ignore[attr-defined]
    for name, field in parents[0].items():
        # pydantic reads the docstrings of a class's own fields only, so those of inherited ones are looked up.
        descriptions = [fields[name].description for fields in parents if name in fields]
        described[before + name] = next(filter(None, descriptions), "")
        if is_settings_class(field.annotation):
            described |= get_descriptions(field.annotation, before=f"{before}{name}.")
    return described


@dataclasses.dataclass(frozen=True)
class TextKind:
    """That a setting takes text: whether nothing else (but null, or a list of texts), and whether a list."""

    is_only: bool
    is_list: bool


def get_texts(kind: type, *, before: str = "") -> dict[str, TextKind]:
    """The settings of `kind` that take text, by the dotted name that a command line uses."""
    texts: dict[str, TextKind] = {}
    for name, field in kind.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if is_settings_class(field.annotation):
            texts |= get_texts(field.annotation, before=f"{before}{name}.")
            continue
        types_in_it = set(_walk_types(field.annotation))
        if str in types_in_it and Mapping not in types_in_it:
            is_only = not types_in_it & {int, float, bool, typing.Literal}
            texts[before + name] = TextKind(is_only, is_list=tuple in types_in_it)
    return texts


def _walk_types(hint: Any) -> Iterator[Any]:
    """The types that a type hint is made of."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        yield from _walk_types(typing.get_args(hint)[0])
        return
    yield origin or hint
    if origin is not typing.Literal:
        for part in typing.get_args(hint):
            yield from _walk_types(part)


def _settings_error(
    error: pydantic.ValidationError, kind: type, where: str, values: Mapping[str, Any]
) -> SettingsError:
    """The first of pydantic's errors in one line."""
    detail: Any = error.errors()[0]
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):
        return cause
    hint: Any = kind
    fields: dict[str, FieldInfo] = {}
    name, value = where, values
    for part in detail["loc"]:
        if not is_settings_class(hint):
            break
        fields = hint.__pydantic_fields__
        field = fields.get(part)
        hint = Annotated[field.annotation, *field.metadata] if field and field.metadata else field and field.annotation
        name = f"{name}.{part}".lstrip(".")
        value = value.get(part, detail["input"]) if isinstance(value, Mapping) else detail["input"]
    in_tuple = typing.get_origin(hint) is tuple  # "missing" then means that the tuple is too short
    if detail["type"] in ("missing", "missing_argument") and not in_tuple:
        return SettingsError(f"{name} must be given")
    if hint is None:
        owner, _, unknown = name.rpartition(".")
        return SettingsError(f"{owner} has no setting {unknown!r}; choose of {', '.join(fields)}")
    if detail["type"] in _BOUND_ERRORS and len(detail["loc"]) > 1:
        value = detail["input"]
    return SettingsError(f"{name} {_expectation(detail, hint)}, got {_plain(value)!r}")


def _expectation(detail: Any, hint: Any) -> str:
    """What pydantic's error asks for, such as "must be at least 1"."""
    if detail["type"] in _BOUND_ERRORS:
        bounds, whole = dict(_bounds(hint)), _holds(hint, int)
        if whole:  # the largest count is no part of what a reader of "at least 1" needs
            broken = ("ge", "gt") if detail["type"].startswith("greater") else ("le", "lt")
            bounds = {name: limit for name, limit in bounds.items() if name in broken}
        return f"must be {_describe_bounds(bounds, whole=whole)}"
    if detail["type"] == "literal_error":
        return f"must be one of {', '.join(map(str, _choices(hint)))}"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return f"must be {_describe_type(hint)}"


def _holds(hint: Any, kind: type) -> bool:
    return hint is kind or any(_holds(part, kind) for part in typing.get_args(hint))


def _bounds(hint: Any) -> Iterator[tuple[str, float]]:
    """The limits ("ge", "gt", "le", "lt") that the annotations of a type hint name."""
    for part in typing.get_args(hint):
        metadata: Sequence[Any] = part.metadata if isinstance(part, FieldInfo) else (part,)
        for limit in metadata:
            yield from ((name, getattr(limit, name)) for name in ("ge", "gt", "le", "lt") if hasattr(limit, name))
        yield from _bounds(part)


def _describe_bounds(bounds: Mapping[str, float], *, whole: bool) -> str:
    low = bounds.get("ge", bounds.get("gt"))
    high = bounds.get("le", bounds.get("lt"))
    if low is not None and high is not None:
        return f"in {'[' if 'ge' in bounds else '('}{_number(low)}, {_number(high)}{']' if 'le' in bounds else ')'}"
    if high is not None:
        return f"at most {_number(high)}" if "le" in bounds else f"less than {_number(high)}"
    if low is None:
        return "in its range"
    if "ge" in bounds:
        return f"at least {_number(low)}"
    if whole and float(low).is_integer():
        return f"at least {_number(low + 1)}"
    return "positive" if low == 0 else f"more than {_number(low)}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _choices(hint: Any) -> list[Any]:
    """The values that the `Literal` of a type hint names."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]


def _describe_type(hint: Any) -> str:
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Annotated:
        return _describe_type(inner[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_describe_type, inner))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple and Ellipsis not in inner:
        return f"a list of {len(inner)} values"
    if origin in (tuple, list):
        return "a list such as [a, b]"
    return _WORDS.get(origin, "a mapping such as {key: value}")
