import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gen_invariance.data.grouping import hold_groups, number_groups, ranks_by_key
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import long_tailed_indices, split_indices
from gen_invariance.data.readers.registry import load_source
from gen_invariance.data.split import make_long_tailed
from gen_invariance.errors import DataError, SettingsError, ShapeError
from gen_invariance.experiment.settings import Task
from gen_invariance.experiment.task import prepare
from gen_invariance.run import named_generator

CLASSES = 4
grouped = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, 9)), min_size=1, max_size=60).map(
    lambda rows: (torch.tensor([label for label, _ in rows]), torch.tensor([group for _, group in rows]))
)
"""Labels and groups; a group may show several classes."""


def own_groups(labels, groups):
    """Groups that show one class each."""
    return labels * 100 + groups


def data_of(labels, groups):
    """Images whose pixels spell their row."""
    rows = torch.arange(len(labels))
    images = torch.stack([rows // 256, rows % 256], dim=1).to(torch.uint8).reshape(-1, 1, 1, 2)
    return ImageData(images, labels, tuple(f"class {c}" for c in range(int(labels.max()) + 1)), "set", groups)


def tracks(classes, *, groups, frames):
    """`classes` classes of `groups` tracks of `frames` images, tracks numbered over the set."""
    numbers = torch.arange(classes * groups).repeat_interleave(frames)
    return data_of(numbers // groups, numbers)


def shared(*parts):
    """Groups that two of `parts` show."""
    sets = [set(part.groups.tolist()) for part in parts]
    return [one & other for place, one in enumerate(sets) for other in sets[place + 1 :] if one & other]


def test_keys_have_one_number_in_all_parts():
    train, none, test = number_groups(["b", (1, 2), "b"], None, [(1, 2), "c"])
    assert (train.tolist(), none, test.tolist()) == ([0, 1, 0], None, [1, 2])
    assert number_groups([])[0].dtype == torch.int64


def slow_places(keys, order):
    seen, places = {}, [0] * len(keys)
    for row in order:
        places[row] = seen.get(keys[row], 0)
        seen[keys[row]] = places[row] + 1
    return places


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 5))
def test_places_are_counted_in_the_order_given(keys, seed):
    order = torch.randperm(len(keys), generator=named_generator(seed))
    assert ranks_by_key(torch.tensor(keys), order).tolist() == slow_places(keys, order.tolist())


@given(grouped, st.integers(0, 5), st.data())
def test_chosen_images_show_as_many_groups_as_they_can(rows, seed, data):
    labels, groups = rows
    available = torch.bincount(labels, minlength=CLASSES)
    counts = torch.tensor([data.draw(st.integers(0, int(n))) for n in available])
    fewer = torch.tensor([data.draw(st.integers(0, int(n))) for n in counts])
    chosen, subset = (
        long_tailed_indices(labels, n, generator=named_generator(seed), groups=groups) for n in (counts, fewer)
    )
    assert torch.equal(torch.bincount(labels[chosen], minlength=CLASSES), counts)
    assert set(subset.tolist()) <= set(chosen.tolist())
    for label, count in enumerate(counts.tolist()):
        there = groups[labels == label]
        taken = groups[chosen][labels[chosen] == label]
        assert len(taken.unique()) == min(count, len(there.unique()))
        # In turn: a group is used a second time only when no group is left that was used less often and has an image.
        used = {int(group): int((taken == group).sum()) for group in there.unique()}
        has = {group: int((there == group).sum()) for group in used}
        spare = [used[group] for group in used if used[group] < has[group]]
        assert not spare or max(used.values()) <= min(spare) + 1


def test_each_group_is_chosen_equally_often_whatever_its_size():
    labels, groups = torch.zeros(12, dtype=torch.int64), torch.tensor([0] * 10 + [1, 2])
    hits, draws = torch.zeros(3), 2000
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        hits[groups[long_tailed_indices(labels, torch.tensor([1]), generator=generator, groups=groups)]] += 1
    assert (hits / draws - 1 / 3).abs().max() < 5 * (2 / 9 / draws) ** 0.5


@given(grouped, st.floats(0, 0.99), st.integers(0, 5))
def test_no_group_is_on_both_sides(rows, fraction, seed):
    labels, groups = rows
    kept, held = split_indices(labels, fraction=fraction, generator=named_generator(seed), groups=groups)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    assert torch.equal(kept, kept.sort().values)
    assert torch.equal(held, held.sort().values)
    assert not set(groups[kept].tolist()) & set(groups[held].tolist())
    assert set(labels[kept].tolist()) == set(labels.tolist())
    assert fraction or not len(held)


@given(grouped, st.floats(0.01, 0.99), st.integers(0, 5))
def test_groups_of_one_class_come_as_near_to_the_fraction_as_they_can(rows, fraction, seed):
    labels, groups = rows[0], own_groups(*rows)
    _, held = split_indices(labels, fraction=fraction, generator=named_generator(seed), groups=groups)
    for label in labels.unique():
        sizes = groups[labels == label].unique(return_counts=True)[1]
        out = groups[held][labels[held] == label].unique(return_counts=True)[1]
        if len(sizes) == 1:
            assert not len(out)
            continue
        wanted = min(max(int(sizes.sum() * fraction + 0.5), 1), int(sizes.sum()) - 1)
        assert 0 < len(out) < len(sizes)
        near = abs(int(out.sum()) - wanted) <= int(sizes.max()) / 2
        assert near or len(out) in (1, len(sizes) - 1)  # one has to go, one has to stay


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0, 0.99), st.integers(0, 5))
def test_groups_of_one_image_are_held_out_as_images_are(labels, fraction, seed):
    labels = torch.tensor(labels)
    plain = split_indices(labels, fraction=fraction, generator=named_generator(seed))[1]
    alone = split_indices(labels, fraction=fraction, generator=named_generator(seed), groups=torch.arange(len(labels)))
    assert torch.equal(torch.bincount(labels[plain], minlength=4), torch.bincount(labels[alone[1]], minlength=4))


