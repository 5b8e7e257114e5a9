"""Nuisances by name, as settings and configs give them: this package's, installed ones, and classes of your own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.compose import Compose
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.settings import check_options

ENTRY_POINTS = "gen_invariance.nuisances"
"""Group of entry points under which an installed package offers nuisances by name."""

NUISANCES: Mapping[str, str] = {
    "identity": "gen_invariance.nuisance.compose:Identity",
    "rotation": "gen_invariance.nuisance.geometry:Rotation",
    "translation": "gen_invariance.nuisance.geometry:Translation",
    "shear": "gen_invariance.nuisance.geometry:Shear",
    "crop_flip": "gen_invariance.nuisance.geometry:CropFlip",
    "background": "gen_invariance.nuisance.intensity:Background",
    "lighting": "gen_invariance.nuisance.intensity:Lighting",
    "thickness": "gen_invariance.nuisance.thickness:Thickness",
    "mix": "gen_invariance.nuisance.generic:mix",
    "randaugment": "gen_invariance.nuisance.generic:RandAugment",
    "trivialaugment": "gen_invariance.nuisance.generic:TrivialAugment",
}
"""Module and class, or function, of each nuisance that has a name; imported when it is built."""


def build_nuisance(name: str, **options: Any) -> Nuisance:
    """The nuisance called `name` with `options`.

    Args:
        name: a key of `NUISANCES`, the name of an entry point of the group `ENTRY_POINTS`, or "package.module:Class"
            (any callable that returns a nuisance). Only what the caller names is imported.
        options: keyword arguments of that class or function.

    Raises:
        SettingsError: an unknown name, a class that cannot be imported or is no nuisance, or an option it lacks.
    """
    if name in NUISANCES:
        maker = _import(NUISANCES[name])
    elif ":" in name:
        maker = _import(name)
    elif installed := tuple(entry_points(group=ENTRY_POINTS, name=name)):
        maker = installed[0].load()
    else:
        raise SettingsError(
            f"unknown nuisance {name!r}; choose one of {', '.join(sorted(NUISANCES))}, or give package.module:Class"
        )
    nuisance = maker(**check_options(maker, options, f"nuisance {name}"))
    missing = [method for method in ("sample", "apply") if not callable(getattr(nuisance, method, None))]
    if missing:
        raise SettingsError(f"nuisance {name}: a {type(nuisance).__name__} has no {missing[0]}()")
    return nuisance


def build_augmentation(name: str, *, flip: bool, options: Mapping[str, Any] | None = None) -> Nuisance | None:
    """The plain augmentation of every row: "none", or names of this module joined by "+", applied in that order.

    Args:
        name: "crop_flip", "randaugment", "trivialaugment", "crop_flip+trivialaugment", ...
        flip: whether a mirrored image keeps its label; "crop_flip" mirrors only then, unless its options say so.
        options: by name.

    Raises:
        SettingsError: another name, or an option it lacks.
    """
    if name == "none":
        return None
    by_name = dict(options or {})
    by_name["crop_flip"] = {"flip": flip, **by_name.get("crop_flip", {})}
    try:
        parts = [build_nuisance(part, **by_name.get(part, {})) for part in map(str.strip, name.split("+"))]
    except SettingsError as error:
        raise SettingsError(f"augmentation: {error}") from error
    return parts[0] if len(parts) == 1 else Compose(parts)


def _import(name: str) -> Callable[..., Nuisance]:
    """The class or function of "package.module:Class"."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"nuisance {name!r} cannot be imported ({error}); give package.module:Class") from error
    if not callable(found):
        raise SettingsError(f"nuisance {name!r} is a {type(found).__name__}, not a class or a function")
    return found
