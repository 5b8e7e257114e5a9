"""Nuisances by name, as settings and configs give them: this package's, installed ones, and classes of your own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.compose import Compose, Identity
from gen_invariance.nuisance.geometry import CropFlip, Rotation, Shear, Translation
from gen_invariance.nuisance.intensity import Background, Lighting
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.nuisance.thickness import Thickness
from gen_invariance.settings import options_of


def _mix(*, degrees: float = 45.0) -> Compose:
    """Stroke width, rotation, lighting and background together."""
    return Compose([Thickness(), Rotation(degrees), Lighting(), Background()])


def _randaugment(*, num_ops: int = 2, magnitude: int = 9) -> Nuisance:
    from gen_invariance.nuisance.generic import RandAugment  # kornia is slow to import

    return RandAugment(num_ops, magnitude)


def _trivialaugment() -> Nuisance:
    from gen_invariance.nuisance.generic import TrivialAugment

    return TrivialAugment()


ENTRY_POINTS = "gen_invariance.nuisances"
"""Group of entry points under which an installed package offers nuisances by name."""

NUISANCES: Mapping[str, Callable[..., Nuisance]] = {
    "identity": Identity,
    "rotation": Rotation,
    "background": Background,
    "thickness": Thickness,
    "lighting": Lighting,
    "translation": Translation,
    "shear": Shear,
    "crop_flip": CropFlip,
    "mix": _mix,
    "randaugment": _randaugment,
    "trivialaugment": _trivialaugment,
}


def build_nuisance(name: str, **options: Any) -> Nuisance:
    """The nuisance called `name` with `options`.

    Args:
        name: a key of `NUISANCES`, the name of an entry point of the group `ENTRY_POINTS`, or "package.module:Class"
            (any callable that returns a nuisance). Only what the caller names is imported.
        options: keyword arguments of that class or function.

    Raises:
        SettingsError: an unknown name, a class that cannot be imported or is no nuisance, or an option it lacks.
    """
    maker = NUISANCES.get(name) or _installed(name) or (_imported(name) if ":" in name else None)
    if maker is None:
        raise SettingsError(
            f"unknown nuisance {name!r}; choose one of {', '.join(sorted(NUISANCES))}, or give package.module:Class"
        )
    nuisance = maker(**options_of(maker, options, f"nuisance {name}"))
    missing = [method for method in ("sample", "apply") if not callable(getattr(nuisance, method, None))]
    if missing:
        raise SettingsError(f"nuisance {name}: a {type(nuisance).__name__} has no {missing[0]}()")
    return nuisance


def _installed(name: str) -> Callable[..., Nuisance] | None:
    """What an installed package offers as `name`."""
    found = entry_points(group=ENTRY_POINTS, name=name)
    return next(iter(found)).load() if found else None


def _imported(name: str) -> Callable[..., Nuisance]:
    """The class or function of "package.module:Class"."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"nuisance {name!r} cannot be imported ({error}); give package.module:Class") from error
    if not callable(found):
        raise SettingsError(f"nuisance {name!r} is a {type(found).__name__}, not a class or a function")
    return found
