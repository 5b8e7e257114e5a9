"""What a photograph's pixels say of light and camera, read off in closed form, and given to another photograph.

Six readings, apart from what is shown and where it lies (`geometry`):

    tone       mean and standard deviation of each channel (Reinhard et al. 2001, in RGB; `tone`)
    colour     covariance of the channels in place of the deviations: the map between two Gaussians that moves colours
               least (Monge's map; Pitie and Kokaram, "The linear Monge-Kantorovitch linear colour mapping", 2007)
    contrast   the curve from the image's quantiles of luminance to those of the other, both standardised
    light      the ratio of local luminance in the four corners, smooth in between
    sharpness  what a small blur would take, as a share of the contrast; matched by that blur, or by its opposite
    noise      deviation of the finest detail where the image is flattest; only ever added

Lengths are shares of the shorter side, so readings of small images can be given to large ones.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.translator.redraw import spectra
from gen_invariance.translator.redraw.tone import Tone, lay_out, read_tone, take_out

READINGS = ("colour", "contrast", "light", "sharpness", "noise")
"""Closed-form readings beyond the tone, each with a buffer of its own in the bank."""

CHANGE_TONE = {"contrast", "light", "sharpness"}
"""Readings that change means and deviations on the way, so that these are put right afterwards."""

LEVELS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
"""Quantiles of luminance that the curve of contrast goes through."""

_LOOK = 64  # pixels of the shorter side at which smooth readings are taken of larger images
_LEAST_DEVIATION = 0.03  # of [0, 1], as of tones: below it an image is empty
_GAIN = 4.0  # colours are not stretched by more, along any direction of colour space
_SLOPES = (0.5, 2.0)  # of the curve of contrast
_CORNERS = 0.7  # log ratio by which a corner gets lighter or darker at most
_SHARPEN, _BLUR = 0.8, 1.0  # of the small blur's difference that is added, or taken away
_FINEST = 128  # sides larger than that are blurred and sharpened as if they had so many pixels
_PATCHES, _FLATTEST = 5, 0.2  # noise is read off patches of a fifth of the side, from the flattest fifth of them
_NOISE = 0.08  # noise that is added at most


def reading_shape(part: str, channels: int) -> tuple[int, ...]:
    """Shape of one image's reading."""
    shapes = {"colour": (channels, channels), "contrast": (len(LEVELS),), "light": (2, 2)}
    return shapes.get(part, ())


def read_part(images: Tensor, part: str, *, blur: float) -> Tensor:
    """The reading `part` of `READINGS` of float images (B, C, H, W); `blur` is the deviation of the small blur."""
    if part == "colour":
        return _covariance(images)
    if part == "contrast":
        return _curve(images)
    if part == "light":
        return _field(images)
    if part == "sharpness":
        return _sharpness(images, blur)
    return _noise(images)


def blur_for(side: int) -> float:
    """Deviation of the small blur for images of that shorter side, as a share of it: a pixel and a third."""
    return 4 / 3 / min(side, _FINEST)


def give_sharpness(images: Tensor, target: Tensor, strength: float, *, blur: float) -> Tensor:
    """Images blurred or sharpened until their sharpness is `target` (B,), or part of the way there.

    With g the blur, r = x - g(x) and q = r - g(r), the detail of x - a r is r - a q, and the wanted a solves
    |r - a q| = sharpness * |x - a r|: a quadratic equation, of which the root nearer to 0 is taken.
    """
    centred, rest = images - images.mean((2, 3), keepdim=True), images - _blurred(images, blur)
    twice = rest - _blurred(rest, blur)
    wanted = torch.lerp(_sharpness(images, blur), target, strength).mul(2).exp()
    square = _variance(twice) - wanted * _variance(rest)
    half = _product(rest, twice) - wanted * _product(centred, rest)
    constant = _variance(rest) - wanted * _variance(centred)
    root = (half.square() - square * constant).clamp(min=0).sqrt()
    share = (constant / (half + root).clamp(min=1e-9)).clamp(-_SHARPEN, _BLUR)
    return images - share[:, None, None, None] * rest


def give_light(images: Tensor, target: Tensor, strength: float) -> Tensor:
    """Images whose corners are lighter or darker than they were as those of the drawn image (B, 2, 2) are."""
    # The mean of a quarter of what is interpolated between corners is three quarters of the corner.
    change = (4 / 3 * strength * (target - _field(images))).clamp(-_CORNERS, _CORNERS)[:, None]
    field = F.interpolate(change, size=images.shape[2:], mode="bilinear", align_corners=False)
    return images * field.exp()


