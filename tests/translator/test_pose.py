"""Known rotations of real digits are found again, and the draw of the pose translator depends on the image."""

import math

import pytest
import torch
from kornia.geometry.transform import rotate

from gen_invariance.errors import SettingsError
from gen_invariance.experiment.settings import Task
from gen_invariance.experiment.task import prepare
from gen_invariance.nuisance.protocol import Nuisance, select_rows
from gen_invariance.run import named_generator
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.io import load_translator, save_translator
from gen_invariance.translator.redraw.congeal import PoseGrid, congeal
from gen_invariance.translator.redraw.fit import PoseSettings
from gen_invariance.translator.settings import FitSettings


def rotated(degrees, seed=0):
    options = {"degrees": degrees}
    return prepare(
        Task(largest=110, imbalance=22, rest_is_test=True, nuisance="rotation", nuisance_options=options), seed=seed
    )


def circular_error(found, true):
    """Absolute errors in degrees after the best common shift, which no alignment of one class can know."""
    error = torch.deg2rad(found - true)
    shift = torch.atan2(error.sin().mean(), error.cos().mean())
    return torch.rad2deg(torch.atan2((error - shift).sin(), (error - shift).cos())).abs()


@pytest.fixture(scope="module")
def limited():
    """Digits turned within 45 degrees, their head classes, and what congealing says of them."""
    prepared = rotated(45.0)
    rows = [(prepared.train.labels == label).nonzero().squeeze(1) for label in range(10)]
    rows = [own[:50] for own in rows if len(own) >= 20]
    found = congeal([prepared.train.float_images(own) for own in rows], generator=named_generator(0, "test"))
    return prepared, rows, found


def test_congealing_finds_the_angles(limited):
    prepared, rows, found = limited
    for own, degrees in zip(rows, (poses[:, 0] for poses in found.poses), strict=True):
        error = circular_error(degrees, prepared.draws["train"]["degrees"][own])
        assert error.median() < 8, "the grid's step is 7.5 degrees"
        assert error.quantile(0.95) < 30


def test_congealing_learns_the_width_of_a_limited_rotation(limited):
    _, _, found = limited
    spread = torch.cat(found.poses)[:, 0].std()
    assert 45 / math.sqrt(3) * 0.8 < spread < 45 / math.sqrt(3) * 1.2
    assert found.concentration > 0.7
    assert found.density.sum().item() == pytest.approx(1, abs=1e-4)


def test_a_fixed_density_is_kept_and_aligns_small_classes(limited):
    prepared, _, found = limited
    small = [label for label in range(10) if 5 <= int(prepared.train.counts[label]) < 15]
    rows = [(prepared.train.labels == label).nonzero().squeeze(1) for label in small]
    aligned = congeal(
        [prepared.train.float_images(own) for own in rows],
        generator=named_generator(0, "test"),
        density=found.density,
    )
    assert torch.equal(aligned.density, found.density)
    errors = [
        circular_error(degrees, prepared.draws["train"]["degrees"][own]).median()
        for own, degrees in zip(rows, (poses[:, 0] for poses in aligned.poses), strict=True)
    ]
    assert sum(error < 10 for error in errors) >= len(errors) - 1


def test_undoing_a_pose_brings_the_image_back():
    images = rotated(0.0).train.float_images()[:4]
    turned = rotate(images, torch.full((4,), 30.0))
    grid = PoseGrid(step=30.0, scales=(1.0,))
    variants = grid.undone(turned)
    original = torch.nn.functional.normalize((images.flatten(1) - images.flatten(1).mean(1, keepdim=True)), dim=1)
    best = (variants * original[:, None]).sum(2).argmax(1)
    assert grid.angles[best].tolist() == [30.0] * 4
    assert grid.angles[grid.upright // 1].item() == 0


@pytest.fixture(scope="module")
def fitted():
    prepared = rotated(45.0, seed=1)
    return prepared, fit_pose(prepared, steps=150, seed=1)


def fit_pose(prepared, *, seed=0, **settings):
    objective = {"images_per_class": 60}
    return fit_translator(
        "pose", prepared.train, FitSettings(**settings), objective=objective, seed=seed, progress=False
    )


def test_laws(fitted, tmp_path):
    prepared, translator = fitted
    assert isinstance(translator, Nuisance)
    images = prepared.train.float_images()[:12]
    before = images.clone()
    draw = translator.sample(images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = translator.apply(images, draw)
        alone = translator.apply(images[3:5], select_rows(draw, torch.tensor([3, 4])))
    assert torch.equal(images, before)
    assert moved.shape == images.shape
    assert 0 <= moved.min() <= moved.max() <= 1
    torch.testing.assert_close(alone, moved[3:5], atol=1e-5, rtol=0)
    assert translator.apply(images[:0], {"pose": torch.zeros(0, dtype=torch.int64)}).shape == (0, 1, 16, 16)

    save_translator(translator, tmp_path / "translator")
    again = load_translator(tmp_path / "translator")
    with torch.no_grad():
        assert torch.equal(again.apply(images, draw), moved)


def test_the_result_has_the_drawn_pose_whatever_pose_the_image_had(fitted):
    """Turn each image by 20 degrees more: a draw that ignores the image turns the result as well, this one does not."""
    prepared, translator = fitted
    labels = prepared.train.labels
    head = (prepared.train.counts[labels] >= 20) & (prepared.draws["train"]["degrees"].abs() < 20)
    images = prepared.train.float_images(head.nonzero().squeeze(1))
    draw = {"pose": torch.zeros(len(images), dtype=torch.int64)}
    turned = rotate(images, torch.full((len(images),), 20.0))
    with torch.no_grad():
        first, second = translator.apply(images, draw), translator.apply(turned, draw)
        difference = circular_difference(translator.pose(second)[:, 0], translator.pose(first)[:, 0])
    assert difference.median() < 8


def circular_difference(first, second):
    return ((first - second + 180) % 360 - 180).abs()


def test_the_bank_has_the_range_of_the_nuisance(fitted):
    _, translator = fitted
    low, high = translator.bank[:, 0].quantile(torch.tensor([0.025, 0.975])).tolist()
    assert 85.5 * 0.8 < high - low < 85.5 * 1.2, "95 % of a rotation within 45 degrees span 85.5 degrees"
    assert "rotation in degrees" in translator.describe()


def test_uniform_rotation_is_recognised():
    translator = fit_pose(rotated(180.0), steps=1)
    angles = translator.bank[:, 0].sort().values
    uniform = torch.linspace(-180, 180, len(angles))
    distance = (torch.searchsorted(angles, uniform) / len(angles) - torch.linspace(0, 1, len(angles))).abs().max()
    assert distance < 0.1


def test_bad_settings():
    with pytest.raises(SettingsError, match=r"translator.objective.images_per_class must be at least 1, got 0"):
        PoseSettings(images_per_class=0)
    with pytest.raises(SettingsError, match="no class has 5000 images"):
        fit_pose(rotated(45.0), head_from=5000)
