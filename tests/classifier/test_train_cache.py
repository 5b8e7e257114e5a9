"""Training with the stage's indexed cache: codes change nothing, a bank draws ahead, both resume exactly."""

import pytest
import torch
from test_train import Interrupted, digits, interrupt_at, same_weights, settings, train

from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.batches import Batches
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.geometry import CropFlip, Rotation
from gen_invariance.run import Run, named_generator
from gen_invariance.translator.munit.model import MunitTranslator


class WithoutCodes:
    """MUNIT that does not say it has codes."""

    def __init__(self, inner):
        self.sample, self.apply = inner.sample, inner.apply


def munit():
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(0, "munit").get_state())
        return MunitTranslator(width=4, residual_blocks=1, mlp_width=8).eval()


def stage(nuisance=None):
    return TailAugment(nuisance or munit(), torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("source", ["batch", "balanced"])
def test_codes_do_not_change_the_training(source, tmp_path):
    how = settings(epochs=2, stage_source=source, worst_of=2, consistency=0.5)
    with_codes = train(tmp_path / "codes", how, stage=stage())
    without = train(tmp_path / "none", how, stage=stage(WithoutCodes(munit())))
    for one, other in zip(with_codes.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert not same_weights(with_codes, train(tmp_path / "no", settings(epochs=2)))


class Counting(MunitTranslator):
    """How many images were encoded."""

    def encode(self, images):
        self.seen = getattr(self, "seen", 0) + len(images)
        return super().encode(images)


@pytest.mark.parametrize("augmentation", [None, CropFlip(2)])
def test_an_image_is_encoded_once_whatever_augments_it_afterwards(augmentation, tmp_path):
    counting = Counting(width=4, residual_blocks=1, mlp_width=8)
    train(tmp_path, settings(epochs=4), stage=stage(counting), augmentation=augmentation)
    tail = 12 + 4
    assert counting.seen == 1 + tail, "one to see the size of a code"


KNOWN = {
    "codes": (settings(stage_source="balanced"), munit),
    "bank": (settings(stage_bank=2, stage_bank_epochs=2), lambda: Rotation(90)),
    "bank, later": (settings(stage_bank=1, stage_bank_epochs=3, stage_from="second_phase"), munit),
}


@pytest.mark.parametrize("name", KNOWN)
def test_resumed_equals_uninterrupted_to_the_bit(name, tmp_path):
    how, nuisance = KNOWN[name]
    straight = train(tmp_path / "straight", how, stage=stage(nuisance()), evaluate=lambda model: {"seen": 1.0})
    with pytest.raises(Interrupted):
        train(tmp_path / "halted", how, stage=stage(nuisance()), evaluate=interrupt_at(4))
    resumed = train(
        tmp_path / "halted", how, resume=True, stage=stage(nuisance()), evaluate=lambda model: {"seen": 1.0}
    )
    assert same_weights(straight, resumed)


def test_gated_rows_come_from_the_bank(tmp_path):
    data = digits()
    how = settings(epochs=6, stage_bank=2, stage_bank_epochs=3)
    given = stage(Rotation(90))
    batches = Batches(data, how, Run(tmp_path, kind="train"), stage=given)
    bank = given.cache
    translated = 0
    for step in range(4 * batches.per_epoch):
        batch, rows = batches.at(step), batches.rows.indices(step)
        for place, number in enumerate(rows.tolist()):
            count = bank.counts[bank._slots[number]] if data.labels[number] > 0 else 0
            versions = [
                bank.translate(torch.tensor([number]), {"version": torch.tensor([(v + 0.5) / count])})[0]
                for v in range(count)
            ]
            if not torch.equal(batch.images[place], data.float_images(rows)[place]):
                assert any(torch.equal(batch.images[place], version) for version in versions)
                translated += 1
    assert translated > 20
    count = int(bank.counts.sum())
    assert abs(count - 2 * (12 + 4)) <= 8, "two for each image of the tail, give or take rounding"
    assert count < bank.drawn <= count * (1 + 4 / 3 + 1), "filled once, and 4 of every 3 epochs replaced"


def test_the_bank_follows_the_rows_the_stage_meets(tmp_path):
    how = settings(epochs=200, stage_bank=9, stage_source="balanced")
    given = stage(Rotation(90))
    batches = Batches(digits(), how, Run(tmp_path, kind="train"), stage=given)
    bank = given.cache
    met = torch.zeros(len(digits()))
    for step in range(how.epochs * batches.per_epoch):
        rows = batches.balanced.indices(step)
        met += torch.bincount(rows, given.probability[batches.labels[rows]], minlength=len(met))
    expected = met[bank.indices] / met[bank.indices].mean() * 9
    assert ((bank.counts - expected).abs() <= 0.5 + 0.15 * expected).all()


def test_the_cache_is_dropped_when_training_is_done(tmp_path):
    given = stage()
    train(tmp_path, settings(epochs=1), stage=given)
    assert given.cache is None


def test_a_bank_without_a_stage_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="stage_bank"):
        train(tmp_path / "no", settings(stage_bank=2))
