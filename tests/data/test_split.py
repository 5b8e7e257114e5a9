import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import exponential_counts, zipf_counts
from gen_invariance.data.readers.base import Source
from gen_invariance.data.split import load_split_indices, make_long_tailed, save_split
from gen_invariance.errors import DataError, DataNotFoundError, SettingsError

PINNED_DIGEST = "cfa9874c004d153727792def754876d569b87aef4670d2f2a73371d3441bb4d1"


def numbered_images(counts, *, name="numbered", first=0):
    """Images whose pixels spell their own number, so that leaks between parts show in the pixels."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    numbers = torch.arange(first, first + len(labels))
    images = torch.stack([numbers // 256, numbers % 256], dim=1).to(torch.uint8).reshape(-1, 1, 1, 2)
    return ImageData(images, labels, tuple(f"class {c}" for c in range(len(counts))), name)


def pixels(data):
    return {tuple(image.flatten().tolist()) for image in data.images}


@given(
    profile=st.sampled_from(["exponential", "step", "zipf"]),
    counts=st.lists(st.integers(12, 30), min_size=2, max_size=6),
    fraction=st.sampled_from([0.0, 0.2]),
    cut=st.sampled_from(["own", "cao", "first"]),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_a_filled_tail_holds_the_cut_and_goes_as_far_as_images_do(profile, counts, fraction, cut, seed):
    source = numbered_images(counts), numbered_images([3] * len(counts), first=1000)
    how = {"profile": profile, "largest": 9, "imbalance": 3, "validation_fraction": fraction, "cut": cut, "seed": seed}
    plain, filled = make_long_tailed(source, **how), make_long_tailed(source, **how, fill_tail=True)
    assert pixels(plain.train) <= pixels(filled.train)
    assert pixels(plain.validation) == pixels(filled.validation)
    assert not pixels(filled.train) & pixels(filled.validation)
    assert filled.counts.tolist() == [9] * len(counts)
    assert torch.equal(filled.order, plain.order)


@given(
    profile=st.sampled_from(["exponential", "step", "zipf", "none"]),
    counts=st.lists(st.integers(12, 30), min_size=1, max_size=6),
    fraction=st.sampled_from([0.0, 0.2, 0.4]),
    rest_is_test=st.booleans(),
    shuffle_order=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_parts_never_share_an_image(profile, counts, fraction, rest_is_test, shuffle_order, seed):
    source = numbered_images(counts), numbered_images([3] * len(counts), first=1000)
    split = make_long_tailed(
        source,
        profile=profile,
        imbalance=3,
        validation_fraction=fraction,
        rest_is_test=rest_is_test,
        shuffle_order=shuffle_order,
        seed=seed,
    )
    parts = [split.train, split.validation, split.test]
    assert sum(len(pixels(part)) for part in parts) == len(set().union(*map(pixels, parts)))
    assert pixels(split.train) == pixels(source[0].subset(split.train_indices))
    assert pixels(split.validation) == pixels(source[0].subset(split.validation_indices))
    assert torch.equal(split.train.counts, split.counts)
    assert (split.counts[split.order].diff() <= 0).all()
    assert (len(split.validation) > 0) == (fraction > 0)
    if rest_is_test:
        together = torch.cat([split.train_indices, split.validation_indices, split.test_indices])
        assert sorted(together.tolist()) == list(range(len(source[0])))
    else:
        assert split.test is source[1]
        assert split.test_indices is None


@pytest.mark.parametrize(("available", "largest"), [([30, 99, 50], 30), ([100, 20, 50], 100), ([100, 5, 50], 29)])
def test_largest_that_fits_is_largest(available, largest):
    # Imbalance 25 gives the second of three classes a fifth of the first: 29 // 5 is 5, 30 // 5 is 6.
    split = make_long_tailed((numbered_images(available), numbered_images([1] * 3)), imbalance=25, shuffle_order=False)
    assert split.counts.tolist() == exponential_counts(3, largest=largest, imbalance=25).tolist()


def test_half_of_each_class_is_left_when_the_rest_is_the_test_set():
    split = make_long_tailed((numbered_images([41, 50]), None), imbalance=2, rest_is_test=True, shuffle_order=False)
    assert split.counts.tolist() == [21, 10]
    assert split.test.counts.tolist() == [20, 40]


def test_given_sizes_reach_the_counts():
    source = numbered_images([60] * 4), numbered_images([1] * 4)
    split = make_long_tailed(source, profile="zipf", largest=40, power=1.0, smallest=12, shuffle_order=False)
    assert split.counts.tolist() == zipf_counts(4, largest=40, power=1.0, smallest=12).tolist()
    split = make_long_tailed(source, profile="none", largest=7)
    assert split.counts.tolist() == [7] * 4


def test_profile_none_keeps_everything_and_orders_by_size():
    source = numbered_images([3, 9, 5]), numbered_images([1, 1, 1])
    split = make_long_tailed(source, profile="none")
    assert pixels(split.train) == pixels(source[0])
    assert split.order.tolist() == [1, 2, 0]


def test_split_depends_on_the_seed_and_on_nothing_else():
    source = numbered_images([40] * 5), numbered_images([1] * 5)
    splits = [make_long_tailed(source, imbalance=8, validation_fraction=0.1, seed=seed) for seed in (0, 0, 1)]
    assert splits[0].train.digest == splits[1].train.digest != splits[2].train.digest
    assert splits[0].train.digest == PINNED_DIGEST
    in_order = [make_long_tailed(source, imbalance=8, shuffle_order=False, seed=seed) for seed in (0, 1)]
    assert torch.equal(in_order[0].counts, in_order[1].counts)
    assert in_order[0].train.digest != in_order[1].train.digest
    state = torch.get_rng_state()
    make_long_tailed(source, imbalance=8)
    assert torch.equal(torch.get_rng_state(), state)


def test_source_and_pair_are_the_same():
    train, test = numbered_images([9, 9]), numbered_images([2, 2])
    digests = {make_long_tailed(s, imbalance=3).train.digest for s in ((train, test), Source(train, test, True))}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"profile": "linear"}, SettingsError, "exponential, step, zipf, none"),
        ({"largest": 0}, SettingsError, "largest"),
        ({"largest": 11}, DataError, "'class 0' has 10 images"),
        ({"largest": 10, "rest_is_test": True}, DataError, "'class 0' is left for the test set"),
        ({"imbalance": 100}, SettingsError, "imbalance"),
        ({"validation_fraction": 1.0}, SettingsError, "fraction"),
        ({"largest": 10, "validation_fraction": 0.2}, DataError, "'class 0' has 8 images"),
    ],
)
def test_bad_settings_say_what_to_do(arguments, error, words):
    source = numbered_images([10, 10]), numbered_images([1, 1])
    with pytest.raises(error, match=words) as caught:
        make_long_tailed(source, **{"imbalance": 2, "shuffle_order": False, **arguments})
    assert "\n" not in str(caught.value)


def test_test_part_must_exist_and_show_the_same_classes():
    train = numbered_images([9, 9])
    with pytest.raises(DataError, match="rest_is_test=true"):
        make_long_tailed((train, None), imbalance=2)
    with pytest.raises(DataError, match="different classes"):
        make_long_tailed((train, numbered_images([1, 1, 1])), imbalance=2)


def test_a_class_without_images_is_named():
    data = ImageData(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0]), ("cat", "dog"))
    with pytest.raises(DataError, match="'dog'"):
        make_long_tailed((data, data), imbalance=2)


@pytest.mark.parametrize("rest_is_test", [True, False])
def test_saved_indices_come_back(tmp_path, rest_is_test):
    source = numbered_images([12, 12]), numbered_images([1, 1])
    split = make_long_tailed(source, imbalance=3, validation_fraction=0.2, rest_is_test=rest_is_test)
    save_split(tmp_path / "new" / "split.npz", split)
    loaded = load_split_indices(tmp_path / "new" / "split.npz")
    for key in ("train_indices", "validation_indices", "counts", "order"):
        assert torch.equal(loaded[key], getattr(split, key))
    assert ("test_indices" in loaded) == rest_is_test
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["split.npz"]


def damaged_split_files():
    whole = io.BytesIO()
    np.savez(whole, train_indices=[1], validation_indices=[2], counts=[1], order=[0])
    pickled = io.BytesIO()
    np.savez(pickled, train_indices=np.array([{}], dtype=object))
    lacking = io.BytesIO()
    np.savez(lacking, train_indices=[1])
    plain = io.BytesIO()
    np.save(plain, [1, 2])
    text = io.BytesIO()
    with zipfile.ZipFile(text, "w") as file:
        for key in ("train_indices", "validation_indices", "counts", "order"):
            file.writestr(key, "not an array")
    contents = {"cut": whole.getvalue()[:-30], "pickled": pickled.getvalue(), "lacking": lacking.getvalue()}
    return contents | {"plain": plain.getvalue(), "empty": b"", "text": text.getvalue()}


@pytest.mark.parametrize(("kind", "content"), damaged_split_files().items())
def test_damaged_split_files_are_refused(tmp_path, kind, content):
    path = tmp_path / f"{kind}.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)) as caught:
        load_split_indices(path)
    assert "\n" not in str(caught.value)


def test_missing_split_file_is_named(tmp_path):
    with pytest.raises(DataNotFoundError, match="nowhere"):
        load_split_indices(tmp_path / "nowhere.npz")
