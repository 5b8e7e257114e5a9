"""Which operations the data show, and that slant and place are read and drawn."""

import pytest
import torch
from kornia.geometry.transform import get_rotation_matrix2d, warp_affine
from scipy import ndimage

from gen_invariance.errors import SettingsError
from gen_invariance.experiment.settings import Task
from gen_invariance.experiment.task import prepare
from gen_invariance.nuisance.geometry import Shear, Translation
from gen_invariance.run import named_generator
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.redraw.congeal import PoseGrid, congeal, move_by, pose_matrix
from gen_invariance.translator.redraw.model import RedrawTranslator, build_redraw
from gen_invariance.translator.redraw.parts import measure_spreads
from gen_invariance.translator.redraw.shape import move_to_centre, read_place
from gen_invariance.translator.settings import FitSettings

FAST = {"settings": FitSettings(steps=60), "objective": {"images_per_class": 40}, "progress": False}


def digits(nuisance, **options):
    task = Task(largest=110, imbalance=22, rest_is_test=True, nuisance=nuisance, nuisance_options=options)
    return prepare(task, seed=3)


@pytest.mark.parametrize(
    ("nuisance", "options", "shown"),
    [
        # What is not shown: strokes by shears, slants and places by lighting; the guard of turns is on in rotation.
        pytest.param("identity", {}, (), marks=pytest.mark.slow),
        ("rotation", {}, ()),
        ("shear", {}, ("slant",)),
        pytest.param("translation", {}, ("place",), marks=pytest.mark.slow),
        pytest.param("thickness", {}, ("stroke",), marks=pytest.mark.slow),
        pytest.param("background", {"levels": 200}, ("stroke",), marks=pytest.mark.slow),
        ("lighting", {}, ("stroke",)),
    ],
)
def test_an_operation_takes_part_where_the_data_show_it(nuisance, options, shown):
    assert build_redraw(digits(nuisance, **options).train).config.parts == ("tone", "pose", *shown)


def test_spreads_of_one_class_of_equal_images_are_zero():
    images = torch.zeros(6, 1, 16, 16)
    images[:, :, 4:12, 6:9] = 1
    assert measure_spreads(images, torch.zeros(6, dtype=torch.int64)) == pytest.approx(
        {"stroke": 0, "slant": 0, "place": 0}, abs=1e-6
    )


def test_the_place_of_a_figure_is_its_centre_of_mass():
    figures = torch.rand(5, 1, 9, 12, generator=named_generator(0))
    for figure, place in zip(figures, read_place(figures), strict=True):
        row, column = ndimage.center_of_mass(figure[0].numpy())
        assert place.tolist() == pytest.approx([(column + 0.5) / 12 - 0.5, (row + 0.5) / 9 - 0.5], abs=1e-6)
    blot = torch.zeros(1, 1, 16, 16)
    blot[..., 2:5, 9:12] = 1
    assert read_place(move_to_centre(blot, read_place(blot)))[0].abs().max() < 1e-6
    assert torch.equal(read_place(torch.zeros(2, 1, 4, 4)), torch.zeros(2, 2))


def test_poses_are_what_their_matrices_say():
    """Turning and growing as by kornia, leaning as by the nuisance, and points go where they should."""
    images = torch.rand(4, 1, 15, 15, generator=named_generator(0))
    degrees, scale, slope = torch.tensor([0.0, 30, -75, 170]), torch.tensor([1.0, 1.2, 0.8, 1]), torch.zeros(4)
    turned = move_by(images, pose_matrix(torch.stack([degrees, scale.log(), slope], dim=1)))
    middle = torch.full((4, 2), 7.0)
    by_kornia = get_rotation_matrix2d(middle, degrees, scale[:, None].expand(4, 2))
    expected = warp_affine(images, by_kornia, (15, 15), padding_mode="zeros", align_corners=True)
    torch.testing.assert_close(turned, expected, atol=1e-4, rtol=0)
    lean = torch.tensor([0.4, -0.2, 0.0, 0.3])
    leant = move_by(images, pose_matrix(torch.stack([slope, slope, lean], dim=1)), mode="bicubic").clamp(0, 1)
    torch.testing.assert_close(leant, Shear().apply(images, {"slope": lean}), atol=1e-4, rtol=0)
    dot = torch.zeros(1, 1, 15, 15)
    dot[..., 3, 4] = 1
    quarter = pose_matrix(torch.tensor([[90.0, 0, 0]]))
    moved = move_by(dot, quarter, source=read_place(dot), target=torch.tensor([[2 / 15, -3 / 15]]))
    assert (moved[0, 0] > 0.99).nonzero().tolist() == [[7 - 3, 7 + 2]]


