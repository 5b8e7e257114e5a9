"""Mixing of whole batches: mixup and CutMix, and their long-tail forms Remix and CMO.

All take images, float (B, C, H, W) in [0, 1], and labels, int64 (B,), or soft float (B, K) where a method allows it,
and give new images and soft labels, float32 (B, K). They run after the augmentation stage, whose labels are hard. The
share of each image is drawn for every row on its own; partners come from one permutation of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from gen_invariance.classifier.losses import check_counts
from gen_invariance.data.images import check_images
from gen_invariance.devices import doubled, send
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.settings import Fraction, check_options

Mixed = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and soft labels (B, K)."""


def soft_labels(labels: Tensor, *, num_classes: int) -> Tensor:
    """`labels` as float32 (B, K): one-hot rows for int64 (B,), unchanged when they are soft already.

    Raises:
        ShapeError: neither of the two.
    """
    if labels.ndim == 1 and labels.dtype == torch.int64:
        return F.one_hot(labels, num_classes).float()
    if labels.ndim == 2 and labels.shape[1] == num_classes and labels.is_floating_point():
        return labels
    raise ShapeError(
        f"labels must be int64 (B,) or float (B, {num_classes}), got {labels.dtype} {tuple(labels.shape)}; "
        "give class numbers or one probability for each class"
    )


def mixup(
    images: Tensor, labels: Tensor, *, num_classes: int, alpha: PositiveFloat = 0.2, generator: torch.Generator
) -> Mixed:
    """Mix each image with another one, share ~ Beta(alpha, alpha), labels with the same share (Zhang et al. 2018).

    Raises:
        ShapeError: images or labels of another form.
    """
    labels = _checked(images, soft_labels(labels, num_classes=num_classes))
    share, partner = _shares(images, alpha, generator), _partners(images, generator)
    return _blend(images, images[partner], share), _blend(labels, labels[partner], share)


def remix(
    images: Tensor,
    labels: Tensor,
    *,
    counts: Tensor | Sequence[int],
    alpha: PositiveFloat = 1.0,
    kappa: Annotated[float, Field(ge=1)] = 3.0,
    tau: Fraction = 0.5,
    generator: torch.Generator,
) -> Mixed:
    """Mixup whose label goes to the smaller class, when one class is `kappa` times the other and its share below `tau`.

    Reference: Chou et al. 2020, equation 6.

    Raises:
        ShapeError: images of another form, or labels that are not int64 (B,).
        SettingsError: a class without images.
    """
    counts = check_counts(counts)
    if labels.ndim != 1:
        raise ShapeError(f"remix compares class sizes and needs int64 labels (B,), got {tuple(labels.shape)}")
    soft = _checked(images, soft_labels(labels, num_classes=len(counts)))
    share, partner = _shares(images, alpha, generator), _partners(images, generator)
    sizes = doubled(counts.to(labels.device))
    size = sizes[labels.to(sizes.device)]
    ratio = size / size[partner.to(size.device)]
    larger, smaller = ((ratio >= kappa).to(share.device), (ratio <= 1 / kappa).to(share.device))
    label_share = torch.where(larger & (share < tau), 0.0, share)
    label_share = torch.where(smaller & (1 - share < tau), 1.0, label_share)
    return _blend(images, images[partner], share), _blend(soft, soft[partner], label_share)


def cutmix(
    images: Tensor, labels: Tensor, *, num_classes: int, alpha: PositiveFloat = 1.0, generator: torch.Generator
) -> Mixed:
    """Paste a box of another image into each one; labels by the exact area that is left (Yun et al. 2019, eq. 1, 2).

    Raises:
        ShapeError: images or labels of another form.
    """
    labels = _checked(images, soft_labels(labels, num_classes=num_classes))
    box = _boxes(images, _shares(images, alpha, generator), generator)
    partner = _partners(images, generator)
    return _paste(images, labels, images[partner], labels[partner], box)


