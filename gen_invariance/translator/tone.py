"""The tone of an image: what its pixels say about light, ground and ink, apart from what is drawn.

Three readings, all in closed form. A *glyph* is a figure on a plain ground: its pixels fall into two groups, that which
holds the border is the ground, and

    x = ground + (ink - ground) * figure,    figure (B, 1, H, W), 0 on the ground and 1 in the ink,

so that the figure knows neither the levels nor which of the two is the lighter. A *cutout* is a figure that lies over a
ground of exactly one level and keeps its own pixels whatever the ground is (alpha compositing, Porter and Duff 1984):

    x = figure + (1 - cover) * ground,       figure (B, C, H, W), cover (B, 1, H, W), both 0 on the ground.

A *photograph* has no ground; there the tone is the mean and the standard deviation of each channel (after Reinhard et
al. 2001, in RGB), and the figure is the standardised image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("glyph", "cutout", "photo")
_LEAST_CONTRAST = 0.03  # of [0, 1]: below it an image is empty, and dividing would only make noise large
_PLAIN_BORDER = 0.6  # median share of border pixels near the ground: .77 of tight digits, 1 of letters, .44 of CIFAR-10
_SAME_LEVEL = 0.02  # how far a pixel of a cutout's ground may be from its level
_AS_GOOD = 0.005  # nats of class likeness; lighting, which is no cutout, loses .02 to .15 on digits
_GROUND_CHANGES = 0.05  # standard deviation of the ground's level over images, of [0, 1]
_NEAR = 0.2  # of the contrast: how far a border pixel may be from the ground


@dataclass(frozen=True)
class Tone:
    """Tone of each image.

    Attributes:
        ground: (B, C) in [0, 1]; of a photograph the mean.
        ink: (B, C); of a photograph the mean plus the standard deviation; a cutout's stays as it is, this is 1.
    """

    ground: Tensor
    ink: Tensor

    def toward(self, other: Tone, strength: float) -> Tone:
        """This tone moved toward `other`, 0 not at all, 1 all the way."""
        return Tone(torch.lerp(self.ground, other.ground, strength), torch.lerp(self.ink, other.ink, strength))


def read_tone(images: Tensor, *, kind: str) -> Tone:
    """Tone of float images (B, C, H, W) in [0, 1], as a `kind` of `KINDS`."""
    if kind == "photo":
        mean = images.mean((2, 3))
        return Tone(mean, mean + images.std((2, 3), correction=0))
    pixels = images.flatten(2)
    if kind == "cutout":
        ground = _commonest_level(pixels)
        return Tone(ground, torch.ones_like(ground))
    light = pixels.mean(1)
    upper = light > _two_group_threshold(light)[:, None]
    border = _border(images.shape[2:], images.device)
    # The ground is the group that most of the border belongs to.
    ground_is_upper = upper[:, border].float().mean(1) > 0.5
    on_ground = upper == ground_is_upper[:, None]
    ground = _masked_median(pixels, on_ground)
    # Ink at its fullest: the third of its pixels farthest from the ground, so that soft edges do not count.
    distance = (pixels - ground[:, :, None]).square().sum(1).masked_fill(on_ground, -1.0)
    full = distance >= _upper_third(distance, ~on_ground)[:, None]
    full = full & ~on_ground
    ink = (pixels * full[:, None]).sum(2) / full.sum(1).clamp(min=1)[:, None]
    return Tone(ground, torch.where(full.any(1, keepdim=True), ink, ground))


def take_out(images: Tensor, tone: Tone, *, kind: str) -> Tensor:
    """Content of `images`: the figure; of cutouts figure and cover in one tensor (B, C + 1, H, W)."""
    ground, step = tone.ground[:, :, None, None], (tone.ink - tone.ground)[:, :, None, None]
    if kind == "cutout":
        cover = ((images - ground).abs().amax(1, keepdim=True) > _SAME_LEVEL).to(images.dtype)
        return torch.cat([images * cover, cover], dim=1)
    if kind == "photo":
        return (images - ground) / step.clamp(min=_LEAST_CONTRAST)
    # Along the line from ground to ink in colour space.
    length = step.square().sum(1, keepdim=True).clamp(min=_LEAST_CONTRAST**2)
    return (((images - ground) * step).sum(1, keepdim=True) / length).clamp(0, 1)


def put_in(content: Tensor, tone: Tone, *, kind: str) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of this content in this tone."""
    ground, step = tone.ground[:, :, None, None], (tone.ink - tone.ground)[:, :, None, None]
    if kind == "cutout":
        return (content[:, :-1] + (1 - content[:, -1:]) * ground).clamp(0, 1)
    return (ground + step * content).clamp(0, 1)


def figure_of(content: Tensor, *, kind: str) -> Tensor:
    """The figure in one channel, (B, 1, H, W): what pose and stroke are read off."""
    return content[:, :-1].mean(1, keepdim=True) if kind == "cutout" else content.mean(1, keepdim=True)


