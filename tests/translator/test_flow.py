"""The flow translator: the laws of a nuisance, strength, Euler steps against closed forms, saving and loading."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.contrib.pipeline import TranslationPipeline
from gen_invariance.errors import CheckpointError, SettingsError, ShapeError
from gen_invariance.nuisance.protocol import Nuisance, select_rows
from gen_invariance.translator.flow.model import FlowTranslator, choose_levels, integrate
from gen_invariance.translator.io import load_translator, save_translator


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def made(channels=1, **options):
    """An untrained one with a bank of random styles."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        translator = FlowTranslator(channels, **{"width": 8, "bank_size": 16, **options})
        translator.bank.normal_()
    return translator.eval().requires_grad_(False)


def images(count=5, channels=1, height=16, width=16):
    return torch.rand(count, channels, height, width, generator=seeded(1))


@pytest.mark.parametrize(
    ("channels", "size", "options"),
    [
        (1, (16, 16), {}),
        (3, (32, 32), {"levels": 3}),
        (1, (28, 28), {"patch": 1}),
        (3, (19, 22), {}),  # padded and cropped
        (1, (64, 64), {"levels": 4, "removes": ("tone", "sign", "colour", "thickness")}),
    ],
)
def test_laws_of_a_nuisance(channels, size, options):
    translator, source = made(channels, **options), images(5, channels, *size)
    before, state = source.clone(), torch.random.get_rng_state()
    draw = translator.sample(source.shape, generator=seeded())
    moved = translator.apply(source, draw)
    assert isinstance(translator, Nuisance)
    assert moved.shape == source.shape
    assert moved.dtype == source.dtype
    assert 0 <= moved.min() <= moved.max() <= 1
    assert torch.equal(translator.apply(source, draw), moved)
    assert torch.equal(source, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    alone = translator.apply(source[1:3], select_rows(draw, torch.tensor([1, 2])))
    torch.testing.assert_close(alone, moved[1:3], atol=1e-5, rtol=0)
    again = translator.sample(source.shape, generator=seeded())
    assert all(torch.equal(value, again[name]) for name, value in draw.items())
    assert not torch.equal(translator.sample(source.shape, generator=seeded(1))["noise"], draw["noise"])
    assert all(len(value) == len(source) for value in draw.values())


def test_no_images_and_wrong_images():
    translator = made()
    draw = translator.sample((0, 1, 16, 16), generator=seeded())
    assert translator.apply(torch.zeros(0, 1, 16, 16), draw).shape == (0, 1, 16, 16)
    with pytest.raises(ShapeError, match="flow translator: expected 1 channel"):
        translator.apply(images(2, 3), draw)
    small = images(2, 1, 3, 3)
    with pytest.raises(ShapeError, match="flow translator: images must have at least 4 pixels"):
        translator.apply(small, translator.sample(small.shape, generator=seeded()))


def test_half_precision_of_the_network_stays_inside():
    translator, source = made(), images()
    draw = translator.sample(source.shape, generator=seeded())
    full = translator.apply(source, draw)
    half = translator.to(torch.bfloat16).apply(source, draw)
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.02
    assert translator.apply(source.to(torch.bfloat16), draw).dtype == torch.bfloat16


def test_style_decides_and_rows_with_one_draw_share_it():
    translator, source = made(), images()
    draw = translator.sample(source.shape, generator=seeded())
    other = {**draw, "style": (draw["style"] + 1) % 16}
    assert not torch.allclose(translator.apply(source, draw), translator.apply(source, other), atol=1e-4)
    # An image's own brightness and tone curve, and its sign up to noise, are not seen: only the style tells them.
    relit = translator.apply(0.5 * source.square() + 0.1, draw)
    torch.testing.assert_close(relit, translator.apply(source, draw), atol=1e-4, rtol=0)


def test_strength_zero_is_the_image_itself_and_more_strength_moves_more():
    translator, source = made(), images()
    draw = translator.sample(source.shape, generator=seeded())
    none = translator.apply(source, draw, strength=0)
    assert torch.equal(none, source)
    assert none is not source
    translator.end = lambda x, time, view, style: x  # an untrained network moves anywhere; this one stays on its path
    moves = [float((translator.apply(source, draw, strength=s) - source).abs().mean()) for s in (0.0, 0.2, 0.6, 1.0)]
    assert moves == sorted(moves)
    assert moves[1] > 0


def test_half_strength_starts_half_way_in_a_style_between():
    translator, source = made(), images()
    draw, seen = translator.sample(source.shape, generator=seeded()), {}

    def end(x, time, view, style):
        seen.setdefault("start", (x, time, style))
        return x

    translator.end = end
    translator.apply(source, draw, strength=0.25)
    start, time, style = seen["start"]
    torch.testing.assert_close(start, 0.75 * (2 * source - 1) + 0.25 * draw["noise"][:, 0])
    assert torch.equal(time, torch.full((5,), 0.25))
    torch.testing.assert_close(style, 0.75 * translator.style(source) + 0.25 * translator.bank[draw["style"]])


def test_the_configs_steps_and_strength_are_the_defaults():
    source = images()
    draw = made().sample(source.shape, generator=seeded())
    expected = made().apply(source, draw, strength=0.4, steps=3)
    assert torch.equal(made(strength=0.4, steps=3).apply(source, draw), expected)
    assert not torch.equal(made().apply(source, draw), expected)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"strength": 1.1}, {"strength": -0.1}, {"strength": float("nan")}])
