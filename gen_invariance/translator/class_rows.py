"""Rows of the classes that a translator is fitted on, and class-balanced draws of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.translator.settings import FitSettings


def find_class_members(data: ImageData, settings: FitSettings) -> list[Tensor]:
    """Rows of each class that `settings` chooses, by ascending label, int64 on the CPU; each class has an image.

    Raises:
        SettingsError: no class is large enough, a name does not exist, or a named class has no image.
    """
    counts = data.counts.tolist()
    if isinstance(settings.classes, str):
        least = settings.head_from if settings.classes == "head" else 1
        chosen = [label for label, count in enumerate(counts) if count >= least]
        if not chosen:
            raise SettingsError(
                f"{data.name}: no class has {least} images or more (largest: {max(counts)}); lower fit.head_from or "
                "set fit.classes=all"
            )
        return find_class_rows(data, chosen)
    label_of = {name: label for label, name in enumerate(data.class_names)}
    for name in settings.classes:
        if name not in label_of:
            raise SettingsError(f"{data.name} has no class {name!r} to fit on; choose of {_first_of(data.class_names)}")
        if not counts[label_of[name]]:
            raise SettingsError(f"{data.name}: class {name!r} has no image to fit on; name another one")
    return find_class_rows(data, sorted(label_of[name] for name in settings.classes))


def _first_of(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def find_class_rows(data: ImageData, labels: Sequence[int]) -> list[Tensor]:
    """Rows of the images of each class in `labels`, int64 on the CPU."""
    all_labels = data.labels.cpu()
    return [(all_labels == label).nonzero().squeeze(1) for label in labels]


def draw_balanced_rows(members: Sequence[Tensor], count: int, *, generator: torch.Generator) -> Tensor:
    """`count` class-balanced rows, int64 (B,): a class uniformly, then one of its `members`, the rows of each class."""
    sizes = torch.tensor([len(rows) for rows in members])
    starts = sizes.cumsum(0) - sizes
    classes = torch.randint(len(members), (count,), generator=generator)
    within = (torch.rand(count, generator=generator) * sizes[classes]).long()
    return torch.cat(list(members))[starts[classes] + within]