def give_contrast(images: Tensor, target: Tensor, strength: float) -> Tensor:
    """Images whose luminance went through a monotone curve, towards the drawn quantiles (B, Q)."""
    mean, deviation = _moments(images)
    light = (images.mean(1, keepdim=True) - mean) / deviation
    own = _curve(images)
    gaps = own.diff(dim=1).clamp(min=0.02)
    slopes = (target.diff(dim=1).clamp(min=0.02) / gaps).clamp(*_SLOPES)
    slopes = 1 + strength * (slopes - 1)
    # A sum of hinges: of slope 1 outside, so bright spots stay as far from the rest as they were.
    ones = torch.ones_like(slopes[:, :1])
    turns = torch.cat([slopes, ones], dim=1) - torch.cat([ones, slopes], dim=1)
    curve = light
    for number in range(len(LEVELS)):
        curve = curve + turns[:, number, None, None, None] * (light - own[:, number, None, None, None]).clamp(min=0)
    return images + (curve - light) * deviation


def give_tone(images: Tensor, tone: Tone, *, own: Tone | None = None) -> Tensor:
    """Images of these means and deviations, not clamped; `own` is their tone, read where it is not given."""
    own = read_tone(images, kind="photo") if own is None else own
    return lay_out(take_out(images, own, kind="photo"), tone, kind="photo")


def give_colour(images: Tensor, mean: Tensor, covariance: Tensor, strength: float) -> Tensor:
    """Images of the drawn means (B, C) and covariances (B, C, C), or part of the way there, not clamped."""
    own_mean, own = images.mean((2, 3)), _covariance(images)
    floor = _LEAST_DEVIATION**2 * torch.eye(own.shape[1], device=own.device, dtype=own.dtype)
    roots, clamped = (_roots, _clamped) if images.device.type == "cpu" else (spectra.roots, spectra.clamped)
    root, inverse = roots(own + floor)
    middle, _ = roots(root @ (covariance + floor) @ root)
    matrix = clamped(inverse @ middle @ inverse, 1 / _GAIN, _GAIN)
    matrix = torch.lerp(torch.eye(own.shape[1], device=own.device, dtype=own.dtype), matrix, strength)
    flat = images.flatten(2) - own_mean[:, :, None]
    return (matrix @ flat + torch.lerp(own_mean, mean, strength)[:, :, None]).view_as(images)


def give_noise(images: Tensor, target: Tensor, seeds: Tensor, strength: float) -> Tensor:
    """Images with Gaussian noise added until they are as noisy as the drawn ones (B,); `seeds` int64 (B,) decide it."""
    lacking = (target.square() - _noise(images).square()).clamp(min=0).sqrt().clamp(max=_NOISE)
    return images + (strength * lacking)[:, None, None, None] * _white_noise(images, seeds)


def apply_readings(images: Tensor, drawn: Mapping[str, Tensor], strength: float, *, blur: float) -> Tensor:
    """Sharpness, light and contrast of `drawn`, as far as it holds them, given to images; their tone may change."""
    if "sharpness" in drawn:
        images = give_sharpness(images, drawn["sharpness"], strength, blur=blur)
    if "light" in drawn:
        images = give_light(images, drawn["light"], strength)
    if "contrast" in drawn:
        images = give_contrast(images, drawn["contrast"], strength)
    return images


def _small(images: Tensor) -> Tensor:
    """Images whose shorter side has `_LOOK` pixels at most."""
    height, width = images.shape[2:]
    scale = _LOOK / min(height, width)
    if scale >= 1:
        return images
    size = (max(_LOOK, round(height * scale)), max(_LOOK, round(width * scale)))
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of luminance, (B, 1, 1, 1)."""
    light = images.mean(1, keepdim=True)
    deviation = light.std((2, 3), keepdim=True, correction=0).clamp(min=_LEAST_DEVIATION)
    return light.mean((2, 3), keepdim=True), deviation


def _covariance(images: Tensor) -> Tensor:
    flat = images.flatten(2)
    flat = flat - flat.mean(2, keepdim=True)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def _roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of positive definite matrices, and its inverse."""
    values, vectors = torch.linalg.eigh(matrices)
    root = values.clamp(min=1e-8).sqrt()[:, None]
    return (vectors * root) @ vectors.transpose(1, 2), (vectors / root) @ vectors.transpose(1, 2)


