"""Photographs: each part gives what was drawn, geometry is read where there is some, nothing blank is ever emitted."""

import json
from dataclasses import replace

import cv2
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import select_rows
from gen_invariance.run import named_generator
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.io import load_translator, save_translator
from gen_invariance.translator.redraw import photo
from gen_invariance.translator.redraw.geometry import LIMITS, draw_around, move_photo, pose_to_matrix
from gen_invariance.translator.redraw.guard import LEAST_CONTRAST, MOST_CLIPPED, measure_contrast
from gen_invariance.translator.redraw.model import PARTS, PHOTO_PARTS, RedrawTranslator
from gen_invariance.translator.redraw.photo_parts import split_variance
from gen_invariance.translator.redraw.register import register
from gen_invariance.translator.redraw.tone import guess_kind
from gen_invariance.translator.settings import FitSettings

BLUR = photo.blur_for(32)


def textures(count, *, size=(32, 32), channels=3, seed=0, smooth=1.5):
    """Smooth coloured noise within [.1, .9], no two alike: photographs of nothing."""
    noise = torch.randn(count, channels, *size, generator=named_generator(seed, "textures"))
    blurred = torch.from_numpy(ndimage.gaussian_filter(noise.numpy(), (0, 0, smooth, smooth), mode="reflect"))
    flat = blurred - blurred.mean((2, 3), keepdim=True)
    return (0.5 + 0.12 * flat / flat.std((2, 3), keepdim=True)).clamp(0.1, 0.9)


def signs(count, *, classes=2, seed=0, spread=1.0):
    """Discs and bars in a drawn pose, light and blur, before textures: what registration can align."""
    generator = named_generator(seed, "signs")
    across, down = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="xy")
    x, y = (across - 31.5) / 32, (down - 31.5) / 32
    disc = ((x.square() + y.square()) < 0.4).float()
    marks = [(x.abs() < 0.12).float(), ((y + 0.5 * x).abs() < 0.12).float(), ((x - y).abs() < 0.12).float()]
    labels = torch.arange(count) % classes
    shapes = torch.stack([0.2 + 0.7 * disc * (1 - mark) for mark in marks[:classes]])[labels][:, None]
    poses = spread * draw_around(count, generator=generator) * torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    moved = move_photo(shapes, poses) + 0.4 * (textures(count, size=(64, 64), channels=1, seed=seed, smooth=6) - 0.5)
    light = 0.5 + 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    images = F.avg_pool2d((light * moved).clamp(0, 1), 2).expand(-1, 3, -1, -1)
    names = tuple("abc"[:classes])
    return ImageData((255 * images).round().to(torch.uint8).contiguous(), labels, names, "signs"), poses


def fill(translator, images, *, seed=0):
    """A translator whose bank holds readings of `images`, a row each."""
    own = {part: photo.read_part(images, part, blur=BLUR) for part in photo.READINGS if part in translator.config.parts}
    mean, deviation = images.mean((2, 3)), images.std((2, 3), correction=0)
    given = {"ground": mean, "base": mean, "ink": mean + deviation, **own}
    if "geometry" in translator.config.parts:
        given["relative_pose"] = draw_around(len(images), generator=named_generator(seed, "around"))
    for name, values in given.items():
        getattr(translator, name).copy_(values)
    return translator.eval()


SMALL = {"kind": "photo", "bank_size": 64}
ALL = ("colour", "contrast", "light", "sharpness", "noise", "geometry", "flip")
TONE = ("tone", *ALL[1:])


# ---- readings against other libraries


