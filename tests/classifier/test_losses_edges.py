"""Rows that count for nothing, masked classes, labels of other types: against torch's and row by row."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.classifier.losses import IGNORED, LOSSES, build_loss
from gen_invariance.errors import RangeError, ShapeError
from gen_invariance.run import named_generator

COUNTS = (400, 60, 9, 1)
WEIGHTS = (None, "inverse", "effective_number")
names, weights = st.sampled_from(sorted(LOSSES)), st.sampled_from(WEIGHTS)
label_lists = st.lists(st.sampled_from([0, 1, 2, 3, IGNORED]), min_size=1, max_size=8)


def logits_for(rows, seed=0):
    return torch.randn(rows, 4, generator=named_generator(seed, "edges"), dtype=torch.float64)


@given(labels=label_lists, kind=weights, smoothing=st.sampled_from([0.0, 0.1]))
@settings(deadline=None)
def test_cross_entropy_is_torchs_own(labels, kind, smoothing):
    logits, labels = logits_for(len(labels)), torch.tensor(labels)
    loss = build_loss("cross_entropy", counts=COUNTS, weights=kind, label_smoothing=smoothing)
    weight = None if loss.class_weights is None else loss.class_weights.double()
    expected = F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(loss(logits, labels, reduction="none"), expected)
    if not smoothing or weight is None:  # torch weighs smoothed labels by all their classes, and divides by the label's
        expected = F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing)
        close = {"rtol": 1e-6, "atol": 1e-6}  # weights are float32
        torch.testing.assert_close(loss(logits, labels), expected, equal_nan=True, check_dtype=False, **close)


@given(name=names, labels=label_lists, kind=weights)
@settings(deadline=None)
def test_ignored_rows_are_as_if_they_were_not_there(name, labels, kind):
    logits, labels = logits_for(len(labels)).requires_grad_(), torch.tensor(labels)
    loss, kept = build_loss(name, counts=COUNTS, weights=kind), labels != IGNORED
    rows = loss(logits, labels, reduction="none")
    assert (rows[~kept] == 0).all()
    assert (loss.row_weights(labels)[~kept] == 0).all()
    if not kept.any():
        return
    alone = logits.detach()[kept].requires_grad_()
    torch.testing.assert_close(rows[kept], loss(alone, labels[kept], reduction="none"))
    whole, part = loss(logits, labels), loss(alone, labels[kept])
    torch.testing.assert_close(whole, part, rtol=1e-5, atol=1e-6)  # weights are float32
    whole.backward()
    part.backward()
    torch.testing.assert_close(logits.grad[kept], alone.grad, rtol=1e-5, atol=1e-6)
    assert (logits.grad[~kept] == 0).all()


@given(
    name=names, kind=weights, label=st.integers(0, 3), masked=st.sets(st.integers(0, 3), min_size=1, max_size=3),
    soft=st.booleans(), gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)  # fmt: skip
@settings(deadline=None)
def test_masked_classes_leave_finite_gradients(name, kind, label, masked, soft, gamma):
    """A logit of minus infinity takes a class out; the loss is that of the classes that are left."""
    options = {"gamma": gamma} if name == "focal" else {}
    loss = build_loss(name, counts=COUNTS, weights=kind, **options)
    logits = logits_for(1)
    logits[0, sorted(masked)] = float("-inf")
    logits.requires_grad_()
    given_labels = torch.eye(4, dtype=torch.float64)[[label]] if soft else torch.tensor([label])
    value = loss(logits, given_labels)
    value.backward()
    assert not value.isnan()
    assert torch.isfinite(logits.grad).all()
    if label not in masked:
        low = logits.detach().clamp_min(-1e5)
        torch.testing.assert_close(value, loss(low, given_labels))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_other_integer_types(name, dtype):
    logits, labels = logits_for(4), torch.arange(4)
    loss = build_loss(name, counts=COUNTS, weights="inverse")
    assert torch.equal(loss(logits, labels.to(dtype)), loss(logits, labels))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", [-1, 4, -101, 255])
def test_labels_that_are_no_class(name, label):
    with pytest.raises(RangeError, match=rf"labels must lie in \[0, 4\), or be -100.*got {label}"):
        build_loss(name, counts=COUNTS)(logits_for(2), torch.tensor([1, label]))


@pytest.mark.parametrize("labels", [torch.tensor([[1, 0, 0, 1]]), torch.tensor([0.0]), torch.tensor([[1]])])
def test_labels_of_other_shapes(labels):
    with pytest.raises(ShapeError, match="labels must be int64"):
        build_loss("focal", counts=COUNTS)(logits_for(1), labels)
