"""No nuisance, several nuisances one after another, and a data set whose images have each met a nuisance once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.data.storage import images_at_once, room_like
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Draw, Nuisance, select_rows


class Identity:
    """The nuisance that changes nothing; its eKLD is exactly 0.

    Example:
        >>> import torch
        >>> from gen_invariance import Identity
        >>> images, nuisance = torch.rand(2, 1, 8, 8), Identity()
        >>> draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        >>> nuisance.apply(images, draw).shape
        torch.Size([2, 1, 8, 8])
    """

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
        nuisances: applied from first to last. Their draws are kept apart by index.

    Raises:
        SettingsError: the list is empty.

    Example:
        >>> import torch
        >>> from gen_invariance import Compose, Lighting, Rotation
        >>> images, both = torch.rand(2, 1, 8, 8), Compose([Rotation(30), Lighting()])
        >>> both.apply(images, both.sample(images.shape, generator=torch.Generator().manual_seed(0))).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, nuisances: Sequence[Nuisance]) -> None:
        if not nuisances:
            raise SettingsError("Compose got no nuisances; give at least one (Identity() for none)")
        self.nuisances = tuple(nuisances)

    @property
    def draw_on_cpu(self) -> bool:
        """Whether a part chooses rows by its draw, see `protocol.draw_for`; the others move theirs themselves."""
        return any(getattr(part, "draw_on_cpu", False) for part in self.nuisances)

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """Every part's draw, its names prefixed with the part's index."""
        drawn = [nuisance.sample(shape, generator=generator) for nuisance in self.nuisances]
        return {f"{index}.{name}": value for index, draw in enumerate(drawn) for name, value in draw.items()}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Apply the parts in order; same shape, dtype and range as `images`."""
        return self.apply_from(0, images, draw)

    def apply_from(self, start: int, images: Tensor, draw: Draw) -> Tensor:
        """Apply the parts from index `start` on."""
        for index in range(start, len(self.nuisances)):
            images = self.nuisances[index].apply(images, self.part_of_draw(index, draw))
        return images

    def part_of_draw(self, index: int, draw: Draw) -> Draw:
        """The draw of one part."""
        prefix = f"{index}."
        return {name.removeprefix(prefix): value for name, value in draw.items() if name.startswith(prefix)}


def transform_once(
    data: ImageData, nuisance: Nuisance, *, generator: torch.Generator, chunk: int | None = None
) -> tuple[ImageData, Draw]:
    """Each image of `data` under one draw of `nuisance`, and the draws; row i comes from row i.

    Args:
        data: any number of images, also none.
        nuisance: what acts on them.
        generator: CPU generator; one draw for the whole set, so `chunk` does not change the result.
        chunk: images at a time; None bounds the memory for their float copies.
    """
    draw = nuisance.sample(data.images.shape, generator=generator)
    if isinstance(nuisance, Identity) or not len(data):
        return data, draw
    moved = room_like(data.images, data.images.shape)
    for rows in torch.arange(len(data)).split(chunk or images_at_once(data.images)):
        part = to_uint8(nuisance.apply(data.float_images(rows), select_rows(draw, rows)))
        moved[rows[0] : rows[-1] + 1] = part
    return replace(data, images=moved), draw