def test_readings_are_those_of_other_libraries():
    images = textures(4)
    grey = images.mean(1)
    for number, image in enumerate(images):
        covariance = torch.cov(image.flatten(1), correction=0)
        torch.testing.assert_close(photo.read_part(images, "colour", blur=BLUR)[number], covariance, atol=1e-6, rtol=0)
        standard = stats.zscore(grey[number].flatten().numpy())
        quantiles = torch.tensor([torch.tensor(standard).quantile(level) for level in photo.LEVELS])
        found = photo.read_part(images, "contrast", blur=BLUR)[number]
        torch.testing.assert_close(found, quantiles.float(), atol=1e-4, rtol=0)
        rest = image - torch.from_numpy(
            ndimage.gaussian_filter(image.numpy(), (0, 32 * BLUR, 32 * BLUR), mode="nearest", truncate=2.5)
        )
        share = float(rest.square().mean().sqrt() / measure_contrast(image[None])[0])
        assert float(photo.read_part(images, "sharpness", blur=BLUR)[number].exp()) == pytest.approx(share, rel=0.02)


def test_noise_is_read_where_the_image_is_flat():
    """What was added is read, also where half of the image is textured."""
    flat = torch.full((1, 1, 64, 64), 0.5)
    noisy = flat + 0.05 * torch.randn(flat.shape, generator=named_generator(0))
    read = float(photo.read_part(noisy, "noise", blur=BLUR))
    assert read == pytest.approx(0.05, rel=0.25)
    half = noisy.clone()
    half[..., 32:] += 0.2 * torch.randn(1, 1, 64, 32, generator=named_generator(1))
    assert float(photo.read_part(half, "noise", blur=BLUR)) == pytest.approx(0.05, rel=0.35)
    assert float(photo.read_part(flat, "noise", blur=BLUR)) == 0


# ---- what is given


def test_what_was_drawn_is_what_the_image_then_has():
    images, drawn = textures(30), textures(30, seed=1, smooth=2.5).square()
    mean, covariance = drawn.mean((2, 3)), photo.read_part(drawn, "colour", blur=BLUR)
    coloured = photo.give_colour(images, mean, covariance, 1.0)
    torch.testing.assert_close(coloured.mean((2, 3)), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(photo.read_part(coloured, "colour", blur=BLUR), covariance, atol=2e-3, rtol=0)
    for part, give in (("contrast", photo.give_contrast), ("light", photo.give_light)):
        target = photo.read_part(drawn, part, blur=BLUR)
        before = (photo.read_part(images, part, blur=BLUR) - target).abs().mean()
        after = (photo.read_part(give(images, target, 1.0), part, blur=BLUR) - target).abs().mean()
        assert after < 0.35 * before, part


@pytest.mark.parametrize("smooth", [0.8, 1.8])
def test_sharpness_is_reached_by_blurring_and_by_sharpening(smooth):
    images, drawn = textures(20), textures(20, seed=1, smooth=smooth)
    target = photo.read_part(drawn, "sharpness", blur=BLUR)
    given_ = photo.read_part(photo.give_sharpness(images, target, 1.0, blur=BLUR), "sharpness", blur=BLUR)
    own = photo.read_part(images, "sharpness", blur=BLUR)
    assert ((given_ - own) * (target - own) > 0).all(), "the right way"
    assert (given_ - target).abs().max() < (0.01 if smooth == 1.8 else 0.8 * (own - target).abs().max())


def test_noise_is_added_and_never_taken():
    images, seeds = textures(6, smooth=4), torch.arange(6)
    still = photo.give_noise(images, torch.zeros(6), seeds, 1.0)
    assert torch.equal(still, images)
    noisy = photo.give_noise(images, torch.full((6,), 0.05), seeds, 1.0)
    added = noisy - images
    assert float(added.std()) == pytest.approx(0.05, rel=0.1)
    assert stats.kstest((added[:, 0] / added[:, 0].std()).flatten().numpy(), "norm").pvalue > 0.001
    assert (torch.corrcoef(added[:, 0].flatten(1)) - torch.eye(6)).abs().max() < 0.15, "each row has its own"


def test_the_curve_of_contrast_is_monotone():
    """The order of pixels stays, and so do their colours less their luminance."""
    images, drawn = textures(3), textures(3, seed=1).square()
    moved = photo.give_contrast(images, photo.read_part(drawn, "contrast", blur=BLUR), 1.0)
    for one, image in zip(moved, images, strict=True):
        assert stats.spearmanr(one.mean(0).flatten(), image.mean(0).flatten()).statistic > 0.9999
    casts = [each - each.mean(1, keepdim=True) for each in (moved, images)]
    torch.testing.assert_close(*casts, atol=1e-5, rtol=0)
    assert (moved - images).abs().max() > 0.01


# ---- geometry


def test_poses_are_those_of_a_matrix_logarithm():
    from scipy.linalg import logm

    poses = draw_around(5, generator=named_generator(0))
    for pose, matrix in zip(poses, pose_to_matrix(poses), strict=True):
        log = torch.from_numpy(logm(matrix.double().numpy())).float()
        assert log[0, 2].item() == pytest.approx(pose[0].item(), abs=1e-4)
        assert log[1, 0].item() == pytest.approx((pose[3] + pose[5]).item(), abs=1e-4)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), height=st.sampled_from([24, 40]), width=st.sampled_from([24, 40]))
