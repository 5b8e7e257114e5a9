"""The tone of an image: what its pixels say about light, ground and ink, apart from what is drawn.

Two readings, both in closed form. A *figure* (a character, sign, drawing) lies on a ground of one level. Where it
covers the ground it goes from a base level at its faintest to ink at its fullest,

    x = ground + cover * (base - ground) + (ink - base) * figure,

with figure and cover (B, 1, H, W) in [0, 1], both 0 on the ground. Strokes that fade into the ground have
base = ground, and the cover plays no part. A figure that was cut out and laid over another ground (alpha compositing,
Porter and Duff 1984) keeps a base of its own, which may lie beyond the ground, and then has a rim. The figure knows
neither the levels nor which of them is the lighter.

A *photo* has no ground; there the tone is the mean and the standard deviation of each channel (after Reinhard et al.
2001, in RGB), and the figure is the standardised image.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("figure", "photo")
_LEAST_CONTRAST = 0.03  # of [0, 1]: below it an image is empty, and dividing would only make noise large
_SAME_LEVEL = 0.02  # how far a pixel of a clean ground may be from its level
_BORDER_COUNTS = 20  # as often as other pixels: where most of an image is ink, the border is still ground
_BRIGHTEST = 1.5  # of the way from base to ink; ink is a mean, some pixels lie above it
_PLAIN_BORDER = 0.6  # median share of border pixels near the ground: .77 of tight digits, 1 of letters, .44 of CIFAR-10
_NEAR = 0.2  # of the contrast: how far a border pixel may be from the ground
_MOST_LOST = 0.15
"""Median error of images rebuilt from tone and figure, as a share of their deviation, above which they are photographs:
.006 to .03 of digits and letters under every nuisance at hand, .8 of traffic signs, 1.0 of CIFAR-10, .9 of clothing."""


@dataclass(frozen=True)
class Tone:
    """Tone of each image, levels (B, C) in [0, 1].

    Attributes:
        ground: of a photo the mean.
        base: where strokes begin; of a photo the mean, too.
        ink: of a photo the mean plus the standard deviation.
    """

    ground: Tensor
    base: Tensor
    ink: Tensor

    def toward(self, other: Tone, strength: float) -> Tone:
        """This tone moved toward `other`, 0 not at all, 1 all the way."""
        levels = ((self.ground, other.ground), (self.base, other.base), (self.ink, other.ink))
        return Tone(*(torch.lerp(start, end, strength) for start, end in levels))


def read_tone(images: Tensor, *, kind: str) -> Tone:
    """Tone of float images (B, C, H, W) in [0, 1], as a `kind` of `KINDS`."""
    if kind == "photo":
        mean = images.mean((2, 3))
        return Tone(mean, mean, mean + images.std((2, 3), correction=0))
    ground = _ground_level(images)
    cover = _cover(images, ground)
    pixels, inside = images.flatten(2), cover.flatten(1) > 0
    height = (_polarity(images, cover) * images.mean(1).flatten(1)).masked_fill(~inside, float("-inf"))
    # Ink at its fullest: the upper third of the pixels that are nearer to the fullest than to the faintest, so that
    # soft edges do not count. Base: the faintest tenth.
    faintest = height.masked_fill(~inside, float("inf")).amin(1, keepdim=True)
    inked = height >= (height.amax(1, keepdim=True) + faintest) / 2
    rank = height.argsort(dim=1, descending=True).argsort(dim=1)
    number = inside.sum(1, keepdim=True)
    ink = _level(pixels, inside & (rank < (inked.sum(1, keepdim=True) / 3).ceil()))
    base = _level(pixels, inside & (rank >= number - (number / 10).ceil()))
    # A base between ground and ink is a stroke that fades into the ground.
    fades = ((base - ground) * (ink - ground)).sum(1, keepdim=True) >= 0
    drawn = inside.any(1, keepdim=True)
    return Tone(ground, torch.where(fades | ~drawn, ground, base), torch.where(drawn, ink, ground))


def take_out(images: Tensor, tone: Tone, *, kind: str) -> Tensor:
    """Content of `images`: of figures figure and cover in one tensor (B, 2, H, W), of photos (B, C, H, W)."""
    base, step = tone.base[:, :, None, None], (tone.ink - tone.base)[:, :, None, None]
    if kind == "photo":
        return (images - base) / step.clamp(min=_LEAST_CONTRAST)
    cover = _cover(images, tone.ground)
    # Along the line from base to ink in colour space.
    length = step.square().sum(1, keepdim=True).clamp(min=_LEAST_CONTRAST**2)
    figure = (((images - base) * step).sum(1, keepdim=True) / length).clamp(0, _BRIGHTEST)
    return torch.cat([figure * cover, cover], dim=1)


def put_in(content: Tensor, tone: Tone, *, kind: str) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of this content in this tone."""
    return lay_out(content, tone, kind=kind).clamp(0, 1)