def cmo(
    images: Tensor,
    labels: Tensor,
    foreground: Tensor,
    foreground_labels: Tensor,
    *,
    num_classes: int,
    alpha: PositiveFloat = 1.0,
    generator: torch.Generator,
) -> Mixed:
    """Context-rich minority oversampling: CutMix whose boxes come from a second stream, drawn to favour small classes.

    Args:
        images: the batch as it comes, with the backgrounds of large classes.
        labels: its labels.
        foreground: as many images from the class-weighted stream, e.g. classes drawn with 1/n_c.
        foreground_labels: their labels.
        num_classes: K.
        alpha: of the Beta distribution of the area that is left.
        generator: source of areas and boxes.

    Reference: Park et al. 2022, equation 1 and algorithm 1.

    Raises:
        ShapeError: images or labels of another form, or streams of different shapes.
    """
    labels = _checked(images, soft_labels(labels, num_classes=num_classes))
    foreground_labels = _checked(foreground, soft_labels(foreground_labels, num_classes=num_classes))
    if foreground.shape != images.shape:
        raise ShapeError(
            f"the foreground must be as the batch, {tuple(images.shape)}, got {tuple(foreground.shape)}; "
            "draw both streams with one batch size"
        )
    box = _boxes(images, _shares(images, alpha, generator), generator)
    return _paste(images, labels, foreground, foreground_labels, box)


MIXINGS: dict[str, Callable[..., Mixed]] = {"mixup": mixup, "remix": remix, "cutmix": cutmix, "cmo": cmo}
_NO_OPTIONS = ("images", "labels", "foreground", "foreground_labels", "num_classes", "counts", "generator")


def build_mixing(name: str, *, counts: Tensor | Sequence[int], **options: float) -> Callable[..., Mixed]:
    """The mixing `name` of `MIXINGS`, bound to class counts and options; call it with images, labels, generator=.

    "cmo" also takes the foreground images and labels, in third and fourth place.

    Raises:
        SettingsError: unknown name or option, or an option out of its range.

    Example:
        >>> mix = build_mixing("mixup", counts=[9, 1], alpha=1.0)
        >>> mix(torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 0, 1]), generator=torch.Generator())[1].shape
        torch.Size([4, 2])
    """
    if name not in MIXINGS:
        raise SettingsError(f"no mixing {name!r}; choose {', '.join(MIXINGS)}")
    options = check_options(MIXINGS[name], options, f"mixing {name}", without=_NO_OPTIONS)
    bound: dict[str, Any] = {"counts": counts} if name == "remix" else {"num_classes": len(check_counts(counts))}
    return partial(MIXINGS[name], **bound, **options)


def _checked(images: Tensor, labels: Tensor) -> Tensor:
    check_images(images, where="mixing")
    if len(images) != len(labels):
        raise ShapeError(f"got {len(images)} images and {len(labels)} labels; give one label for each image")
    return labels


def _shares(images: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """What each row keeps of its own image, Beta(alpha, alpha), float32 (B,)."""
    # torch's Beta distribution takes no generator; NumPy's, seeded from ours, does.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    share = np.random.default_rng(seed).beta(alpha, alpha, size=len(images))
    return send(torch.from_numpy(share).float(), images.device)


def _partners(images: Tensor, generator: torch.Generator) -> Tensor:
    return send(torch.randperm(len(images), generator=generator, device=generator.device), images.device)


def _blend(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """`share` (B,) of the rows of `first`, the rest of `second`."""
    return torch.lerp(second, first, share.to(first.dtype).view(-1, *(1 for _ in first.shape[1:])))


def _boxes(images: Tensor, share: Tensor, generator: torch.Generator) -> Tensor:
    """Where each row is pasted over, bool (B, 1, H, W): a box of area about 1 - share, cut off at the border."""
    height, width = images.shape[-2:]
    side = (1 - share).sqrt()
    centre = send(torch.rand(2, len(images), generator=generator, device=generator.device), images.device)

    def inside(length: int, position: Tensor) -> Tensor:
        size, middle = (side * length).floor(), (position * length).floor()
        start, end = (middle - (size / 2).floor()), (middle + (size / 2).floor())
        pixel = torch.arange(length, device=images.device)
        return (pixel >= start[:, None]) & (pixel < end[:, None])

    return (inside(height, centre[0])[:, :, None] & inside(width, centre[1])[:, None, :])[:, None]


def _paste(images: Tensor, labels: Tensor, foreground: Tensor, foreground_labels: Tensor, box: Tensor) -> Mixed:
    kept = 1 - box.float().mean((1, 2, 3))
    return torch.where(box, foreground, images), _blend(labels, foreground_labels, kept)