def test_a_move_is_undone_by_its_negative_and_means_the_same_at_every_size(seed, height, width):
    images = textures(2, size=(height, width), seed=seed, smooth=3)
    poses = draw_around(2, generator=named_generator(seed))
    assert torch.allclose(move_photo(images, torch.zeros(2, 8)), images, atol=1e-4)
    back = move_photo(move_photo(images, poses), -poses)
    inner = (slice(None), slice(None), slice(height // 3, -height // 3), slice(width // 3, -width // 3))
    assert (back - images)[inner].abs().max() < 0.06
    large = F.interpolate(images, scale_factor=2, mode="bilinear")
    small = F.avg_pool2d(move_photo(large, poses), 2)
    assert (small - move_photo(F.avg_pool2d(large, 2), poses)).abs().mean() < 0.01


def test_registration_finds_a_known_pose():
    images = textures(40, smooth=3)
    poses = draw_around(40, generator=named_generator(0))
    found, before, after = register(images, (0.3 + 0.6 * move_photo(images, poses)).clamp(0, 1))
    assert (found - poses).abs().median(0).values.max() < 0.02
    assert (after > before).all()
    assert (found.abs() <= LIMITS).all()


def test_geometry_is_read_where_images_of_a_class_can_be_aligned():
    data, poses = signs(120)
    network = {"kind": "photo", "bank_size": 128}
    translator = fit_translator("redraw", data, network=network, progress=False)
    assert "geometry" in translator.config.parts
    assert translator.config.geometry == "read"
    # The difference of two independent poses has twice the variance of one.
    assert torch.allclose(translator.relative_pose.std(0)[:4], 2**0.5 * poses.std(0)[:4], rtol=0.4)
    images = data.float_images()
    none = ImageData((255 * textures(120)).to(torch.uint8), data.labels, ("a", "b"), "textures")
    other = fit_translator("redraw", none, network=network, progress=False)
    assert "geometry" not in other.config.parts
    assert any(note.startswith("geometry is left out: pairs aligned 0.") for note in other.config.notes)
    asked = fit_translator("redraw", none, network={**network, "parts": ["tone", "geometry"]}, progress=False)
    assert asked.config.geometry == "around"
    assert asked.relative_pose.abs().max() > 0.1
    with pytest.raises(SettingsError, match=r"set translator\.network\.geometry=around"):
        fit_translator(
            "redraw",
            replace(none.subset(torch.arange(0, 120, 2)), groups=torch.zeros(60, dtype=torch.int64)),
            network={**network, "parts": ["geometry"], "geometry": "read"},
            progress=False,
        )
    assert images.shape == (120, 3, 32, 32)


# ---- which parts


def test_share_between_classes_is_the_intraclass_correlation():
    generator = named_generator(0)
    labels = torch.arange(40).repeat_interleave(25)
    for between, within in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0)):
        means = between * torch.randn(40, 1, generator=generator)
        values = means[labels] + within * torch.randn(1000, 1, generator=generator)
        spread, share = split_variance(values, labels)
        assert spread == pytest.approx(within, rel=0.1)
        assert share == pytest.approx(between**2 / (between**2 + within**2), abs=0.12)


