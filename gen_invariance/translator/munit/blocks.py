"""Layers of the translator networks (Huang et al. 2018, appendix B), written as pure modules.

Style parameters reach the decoder as arguments, never as attributes set on a module, so a network may be used from
several places at once.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_invariance.errors import ShapeError
from gen_invariance.translator.munit.cpu_convolutions import upsample_convolve


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


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(x)))), instance-normalised; no bias, since the normalisation removes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = convolution(width, width, 3, bias=False)
        self.second = convolution(width, width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, h, w) to the same shape."""
        hidden = F.relu(F.instance_norm(self.first(x)))
        return x + F.instance_norm(self.second(hidden))


class AdaptiveResidualBlock(nn.Module):
    """A residual block whose scale and shift come from the style (adaptive instance normalisation)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = convolution(width, width, 3, bias=False)
        self.second = convolution(width, width, 3, bias=False)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """(B, W, h, w) and style parameters (B, 4, W): scale and shift for each of the two convolutions."""
        hidden = F.relu(_modulate(self.first(x), style[:, 0], style[:, 1]))
        return x + _modulate(self.second(hidden), style[:, 2], style[:, 3])


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.instance_norm(x) * scale[..., None, None] + shift[..., None, None]


class UpsampleBlock(nn.Module):
    """Nearest upsampling by 2, a 5 x 5 convolution, layer normalisation over the whole image, relu."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = convolution(inputs, outputs, 5)
        self.scale = nn.Parameter(torch.ones(outputs, 1, 1))
        self.shift = nn.Parameter(torch.zeros(outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, h, w) to (B, W', 2h, 2w)."""
        x = upsample_convolve(x, self.convolution)
        return F.relu(F.layer_norm(x, x.shape[1:]) * self.scale + self.shift)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches; least-squares targets 1 (real) and 0 (translated), Mao et al. 2017.

    Args:
        channels: of the images.
        width: channels of the first layer; doubled by each further one.
        layers: stride-2 layers.
    """

    def __init__(self, channels: int, *, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        sizes = [channels, *(width * 2**layer for layer in range(layers))]
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


def least_squares(scores: Tensor, target: float) -> Tensor:
    """Mean squared distance of `scores` to `target`: the LSGAN loss of one side."""
    return (scores - target).square().mean()


def kaiming_init(module: nn.Module) -> None:
    """He initialisation of every convolution and linear layer, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
