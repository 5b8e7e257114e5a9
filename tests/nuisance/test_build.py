"""Nuisances by name: generic ones, those of installed packages, classes by import path, and what is refused."""

from importlib.metadata import EntryPoint

import pytest
import torch

from gen_invariance.errors import SettingsError
from gen_invariance.nuisance import build
from gen_invariance.nuisance.build import ENTRY_POINTS, NUISANCES, build_nuisance
from gen_invariance.nuisance.generic import RandAugment
from gen_invariance.nuisance.geometry import Rotation

HERE = "gen_invariance.nuisance.geometry"


class Halves:
    """No nuisance: it cannot be sampled."""

    def apply(self, images, draw):
        return images / 2


def of_degrees(*, degrees: float = 3.0):
    return Rotation(degrees)


def test_every_name_builds_and_takes_a_batch():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name in NUISANCES:
        nuisance = build_nuisance(name)
        draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        assert nuisance.apply(images, draw).shape == images.shape
    policy = build_nuisance("randaugment", num_ops=1, magnitude=5)
    assert isinstance(policy, RandAugment)
    assert (policy.num_ops, policy.magnitude) == (1, 5)


def test_an_installed_package_offers_one_by_name(monkeypatch):
    mine = EntryPoint("turned", f"{__name__}:of_degrees", ENTRY_POINTS)

    def offered(*, group, name):
        return [mine] if (group, name) == (mine.group, mine.name) else []

    monkeypatch.setattr(build, "entry_points", offered)
    monkeypatch.setattr(EntryPoint, "load", lambda self: of_degrees)
    assert build_nuisance("turned", degrees=9.0).degrees == 9.0
    with pytest.raises(SettingsError, match="nuisance turned has no option 'radians'"):
        build_nuisance("turned", radians=1)


def test_a_class_by_its_import_path():
    assert build_nuisance(f"{HERE}:Rotation", degrees=7.0).degrees == 7.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotating", "unknown nuisance 'rotating'; choose one of background, "),
        ("no.such.module:Thing", "cannot be imported"),
        (f"{HERE}:Rotating", "cannot be imported"),
        (f"{HERE}:", "cannot be imported|not a class"),
        ("gen_invariance.data.longtail:math", "is a module, not a class or a function"),
        (f"{__name__}:Halves", r"a Halves has no sample\(\)"),
    ],
)
def test_what_is_no_nuisance_is_refused(name, message):
    with pytest.raises(SettingsError, match=message):
        build_nuisance(name)
