"""Telling changed images from images as they are: what the data hold cannot be told, what they lack can."""

import torch
from sklearn.datasets import load_digits

from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.run import named_generator
from gen_invariance.stats import Estimate
from gen_invariance.translator.quality.discern import _split, tell_apart


def upright_digits(count=240):
    """Digits inside a circle, so that turning them cuts nothing off."""
    ink = torch.from_numpy(load_digits().images[:count]).float()[:, None] / 16
    small = torch.nn.functional.interpolate(ink, size=(12, 12), mode="bilinear", align_corners=False)
    return torch.nn.functional.pad(small, (2,) * 4)


def turned_digits():
    upright, nuisance = upright_digits(), Rotation(180)
    return nuisance.apply(upright, nuisance.sample(upright.shape, generator=named_generator(0)))


def area(images, degrees=180):
    return tell_apart(Rotation(degrees), images, generator=named_generator(0), steps=40)


def test_every_angle_is_told_on_upright_digits_and_not_on_turned_ones():
    upright, turned = area(upright_digits()), area(turned_digits())
    assert upright.low > 0.8
    assert turned.low < 0.5 < turned.high < 0.6


def test_what_changes_nothing_is_not_told():
    found = area(upright_digits(), degrees=0)
    assert found.low < 0.5 < found.high < 0.6
    assert area(upright_digits(), degrees=0) == found, "all randomness is the generator's"


def test_too_few_images_say_nothing():
    assert area(upright_digits(3)) == Estimate(0.5, 0.0, 1.0)


def test_no_group_is_in_both_halves():
    groups = torch.arange(20).repeat_interleave(5)
    first, second = _split(100, groups, named_generator(0))
    assert not set(groups[first].tolist()) & set(groups[second].tolist())
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(100))
    assert min(len(first), len(second)) >= 40
