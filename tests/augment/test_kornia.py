"""The nuisance as a kornia augmentation: gated rows only, replayable, and out of the module tree."""

import math

import kornia.augmentation as K
import pytest
import torch
from stage_inputs import Spy, batch, moved, munit

from gen_invariance.augment.kornia import KorniaNuisance
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.geometry import Rotation


def test_probability_zero_and_one(nuisance):
    images, _ = batch()
    spy = Spy(nuisance)
    assert torch.equal(KorniaNuisance(spy, p=0.0)(images), images)
    assert spy.shown == []
    assert moved(images, KorniaNuisance(nuisance, p=1.0)(images)).all()


def test_runs_the_network_on_gated_rows_only():
    images, _ = batch(200)
    spy = Spy(Rotation())
    out = KorniaNuisance(spy, p=0.2)(images)
    assert spy.shown == [int(moved(images, out).sum())]
    assert abs(spy.shown[0] - 40) < 5 * math.sqrt(200 * 0.2 * 0.8)


def test_replay_alone_and_in_a_sequence_is_bit_equal(nuisance):
    images, _ = batch()
    augmentation = KorniaNuisance(nuisance, p=0.5)
    once = augmentation(images)
    assert torch.equal(augmentation(images, params=augmentation._params), once)
    assert not torch.equal(augmentation(images), once)

    pipeline = K.AugmentationSequential(K.RandomHorizontalFlip(), KorniaNuisance(nuisance, p=0.5))
    once = pipeline(images)
    assert torch.equal(pipeline(images, params=pipeline._params), once)


def test_equals_the_nuisance_on_its_rows(nuisance):
    images, _ = batch()
    augmentation = KorniaNuisance(nuisance, p=0.5)
    out = augmentation(images)
    params = dict(augmentation._params)
    rows = params.pop("batch_prob") > 0.5
    params.pop("forward_input_shape")
    expected = nuisance.apply(images[rows], {name: value[rows] for name, value in params.items()})
    torch.testing.assert_close(out[rows], expected)
    assert torch.equal(out[~rows], images[~rows])


def test_class_aware_recipe_through_batch_prob():
    """How to gate by class inside a kornia pipeline that has other members: overwrite the gate, then replay."""
    images, labels = batch()
    spy = Spy(Rotation())
    pipeline = K.AugmentationSequential(KorniaNuisance(spy, p=1.0), data_keys=["input"])
    params = pipeline.forward_parameters(images.shape)
    tail = labels >= 2
    params[0].data["batch_prob"] = tail.float()
    out = pipeline(images, params=params)
    assert torch.equal(moved(images, out), tail)
    assert spy.shown == [int(tail.sum())]


def test_seeds_and_global_stream():
    images, _ = batch()
    state = torch.random.get_rng_state()
    one, two, other = (KorniaNuisance(Rotation(), p=0.5, seed=seed)(images) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gate_does_not_shift_the_draws():
    shape = (64, 1, 16, 16)
    few, many = (KorniaNuisance(Rotation(), p=p, seed=0).forward_parameters(shape) for p in (0.1, 0.9))
    assert torch.equal(few["degrees"], many["degrees"])
    assert few["batch_prob"].sum() < many["batch_prob"].sum()


def test_same_on_batch_and_p_batch():
    images, _ = batch()
    params = KorniaNuisance(Rotation(), p=1.0, same_on_batch=True).forward_parameters(images.shape)
    assert params["degrees"].unique().numel() == 1
    never = KorniaNuisance(Rotation(), p=1.0, p_batch=0.0)
    assert torch.equal(never(images), images)


def test_keeps_the_translator_out_and_in_eval():
    network = munit().train()
    pipeline = K.AugmentationSequential(KorniaNuisance(network, p=1.0)).train()
    assert not network.training
    assert list(pipeline.parameters()) == []
    assert not any("encoder" in name for name in pipeline.state_dict())
    pipeline.double()
    assert next(pipeline[0].nuisance.parameters()).dtype == torch.float64
    assert next(network.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtype_comes_back(nuisance, dtype):
    images, _ = batch(8)
    assert KorniaNuisance(nuisance, p=0.5)(images.to(dtype)).dtype == dtype


def test_empty_batch(nuisance):
    assert KorniaNuisance(nuisance, p=0.5)(torch.zeros(0, 1, 16, 16)).shape == (0, 1, 16, 16)


@pytest.mark.parametrize("options", [{"p": 1.5}, {"p": -1}, {"p_batch": 2}])
def test_bad_probability(options):
    with pytest.raises(SettingsError, match="p and p_batch"):
        KorniaNuisance(Rotation(), **options)
