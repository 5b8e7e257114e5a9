"""`ImageData`: labelled images as every room passes them on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.data.storage import images_at_once, room_like, take_rows
from gen_invariance.devices import send
from gen_invariance.errors import DataError, RangeError, ShapeError

_OVERSHOOT = 0.1


@dataclass(frozen=True)
class ImageData:
    """Labelled images, stored as uint8 on one device.

    Attributes:
        images: uint8 (N, C, H, W), C of 1 or 3; they may lie in a mapped file, see `storage`.
        labels: int64 (N,), each in [0, K).
        class_names: K names, in label order.
        name: what the data set is called in records and figures.
        groups: int64 (N,), or None where they are not known: images of one number show the same thing (a track, a
            patient, an object) and must not stand on both sides of a split. Numbers are those of the whole set: two
            classes share one only where they share the thing.

    Raises:
        ShapeError: axes, channel count or lengths do not fit.
        RangeError: a label lies outside [0, K).

    Example:
        >>> import torch
        >>> from gen_invariance import ImageData
        >>> data = ImageData(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1]), ("cat", "lynx"))
        >>> data.counts.tolist(), data.float_images().shape
        ([2, 1], torch.Size([3, 1, 8, 8]))
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str = "data"
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ShapeError(
                f"{self.name}: stored images must be uint8 (N, C, H, W), got {self.images.dtype} "
                f"{tuple(self.images.shape)}; convert with round(255 * image)"
            )
        if self.images.shape[1] not in (1, 3):
            raise ShapeError(
                f"{self.name}: images must have 1 or 3 channels, got {self.images.shape[1]}; "
                "convert to grey or RGB, and put the channel axis first"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ShapeError(
                f"{self.name}: labels must be int64 ({len(self.images)},), got {self.labels.dtype} "
                f"{tuple(self.labels.shape)}; give one label for each image"
            )
        try:
            check_labels(self.labels, self.num_classes)
        except RangeError as error:
            raise RangeError(f"{self.name}: {error}") from None
        if self.groups is not None and (self.groups.dtype != torch.int64 or self.groups.shape != self.images.shape[:1]):
            raise ShapeError(
                f"{self.name}: groups must be int64 ({len(self.images)},), got {self.groups.dtype} "
                f"{tuple(self.groups.shape)}; give one group number for each image, or None"
            )

    @property
    def num_classes(self) -> int:
        """K, the number of named classes."""
        return len(self.class_names)

    @property
    def counts(self) -> Tensor:
        """Images of each class, int64 (K,), on the CPU."""
        return torch.bincount(self.labels.cpu(), minlength=self.num_classes)

    @property
    def device(self) -> torch.device:
        """Where images and labels live."""
        return self.images.device

    @property
    def digest(self) -> str:
        """SHA-256 over shapes, pixels, labels and groups: equal digests mean equal data, on any machine."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.class_names)).encode())
        for chunk in self.images.split(images_at_once(self.images)):  # no second copy of the images in memory
            digest.update(chunk.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().numpy().astype("<i8").tobytes())
        if self.groups is not None:
            digest.update(self.groups.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on `device`; this object itself when it is already there."""
        if self.images.device == torch.device(device):
            return self
        groups = None if self.groups is None else self.groups.to(device)
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), groups=groups)

    def subset(self, indices: Tensor) -> ImageData:
        """The rows that `indices`, int64 (M,), names, in that order; class names and group numbers stay."""
        indices = indices.to(self.device)
        groups = None if self.groups is None else self.groups[indices]
        return replace(self, images=take_rows(self.images, indices), labels=self.labels[indices], groups=groups)

    def float_images(self, indices: Tensor | None = None) -> Tensor:
        """Images as the rooms exchange them: float32 (M, C, H, W) in [0, 1]."""
        # `index_select` copies whole rows; an index in brackets goes pixel by pixel, ten times as long on a CPU.
        return to_float(self.images if indices is None else self.images.index_select(0, send(indices, self.device)))

    def resized(self, image_size: int | None) -> ImageData:
        """The central square of each image at side `image_size`, see `resize_images`; None keeps the images."""
        return self if image_size is None else replace(self, images=resize_images(self.images, image_size))

    def select_classes(self, labels: Tensor | Sequence[int]) -> ImageData:
        """The images of the classes `labels`, in their order here; class `labels[i]` becomes class i."""
        labels = torch.as_tensor(labels, dtype=torch.int64).cpu()
        number = torch.full((self.num_classes,), -1)
        number[labels] = torch.arange(len(labels))
        renumbered = number.to(self.device)[self.labels]
        rows = (renumbered >= 0).nonzero()[:, 0]
        names = tuple(self.class_names[label] for label in labels.tolist())
        return replace(self.subset(rows), labels=renumbered[rows], class_names=names)

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, in [0, 1], float32 (C,); the deviation is 0.001 at least."""
        levels = torch.zeros(self.images.shape[1], 256, dtype=torch.int64, device="cpu")
        for chunk in self.images.split(images_at_once(self.images)):
            counted = [torch.bincount(channel.flatten(), minlength=256) for channel in chunk.unbind(1)]
            levels += torch.stack(counted).cpu()
        values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
        pixels = levels.sum(1)
        mean = (levels * values).sum(1) / pixels
        variance = (levels * (values - mean[:, None]) ** 2).sum(1) / (pixels - 1)
        return mean.float().to(self.device), variance.sqrt().clamp(min=1e-3).float().to(self.device)

    def require_every_class(self) -> ImageData:
        """Return self, or raise `DataError` that names the classes without a single image."""
        empty = [name for name, count in zip(self.class_names, self.counts.tolist(), strict=True) if not count]
        if empty:
            shown = ", ".join(repr(name) for name in empty[:5]) + (", ..." if len(empty) > 5 else "")
            raise DataError(
                f"{self.name}: {len(empty)} of {self.num_classes} classes have no image ({shown}); "
                "add images or remove the class"
            )
        return self


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; floating-point images as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] as uint8 of the same shape, rounded half up.

    Raises:
        RangeError: a pixel is NaN, infinite, or outside [0, 1] by more than 1e-6.
    """
    if not torch.isfinite(images).all():
        raise RangeError("images hold NaN or infinite pixels; remove them before storing")
    if images.numel() and (images.min() < -1e-6 or images.max() > 1 + 1e-6):
        raise RangeError(
            f"images must lie in [0, 1], got [{images.min().item():.3g}, {images.max().item():.3g}]; "
            "divide 8-bit pixels by 255"
        )
    return round_levels(images)