def test_shears_are_read():
    prepared = digits("shear", slope=0.5)
    labels, true = prepared.train.labels, prepared.draws["train"]["slope"]
    head = prepared.train.counts.argsort(descending=True)[:3].tolist()
    rows = [(labels == label).nonzero()[:40, 0] for label in head]
    images = [prepared.train.float_images(own) for own in rows]
    found = congeal(images, generator=named_generator(0), grid=PoseGrid(slopes=(-0.5, -0.25, 0.0, 0.25, 0.5)))
    for own, poses in zip(rows, found.poses, strict=True):
        assert torch.corrcoef(torch.stack([poses[:, 2], true[own]]))[0, 1] > 0.85


@pytest.mark.parametrize(("nuisance", "part"), [(Shear(0.5), "slant"), (Translation(0.15), "place")])
def test_what_the_image_has_is_taken_out(nuisance, part, tmp_path):
    """The same draw given to an image and to that image leant or shifted further comes out nearly the same."""
    prepared = digits("shear" if part == "slant" else "translation")
    translator = fit_translator("redraw", prepared.train, network={"parts": ["pose", part]}, **FAST)
    plain = prepared.split.train.float_images()[:80]
    other = nuisance.apply(plain, nuisance.sample(plain.shape, generator=named_generator(1)))
    draw = translator.sample(plain.shape, generator=named_generator(0))
    before = (plain - other).abs().mean()
    after = (translator.apply(plain, draw) - translator.apply(other, draw)).abs().mean()
    assert after < 0.75 * before
    words = translator.describe()
    assert ("slant" if part == "slant" else "place across") in words


def test_the_drawn_place_is_reached(tmp_path):
    prepared = digits("translation", share=0.1)
    translator = fit_translator("redraw", prepared.train, network={"parts": ["place"]}, **FAST)
    images = prepared.split.train.float_images()[:60]
    draw = translator.sample(images.shape, generator=named_generator(0))
    wanted = translator.place[draw["row"]]
    assert (read_place(translator.apply(images, draw)) - wanted).abs().median() < 0.02
    assert wanted.std(0).min() > 0.03
    half = RedrawTranslator(1, ("place",), strength=0.5)
    half.load_state_dict(translator.state_dict())
    there = read_place(half.apply(images, draw))
    assert (there - (read_place(images) + wanted) / 2).abs().median() < 0.02


def test_slant_needs_the_pose():
    with pytest.raises(SettingsError, match="add pose to parts"):
        RedrawTranslator(1, ("tone", "slant"))


def test_shift_and_shear_of_nothing_change_nothing():
    images = digits("identity").train.float_images()[:5]
    zero = torch.zeros(5)
    still = Translation().apply(images, {"across": zero, "down": zero})
    torch.testing.assert_close(still, images, atol=1e-6, rtol=0)
    torch.testing.assert_close(Shear().apply(images, {"slope": zero}), images, atol=1e-5, rtol=0)
    moved = Translation().apply(images, {"across": torch.full((5,), 2 / 16), "down": torch.full((5,), -1 / 16)})
    torch.testing.assert_close(moved[..., :-1, 2:], images[..., 1:, :-2], atol=1e-6, rtol=0)
    with pytest.raises(SettingsError, match=r"share must be in"):
        Translation(2.0)
    with pytest.raises(SettingsError, match="slope must be in"):
        Shear(-1)
    with pytest.raises(SettingsError, match="slope must be a finite number"):
        Shear(float("inf"))
