"""Two convolutions of MUNIT's decoder in forms that a CPU does faster; equal to the plain ones up to rounding.

**Upsampling.** Of the 25 pixels that a 5 x 5 window sees in an image upsampled by 2, only 9 differ, and which ones
coincide depends on whether the window's row and column are even or odd. So four 3 x 3 kernels on the small image, one a
phase, do the same with 9 products in place of 25 (for the idea Shi et al. 2016, arXiv 1609.07009). That form pads the
small image by replication; MUNIT pads the large one by reflection. The two differ in the outermost ring alone, which
only the outermost rows and columns of the result see, so four one-dimensional convolutions of the difference make it
equal.

**Few channels out.** Convolutions are made for 16 output channels at a time; a picture has 1 or 3. So each column of
the kernel becomes an output of its own, and the columns' results are added where they belong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of the small image that the five rows of a window fall on, for an even and an odd row of the result.
_FOLDS = torch.tensor(
    [[[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]]
).float()
_FOLD = torch.einsum("aru,bsv->uvabrs", _FOLDS, _FOLDS).reshape(25, 36)

FEWEST_PIXELS = 300
"""Pixels of a batch's small images from which the phase form is faster on a CPU; below, folding the kernels decides."""


def upsample_convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """`layer` (5 x 5, stride 1, 2 reflected pixels of padding) on `x` upsampled by 2: (B, I, h, w) to (B, O, 2h, 2w).

    The phase form, equal up to rounding, is taken on a CPU, for batches it makes faster.
    """
    if x.device.type != "cpu" or len(x) * x.shape[2] * x.shape[3] < FEWEST_PIXELS:
        return layer(F.interpolate(x, scale_factor=2, mode="nearest"))
    return convolve_phases(x, layer.weight, layer.bias)


def convolve_phases(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, I, h, w), (O, I, 5, 5) and (O,) to (B, O, 2h, 2w): upsampled by 2, reflected by 2, convolved."""
    small = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), phase_kernels(weight), bias.repeat_interleave(4))
    out = F.pixel_shuffle(small, 2)
    # Rows first, with the columns as they shall be; then columns, with rows as replication has them: so no corner
    # counts twice.
    out[:, :, 0] += F.conv1d(_line(x[:, :, 1] - x[:, :, 0], "reflect"), weight[:, :, 0])
    out[:, :, -1] += F.conv1d(_line(x[:, :, -2] - x[:, :, -1], "reflect"), weight[:, :, -1])
    out[..., 0] += F.conv1d(_line(x[..., 1] - x[..., 0], "replicate"), weight[..., 0])
    out[..., -1] += F.conv1d(_line(x[..., -2] - x[..., -1], "replicate"), weight[..., -1])
    return out


def phase_kernels(weight: Tensor) -> Tensor:
    """Kernels (O, I, 5, 5) folded to (4 O, I, 3, 3), phases of an output channel side by side as in `pixel_shuffle`."""
    outputs, inputs = weight.shape[:2]
    folded = weight.reshape(outputs * inputs, 25) @ _FOLD.to(weight)
    return folded.view(outputs, inputs, 4, 9).transpose(1, 2).reshape(4 * outputs, inputs, 3, 3)


def narrow_convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """`layer` (odd k x k, stride 1, (k - 1) / 2 reflected pixels of padding) on `x`: (B, I, H, W) to (B, O, H, W).

    The form by columns, equal up to rounding, is taken on a CPU for fewer than 4 channels.
    """
    if x.device.type != "cpu" or layer.out_channels > 3:
        return layer(x)
    return convolve_columns(x, layer.weight, layer.bias)


def convolve_columns(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, I, H, W), (O, I, k, k) and (O,) to (B, O, H, W): reflected by (k - 1) / 2, convolved."""
    outputs, inputs, side = weight.shape[:3]
    edge, width = side // 2, x.shape[-1]
    kernels = weight.permute(0, 3, 1, 2).reshape(outputs * side, inputs, side, 1)
    columns = F.conv2d(F.pad(x, (0, 0, edge, edge), mode="reflect"), kernels)
    columns = F.pad(columns, (edge, edge, 0, 0), mode="reflect").unflatten(1, (outputs, side))
    shifted = (columns[:, :, offset, :, offset : offset + width] for offset in range(side))
    return sum(shifted, start=bias[:, None, None])


def _line(line: Tensor, mode: str) -> Tensor:
    """A row or column (B, I, n) of the small image, upsampled by 2 and padded by 2: (B, I, 2n + 4)."""
    return F.pad(line.repeat_interleave(2, -1), (2, 2), mode=mode)
