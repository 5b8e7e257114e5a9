"""RandAugment and TrivialAugment: the nuisance contract, and each operation against torchvision on one image."""

import math

import pytest
import torch

import gen_invariance.torchvision_guard  # noqa: F401

from torchvision.transforms import InterpolationMode  # isort: skip
from torchvision.transforms.v2 import functional as V  # isort: skip

from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.nuisance.generic import OPERATIONS, RandAugment, TrivialAugment
from gen_invariance.nuisance.protocol import Nuisance, select_rows
from gen_invariance.run import named_generator

POLICIES = (RandAugment(), RandAugment(num_ops=3, magnitude=30), TrivialAugment())


def images(count=24, channels=3, height=12, width=16):
    pixels = torch.randint(256, (count, channels, height, width), generator=named_generator(0, "images"))
    return pixels / 255


def only(policy, name, count, step, sign=1.0):
    """A draw in which every row does `name` first and nothing afterwards."""
    shape = (count, policy.num_ops)
    operation = torch.zeros(shape, dtype=torch.int64)
    operation[:, 0] = OPERATIONS.index(name)
    return {"operation": operation, "step": torch.full(shape, step), "sign": torch.full(shape, sign)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_contract_of_a_nuisance(policy, channels):
    assert isinstance(policy, Nuisance)
    batch = images(200, channels)
    copy = batch.clone()
    state = torch.random.get_rng_state()
    draw = policy.sample(batch.shape, generator=named_generator(1, "draw"))
    moved = policy.apply(batch, draw)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(batch, copy)
    assert all(len(value) == 200 for value in draw.values())
    assert moved.shape == batch.shape
    assert moved.dtype == batch.dtype
    assert moved.isfinite().all()
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert torch.equal(moved, policy.apply(batch, draw))
    assert set(draw["operation"].unique().tolist()) == set(range(len(OPERATIONS)))
    assert (moved != batch).any(3).any(2).any(1).float().mean() > 0.6


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_does_not_depend_on_its_batch(policy):
    batch = images(64)
    draw = policy.sample(batch.shape, generator=named_generator(2, "draw"))
    whole = policy.apply(batch, draw)
    rows = torch.tensor([63, 5, 17])
    torch.testing.assert_close(policy.apply(batch[rows], select_rows(draw, rows)), whole[rows])
    for row in range(0, 64, 7):
        one = policy.apply(batch[row : row + 1], select_rows(draw, torch.tensor([row])))
        torch.testing.assert_close(one[0], whole[row])


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("policy", POLICIES)
def test_tiny_batches_and_half_precision(policy, count):
    batch = images(count).to(torch.bfloat16)
    moved = policy.apply(batch, policy.sample(batch.shape, generator=named_generator(0, "draw")))
    assert moved.shape == batch.shape
    assert moved.dtype == torch.bfloat16


def oracle(name, image, step, sign, ranges, shape):
    """The operation in torchvision, on one float image (C, H, W)."""
    bilinear = {"interpolation": InterpolationMode.BILINEAR}
    amount = sign * step / 30 * ranges.get(name, 0)
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    height, width = shape
    results = {
        "identity": lambda: image,
        "shear_x": lambda: V.affine(
            image, **{**still, "shear": [math.degrees(math.atan(amount)), 0.0]}, center=[0, 0], **bilinear
        ),
        "shear_y": lambda: V.affine(
            image, **{**still, "shear": [0.0, math.degrees(math.atan(amount))]}, center=[0, 0], **bilinear
        ),
        "translate_x": lambda: V.affine(image, **{**still, "translate": [round(amount * width), 0]}, **bilinear),
        "translate_y": lambda: V.affine(image, **{**still, "translate": [0, round(amount * height)]}, **bilinear),
        "rotate": lambda: V.rotate(image, amount, **bilinear),
        "brightness": lambda: V.adjust_brightness(image, 1 + amount),
        "colour": lambda: V.adjust_saturation(image, 1 + amount),
        "contrast": lambda: V.adjust_contrast(image, 1 + amount),
        "sharpness": lambda: V.adjust_sharpness(image, 1 + amount),
        "posterize": lambda: V.to_dtype(
            V.posterize(V.to_dtype(image, torch.uint8, scale=True), 8 - round(step / 30 * ranges["posterize"])),
            torch.float32,
            scale=True,
        ),
        "solarize": lambda: V.solarize(image, 1 - step / 30),
        "autocontrast": lambda: V.autocontrast(image),
        "equalize": lambda: V.to_dtype(
            V.equalize(V.to_dtype(image, torch.uint8, scale=True)), torch.float32, scale=True
        ),
    }
    return results[name]()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_against_torchvision(name, sign):
    """Translations are compared at a whole number of pixels: torchvision moves by whole pixels only."""
    policy = TrivialAugment()
    batch, step = images(3, height=25, width=25) * 0.8, 14
    batch = (batch * 255).round() / 255
    if name.startswith("translate"):
        policy.ranges = {**policy.ranges, name: (30 / 14) * 4 / 25}
    ours = policy.apply(batch, only(policy, name, 3, step, sign))
    theirs = torch.stack([oracle(name, image, step, sign, policy.ranges, (25, 25)) for image in batch])
    # Bilinear weights at the border are rounded differently there; elsewhere float error.
    torch.testing.assert_close(ours, theirs.clamp(0, 1), atol=2e-3, rtol=0)
    assert name == "identity" or not torch.allclose(ours, batch, atol=0.01)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("autocontrast", "equalize")])
