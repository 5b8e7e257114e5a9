import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from gen_invariance.data.images import ImageData
from gen_invariance.data.loader import LongTailSampler, ResidentLoader, find_labels
from gen_invariance.data.sampling import epoch_indices
from gen_invariance.data.settings import RULES, DelayedRule
from gen_invariance.errors import DataError, RangeError, SettingsError, ShapeError

LABELS = torch.tensor([0] * 12 + [1] * 6 + [2] * 3)


class Undecodable(Dataset):
    """Has labels, and fails the test when an image is asked for."""

    def __init__(self, **labels):
        self.__dict__.update(labels)

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        raise AssertionError("an image was decoded")


def image_data(labels=LABELS):
    images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return ImageData(images, labels, tuple("abc"))


@pytest.mark.parametrize(
    "holder",
    [
        LABELS,
        LABELS.int(),
        LABELS.numpy(),
        LABELS.tolist(),
        tuple(LABELS.tolist()),
        image_data(),
        Undecodable(targets=LABELS.tolist()),
        Undecodable(labels=LABELS.numpy().astype(np.uint8)),
        Subset(Undecodable(targets=LABELS), range(len(LABELS))),
    ],
)
def test_labels_are_found_without_decoding(holder):
    found = find_labels(holder)
    assert found.dtype == torch.int64
    assert torch.equal(found, LABELS)


def test_nested_subsets_give_the_labels_of_their_rows():
    outer = Subset(Undecodable(targets=LABELS), [20, 0, 13, 12])
    assert find_labels(Subset(outer, [2, 0])).tolist() == [1, 2]
    sampler = LongTailSampler(Subset(outer, [2, 0]), rule="class_balanced")
    assert len(sampler) == 2
    assert set(sampler) <= {0, 1}


@pytest.mark.parametrize(
    ("holder", "error"),
    [
        (Undecodable(), SettingsError),
        (TensorDataset(LABELS), SettingsError),
        (Undecodable(targets="abc"), SettingsError),
        (["cat", "dog"], SettingsError),
        ([[0], [1, 2]], SettingsError),
        ([0.5, 1.0], ShapeError),
        ([[0, 1], [1, 0]], ShapeError),
        ([-1, 0], RangeError),
        ([], DataError),
    ],
)
def test_labels_that_cannot_be_used_are_refused(holder, error):
    with pytest.raises(error) as caught:
        LongTailSampler(holder)
    assert "\n" not in str(caught.value)


