"""What a fit takes from the images and shows of them: rows of its classes, its bank of styles, and sample grids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.devices import plain_defaults
from gen_invariance.errors import SettingsError
from gen_invariance.files import atomic_write
from gen_invariance.run import Run
from gen_invariance.translator.settings import FitSettings

KEPT_GRID = "kept.png"
"""Sample grid of what a fit keeps where that is not what its last step left: of a monitored fit, say."""


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
            raise SettingsError(f"{data.name} has no class {name!r} to fit on; choose of {_shorten(data.class_names)}")
        if not counts[label_of[name]]:
            raise SettingsError(f"{data.name}: class {name!r} has no image to fit on; name another one")
    return find_class_rows(data, sorted(label_of[name] for name in settings.classes))


def _shorten(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def find_class_rows(data: ImageData, labels: Sequence[int]) -> list[Tensor]:
    """Rows of the images of each class in `labels`, int64 on the CPU."""
    all_labels = data.labels.cpu()
    return [(all_labels == label).nonzero().squeeze(1) for label in labels]


@plain_defaults()
def draw_balanced_rows(members: Sequence[Tensor], count: int, *, generator: torch.Generator) -> Tensor:
    """`count` class-balanced rows, int64 (B,): a class uniformly, then one of its `members`, the rows of each class."""
    sizes = torch.tensor([len(rows) for rows in members])
    starts = sizes.cumsum(0) - sizes
    classes = torch.randint(len(members), (count,), generator=generator)
    within = (torch.rand(count, generator=generator) * sizes[classes]).long()
    return torch.cat(list(members))[starts[classes] + within]


@torch.no_grad()
def fill_bank(translator: nn.Module, data: ImageData, members: list[Tensor], run: Run) -> None:
    """Put styles of images of the chosen classes in the bank (bank_size, S), class-balanced, the same at every call.

    A translator without a bank, or with an empty one, is left as it is.
    """
    size = getattr(getattr(translator, "config", None), "bank_size", 0)
    if not size:
        return
    rows = draw_balanced_rows(members, size, generator=run.generator("bank"))
    parts = [translator.style(data.float_images(part)) for part in rows.split(256)]
    translator.bank.copy_(torch.cat(parts))


@torch.no_grad()
def write_grid(
    name: str, translator: nn.Module, data: ImageData, members: list[Tensor], run: Run, *, draws: int = 7
) -> None:
    """Write the PNG `name` into the run's samples: first column untouched images, one class a row (8 at most), then
    `draws` translations of each. A run without a folder gets none.
    """
    if run.path is None:
        return
    images = data.float_images(torch.stack([rows[0] for rows in members[:8]]))
    repeated = images.repeat_interleave(draws, 0)
    draw = translator.sample(repeated.shape, generator=run.generator("grid"))
    training = translator.training
    translator.eval()
    translated = translator.apply(repeated, draw).unflatten(0, (len(images), draws))
    translator.train(training)
    cells = torch.cat([images[:, None], translated], dim=1).cpu()
    with atomic_write(run.path / "samples" / name) as temporary:
        Image.fromarray(tile(cells)).save(temporary, format="PNG")


def tile(cells: Tensor, *, enlarge: int | None = None, gap: int = 1) -> np.ndarray:
    """Images (R, S, C, H, W) in [0, 1] as one uint8 RGB picture, R rows of S, white gaps, small images enlarged."""
    rows, columns, channels, height, _ = cells.shape
    enlarge = enlarge or max(1, round(64 / height))
    cells = cells.expand(-1, -1, 3, -1, -1) if channels == 1 else cells
    large = cells.repeat_interleave(enlarge, 3).repeat_interleave(enlarge, 4)
    framed = torch.nn.functional.pad(large, (gap, gap, gap, gap), value=1.0)
    picture = framed.permute(0, 3, 1, 4, 2).reshape(rows * framed.shape[3], columns * framed.shape[4], 3)
    return to_uint8(picture.clamp(0, 1)).numpy()
