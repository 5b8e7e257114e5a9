"""What a fit minimises: the protocol, and the discriminator that adversarial objectives share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_invariance.devices import check_weights
from gen_invariance.errors import ShapeError
from gen_invariance.nuisance.protocol import Draw


class Objective(Protocol):
    """What `fit_objective` minimises: a translator, perhaps its adversary, their optimisers, and the loss terms.

    One that has a method `conclude(data, rows, *, generator)`, as `spatial.SpatialObjective` does, looks at the result
    once more after the last step, before it is saved, and says whether it changed it.

    Attributes:
        translator: the network that is fitted.
        discriminator: its adversary, updated before it in each step; None for none.
        optimizers: by "translator" and, where there is one, "discriminator".
        average_decay: decay of the moving average of the weights, which is then what is kept, after so many updates;
            None leaves it to `FitSettings.average`.
    """

    translator: nn.Module
    discriminator: nn.Module | None
    optimizers: Mapping[str, torch.optim.Optimizer]
    average_decay: Callable[[int], float] | None

    def compute_learning_rates(self, step: int, steps: int) -> Mapping[str, float]:
        """Learning rate of each optimiser, by name, in `step` of `steps`."""
        ...

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """All randomness of one step, with leading B."""
        ...

    def forward(self, images: Tensor, draw: Draw) -> dict[str, Tensor]:
        """The one forward pass that both updates share."""
        ...

    def discriminator_terms(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named, weighted loss terms of the adversary."""
        ...

    def translator_terms(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named, weighted loss terms of the translator."""
        ...


def check_side(images: Tensor, *, levels: int, where: str) -> None:
    """Raise `ShapeError` where `images` cannot be halved `levels` times with borders that reflect."""
    if min(images.shape[-2:]) < 2**levels:
        raise ShapeError(
            f"{where}: images must have at least {2**levels} pixels a side, got {tuple(images.shape[-2:])}; scale them "
            "up, or build the networks with fewer downsamples (style_downsamples, discriminator_layers)"
        )


def convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution with reflected borders that keeps (stride 1) or halves (stride 2) height and width."""
    padding = (kernel - stride + 1) // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias, padding_mode="reflect")


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches, trained with least-squares targets 1 (real) and 0 (translated), Mao et al. 2017.

    Args:
        channels: of the images.
        width: channels of the first layer; doubled by each further one.
        layers: stride-2 layers.
    """

    def __init__(self, channels: int, *, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        sizes = [channels, *(width * 2**layer for layer in range(layers))]
        check_weights(sum(16 * inputs * outputs for inputs, outputs in pairwise(sizes)), "a discriminator")
        self.layers = nn.ModuleList(convolution(inputs, outputs, 4, stride=2) for inputs, outputs in pairwise(sizes))
        self.judge = nn.Conv2d(sizes[-1], 1, 1)
        for module in (*self.layers, self.judge):
            nn.init.normal_(module.weight, 0.0, 0.02)
            nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] to scores (B, 1, h, w)."""
        check_side(images, levels=len(self.layers), where="discriminator")
        x = images * 2 - 1
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.judge(x)

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's side of the least-squares loss; `fake` gets no gradient."""
        real_scores, fake_scores = self(torch.cat([real, fake.detach()])).chunk(2)
        return least_squares(real_scores, 1.0) + least_squares(fake_scores, 0.0)


def least_squares(scores: Tensor, target: float) -> Tensor:
    """Mean squared distance of `scores` to `target`: the LSGAN loss of one side."""
    return (scores - target).square().mean()
