"""No nuisance, and several nuisances one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Draw, Nuisance


class Identity:
    """The nuisance that changes nothing; its eKLD is exactly 0."""

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """An empty draw; `generator` is not advanced."""
        return {}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """A copy of `images`."""
        return images.clone()


def is_identity(nuisance: Nuisance) -> bool:
    """Whether `nuisance` leaves every image as it is: `Identity`, or a composition of nothing else.

    >>> is_identity(Compose([Identity(), Identity()]))
    True
    """
    if isinstance(nuisance, Compose):
        return all(map(is_identity, nuisance.nuisances))
    return isinstance(nuisance, Identity)


class Compose:
    """Nuisances applied one after another; hand-written and learned ones mix freely.

    Args:
        nuisances: applied from first to last. Their draws are kept apart by position.

    Raises:
        SettingsError: the list is empty.
    """

    def __init__(self, nuisances: Sequence[Nuisance]) -> None:
        if not nuisances:
            raise SettingsError("Compose got no nuisances; give at least one (Identity() for none)")
        self.nuisances = tuple(nuisances)

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """Every part's draw, its names prefixed with the part's position."""
        drawn = [nuisance.sample(shape, generator=generator) for nuisance in self.nuisances]
        return {f"{place}.{name}": value for place, draw in enumerate(drawn) for name, value in draw.items()}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Apply the parts in order; same shape, dtype and range as `images`."""
        return self.apply_from(0, images, draw)

    def apply_from(self, start: int, images: Tensor, draw: Draw) -> Tensor:
        """Apply the parts from number `start` on, counted from 0."""
        for place in range(start, len(self.nuisances)):
            images = self.nuisances[place].apply(images, self.draw_of(place, draw))
        return images

    def draw_of(self, place: int, draw: Draw) -> Draw:
        """The draw of one part."""
        prefix = f"{place}."
        return {name.removeprefix(prefix): value for name, value in draw.items() if name.startswith(prefix)}