def test_a_bound_is_kept_even_where_a_class_then_gives_nothing():
    labels, groups = torch.tensor([0] * 6 + [1] * 4), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    wanted, most = torch.tensor([3, 2]), torch.tensor([2, 2])
    held = hold_groups(labels, groups, wanted=wanted, most=most, generator=named_generator(0))
    assert torch.bincount(labels[held], minlength=2).tolist() == [0, 2]


def test_a_class_of_large_groups_gives_its_smallest():
    labels, groups = torch.zeros(12, dtype=torch.int64), torch.tensor([0] * 5 + [1] * 3 + [2] * 4)
    for seed in range(5):
        _, held = split_indices(labels, fraction=0.1, generator=named_generator(seed), groups=groups)
        assert held.tolist() == [5, 6, 7]


def test_groups_must_fit_the_labels():
    labels = torch.tensor([0, 0, 1])
    for wrong in (torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0])):
        with pytest.raises(ShapeError, match="groups must be int64"):
            split_indices(labels, fraction=0.5, generator=named_generator(0), groups=wrong)
        with pytest.raises(ShapeError, match="groups must be int64"):
            data_of(labels, wrong)


def test_groups_travel_with_the_images():
    data = tracks(2, groups=2, frames=2)
    assert data.subset(torch.tensor([5, 0])).groups.tolist() == [2, 0]
    assert data.to("cpu").groups is data.groups
    plain = data_of(data.labels, None)
    assert plain.subset(torch.tensor([1])).groups is None
    assert len({plain.digest, data.digest, data_of(data.labels, data.groups.flip(0)).digest}) == 3


