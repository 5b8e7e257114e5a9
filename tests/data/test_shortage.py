"""Repeated images: sizes as asked for, images in turn, draws of their own; the sizes that papers give."""

import pytest
import torch

from gen_invariance.data.images import ImageData
from gen_invariance.data.settings import LongTailSettings
from gen_invariance.data.split import compute_class_sizes, make_long_tailed
from gen_invariance.errors import SettingsError

SIZES = (3, 9, 4, 20)


def source(sizes=SIZES):
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).to(torch.uint8).contiguous()
    names = tuple(f"c{label}" for label in range(len(sizes)))
    test = ImageData(images[: len(sizes)], torch.arange(len(sizes)), names, "toy")
    return ImageData(images, labels, names, "toy"), test


SHAPE = {"profile": "exponential", "largest": 16, "imbalance": 8}


def test_the_sizes_of_the_papers():
    k49 = compute_class_sizes(LongTailSettings("zipf", power=2.0, smallest=5), 49, largest=4800)
    assert k49.tolist()[:28] == [4800, 1200, 533, 300, 192, 133, 97, 75, 59, 48, 39, 33, 28, 24, 21, 18, 16, 14, 13, 12,
                                 10, 9, 9, 8, 7, 7, 6, 6]  # fmt: skip
    assert k49.tolist()[28:] == [5] * 21
    assert int(k49.sum()) == 7822
    flat = compute_class_sizes(LongTailSettings("zipf", power=1.02, smallest=5), 49, largest=4800)
    assert (flat.tolist()[:4], flat.tolist()[-3:], int(flat.sum())) == ([4800, 2366, 1565, 1167], [94, 92, 90], 20_771)
    tiny = compute_class_sizes(LongTailSettings("exponential", imbalance=100), 200, largest=500)
    assert (int(tiny[0]), int(tiny[-1]), int(tiny.sum())) == (500, 5, 21_549)
    cifar = {(10, 5000, 100): 12_406, (10, 5000, 50): 13_996, (10, 5000, 10): 20_431,
             (100, 500, 100): 10_847, (100, 500, 50): 12_608, (100, 500, 10): 19_573}  # fmt: skip
    for (classes, largest, imbalance), total in cifar.items():
        sizes = compute_class_sizes(LongTailSettings("exponential", imbalance=imbalance), classes, largest=largest)
        assert int(sizes.sum()) == total


def test_images_are_used_in_turn_until_the_class_has_its_size():
    split = make_long_tailed(source(), shortage="repeat", **SHAPE)
    assert sorted(split.counts.tolist(), reverse=True) == [16, 8, 4, 2]
    assert torch.equal(split.train.counts, split.counts)
    assert split.counts[split.order].tolist() == [16, 8, 4, 2]
    for label, count in enumerate(split.counts.tolist()):
        uses = torch.bincount(split.train_indices[split.train.labels == label])
        uses = uses[uses > 0]
        assert len(uses) == min(count, SIZES[label])
        assert int(uses.max() - uses.min()) <= 1
    assert torch.equal(split.train.labels, source()[0].labels[split.train_indices])


def test_few_base_images_leave_the_tail_to_the_draws():
    split = make_long_tailed(source(), shortage="repeat", base_images=2, **SHAPE)
    assert sorted(split.counts.tolist(), reverse=True) == [16, 8, 4, 2]
    for label in range(4):
        assert len(split.train_indices[split.train.labels == label].unique()) == 2


def test_a_cap_takes_what_there_is_and_nothing_twice():
    split = make_long_tailed(source(), shortage="cap", shuffle_order=False, **SHAPE)
    assert split.counts.tolist() == [3, 8, 4, 2]
    assert split.order.tolist() == [1, 2, 0, 3]
    assert len(split.train_indices.unique()) == len(split.train_indices)


def test_validation_and_rest_share_no_image_with_training():
    split = make_long_tailed(
        (source()[0], None), shortage="repeat", base_images=1, validation_fraction=0.25, rest_is_test=True, **SHAPE
    )
    used = set(split.train_indices.tolist())
    held, rest = set(split.validation_indices.tolist()), set(split.test_indices.tolist())
    assert not used & held and not used & rest and not held & rest  # noqa: PT018
    assert len(used) == 4


def test_a_function_of_the_seed():
    first, again, other = (make_long_tailed(source(), shortage="repeat", seed=seed, **SHAPE) for seed in (1, 1, 2))
    assert torch.equal(first.train_indices, again.train_indices)
    assert not torch.equal(first.counts, other.counts) or not torch.equal(first.train_indices, other.train_indices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortage": "none"}, "data.shortage must be"),
        ({"shortage": "cap", "base_images": 3}, "base_images needs"),
        ({"shortage": "repeat", "base_images": 0}, "data.base_images must be at least 1"),
        ({"shortage": "repeat", "largest": None}, "set largest"),
        ({"shortage": "repeat", "profile": "none"}, "profile other than none"),
        ({"shortage": "repeat", "profile": "long"}, "data.profile must be"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(SettingsError, match=message):
        make_long_tailed(source(), **{**SHAPE, **options})
