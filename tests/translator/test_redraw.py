"""Tone and stroke width are read as they were put in, and the draw of the redraw translator depends on the image."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.settings import Task
from gen_invariance.experiment.task import prepare
from gen_invariance.nuisance.intensity import Background, Lighting
from gen_invariance.nuisance.protocol import Nuisance, select_rows
from gen_invariance.nuisance.thickness import dilate
from gen_invariance.run import Run, named_generator
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.io import load_translator, save_translator
from gen_invariance.translator.redraw.model import RedrawTranslator, build_redraw
from gen_invariance.translator.redraw.shape import match_width, read_width
from gen_invariance.translator.redraw.tone import extract_figure, guess_kind, put_in, read_tone, take_out
from gen_invariance.translator.settings import FitSettings


def task(nuisance, **options):
    return Task(largest=110, imbalance=22, rest_is_test=True, nuisance=nuisance, nuisance_options=options)


@pytest.fixture(scope="module")
def digits():
    return prepare(task("identity"), seed=0).train


def strokes(width, *, size=24):
    """A vertical bar of this width."""
    images = torch.zeros(1, 1, size, size)
    left = (size - width) // 2
    images[..., 3:-3, left : left + width] = 1
    return images


# ---- tone


levels = st.integers(0, 255).map(lambda level: level / 255)


def soft_bar():
    """A bar six pixels wide whose outer pixels are half as dark as the others."""
    figure = strokes(6)
    figure[..., [9, 14]] *= 0.5
    return figure


@settings(deadline=None, max_examples=40)
@given(ground=levels, ink=levels, channels=st.sampled_from([1, 3]))
def test_levels_of_a_soft_figure_are_read_and_taken_out(ground, ink, channels):
    """Light on dark or dark on light."""
    if abs(ground - ink) < 0.06:
        return
    figure = soft_bar()
    image = (ground + (ink - ground) * figure).expand(1, channels, -1, -1)
    tone = read_tone(image, kind="figure")
    assert tone.ground.flatten().tolist() == pytest.approx([ground] * channels, abs=1e-5)
    assert torch.equal(tone.base, tone.ground)
    assert tone.ink.flatten().tolist() == pytest.approx([ink] * channels, abs=1e-5)
    content = take_out(image, tone, kind="figure")
    torch.testing.assert_close(extract_figure(content, kind="figure"), figure, atol=1e-4, rtol=0)
    torch.testing.assert_close(put_in(content, tone, kind="figure"), image, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=40)
@given(ground=levels, base=levels, ink=levels)
def test_a_figure_that_was_cut_out_keeps_its_rim(ground, base, ink):
    """The faintest pixels lie beyond the ground, or the ground beyond the ink."""
    beyond = (base - ground) * (ink - ground) < 0
    if not beyond or min(abs(base - ground), abs(ink - base), abs(ink - ground)) < 0.06:
        return
    cover, inner = strokes(6), strokes(4)
    image = ground * (1 - cover) + base * (cover - inner) + ink * inner
    tone = read_tone(image, kind="figure")
    read = [float(level) for level in (tone.ground, tone.base, tone.ink)]
    assert read == pytest.approx([ground, base, ink], abs=1e-5)
    content = take_out(image, tone, kind="figure")
    torch.testing.assert_close(content, torch.cat([inner, cover], dim=1), atol=1e-4, rtol=0)
    torch.testing.assert_close(put_in(content, tone, kind="figure"), image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["figure", "photo"])
def test_what_is_taken_out_can_be_put_back(kind, digits):
    images = digits.float_images()[:50]
    images = Background(200).apply(images, Background(200).sample(images.shape, generator=named_generator(0)))
    tone = read_tone(images, kind=kind)
    back = put_in(take_out(images, tone, kind=kind), tone, kind=kind)
    off = (back - images).abs()
    # Of figures what lies above the ink, a mean, is cut, and so is what lies below the base.
    assert off.mean() < (0.02 if kind == "figure" else 1e-5)
    assert (off < 0.1).float().mean() > 0.95


def test_a_figure_knows_nothing_of_its_ground(digits):
    """Two grounds under one figure: the grounds are read exactly, and the figures taken out are nearly the same."""
    images = digits.float_images()[:50]
    figures = []
    for level in (30, 170):
        moved = Background(256).apply(images, {"level": torch.full((50,), level)})
        tone = read_tone(moved, kind="figure")
        assert (tone.ground * 255).round().flatten().tolist() == [level] * 50
        figures.append(extract_figure(take_out(moved, tone, kind="figure"), kind="figure"))
    assert (figures[0] - figures[1]).abs().mean() < 0.04
    assert figures[0].mean() > 0.2


def test_a_noisy_ground_is_still_ground():
    noise = 0.02 * torch.randn(20, 1, 24, 24, generator=named_generator(0))
    images = (0.3 + 0.5 * strokes(4) + noise).clamp(0, 1)
    tone = read_tone(images, kind="figure")
    assert (tone.ground - 0.3).abs().max() < 0.03
    assert (tone.ink - 0.8).abs().max() < 0.06
    cover = take_out(images, tone, kind="figure")[:, 1:]
    assert ((cover > 0) == (strokes(4) > 0)).float().mean() > 0.95


def test_the_ground_of_a_lit_digit_is_read_though_ink_may_be_commoner(digits):
    """Thick strokes, light and another ground at once: the level that the nuisance gave is found."""
    given_task = task("mix")
    prepared = prepare(given_task, seed=2)
    draw = prepared.draws["train"]
    shifted = draw["2.contrast"] * draw["2.brightness"].clamp(min=0)
    lit = shifted.clamp(0, 1) ** draw["2.gamma"]
    true = torch.where(lit > 0.5 / 255, lit, draw["3.level"].float() / 255)
    read = read_tone(prepared.train.float_images(), kind="figure").ground[:, 0]
    assert ((read - true).abs() < 0.03).float().mean() > 0.95


def test_an_empty_image_stays_empty():
    images = torch.full((2, 3, 8, 8), 0.4)
    tone = read_tone(images, kind="figure")
    assert torch.equal(tone.ink, tone.ground)
    torch.testing.assert_close(
        put_in(take_out(images, tone, kind="figure"), tone, kind="figure"), images, atol=2e-3, rtol=0
    )


def test_moments_of_a_photo_are_means_and_deviations():
    images = torch.rand(5, 3, 8, 8, generator=named_generator(0))
    tone = read_tone(images, kind="photo")
    for image, ground, ink in zip(images, tone.ground, tone.ink, strict=True):
        for channel in range(3):
            pixels = image[channel].flatten().numpy()
            assert float(ground[channel]) == pytest.approx(pixels.mean(), abs=1e-6)
            assert float(ink[channel]) == pytest.approx(pixels.mean() + pixels.std(), abs=1e-6)


@pytest.mark.parametrize("nuisance", ["identity", "lighting", "background", "thickness", "mix"])
def test_digits_are_figures(nuisance):
    assert build_redraw(prepare(task(nuisance), seed=3).train, {"parts": ["tone"]}).config.kind == "figure"


def test_noise_is_a_photo():
    assert guess_kind(torch.rand(30, 3, 16, 16, generator=named_generator(0))) == "photo"


# ---- stroke


def test_the_width_of_a_bar_is_read_and_changed():
    widths = [2, 3, 4, 5, 6]
    bars = torch.cat([strokes(width) for width in widths])
    read = read_width(bars)
    assert (read.diff() > 0).all()
    assert read.exp().tolist() == pytest.approx(widths, rel=0.35), "ends of the bar count as outline too"
    wanted = read[torch.tensor([2, 4, 0])]
    changed = match_width(bars[torch.tensor([0, 1, 2])], wanted, extract_figure=lambda content: content)
    assert (read_width(changed) - wanted).abs().max() < 0.1
    # What a dilation reads as is reached by that dilation.
    for side in (2, 3, 4):
        wide = dilate(bars[:2], side)
        torch.testing.assert_close(
            match_width(bars[:2], read_width(wide), extract_figure=lambda content: content), wide
        )


def test_a_thin_stroke_is_not_eroded_away():
    thin = strokes(2)
    kept = match_width(thin, torch.tensor([-5.0]), extract_figure=lambda content: content)
    assert kept.sum() >= 0.3 * thin.sum()
    empty = torch.zeros(2, 1, 8, 8)
    assert torch.equal(match_width(empty, torch.zeros(2), extract_figure=lambda content: content), empty)


# ---- the translator


@pytest.fixture(scope="module")
def fitted():
    """Digits under a strong lighting, and a translator of tone and stroke fitted on them."""
    prepared = prepare(task("lighting", brightness=0.3, contrast=2.0), seed=1)
    network = {"parts": ("tone", "stroke")}
    return prepared, fit_translator("redraw", prepared.train, network=network, seed=1, progress=False)


def test_laws(fitted, tmp_path):
    prepared, translator = fitted
    assert isinstance(translator, Nuisance)
    images = prepared.train.float_images()[:12]
    before = images.clone()
    draw = translator.sample(images.shape, generator=torch.Generator().manual_seed(0))
    moved = translator.apply(images, draw)
    alone = translator.apply(images[3:5], select_rows(draw, torch.tensor([3, 4])))
    assert torch.equal(images, before)
    assert moved.shape == images.shape
    assert 0 <= moved.min() <= moved.max() <= 1
    torch.testing.assert_close(alone, moved[3:5], atol=1e-5, rtol=0)
    assert translator.apply(images[:0], {"row": torch.zeros(0, dtype=torch.int64)}).shape == (0, 1, 16, 16)

    save_translator(translator, tmp_path / "translator")
    again = load_translator(tmp_path / "translator")
    assert torch.equal(again.apply(images, draw), moved)


def test_the_tone_of_the_result_is_the_drawn_one_whatever_the_image_had(fitted):
    prepared, translator = fitted
    images = prepared.split.train.float_images()[:60]
    draw = translator.sample(images.shape, generator=named_generator(0))
    relit = Lighting().apply(images, Lighting().sample(images.shape, generator=named_generator(1)))
    one, other = (read_tone(translator.apply(given, draw), kind="figure") for given in (images, relit))
    assert (one.ground - translator.ground[draw["row"]]).abs().median() < 0.02
    assert (one.ground - other.ground).abs().median() < 0.03
    assert (one.ink - other.ink).abs().median() < 0.06


def test_translated_images_have_the_spread_of_head_images(fitted):
    prepared, translator = fitted
    head = prepared.train.counts[prepared.train.labels] >= 20
    real = read_tone(prepared.train.float_images()[head], kind="figure")
    images = prepared.train.float_images()
    draw = translator.sample(images.shape, generator=named_generator(0))
    made = read_tone(translator.apply(images, draw), kind="figure")
    for levels in (0.1, 0.5, 0.9):
        for part in ("ground", "ink"):
            values = [getattr(tone, part).quantile(levels) for tone in (real, made)]
            assert abs(values[0] - values[1]) < 0.08, (part, levels)


def test_without_a_nuisance_the_tone_stays_still(digits):
    translator = fit_translator("redraw", digits, network={"parts": ["tone"]}, progress=False)
    images = digits.float_images()
    moved = translator.apply(images, translator.sample(images.shape, generator=named_generator(0)))
    assert (moved - images).abs().mean() < 0.05
    assert translator.ground.std() < 0.03


def test_strength_goes_from_nothing_to_all(fitted):
    prepared, translator = fitted
    images = prepared.train.float_images()[:40]
    draw = translator.sample(images.shape, generator=named_generator(0))
    changes = []
    for strength in (0.0, 0.5, 1.0):
        weaker = RedrawTranslator(1, ("tone", "stroke"), translator.config.kind, strength=strength)
        weaker.load_state_dict(translator.state_dict())
        changes.append(float((weaker.apply(images, draw) - images).abs().mean()))
    assert changes[0] == 0
    assert changes[0] < changes[1] < changes[2]


def test_photographs_get_the_moments_of_a_head_image():
    generator = named_generator(0)
    base = torch.rand(80, 3, 12, 12, generator=generator)
    cast = 0.3 * torch.rand(80, 3, 1, 1, generator=generator)
    images = (0.3 * base + 0.3 + cast).mul(255).round().to(torch.uint8)
    data = ImageData(images, torch.arange(80) % 2, class_names=("a", "b"), name="noise")
    translator = fit_translator("redraw", data, network={"bank_size": 64}, progress=False)
    assert translator.config.kind == "photo"
    floats = data.float_images()
    draw = translator.sample(floats.shape, generator=generator)
    made = translator.apply(floats, draw)
    torch.testing.assert_close(made.mean((2, 3)), translator.ground[draw["row"]], atol=0.02, rtol=0)


def test_a_pose_is_taken_from_the_same_head_image_as_the_tone():
    """Bright digits stand upright, dark ones lie: the dependence between the parts survives."""
    plain = prepare(task("identity"), seed=0).train
    largest = plain.counts.argsort(descending=True)[:3]
    plain = plain.subset(torch.isin(plain.labels, largest).nonzero().squeeze(1))
    lying = torch.rand(len(plain), generator=named_generator(0)) < 0.5
    images = plain.float_images()
    images = torch.where(lying[:, None, None, None], 0.4 * images.rot90(1, (2, 3)), images)
    data = replace(plain, images=(images * 255).round().to(torch.uint8))
    network, objective = {"parts": ["tone", "pose"], "kind": "figure"}, {"images_per_class": 25}
    translator = fit_translator(
        "redraw", data, FitSettings(steps=1), network=network, objective=objective, progress=False
    )
    dark = translator.ink[:, 0] < 0.5
    # Which pose is called upright is free, and some shapes can be read both ways.
    angles = torch.deg2rad(translator.pose.bank[:, 0])
    middle = torch.atan2(angles[dark].sin().mean(), angles[dark].cos().mean())
    assert normalized_mutual_info_score(dark, (angles - middle).cos() < 0.7) > 0.4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"parts": ()}, "some of tone, stroke, pose"),
        ({"parts": ("colours",)}, "some of tone, stroke, pose"),
        ({"parts": ("colour",)}, "figures have no colour; choose of tone, stroke"),
        ({"kind": "drawing"}, "kind must be one of"),
        ({"kind": "photo"}, "photographs have no stroke; choose of tone, colour"),
        ({"kind": "photo", "parts": ("geometry",), "geometry": "guessed"}, "geometry must be one of auto, read"),
        ({"strength": 1.5}, "strength"),
    ],
)
def test_bad_settings_are_named(bad, message):
    with pytest.raises(SettingsError, match=message):
        RedrawTranslator(1, **bad)


def test_no_head_class_is_named(digits):
    with pytest.raises(SettingsError, match="no class has 500"):
        fit_translator("redraw", digits, FitSettings(head_from=500), network={"parts": ["tone"]})


def test_of_several_processes_the_first_one_writes(digits, tmp_path, monkeypatch):
    """All fit the same; two that write have each line of the metrics twice, and meet at the rename of the result."""
    fitted = {}
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        run = Run(tmp_path / rank, kind="fit", seed=3)
        fitted[rank] = fit_translator("pose", digits, FitSettings(steps=2, batch_size=8), out=run, progress=False)
        written = [(run.path / "translator").exists(), (run.path / "samples").exists(), bool(run.metrics())]
        assert written == [rank == "0"] * 3
    for name, weight in fitted["0"].state_dict().items():
        assert torch.equal(weight, fitted["1"].state_dict()[name])
