"""Steps of a training prepared together are those prepared one by one, wherever a run is picked up again."""

import pytest
import torch
from test_train import digits, same_weights, settings, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.batches import Batches
from gen_invariance.devices import MovingAverage
from gen_invariance.nuisance.compose import Compose
from gen_invariance.nuisance.generic import RandAugment
from gen_invariance.nuisance.geometry import CropFlip, Rotation
from gen_invariance.nuisance.intensity import Lighting
from gen_invariance.nuisance.thickness import Thickness
from gen_invariance.run import Run, named_generator
from gen_invariance.translator.munit.model import MunitTranslator
from gen_invariance.translator.redraw.guard import _mended_at_once, find_spoilt, translate_safely


def munit():
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(0, "munit").get_state())
        return MunitTranslator(width=4, residual_blocks=1, mlp_width=8, styles="bank", bank_size=5)


CASES = {
    "rotation": (Rotation, {}, {}),
    "composed, a share": (lambda: Compose([Thickness(), Lighting()]), {}, {"process": 1, "processes": 3}),
    "codes of the batch": (munit, {"stage_source": "batch"}, {}),
    "bank": (Rotation, {"stage_bank": 2, "stage_bank_epochs": 1}, {}),
    "worst of three, beside its source": (Rotation, {"worst_of": 3, "consistency": 0.5}, {"augmentation": CropFlip()}),
    "mixed with a foreground": (RandAugment, {"mixing": "cmo", "mixing_probability": 0.6}, {}),
}


def batches(name, steps):
    make, more, options = CASES[name]
    stage = TailAugment(make(), torch.tensor([0.2, 0.6, 1.0]))
    how = settings(epochs=2, batch_size=7, **more)
    return Batches(digits(), how, Run(None, kind="train", seed=3), stage=stage, block_steps=steps, **options)


def last(candidates, labels, rows):
    return candidates[-1]


def parts(batch):
    return [each for each in (batch.images, batch.labels, batch.clean, batch.clean_rows) if each is not None]


@pytest.mark.parametrize("name", CASES)
def test_blocks_hold_the_steps(name):
    single, block = batches(name, 1), batches(name, 4)
    for step in range(2 * single.per_epoch):
        one, other = (each.at(step, choose=last) for each in (single, block))
        assert (one.whole, one.spare, single.staged) == (other.whole, other.spare, block.staged)
        for first, second in zip(parts(one), parts(other), strict=True):
            torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_in_the_middle_of_a_block_to_the_bit(name):
    straight = batches(name, 4)
    seen = [parts(straight.at(step, choose=last)) for step in range(2 * straight.per_epoch)]
    for start in (2, straight.per_epoch + 3):
        resumed = batches(name, 4)
        for step in (start, start + 1, start):
            assert all(map(torch.equal, parts(resumed.at(step, choose=last)), seen[step]))


def test_the_rows_of_a_block_go_through_the_nuisance_together(monkeypatch):
    passes, original = [], Rotation.apply

    def counted(self, images, draw):
        passes.append(len(images))
        return original(self, images, draw)

    monkeypatch.setattr(Rotation, "apply", counted)
    block = batches("rotation", 4)
    expected = [block.at(step).images for step in range(block.per_epoch)]
    assert len(passes) == -(-block.per_epoch // 4)
    assert sum(passes) == block.staged
    few = batches("rotation", 4)
    few.rows_of_pass = 6
    passes.clear()
    for step, images in enumerate(expected):
        torch.testing.assert_close(few.at(step).images, images, atol=1e-6, rtol=0)
    assert max(passes) <= 7  # a batch may have more than six
    assert len(passes) > -(-block.per_epoch // 4)


def test_training_in_blocks_ends_in_the_weights_of_training_by_steps(tmp_path, monkeypatch):
    stage = {"stage": TailAugment(Rotation(), torch.tensor([0.2, 0.6, 1.0]))}
    single = train(tmp_path / "one", settings(epochs=2), **stage)
    monkeypatch.setattr("gen_invariance.classifier.batches._steps_of_block", lambda data, settings: 3)
    assert same_weights(train(tmp_path / "three", settings(epochs=2), **stage), single)


# ---- what is counted on the CPU so that a GPU is not asked


@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_moving_average_is_that_of_torch(use_buffers):
    model, generator = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), named_generator(4)
    given = {"use_buffers": use_buffers}
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), **given)
    found = MovingAverage(model, lambda updates: 0.8, **given)
    rising = MovingAverage(model, lambda updates: updates / (updates + 1), **given)
    first = [each.detach().clone() for each in model.parameters()]
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        model(torch.randn(8, 3, generator=generator))
        for average in (expected, found, rising):
            average.update_parameters(model)
    assert expected.state_dict().keys() == found.state_dict().keys()
    assert all(map(torch.equal, expected.state_dict().values(), found.state_dict().values()))
    assert int(rising.n_averaged) == 4
    assert not torch.equal(first[0], rising.module[0].weight)


def test_mended_at_once_as_step_by_step():
    """Rows that are spoilt at full strength go half the way, or a quarter, or stay."""
    images = torch.rand(30, 1, 6, 6, generator=named_generator(5))
    push = torch.linspace(0, 6, 30).view(-1, 1, 1, 1)

    def translate(images, rows, strength):
        return images + strength * push[rows], torch.full((len(images),), 0.2)

    full, contrast = translate(images, torch.arange(30), 1.0)
    spoilt = find_spoilt(images, full, contrast)
    assert 0 < spoilt.sum() < 30
    at_once = _mended_at_once(images, translate, 1.0, full.clamp(0, 1), spoilt)
    torch.testing.assert_close(at_once, translate_safely(images, translate, 1.0), atol=1e-6, rtol=0)
