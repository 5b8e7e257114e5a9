from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gen_invariance.data.duplicates import DuplicateReport, find_duplicates, split_duplicates
from gen_invariance.data.images import ImageData
from gen_invariance.data.split import make_long_tailed


def data_of(pixels, labels, names=("cat", "dog", "eel")):
    """Images of 1x2 pixels that show the numbers `pixels`."""
    numbers = torch.tensor(pixels, dtype=torch.int64)
    images = torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8).reshape(-1, 1, 1, 2)
    return ImageData(images, torch.tensor(labels, dtype=torch.int64), names, "set")


rows = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=25)


def slow(train, test):
    """(test images in train, pictures with two labels) by comparing everything with everything."""
    shared = sum(any(torch.equal(image, other) for other in train.images) for image in test.images)
    labels = {}
    for part in (train, test):
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            labels.setdefault(tuple(image.flatten().tolist()), set()).add(part.class_names[label])
    return shared, sum(len(found) > 1 for found in labels.values())


@given(rows, rows)
def test_counts_are_those_of_comparing_all_with_all(train, test):
    parts = [data_of(*zip(*part, strict=True)) for part in (train, test)]
    found = find_duplicates(*parts)
    assert (found.shared, found.contradictory) == slow(*parts)
    assert found.test_images == len(test)
    assert len(found.lines()) == (found.shared > 0) + (found.contradictory > 0)
    for one, other, label in found.shared_examples:
        row, place = int(one.split()[-1]), int(other.split()[-1])
        assert torch.equal(parts[1].images[row], parts[0].images[place])
        assert label == parts[1].class_names[parts[1].labels[row]]


def test_lines_count_and_name_in_plain_english():
    train = data_of([1, 2, 3, 2], [0, 1, 2, 0])
    found = find_duplicates(train, data_of([9, 3, 3, 1], [0, 2, 1, 0]))
    assert found.lines() == [
        "note: 3 of 4 test images are also training images (first: test row 1 = training row 2, class 'eel'); "
        "their accuracy says nothing about new images",
        "note: 2 images stand under two labels (first: training row 1, class 'dog' = training row 3, class 'cat'); "
        "correct the labels, or remove what is wrong",
    ]
    assert found.contradictory_examples[1] == ("training row 2", "eel", "test row 2", "dog")
    thrice = find_duplicates(data_of([1, 1, 1], [0, 1, 2]), None)
    assert (thrice.contradictory, thrice.contradictory_examples[0][2]) == (1, "training row 1")
    one = find_duplicates(data_of([1], [0]), data_of([1], [1]))
    assert one.lines()[0].startswith("note: 1 of 1 test images is also a training image (")
    assert one.lines()[1].startswith("note: 1 image stands under two labels (")


def test_clean_data_and_data_of_one_part_say_nothing():
    train = data_of([1, 2, 2], [0, 1, 1])
    assert find_duplicates(train, data_of([3], [0])).lines() == []
    assert find_duplicates(train, None) == DuplicateReport()
    assert find_duplicates(train, train.subset(torch.zeros(0, dtype=torch.int64))).lines() == []
    assert find_duplicates(data_of([1, 1], [0, 2]), None).contradictory == 1


def test_groups_in_both_parts_are_counted():
    train = replace(data_of([1, 2, 3], [0, 1, 2]), groups=torch.tensor([5, 6, 7]))
    test = replace(data_of([8, 9, 10], [0, 1, 2]), groups=torch.tensor([6, 8, 6]))
    assert find_duplicates(train, test).lines() == [
        "note: 2 of 3 test images are of groups that training images show, too; their accuracy says little about new "
        "things"
    ]
    assert (
        find_duplicates(train, test.subset(torch.tensor([0])))
        .lines()[0]
        .startswith("note: 1 of 1 test images is of a group")
    )
    assert not find_duplicates(train, replace(test, groups=None)).lines()
    assert not find_duplicates(replace(train, groups=None), test).lines()


def test_classes_are_compared_by_name_and_images_by_shape():
    train, test = data_of([1], [0]), data_of([1], [1], ("dog", "cat"))
    assert find_duplicates(train, test).contradictory == 0
    tall = ImageData(train.images.transpose(2, 3).contiguous(), train.labels, train.class_names)
    assert find_duplicates(train, tall).shared == 0


@pytest.mark.parametrize("rest_is_test", [True, False])
def test_rows_are_those_of_the_source(rest_is_test):
    names = ("cat", "dog")
    train, test = data_of([*range(20), *range(20)], [0, 1] * 20, names), data_of([3, 100], [0, 1], names)
    split = make_long_tailed((train, test), imbalance=2, rest_is_test=rest_is_test)
    found = split_duplicates(split)
    assert found.shared > 0
    name = "training row" if rest_is_test else "test row"
    for one, other, _ in found.shared_examples:
        assert one.startswith(name)
        source = train if rest_is_test else test
        assert torch.equal(source.images[int(one.split()[-1])], train.images[int(other.split()[-1])])
    files = [f"{row}.png" for row in range(40)], ["a.png", "b\n.png"]
    one, other, _ = split_duplicates(split, files=files).shared_examples[0]
    assert other == f"{found.shared_examples[0][1].split()[-1]}.png"
    assert one == (f"{found.shared_examples[0][0].split()[-1]}.png" if rest_is_test else "a.png")