def test_tracks_are_no_independent_witnesses():
    """Five tracks a class that differ, twenty equal images each: by images alone classes seem to differ."""
    generator = named_generator(0)
    groups = torch.arange(20).repeat_interleave(20)
    labels = groups // 5
    values = torch.randn(20, 1, generator=generator)[groups]
    assert split_variance(values, labels)[1] > 2 * split_variance(values, labels, groups)[1]


def test_what_tells_classes_apart_is_left_out():
    """Dark and light classes keep their light; red and blue ones their colour."""
    images = textures(200)
    labels = torch.arange(200) % 2
    images = images * torch.rand(200, 3, 1, 1, generator=named_generator(1)).mul(0.2).add(0.8)
    varied = (0.6 + 0.4 * torch.rand(200, 1, 1, 1, generator=named_generator(0))) * images
    dark = torch.where(labels.bool()[:, None, None, None], varied, 0.3 * varied)
    red = varied * torch.stack([torch.tensor([1, 0.5, 0.5]), torch.tensor([0.5, 0.5, 1])])[labels][:, :, None, None]
    found = {}
    for name, values in (("plain", varied), ("dark", dark), ("red", red)):
        data = ImageData((255 * values).round().to(torch.uint8), labels, ("a", "b"), name)
        found[name] = fit_translator("redraw", data, network=SMALL, progress=False).config
    assert {"tone", "colour"} & set(found["plain"].parts)
    assert not {"tone", "colour"} & set(found["dark"].parts) or found["dark"].strength == 0
    assert "colour" not in found["red"].parts
    assert any(note.startswith("tone is left out: spread within classes") for note in found["dark"].notes)


# ---- kinds


def test_a_picture_on_a_plain_ground_is_a_photo_where_the_reading_would_lose_it():
    """The border is plain, what is inside has colours that lie on no line."""
    inside = F.pad(torch.rand(40, 3, 12, 12, generator=named_generator(0)), (6,) * 4, value=1.0)
    assert guess_kind(inside) == "photo"
    assert guess_kind(inside.mean(1, keepdim=True)) == "figure"


# ---- the translator


@pytest.mark.parametrize("parts", [TONE, ALL])
def test_laws_of_photographs(parts, tmp_path):
    translator = fill(
        RedrawTranslator(3, parts, "photo", bank_size=16, notes=("tone takes part",)), textures(16, seed=1)
    )
    images = textures(12, size=(40, 56))
    before, state = images.clone(), torch.get_rng_state()
    draw = translator.sample(images.shape, generator=torch.Generator().manual_seed(0))
    moved = translator.apply(images, draw)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert moved.shape == images.shape
    assert 0 <= moved.min() <= moved.max() <= 1
    alone = translator.apply(images[3:5], select_rows(draw, torch.tensor([3, 4])))
    torch.testing.assert_close(alone, moved[3:5], atol=1e-5, rtol=0)
    assert translator.apply(images[:0], select_rows(draw, torch.zeros(0, dtype=torch.int64))).shape == (0, 3, 40, 56)
    save_translator(translator, tmp_path / "translator")
    again = load_translator(tmp_path / "translator")
    assert torch.equal(again.apply(images, draw), moved)
    assert again.describe() == translator.describe()
    assert again.describe().endswith("tone takes part")


