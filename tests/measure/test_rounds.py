"""Stopping early, comparing two models under the same draws, and fusing batch norms: none may change a figure."""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.errors import SettingsError
from gen_invariance.measure.fusion import fuse_batch_norms
from gen_invariance.measure.invariance import compare_invariance, measure_invariance
from gen_invariance.measure.predict import as_predict
from gen_invariance.measure.rounds import DRAWS_SHARE, FEWEST
from gen_invariance.nuisance.compose import Compose, Identity
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Background, Lighting
from gen_invariance.run import named_generator
from gen_invariance.translator.munit.model import MunitTranslator

CLASSES = 4


@pytest.fixture(scope="module")
def digits():
    ink = torch.from_numpy(load_digits().images[:60]).float()[:, None] / 16
    images = torch.nn.functional.interpolate(ink, size=(16, 16), mode="bilinear", align_corners=False)
    return images, torch.arange(60) % CLASSES


def trained(name="small_conv", seed=0):
    """Batch-norm statistics that are not those of a new network."""
    model = build_classifier(name, num_classes=CLASSES, channels=1, generator=named_generator(seed)).train()
    with torch.no_grad():
        for step in range(5):
            model(torch.rand(32, 1, 16, 16, generator=named_generator(seed, step)))
        model.head.weight *= 20
    return model.eval()


@pytest.fixture(scope="module")
def network():
    return trained()


# ---- stopping early


def test_a_class_that_stops_after_k_rounds_has_the_figures_of_k_draws(digits, network):
    wanted = {"generator": named_generator(1), "draws": 40, "standard_error": 0.045}
    scores = measure_invariance(network, *digits, Rotation(40), **wanted)
    assert len(set(scores.draws_by_class.tolist())) > 2, "classes must stop at different rounds"
    for label, used in enumerate(scores.draws_by_class.tolist()):
        plain = measure_invariance(
            network, *digits, Rotation(40), draws=used, stratified=True, generator=named_generator(1)
        )
        for name in ("ekld", "agreement", "standard_error"):
            expected = float(getattr(plain, name)[label])
            assert float(getattr(scores, name)[label]) == pytest.approx(expected, rel=1e-5)


class Flip:
    """Adds `size` or 0, with even odds; images of value 1 react strongly."""

    def __init__(self, size):
        self.size = size

    def sample(self, shape, *, generator):
        return {"on": (torch.rand(shape[0], generator=generator) < 0.5).float()}

    def apply(self, images, draw):
        return images + self.size / SPAN * draw["on"].view(-1, 1, 1, 1)


SPAN = 8.0  # logits that one unit of light is worth; a power of 2, so that nothing is rounded


def logistic(images):
    value = SPAN * images[:, 0, 0, 0]
    return torch.stack([value, torch.zeros_like(value)], dim=1)


