"""Settings classes: what they refuse and how they say it, and that defaults and descriptions come from one place."""

import math
import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, field, replace
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveFloat, PositiveInt

from gen_invariance.errors import SettingsError
from gen_invariance.settings import (
    MISSING,
    Fraction,
    Text,
    check_options,
    check_value,
    get_defaults,
    get_descriptions,
    read_settings,
    settings_class,
)


@settings_class("loop")
class Loop:
    """How long."""

    steps: PositiveInt = 300
    """Updates of the weights."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    rate: PositiveFloat | None = None
    share: Fraction = 1.0
    schedule: Literal["step", "cosine"] = "step"
    points: tuple[float, float] = (0.25, 0.5)
    target: str | int | float = "median"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.points[0] > self.points[1]:
            raise SettingsError(f"loop.points must rise, got {self.points}")


@settings_class("fit")
class Fit:
    out: Text
    """Folder."""
    loop: Loop = field(default_factory=Loop)
    """The loop."""
    resume: bool = False


WRONG = {
    "below": ({"steps": 0}, "steps must be at least 1, got 0"),
    "truth as number": ({"steps": True}, "steps must be a whole number, got True"),
    "text as number": ({"steps": "3"}, "steps must be a whole number, got '3'"),
    "short tuple": ({"points": (0.5,)}, "points must be a list of 2 values, got"),
    "fraction of a step": ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
    "half-open interval": ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
    "closed interval": ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
    "none or positive": ({"rate": 0.0}, "rate must be positive, got 0.0"),
    "no choice": ({"schedule": "linear"}, "schedule must be one of step, cosine, got 'linear'"),
    "too many": ({"points": [1, 2, 3]}, r"points must be a list of 2 values, got \[1, 2, 3\]"),
    "wrong part": ({"points": [1, "a"]}, r"points must be a list of 2 values, got \[1, 'a'\]"),
    "no union": ({"target": [1]}, r"target must be text or a whole number or a finite number, got \[1\]"),
    "no mapping": ({"options": 3}, r"options must be a mapping such as \{key: value\}, got 3"),
    "not a number": ({"decay": math.nan}, "decay must be a finite number"),
    "infinite": ({"rate": math.inf}, "rate must be a finite number"),
    "together": ({"points": [2, 1]}, "points must rise"),
    "unknown": ({"stps": 3}, "has no setting 'stps'; choose of steps, decay"),
}


@pytest.mark.parametrize(("values", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("make", [lambda values: Loop(**values), lambda values: read_settings(Loop, values, "loop")])
def test_wrong_values_are_one_line(make, values, message):
    with pytest.raises(SettingsError, match=f"^loop[. ]{message}") as raised:
        make(values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("values", "message"), WRONG.values(), ids=WRONG)
def test_nested_settings_are_named_by_their_path(values, message):
    with pytest.raises(SettingsError, match=rf"^loop[. ]{message}"):
        read_settings(Fit, {"out": "runs", "loop": values}, "")


def test_values_keep_or_get_their_kind():
    made = read_settings(Fit, {"out": 2024, "loop": {"decay": 0, "points": [0, 1]}}, "fit")
    assert made.out == "2024"
    assert (type(made.loop.decay), made.loop.points) == (float, (0.0, 1.0))
    assert Loop(points=[0.0, 1.0]) == Loop(points=(0.0, 1.0))
    assert replace(Loop(), steps=7) == pickle.loads(pickle.dumps(Loop(steps=7)))
    with pytest.raises(FrozenInstanceError):
        Loop().steps = 4


def test_a_missing_value_is_asked_for():
    assert get_defaults(Fit)["out"] == MISSING
    with pytest.raises(SettingsError, match=r"fit\.out must be given"):
        read_settings(Fit, {}, "fit")


@given(
    st.builds(
        dict,
        steps=st.integers(1, 10**9),
        decay=st.floats(0, 1, exclude_max=True),
        schedule=st.sampled_from(["step", "cosine"]),
        target=st.one_of(st.text(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
        options=st.dictionaries(st.text(), st.lists(st.integers())),
    )
)
def test_what_is_read_is_what_is_written(values):
    made = read_settings(Loop, values, "loop")
    assert read_settings(Loop, get_defaults(Loop) | values, "loop") == made
    assert {name: getattr(made, name) for name in values} == values


def test_defaults_and_descriptions_are_those_of_the_class():
    assert read_settings(Loop, get_defaults(Loop), "loop") == Loop()
    assert get_defaults(Fit)["loop"] == get_defaults(Loop)
    described = get_descriptions(Fit)
    assert (described["out"], described["loop.steps"], described["loop.rate"]) == (
        "Folder.",
        "Updates of the weights.",
        "",
    )


def rotate(angle: float = 1.0, axes: tuple[int, ...] = ()) -> None:
    """Take options as a function does."""


def test_options_are_those_that_a_function_takes():
    assert check_options(rotate, {"angle": 2, "axes": [0, 1]}, "rotate") == {"angle": 2.0, "axes": (0, 1)}
    with pytest.raises(SettingsError, match="rotate has no option 'angel'; choose of angle, axes"):
        check_options(rotate, {"angel": 2}, "rotate")
    with pytest.raises(SettingsError, match="rotate: angle must be a finite number, got 'far'"):
        check_options(rotate, {"angle": "far"}, "rotate")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (2024, str, "2024"),
        (3, float, 3.0),
        (None, str | None, None),
        ([1, 2], list[int], [1, 2]),
        ("a", str | list[str], "a"),
    ],
)
def test_single_values(value, hint, expected):
    assert check_value(value, hint, "it") == expected
    assert type(check_value(value, hint, "it")) is type(expected)


def test_inherited_settings_keep_their_descriptions():
    @settings_class("child")
    class Child(Loop):
        depth: int = 1
        """how deep"""

    assert get_descriptions(Child) == get_descriptions(Loop) | {"depth": "how deep"}
    assert any(get_descriptions(Loop).values())
