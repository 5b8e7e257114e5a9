"""Mixing against loops, with the laws every mixing keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gen_invariance.classifier.mixing import MIXINGS, build_mixing, cmo, cutmix, mixup, remix, soft_labels
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.run import named_generator

COUNTS = (90, 30, 9, 1)


def batch(count=32, seed=0, height=8, width=10):
    """Each image is constant, with its row number as value, so what came from where can be read off."""
    labels = torch.randint(4, (count,), generator=named_generator(seed, "labels"))
    values = torch.arange(count) / (4 * count)
    return values[:, None, None, None].expand(-1, 2, height, width).contiguous(), labels


def foreground(count=32):
    images, labels = batch(count, seed=5)
    return images + 0.5, labels


def run(name, images, labels, seed=0, **options):
    extra = foreground(len(images)) if name == "cmo" else ()
    return build_mixing(name, counts=COUNTS, **options)(images, labels, *extra, generator=named_generator(seed, "mix"))


@pytest.mark.parametrize("name", MIXINGS)
def test_laws_of_all_mixings(name):
    images, labels = batch()
    copies = images.clone(), labels.clone()
    before = torch.random.get_rng_state()
    mixed, soft = run(name, images, labels)
    again = run(name, images, labels)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(images, copies[0])
    assert torch.equal(labels, copies[1])
    assert mixed.shape == images.shape
    assert mixed.dtype == images.dtype
    assert mixed.min() >= 0
    assert mixed.max() <= 1
    assert soft.shape == (32, 4)
    torch.testing.assert_close(soft.sum(1), torch.ones(32))
    assert torch.equal(mixed, again[0])
    assert torch.equal(soft, again[1])
    assert not torch.equal(mixed, run(name, images, labels, seed=1)[0])
    assert (mixed != images).any((1, 2, 3)).float().mean() > 0.5


@given(seed=st.integers(0, 10_000), name=st.sampled_from(["mixup", "cutmix", "remix"]), alpha=st.floats(0.05, 5))
def test_pixels_and_labels_agree_on_the_share(seed, name, alpha):
    """With constant images the mean tells the share; partner and share must explain pixels and labels at once."""
    images, labels = batch(seed=seed)
    mixed, soft = run(name, images, labels, seed=seed, alpha=alpha)
    own, hard = images[:, 0, 0, 0].double(), soft_labels(labels, num_classes=4)
    generator = named_generator(seed, "mix")
    torch.randint(2**62, (), generator=generator)
    if name == "cutmix":
        torch.rand(2, 32, generator=generator)
    partner = torch.randperm(32, generator=generator)
    for row in range(32):
        other = own[partner[row]]
        if other == own[row]:
            continue
        share = float((mixed[row].double().mean() - other) / (own[row] - other))
        assert -1e-4 <= share <= 1 + 1e-4
        ratio = COUNTS[labels[row]] / COUNTS[labels[partner[row]]]
        if name == "remix" and ratio >= 3 and share < 0.5:
            share = 0.0
        elif name == "remix" and ratio <= 1 / 3 and 1 - share < 0.5:
            share = 1.0
        expected = share * hard[row] + (1 - share) * hard[partner[row]]
        torch.testing.assert_close(soft[row].double(), expected.double(), atol=2e-3, rtol=0)


def test_remix_gives_the_label_to_the_small_class_only_when_both_rules_hold():
    images, labels = batch(400)
    _, soft = run("remix", images, labels, kappa=3, tau=0.5)
    _, plain = run("mixup", images, labels, alpha=1.0)
    moved = (soft != plain).any(1)
    assert moved.any()
    assert (soft[moved].max(1).values == 1).all()
    counts = torch.tensor(COUNTS, dtype=torch.float32)
    winner, loser = counts[soft[moved].argmax(1)], counts[(plain[moved] * (soft[moved] == 0)).argmax(1)]
    assert (loser >= 3 * winner).all()
    assert torch.equal(run("remix", images, labels, tau=0.0)[1], plain)


def test_boxes_are_rectangles_of_about_the_drawn_area():
    images, _ = batch(300, height=16, width=16)
    mixed, _ = cutmix(images, torch.arange(300) % 2, num_classes=2, alpha=1.0, generator=named_generator(3, "mix"))
    pasted = (mixed != images).any(1)
    for row in range(300):
        ys, xs = pasted[row].nonzero(as_tuple=True)
        if len(ys):
            assert pasted[row][ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all()
    area = pasted.float().mean((1, 2))
    assert 0.1 < area.mean() < 0.5  # Beta(1, 1) keeps half; boxes cut off at the border lose some
    assert area.std() > 0.1


def test_cmo_pastes_the_second_stream_on_the_first():
    images, labels = batch()
    front, front_labels = foreground()
    mixed, soft = run("cmo", images, labels)
    from_front = mixed >= 0.5
    assert torch.equal(mixed, torch.where(from_front, front, images))
    share = from_front.float().mean((1, 2, 3))
    expected = (1 - share)[:, None] * soft_labels(labels, num_classes=4)
    expected = expected + share[:, None] * soft_labels(front_labels, num_classes=4)
    torch.testing.assert_close(soft, expected)
    assert 0 < share.mean() < 0.6


def test_soft_labels_can_be_mixed_again():
    images, labels = batch()
    soft = soft_labels(labels, num_classes=4)
    hard = mixup(images, labels, num_classes=4, generator=named_generator(0, "mix"))
    again = mixup(images, soft, num_classes=4, generator=named_generator(0, "mix"))
    assert torch.equal(hard[1], again[1])


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", MIXINGS)
def test_tiny_batches(name, count):
    images, labels = batch(count) if count else (torch.zeros(0, 2, 8, 8), torch.zeros(0, dtype=torch.int64))
    extra = (images, labels) if name == "cmo" else ()
    mixed, soft = build_mixing(name, counts=COUNTS)(images, labels, *extra, generator=named_generator(0, "mix"))
    assert mixed.shape == images.shape
    assert soft.shape == (count, 4)


def test_misuse_is_named():
    images, labels = batch()
    generator = named_generator(0, "mix")
    with pytest.raises(SettingsError, match="no mixing 'mix up'; choose mixup, remix"):
        build_mixing("mix up", counts=COUNTS)
    with pytest.raises(SettingsError, match="no option 'kappa'; choose of alpha"):
        build_mixing("mixup", counts=COUNTS, kappa=3)
    with pytest.raises(SettingsError, match="alpha must be positive"):
        build_mixing("mixup", counts=COUNTS, alpha=0)
    with pytest.raises(SettingsError, match="kappa must be at least 1"):
        build_mixing("remix", counts=COUNTS, kappa=0.5)
    with pytest.raises(ShapeError, match="needs int64 labels"):
        remix(images, soft_labels(labels, num_classes=4), counts=COUNTS, generator=generator)
    with pytest.raises(ShapeError, match="one label for each image"):
        cutmix(images, labels[:3], num_classes=4, generator=generator)
    with pytest.raises(ShapeError, match="one probability for each class"):
        cutmix(images, labels.float(), num_classes=4, generator=generator)
    with pytest.raises(ShapeError, match="draw both streams with one batch size"):
        cmo(images, labels, images[:4], labels[:4], num_classes=4, generator=generator)
    with pytest.raises(ShapeError, match="divide uint8"):
        mixup(images.byte(), labels, num_classes=4, generator=generator)
