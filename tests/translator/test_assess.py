"""A translator looked at as a whole, the verdict on it, and the file that keeps the verdict."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_quality_measures import seeded

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.errors import CheckpointError, DataError, RangeError, SettingsError, ShapeError
from gen_invariance.nuisance.compose import Identity
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.stats import Estimate
from gen_invariance.translator.quality.assess import Memory, _halves, assess, translate
from gen_invariance.translator.quality.verdict import (
    DO_NOT,
    LOWER,
    QUALITY_FILE,
    RULES,
    USE,
    Figure,
    Gain,
    describe_unidentified,
    judge_by_gain,
    judge_figures,
    read_verdict,
    refuse_unidentified,
    weights_digest,
)
from gen_invariance.translator.settings import AssessSettings

# ---- the whole, on images whose class is how far a dot lies from the centre, at any angle


RADII = torch.tensor([1.5, 3.5, 5.5])


def dots(count, *, seed=0):
    generator = seeded(seed)
    labels = torch.randint(3, (count,), generator=generator)
    angle = torch.rand(count, generator=generator) * 2 * math.pi
    line = torch.arange(16.0) - 7.5
    radius = RADII[labels] + 0.2 * torch.randn(count, generator=generator)
    x, y = radius * angle.cos(), radius * angle.sin()
    off = (line[None, None, :] - x[:, None, None]) ** 2 + (line[None, :, None] - y[:, None, None]) ** 2
    # Stroke-like texture of its own makes each image more than its class and angle.
    wide = 2 + 3 * torch.rand(count, 1, 1, generator=generator)
    rough = 0.5 + 0.5 * torch.rand(count, 16, 16, generator=generator)
    return (torch.exp(-off / wide) * rough)[:, None], labels


def judge(images):
    line = torch.arange(16.0) - 7.5
    far = (line[:, None] ** 2 + line[None, :] ** 2).sqrt()
    ink = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True).clamp_min(1e-6)
    mean = (ink * far).sum((1, 2))
    return -4 * (mean[:, None] - torch.tensor([2.0, 3.7, 5.6])).abs()


class Radius:
    """The judge: tells classes by their radius; its features are a small copy of the image."""

    def __call__(self, images):
        return judge(images)

    def features(self, images):
        return torch.nn.functional.avg_pool2d(images, 4).flatten(1)


class Fixed:
    """Every image becomes the same one."""

    def __init__(self, image):
        self.image = image

    def sample(self, shape, *, generator):
        return {}

    def apply(self, images, draw):
        return self.image.expand_as(images).clone()


class Noise:
    def sample(self, shape, *, generator):
        return {"noise": torch.rand(tuple(shape), generator=generator)}

    def apply(self, images, draw):
        return draw["noise"].clone()


class Broken(Noise):
    def __init__(self, value):
        self.value = value

    def apply(self, images, draw):
        return torch.full_like(images, self.value)


class OfOneClass(Rotation):
    """Turns as it should, and lights up only images of the last class."""

    def apply(self, images, draw):
        moved = super().apply(images, draw)
        return torch.where((judge(images).argmax(1) == 2)[:, None, None, None], (moved + 0.5).clamp(max=1), moved)


def looked_at(nuisance, count=160, sources=None, **changes):
    data = as_data(*dots(count))
    settings = AssessSettings(**{"draws": 3, **changes})
    memory = Memory(data.float_images(), torch.arange(count))
    return assess(
        nuisance, data, judge=Radius(), memory=memory, generator=seeded(1), settings=settings, sources=sources
    )


def as_data(images, labels, **more):
    return ImageData(to_uint8(images), labels, ("small", "medium", "large"), **more)


@pytest.fixture(scope="module")
def good():
    return looked_at(Rotation(180))


def test_the_true_nuisance_may_be_used(good):
    assert good.verdict.word == USE, good.verdict
    assert good.verdict.strength == 1
    assert len(good.verdict.reasons) == len(RULES)
    figures = good.figures
    assert figures["accuracy_kept"].estimate.value > 0.95
    assert figures["precision"].estimate.value > 0.9 * figures["precision"].floor
    assert figures["diversity"].estimate.value > 0.5
    assert figures["near_copies"].estimate.value < 0.05
    assert figures["kernel_distance"].estimate.low < 0.1
    for figure in figures.values():
        assert figure.estimate.low <= figure.estimate.value <= figure.estimate.high
    assert good.count_by_class.sum() == 160
    assert (good.agreement_by_class > 0.9).all()


def test_halves_share_no_group():
    groups = torch.arange(60) // 7
    first, second = _halves(60, groups, least=10, generator=seeded(1))
    assert len(first) == len(second) > 20
    assert len(set(first.tolist()) | set(second.tolist())) == len(first) + len(second)
    assert not set(groups[first].tolist()) & set(groups[second].tolist())
    plain = _halves(61, None, least=10, generator=seeded(1))
    assert torch.equal(torch.cat(plain), torch.randperm(61, generator=seeded(1))[:60])
    with pytest.raises(DataError, match="hold out more groups"):
        _halves(60, torch.arange(60) // 52, least=10, generator=seeded(1))


def test_frames_of_one_thing_do_not_flatter_the_floor():
    """Each image twice: halves by image find every image again in the other half, halves by group none."""
    images, labels = dots(80)
    images, labels, groups = images.repeat(2, 1, 1, 1), labels.repeat(2), torch.arange(80).repeat(2)
    memory = Memory(images, torch.arange(160))
    plain, grouped = (
        assess(
            Identity(),
            as_data(images, labels, groups=each),
            judge=Radius(),
            memory=memory,
            generator=seeded(1),
            settings=AssessSettings(draws=2),
        )
        for each in (None, groups)
    )
    assert grouped.figures["kernel_distance"].floor > plain.figures["kernel_distance"].floor


def test_a_nuisance_that_does_nothing_is_of_no_use_and_gets_the_floor():
    found = looked_at(Identity())
    assert found.verdict.word == DO_NOT
    assert "hardly differ" in found.verdict.reasons[0]
    for name in ("precision", "density", "recall", "coverage", "kernel_distance", "near_copies", "accuracy"):
        assert found.figures[name].estimate.value == pytest.approx(found.figures[name].floor), name
    assert found.figures["agreement"].estimate == Estimate(1.0, 1.0, 1.0)
    assert found.figures["diversity"].estimate.value == 0


def test_noise_is_refused_for_losing_classes_and_not_looking_real():
    found = looked_at(Noise())
    assert found.verdict.word == DO_NOT
    assert any("lose their class" in reason for reason in found.verdict.reasons)
    assert found.figures["precision"].estimate.value == 0
    assert found.figures["kernel_distance"].estimate.low > 10 * abs(found.figures["kernel_distance"].floor)


def test_copies_of_one_training_image_are_found():
    images, _ = dots(160)
    found = looked_at(Fixed(images[5:6]))
    assert found.verdict.word == DO_NOT
    assert any("are copies of training images" in reason for reason in found.verdict.reasons)
    assert found.figures["near_copies"].estimate.value == pytest.approx(159 / 160)  # image 5 itself is no copy
    assert found.figures["recall"].estimate.value < 0.2


def test_a_nuisance_that_acts_on_one_class_is_found(good):
    found = looked_at(OfOneClass())
    assert found.figures["class_share"].estimate.low > 0.1 > good.figures["class_share"].estimate.high
    assert found.class_p_value == 1 / 200
    assert any("differently on different classes" in reason for reason in found.verdict.reasons)


def test_the_worst_translations_are_those_least_likely_of_their_class(good):
    found = looked_at(Noise(), failures=5)
    images, labels = dots(160)
    assert len(found.worst) == 5
    assert (judge(images[found.worst]).argmax(1) == labels[found.worst]).all()
    assert torch.equal(judge(found.worst_images).argmax(1), found.worst_judged)
    chance = judge(found.worst_images).softmax(1)[torch.arange(5), labels[found.worst]]
    assert (chance.diff() >= -1e-6).all()
    assert len(looked_at(Noise(), failures=0).worst) == 0


def test_an_image_that_the_judge_gets_wrong_is_no_failure_of_the_translator():
    images, labels = dots(60)
    wrong = labels.clone()
    wrong[:40] = (labels[:40] + 1) % 3
    data, how = as_data(images, wrong), AssessSettings(failures=60)
    memory = Memory(images, torch.arange(60))
    found = assess(Noise(), data, judge=Radius(), memory=memory, generator=seeded(), settings=how)
    assert set(found.worst.tolist()) == set(range(40, 60))


def test_the_same_seed_gives_the_same_figures_whatever_the_batch(good, monkeypatch):
    monkeypatch.setattr("gen_invariance.translator.quality.assess._BATCH", 37)
    again = looked_at(Rotation(180))
    for name, figure in good.figures.items():
        assert again.figures[name].estimate.value == pytest.approx(figure.estimate.value, abs=1e-4), name


def test_translating_other_sources_leaves_the_comparison_with_the_images():
    images, _ = dots(160)
    found = looked_at(Identity(), sources=images.flip(3))
    assert found.figures["accuracy"].estimate.value == pytest.approx(found.figures["accuracy"].floor)
    assert found.figures["near_copies"].estimate.value < 0.1


def test_bad_input_is_named():
    with pytest.raises(DataError, match="at least 20 images"):
        looked_at(Rotation(), count=19)
    with pytest.raises(SettingsError, match=r"quality.draws must be at least 2, got 1"):
        looked_at(Rotation(), draws=1)
    for value in (math.nan, 1.5, -0.1):
        with pytest.raises(RangeError, match="NaN or outside"):
            looked_at(Broken(value))
    cropped = Fixed(torch.zeros(1, 1, 8, 8))
    cropped.apply = lambda images, draw: images[..., :8, :8]
    with pytest.raises(ShapeError, match="keep the shape"):
        translate(cropped, torch.zeros(4, 1, 16, 16), draws=1, generator=seeded())


def test_json_holds_plain_numbers(good):
    found = json.loads(json.dumps(good.to_json(), allow_nan=False))
    assert found["verdict"] == "use"
    assert set(found["figures"]) == set(good.figures)
    assert found["figures"]["accuracy"]["untouched"] == pytest.approx(good.figures["accuracy"].floor)


def test_assessing_leaves_the_global_stream_alone():
    before = torch.random.get_rng_state()
    looked_at(Rotation(180), count=40)
    assert torch.equal(before, torch.random.get_rng_state())


# ---- verdict


def figures_with(**changes):
    plain = dict.fromkeys(("accuracy_kept", "precision", "coverage", "diversity"), 1.0)
    plain |= {"near_copies": 0.0, "class_share": 0.0, "accuracy": 0.9}
    made = {name: Figure(Estimate(value, value, value), 1.0) for name, value in plain.items()}
    made["accuracy"] = Figure(made["accuracy"].estimate, 0.9)
    made["near_copies"] = Figure(made["near_copies"].estimate, 0.0)
    return made | changes


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.figure)
def test_each_rule_alone_can_lower_and_refuse(rule):
    def word(value, width=0.0):
        figure = Figure(Estimate(value, value - width, value + width), 0.0 if rule.against == "excess" else 1.0)
        return judge_figures(figures_with(**{rule.figure: figure}), chance=0.1).word

    worse = -1e-6 if rule.fine > rule.limit else 1e-6
    assert word(rule.fine) == USE
    assert word(rule.fine + worse) == LOWER
    assert word(rule.limit - worse) == LOWER
    assert word(rule.limit + worse) == DO_NOT
    assert word(rule.limit + worse, width=0.01) == LOWER  # the interval reaches back over the limit
    assert word(math.nan) == LOWER


def test_shares_are_taken_of_what_untouched_images_get():
    figure = Figure(Estimate(0.45, 0.44, 0.46), 0.5)
    assert judge_figures(figures_with(precision=figure), chance=0.1).word == USE


def test_near_copies_count_beyond_those_among_real_images():
    figure = Figure(Estimate(0.33, 0.32, 0.34), 0.3)
    assert judge_figures(figures_with(near_copies=figure), chance=0.1).word == USE


def test_a_judge_near_chance_is_not_trusted():
    verdict = judge_figures(figures_with(accuracy=Figure(Estimate(0.19, 0.1, 0.3), 0.19)), chance=0.1)
    assert verdict.word == LOWER
    assert "judge" in verdict.reasons[0]


def test_the_decisive_reason_comes_first():
    bad = Figure(Estimate(0.0, 0.0, 0.0), 1.0)
    half = Figure(Estimate(0.8, 0.75, 0.85), 1.0)
    verdict = judge_figures(figures_with(accuracy_kept=half, coverage=bad), chance=0.1)
    assert verdict.word == DO_NOT
    assert verdict.reasons[0].startswith("Translated images miss most")
    assert verdict.reasons[1].startswith("Some translated images lose")


@given(
    low=st.floats(-50, 50),
    width=st.floats(0, 50),
    share=st.floats(0, 1),
    reasons=st.lists(st.text(max_size=5), max_size=3),
)
def test_a_measured_gain_decides_alone(low, width, share, reasons):
    gain = Gain(min(low + share * width, low + width), low, low + width, "trivialaugment")
    verdict = judge_by_gain(gain, reasons)
    assert verdict.word == (USE if low > 0 else DO_NOT)
    assert verdict.reasons[1:] == tuple(reasons)
    assert f"{gain.points:+.1f} [{low:+.1f}, {low + width:+.1f}] balanced points" in verdict.reasons[0]
    assert verdict.lines()[:2] == [verdict.reasons[0], verdict.word]


@pytest.mark.parametrize("numbers", [(math.nan, 0, 1), (0, -math.inf, 1), (0, 1, -1)])
def test_a_gain_without_an_interval_is_refused(numbers):
    with pytest.raises(RangeError, match="no estimate"):
        Gain(*numbers, "none")


def test_what_a_fit_did_not_identify_is_refused_whatever_the_figures():
    fine = judge_figures(figures_with(), chance=0.1)
    assert refuse_unidentified(fine, "") is fine
    refused = refuse_unidentified(fine, describe_unidentified({"rotation": (0.9, 0.8, 1.0)}))
    assert refused.word == DO_NOT
    assert refused.first_reason.startswith("Not identified: rotation (AUC 0.90 [0.80, 1.00])")
    assert refused.reasons[1:] == fine.reasons


# ---- the file


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "run" / "translator"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text("{}")
    (inside / "model.safetensors").write_bytes(b"weights")
    return inside


def verdict_file(folder, **changes):
    return json.dumps({"verdict": LOWER, "reasons": ["so"], "translator_digest": weights_digest(folder), **changes})


def test_a_verdict_is_found_from_the_run_and_from_the_translator(folder):
    assert read_verdict(folder) is None
    (folder.parent / QUALITY_FILE).write_text(verdict_file(folder))
    for path in (folder, folder.parent):
        assert read_verdict(path).word == LOWER
        assert read_verdict(path).strength == 0.5


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"verdict": "use"}', "damaged"),
        ("null", "damaged"),
        ('{"verdict": "use", "gain": 3}', "damaged"),
        ('{"verdict": "use", "gain": {"points": 3}}', "damaged"),
        ('{"verdict": "use", "gain": {"points": 3, "low": 4, "high": NaN, "against": "none"}}', "damaged"),
    ],
)
def test_a_damaged_file_is_named(folder, text, match):
    (folder.parent / QUALITY_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=match):
        read_verdict(folder)


def test_a_gain_is_read_back(folder):
    gain = {"points": 2.1, "low": 0.8, "high": 3.4, "against": "trivialaugment@every_row"}
    (folder.parent / QUALITY_FILE).write_text(verdict_file(folder, gain=gain))
    assert read_verdict(folder).gain == Gain(**gain)
    (folder.parent / QUALITY_FILE).write_text(verdict_file(folder, gain=None))
    assert read_verdict(folder).gain is None


def test_a_verdict_on_other_weights_is_refused(folder):
    (folder.parent / QUALITY_FILE).write_text(verdict_file(folder))
    (folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(CheckpointError, match="other weights"):
        read_verdict(folder)
    (folder.parent / QUALITY_FILE).write_text(verdict_file(folder, verdict="maybe"))
    with pytest.raises(CheckpointError, match="damaged"):
        read_verdict(folder)