@given(
    profile=st.sampled_from(["exponential", "step", "zipf", "none"]),
    sizes=st.lists(st.lists(st.integers(1, 6), min_size=6, max_size=9), min_size=1, max_size=4),
    largest=st.sampled_from([None, 4]),
    fraction=st.sampled_from([0.0, 0.2]),
    rest_is_test=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_parts_never_share_a_group(profile, sizes, largest, fraction, rest_is_test, seed):
    flat = torch.tensor([size for groups in sizes for size in groups])
    groups = torch.arange(len(flat)).repeat_interleave(flat)
    labels = torch.tensor([label for label, own in enumerate(sizes) for _ in own])[groups]
    train, test = data_of(labels, groups), data_of(torch.arange(len(sizes)), None)
    split = make_long_tailed(
        (train, test), profile=profile, largest=largest, imbalance=2, validation_fraction=fraction,
        rest_is_test=rest_is_test, seed=seed,
    )  # fmt: skip
    parts = [split.train, split.validation, *([split.test] if rest_is_test else [])]
    assert not shared(*parts)
    assert torch.equal(split.train.counts, split.counts)
    if rest_is_test:
        assert torch.equal(train.groups[split.test_indices], split.test.groups)
        assert (split.test.counts > 0).all()
        # Every group that is nowhere else is tested on, whole.
        free = set(groups.tolist()) - set(split.train.groups.tolist()) - set(split.validation.groups.tolist())
        assert torch.equal(split.test_indices, torch.isin(groups, torch.tensor(sorted(free))).nonzero().flatten())
    else:
        assert split.test is test


def test_a_tail_of_five_images_shows_five_tracks():
    source = tracks(3, groups=8, frames=30)
    split = make_long_tailed((source, None), largest=100, imbalance=20, rest_is_test=True, shuffle_order=False)
    assert split.counts.tolist() == [100, 22, 5]
    assert [len(split.train.groups[split.train.labels == label].unique()) for label in range(3)][1:] == [4, 4]
    split = make_long_tailed((source, source), largest=100, imbalance=20, shuffle_order=False)
    assert len(split.train.groups[split.train.labels == 2].unique()) == 5


def test_what_the_largest_class_needs_is_not_kept_for_the_test():
    source = tracks(2, groups=4, frames=10)
    split = make_long_tailed((source, None), largest=30, imbalance=3, rest_is_test=True, shuffle_order=False)
    assert split.test.counts.tolist()[0] == 10
    with pytest.raises(DataError, match=r"no whole group of class 'class 0' is left for the test set, it has 4"):
        make_long_tailed((source, None), largest=31, imbalance=3, rest_is_test=True, shuffle_order=False)
    with pytest.raises(DataError, match="has 40 images to choose from, 41 were asked for"):
        make_long_tailed((source, None), largest=41, imbalance=3, rest_is_test=True, shuffle_order=False)
    alone = tracks(2, groups=1, frames=10)
    with pytest.raises(DataError, match=r"no whole group of class 'class 0' .* it has 1"):
        make_long_tailed((alone, None), imbalance=3, rest_is_test=True)


@pytest.mark.parametrize("shortage", ["repeat", "cap"])
def test_filled_classes_show_their_groups_in_turn(shortage):
    source = tracks(2, groups=6, frames=5)
    split = make_long_tailed(
        (source, None), shortage=shortage, largest=20, imbalance=5, rest_is_test=True, shuffle_order=False
    )
    assert not shared(split.train, split.test)
    tail = split.train.groups[split.train.labels == 1]
    assert len(tail) == 4
    assert len(tail.unique()) == 3  # the other three are tested on
    if shortage == "repeat":
        assert split.train.counts.tolist() == [20, 4]
    for seed in range(6):
        split = make_long_tailed(
            (source, None),
            shortage=shortage,
            largest=15,
            imbalance=5,
            rest_is_test=True,
            shuffle_order=False,
            seed=seed,
        )
        assert len(split.train.groups[split.train.labels == 1].unique()) == 3  # three images


def write_npz(path, **more):
    arrays = {
        "train_images": np.arange(16, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2),
        "train_labels": np.arange(16) // 8,
        "test_images": np.arange(100, 104, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2),
        "test_labels": np.array([0, 0, 1, 1]),
    }
    np.savez(path, **(arrays | more))
    return path


TRACK = np.arange(16) % 8 // 2  # begins anew in each class


def test_npz_keys_tell_the_groups(tmp_path):
    patients = np.array([f"p{number // 3}" for number in range(16)])
    file = write_npz(
        tmp_path / "a.npz", train_groups=patients, test_groups=["p0", "new", "p5", "new"], train_track=TRACK
    )
    source = load_source("npz", file)
    assert source.train.groups.tolist() == [number // 3 for number in range(16)]
    assert source.test.groups.tolist() == [0, 6, 5, 6]
    source = load_source("npz", file, group="track", image_size=4)
    assert source.train.groups.tolist() == TRACK.tolist()
    assert source.test.groups is None
    assert load_source("npz", write_npz(tmp_path / "plain.npz")).train.groups is None


@pytest.mark.parametrize(
    ("more", "group", "error", "words"),
    [
        ({}, "site", DataError, "has no train_site, which group=site asks for"),
        ({"train_groups": np.zeros(16)}, None, DataError, "train_groups has dtype float64"),
        ({"train_groups": np.zeros(15, int)}, None, ShapeError, r"train_groups has shape \(15,\), expected \(16,\)"),
        ({"test_groups": np.zeros((4, 1), int)}, None, ShapeError, r"test_groups has shape \(4, 1\)"),
        ({"train_groups": np.array([{}] * 16)}, None, DataError, "pickled"),
    ],
)
def test_bad_npz_groups_are_named(tmp_path, more, group, error, words):
    with pytest.raises(error, match=words) as caught:
        load_source("npz", write_npz(tmp_path / "a.npz", **more), group=group)
    assert "\n" not in str(caught.value)


def test_tracks_of_traffic_signs_are_told_apart_by_class(tmp_path):
    source = load_source("gtsrb", write_npz(tmp_path / "gtsrb.npz", train_track=TRACK))
    assert source.train.groups.tolist() == (np.arange(16) // 2).tolist()
    assert source.test.groups is None
    assert (
        load_source("gtsrb", tmp_path / "gtsrb.npz", group="track").train.groups.tolist()
        == (np.arange(16) // 2).tolist()
    )
    assert load_source("gtsrb", write_npz(tmp_path / "plain.npz")).train.groups is None


def test_drawers_are_told_apart_by_alphabet_and_only_when_asked_for(tmp_path):
    drawer, names = np.arange(16) % 4, ["Greek/a", "Greek/b"]
    file = write_npz(tmp_path / "omniglot.npz", train_drawer=drawer, class_names=names)
    assert load_source("omniglot", file).train.groups is None
    assert load_source("omniglot", file, group="drawer").train.groups.tolist() == drawer.tolist()
    file = write_npz(tmp_path / "omniglot.npz", train_drawer=drawer, class_names=["Greek/a", "Latin/a"])
    found = load_source("omniglot", file, group="drawer").train.groups
    assert found.tolist() == [0, 1, 2, 3] * 2 + [4, 5, 6, 7] * 2


def write_folder(root, names):
    for place, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), place, np.uint8)).save(root / name)
    return root


def test_a_folder_tells_groups_by_its_file_names(tmp_path):
    root = write_folder(
        tmp_path / "set",
        ["train/ill/7_a.png", "train/ill/7_b.png", "train/ill/8.png", "train/well/7_c.png", "test/ill/8_x.png",
         "test/well/9.png"],
    )  # fmt: skip
    source = load_source("folder", root, group="^([0-9]+)")
    assert source.train.groups.tolist() == [0, 0, 1, 0]
    assert source.test.groups.tolist() == [1, 2]
    assert load_source("folder", root).train.groups is None
    (root / "train/well/7_d.png").write_bytes(b"no image")
    assert load_source("folder", root, group="^([0-9]+)", skip_corrupt=True).train.groups.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        ("^(", SettingsError, "is no regular expression"),
        ("^[0-9]+", SettingsError, "must have one capturing group, it has 0"),
        ("(a)(b)", SettingsError, "must have one capturing group, it has 2"),
        ("^([0-9]+)_", DataError, r"ill/b\.png: group .* does not match 'b.png'"),
        ("(x)?", DataError, "does not match"),
    ],
)
def test_bad_group_expressions_are_named(tmp_path, group, error, words):
    root = write_folder(tmp_path, ["ill/7_a.png", "ill/b.png"])
    with pytest.raises(error, match=words) as caught:
        load_source("folder", root, group=group)
    assert "\n" not in str(caught.value)


def test_sources_without_groups_say_so():
    with pytest.raises(SettingsError, match="data set 'digits' does not tell groups"):
        load_source("digits", group="site")


def test_a_task_cuts_by_groups_and_names_them_only_when_it_has_some(tmp_path):
    file = write_npz(tmp_path / "a.npz", train_track=np.arange(16) // 2, test_track=[90, 91, 92, 93])
    task = Task("npz", str(file), group="track", profile="none", largest=3, rest_is_test=True, test_images=2)
    prepared = prepare(task, seed=0)
    assert not shared(prepared.train, prepared.test)
    assert prepared.train.counts.tolist() == [3, 3]
    assert len(prepared.test.groups.unique()) == 4  # two images a class show two tracks
    assert task.identity()["group"] == "track"
    assert Task(**json.loads(json.dumps(task.identity()))).group == "track"
    assert "group" not in Task().identity()  # digests of cells measured before there were groups
