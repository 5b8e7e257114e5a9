"""Kept codes give what the nuisance gives; a bank is a function of (seed, step) and hands out each image's own."""

import pytest
import torch

from gen_invariance.augment.cache import CodeCache, TranslationBank, as_coded
from gen_invariance.augment.stage import TailAugment
from gen_invariance.data.images import to_uint8
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.compose import Compose, Identity
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Lighting
from gen_invariance.nuisance.protocol import Coded, Nuisance
from gen_invariance.run import named_generator
from gen_invariance.translator.munit.model import MunitTranslator

COUNT, CLASSES = 40, 4


def munit():
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(0, "munit").get_state())
        return MunitTranslator(width=4, residual_blocks=1, mlp_width=8).eval().requires_grad_(False)


NUISANCES = {"munit": munit, "munit, then light": lambda: Compose([munit(), Lighting()])}


@pytest.fixture
def images(generator):
    return torch.randint(256, (COUNT, 1, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.fixture
def labels():
    return torch.arange(COUNT) % CLASSES


class Counting:
    """Passes a coded nuisance on and notes how many images were encoded."""

    def __init__(self, inner):
        self.inner, self.encoded = inner, 0
        self.sample, self.render = inner.sample, inner.render

    def encode(self, images):
        self.encoded += len(images)
        return self.inner.encode(images)


# ---- codes


@pytest.mark.parametrize("name", NUISANCES)
def test_the_halves_make_up_the_whole(name, images, generator):
    nuisance, x = NUISANCES[name](), images.float() / 255
    halves, draw = as_coded(nuisance), nuisance.sample(x.shape, generator=generator)
    assert torch.equal(halves.render(halves.encode(x), draw, (16, 16)), nuisance.apply(x, draw))


def test_who_has_codes():
    assert isinstance(munit(), Coded)
    assert isinstance(munit(), Nuisance)
    assert as_coded(munit()) is not None
    assert as_coded(Rotation()) is None
    assert as_coded(Compose([Lighting(), munit()])) is None, "the image changes before it is encoded"


def a_code(nuisance):
    """Bytes of one."""
    first = nuisance.nuisances[0] if isinstance(nuisance, Compose) else nuisance
    return first.encode(torch.rand(1, 1, 16, 16)).numel() * 4


@pytest.mark.parametrize("name", NUISANCES)
@pytest.mark.parametrize("room", [0, 7, COUNT])
def test_kept_codes_are_exact_whatever_fits(name, room, images, generator):
    nuisance = NUISANCES[name]()
    kept = CodeCache(as_coded(nuisance), images, max_bytes=room * a_code(nuisance) + 3, block=4)
    for _ in range(4):
        indices = torch.randint(COUNT, (25,), generator=generator)
        draw = kept.sample((25, 1, 16, 16), generator=generator)
        expected = nuisance.apply(images[indices].float() / 255, draw)
        torch.testing.assert_close(kept.translate(indices, draw), expected, atol=1e-5, rtol=0)
    assert len(kept._codes) == room


def test_an_image_worth_keeping_is_encoded_once(images, generator):
    counting = Counting(munit())
    worth = torch.arange(3, COUNT, 2)
    kept = CodeCache(counting, images, indices=worth, block=4)
    kept.codes(worth[:1])
    assert counting.encoded == 1 + 4, "one to see the size, then a block"
    for _ in range(20):
        kept.codes(worth[torch.randint(len(worth), (9,), generator=generator)])
    assert counting.encoded == 1 + len(worth)
    kept.codes(torch.tensor([0, 3, 0]))
    assert counting.encoded == 1 + len(worth) + 2


def test_codes_do_not_depend_on_what_was_asked_before(images, generator):
    """To the last bit: a resumed run must repeat an uninterrupted one."""
    nuisance, wanted = munit(), torch.tensor([38, 5, 5, 12, 20])
    room = 30 * a_code(nuisance)
    warm, cold = (CodeCache(nuisance, images, max_bytes=room, block=8) for _ in range(2))
    for _ in range(5):
        warm.codes(torch.randint(COUNT, (11,), generator=generator))
    assert torch.equal(warm.codes(wanted), cold.codes(wanted))


@pytest.mark.parametrize("name", NUISANCES)
@pytest.mark.parametrize("with_source", [False, True])
def test_the_stage_gives_the_same_with_and_without_codes(name, with_source, images, labels):
    nuisance, probability = NUISANCES[name](), torch.tensor([0.0, 0.4, 1.0, 0.7])
    plain, keeping = TailAugment(nuisance, probability), TailAugment(nuisance, probability)
    keeping.enable_cache(images, labels)
    for step in range(3):
        indices = torch.randint(COUNT, (30,), generator=named_generator(step))
        x, y = images[indices].float() / 255, labels[indices]
        source = (x, y) if with_source else None
        batch = (x.flip(0), y.flip(0)) if with_source else (x, y)
        one = plain(*batch, source=source, generator=named_generator(1, step))
        two = keeping(*batch, source=source, generator=named_generator(1, step), indices=indices)
        torch.testing.assert_close(two[0], one[0], atol=1e-5, rtol=0)
        assert torch.equal(two[1], one[1])
        assert not torch.equal(two[0], batch[0])
    assert keeping.cache._encoded.any()
    keeping.disable_cache()
    assert keeping.cache is None


def test_codes_are_made_anew_in_another_precision(images, labels):
    stage = TailAugment(munit(), torch.ones(CLASSES))
    stage.enable_cache(images, labels)
    indices = torch.arange(8)
    stage(images[:8].float() / 255, labels[:8], indices=indices)
    stage.to(torch.bfloat16)
    out, _ = stage(images[:8].float() / 255, labels[:8], indices=indices)
    assert out.dtype == torch.float32
    assert stage.cache.codes(indices).dtype == torch.bfloat16


def test_caching_changes_nothing_where_there_are_no_codes(images, labels):
    plain, other = (TailAugment(Rotation(), torch.ones(CLASSES)) for _ in range(2))
    other.enable_cache(images, labels)
    x = images[:9].float() / 255
    one, _ = plain(x, labels[:9], generator=named_generator(2))
    two, _ = other(x, labels[:9], generator=named_generator(2), indices=torch.arange(9))
    assert torch.equal(one, two)


def test_that_there_are_no_codes_is_found_out_once(images, labels, monkeypatch):
    """Each look at the labels of the whole set is a copy of them to the CPU."""
    from gen_invariance.augment.cache import CachePlan

    built, original = [], CachePlan.build
    monkeypatch.setattr(CachePlan, "build", lambda self, *given: built.append(1) or original(self, *given))
    stage = TailAugment(Rotation(), torch.ones(CLASSES))
    stage.enable_cache(images, labels)
    for step in range(3):
        stage.refresh_cache(step)
        stage(images[:9].float() / 255, labels[:9], generator=named_generator(step), indices=torch.arange(9))
    assert len(built) == 1
    stage.enable_cache(images, labels, versions=2)
    assert stage.cache is not None


# ---- bank


def contents(bank):
    """Every version of every image, (M, versions, ...), of a bank that has as many of each."""
    indices = bank.indices
    shares = [torch.full((len(indices),), (version + 0.5) / bank.versions) for version in range(bank.versions)]
    return torch.stack([bank.translate(indices, {"version": share}) for share in shares], 1)


@pytest.mark.parametrize("name", ["rotation", "munit"])
def test_the_bank_is_a_function_of_seed_and_step(name, images):
    nuisance = {"rotation": Rotation, "munit": munit}[name]()

    def bank(seed=3):
        return TranslationBank(nuisance, images, versions=2, period=10, seed=seed, block=7)

    walked, before = bank(), None
    for step in range(26):
        walked.refresh(step)
        if step in (0, 4, 13, 25):
            jumped = bank()
            jumped.refresh(step)
            assert torch.equal(contents(walked), contents(jumped))
            assert before is None or not torch.equal(contents(walked), before)
            before = contents(walked)
    other = bank(seed=4)
    other.refresh(25)
    assert not torch.equal(contents(other), before)


def test_all_is_renewed_in_a_period_and_a_step_renews_little(images):
    bank = TranslationBank(Rotation(), images, versions=3, period=8, block=5)
    bank.refresh(0)
    assert bank.drawn == COUNT * 3
    before, most = contents(bank), 0
    for step in range(1, 9):
        drawn = bank.drawn
        bank.refresh(step)
        most = max(most, bank.drawn - drawn)
    assert bank.drawn == 2 * COUNT * 3
    assert most <= 5 * -(-COUNT * 3 // (5 * 8)), "each step renews its share, in whole blocks"
    assert (contents(bank) != before).flatten(2).any(2).all()


def test_each_image_gets_translations_of_its_own(images):
    bank = TranslationBank(Identity(), images, indices=torch.tensor([30, 2, 17]), versions=2, block=2)
    indices = torch.tensor([17, 30, 2, 17])
    out = bank.translate(indices, {"version": torch.tensor([0, 0.5, 0, 0.99])})
    assert torch.equal(to_uint8(out), images[indices])
    with pytest.raises(SettingsError, match="does not hold"):
        bank.translate(torch.tensor([3]), {"version": torch.tensor([0.0])})


def test_images_that_come_more_often_have_more_translations_so_all_are_used_alike(images):
    indices, uses = torch.arange(12), torch.arange(12) * 2.0
    bank = TranslationBank(Rotation(), images, indices=indices, versions=6, uses=uses, block=5)
    assert bank.counts.tolist() == [max(1, round(6 * use / 11)) for use in uses.tolist()]
    bank.refresh(0)
    assert bank.drawn == int(bank.counts.sum())
    held = {number: bank._bank[bank._owner == number] for number in range(12)}
    for number in range(1, 12):
        shares = (torch.arange(int(bank.counts[number])) + 0.5) / bank.counts[number]
        found = bank.translate(torch.full((len(shares),), number), {"version": shares})
        assert torch.equal(to_uint8(found), held[number])
    edges = bank.translate(indices[-1:].repeat(2), {"version": torch.tensor([0.0, 1 - 2**-24])})
    assert torch.equal(to_uint8(edges), held[11][[0, -1]])


def test_a_bank_of_codes_holds_what_the_nuisance_gives(images):
    nuisance = munit()
    bank = TranslationBank(nuisance, images, versions=3, uses=torch.rand(COUNT) + 0.1, period=9, block=10)
    bank.refresh(0)
    for block, rows in enumerate(bank._blocks):
        owner = bank._owner[rows]
        generator = named_generator(0, "bank", block, (block * 9 // len(bank._blocks)) // 9)
        plain = images[owner].float() / 255
        slow = nuisance.apply(plain, nuisance.sample(plain.shape, generator=generator))
        assert (to_uint8(slow).int() - bank._bank[rows].int()).abs().max() <= 1


def test_the_stage_draws_from_the_bank_only_where_images_are_known(images, labels):
    probability = torch.tensor([0.0, 1.0, 1.0, 1.0])
    stage = TailAugment(Rotation(), probability)
    stage.enable_cache(images, labels, versions=2, period=100, seed=5)
    stage.refresh_cache(0)
    indices = torch.randperm(COUNT, generator=named_generator(6))
    x, y = images[indices].float() / 255, labels[indices]
    out, _ = stage(x, y, generator=named_generator(7), indices=indices)
    bank = stage.cache
    held = dict(zip(bank.indices.tolist(), contents(bank), strict=True))
    for row, number in enumerate(indices.tolist()):
        if probability[labels[number]] == 0:
            assert torch.equal(out[row], x[row])
            assert number not in held
        else:
            assert any(torch.equal(out[row], version) for version in held[number])
    plain, _ = TailAugment(Rotation(), probability)(x, y, generator=named_generator(7))
    fresh, _ = stage(x, y, generator=named_generator(7))
    assert torch.equal(fresh, plain)


@pytest.mark.parametrize("wrong", [{"versions": 0}, {"period": 0}, {"block": 0}])
def test_a_bank_of_nothing_is_refused(wrong, images):
    with pytest.raises(SettingsError, match="at least 1"):
        TranslationBank(Rotation(), images, **wrong)
