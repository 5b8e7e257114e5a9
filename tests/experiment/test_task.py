"""Tasks: the same images for the same (task, seed), the nuisance once on every image, nothing shared between parts."""

import json

import pytest
import torch

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.errors import DataError, SettingsError
from gen_invariance.experiment.settings import Task
from gen_invariance.experiment.task import prepare
from gen_invariance.nuisance.compose import Identity
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.protocol import select_rows

SMALL = {"largest": 40, "imbalance": 8.0, "rest_is_test": True}
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rotated():
    task = Task(nuisance="rotation", nuisance_options={"degrees": 90}, validation_fraction=0.1, **SMALL)
    return task, prepare(task, seed=1)


def digests(prepared):
    return [getattr(prepared, part).digest for part in PARTS]


def test_a_function_of_task_and_seed(rotated):
    task, prepared = rotated
    state = torch.random.get_rng_state()
    again, other = prepare(task, seed=1), prepare(task, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert digests(prepared) == digests(again)
    assert not set(digests(prepared)) & set(digests(other))


def test_each_part_is_its_own_images_under_its_own_draws(rotated):
    _, prepared = rotated
    assert isinstance(prepared.nuisance, Rotation)
    for part in PARTS:
        before, after = getattr(prepared.split, part), getattr(prepared, part)
        assert len(before) == len(after) > 0
        assert torch.equal(before.labels, after.labels)
        rows = torch.arange(0, len(before), 11)
        moved = prepared.nuisance.apply(before.float_images(rows), select_rows(prepared.draws[part], rows))
        assert (to_uint8(moved).int() - after.images[rows].int()).abs().max() <= 1
    angles = [prepared.draws[part]["degrees"] for part in PARTS]
    assert all(90 >= values.abs().max() > 60 for values in angles)
    shortest = min(map(len, angles))
    assert not torch.equal(angles[0][:shortest], angles[2][:shortest])


def test_identity_leaves_every_part_as_the_split_has_it():
    prepared = prepare(Task(**SMALL), seed=0)
    assert isinstance(prepared.nuisance, Identity)
    assert digests(prepared) == [getattr(prepared.split, part).digest for part in PARTS]


def test_parts_share_no_image(rotated):
    _, prepared = rotated
    split = prepared.split
    own = [set(getattr(split, f"{part}_indices").tolist()) for part in PARTS]
    assert sum(map(len, own)) == len(set.union(*own))


def test_sizes_and_groups():
    task = Task(many_above=20, few_below=10, **SMALL)
    prepared = prepare(task, seed=0)
    counts = prepared.train.counts
    assert sorted(counts.tolist(), reverse=True) == [40, 31, 25, 20, 15, 12, 10, 7, 6, 5]
    assert torch.equal(prepared.groups["many"], counts > 20)
    assert torch.equal(prepared.groups["few"], counts < 10)
    assert torch.equal(prepared.groups["medium"], (counts <= 20) & (counts >= 10))


def test_only_classes_of_some_ranks_meet_the_nuisance():
    """Their training images and no others are moved, under the draws of the whole; test images all are."""
    whole = prepare(Task(nuisance="rotation", **SMALL), seed=3)
    some = prepare(Task(nuisance="rotation", transformed_ranks=(0, 9), **SMALL), seed=3)
    chosen = torch.isin(some.train.labels, some.split.order[[0, 9]])
    assert sorted(some.train.labels[chosen].bincount().tolist())[-2:] == [5, 40]
    assert torch.equal(some.train.images[chosen], whole.train.images[chosen])
    assert torch.equal(some.train.images[~chosen], some.split.train.images[~chosen])
    assert (some.train.images[chosen] != some.split.train.images[chosen]).flatten(1).any(1).all()
    assert some.test.digest == whole.test.digest
    nobody = prepare(Task(nuisance="rotation", transformed_ranks=(), **SMALL), seed=3)
    assert nobody.train.digest == nobody.split.train.digest
    with pytest.raises(SettingsError, match="transformed_ranks names rank 10, there are 10 classes"):
        prepare(Task(nuisance="rotation", transformed_ranks=(10,), **SMALL), seed=3)


def test_fewer_test_images():
    whole, some = (prepare(Task(nuisance="rotation", test_images=number, **SMALL), seed=3) for number in (None, 7))
    assert some.test.counts.tolist() == [7] * 10
    assert set(some.split.test_indices.tolist()) < set(whole.split.test_indices.tolist())
    assert torch.equal(some.originals("test").labels, some.test.labels)
    assert some.train.digest == whole.train.digest


def test_repeated_images_meet_draws_of_their_own():
    task = Task(nuisance="rotation", shortage="repeat", base_images=3, **SMALL)
    prepared = prepare(task, seed=0)
    assert sorted(prepared.train.counts.tolist(), reverse=True) == [40, 31, 25, 20, 15, 12, 10, 7, 6, 5]
    assert len(prepared.split.train_indices.unique()) == 30
    assert len(prepared.draws["train"]["degrees"].unique()) == len(prepared.train)
    assert len(prepared.train.images.flatten(1).unique(dim=0)) == len(prepared.train)


def test_a_source_without_test_images():
    """scikit-learn's digits have none: an error unless the rest serves, or nobody asks for them."""
    options = {"largest": 40, "imbalance": 8.0}
    with pytest.raises(DataError):
        prepare(Task(**options), seed=0)
    prepared = prepare(Task(**options), seed=0, need_test=False)
    assert len(prepared.test) == 0
    assert len(prepared.train) > 0


def test_moving_to_a_device_moves_all_three_parts(rotated, monkeypatch):
    _, prepared = rotated
    asked = []
    monkeypatch.setattr(ImageData, "to", lambda data, device: asked.append((data, device)) or data)
    prepared.to("cuda")
    assert [data for data, _ in asked] == [getattr(prepared, part) for part in PARTS]
    assert {device for _, device in asked} == {"cuda"}


def test_names_and_identity():
    assert Task().name == "digits"
    assert Task(nuisance="rotation").name == "digits-rotation"
    task = Task(nuisance="rotation", nuisance_options={"degrees": 30})
    assert json.loads(json.dumps(task.identity()))["nuisance_options"] == {"degrees": 30}
    assert task.identity() != Task(nuisance="rotation").identity()
    assert Task(**json.loads(json.dumps(task.identity()))) == task


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"few_below": 0}, "few_below must be positive"),
        ({"few_below": 102}, "few_below must be positive and at most many_above"),
        ({"shortage": "steal"}, "shortage must be one of error, repeat, cap"),
        ({"base_images": 5}, "base_images needs shortage=repeat"),
        ({"shortage": "repeat", "base_images": 0}, "base_images must be at least 1"),
        ({"test_images": 0}, "test_images must be at least 1"),
        ({"transformed_ranks": (-1,)}, "data.transformed_ranks must be at least 0"),
        ({"source": "digit"}, "digit"),
        ({"nuisance": "rotate"}, "unknown nuisance 'rotate'"),
        ({"nuisance": "rotation", "nuisance_options": {"degres": 3}}, "degres"),
        ({"profile": "expo"}, "expo"),
        ({"imbalance": 0.5}, "imbalance"),
    ],
)
def test_bad_tasks_are_named(options, message):
    with pytest.raises(SettingsError, match=message):
        prepare(Task(**{**SMALL, **options}), seed=0)
