"""Every hand-written nuisance against the protocol's laws and against OpenCV / Pillow one image at a time."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.build import NUISANCES, build_nuisance
from gen_invariance.nuisance.compose import Compose, Identity, transform_once
from gen_invariance.nuisance.geometry import CropFlip, Rotation
from gen_invariance.nuisance.intensity import Background, Lighting
from gen_invariance.nuisance.protocol import Nuisance, select_rows
from gen_invariance.nuisance.thickness import Thickness, dilate, erode


def real_digits(count=64, channels=1):
    ink = torch.from_numpy(load_digits().images[:count]).float() / 16
    images = torch.nn.functional.interpolate(ink[:, None], size=(28, 28), mode="bilinear")
    return (images.repeat(1, channels, 1, 1) * 255).round() / 255


ALL = sorted(NUISANCES)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_laws(name, channels):
    nuisance, images = build_nuisance(name), real_digits(channels=channels)
    assert isinstance(nuisance, Nuisance)
    before, global_state = images.clone(), torch.random.get_rng_state()
    draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(1))
    moved = nuisance.apply(images, draw)

    assert torch.equal(images, before)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    assert all(len(value) == len(images) for value in draw.values())
    assert moved.shape == images.shape
    assert moved.dtype == images.dtype
    assert 0 <= moved.min() <= moved.max() <= 1
    assert torch.equal(moved, nuisance.apply(images, draw)), "the same draw must give the same output"
    again = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(draw[key], again[key]) for key in draw)
    if name != "identity":
        assert (moved - images).abs().amax((1, 2, 3)).gt(1e-3).float().mean() > 0.5

    rows = torch.tensor([5, 3, 40])
    alone = nuisance.apply(images[rows], select_rows(draw, rows))
    torch.testing.assert_close(alone, moved[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [0, 1])
def test_batch_of_none_and_one(name, count):
    nuisance, images = build_nuisance(name), real_digits(1)[:count]
    draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(1))
    assert nuisance.apply(images, draw).shape == (count, 1, 28, 28)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_stays_half(name):
    nuisance, images = build_nuisance(name), real_digits(4).bfloat16()
    draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(1))
    assert nuisance.apply(images, draw).dtype == torch.bfloat16


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("ours", "theirs"), [(dilate, cv2.dilate), (erode, cv2.erode)])
def test_morphology_equals_opencv(ours, theirs, side):
    images = real_digits(32)
    pixels = (images * 255).round().to(torch.uint8)[:, 0].numpy()
    expected = np.stack([theirs(image, np.ones((side, side), np.uint8)) for image in pixels])
    got = (ours(images, side) * 255).round().to(torch.uint8)[:, 0].numpy()
    np.testing.assert_array_equal(got, expected)


def test_thickness_follows_its_draw():
    images = real_digits(200)
    nuisance = Thickness()
    draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
    moved = nuisance.apply(images, draw)
    for row in range(0, 200, 17):
        kernel = np.ones((int(draw["side"][row]),) * 2, np.uint8)
        operation = cv2.dilate if draw["dilate"][row] else cv2.erode
        expected = operation((images[row, 0] * 255).round().byte().numpy(), kernel)
        np.testing.assert_array_equal((moved[row, 0] * 255).round().byte().numpy(), expected)


def test_background_equals_the_pixel_loop():
    images, nuisance = real_digits(16), Background()
    draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
    moved = (nuisance.apply(images, draw) * 255).round()
    pixels = (images * 255).round()
    for row in range(16):
        level = int(draw["level"][row])
        expected = [[level if value == 0 else value for value in line] for line in pixels[row, 0].tolist()]
        assert moved[row, 0].tolist() == expected


def test_a_colour_pixel_is_ground_only_where_all_channels_are_0():
    images = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.25, 0.0], [0.0, 0.0, 1.0]]).view(1, 3, 1, 3).requires_grad_()
    moved = Background().apply(images, {"level": torch.tensor([51])})
    expected = images.detach().clone()
    expected[0, :, 0, 0] = 0.2  # the only pixel that is black in all three
    assert torch.equal(moved, expected)
    assert torch.equal(torch.autograd.grad(moved.sum(), images)[0], torch.ones_like(images))


@pytest.mark.parametrize("angle", [0, 90, -90, 180])
def test_right_angles_are_exact(angle):
    images = real_digits(8)
    turned = Rotation().apply(images, {"degrees": torch.full((8,), float(angle))})
    torch.testing.assert_close(turned, torch.rot90(images, angle // 90, (2, 3)), atol=2e-5, rtol=0)


def test_rotation_is_close_to_pillow():
    images = real_digits(32)
    nuisance = Rotation(180)
    draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(3))
    moved = nuisance.apply(images, draw)[:, 0].numpy() * 255
    pixels = (images[:, 0] * 255).byte().numpy()
    for row, angle in enumerate(draw["degrees"].tolist()):
        expected = np.asarray(Image.fromarray(pixels[row]).rotate(angle, resample=Image.Resampling.BICUBIC), float)
        # Pillow's cubic has another constant and another border, so only the bulk of the pixels agree.
        assert np.abs(moved[row] - expected).mean() < 4
        assert np.corrcoef(moved[row].ravel(), expected.ravel())[0, 1] > 0.97


@settings(max_examples=30, deadline=None)
@given(b=st.floats(-0.5, 0.5), c=st.floats(0.3, 3), g=st.floats(0.3, 3), x=st.floats(0, 1))
def test_lighting_is_its_formula(b, c, g, x):
    draw = {"brightness": torch.tensor([b]), "contrast": torch.tensor([c]), "gamma": torch.tensor([g])}
    got = Lighting().apply(torch.full((1, 1, 1, 1), x), draw).item()
    expected = min(max(c * min(max(x + b, 0), 1), 0) ** g, 1)
    assert got == pytest.approx(expected, abs=2e-3)


def test_ranges_of_draws(generator):
    draw = Compose([Rotation(30), Background(10), Lighting(brightness=0.1)]).sample((500, 1, 8, 8), generator=generator)
    assert draw["0.degrees"].abs().max() <= 30
    assert draw["0.degrees"].abs().max() > 28
    assert set(draw["1.level"].tolist()) == set(range(10))
    assert draw["2.brightness"].abs().max() <= 0.1


def test_identity_returns_a_copy():
    images = real_digits(2)
    assert Identity().apply(images, {}).data_ptr() != images.data_ptr()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rotation", {"degrees": 200}),
        ("rotation", {"mode": "cubic"}),
        ("rotation", {"degress": 20}),
        ("background", {"levels": 0}),
        ("lighting", {"gamma": 0.5}),
        ("thickness", {"dilate_sides": ()}),
        ("crop_flip", {"padding": -1}),
        ("crop_flip", {"pading": 2}),
        ("fog", {}),
    ],
)
def test_bad_settings_are_named(name, options):
    with pytest.raises(SettingsError, match=name):
        build_nuisance(name, **options)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 12, 17)])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_flip_equals_slicing_each_image(channels, height, width, padding):
    images = torch.rand(40, channels, height, width, generator=torch.Generator().manual_seed(0))
    nuisance = CropFlip(padding)
    draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(1))
    moved = nuisance.apply(images, draw)
    for row, image in enumerate(images.numpy()):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        top, left = draw["corner"][row].tolist()
        crop = padded[:, top : top + height, left : left + width]
        expected = crop[:, :, ::-1] if draw["mirror"][row] else crop
        np.testing.assert_array_equal(moved[row].numpy(), expected)


def test_crop_flip_draws_every_corner_and_mirrors_half(generator):
    draw = CropFlip(2).sample((4000, 1, 8, 8), generator=generator)
    assert {tuple(corner) for corner in draw["corner"].tolist()} == {(y, x) for y in range(5) for x in range(5)}
    assert abs(draw["mirror"].float().mean() - 0.5) < 5 * (0.25 / 4000) ** 0.5
    assert not CropFlip(2, flip=False).sample((1000, 1, 8, 8), generator=generator)["mirror"].any()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("rotation", {"degrees": 30}, {"degrees": 30, "mode": "bicubic"}),
        ("crop_flip", {"padding": 2, "flip": False}, {"padding": 2, "flip": False}),
        ("thickness", {"dilate_sides": [2, 3]}, {"dilate_sides": (2, 3), "erode_sides": (1, 2)}),
    ],
)
def test_options_reach_the_nuisance(name, options, expected):
    built = vars(build_nuisance(name, **options))
    assert {key: built[key] for key in expected} == expected


def stored_digits(count):
    return ImageData(to_uint8(real_digits(count)), torch.arange(count) % 10, tuple("0123456789"), name="digits")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_transform_once_moves_each_image_by_its_own_draw(name, chunk):
    data, nuisance = stored_digits(20), build_nuisance(name)
    before = data.images.clone()
    moved, draw = transform_once(data, nuisance, generator=torch.Generator().manual_seed(2), chunk=chunk)
    assert torch.equal(data.images, before)
    assert torch.equal(moved.labels, data.labels)
    assert (moved.class_names, moved.name) == (data.class_names, data.name)
    for row in range(20):
        one = torch.tensor([row])
        alone = nuisance.apply(data.float_images(one), select_rows(draw, one))
        # Rounding to 8 bits may fall either way where float rounding differs.
        assert (moved.images[one].int() - to_uint8(alone).int()).abs().max() <= 1


def test_transform_once_with_identity_gives_the_same_pixels():
    data = stored_digits(20)
    moved, _ = transform_once(data, Identity(), generator=torch.Generator())
    assert moved.digest == data.digest


@pytest.mark.parametrize("name", ALL)
def test_transform_once_of_an_empty_set(name):
    empty = stored_digits(3).subset(torch.zeros(0, dtype=torch.int64))
    moved, draw = transform_once(empty, build_nuisance(name), generator=torch.Generator().manual_seed(0))
    assert moved.images.shape == (0, 1, 28, 28)
    assert all(len(value) == 0 for value in draw.values())