@pytest.mark.parametrize("part", PHOTO_PARTS)
def test_strength_of_photographs_goes_from_nothing_to_all(part):
    images, bank = textures(40), textures(16, seed=1, smooth=2.5).square()
    changes = []
    for strength in (0.0, 0.3, 1.0):
        translator = fill(RedrawTranslator(3, (part,), "photo", bank_size=16, strength=strength), bank)
        draw = translator.sample(images.shape, generator=named_generator(0))
        changes.append(float((translator.apply(images, draw) - images).abs().mean()))
    assert changes[0] == 0
    assert 0 < changes[1] < changes[2] or part == "noise"


def test_readings_of_small_images_are_given_to_large_ones():
    """The same image at three times the size becomes the same image at three times the size."""
    large = textures(8, size=(96, 96), smooth=5)
    small = F.avg_pool2d(large, 3)
    translator = fill(
        RedrawTranslator(3, (*TONE[:4], "geometry"), "photo", bank_size=16), textures(16, seed=1, smooth=2)
    )
    draw = translator.sample(small.shape, generator=named_generator(0))
    shrunk = F.avg_pool2d(translator.apply(large, draw), 3)
    moved = translator.apply(small, draw)
    assert (shrunk - moved).abs().mean() < 0.2 * (moved - small).abs().mean()


def test_mirrored_by_half_where_the_data_allow_it():
    data, _ = signs(60)
    fitted = [
        fit_translator("redraw", data, FitSettings(flip=flip), network=SMALL, progress=False).config.parts
        for flip in (True, False)
    ]
    assert "flip" in fitted[0]
    assert "flip" not in fitted[1]
    translator = RedrawTranslator(3, ("flip",), "photo", bank_size=4)
    images = textures(400)
    moved = translator.apply(images, translator.sample(images.shape, generator=named_generator(0)))
    mirrored = (moved == images.flip(3)).flatten(1).all(1)
    assert ((moved == images).flatten(1).all(1) ^ mirrored).all()
    assert 160 < mirrored.sum() < 240


def test_a_fit_says_what_it_found(tmp_path):
    data, _ = signs(60)
    once, again = (
        fit_translator("redraw", data, out=tmp_path / name, network=SMALL, progress=False) for name in ("once", "again")
    )
    facts = json.loads((tmp_path / "once" / "run.json").read_text())["facts"]
    assert facts["parts"] == list(once.config.parts)
    assert facts["notes"] == list(once.config.notes)
    assert {note.split()[0] for note in facts["notes"]} == {"tone", *ALL[:-1]}
    loaded = load_translator(tmp_path / "once")
    assert loaded.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("part", [part for part in PARTS if part not in PHOTO_PARTS])
def test_parts_of_the_other_kind_are_refused(part):
    with pytest.raises(SettingsError, match=f"photographs have no {part}"):
        RedrawTranslator(3, (part,), "photo")


# ---- nothing blank, nothing burnt out