def test_bad_steps_and_strength(bad):
    source = images()
    with pytest.raises(SettingsError, match="steps must be at least 1 and strength in"):
        FlowTranslator(1, width=8, **bad)
    translator = made()
    with pytest.raises(SettingsError, match="steps must be at least 1 and strength in"):
        translator.apply(source, translator.sample(source.shape, generator=seeded()), **bad)
    with pytest.raises(SettingsError, match="removes"):
        FlowTranslator(1, width=8, removes=("shape",))


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(-2, 2), start=st.floats(0.1, 1), steps=st.integers(1, 6))
def test_euler_on_a_linear_field_is_its_closed_form(rate, start, steps):
    x = torch.tensor([1.0, -0.5], dtype=torch.float64)
    found = integrate(lambda x, time: rate * x, x, start=start, steps=steps)
    torch.testing.assert_close(found, x * (1 - rate * start / steps) ** steps)


def test_many_euler_steps_meet_the_exact_flow():
    """dx/dt = a x + t from t = 1 to 0 has the solution below; the error falls as 1 / steps."""
    a, x = 0.7, torch.tensor([2.0], dtype=torch.float64)
    constant = x + (1 + 1 / a) / a  # x(t) = C exp(a (t - 1)) - (t + 1 / a) / a
    exact = constant * torch.tensor(-a, dtype=torch.float64).exp() - 1 / a**2
    errors = [float((integrate(lambda x, t: a * x + t, x, steps=steps) - exact).abs()) for steps in (50, 100, 200)]
    assert errors[2] < 0.005
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_euler_is_that_of_diffusers(steps):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    field = torch.linspace(-1, 1, 6).view(1, 6)
    x = torch.randn(1, 6, generator=seeded())

    def velocity(x, time):
        return torch.sin(x) * field + time

    expected = x
    for time in scheduler.timesteps:
        expected = scheduler.step(velocity(expected, float(time) / 1000), time, expected).prev_sample
    torch.testing.assert_close(integrate(velocity, x, steps=steps), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_network_that_knows_the_end_gets_there_in_any_number_of_steps(steps):
    translator, source = made(), images()
    target = images(5) * 0.8 + 0.1
    translator.end = lambda x, time, view, style: target * 2 - 1
    draw = translator.sample(source.shape, generator=seeded())
    torch.testing.assert_close(translator.apply(source, draw, steps=steps), target, atol=1e-5, rtol=0)


def test_levels_suit_the_size():
    found = {size: choose_levels(size, patch=2) for size in (16, 28, 32, 64, 128)}
    assert found == {16: 2, 28: 2, 32: 3, 64: 4, 128: 4}
    assert choose_levels(8, patch=2) == 2
    assert choose_levels(16, patch=1) == 3


def test_saved_and_opened_it_gives_the_same_bits(tmp_path):
    translator, source = made(3, removes=("tone", "colour"), strength=0.8), images(channels=3)
    save_translator(translator, tmp_path / "translator")
    again = load_translator(tmp_path)
    draw = translator.sample(source.shape, generator=seeded())
    assert isinstance(again, FlowTranslator)
    assert again.config.strength == 0.8
    assert tuple(again.config.removes) == ("tone", "colour")
    assert torch.equal(again.apply(source, draw), translator.apply(source, draw))
    assert not again.training


def test_a_pipeline_with_strength(tmp_path):
    pipeline, source = TranslationPipeline(made()), images()
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(pipeline(source, strength=0.0, generator=seeded())[:, 0], source)
    half = pipeline(source, strength=0.5, num_draws=2, generator=seeded())
    assert half.shape == (5, 2, 1, 16, 16)
    pipeline.save_pretrained(tmp_path)
    again = TranslationPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(source, strength=0.5, num_draws=2, generator=seeded()), half)


@pytest.fixture
def saved(tmp_path):
    save_translator(made(), tmp_path / "translator")
    return tmp_path / "translator"


def test_tampered_checkpoints_are_named_in_one_line(saved):
    weights, config = saved / "diffusion_pytorch_model.safetensors", saved / "config.json"
    content, written = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot load the translator in") as cut:
        load_translator(saved)
    weights.write_bytes(content)
    config.write_text(json.dumps({**written, "style_dim": 9}))
    with pytest.raises(CheckpointError, match="cannot load the translator in") as other:
        load_translator(saved)
    config.write_text(json.dumps({**written, "removes": ["everything"]}))
    with pytest.raises(CheckpointError, match="removes must be some of") as unknown:
        load_translator(saved)
    assert not any("\n" in str(caught.value) for caught in (cut, other, unknown))
    config.write_text(json.dumps(written))
    load_translator(saved)
