"""Cuts by the published rules: against a plain reading of them, digests pinned, and laws that hold for every rule."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gen_invariance.benchmark.registry import read_benchmark
from gen_invariance.data.longtail import CUTS, cut_indices, exponential_counts, step_counts
from gen_invariance.errors import DataError, SettingsError


def cao(labels, counts, seed):
    """As their loader does it, on NumPy's global state."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    kept = []
    for label, count in zip(np.unique(labels), counts, strict=True):
        places = np.where(labels == label)[0]
        np.random.shuffle(places)  # noqa: NPY002
        kept.extend(places[:count])
    np.random.set_state(before)  # noqa: NPY002
    return sorted(int(place) for place in kept)


def digest(rows):
    return hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def by_class(classes, each):
    """Labels in class order, as the cut depends on places within a class only."""
    return torch.arange(classes).repeat_interleave(each)


PINNED = {
    ("cifar10", "exp", 10): "3522a3be09038685",
    ("cifar10", "exp", 50): "cde63cee87dc4c01",
    ("cifar10", "exp", 100): "b582b3a43431cddf",
    ("cifar10", "step", 100): "7a144b040b4e6349",
    ("cifar100", "exp", 10): "1c44f46a86aae7f4",
    ("cifar100", "exp", 50): "ea9d313cbee05cd7",
    ("cifar100", "exp", 100): "ba66b1fd8f540fe3",
}
"""Of the rows that Cao et al.'s rule keeps of a set in class order, seed 0."""


@pytest.mark.parametrize(("name", "profile", "imbalance"), PINNED)
def test_the_cuts_of_cao_et_al_stay_what_they_are(name, profile, imbalance):
    classes, each = (10, 5000) if name == "cifar10" else (100, 500)
    sizes = {"exp": exponential_counts, "step": step_counts}[profile](classes, largest=each, imbalance=imbalance)
    labels = by_class(classes, each)
    rows = cut_indices(labels, sizes, cut="cao", seed=0)
    assert rows.tolist() == cao(labels.numpy(), sizes.tolist(), 0)
    assert digest(rows) == PINNED[name, profile, imbalance]
    tail = "_step" if profile == "step" else ""
    task = read_benchmark(f"{name}_lt{tail}_if{imbalance}").task
    assert (task.cut, task.shuffle_order, task.validation_fraction) == ("cao", False, 0)


def test_the_first_of_each_class():
    labels = torch.tensor([1, 0, 1, 0, 0, 1, 2])
    assert cut_indices(labels, torch.tensor([2, 1, 1]), cut="first", seed=5).tolist() == [0, 1, 3, 6]


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    share=st.floats(0, 1),
    cut=st.sampled_from(CUTS),
    seed=st.integers(0, 5),
)
def test_a_smaller_cut_is_part_of_a_larger_one_and_has_its_counts(labels, share, cut, seed):
    labels = torch.tensor(labels)
    available = torch.bincount(labels, minlength=4)
    small = (available * share).long()
    rows, larger = (set(cut_indices(labels, counts, cut=cut, seed=seed).tolist()) for counts in (small, available))
    assert rows <= larger
    assert torch.equal(torch.bincount(labels[sorted(rows)], minlength=4), small)


def test_bad_cuts_are_refused():
    with pytest.raises(SettingsError, match=r"data.cut must be one of own, cao, first, got 'cui'"):
        cut_indices(torch.tensor([0]), torch.tensor([1]), cut="cui", seed=0)
    for cut in CUTS:
        with pytest.raises(DataError, match="class 0 has 1 images, 2 were asked for"):
            cut_indices(torch.tensor([0]), torch.tensor([2]), cut=cut, seed=0)
