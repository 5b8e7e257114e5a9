"""What a GPU computes in place of kornia and of linear algebra gives what those give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kornia.geometry.transform import rotate, translate, warp_affine

from gen_invariance.nuisance.thickness import Thickness
from gen_invariance.nuisance.warp import _written_out_inverse, turned, warp_written_out
from gen_invariance.run import named_generator
from gen_invariance.translator.redraw import photo, spectra


def pictures(count=6, channels=3, height=9, width=14):
    return torch.rand(count, channels, height, width, generator=named_generator(0, "pictures"))


numbers = st.floats(-1.5, 1.5, width=32)


MODES = st.sampled_from(["bilinear", "bicubic"])


@given(st.tuples(numbers, numbers, numbers, numbers), st.tuples(numbers, numbers), MODES)
def test_the_written_out_warp_is_kornias(linear, shift, mode):
    matrix = torch.tensor(linear).view(1, 2, 2)
    matrix = matrix + 2 * torch.eye(2) if abs(float(torch.linalg.det(matrix))) < 0.1 else matrix
    full = torch.cat([matrix, 4 * torch.tensor(shift).view(1, 2, 1)], dim=2)
    if abs(float(torch.linalg.det(full[:, :, :2]))) < 0.1:
        return
    images = pictures(1)
    expected = warp_affine(images, full, (9, 14), mode=mode, padding_mode="zeros", align_corners=True)
    torch.testing.assert_close(warp_written_out(images, full, mode=mode), expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(_written_out_inverse(full[:, :, :2]), torch.linalg.inv(full[:, :, :2]))


def test_turns_and_shifts_are_kornias():
    images, degrees = pictures(), torch.tensor([0.0, 13.0, -90.0, 45.0, 179.0, -7.0])
    how = {"padding_mode": "zeros", "align_corners": True}
    turned_images = warp_written_out(images, turned(degrees, images), mode="bicubic")
    torch.testing.assert_close(turned_images, rotate(images, degrees, mode="bicubic", **how), atol=5e-5, rtol=0)
    way = torch.tensor([[0.0, 0.0], [1.5, -2.0], [3.0, 0.5], [-4.0, 4.0], [0.1, 0.2], [20.0, 0.0]])
    still = torch.eye(2).expand(6, 2, 2)
    moved = warp_written_out(images, torch.cat([still, way[:, :, None]], dim=2))
    torch.testing.assert_close(moved, translate(images, way, **how), atol=5e-5, rtol=0)


@pytest.mark.parametrize("nuisance", [Thickness(), Thickness(dilate_sides=(1, 3), erode_sides=(1,))])
def test_every_operation_on_every_image_is_each_on_its_own(nuisance):
    images = pictures(40)
    draw = nuisance.sample(images.shape, generator=named_generator(1))
    assert torch.equal(nuisance._apply_all(images, draw), nuisance.apply(images, draw))


def covariances(count=50):
    factors = torch.randn(count, 3, 3, generator=named_generator(2)) * torch.tensor([0.3, 0.1, 0.02])
    return factors.transpose(1, 2) @ factors + 9e-4 * torch.eye(3)


def test_roots_by_products_are_those_of_eigenvalues():
    matrices = covariances()
    for found, expected in zip(spectra.roots(matrices), photo._roots(matrices), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_eigenvalues_are_clamped_by_products():
    values = torch.linspace(0.02, 9, 50)[:, None] * torch.tensor([0.1, 0.7, 1.0])
    turns = torch.linalg.qr(torch.randn(50, 3, 3, generator=named_generator(3))).Q
    matrices = (turns * values[:, None]) @ turns.transpose(1, 2)
    found = spectra.clamped(matrices, 0.25, 4.0)
    torch.testing.assert_close(found, photo._clamped(matrices, 0.25, 4.0), atol=2e-2, rtol=0)
    assert (found - photo._clamped(matrices, 0.25, 4.0)).abs().mean() < 1e-3


def test_colour_is_given_alike(monkeypatch):
    images, mean = pictures(20), torch.full((20, 3), 0.4)
    expected = photo.give_colour(images, mean, covariances(20), 0.8)
    monkeypatch.setattr(photo, "_roots", spectra.roots)
    monkeypatch.setattr(photo, "_clamped", spectra.clamped)
    torch.testing.assert_close(photo.give_colour(images, mean, covariances(20), 0.8), expected, atol=5e-3, rtol=0)
