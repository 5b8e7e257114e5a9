"""The forms that a CPU does faster against the plain convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gen_invariance.translator.munit import cpu_convolutions as forms
from gen_invariance.translator.munit.cpu_convolutions import (
    convolve_columns,
    convolve_phases,
    narrow_convolve,
    phase_kernels,
    upsample_convolve,
)
from gen_invariance.translator.munit.model import UpsampleBlock
from gen_invariance.translator.objective import convolution


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    return F.conv2d(F.pad(large, (2, 2, 2, 2), mode="reflect"), weight, bias)


def inputs(count: int, channels: int, height: int, width: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count + height)
    shapes = (count, channels, height, width), (outputs, channels, 5, 5), (outputs,)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.double) for shape in shapes)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(1, 3))
def test_phase_form_equals_plain_form_borders_and_corners_included(count, channels, height, width, outputs):
    x, weight, bias = inputs(count, channels, height, width, outputs)
    torch.testing.assert_close(convolve_phases(x, weight, bias), plain(x, weight, bias), rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_plain_form():
    given = [value.requires_grad_() for value in inputs(2, 3, 5, 4, 2)]
    weights = torch.randn(2, 2, 10, 8, dtype=torch.double)
    phase, slow = (torch.autograd.grad((form(*given) * weights).sum(), given) for form in (convolve_phases, plain))
    for one, two in zip(phase, slow, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


def test_kernels_keep_their_sum():
    # Every tap of the large window falls on one of the small one.
    weight = inputs(1, 3, 2, 2, 4)[1]
    sums = phase_kernels(weight).view(4, 4, 3, 9).sum(3)
    torch.testing.assert_close(sums, weight.sum((2, 3))[:, None].expand(4, 4, 3))


@pytest.mark.parametrize("count", [1, 40])
def test_block_takes_either_form_and_gives_the_same(count, monkeypatch):
    block, x = UpsampleBlock(6, 3), torch.randn(count, 6, 5, 5)
    used = []
    monkeypatch.setattr(forms, "convolve_phases", lambda *given: used.append(1) or convolve_phases(*given))
    out = upsample_convolve(x, block.convolution)
    assert bool(used) == (count == 40)
    layer = convolution(6, 3, 5)
    layer.load_state_dict(block.convolution.state_dict())
    torch.testing.assert_close(out, layer(F.interpolate(x, scale_factor=2, mode="nearest")), rtol=0, atol=1e-5)


def test_half_precision_keeps_its_dtype():
    block, x = UpsampleBlock(4, 2).to(torch.bfloat16), torch.randn(40, 4, 5, 5, dtype=torch.bfloat16)
    out = block(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), block.float()(x.float()), rtol=0.05, atol=0.1)


@given(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9), st.integers(1, 3), st.sampled_from((3, 5, 7)))
def test_form_by_columns_equals_plain_convolution(channels, height, width, outputs, side):
    x = inputs(2, channels, height, width, outputs)[0]
    weight, bias = torch.randn(outputs, channels, side, side, dtype=torch.double), torch.randn(outputs).double()
    found = [value.requires_grad_() for value in (x, weight, bias)]
    slow = F.conv2d(F.pad(x, (side // 2,) * 4, mode="reflect"), weight, bias)
    fast = convolve_columns(x, weight, bias)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-11)
    gradients = [torch.autograd.grad(out.square().sum(), found) for out in (fast, slow)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("outputs", [1, 3, 4])
def test_only_few_channels_are_convolved_by_columns(outputs, monkeypatch):
    layer, x, used = convolution(5, outputs, 7), torch.randn(2, 5, 9, 8), []
    monkeypatch.setattr(forms, "convolve_columns", lambda *given: used.append(1) or convolve_columns(*given))
    torch.testing.assert_close(narrow_convolve(x, layer), layer(x), rtol=0, atol=1e-5)
    assert bool(used) == (outputs < 4)