def lay_out(content: Tensor, tone: Tone, *, kind: str) -> Tensor:
    """What `put_in` clamps: pixels below 0 or above 1 show how much a clamp would lose."""
    ground, base, ink = (level[:, :, None, None] for level in (tone.ground, tone.base, tone.ink))
    if kind == "photo":
        return base + (ink - base) * content
    # A pixel is covered or not, also after a turn has blurred the cover.
    cover = (content[:, 1:] > 0.5).to(content.dtype)
    return ground + cover * (base - ground) + (ink - base) * content[:, :1].clamp(min=0)


def extract_figure(content: Tensor, *, kind: str) -> Tensor:
    """The figure in one channel, (B, 1, H, W): what pose and stroke are read off."""
    return content.mean(1, keepdim=True) if kind == "photo" else content[:, :1].clamp(max=1)


def guess_kind(images: Tensor) -> str:
    """The kind of `KINDS` that these images are best read as.

    Figures have a border of one level, and figure and tone rebuild the image: what the reading would lose of a
    photograph, a sign with its surroundings say, a translation would lose, too.
    """
    tone = read_tone(images, kind="figure")
    border = _border(images.shape[2:], images.device)
    contrast = (tone.ink - tone.ground).abs().amax(1, keepdim=True).clamp(min=_LEAST_CONTRAST)
    off = (images.flatten(2)[:, :, border] - tone.ground[:, :, None]).abs().amax(1)
    plain = (off < _NEAR * contrast).float().mean(1)
    if float(plain.median()) <= _PLAIN_BORDER or float(measure_loss(images, tone).median()) > _MOST_LOST:
        return "photo"
    return "figure"


def measure_loss(images: Tensor, tone: Tone) -> Tensor:
    """What reading images as figures of this tone loses: error of the rebuilt image over its own deviation, (B,)."""
    rebuilt = put_in(take_out(images, tone, kind="figure"), tone, kind="figure")
    error = (rebuilt - images).square().mean((1, 2, 3)).sqrt()
    deviation = (images - images.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).sqrt()
    return error / deviation.clamp(min=_LEAST_CONTRAST)


def _ground_level(images: Tensor) -> Tensor:
    """The commonest of 256 levels of each channel, together with its neighbours, the border counting more; (B, C)."""
    weights = torch.where(_border(images.shape[2:], images.device), float(_BORDER_COUNTS), 1.0)
    levels = (images.flatten(2) * 255).round().long().clamp(0, 255)
    counts = torch.zeros(*images.shape[:2], 256, device=images.device)
    counts.scatter_add_(2, levels, weights.expand(levels.shape))
    near = 4.0 - torch.arange(-3, 4, device=images.device).abs()
    smooth = F.conv1d(counts.flatten(0, 1)[:, None], near[None, None], padding=3)
    return smooth.argmax(2).view(images.shape[:2]).to(images.dtype) / 255


def _cover(images: Tensor, ground: Tensor) -> Tensor:
    """1 where something lies on the ground, (B, 1, H, W); a noisy ground is known by how far its border scatters."""
    off = (images - ground[:, :, None, None]).abs().amax(1, keepdim=True)
    noise = off.flatten(1).index_select(1, _border_places(tuple(images.shape[2:]), images.device)).median(1).values
    return (off > (4 * noise).clamp(min=_SAME_LEVEL)[:, None, None, None]).to(images.dtype)


def _polarity(images: Tensor, cover: Tensor) -> Tensor:
    """1 where ink is lighter than the rims of strokes, -1 where it is darker, (B, 1).

    The ink is deep inside of the cover, the rim is not; brightness and depth are correlated over covered pixels.
    """
    number = cover.sum((1, 2, 3), keepdim=True).clamp(min=1)
    depth, light = F.avg_pool2d(cover, 3, stride=1, padding=1), images.mean(1, keepdim=True)
    depth, light = (values - (values * cover).sum((1, 2, 3), keepdim=True) / number for values in (depth, light))
    together = (depth * light * cover).sum((1, 2, 3))[:, None]
    return torch.where(together < 0, -1.0, 1.0).to(images.dtype)


def _level(pixels: Tensor, chosen: Tensor) -> Tensor:
    """Mean of (B, C, N) over the pixels chosen (B, N), (B, C)."""
    return (pixels * chosen[:, None]).sum(2) / chosen.sum(1).clamp(min=1)[:, None]


@functools.lru_cache(maxsize=16)
def _border_places(size: tuple[int, int], device: torch.device) -> Tensor:
    """Numbers of the outermost pixels in a flattened image, int64 (P,); a mask would be counted by a GPU each time."""
    with torch.inference_mode(False):
        return _border(size, torch.device("cpu")).nonzero().squeeze(1).to(device)


def _border(size: torch.Size | tuple[int, int], device: torch.device) -> Tensor:
    """Places of the outermost pixels in a flattened image, bool (H * W,)."""
    mask = torch.ones(tuple(size), dtype=torch.bool, device=device)
    mask[1:-1, 1:-1] = False
    return mask.flatten()
