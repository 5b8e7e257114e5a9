"""What measures, kornia and pipelines are given: pixels of another range or order, labels in other containers."""

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gen_invariance as gi
from gen_invariance.contrib.pipeline import TranslationPipeline
from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.measure.rounds import kl_divergence

IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def model(images):
    return images.flatten(1)[:, :3].log()


def stage_after_a_good_batch(images):
    stage = gi.TailAugment(gi.Rotation(30), torch.ones(3))
    stage(IMAGES, LABELS)
    stage(images, LABELS)


def sequence_after_a_good_batch(images):
    sequence = K.AugmentationSequential(gi.KorniaNuisance(gi.Rotation(30), p=0.1))
    sequence(IMAGES)
    sequence(images)


DOORS = {
    "stage": stage_after_a_good_batch,
    "source": lambda images: gi.TailAugment(gi.Rotation(), torch.ones(3))(IMAGES, LABELS, source=(images, LABELS)),
    "kornia": lambda images: gi.KorniaNuisance(gi.Rotation(30), p=0.0)(images),
    "sequence": sequence_after_a_good_batch,
    "measure": lambda images: gi.measure_invariance(model, images, LABELS, gi.Rotation(30), draws=2),
    "originals": lambda images: gi.measure_invariance(
        model, IMAGES, LABELS, gi.Rotation(30), originals=images, draws=2
    ),
    "compare": lambda images: gi.compare_invariance(model, model, images, LABELS, gi.Rotation(30), draws=2),
    "pipeline": lambda images: TranslationPipeline(gi.SpatialTranslator(3, start=0.2))(images),
}
MEAN, STD = (torch.tensor(each).view(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
BROKEN = {
    "normalised": lambda images: (images - MEAN) / STD,
    "0..255": lambda images: images * 255,
    "[-1, 1]": lambda images: images * 2 - 1,
    "one row 0..255": lambda images: torch.cat([images[:-1], images[-1:] * 255]),
    "one pixel": lambda images: images.index_fill(3, torch.tensor([0]), -3.0),
    "NaN": lambda images: images.index_fill(0, torch.tensor([3]), float("nan")),
    "infinite": lambda images: images.index_fill(0, torch.tensor([3]), float("inf")),
}


@given(
    door=st.sampled_from(sorted(DOORS)),
    how=st.sampled_from(sorted(BROKEN)),
    dtype=st.sampled_from(["float32", "float64"]),
)
@settings(max_examples=60, deadline=None)
def test_pixels_of_another_range_are_refused_at_every_door(door, how, dtype):
    images = BROKEN[how](IMAGES.to(getattr(torch, dtype)))
    with pytest.raises(RangeError, match=r"pixels must lie in \[0, 1\], got"):
        DOORS[door](images)


@pytest.mark.parametrize("door", ["stage", "kornia", "measure", "compare"])
def test_channels_last_is_refused(door):
    with pytest.raises(ShapeError, match=r"seem to lie channels.last"):
        DOORS[door](IMAGES.permute(0, 2, 3, 1))


@pytest.mark.parametrize("kind", [list, np.array, lambda labels: torch.tensor(labels, dtype=torch.uint8)])
def test_labels_in_other_containers(kind):
    labels = kind(LABELS.tolist())
    found = gi.measure_invariance(model, IMAGES, labels, gi.Rotation(30), draws=2)
    assert torch.equal(found.ekld, gi.measure_invariance(model, IMAGES, LABELS, gi.Rotation(30), draws=2).ekld)
    assert gi.measure_accuracy(model, IMAGES, labels).count.tolist() == [4, 4, 4]
    moved, same = gi.TailAugment(gi.Rotation(30), torch.ones(3), seed=0)(IMAGES, labels)
    assert torch.equal(moved, gi.TailAugment(gi.Rotation(30), torch.ones(3), seed=0)(IMAGES, LABELS)[0])
    assert same.tolist() == LABELS.tolist()


@pytest.mark.parametrize("labels", [LABELS.float(), LABELS[:, None], ["a"] * 12, LABELS.bool()])
def test_labels_that_are_none(labels):
    for measure in (
        lambda: gi.measure_invariance(model, IMAGES, labels, gi.Rotation(30), draws=2),
        lambda: gi.measure_accuracy(model, IMAGES, labels),
    ):
        with pytest.raises(ShapeError, match="labels"):
            measure()


def test_images_that_are_no_tensor():
    with pytest.raises(ShapeError, match="must be a tensor"):
        gi.measure_accuracy(model, IMAGES.numpy(), LABELS)
    with pytest.raises(ShapeError, match="expected a tensor"):
        gi.TailAugment(gi.Rotation(), torch.ones(3))([IMAGES[0], IMAGES[1]], LABELS[:2])


def test_a_class_that_is_masked_on_both_sides_adds_nothing():
    p, q = (torch.tensor([[a, 1 - a, 0.0]], dtype=torch.float64) for a in (0.3, 0.6))
    expected = 0.3 * np.log(0.3 / 0.6) + 0.7 * np.log(0.7 / 0.4)
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(expected)


@pytest.mark.parametrize("same_on_frame", [True, False])
def test_frames_of_videos(same_on_frame):
    clips = torch.full((6, 4, 3, 8, 8), 0.5)
    sequence = K.VideoSequential(
        gi.KorniaNuisance(gi.Lighting(), p=0.7), data_format="BTCHW", same_on_frame=same_on_frame
    )
    moved = sequence(clips)
    assert moved.shape == clips.shape
    alike = (moved == moved[:, :1]).flatten(1).all(1)
    assert alike.all() if same_on_frame else not alike.any()
    assert not (moved == moved[:1]).all()
    assert torch.equal(sequence(clips, params=sequence._params), moved)


@pytest.mark.parametrize("inside", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_in_containers_and_under_autocast(dtype, inside):
    sequence = K.AugmentationSequential(K.RandomHorizontalFlip(), gi.KorniaNuisance(gi.Lighting(), p=1.0))
    with torch.autocast("cpu", dtype=inside):
        assert sequence(IMAGES.to(dtype)).dtype == dtype
        assert gi.TailAugment(gi.Lighting(), torch.ones(3))(IMAGES.to(dtype), LABELS)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_measures_under_another_default_precision(dtype):
    expected = gi.measure_invariance(model, IMAGES, LABELS, gi.Rotation(30), draws=2).ekld
    loss = gi.build_loss("ldam", counts=[9, 3, 1])(model(IMAGES) * 0 + 1.0, LABELS)
    drawn = list(gi.LongTailSampler(LABELS, seed=1))
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(gi.measure_invariance(model, IMAGES, LABELS, gi.Rotation(30), draws=2).ekld, expected)
        assert torch.equal(gi.build_loss("ldam", counts=[9, 3, 1])(model(IMAGES) * 0 + 1.0, LABELS), loss)
        assert list(gi.LongTailSampler(LABELS, seed=1)) == drawn
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "make", [lambda: gi.TailAugment(gi.Rotation(30), torch.ones(3)), lambda: gi.KorniaNuisance(gi.Rotation(30), p=1.0)]
)
@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_mapping_or_scripting_a_stage_is_refused_in_one_line(make, randomness):
    stage, images = make(), torch.rand(2, 6, 3, 8, 8)
    labels = (torch.zeros(6, dtype=torch.int64),) * isinstance(stage, gi.TailAugment)
    with pytest.raises(SettingsError, match="cannot be mapped by torch"):
        torch.func.vmap(lambda batch: stage(batch, *labels), randomness=randomness)(images)
    with pytest.raises(SettingsError, match="cannot be scripted"):
        torch.jit.script(torch.nn.Sequential(stage))


def test_exporting_a_model_with_a_stage_is_refused_in_one_line():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = gi.TailAugment(gi.Rotation(30), torch.ones(3))

        def forward(self, images, labels):
            return self.stage(images, labels)[0]

    with pytest.raises(SettingsError, match="cannot be exported"):
        torch.export.export(Net(), (IMAGES, LABELS))
