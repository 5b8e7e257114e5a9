"""Losses against a slow loop, gradcheck, limit cases, renamed classes, and misuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gen_invariance.classifier.losses import LOSSES, build_loss, class_weights
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.run import named_generator

COUNTS = (400, 60, 9, 1)
WEIGHTS = (None, "inverse", "effective_number")
OPTIONS = {
    "cross_entropy": {},
    "focal": {"gamma": 1.5},
    "ldam": {"max_margin": 0.4, "scale": 5.0},
    "balanced_softmax": {},
    "logit_adjustment": {"tau": 0.7},
    "vector_scaling": {"gamma": 0.3, "tau": 1.1},
}


def batch(rows=6, dtype=torch.float64, seed=0):
    generator = named_generator(seed, "losses")
    logits = 3 * torch.randn(rows, 4, generator=generator, dtype=dtype)
    return logits, torch.randint(4, (rows,), generator=generator)


def soft_batch(rows=6):
    return torch.rand(rows, 4, generator=named_generator(1, "soft"), dtype=torch.float64).softmax(1)


def loop(name, logits, label, options):
    """One row, one label: the formulas of the papers, in Python numbers, without class weight."""
    z, n = logits.tolist(), COUNTS
    total = sum(n)
    if name == "ldam":
        margins = [count**-0.25 for count in n]
        z[label] -= options["scale"] * options["max_margin"] * margins[label] / max(margins)
    elif name in ("balanced_softmax", "logit_adjustment"):
        z = [value + options.get("tau", 1.0) * math.log(count / total) for value, count in zip(z, n, strict=True)]
    elif name == "vector_scaling":
        z = [
            (count / max(n)) ** options["gamma"] * value + options["tau"] * math.log(count / total)
            for value, count in zip(z, n, strict=True)
        ]
    p = math.exp(z[label]) / sum(math.exp(value) for value in z)
    return -((1 - p) ** options["gamma"] if name == "focal" else 1.0) * math.log(p)


def loop_weight(kind, label):
    if kind is None:
        return 1.0
    raw = [1 / n if kind == "inverse" else (1 - 0.9999) / (1 - 0.9999**n) for n in COUNTS]
    return raw[label] * len(raw) / sum(raw)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", LOSSES)
def test_hard_labels_against_the_loop(name, weights):
    logits, labels = batch()
    loss = build_loss(name, counts=COUNTS, weights=weights, **OPTIONS[name])
    rows = [
        loop_weight(weights, y) * loop(name, z, y, OPTIONS[name]) for z, y in zip(logits, labels.tolist(), strict=True)
    ]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(loss(logits, labels, reduction="none"), expected, rtol=1e-5, atol=1e-6)
    divisor = sum(loop_weight(weights, y) for y in labels.tolist())
    torch.testing.assert_close(loss(logits, labels), expected.sum() / divisor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", LOSSES)
def test_soft_labels_are_the_expected_loss_over_labels(name, weights):
    """All of these losses are linear in the label, so a soft label is a weighted sum of loops over classes."""
    logits, soft = batch()[0], soft_batch()
    loss = build_loss(name, counts=COUNTS, weights=weights, **OPTIONS[name])
    rows = [
        sum(q[c].item() * loop_weight(weights, c) * loop(name, z, c, OPTIONS[name]) for c in range(4))
        for z, q in zip(logits, soft, strict=True)
    ]
    torch.testing.assert_close(
        loss(logits, soft, reduction="none"), torch.tensor(rows, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", LOSSES)
def test_one_hot_soft_labels_equal_hard_ones(name):
    logits, labels = batch()
    loss = build_loss(name, counts=COUNTS, weights="inverse", **OPTIONS[name])
    one_hot = F.one_hot(labels, 4).double()
    torch.testing.assert_close(loss(logits, one_hot), loss(logits, labels))
    torch.testing.assert_close(loss(logits, one_hot, reduction="none"), loss(logits, labels, reduction="none"))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name, soft):
    logits, labels = batch()
    labels = soft_batch() if soft else labels
    loss = build_loss(name, counts=COUNTS, weights="effective_number", **OPTIONS[name]).double()
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("focal", {"gamma": 0}),
        ("ldam", {"max_margin": 0}),
        ("logit_adjustment", {"tau": 0}),
        ("vector_scaling", {"gamma": 0, "tau": 0}),
    ],
)
def test_limit_cases_are_cross_entropy(name, options):
    logits, labels = batch()
    loss = build_loss(name, counts=COUNTS, **options)
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels))


def test_relations_between_losses():
    logits, labels = batch()
    balanced = build_loss("balanced_softmax", counts=COUNTS)(logits, labels)
    adjusted = build_loss("logit_adjustment", counts=COUNTS, tau=1)(logits, labels)
    scaled = build_loss("vector_scaling", counts=COUNTS, gamma=0, tau=1)(logits, labels)
    torch.testing.assert_close(balanced, adjusted)
    torch.testing.assert_close(balanced, scaled)
    equal = build_loss("balanced_softmax", counts=[5, 5, 5, 5])(logits, labels)
    torch.testing.assert_close(equal, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("soft", [False, True])
def test_label_smoothing_is_torchs(weights, soft):
    logits, labels = batch()
    loss = build_loss("cross_entropy", counts=COUNTS, weights=weights, label_smoothing=0.1)
    weight = None if loss.class_weights is None else loss.class_weights.double()
    target = F.one_hot(labels, 4).double() if soft else labels
    expected = F.cross_entropy(logits, labels, weight=weight, label_smoothing=0.1)
    torch.testing.assert_close(loss(logits, target), expected)


@given(order=st.permutations(range(4)), name=st.sampled_from(list(LOSSES)), weights=st.sampled_from(WEIGHTS))
def test_renaming_classes_changes_nothing(order, name, weights):
    logits, labels = batch()
    order = torch.tensor(order)
    inverse = order.argsort()
    counts = torch.tensor(COUNTS)
    one = build_loss(name, counts=counts, weights=weights, **OPTIONS[name])(logits, labels)
    other = build_loss(name, counts=counts[order], weights=weights, **OPTIONS[name])(logits[:, order], inverse[labels])
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", LOSSES)
def test_confident_logits_stay_finite(name):
    logits = torch.tensor([[200.0, 0, 0, 0], [-200.0, 0, 0, 200.0]], requires_grad=True)
    loss = build_loss(name, counts=COUNTS, **({"gamma": 0.5} if name == "focal" else OPTIONS[name]))
    for labels in (torch.tensor([0, 0]), torch.tensor([[1.0, 0, 0, 0], [0.5, 0, 0, 0.5]])):
        value = loss(logits, labels)
        assert value.isfinite()
        assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_class_weights_by_hand():
    assert class_weights("inverse", counts=torch.tensor([30, 10])).tolist() == [0.5, 1.5]
    assert class_weights("effective_number", counts=torch.tensor([7, 7])).tolist() == [1.0, 1.0]
    equal = class_weights("effective_number", counts=torch.tensor([30, 10]), beta=0.0)
    assert equal.tolist() == [1.0, 1.0]
    nearly = class_weights("effective_number", counts=torch.tensor([30, 10]), beta=1 - 1e-9)
    torch.testing.assert_close(nearly, torch.tensor([0.5, 1.5]), rtol=1e-4, atol=1e-4)
    named = class_weights({"lynx": 4}, counts=torch.tensor([30, 10]), class_names=["cat", "lynx"])
    assert named.tolist() == [1.0, 4.0]
    assert class_weights(None, counts=torch.tensor([3])) is None


def test_weights_travel_with_the_module_but_not_with_checkpoints():
    loss = build_loss("ldam", counts=COUNTS, weights="inverse").to(torch.float64)
    assert loss.class_weights.dtype == loss.margins.dtype == torch.float64
    assert loss.state_dict() == {}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crossentropy", {}, "no loss 'crossentropy'; choose cross_entropy, focal"),
        ("focal", {"gama": 1}, "no option 'gama'; choose of .*gamma"),
        ("focal", {"gamma": -1}, "gamma must be at least 0"),
        ("focal", {"label_smoothing": 0.1}, "focal has no label_smoothing"),
        ("balanced_softmax", {"tau": 2}, "no option 'tau'"),
        ("ldam", {"scale": 0}, "scale must be positive"),
        ("cross_entropy", {"label_smoothing": 1.0}, "label_smoothing must be in"),
        ("cross_entropy", {"weights": "invers"}, "choose inverse, effective_number, or a dict"),
        ("cross_entropy", {"weights": "effective_number", "beta": 1}, "beta must be in"),
        ("cross_entropy", {"weights": {"dog": 2}}, "'dog', which is no class; the classes are a, b, c, d"),
        ("cross_entropy", {"weights": {"a": -1}}, "positive and finite"),
    ],
)
def test_misuse_is_named(name, options, message):
    with pytest.raises(SettingsError, match=message) as caught:
        build_loss(name, counts=COUNTS, class_names="abcd", **options)
    assert "\n" not in str(caught.value)


def test_wrong_shapes_are_named():
    loss = build_loss("cross_entropy", counts=COUNTS)
    logits, labels = batch()
    with pytest.raises(ShapeError, match=r"logits must be \(B, 4\), got \(6, 3\)"):
        loss(logits[:, :3], labels)
    with pytest.raises(ShapeError, match="give class numbers or one probability"):
        loss(logits, F.one_hot(labels, 4))
    with pytest.raises(SettingsError, match="no reduction 'sum'"):
        loss(logits, labels, reduction="sum")
    with pytest.raises(SettingsError, match="class 1 has 0 images"):
        build_loss("ldam", counts=[3, 0])
    with pytest.raises(ShapeError, match="number of images of each class"):
        build_loss("ldam", counts=[[3, 1]])
