"""The stage and the measures in somebody else's loop: every kind of batch, precision, wrapper and label."""

import copy
import io
import json
import os
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.multiprocessing
from torch import nn

from gen_invariance import Compose, Identity, Lighting, MunitTranslator, Rotation, SpatialTranslator, TailAugment
from gen_invariance.augment.kornia import KorniaNuisance
from gen_invariance.augment.policy import auto
from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.measure.invariance import measure_invariance
from gen_invariance.measure.predict import as_predict
from gen_invariance.translator.quality.verdict import weights_digest

ALWAYS = torch.ones(4)


def munit(channels=3):
    with torch.random.fork_rng():
        torch.random.set_rng_state(torch.Generator().manual_seed(1).get_state())
        return MunitTranslator(channels, width=8, downsamples=1, residual_blocks=1, style_downsamples=2, mlp_width=8)


def spatial(channels=3):
    return SpatialTranslator(channels, start=0.5)


@pytest.fixture
def batch(generator):
    return torch.rand(8, 3, 16, 16, generator=generator), torch.arange(8) % 4


def test_three_lines_from_a_saved_translator(tmp_path, batch):
    spatial().save_pretrained(tmp_path)
    images, labels = batch
    augment = TailAugment.from_pretrained(tmp_path, class_counts=[100, 100, 5, 5])
    before = images.clone()
    moved, same = augment(images, labels)
    assert torch.equal(images, before)
    assert same is labels
    changed = (moved != images).flatten(1).any(1)
    assert changed.any()
    assert not changed[labels < 2].any()  # the head is left alone
    with pytest.raises(ShapeError, match="3 probabilities for 4 classes"):
        TailAugment.from_pretrained(tmp_path, class_counts=[1, 2, 3, 4], probability=torch.ones(3))


@pytest.mark.parametrize(("word", "factor"), [("use", 1.0), ("use with lower strength", 0.5), ("do not use", 0.0)])
def test_the_default_obeys_the_verdict(word, factor, tmp_path):
    counts = [100, 100, 5, 5]
    spatial().save_pretrained(tmp_path)
    verdict = {"verdict": word, "reasons": ["Too dark."], "translator_digest": weights_digest(tmp_path)}
    (tmp_path / "quality.json").write_text(json.dumps(verdict))
    warned = "'do not use': Too dark; nothing is translated; give probability=" if factor == 0 else None
    with pytest.warns(UserWarning, match=warned) if warned else nullcontext():
        augment = TailAugment.from_pretrained(tmp_path, class_counts=counts)
    assert torch.equal(augment.probability, factor * auto(torch.tensor(counts)))
    with pytest.warns(UserWarning, match="as you ask") if warned else nullcontext():
        augment = TailAugment.from_pretrained(tmp_path, class_counts=counts, probability=ALWAYS)
    assert torch.equal(augment.probability, ALWAYS), "what is asked for is done"


@pytest.mark.parametrize("build", [munit, spatial, lambda: Rotation(90), lambda: Compose([spatial(), Lighting()])])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_dtypes_come_back_as_they_were(build, dtype, batch):
    images, labels = batch
    augment = TailAugment(build(), ALWAYS)
    exact, _ = augment(images, labels, generator=torch.Generator().manual_seed(0))
    moved, _ = augment(images.to(dtype), labels, generator=torch.Generator().manual_seed(0))
    assert moved.dtype == dtype
    assert (moved.float() - exact).abs().mean() < 0.02
    assert (exact - images).abs().mean() > 0.02


def test_uint8_channels_first_is_the_float_batch(batch):
    images, labels = batch
    small = (images * 255).byte()
    augment = TailAugment(Rotation(90), ALWAYS)
    first, _ = augment(small, labels, generator=torch.Generator().manual_seed(0))
    second, _ = augment(small.float() / 255, labels, generator=torch.Generator().manual_seed(0))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


def test_uint8_channels_last_axes_after_a_collate_function(batch):
    images, labels = batch
    small = (images * 255).byte()
    rows = small.permute(0, 2, 3, 1).contiguous()
    with pytest.raises(ShapeError, match="layout='channels_last'"):
        TailAugment(Rotation(), ALWAYS)(rows, labels)
    with pytest.raises(ShapeError, match="layout='channels_first'"):
        TailAugment(Rotation(), ALWAYS, layout="channels_last")(small, labels)
    taken, _ = TailAugment(Rotation(), ALWAYS, layout="channels_last", seed=0)(rows, labels)
    expected, _ = TailAugment(Rotation(), ALWAYS, seed=0)(small, labels)
    assert torch.equal(taken, expected)
    with pytest.raises(SettingsError, match="layout"):
        TailAugment(Rotation(), ALWAYS, layout="nhwc")