def test_strength_zero_changes_nothing(name):
    batch = images(4, height=9, width=14) * 0.99
    moved = TrivialAugment().apply(batch, only(TrivialAugment(), name, 4, 0))
    torch.testing.assert_close(moved, batch, atol=1e-5, rtol=0)


def test_rotation_on_wide_images_keeps_shapes():
    """A quarter turn of a wide image by hand: the middle square turns, as `torch.rot90` says."""
    policy = TrivialAugment()
    policy.ranges = {**policy.ranges, "rotate": 90.0}
    batch = images(2, height=8, width=14)
    moved = policy.apply(batch, only(policy, "rotate", 2, 30))
    torch.testing.assert_close(moved[..., 3:11], torch.rot90(batch[..., 3:11], 1, (2, 3)), atol=1e-4, rtol=0)
    assert moved[..., :2].abs().max() < 1e-4


def test_grey_images_keep_their_colour_and_constant_ones_their_level():
    grey = images(3, 1)
    policy = RandAugment(1, 30)
    assert torch.equal(policy.apply(grey, only(policy, "colour", 3, 30)), grey)
    flat = torch.full((2, 3, 8, 8), 0.25)
    for name in ("autocontrast", "equalize"):
        torch.testing.assert_close(policy.apply(flat, only(policy, name, 2, 30)), flat)


def test_operations_are_drawn_evenly_and_strengths_as_said():
    many = (14_000, 3, 8, 8)
    draw = TrivialAugment().sample(many, generator=named_generator(4, "draw"))
    counts = torch.bincount(draw["operation"][:, 0], minlength=14)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000)
    assert set(draw["step"].unique().tolist()) == set(range(31))
    assert abs(draw["sign"].mean()) < 0.05
    assert (RandAugment(2, 7).sample(many, generator=named_generator(4, "draw"))["step"] == 7).all()


def test_misuse_is_named():
    with pytest.raises(SettingsError, match="magnitude must be at most 30, got 31"):
        RandAugment(2, 31)
    with pytest.raises(SettingsError, match="num_ops must be at least 1"):
        RandAugment(0)
    policy = RandAugment()
    with pytest.raises(ShapeError, match="RandAugment: expected float"):
        policy.apply(
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8), policy.sample((2, 1, 8, 8), generator=named_generator(0))
        )


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (3, 2)])
@pytest.mark.parametrize("policy", [RandAugment, TrivialAugment])
def test_images_smaller_than_a_filter(policy, size):
    images = torch.rand(300, 3, *size, generator=torch.Generator().manual_seed(0))
    draw = policy().sample(images.shape, generator=torch.Generator().manual_seed(1))
    moved = policy().apply(images, draw)
    assert moved.shape == images.shape
    assert 0 <= moved.min() <= moved.max() <= 1
