"""`ImageData` and the two ways between uint8 and float: nothing gets in that later code would trip over."""

from dataclasses import replace

import pytest
import torch

from gen_invariance.data.images import ImageData, check_images, names_or_numbers, to_uint8
from gen_invariance.errors import DataError, RangeError, ShapeError


def some(count=6, channels=1, classes=3):
    pixels = torch.arange(count * channels * 16) % 256
    return ImageData(
        pixels.view(count, channels, 4, 4).to(torch.uint8), torch.arange(count) % classes, tuple("abc"[:classes])
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_level_survives_the_round_trip(dtype):
    """bfloat16 holds 255.5 as 256, which as uint8 would be 0: white turned black."""
    levels = torch.arange(256, dtype=torch.uint8)
    back = to_uint8((levels.double() / 255).to(dtype))
    slack = {torch.bfloat16: 1, torch.float16: 0}.get(dtype, 0)
    assert (back.int() - levels.int()).abs().max() <= slack
    assert back[255] == 255
    assert back[0] == 0


def test_rounding_is_to_the_nearest_level():
    assert to_uint8(torch.tensor([0.49, 0.51, 254.51]) / 255).tolist() == [0, 1, 255]
    assert to_uint8(torch.tensor([-1e-7, 1 + 1e-7])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (1.1, "0, 1"), (255, "255")],
)
def test_pixels_out_of_range(value, message):
    with pytest.raises(RangeError, match=message):
        to_uint8(torch.tensor([0.5, value]))


def test_empty_images_are_fine():
    assert to_uint8(torch.zeros(0, 1, 4, 4)).shape == (0, 1, 4, 4)


def test_what_it_says_of_itself():
    data = some(7)
    assert len(data) == 7
    assert data.num_classes == 3
    assert data.counts.tolist() == [3, 2, 2]
    assert data.float_images().dtype == torch.float32
    torch.testing.assert_close(data.float_images(torch.tensor([2])), data.images[2:3].float() / 255)
    assert data.to("cpu") is data
    assert data.subset(torch.tensor([5, 0])).labels.tolist() == [2, 0]
    assert data.subset(torch.zeros(0, dtype=torch.int64)).counts.tolist() == [0, 0, 0]


def test_digest_follows_content_only():
    data = some()
    assert data.digest == some().digest
    assert data.digest == ImageData(data.images, data.labels, data.class_names, name="other").digest
    changed = data.images.clone()
    changed[0, 0, 0, 0] += 1
    others = [
        ImageData(changed, data.labels, data.class_names),
        ImageData(data.images, data.labels.flip(0), data.class_names),
        ImageData(data.images.view(6, 1, 2, 8), data.labels, data.class_names),
        data.subset(torch.arange(5)),
    ]
    assert len({data.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), ShapeError, "must be uint8"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), ShapeError, "must be uint8"),
        (torch.zeros(2, 4, 4, 1).byte(), torch.zeros(2).long(), ShapeError, "1 or 3 channels, got 4"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3).long(), ShapeError, r"labels must be int64 \(2,\)"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2), ShapeError, "labels must be int64"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([0, 3]), RangeError, r"lie in \[0, 3\), got \[0, 3\]"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.tensor([-1, 2]), RangeError, r"got \[-1, 2\]"),
    ],
)
def test_what_it_refuses(images, labels, error, message):
    with pytest.raises(error, match=message):
        ImageData(images, labels, tuple("abc"))


def test_empty_classes_are_named():
    data = some(2)
    with pytest.raises(DataError, match=r"1 of 3 classes have no image \('c'\)"):
        data.require_every_class()
    assert some().require_every_class().num_classes == 3


def test_check_images():
    check_images(torch.rand(2, 3, 4, 4), channels=3)
    for images, message in [
        (torch.zeros(2, 3, 4, 4).byte(), "here: expected float"),
        (torch.rand(3, 4, 4), "here: expected float"),
        (torch.rand(2, 1, 4, 4), r"here: expected 3 channel"),
    ]:
        with pytest.raises(ShapeError, match=message):
            check_images(images, channels=3, where="here")


def test_names_or_numbers():
    assert names_or_numbers(None, 3) == ("0", "1", "2")
    assert names_or_numbers([7, "x"], 2) == ("7", "x")


def test_selected_classes_are_numbered_in_the_order_asked_for():
    chosen = replace(some(7), groups=torch.arange(7)).select_classes(torch.tensor([2, 0]))
    assert chosen.labels.tolist() == [1, 0, 1, 0, 1]
    assert chosen.class_names == ("c", "a")
    assert chosen.groups.tolist() == [0, 2, 3, 5, 6]
    assert some(7).select_classes([1]).counts.tolist() == [2]


def test_mean_and_deviation_are_those_of_the_pixels():
    images = torch.randint(256, (9, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images[:, 2] = 7
    mean, deviation = ImageData(images, torch.zeros(9, dtype=torch.int64), ("a",)).mean_std()
    pixels = images.double() / 255
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(deviation[:2], pixels.std((0, 2, 3))[:2].float())
    assert deviation[2] == pytest.approx(1e-3)