def divergence(x, shift):
    p, q = (torch.sigmoid(torch.tensor(v, dtype=torch.float64)) for v in (x, x + shift))
    return float(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


def assigned(on, start, number):
    """The round's draws by hand: the image that comes first gets the smallest."""
    order = sorted(range(len(on)), key=lambda place: (start[place] + (number - 1) * (5**0.5 - 1) / 2) % 1)
    found = dict(zip(order, sorted(on), strict=True))
    return [found[place] for place in range(len(on))]


@pytest.mark.parametrize("stratified", [False, True])
def test_when_a_class_stops_by_hand(stratified):
    """Two coin flips a class, in plain Python; class 0 has alike images, class 1 images that differ more than draws."""
    alike, unlike = [0.1] * 6, [0.0, 6.0, 0.0, 6.0, 6.0, 0.0]
    images = torch.tensor([*alike, *unlike]).view(-1, 1, 1, 1) / SPAN
    labels = torch.tensor([0] * 6 + [1] * 6)
    found = measure_invariance(
        logistic, images, labels, Flip(2.0), draws=200, standard_error=0.0, stratified=stratified,
        generator=named_generator(2),
    )  # fmt: skip
    generator, values, stopped = named_generator(2), [[] for _ in range(12)], {}
    start = torch.rand(12, dtype=torch.float64, generator=generator).tolist() if stratified else []
    for number in range(1, 201):
        on = Flip(2.0).sample(images.shape, generator=generator)["on"].tolist()
        on = assigned(on, start, number) if stratified else on
        for place in range(12):
            values[place].append(divergence(SPAN * float(images[place]), 2.0 * float(on[place])))
        for label in (0, 1):
            if label in stopped or number < FEWEST or (stratified and number % 2):
                continue
            own = values[6 * label : 6 * label + 6]
            means = [sum(v) / number for v in own]
            centre = sum(means) / 6
            squared_error = sum((m - centre) ** 2 for m in means) / 5 / 6
            within = [sum((x - m) ** 2 for x in v) / (number - 1) for v, m in zip(own, means, strict=True)]
            part = sum(within) / 6 / number
            if stratified:
                halves = [(sum(v[0::2]) - sum(v[1::2])) / number for v in own]
                part = min(part, sum(half**2 for half in halves) / 6 * (1 + (2 / 6) ** 0.5))
            if part / 6 <= DRAWS_SHARE * squared_error or squared_error == 0:
                stopped[label] = number
    assert found.draws_by_class.tolist() == [stopped.get(0, 200), stopped.get(1, 200)]
    assert stopped[1] < stopped.get(0, 200), "more draws help where images are alike"


def test_perfect_invariance_needs_the_fewest_rounds(digits, network):
    scores = measure_invariance(network, *digits, Identity(), draws=50, standard_error=0.0)
    assert scores.draws_by_class.tolist() == [FEWEST] * CLASSES
    assert scores.ekld.tolist() == [0.0] * CLASSES


def test_a_single_image_and_an_empty_class(digits, network):
    images, _ = digits
    scores = measure_invariance(
        network, images[:3], torch.tensor([0, 2, 2]), Rotation(), num_classes=CLASSES, draws=6, standard_error=1e9
    )
    assert scores.draws_by_class.tolist() == [6, 0, FEWEST, 0], "one image has no standard error, so all rounds are run"


def test_a_negative_standard_error_is_refused(digits, network):
    for wrong in (-0.1, math.nan):
        with pytest.raises(SettingsError, match="standard_error"):
            measure_invariance(network, *digits, Identity(), standard_error=wrong)


def test_codes_are_kept_over_the_rounds(digits, network):
    class Counting(MunitTranslator):
        seen = 0

        def encode(self, images):
            Counting.seen += len(images)
            return super().encode(images)

    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(0, "munit").get_state())
        translator = Counting(width=4, residual_blocks=1, mlp_width=8).eval()
    chain = Compose([translator, Lighting()])
    measure_invariance(network, *digits, chain, draws=5)
    assert Counting.seen == 60 + 1


# ---- two models, the same draws


def test_a_comparison_is_the_difference_of_two_measurements(digits):
    one, two = trained(seed=0), trained(seed=1)
    found = compare_invariance(one, two, *digits, Rotation(30), draws=4, generator=named_generator(3))
    how = {"draws": 4, "stratified": True}
    apart = [measure_invariance(m, *digits, Rotation(30), generator=named_generator(3), **how) for m in (one, two)]
    torch.testing.assert_close(found.first, apart[0].ekld, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.second, apart[1].ekld, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.difference, found.first - found.second)
    assert found.count.tolist() == [15] * CLASSES