def looks_like(images: Tensor, labels: Tensor) -> str:
    """The kind of `KINDS` that these images, of classes `labels` (N,), are best read as.

    Figures have a border of one level. Whether they are glyphs or cutouts is decided by the classes: figures that were
    taken out rightly are more like those of their own class. Holds N x N numbers: a few hundred images are enough.
    """
    if not _border_is_plain(images):
        return "photo"
    found = {}
    for kind in ("glyph", "cutout"):
        content = take_out(images, read_tone(images, kind=kind), kind=kind)
        found[kind] = _class_likeness(figure_of(content, kind=kind), labels)
    # Over a ground that is always the same the two readings come to the same, and the plainer one is taken.
    changes = read_tone(images, kind="cutout").ground.std(0).max() > _GROUND_CHANGES
    return "cutout" if changes and found["cutout"] > found["glyph"] - _AS_GOOD else "glyph"


def _class_likeness(figures: Tensor, labels: Tensor, *, sharpness: float = 30.0) -> float:
    """Mean log-probability that a soft nearest neighbour of an image is of its class, the image itself left out.

    Neighbourhood components' criterion (Goldberger et al. 2004) on correlations, -20 at worst for an image.
    """
    small = F.interpolate(figures, size=(16, 16), mode="bilinear", antialias=True).flatten(1)
    unit = F.normalize(small - small.mean(1, keepdim=True), dim=1)
    alike = (sharpness * unit @ unit.T).fill_diagonal_(float("-inf"))
    own = alike.masked_fill(labels[:, None] != labels, float("-inf"))
    return float((own.logsumexp(1) - alike.logsumexp(1)).clamp(min=-20).mean())


def _border_is_plain(images: Tensor) -> bool:
    tone = read_tone(images, kind="glyph")
    border = _border(images.shape[2:], images.device)
    contrast = (tone.ink - tone.ground).abs().amax(1, keepdim=True).clamp(min=_LEAST_CONTRAST)
    off = (images.flatten(2)[:, :, border] - tone.ground[:, :, None]).abs().amax(1)
    plain = (off < _NEAR * contrast).float().mean(1)
    return float(plain.median()) > _PLAIN_BORDER


def _border(size: torch.Size | tuple[int, int], device: torch.device) -> Tensor:
    """Places of the outermost pixels in a flattened image, bool (H * W,)."""
    mask = torch.ones(tuple(size), dtype=torch.bool, device=device)
    mask[1:-1, 1:-1] = False
    return mask.flatten()


def _two_group_threshold(values: Tensor) -> Tensor:
    """The threshold (B,) that splits each row of (B, N) into the two groups farthest apart (Otsu 1979), exact."""
    ordered = values.sort(dim=1).values
    count = ordered.shape[1]
    lower = torch.arange(1, count, device=values.device, dtype=values.dtype)
    total = ordered.cumsum(1)
    mean_lower = total[:, :-1] / lower
    mean_upper = (total[:, -1:] - total[:, :-1]) / (count - lower)
    between = lower * (count - lower) * (mean_upper - mean_lower).square()
    # A threshold between two equal values would split no group.
    between = between.masked_fill(ordered[:, 1:] == ordered[:, :-1], -1.0)
    place = between.argmax(1, keepdim=True)
    return (ordered.gather(1, place) + ordered.gather(1, place + 1)).squeeze(1) / 2


def _commonest_level(pixels: Tensor) -> Tensor:
    """The commonest of 256 levels of each channel of (B, C, N), together with its neighbours; (B, C)."""
    levels = (pixels * 255).round().long().clamp(0, 255)
    counts = torch.zeros(*pixels.shape[:2], 258, device=pixels.device)
    counts.scatter_add_(2, levels + 1, torch.ones_like(pixels, dtype=counts.dtype))
    smooth = 0.5 * counts[..., :-2] + counts[..., 1:-1] + 0.5 * counts[..., 2:]
    return smooth.argmax(2).to(pixels.dtype) / 255


def _masked_median(pixels: Tensor, mask: Tensor) -> Tensor:
    """Lower median of (B, C, N) over the pixels of `mask` (B, N), (B, C)."""
    ordered = pixels.masked_fill(~mask[:, None], float("inf")).sort(dim=2).values
    middle = ((mask.sum(1) - 1).clamp(min=0) // 2)[:, None, None].expand(-1, pixels.shape[1], 1)
    return ordered.gather(2, middle).squeeze(2)


def _upper_third(values: Tensor, mask: Tensor) -> Tensor:
    """The value (B,) that about a third of the masked entries of (B, N) reach."""
    ordered = values.sort(dim=1, descending=True).values
    place = (mask.sum(1) / 3).ceil().long().sub(1).clamp(min=0)
    return ordered.gather(1, place[:, None]).squeeze(1)
