"""Nuisances by name, as settings and configs give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
}


def build_nuisance(name: str, **options: Any) -> Nuisance:
    """The hand-written nuisance called `name` with `options`.

    Raises:
        SettingsError: unknown name, or an option the nuisance does not have.
    """
    if name not in NUISANCES:
        raise SettingsError(f"unknown nuisance {name!r}; choose one of {', '.join(sorted(NUISANCES))}")
    return NUISANCES[name](**options_of(NUISANCES[name], options, f"nuisance {name}"))