def test_its_standard_error_is_that_of_the_pairs():
    """By hand from the pixels, and smaller than that of two separate measurements where the models are alike."""
    images = torch.linspace(0, 3, 30).view(-1, 1, 1, 1) / SPAN
    labels = torch.zeros(30, dtype=torch.int64)
    sharper = compare_invariance(
        logistic, lambda x: 1.1 * logistic(x), images, labels, Flip(1.0), draws=3, stratified=False,
        generator=named_generator(4),
    )  # fmt: skip
    generator, pairs = named_generator(4), [0.0] * 30
    for _ in range(3):
        on = Flip(1.0).sample(images.shape, generator=generator)["on"].tolist()
        for place, x in enumerate((SPAN * images).flatten().tolist()):
            pairs[place] += (divergence(x, on[place]) - divergence(1.1 * x, 1.1 * on[place])) / 3
    centre = sum(pairs) / 30
    expected = math.sqrt(sum((pair - centre) ** 2 for pair in pairs) / 29 / 30)
    assert float(sharper.standard_error[0]) == pytest.approx(expected, rel=1e-3)
    apart = measure_invariance(logistic, images, labels, Flip(1.0), draws=3, generator=named_generator(4))
    assert float(sharper.standard_error[0]) < 0.5 * float(apart.standard_error[0]) * math.sqrt(2)


# ---- fusion of batch norms


@pytest.mark.parametrize("name", ["small_conv", "resnet20"])
def test_fusion_keeps_the_answers_and_the_model(name):
    model, images = trained(name), torch.rand(9, 1, 16, 16, generator=named_generator(5))
    before, expected = copy.deepcopy(model.state_dict()), model(images)
    fused = fuse_batch_norms(model, images)
    assert fused is not model
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    torch.testing.assert_close(fused(images), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(images), expected)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.backbone[0][0].weight.is_contiguous()


class Noted(nn.Module):
    """Notes whether TF32 was allowed when it was asked."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.seen = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), []

    def forward(self, x):
        self.seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return self.norm(self.conv(x)).mean((2, 3))


def test_fusion_is_judged_without_the_rounding_of_tf32():
    model, images = Noted().eval(), torch.rand(2, 1, 8, 8)
    model(images)
    fuse_batch_norms(model, images)
    model(images)
    first, *inside, last = model.seen
    assert inside[-1] == ("ieee", "ieee")
    assert first == last == ("tf32", last[1])  # torch convolves in TF32 unless told otherwise


class Misleading(nn.Module):
    """Tracing sees another branch than images do."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x)).mean((2, 3))
        return y if isinstance(x, torch.Tensor) else y * 2


class Branching(nn.Module):
    """The whole cannot be traced, its part can."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        y = self.part(x if x.mean() > -1e9 else -x)
        return y.mean((2, 3))


def test_what_cannot_be_fused_is_used_as_it_is():
    images = torch.rand(5, 1, 8, 8, generator=named_generator(6))
    misleading, bare = Misleading().eval(), nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten()).eval()
    assert fuse_batch_norms(misleading, images) is misleading
    assert fuse_batch_norms(bare, images) is bare
    branching = Branching().eval()
    branching.part[1].running_var.fill_(4.0)
    fused = fuse_batch_norms(branching, images)
    assert fused is not branching
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    torch.testing.assert_close(fused(images), branching(images))


def test_measuring_fuses_and_gives_the_same_figures(digits, network):
    def asked(images):  # a callable is asked as it is
        with torch.no_grad():
            return network(images)

    one, two = (
        measure_invariance(model, *digits, Background(), draws=3, generator=named_generator(7))
        for model in (network, asked)
    )
    torch.testing.assert_close(one.ekld, two.ekld, rtol=1e-4, atol=1e-7)
    assert torch.equal(one.agreement, two.agreement)
    assert one.ekld.max() > 0.001


@pytest.mark.parametrize(("side", "most"), [(16, 97), (32, 24), (300, 8)])
def test_a_network_on_a_cpu_is_asked_about_as_much_as_its_caches_hold(side, most):
    asked = []

    class Counting(nn.Module):
        def forward(self, images):
            asked.append(len(images))
            return images.mean((2, 3)) * torch.tensor([1.0, -1.0])

    images = torch.rand(most * 2 + 3, 1, side, side, generator=named_generator(8))
    with as_predict(Counting()) as ask:
        answers = ask(images)
        assert ask(images[:0]).shape == (0, 2)
    assert asked[:3] == [most, most, 3]
    torch.testing.assert_close(answers[:, 0], images.mean((1, 2, 3)))
    assert torch.equal(answers[:, 1], -answers[:, 0])
