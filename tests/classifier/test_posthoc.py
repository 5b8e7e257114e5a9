"""Post-hoc correction: closed forms, what is fixed, what trains."""

import pytest
import torch

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.losses import build_loss
from gen_invariance.classifier.model import Backbone, Classifier
from gen_invariance.classifier.posthoc import (
    AdjustedClassifier,
    ScaledHead,
    adjust_logits,
    prepare_classifier_retraining,
    prepare_weight_scaling,
    tau_normalised,
)
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.run import named_generator

COUNTS = torch.tensor([80, 15, 5])


def images(count=8):
    return torch.rand(count, 1, 8, 8, generator=named_generator(0, "images"))


@pytest.fixture(params=["linear", "cosine"])
def model(request):
    return build_classifier("small_conv", num_classes=3, channels=1, head=request.param)


def train_a_step(model):
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(images()), torch.arange(8) % 3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def test_adjusted_logits_turn_the_posterior_into_the_balanced_one():
    """With p(y|x) proportional to prior * likelihood, taking the prior away leaves the normalised likelihood."""
    likelihood = torch.tensor([[0.2, 0.5, 0.9], [0.7, 0.1, 0.3]])
    posterior = likelihood * COUNTS / (likelihood * COUNTS).sum(1, keepdim=True)
    adjusted = adjust_logits(posterior.log(), counts=COUNTS).softmax(1)
    torch.testing.assert_close(adjusted, likelihood / likelihood.sum(1, keepdim=True))
    torch.testing.assert_close(adjust_logits(posterior.log(), counts=COUNTS, tau=0), posterior.log())


def test_train_time_and_post_hoc_adjustment_cancel():
    logits = torch.randn(5, 3, generator=named_generator(0, "logits"))
    labels = torch.tensor([0, 1, 2, 1, 0])
    loss = build_loss("logit_adjustment", counts=COUNTS, tau=0.8)
    undone = adjust_logits(logits, counts=COUNTS, tau=0.8)
    torch.testing.assert_close(loss(undone, labels), torch.nn.functional.cross_entropy(logits, labels))


def test_adjusted_classifier_is_the_model_and_the_correction(model):
    model.eval()
    expected = adjust_logits(model(images()), counts=COUNTS, tau=1.5)
    torch.testing.assert_close(AdjustedClassifier(model, COUNTS, tau=1.5)(images()), expected)


def test_tau_normalisation_by_loop():
    head = torch.nn.Linear(4, 3)
    before = head.weight.clone()
    for tau in (0.0, 0.5, 1.0):
        new = tau_normalised(head, tau=tau)
        for row in range(3):
            torch.testing.assert_close(new.weight[row], before[row] / before[row].norm() ** tau)
        assert new.bias is None
        assert new.out_features == 3
    assert torch.equal(head.weight, before)
    torch.testing.assert_close(tau_normalised(head, tau=1).weight.norm(dim=1), torch.ones(3))


def test_classifier_retraining_changes_the_head_only(model):
    old = model.head.weight.clone()
    state = torch.random.get_rng_state()
    prepare_classifier_retraining(model, generator=named_generator(5, "head"))
    assert torch.equal(state, torch.random.get_rng_state())
    fresh = model.head.weight.clone()
    assert type(model.head).__name__ in ("Linear", "CosineHead")
    assert not torch.equal(old, fresh)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_a_step(model)
    after = model.state_dict()
    assert not torch.equal(after["head.weight"], fresh)
    backbone = [key for key in before if key.startswith("backbone.")]
    assert len(backbone) > 10
    assert all(torch.equal(before[key], after[key]) for key in backbone)
    other = build_classifier("small_conv", num_classes=3, channels=1, head="linear")
    if isinstance(model.head, torch.nn.Linear):
        prepare_classifier_retraining(other, generator=named_generator(5, "head"))
        assert torch.equal(other.head.weight, fresh)


def test_weight_scaling_learns_one_factor_a_class():
    model = build_classifier("small_conv", num_classes=3, channels=1).eval()
    plain = model(images())
    prepare_weight_scaling(model)
    torch.testing.assert_close(model.eval()(images()), plain)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.factors"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_a_step(model)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["head.factors"]
    assert model.num_classes == 3
    with torch.no_grad():
        model.head.factors.copy_(torch.tensor([1.0, 2.0, 0.5]))
    torch.testing.assert_close(model.eval()(images()), plain * torch.tensor([1.0, 2.0, 0.5]))


def test_misuse_is_named():
    cosine = build_classifier("small_conv", num_classes=3, channels=1, head="cosine")
    with pytest.raises(SettingsError, match="needs a linear head, got CosineHead"):
        tau_normalised(cosine.head)
    with pytest.raises(SettingsError, match="needs a linear head, got CosineHead"):
        ScaledHead(cosine.head)
    with pytest.raises(SettingsError, match=r"tau must lie in \[0, 1\]"):
        tau_normalised(torch.nn.Linear(2, 2), tau=2)
    with pytest.raises(ShapeError, match="logits have 3 classes, counts 2"):
        adjust_logits(torch.zeros(1, 3), counts=[3, 4])
    bare = Classifier(Backbone(torch.nn.Flatten(), 64, 1, {}), torch.nn.Linear(64, 3))
    with pytest.raises(SettingsError, match="declares no blocks"):
        prepare_classifier_retraining(bare, generator=named_generator(0))