@st.composite
def hostile_images(draw):
    """Noise, textures, near-blank, black and white images, pixels on a ground, a ramp."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    channels, count = draw(st.sampled_from([1, 3])), 6
    noise = torch.rand(count, channels, 12, 12, generator=generator)
    level = torch.rand(count, channels, 1, 1, generator=generator)
    return draw(
        st.sampled_from(
            [
                noise,
                (noise > 0.5).float(),
                (level + 0.02 * (noise - 0.5)).clamp(0, 1),
                torch.where(noise > 0.9, noise, level),
                level * torch.linspace(0, 1, 12).expand_as(noise),
                F.pad(noise[..., 3:9, 3:9], (3,) * 4),
                (noise.round() * level).clamp(0, 1),
            ]
        )
    )


@settings(deadline=None, max_examples=60)
@given(
    images=hostile_images(), drawn=hostile_images(), kind=st.sampled_from(["figure", "photo"]), seed=st.integers(0, 99)
)
def test_no_translation_is_blank_or_burnt_out(images, drawn, kind, seed):
    """Each result keeps contrast, and pixels within [0, 1], or is the image."""
    channels = images.shape[1]
    drawn = drawn[:, :1].expand(-1, channels, -1, -1)
    if kind == "photo":
        parts = ALL if seed % 2 else TONE
        translator = fill(RedrawTranslator(channels, parts, kind, bank_size=6), drawn, seed=seed)
        levels = drawn.std((2, 3), correction=0).square().mean(1).sqrt()
    else:
        translator = RedrawTranslator(channels, ("tone", "stroke", "place"), kind, bank_size=6).eval()
        low, high = drawn.amin((2, 3)), drawn.amax((2, 3))
        translator.ground.copy_(low)
        translator.base.copy_(low)
        translator.ink.copy_(high)
        translator.log_width.copy_(torch.rand(6, generator=named_generator(seed)))
        translator.place.copy_(0.1 * torch.randn(6, 2, generator=named_generator(seed)))
        levels = (high - low).amax(1)  # of which a figure may have any share
    draw = translator.sample(images.shape, generator=named_generator(seed))
    moved = translator.apply(images, draw)
    assert moved.isfinite().all()
    same = (moved == images).flatten(1).all(1)
    least = torch.minimum(measure_contrast(images), levels[draw["row"]]) * LEAST_CONTRAST
    if kind == "photo":
        least = least * 0.25  # a result that went a quarter of the way, or less noise, has less to show
        extreme = [((each <= 0) | (each >= 1)).any(1).float().mean((1, 2)) for each in (moved, images)]
        # What overshoots by less than a thousandth ends at 0 or 1 as well, and the guard does not count it.
        assert (same | (extreme[0] <= extreme[1].clamp(min=MOST_CLIPPED) + 0.15)).all()
        assert (same | (measure_contrast(moved) >= least - 1e-4)).all()
    else:
        assert (same | (measure_contrast(moved) > 1e-3) | (least < 0.02)).all()


def test_blank_results_go_back_to_the_image():
    """Signs read as figures became one colour; now what cannot be rebuilt stays as it is."""
    images = textures(40)
    translator = RedrawTranslator(3, ("tone",), "figure", bank_size=4)
    translator.ink.copy_(translator.ground + 0.001)  # a bank of blank images
    moved = translator.apply(images, translator.sample(images.shape, generator=named_generator(0)))
    assert (measure_contrast(moved) > 0.02).all() or torch.equal(moved, images)


def test_a_sign_survives():
    """Thresholded by OpenCV (Otsu) it covers what it covered."""
    data, _ = signs(40, spread=0.3)
    images = data.float_images()
    translator = fill(RedrawTranslator(3, ("tone", "contrast", "light", "sharpness"), "photo", bank_size=40), images)
    moved = translator.apply(images, translator.sample(images.shape, generator=named_generator(0)))
    agree = []
    for one, other in zip(*((255 * each.mean(1)).byte().numpy() for each in (images, moved)), strict=True):
        shapes = [cv2.threshold(each, 0, 1, cv2.THRESH_OTSU)[1] for each in (one, other)]
        agree.append((shapes[0] == shapes[1]).mean())
    assert sum(agree) / len(agree) > 0.9


@pytest.mark.parametrize("size", [(384, 500), (521, 390), (900, 777)])
def test_a_wide_blur_of_a_large_picture_is_that_of_a_filter(size):
    """What is scaled down, blurred and scaled up again is close to scipy's Gaussian filter, also at the borders."""
    small = torch.rand(1, 1, 40, 50, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(small, size=size, mode="bicubic").clamp(0, 1)
    blur = photo.blur_for(min(size))
    sigma = blur * min(size)
    expected = ndimage.gaussian_filter(image[0, 0].numpy(), sigma, mode="nearest", truncate=2.5)
    found = photo._blurred(image, blur)[0, 0].numpy()
    assert abs(found - expected).max() < 0.05
    assert abs(found - expected).mean() < 0.005
    assert abs(image[0, 0].numpy() - expected).mean() > 0.01  # it blurs
