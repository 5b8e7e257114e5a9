"""The stage: who gets the nuisance, and what the network sees."""

import copy
import math

import pytest
import torch
from stage_inputs import CLASSES, Spy, batch, moved, munit, seeded
from torch import nn

from gen_invariance.augment.stage import Gate, TailAugment
from gen_invariance.errors import RangeError, ShapeError
from gen_invariance.nuisance.compose import Compose
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Lighting


def test_probability_zero_is_the_identity(nuisance):
    images, labels = batch()
    spy = Spy(nuisance)
    out, same = TailAugment(spy, torch.zeros(CLASSES))(images, labels)
    assert torch.equal(out, images)
    assert torch.equal(same, labels)
    assert spy.shown == []


def test_probability_one_moves_all_tail_rows_and_no_head_row(nuisance):
    images, labels = batch()
    before = images.clone()
    probability = torch.tensor([0.0, 1.0, 0.0, 1.0])
    out, same = TailAugment(nuisance, probability)(images, labels)
    tail = probability[labels] == 1
    assert 0 < tail.sum() < len(tail)
    assert torch.equal(moved(images, out), tail)
    assert torch.equal(same, labels)
    assert torch.equal(images, before)
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert 0 <= out.min() <= out.max() <= 1


def test_rate_of_each_class_is_its_probability():
    probability = torch.tensor([0.1, 0.5, 0.9, 0.0])
    stage = TailAugment(Rotation(), probability)
    labels = torch.arange(CLASSES).repeat_interleave(4000)
    rows = stage.sample((len(labels), 1, 4, 4), labels, generator=seeded()).rows
    for label, p in enumerate(probability.tolist()):
        slack = 5 * math.sqrt(p * (1 - p) / 4000)
        assert rows[labels == label].float().mean().item() == pytest.approx(p, abs=slack)


def test_only_gated_rows_reach_the_network():
    images, labels = batch()
    spy = Spy(Rotation())
    stage = TailAugment(spy, torch.tensor([0.0, 0.3, 0.0, 1.0]))
    out, _ = stage(images, labels, generator=seeded())
    assert spy.shown == spy.drawn == [int(moved(images, out).sum())]
    assert 0 < spy.shown[0] < len(images)


def test_same_generator_same_batch_and_global_stream_untouched(nuisance):
    images, labels = batch()
    stage = TailAugment(nuisance, torch.full((CLASSES,), 0.5))
    state = torch.random.get_rng_state()
    one, _ = stage(images, labels, generator=seeded())
    two, _ = stage(images, labels, generator=seeded())
    other, _ = stage(images, labels, generator=seeded(6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_own_generator_moves_on_and_starts_from_the_seed():
    images, labels = batch()
    stages = [TailAugment(Rotation(), torch.full((CLASSES,), 0.5), seed=seed) for seed in (1, 1, 2)]
    first, second, third = (stage(images, labels)[0] for stage in stages)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(stages[0](images, labels)[0], first)


def test_forward_is_a_gate_carried_out(nuisance):
    images, labels = batch()
    stage = TailAugment(nuisance, torch.full((CLASSES,), 0.5))
    gate = stage.sample(images.shape, labels, generator=seeded())
    assert torch.equal(stage.apply_gate(images, labels, gate)[0], stage(images, labels, generator=seeded())[0])


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_a_gate_add_up_to_the_whole(nuisance, ranks):
    images, labels = batch(31)
    stage = TailAugment(nuisance, torch.full((CLASSES,), 0.5))
    gate = stage.sample(images.shape, labels, generator=seeded())
    whole, _ = stage.apply_gate(images, labels, gate)
    for rank in range(ranks):
        part = slice(rank, None, ranks)
        own, _ = stage.apply_gate(images[part], labels[part], gate.share(part))
        torch.testing.assert_close(own, whole[part], atol=1e-5, rtol=0)


def test_share_with_no_gated_row():
    gate = Gate(torch.tensor([False, True, False]), {"degrees": torch.tensor([90.0])})
    part = gate.share(slice(0, None, 2))
    assert part.rows.tolist() == [False, False]
    assert len(part.draw["degrees"]) == 0
    images = torch.rand(2, 1, 4, 4)
    labels = torch.zeros(2, dtype=torch.int64)
    assert TailAugment(Rotation(), torch.ones(CLASSES)).apply_gate(images, labels, part) == (images, labels)


def test_source_rows_come_with_their_labels_and_the_gate_looks_at_them():
    images, _ = batch(seed=1)
    labels = torch.zeros(len(images), dtype=torch.int64)  # all head: only the source's labels can open the gate
    source_images, source_labels = batch(seed=2)
    probability = torch.tensor([0.0, 0.0, 1.0, 1.0])
    before = images.clone()
    out, mixed = TailAugment(Rotation(), probability)(
        images, labels, source=(source_images, source_labels), generator=seeded()
    )
    tail = source_labels >= 2
    assert 0 < tail.sum() < len(tail)
    assert torch.equal(mixed, torch.where(tail, source_labels, labels))
    assert torch.equal(out[~tail], images[~tail])
    gate = TailAugment(Rotation(), probability).sample(images.shape, source_labels, generator=seeded())
    torch.testing.assert_close(out[tail], Rotation().apply(source_images[tail], gate.draw))
    assert torch.equal(images, before)
    assert labels.sum() == 0


def test_source_of_another_shape_is_refused():
    images, labels = batch()
    with pytest.raises(ShapeError, match="source images"):
        TailAugment(Rotation(), torch.ones(CLASSES))(images, labels, source=batch(32))


@pytest.mark.parametrize("source", [False, True])
def test_uint8_is_divided_by_255(nuisance, source):
    images, labels = batch()
    pixels = (images * 255).round().to(torch.uint8)
    stage = TailAugment(nuisance, torch.full((CLASSES,), 0.5))
    floats = pixels.float() / 255
    out, _ = stage(pixels, labels, generator=seeded(), source=(pixels, labels) if source else None)
    expected, _ = stage(floats, labels, generator=seeded(), source=(floats, labels) if source else None)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_stay_half_and_near(nuisance, dtype):
    images, labels = batch(16)
    stage = TailAugment(nuisance, torch.full((CLASSES,), 0.5))
    out, _ = stage(images.to(dtype), labels, generator=seeded())
    expected, _ = stage(images, labels, generator=seeded())
    assert out.dtype == dtype
    assert (out.float() - expected).abs().mean() < 0.02


def test_empty_batch(nuisance):
    out, labels = TailAugment(nuisance, torch.ones(CLASSES))(*batch(0))
    assert out.shape == (0, 1, 16, 16)
    assert labels.shape == (0,)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: Compose([Lighting(), net])], ids=["bare", "composed"])