def _clamped(matrices: Tensor, low: float, high: float) -> Tensor:
    """Symmetric matrices with their eigenvalues in [low, high]."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(low, high)[:, None]) @ vectors.transpose(1, 2)


def _curve(images: Tensor) -> Tensor:
    """Quantiles of standardised luminance, (B, Q)."""
    small = _small(images)
    mean, deviation = _moments(small)
    light = ((small.mean(1, keepdim=True) - mean) / deviation).flatten(1)
    return torch.quantile(light, _levels(light.device, light.dtype), dim=1).T


def _field(images: Tensor) -> Tensor:
    """Log luminance of the four quarters, less its mean, (B, 2, 2)."""
    light = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2)[:, 0]
    field = (light.clamp(min=0) + 0.05).log()
    return field - field.mean((1, 2), keepdim=True)


def _sharpness(images: Tensor, blur: float) -> Tensor:
    """Log share of the deviation that the small blur takes, (B,)."""
    rest = images - _blurred(images, blur)
    return (_variance(rest).sqrt() / _deviation(images)).clamp(min=0.005).log()


def _blurred(images: Tensor, blur: float) -> Tensor:
    """Gaussian blur, borders continued; as products of matrices, which are faster than narrow convolutions on a CPU.

    A blur over many pixels is one over few of a picture that was scaled down first: the work grows with the pixels.
    """
    sigma, size = blur * min(images.shape[2:]), tuple(images.shape[2:])
    factor = int(sigma / 2)
    if factor > 1:
        # Scaling down and up blurs, too, by the variances of a box and of a triangle of that many pixels.
        left = (sigma**2 - (factor**2 - 1) / 12 - factor**2 / 6) ** 0.5 / factor
        small = F.interpolate(images, size=[round(side / factor) for side in size], mode="area")
        return F.interpolate(_blurred(small, left / min(small.shape[2:])), size=size, mode="bilinear")
    down, across = (_blur_matrix(size, sigma, images.device).to(images.dtype) for size in images.shape[2:])
    return down @ images @ across.T


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _blur_matrix(size: int, sigma: float, device: torch.device) -> Tensor:
    """Weights (size, size) of each pixel in each blurred one."""
    reach = max(1, round(2.5 * sigma))
    offsets = torch.arange(-reach, reach + 1, device="cpu")
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    sources = (torch.arange(size, device="cpu")[:, None] + offsets).clamp(0, size - 1)
    matrix = torch.zeros(size, size, device="cpu").scatter_add_(1, sources, (weights / weights.sum()).expand(size, -1))
    return matrix.to(device)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(LEVELS, device=device, dtype=dtype)


def _deviation(images: Tensor) -> Tensor:
    """Of all pixels about the means of their channels, (B,)."""
    return (images - images.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)).sqrt().clamp(min=_LEAST_DEVIATION)


def _variance(images: Tensor) -> Tensor:
    return images.square().mean((1, 2, 3))


def _product(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).mean((1, 2, 3))


def _noise(images: Tensor) -> Tensor:
    """Deviation of the finest diagonal detail of luminance where there is least of it, (B,): noise, and no texture."""
    light = images.mean(1)
    height, width = (size // 2 * 2 for size in light.shape[1:])
    light = light[:, :height, :width]
    detail = (light[:, ::2, ::2] - light[:, ::2, 1::2] - light[:, 1::2, ::2] + light[:, 1::2, 1::2]) / 2
    side = max(1, min(detail.shape[1:]) // _PATCHES)
    patches = F.avg_pool2d(detail.square()[:, None], side).flatten(1)
    return patches.kthvalue(max(1, round(_FLATTEST * patches.shape[1])), dim=1).values.sqrt()


def _white_noise(images: Tensor, seeds: Tensor) -> Tensor:
    """Gaussian noise, the same in all channels, (B, 1, H, W): a function of a row's seed and of the pixel alone.

    A generator would make a row's noise depend on its place in the batch; hashing each pixel's number does not.
    """
    count, height, width = len(images), images.shape[2], images.shape[3]
    number = torch.arange(height * width, device=images.device)[None]
    uniform = [_hash(seeds[:, None] * 2 + half, number) for half in (0, 1)]
    normal = (-2 * (1 - uniform[0]).log()).sqrt() * (2 * torch.pi * uniform[1]).cos()
    return normal.to(images.dtype).view(count, 1, height, width)


def _hash(seeds: Tensor, number: Tensor) -> Tensor:
    """Numbers in [0, 1) of seeds (B, 1) and places (1, N), (B, N), by rounds of multiply and shift on 32 bits."""
    mask = 0xFFFFFFFF
    mixed = (seeds * 0x9E3779B1 + number * 0x85EBCA77) & mask
    for factor in (0x7FEB352D, 0x2C1B3C6D):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & mask
    return ((mixed ^ (mixed >> 16)) >> 8).float() / 2**24