@given(
    world_size=st.integers(1, 5),
    num_samples=st.one_of(st.none(), st.integers(1, 40)),
    rule=st.sampled_from(RULES),
    epoch=st.integers(0, 3),
)
def test_ranks_together_draw_what_one_process_draws(world_size, num_samples, rule, epoch):
    options = {"rule": rule, "seed": 4, "num_epochs": 4, "num_samples": num_samples}
    alone = LongTailSampler(LABELS, **options)
    ranks = [LongTailSampler(LABELS, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for sampler in (alone, *ranks):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
    whole = list(alone)
    together = [None] * len(whole)
    for rank, sampler in enumerate(ranks):
        together[rank::world_size] = list(sampler)
    assert together == whole
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    assert whole == epoch_indices(LABELS, epoch=epoch, **options).tolist()


def test_sampler_follows_a_rule_by_epoch():
    sampler = LongTailSampler(LABELS, rule=DelayedRule(start=1), seed=0)
    assert sorted(sampler) == list(range(len(LABELS)))
    sampler.set_epoch(1)
    assert list(sampler) == epoch_indices(LABELS, rule="class_balanced", epoch=1, seed=0).tolist()


@pytest.mark.parametrize("make", [LongTailSampler, lambda _, **o: ResidentLoader(image_data(), batch_size=8, **o)])
@pytest.mark.parametrize(
    "options",
    [{"rule": "balanced"}, {"rule": lambda epoch: "balanced"}, {"rank": 2, "world_size": 2}, {"rank": -1}],
)
def test_bad_rules_and_ranks_are_refused(make, options):
    with pytest.raises(SettingsError) as caught:
        make(LABELS, **options)
    assert "\n" not in str(caught.value)


def test_accelerate_shards_one_common_list():
    def rows_of(rank):
        sampler = LongTailSampler(LABELS, rule="class_balanced", seed=7)
        loader = DataLoader(TensorDataset(torch.arange(len(LABELS))), batch_size=3, sampler=sampler)
        loader = prepare_data_loader(loader, num_processes=2, process_index=rank, even_batches=False)
        loader.set_epoch(2)
        return [row for batch in loader.batch_sampler for row in batch]

    drawn = sorted(rows_of(0) + rows_of(1))
    assert drawn == sorted(epoch_indices(LABELS, rule="class_balanced", epoch=2, seed=7).tolist())
    assert not hasattr(LongTailSampler(LABELS), "generator")


@given(
    batch_size=st.integers(1, 25),
    rule=st.sampled_from(RULES),
    drop_last=st.booleans(),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 2),
)
@settings(max_examples=50)
def test_steps_cut_the_epoch_list_and_ranks_cut_the_batch(batch_size, rule, drop_last, world_size, seed):
    batch_size = max(world_size, min(batch_size, len(LABELS)) if drop_last else batch_size)
    options = {"batch_size": batch_size, "rule": rule, "seed": seed, "num_epochs": 3, "drop_last": drop_last}
    loaders = [ResidentLoader(image_data(), rank=r, world_size=world_size, **options) for r in range(world_size)]
    steps = loaders[0].steps_per_epoch
    assert steps == (len(LABELS) // batch_size if drop_last else -(-len(LABELS) // batch_size))
    for epoch in (1, 0):  # backwards: no step depends on the ones before it
        whole = epoch_indices(LABELS, rule=rule, epoch=epoch, seed=seed, num_epochs=3).tolist()
        for position in range(steps):
            batch = whole[position * batch_size : (position + 1) * batch_size]
            for rank, loader in enumerate(loaders):
                rows = loader.indices(epoch * steps + position)
                assert rows.dtype == torch.int64
                assert rows.tolist() == batch[rank::world_size]


def test_batches_are_the_images_of_their_rows():
    data = image_data()
    loader = ResidentLoader(data, batch_size=8, rule="class_balanced", seed=1)
    seen = list(loader.epoch(2))
    assert len(seen) == len(loader) == 3
    for position, (images, labels) in enumerate(seen):
        rows = loader.indices(6 + position)
        assert images.dtype == torch.float32
        torch.testing.assert_close(images[:, 0, 0, 0] * 255, rows.float())
        assert torch.equal(labels, data.labels[rows])
        again = loader.batch(6 + position)
        assert torch.equal(images, again[0])
        assert torch.equal(labels, again[1])
    assert data.images.dtype == torch.uint8


def test_loader_changes_its_rule_at_the_epoch():
    loader = ResidentLoader(image_data(), batch_size=21, rule=DelayedRule(start=1), seed=0)
    assert [loader.rule_at(epoch) for epoch in range(3)] == ["instance", "class_balanced", "class_balanced"]
    assert sorted(loader.indices(0).tolist()) == list(range(21))
    assert loader.indices(1).tolist() == epoch_indices(LABELS, rule="class_balanced", epoch=1, seed=0).tolist()


def test_streams_of_one_seed_differ():
    first, second = (ResidentLoader(image_data(), batch_size=21, stream=name) for name in ("loader", "source"))
    assert first.indices(0).tolist() != second.indices(0).tolist()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 22, "drop_last": True}])
def test_batch_sizes_without_a_batch_are_refused(options):
    with pytest.raises(SettingsError, match="batch_size"):
        ResidentLoader(image_data(), **options)
    with pytest.raises(SettingsError, match="batch_size"):
        ResidentLoader(image_data(), batch_size=1, rank=0, world_size=2)


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError):
        ResidentLoader(image_data().subset(torch.tensor([], dtype=torch.int64)), batch_size=1)


@pytest.mark.parametrize("rule", [*RULES, DelayedRule(start=30)])
def test_expected_uses_are_what_epochs_come_to(rule):
    loader = ResidentLoader(image_data(), batch_size=21, rule=rule, seed=4, num_epochs=60)
    counted = torch.zeros(len(LABELS), dtype=torch.float64)
    for step in range(60):
        counted += torch.bincount(loader.indices(step), minlength=len(LABELS))
    expected = loader.expected_uses(range(60))
    assert expected.sum().item() == pytest.approx(len(LABELS))
    assert ((counted / 60 - expected).abs() <= 5 * (expected / 60).sqrt()).all()
    if rule == "instance":
        torch.testing.assert_close(expected, torch.ones(len(LABELS), dtype=torch.float64))


def test_a_loop_that_never_tells_the_epoch_gets_one_after_another():
    labels = torch.tensor([0] * 30 + [1] * 3)
    untold, told = LongTailSampler(labels, seed=3), LongTailSampler(labels, seed=3)
    for epoch in range(3):
        told.set_epoch(epoch)
        assert list(untold) == list(told)
        assert list(told) == list(told)


@pytest.mark.parametrize("name", ["series", "hugging face", "array protocol"])
def test_labels_in_other_containers(name):
    labels = [0, 0, 1, 2]
    if name == "series":
        data = pytest.importorskip("pandas").Series(labels)
    elif name == "hugging face":
        data = pytest.importorskip("datasets").Dataset.from_dict({"label": labels})
    else:
        data = type("Array", (), {"__array__": lambda self, dtype=None, copy=None: np.array(labels)})()
    assert find_labels(data).tolist() == labels
