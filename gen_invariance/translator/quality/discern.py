"""Can a small network tell images that a nuisance changed from images as they are? No labels, no truth needed.

It is asked of images that it was not trained on. A nuisance that is in the data already cannot be told: digits that
stand at every angle look the same turned once more. One that the data do not hold can.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import translate
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from gen_invariance.data.grouping import hold_groups
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.stats import Estimate, half_sample_interval

SIDE = 16
"""Images are averaged down to about this side: what matters shows there, resampling does not, and a step is quick."""
STEPS, BATCH, LEARNING_RATE = 150, 64, 3e-3
MOST = 1000
"""Images that take part at most."""
ROUNDS = 2
"""Draws of the nuisance for each image that is scored."""
_BLUR, _RADIUS, _NOISE = 1.5, 0.9, 0.03  # what hides resampling: pixels, share of half a side, pixel units of [0, 1]


def tell_apart(
    nuisance: Nuisance,
    images: Tensor,
    *,
    generator: torch.Generator,
    groups: Tensor | None = None,
    steps: int = STEPS,
) -> Estimate:
    """How well a small network tells translations from images as they are: area under the ROC curve, with interval.

    0.5 is not at all, 1 is always. Each half of the images is scored by a network trained on the other half; an image
    is compared with translations of itself among the others. What only shows that pixels were resampled is hidden from
    the network: both sides are shifted by a random part of a pixel, made small or blurred, covered outside the inner
    circle and given a little noise.

    Args:
        nuisance: what is done to images; it is applied to the images as they are, at their size.
        images: float (N, C, H, W) in [0, 1], N of 4 or more.
        generator: CPU generator of halves, draws, initial weights and the interval.
        groups: int64 (N,), or None; no group is in both halves.
        steps: of training, of 64 images and as many translations each.

    Returns:
        The area and its 95 % interval over images. An interval from 0 to 1 where there are too few images.
    """
    rows = torch.randperm(len(images), generator=generator)[:MOST]
    images = images[rows.to(images.device)]
    halves = _split(len(images), None if groups is None else groups.cpu()[rows], generator)
    if min(map(len, halves)) < 2:
        return Estimate(0.5, 0.0, 1.0)
    real, fake = torch.zeros(len(images)), torch.zeros(ROUNDS, len(images))
    for seen, scored in (halves, halves[::-1]):
        network = _train(nuisance, images[seen.to(images.device)], steps=steps, generator=generator)
        held_out = images[scored.to(images.device)]
        real[scored] = _score(network, held_out, lambda each: each, generator)
        for round_scores in fake:
            round_scores[scored] = _score(network, held_out, _translator(nuisance, generator), generator)
        # Two networks have two scales; ranks are compared within a half.
        middle = real[scored].mean()
        spread = real[scored].std().clamp_min(1e-6)
        real[scored] = (real[scored] - middle) / spread
        fake[:, scored] = (fake[:, scored] - middle) / spread

    def area(rows: Tensor) -> float:
        truth = torch.cat([torch.zeros(len(rows)), torch.ones(ROUNDS * len(rows))])
        return float(roc_auc_score(truth.numpy(), torch.cat([real[rows], fake[:, rows].flatten()]).numpy()))

    return half_sample_interval(area, len(images), generator=generator, resamples=100)


def _split(count: int, groups: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if groups is None:
        order = torch.randperm(count, generator=generator)
        return order[: count // 2], order[count // 2 :]
    first = hold_groups(
        torch.zeros(count, dtype=torch.int64), groups, wanted=torch.tensor([count // 2]), generator=generator
    )
    return first.nonzero()[:, 0], (~first).nonzero()[:, 0]


def _translator(nuisance: Nuisance, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    return lambda images: nuisance.apply(images, nuisance.sample(images.shape, generator=generator))


@torch.enable_grad()
def _train(nuisance: Nuisance, images: Tensor, *, steps: int, generator: torch.Generator) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(generator.get_state())
        network = _Discriminator(images.shape[1]).to(images.device)
    torch.rand(1, generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    translated = _translator(nuisance, generator)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        real, fake = (
            images[torch.randint(len(images), (BATCH,), generator=generator).to(images.device)] for _ in range(2)
        )
        with torch.no_grad():
            both = _hide(torch.cat([real, translated(fake)]), generator)
        scores = network(both)
        loss = F.softplus(scores[:BATCH]).mean() + F.softplus(-scores[BATCH:]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def _score(
    network: nn.Module, images: Tensor, change: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Tensor:
    parts = [network(_hide(change(part), generator)) for part in images.split(256)]
    return torch.cat(parts).cpu()


def _hide(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images as the network sees them."""
    shift = torch.rand(len(images), 2, generator=generator).to(images.device) - 0.5
    seen = translate(images, shift, padding_mode="border", align_corners=True)
    factor = max(1, min(images.shape[2:]) // SIDE)
    seen = F.avg_pool2d(seen, factor) if factor > 1 else gaussian_blur2d(seen, (5, 5), (_BLUR, _BLUR))
    y, x = (torch.linspace(-1, 1, side, device=images.device) for side in seen.shape[2:])
    inside = (x**2 + y[:, None] ** 2 <= _RADIUS**2).to(seen.dtype)
    return seen * inside + _NOISE * torch.randn(seen.shape, generator=generator).to(seen)


class _Discriminator(nn.Module):
    """Three convolutions, their mean and largest answer, and one score (B,)."""

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 5, stride=2, padding=2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.LeakyReLU(0.1),
        )
        self.judge = nn.Linear(4 * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        answers = self.layers(images * 2 - 1)
        return self.judge(torch.cat([answers.mean((2, 3)), answers.amax((2, 3))], dim=1)).squeeze(1)