@pytest.mark.parametrize("build", [munit, spatial, Identity])
def test_channels_last_memory_format_stays(build, batch):
    images, labels = batch
    augment = TailAugment(build(), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    moved, _ = augment(images.to(memory_format=torch.channels_last), labels)
    assert moved.is_contiguous(memory_format=torch.channels_last)
    small, _ = augment((images * 255).byte().to(memory_format=torch.channels_last), labels)
    assert small.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("build", [munit, spatial, lambda: Rotation(90)])
def test_autocast_around_the_stage_changes_nothing(build, batch):
    images, labels = batch
    augment = TailAugment(build(), ALWAYS)
    outside, _ = augment(images, labels, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = augment(images, labels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("build", [munit, spatial, lambda: Compose([munit(), Rotation(90)])])
def test_a_stage_in_half_precision(build, batch):
    images, labels = batch
    expected, _ = TailAugment(build(), ALWAYS, seed=0)(images, labels)
    augment = TailAugment(build(), torch.full((4,), 1 / 3), seed=0).to(torch.bfloat16)
    assert torch.equal(augment.probability, torch.full((4,), 1 / 3))  # 0.334 in bfloat16
    augment.probability.fill_(1.0)
    moved, _ = augment(images, labels)
    assert moved.dtype == torch.float32
    assert 0 < (moved - expected).abs().mean() < 0.03


def test_soft_labels_weigh_the_probabilities(generator):
    images = torch.rand(4000, 1, 2, 2, generator=generator)
    share = torch.tensor([0.75, 0.25])
    augment = TailAugment(Lighting(brightness=0.0, contrast=2.0, gamma=1.0), torch.tensor([0.2, 1.0]))
    labels = share.expand(4000, 2)
    moved, same = augment(images, labels)
    assert same is labels
    rate = (moved != images).flatten(1).any(1).double().mean()
    assert abs(rate - (0.75 * 0.2 + 0.25)) < 4 * (0.4 * 0.6 / 4000) ** 0.5


def test_hard_and_one_hot_labels_give_the_same_batch(batch):
    images, labels = batch
    augment = TailAugment(Rotation(90), torch.tensor([0.0, 0.3, 0.6, 1.0]))
    hard, _ = augment(images, labels, generator=torch.Generator().manual_seed(3))
    soft, _ = augment(images, torch.eye(4)[labels], generator=torch.Generator().manual_seed(3))
    assert torch.equal(hard, soft)


def test_mixup_before_and_after(batch):
    from torchvision.transforms import v2

    images, labels = batch
    augment, mixup = TailAugment(Rotation(90), ALWAYS), v2.MixUp(num_classes=4)
    for first, second in ((augment, mixup), (mixup, augment)):
        mixed, soft = second(*first(images, labels))
        assert mixed.shape == images.shape
        assert soft.shape == (8, 4)
        assert torch.allclose(soft.sum(1), torch.ones(8))


def test_soft_labels_travel_with_their_source_row(batch):
    images, labels = batch
    augment = TailAugment(Identity(), ALWAYS)
    other, soft = torch.rand_like(images), torch.eye(4)[labels]
    moved, taken = augment(images, soft.flip(0), source=(other, soft))
    assert torch.equal(moved, other)
    assert torch.equal(taken, soft)
    with pytest.raises(ShapeError, match="must be like the batch's"):
        augment(images, soft, source=(other, labels))


@pytest.mark.parametrize("build", [munit, spatial, Rotation, Lighting])
def test_empty_tail_empty_batch_and_batch_of_one(build, batch):
    images, labels = batch
    none = TailAugment(build(), torch.zeros(4))
    assert torch.equal(none(images, labels)[0], images)
    augment = TailAugment(build(), ALWAYS)
    moved, own = augment(images[:0], labels[:0])
    assert moved.shape == (0, 3, 16, 16)
    assert own.shape == (0,)
    one, _ = augment(images[:1], labels[:1])
    assert one.shape == (1, 3, 16, 16)
    assert (one != images[:1]).any()


@pytest.mark.parametrize(
    ("images", "labels", "kind", "text"),
    [
        (torch.rand(4, 3, 8, 8) * 5 - 2, torch.zeros(4).long(), RangeError, "before Normalize"),
        (torch.rand(4, 3, 8, 8) * 255, torch.zeros(4).long(), RangeError, "divide 8-bit"),
        (torch.full((4, 3, 8, 8), float("nan")), torch.zeros(4).long(), RangeError, "nan"),
        (torch.zeros(4, 3, 8, 8).int(), torch.zeros(4).long(), ShapeError, "int32"),
        (torch.rand(3, 8, 8), torch.zeros(3).long(), ShapeError, "stack the images"),
        (torch.rand(4, 3, 8, 8), torch.full((4,), 4), RangeError, r"\[0, 4\)"),
        (torch.rand(4, 3, 8, 8), torch.full((4,), -1), RangeError, r"\[-1, -1\]"),
        (torch.rand(4, 3, 8, 8), torch.zeros(3).long(), ShapeError, "int64 .3,"),
        (torch.rand(4, 3, 8, 8), torch.rand(4, 5), ShapeError, "one column for each class"),
        (torch.rand(4, 3, 8, 8), -torch.rand(4, 4), RangeError, "negative"),
        (torch.rand(4, 3, 8, 8), torch.zeros(4), ShapeError, "soft labels"),
    ],
)
def test_wrong_batches_are_named(images, labels, kind, text):
    with pytest.raises(kind, match=text):
        TailAugment(Rotation(), ALWAYS)(images, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_other_integer_types(dtype, batch):
    images, labels = batch
    augment = TailAugment(Rotation(90), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    moved, same = augment(images, labels.to(dtype))
    assert same.dtype == dtype
    assert (moved != images).flatten(1).any(1).tolist() == (labels >= 2).tolist()


def test_gradient_reaches_the_rows_that_are_left_alone(batch):
    images, labels = batch
    images.requires_grad_()
    moved, _ = TailAugment(Rotation(90), torch.tensor([0.0, 0.0, 1.0, 1.0]))(images, labels)
    moved.sum().backward()
    assert torch.equal(images.grad.flatten(1).any(1), labels < 2)


class Step(nn.Module):
    def __init__(self, augment):
        super().__init__()
        self.augment, self.model = augment, nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))

    def forward(self, images, labels):
        images, labels = self.augment(images, labels)
        return nn.functional.cross_entropy(self.model(images), labels)


def test_compiled_step(batch):
    step = Step(TailAugment(spatial(), torch.tensor([0.0, 0.3, 0.6, 1.0]), seed=0))
    expected = [step(*batch) for _ in range(3)]
    step.augment = TailAugment(spatial(), torch.tensor([0.0, 0.3, 0.6, 1.0]), seed=0)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager")
    for loss in expected:  # the number of gated rows changes from call to call
        assert torch.allclose(compiled(*batch), loss)


def test_copies_pickles_and_state_dicts(batch):
    images, labels = batch
    step = Step(TailAugment(munit(), ALWAYS, seed=5))
    assert [name for name, _ in step.named_parameters()] == ["model.1.weight", "model.1.bias"]
    assert set(step.state_dict()) == {"model.1.weight", "model.1.bias"}
    twin, thawed = copy.deepcopy(step.augment), pickle.loads(pickle.dumps(step.augment))
    expected, _ = step.augment(images, labels)
    for other in (twin, thawed):
        assert torch.equal(other(images, labels)[0], expected)
    torch.save(step.state_dict(), io.BytesIO())


def test_replicas_of_data_parallel_share_one_stream(batch):
    """DataParallel copies a module's attributes anew for every batch."""
    images, labels = batch
    augment = TailAugment(Rotation(90), ALWAYS)
    first, _ = augment._replicate_for_data_parallel()(images, labels)
    second, _ = augment._replicate_for_data_parallel()(images, labels)
    assert not torch.equal(first, second)
    assert nn.DataParallel(Step(augment))(images, labels).ndim == 0


def test_images_on_another_device_find_a_copy_there():
    augment = TailAugment(munit(), ALWAYS)
    there = augment._reference.on(torch.device("meta"))
    assert next(there.parameters()).device.type == "meta"
    assert augment._reference.on(torch.device("meta")) is there
    assert next(augment.nuisance.parameters()).device.type == "cpu"
    kornia = KorniaNuisance(Compose([munit(), Rotation()]), p=1.0)
    assert next(kornia._reference.on(torch.device("meta")).nuisances[0].parameters()).device.type == "meta"


def _rank(rank, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    augment = TailAugment(Rotation(90), ALWAYS)  # before the processes meet
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    step = nn.parallel.DistributedDataParallel(Step(augment))
    images, labels = torch.linspace(0, 1, 768).view(1, 3, 16, 16).repeat(4, 1, 1, 1), torch.arange(4)
    step(images, labels).backward()
    torch.save(augment(images, labels)[0], f"{folder}/{rank}.pt")
    torch.save(step.module.model[1].weight.grad, f"{folder}/grad{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_of_ddp_draw_differently_and_agree_on_gradients(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(torch.load(tmp_path / "grad0.pt"), torch.load(tmp_path / "grad1.pt"))


def test_a_new_rank_reseeds_the_stream_once(monkeypatch):
    def drawn(rank):
        augment = TailAugment(Rotation(90), ALWAYS, seed=3)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        return [torch.rand(2, generator=augment.generator).tolist() for _ in range(2)]

    alone, first, second = drawn(None), drawn(0), drawn(1)
    assert first == alone
    assert second[0] != first[0]
    assert second[0] != second[1]


class Answer:
    def __init__(self, logits):
        self.logits = logits


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(768), nn.Linear(768, 4))

    def forward(self, images):
        return Answer(self.body(images))


def test_any_model_is_measured_in_eval_mode_and_gets_its_modes_back(batch):
    images, labels = batch
    model = WithDropout().double()
    model.body[2].eval()
    running = model.body[2].running_mean.clone()
    scores = measure_invariance(model, images, labels, Identity(), draws=2)
    assert scores.ekld.tolist() == [0.0] * 4
    assert scores.agreement.tolist() == [1.0] * 4
    assert model.training
    assert model.body[1].training
    assert not model.body[2].training
    assert torch.equal(model.body[2].running_mean, running)


def test_defaults_of_measure_invariance_are_repeatable(batch):
    images, labels = batch
    model = WithDropout()
    first, second = (measure_invariance(model, images, labels, Rotation(90), draws=2) for _ in range(2))
    assert len(first.ekld) == 4
    assert torch.equal(first.ekld, second.ekld)
    assert (first.ekld > 0).all()
    plain = measure_invariance(lambda x: model.eval()(x).logits, images, labels, Rotation(90), draws=2)
    assert torch.equal(plain.ekld, first.ekld)


def test_models_without_logits_are_named(batch):
    with pytest.raises(ShapeError, match=r"logits \(B, K\)"), as_predict(nn.Flatten(0)) as predict:
        predict(batch[0])


class _Collated:
    """A collate function with a stage in it, as users write them; it travels to the loader's workers."""

    def __init__(self, stage):
        self.stage = stage

    def __call__(self, rows):
        images = torch.stack(rows)
        if isinstance(self.stage, TailAugment):
            return self.stage(images, torch.zeros(len(images), dtype=torch.int64))[0]
        return self.stage(images)


@pytest.mark.parametrize(
    "build", [lambda: TailAugment(Rotation(90), ALWAYS), lambda: KorniaNuisance(Rotation(90), p=1.0)]
)
def test_workers_of_a_loader_and_its_epochs_draw_differently(build, generator):
    """A worker begins with a copy of the stage; without streams of their own all would draw the same, every epoch."""
    same = [torch.rand(1, 8, 8, generator=generator)] * 8

    def drawn(workers, seed=3):
        loader = torch.utils.data.DataLoader(
            same, batch_size=2, num_workers=workers, collate_fn=_Collated(build()),
            generator=torch.Generator().manual_seed(seed), multiprocessing_context="fork" if workers else None,
        )  # fmt: skip
        return torch.cat([batch for _ in range(2) for batch in loader])

    moved = drawn(2)
    assert len(moved) == 16
    assert len({tuple(row.flatten().tolist()) for row in moved}) == 16
    assert torch.equal(moved, drawn(2))  # it depends on the loader's seed and nothing else
    assert not torch.equal(moved, drawn(2, seed=4))
    assert len({tuple(row.flatten().tolist()) for row in drawn(0)}) == 16
