"""The learned widths: what a draw does in closed form, that widths have gradients, and that fitting finds them."""

import functools
import math

import pytest
import torch
from sklearn.datasets import load_digits

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.protocol import Nuisance, select_rows
from gen_invariance.run import named_generator
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.discern import tell_apart
from gen_invariance.translator.quality.measures import kolmogorov_distance
from gen_invariance.translator.quality.verdict import DO_NOT, read_verdict
from gen_invariance.translator.settings import FitSettings
from gen_invariance.translator.spatial import CAPS, SpatialObjective, SpatialSettings, SpatialTranslator


def real_digits(count=None, size=16):
    """Digits inside a circle, so that turning them cuts nothing off."""
    ink = torch.from_numpy(load_digits().images[:count]).float()[:, None] / 16
    small = torch.nn.functional.interpolate(ink, size=(12, 12), mode="bilinear", align_corners=False)
    return torch.nn.functional.pad(small, ((size - 12) // 2,) * 4)


def alone(operation, share):
    return SpatialTranslator(operations=(operation,), start=share)


def test_draws_are_uniform_and_repeatable():
    translator = SpatialTranslator()
    draws = [translator.sample((5000, 1, 8, 8), generator=named_generator(0))["u"] for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].shape == (5000, 4)
    assert draws[0].min() >= -1
    assert draws[0].max() < 1
    torch.testing.assert_close(draws[0].std(0), torch.full((4,), 3**-0.5), atol=0.02, rtol=0)


def test_from_draw_to_parameters():
    """Each parameter is share * cap * u; scale and gain are the exponentials of theirs."""
    translator = SpatialTranslator()
    translator.width_shares.data = torch.tensor([0.5, 0.25, 1.0, 0.1])
    values = translator.read_parameters({"u": torch.tensor([[1.0, 1.0, 1.0, 1.0], [-0.5, 0.0, -1.0, 0.5]])})
    assert values["rotation"].tolist() == pytest.approx([90, -45])
    assert values["scale"].tolist() == pytest.approx([1.6**0.25, 1])
    assert values["gain"].tolist() == pytest.approx([2, 0.5])
    assert values["bias"].tolist() == pytest.approx([0.04, 0.02])


def test_widths_are_held_between_nothing_and_the_cap():
    translator = SpatialTranslator()
    translator.width_shares.data = torch.tensor([-0.3, 0.5, 1.7, 0.0])
    assert translator.widths() == pytest.approx(
        {"rotation": 0, "scale": CAPS["scale"] / 2, "gain": CAPS["gain"], "bias": 0}
    )


def test_description_is_readable():
    translator = SpatialTranslator(operations=("rotation", "gain", "bias"), start=0.5)
    assert translator.describe().splitlines() == [
        "rotation: uniform in [-90, 90] degrees",
        "gain: uniform in [0.707, 1.41] factor",
        "bias: uniform in [-0.2, 0.2] pixel units",
    ]


def test_no_width_changes_nothing():
    images = real_digits(8)
    translator = SpatialTranslator(start=0.0)
    moved = translator.apply(images, translator.sample(images.shape, generator=named_generator(0)))
    torch.testing.assert_close(moved, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("turns", [-2, -1, 1, 2])
def test_quarter_turns_are_exact_and_counter_clockwise(turns):
    images = real_digits(8)
    turned = alone("rotation", 1.0).apply(images, {"u": torch.full((8, 1), turns / 2)})
    torch.testing.assert_close(turned, torch.rot90(images, turns, (2, 3)), atol=1e-4, rtol=0)


def test_rotation_is_that_of_the_hand_written_nuisance():
    images = real_digits(16)
    u = torch.rand(16, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = alone("rotation", 0.5).apply(images, {"u": u})
    torch.testing.assert_close(ours, Rotation(90, mode="bilinear").apply(images, {"degrees": 90 * u[:, 0]}))


def test_scale_enlarges_about_the_centre():
    """Twice the side of a centred square is four times its area; the cap is undone to reach a factor of 2."""
    images = torch.zeros(1, 1, 32, 32)
    images[..., 12:20, 12:20] = 1
    translator = alone("scale", 1.0)
    for factor in (1.5, 1 / 1.5):
        moved = translator.apply(images, {"u": torch.tensor([[math.log(factor) / CAPS["scale"]]])})
        assert moved.sum().item() == pytest.approx(64 * factor**2, rel=0.08)
        torch.testing.assert_close(moved, moved.flip(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(moved, moved.flip(3), atol=1e-5, rtol=0)


def test_gain_and_bias_by_formula():
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    translator = SpatialTranslator(channels=3, operations=("gain", "bias"), start=1.0)
    draw = translator.sample(images.shape, generator=named_generator(0))
    u = draw["u"].view(5, 2, 1, 1, 1)
    expected = (images * 2 ** u[:, 0] + 0.4 * u[:, 1]).clamp(0, 1)
    torch.testing.assert_close(translator.apply(images, draw), expected)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 30, 17), (1, 1, 1)])
def test_laws_of_a_nuisance(channels, height, width):
    translator = SpatialTranslator(channels=channels, start=0.5).eval().requires_grad_(False)
    images = torch.rand(9, channels, height, width, generator=torch.Generator().manual_seed(0))
    assert isinstance(translator, Nuisance)
    before, state = images.clone(), torch.random.get_rng_state()
    draw = translator.sample(images.shape, generator=named_generator(0))
    moved = translator.apply(images, draw)
    assert moved.shape == images.shape
    assert moved.dtype == images.dtype
    assert 0 <= moved.min() <= moved.max() <= 1
    assert torch.equal(moved, translator.apply(images, draw))
    assert torch.equal(images, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    rows = torch.tensor([4, 0, 7])
    torch.testing.assert_close(translator.apply(images[rows], select_rows(draw, rows)), moved[rows], atol=1e-6, rtol=0)
    assert translator.apply(images[:0], select_rows(draw, torch.zeros(0, dtype=torch.int64))).shape[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_comes_back(dtype):
    images = real_digits(4)
    translator = SpatialTranslator(start=0.5)
    draw = translator.sample(images.shape, generator=named_generator(0))
    assert translator.apply(images.to(dtype), draw).dtype == dtype
    half = translator.to(torch.bfloat16)
    assert half.apply(images.to(dtype), draw).dtype == dtype


@pytest.mark.parametrize("operation", CAPS)
def test_every_width_has_a_gradient(operation):
    """Against a finite difference, so that neither the warp nor the clamp cuts it off."""
    images = real_digits(16).double() * 0.5 + 0.2
    translator = alone(operation, 0.3).double()
    draw = translator.sample(images.shape, generator=named_generator(0))
    target = torch.rand(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(share):
        translator.width_shares.data.fill_(share)
        return ((translator.apply(images, draw) - target) ** 2).mean()

    loss(0.3).backward()
    slope = translator.width_shares.grad.item()
    with torch.no_grad():
        numeric = (loss(0.301) - loss(0.299)).item() / 0.002
    assert abs(slope) > 1e-4
    assert slope == pytest.approx(numeric, rel=0.1, abs=1e-4)


def test_terms_of_the_objective():
    objective = SpatialObjective(SpatialTranslator(), SpatialSettings(bonus=0.25, noise=0.0))
    images = real_digits(6)
    out = objective.forward(images, objective.sample(images.shape, generator=named_generator(0)))
    terms = {**objective.discriminator_terms(out), **objective.translator_terms(out)}
    judged = {name: objective.discriminator(out[name]) for name in ("real", "fake")}
    expected = ((judged["real"] - 1) ** 2).mean() + (judged["fake"] ** 2).mean()
    torch.testing.assert_close(terms["discriminator"], expected)
    torch.testing.assert_close(terms["adversarial"], ((judged["fake"] - 1) ** 2).mean())
    assert terms["width_bonus"].item() == pytest.approx(-0.25 * 4 * 0.1)
    assert (out["real"] - images).abs().mean() > 0.005, "the adversary must see a blurred original"


def test_the_bonus_pushes_widths_up_and_projection_keeps_them_legal():
    objective = SpatialObjective(SpatialTranslator(start=1.0), SpatialSettings(learning_rate=0.5))
    images = real_digits(6)
    draw = objective.sample(images.shape, generator=named_generator(0))
    objective.translator.width_shares.data = torch.tensor([1.4, -0.2, 0.5, 1.0])
    objective.forward(images, draw)
    assert objective.translator.width_shares.tolist() == [1.0, 0.0, 0.5, 1.0]
    objective.translator_terms({"fake": images})["width_bonus"].backward()
    assert (objective.translator.width_shares.grad < 0).all(), "also at the ends of the range"


@pytest.mark.parametrize("operations", [(), ("shear",), ("rotation", "rotation"), "rotation"])
def test_bad_families_are_named(operations):
    with pytest.raises(SettingsError, match="operations must be some of rotation, scale, gain, bias"):
        SpatialTranslator(operations=operations)


def test_wrong_channels_are_named():
    translator = SpatialTranslator(channels=3)
    with pytest.raises(ShapeError, match="spatial translator: expected 3"):
        translator.apply(real_digits(2), translator.sample((2,), generator=named_generator(0)))


def test_round_trip_keeps_the_learned_widths(tmp_path):
    translator = SpatialTranslator(operations=("gain", "rotation"), start=0.3)
    translator.width_shares.data = torch.tensor([0.123, 0.987])
    translator.save_pretrained(tmp_path)
    again = SpatialTranslator.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert again.operations == ("gain", "rotation")
    assert again.widths() == translator.widths()


def learned_rotation(images, folder, *, steps):
    labels = torch.from_numpy(load_digits().target[: len(images)]).long()
    data = ImageData(to_uint8(images), labels, tuple("0123456789"))
    settings = FitSettings(steps=steps, batch_size=64, sample_every=steps, checkpoint_every=steps)
    network = {"operations": ("rotation",)}
    return fit_translator("spatial", data, settings, network=network, out=folder, progress=False).widths()["rotation"]


@pytest.mark.slow
def test_learns_wide_rotation_on_turned_digits_and_none_on_upright_ones(tmp_path):
    upright = real_digits(600)
    nuisance = Rotation(180)
    turned = nuisance.apply(upright, nuisance.sample(upright.shape, generator=named_generator(0)))
    wide = learned_rotation(turned, tmp_path / "turned", steps=200)
    narrow = learned_rotation(upright, tmp_path / "upright", steps=200)
    assert wide > 120, "uniform rotation runs to the cap of 180 degrees"
    assert narrow < 30, "the false width of the control"


# ---- widths at their limits


@pytest.fixture
def quick_look(monkeypatch):
    monkeypatch.setattr("gen_invariance.translator.spatial.tell_apart", functools.partial(tell_apart, steps=30))


def digits_data(images):
    return ImageData(
        to_uint8(images), torch.from_numpy(load_digits().target[: len(images)]).long(), tuple("0123456789")
    )


def turned_digits(count=240):
    images, nuisance = real_digits(count), Rotation(180)
    return nuisance.apply(images, nuisance.sample(images.shape, generator=named_generator(0)))


def concluded(images, **shares):
    objective = SpatialObjective(SpatialTranslator(operations=tuple(shares)))
    objective.translator.width_shares.data = torch.tensor(list(shares.values()))
    changed = objective.conclude(digits_data(images), torch.arange(len(images)), generator=named_generator(0))
    assert changed == bool(objective.translator.not_identified)
    return objective.translator


def test_a_limit_that_the_images_hold_stays_and_another_is_left_out(quick_look):
    """Digits at every angle are turned by every angle; they are not twice as bright or half as bright."""
    found = concluded(turned_digits(), rotation=1.0, gain=0.99, bias=0.5)
    assert found.widths() == pytest.approx({"rotation": 180, "gain": 0, "bias": 0.2})
    assert list(found.not_identified) == ["gain"]
    lines = found.describe().splitlines()
    assert lines[0] == "rotation: uniform in [-180, 180] degrees"
    assert lines[1].startswith("gain: not identified, left out")
    assert "gain (AUC" in found.unidentified
    assert "rotation" not in found.unidentified


def test_nothing_identified_is_the_identity(quick_look, tmp_path):
    images = real_digits(150)
    found = concluded(images, rotation=1.0)
    draw = found.sample(images.shape, generator=named_generator(1))
    torch.testing.assert_close(found.apply(images, draw), images, atol=1e-5, rtol=0)
    with pytest.raises(SettingsError, match=r"does nothing.*Not identified: rotation"):
        found.to_kornia()
    found.save_pretrained(tmp_path)
    assert load_translator(tmp_path).describe() == found.describe()
    verdict = read_verdict(tmp_path)
    assert verdict.word == DO_NOT
    assert verdict.reasons == (found.unidentified,)
    assert read_verdict(alone("gain", 1.0).save_pretrained(tmp_path / "other") or tmp_path / "other") is None


def test_a_fit_that_ends_at_a_limit_says_so(quick_look, tmp_path):
    settings = FitSettings(steps=1, batch_size=16, classes="all")
    network = {"operations": ("rotation",), "start": 1.0}
    fitted = fit_translator(
        "spatial", digits_data(real_digits(100)), settings, network=network, out=tmp_path, progress=False
    )
    assert "not identified" in fitted.describe()
    assert (tmp_path / "samples" / "kept.png").is_file(), "the last step shows another translator"
    assert read_verdict(tmp_path).word == DO_NOT


# ---- as plain kornia


def learned(**shares):
    translator = SpatialTranslator(operations=tuple(shares))
    translator.width_shares.data = torch.tensor(list(shares.values()))
    return translator


def drawn_by_kornia(pipeline, count):
    """Angle, scale, gain and bias of `count` images, and what became of the images."""
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        moved = pipeline(images)
    found = [each.data for each in pipeline._params]
    values = {
        "rotation": found[0]["angle"],
        "scale": found[0]["scale"][:, 0],
        "gain": found[1]["contrast_factor"],
        "bias": found[2]["brightness_factor"] - 1,
    }
    return images, moved, values


def test_kornia_draws_what_was_learned():
    """Angles and shifts have the translator's distribution; factors its range, evenly instead of log-evenly."""
    translator, count = learned(rotation=0.25, scale=0.5, gain=0.8, bias=0.3), 4000
    _, _, kornia = drawn_by_kornia(translator.to_kornia(), count)
    ours = translator.read_parameters(translator.sample((count,), generator=named_generator(0)))
    ours = {name: value.detach() for name, value in ours.items()}
    expected = 0.8687 * (2 / count) ** 0.5  # mean Kolmogorov distance of two samples of one distribution
    for name in ("rotation", "bias"):
        assert kolmogorov_distance(kornia[name], ours[name]) < 2.5 * expected, name
    for name in ("scale", "gain"):
        low, high = math.exp(-translator.widths()[name]), math.exp(translator.widths()[name])
        even = torch.linspace(low, high, count)
        assert kolmogorov_distance(kornia[name], even) < 2.5 * expected, name
        assert kornia[name].median() > ours[name].median() + 0.02, "which is why the docstring warns"
    for name, value in kornia.items():
        order = torch.arange(count).float()
        assert abs(torch.corrcoef(torch.stack([value, order]))[0, 1]) < 5 / count**0.5, f"{name}: rows are not alike"


def test_kornia_does_to_images_what_the_translator_does():
    """With the numbers that kornia drew; its angles turn the other way, which a symmetric range does not show."""
    translator = learned(rotation=0.25, scale=0.5, gain=0.8, bias=0.3)
    images, moved, values = drawn_by_kornia(translator.to_kornia(), 64)
    widths = translator.widths()
    u = [
        values["rotation"] / widths["rotation"],
        values["scale"].log() / widths["scale"],
        values["gain"].log() / widths["gain"],
        values["bias"] / widths["bias"],
    ]
    exact = [translator.apply(images, {"u": torch.stack([sign * u[0], *u[1:]], dim=1)}).detach() for sign in (1, -1)]
    assert min((each - moved).abs().max().item() for each in exact) < 1e-4


@pytest.mark.parametrize(
    "shares",
    [{"rotation": 0.5}, {"scale": 0.3, "gain": 0.2}, {"bias": 0.7}, {"bias": 0.2, "rotation": 0.1, "gain": 0.4}],
)
def test_code_to_paste_makes_the_same_pipeline(shares):
    translator, scope = learned(**shares), {}
    code = translator.kornia_code()
    exec(code, scope)
    assert "gen_invariance" not in code
    images, moved = real_digits(8), []
    for pipeline in (scope["augment"], translator.to_kornia()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            moved.append(pipeline(images))
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], images)
    assert 0 <= moved[0].min() <= moved[0].max() <= 1


def test_a_translator_that_does_nothing_has_no_kornia_form():
    with pytest.raises(SettingsError, match="all its widths are 0"):
        SpatialTranslator(start=0.0).to_kornia()
