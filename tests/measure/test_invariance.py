"""eKLD and agreement against a loop over images, by hand, and by their laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import slow_invariance
from sklearn.datasets import load_digits

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.measure.invariance import measure_invariance
from gen_invariance.measure.rounds import kl_divergence
from gen_invariance.nuisance.compose import Compose, Identity
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Background, Lighting
from gen_invariance.nuisance.thickness import Thickness
from gen_invariance.run import named_generator
from gen_invariance.translator.munit.model import MunitTranslator
from gen_invariance.translator.spatial import SpatialTranslator

CLASSES, EMPTY = 6, 4


@pytest.fixture(scope="module")
def digits():
    ink = torch.from_numpy(load_digits().images[:40]).float()[:, None] / 16
    images = torch.nn.functional.interpolate(ink, size=(16, 16), mode="bilinear", align_corners=False)
    labels = torch.arange(40) % (CLASSES - 1)
    labels += labels >= EMPTY
    return images, labels


@pytest.fixture(scope="module")
def network():
    """A convolutional network, sharpened so that its answers move."""
    model = build_classifier("small_conv", num_classes=CLASSES, channels=1, generator=named_generator(0)).eval()
    return lambda images: 30 * model(images)


def munit():
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(0, "munit").get_state())
        return MunitTranslator(width=4, residual_blocks=1, mlp_width=8).eval()


LEARNED = {"munit": munit, "spatial": lambda: SpatialTranslator(start=0.3).eval()}
NUISANCES = {
    "rotation": Rotation,
    "background": Background,
    "lighting": Lighting,
    "composed": lambda: Compose([Thickness(), Rotation(30), Lighting()]),
    **LEARNED,
}


@pytest.mark.parametrize("name", NUISANCES)
def test_equals_the_loop_over_images(name, digits, network):
    nuisance, (images, labels) = NUISANCES[name](), digits
    arguments = {"num_classes": CLASSES, "draws": 3}
    fast = measure_invariance(network, images, labels, nuisance, generator=named_generator(1), **arguments)
    ekld, agreement, error = slow_invariance(
        network, images, labels, nuisance, generator=named_generator(1), **arguments
    )
    assert max(value for value in ekld if value == value) > 0.01, "the nuisance must move the answers"
    assert fast.ekld.tolist() == pytest.approx(ekld, abs=1e-5, rel=1e-5, nan_ok=True)
    assert fast.agreement.tolist() == pytest.approx(agreement, abs=1e-12, nan_ok=True)
    assert fast.standard_error.tolist() == pytest.approx(error, abs=1e-5, rel=1e-4, nan_ok=True)


def test_the_nuisance_may_act_on_the_images_as_they_were_before(digits, network):
    originals, labels = digits
    nuisance = Background(256)
    images = nuisance.apply(originals, nuisance.sample(originals.shape, generator=named_generator(2)))
    arguments = {"originals": originals, "num_classes": CLASSES, "draws": 3}
    fast = measure_invariance(network, images, labels, nuisance, generator=named_generator(1), **arguments)
    ekld, agreement, _ = slow_invariance(network, images, labels, nuisance, generator=named_generator(1), **arguments)
    assert fast.ekld.tolist() == pytest.approx(ekld, abs=1e-5, rel=1e-5, nan_ok=True)
    assert fast.agreement.tolist() == pytest.approx(agreement, abs=1e-12, nan_ok=True)
    # A background is drawn only once: on images that have one the nuisance finds nothing to do.
    twice = measure_invariance(network, images, labels, nuisance, num_classes=CLASSES)
    assert twice.ekld.nansum() < 0.1 * fast.ekld.nansum()
    with pytest.raises(ShapeError, match="originals"):
        measure_invariance(network, images, labels, nuisance, originals=originals[:3])


@pytest.mark.parametrize("batch_size", [1, 7, 512])
@pytest.mark.parametrize("stored", [False, True])
def test_identity_is_exactly_zero_and_one(digits, network, batch_size, stored):
    images, labels = digits
    images = (images * 255).round().to(torch.uint8) if stored else images
    scores = measure_invariance(network, images, labels, Identity(), num_classes=CLASSES, batch_size=batch_size)
    present = scores.count > 0
    assert scores.ekld[present].tolist() == [0.0] * (CLASSES - 1)
    assert scores.agreement[present].tolist() == [1.0] * (CLASSES - 1)


def test_empty_classes_are_nan_and_count_zero(digits, network):
    scores = measure_invariance(network, *digits, Rotation(), num_classes=CLASSES, draws=2)
    assert scores.count.tolist() == [8, 8, 8, 8, 0, 8]
    for values in (scores.ekld, scores.agreement, scores.standard_error):
        assert values.isnan().tolist() == [False] * 4 + [True, False]


def test_a_class_of_one_image_has_no_standard_error(digits, network):
    images, _ = digits
    scores = measure_invariance(network, images[:3], torch.tensor([0, 1, 1]), Rotation(), num_classes=CLASSES)
    assert math.isnan(scores.standard_error[0])
    assert scores.ekld[0] > 0
    assert scores.standard_error[1] >= 0


@pytest.mark.parametrize("name", ["rotation", "munit"])
def test_batch_size_does_not_matter(name, digits, network):
    results = [
        measure_invariance(
            network,
            *digits,
            NUISANCES[name](),
            num_classes=CLASSES,
            draws=2,
            batch_size=size,
            generator=named_generator(3),
        )
        for size in (1, 13, 40, 500)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other.ekld, results[0].ekld, atol=1e-5, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(other.agreement, results[0].agreement, equal_nan=True)


class Recorder:
    """Adds its draw to the image, so that pairs can be checked from the outside."""

    def sample(self, shape, *, generator):
        return {"shift": torch.rand(shape[0], generator=generator) * 0.25}

    def apply(self, images, draw):
        return images + draw["shift"].view(-1, 1, 1, 1)


def test_original_and_transformed_are_the_same_image():
    """The reference code compared image i with another image; every image here has its own logit."""
    count = 37
    images = (torch.arange(count).float() / count / 2).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()

    def predict(batch):  # with p the sigmoid of the pixel, KL is a function of (x, x + shift)
        value = batch[:, 0, 0, 0]
        return torch.stack([value, torch.zeros_like(value)], dim=1)

    labels = torch.arange(count)
    scores = measure_invariance(
        predict, images, labels, Recorder(), num_classes=count, draws=1, batch_size=5, generator=named_generator(9)
    )
    shift = Recorder().sample(images.shape, generator=named_generator(9))["shift"].double()
    x = images[:, 0, 0, 0].double()
    p, q = torch.sigmoid(x), torch.sigmoid(x + shift)
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(scores.ekld, expected, atol=1e-6, rtol=1e-3)


class Invert:
    """The only draw there is: 1 - x."""

    def sample(self, shape, *, generator):
        return {}

    def apply(self, images, draw):
        return 1 - images


def test_two_classes_by_hand():
    """p = (3/4, 1/4) against q = (1/4, 3/4): KL is 3/4 ln 3 + 1/4 ln 1/3 = ln 3 / 2, and no answer stays."""
    images = torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1, 1)

    def predict(batch):
        return torch.stack([(batch[:, 0, 0, 0] * 2 - 1) * math.log(3), torch.zeros(len(batch))], dim=1)

    scores = measure_invariance(predict, images, torch.tensor([0, 0, 1]), Invert(), num_classes=2, draws=4)
    assert scores.ekld.tolist() == pytest.approx([math.log(3) / 2, 0])
    assert scores.agreement.tolist() == [0.0, 1.0]
    assert scores.draws == 4


def test_wrong_calls_are_named(digits, network):
    images, labels = digits
    with pytest.raises(SettingsError, match="draws must be at least 1"):
        measure_invariance(network, images, labels, Identity(), num_classes=CLASSES, draws=0)
    with pytest.raises(ShapeError, match="40 images but labels"):
        measure_invariance(network, images, labels[:39], Identity(), num_classes=CLASSES)
    with pytest.raises(ShapeError, match="no images"):
        measure_invariance(network, images[:0], labels[:0], Identity(), num_classes=CLASSES)
    with pytest.raises(RangeError, match="labels must lie in"):
        measure_invariance(network, images, labels, Identity(), num_classes=2, draws=1)


def test_a_diverged_model_is_not_invariant(digits):
    """NaN answers are all alike, which must not read as eKLD 0 and agreement 1."""
    with pytest.raises(RangeError, match="NaN"):
        measure_invariance(lambda images: images.flatten(1) * float("nan"), *digits, Identity(), num_classes=CLASSES)


def test_nan_under_the_nuisance_alone_is_an_error(digits, network):
    def fragile(images):
        return network(images) + torch.where(images.amax((1, 2, 3)) <= 1, 0.0, float("nan"))[:, None]

    with pytest.raises(RangeError, match="NaN"):
        measure_invariance(fragile, *digits, Recorder(), num_classes=CLASSES, draws=1)


# ---- the divergence itself

logits = st.lists(st.floats(-30, 30), min_size=4, max_size=4)


@settings(max_examples=200, deadline=None)
@given(a=logits, b=logits)
def test_divergence_against_torch_and_its_laws(a, b):
    log_p, log_q = (torch.tensor([x], dtype=torch.float64).log_softmax(1) for x in (a, b))
    got = kl_divergence(log_p, log_q)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    assert got.item() == pytest.approx(expected.item(), abs=1e-9)
    assert got.item() >= 0
    assert kl_divergence(log_p, log_p).item() == 0


def test_divergence_with_impossible_classes():
    log_p = torch.tensor([[0.0, -math.inf], [0.0, -math.inf], [math.log(0.5)] * 2])
    log_q = torch.tensor([[0.0, -math.inf], [math.log(0.5)] * 2, [0.0, -math.inf]])
    assert kl_divergence(log_p, log_q).tolist() == pytest.approx([0, math.log(2), math.inf])


def test_divergence_of_nan_is_nan():
    nan = torch.full((1, 3), math.nan)
    fine = torch.zeros(1, 3).log_softmax(1)
    assert kl_divergence(nan, fine).isnan().all()
    assert kl_divergence(fine, nan).isnan().all()