def test_the_translator_stays_outside_the_model(wrap):
    network = munit().train()
    stage = TailAugment(wrap(network), torch.full((CLASSES,), 0.5))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())

    model = nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES))
    model.add_module("stage", stage)
    model.train()
    model.requires_grad_(True)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert set(model.state_dict()) == {"1.weight", "1.bias"}
    assert len(list(model.parameters())) == 2
    assert network not in set(model.modules())
    out, _ = stage(*batch())
    assert not out.requires_grad


def test_the_translator_follows_the_model_to_another_dtype():
    network = munit()
    model = nn.ModuleDict({"stage": TailAugment(Compose([Lighting(), network]), torch.full((CLASSES,), 0.3))})
    model.double()
    assert next(model["stage"].nuisance.nuisances[1].parameters()).dtype == torch.float64
    assert next(network.parameters()).dtype == torch.float32, "the caller's own translator stays as it was"
    assert model["stage"].probability.dtype == torch.float32, "half or double would move rows over the threshold"


def test_functions_can_be_applied_to_a_model_that_holds_the_stage():
    """`nn.Module.apply(fn)` visits every child, as weight initialisation does."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("stage", TailAugment(Rotation(), torch.ones(CLASSES)))
    seen = []
    assert model.apply(lambda module: seen.append(type(module).__name__)) is model
    assert seen == ["Linear", "TailAugment", "Sequential"]


def test_deep_copies_draw_the_same(nuisance):
    images, labels = batch()
    stage = TailAugment(nuisance, torch.full((CLASSES,), 0.5), seed=3)
    twin = copy.deepcopy(stage)
    assert torch.equal(stage(images, labels)[0], twin(images, labels)[0])


@pytest.mark.parametrize("bad", [[0.5, 1.1], [-0.1], [float("nan")], 0.5, [[0.5]]])
def test_bad_probability(bad):
    with pytest.raises(RangeError, match="probability"):
        TailAugment(Rotation(), torch.tensor(bad))


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_outside_the_table(label):
    images, labels = batch()
    labels[7] = label
    with pytest.raises(RangeError, match="labels must lie in"):
        TailAugment(Rotation(), torch.ones(CLASSES))(images, labels)


def test_repr_names_nuisance_and_reach():
    assert "Rotation, 1 of 2 classes" in repr(TailAugment(Rotation(), torch.tensor([0.0, 0.4])))