def round_levels(images: Tensor) -> Tensor:
    """`to_uint8` of images that are known to lie in [0, 1]."""
    # In float32: bfloat16 holds 255.5 as 256, which would wrap around from white to black.
    return images.float().clamp(0, 1).mul(255).add(0.5).to(torch.uint8)


def resize_images(images: Tensor, image_size: int) -> Tensor:
    """uint8 (N, C, S, S): the central square of each image, scaled with an antialiased bilinear filter.

    Args:
        images: uint8 (N, C, H, W).
        image_size: S; images of that size come back as they are.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side]
    if side == image_size:
        return square.contiguous()
    size = (image_size, image_size)
    scaled = room_like(images, (*images.shape[:2], *size))
    step = min(images_at_once(images), images_at_once(scaled))
    for chunk, room in zip(square.split(step), scaled.split(step), strict=True):
        room.copy_(F.interpolate(chunk.float(), size=size, mode="bilinear", antialias=True).add_(0.5).clamp_(0, 255))
    return scaled


def check_images(images: Tensor, *, channels: int | None = None, where: str = "images") -> None:
    """Raise unless `images` is floating point (B, C, H, W); shape only, so cheap enough for every step.

    Raises:
        ShapeError: wrong dtype, axes or channel count.
    """
    if not images.is_floating_point() or images.ndim != 4:
        raise ShapeError(
            f"{where}: expected float (B, C, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}; "
            "divide uint8 images by 255 and add a batch axis"
        )
    if channels is not None and images.shape[1] != channels:
        raise ShapeError(
            f"{where}: expected {channels} channel(s), got {images.shape[1]}; convert the images or "
            "build the model for that many channels"
        )


def check_pixels(images: Tensor, *, where: str = "images") -> None:
    """Raise unless floating-point pixels lie about in [0, 1]; reads them, which 8-bit ones are spared.

    Bicubic resizing and added noise overshoot a little; normalised pixels, or 8-bit ones as floats, do by far more.

    Raises:
        RangeError: pixels that were normalised, are 0..255 or in [-1, 1], or NaN.
    """
    if not images.is_floating_point() or not images.numel():
        return
    low, high = torch.stack([value.float() for value in images.detach().aminmax()]).tolist()
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
        raise RangeError(
            f"{where}: pixels must lie in [0, 1], got [{low:.3g}, {high:.3g}]; give images as they are before "
            "Normalize (normalise inside the model), and divide 8-bit pixels by 255"
        )


def check_axes(images: Tensor, *, where: str = "images", hint: str = "permute them to (B, C, H, W)") -> None:
    """Raise `ShapeError` for images (B, H, W, C) where (B, C, H, W) are expected, as far as one can tell."""
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        raise ShapeError(f"{where}: images {tuple(images.shape)} seem to lie channels last; {hint}")


def check_labels(labels: Tensor, num_classes: int | None = None) -> Tensor:
    """`labels` on the CPU as int64, checked: whole numbers (N,), not negative, below `num_classes`.

    Raises:
        ShapeError: another dtype or other axes.
        RangeError: a label outside [0, K).
    """
    if labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ShapeError(
            f"labels must be whole numbers (N,), got {labels.dtype} {tuple(labels.shape)}; "
            "give one class number for each image"
        )
    labels = labels.cpu().long()
    if len(labels) and (labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes)):
        raise RangeError(
            f"labels must lie in [0, {'K' if num_classes is None else num_classes}), got [{int(labels.min())}, "
            f"{int(labels.max())}]; renumber the labels, or name every class"
        )
    return labels


def names_or_numbers(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """`names` as a tuple, or "0", "1", ... when there are none."""
    return tuple(str(name) for name in names) if names is not None else tuple(map(str, range(num_classes)))
