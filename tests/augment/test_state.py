"""What a stage holds outside of a state dict survives whatever is done to the model around it.

Seeds, activation checkpointing, copies, pickles, other processes, the meta device, defaults of torch: each property is
tried on stages, nuisances and moments that hypothesis chooses.
"""

import copy
import io
import pickle
from contextlib import contextmanager, nullcontext

import accelerate
import kornia.augmentation as K
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_inputs import CLASSES, batch, munit
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import gen_invariance as gi
from gen_invariance.augment.kornia import KorniaNuisance
from gen_invariance.augment.stage import TailAugment
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.geometry import CropFlip

IMAGES, LABELS = batch(8)
PROBABILITY = torch.full((CLASSES,), 0.6)
SET = (IMAGES * 255).round().to(torch.uint8)

NUISANCES = {
    "background": gi.Background,
    "compose": lambda: gi.Compose([munit(), gi.Lighting()]),
    "crop_flip": CropFlip,
    "lighting": gi.Lighting,
    "munit": munit,
    "randaugment": gi.RandAugment,
    "rotation": lambda: gi.Rotation(30),
    "shear": gi.Shear,
    "spatial": lambda: gi.SpatialTranslator(1, start=0.5).eval(),
    "thickness": gi.Thickness,
    "translation": gi.Translation,
    "trivialaugment": gi.TrivialAugment,
}
names = st.sampled_from(sorted(NUISANCES))
seeds = st.sampled_from([None, 0, 7])
kinds = st.sampled_from(["tail", "kornia", "sequence", "cached", "bank"])


class Stage(nn.Module):
    """One of the stages, as a module from images to images."""

    def __init__(self, kind, nuisance, seed):
        super().__init__()
        self.kind = kind
        if kind in ("kornia", "sequence"):
            self.stage = KorniaNuisance(nuisance, p=0.6, seed=seed)
            if kind == "sequence":
                self.stage = K.AugmentationSequential(self.stage)
            return
        self.stage = TailAugment(nuisance, PROBABILITY, seed=seed)
        if kind != "tail":
            self.stage.enable_cache(SET, LABELS, versions=2 * (kind == "bank"), seed=seed)

    def forward(self, images):
        if self.kind in ("kornia", "sequence"):
            return self.stage(images)
        indices = None if self.kind == "tail" else torch.arange(len(images), device="cpu")
        return self.stage(images, LABELS, indices=indices)[0]


class Net(nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.stage, self.body = stage, nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 3))

    def forward(self, images):
        return self.body(self.stage(images))


def build(kind, name, seed):
    torch.random.default_generator.manual_seed(1)
    return Stage(kind, NUISANCES[name](), seed)


def restart():
    """Begin torch's global stream anew, which a stage without a seed draws from."""
    torch.random.default_generator.manual_seed(3)


@pytest.fixture(autouse=True)
def keeps_global_stream():
    with torch.random.fork_rng(devices=[]):
        yield


# ---- seeds


@given(first=names, second=names, kind=st.sampled_from(["tail", "kornia"]), seed=st.sampled_from([None, 0]))
@settings(max_examples=15, deadline=None)
def test_stages_beside_each_other_choose_rows_independently(first, second, kind, seed):
    """Without a seed always; with one and the same seed unless they are copies of each other."""
    if seed is not None and first == second:
        return
    torch.random.default_generator.manual_seed(0)
    count, chosen = 4000, []
    for name in (first, second):
        nuisance = NUISANCES[name]()
        if kind == "kornia":
            drawn = KorniaNuisance(nuisance, p=0.5, seed=seed).forward_parameters((count, 1, 4, 4))["batch_prob"] > 0.5
        else:
            stage, labels = TailAugment(nuisance, torch.full((1,), 0.5), seed=seed), torch.zeros(count).long()
            drawn = stage.sample((count, 1, 4, 4), labels).rows
        chosen.append(drawn)
    both = (chosen[0] & chosen[1]).double().mean()
    assert abs(both - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5


def test_two_stages_without_a_seed_draw_other_numbers():
    angles = [KorniaNuisance(gi.Rotation(30), p=1.0).forward_parameters((8, 1, 4, 4))["degrees"] for _ in range(2)]
    assert not torch.equal(*angles)
    banks = [TailAugment(gi.Rotation(30), torch.ones(CLASSES)) for _ in range(2)]
    moved = []
    for stage in banks:
        stage.enable_cache(SET, LABELS, versions=2)
        moved.append(stage.cache.translate(torch.arange(8), {"version": torch.zeros(8)}))
    assert not torch.equal(*moved)


def test_the_global_seed_repeats_a_run_and_every_rank_draws_for_itself(monkeypatch):
    def drawn(rank):
        restart()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        return Stage("tail", gi.Rotation(90), None)(IMAGES)

    alone, first, second = drawn(None), drawn(0), drawn(1)
    assert torch.equal(alone, first)
    assert torch.equal(alone, drawn(None))
    assert not torch.equal(first, second)


# ---- activation checkpointing


def gradient(model, segments):
    """The gradient of a loss over `segments`, pairs of images and how they are computed."""
    restart()
    loss = sum((place + 1) * how(model, images).square().sum() for place, (images, how) in enumerate(segments))
    loss.backward()
    found = torch.cat([value.grad.flatten() for value in model.body.parameters()])
    model.zero_grad()
    return found


def plainly(model, images):
    return model(images)


def again(reentrant):
    def how(model, images):
        given = images.clone().requires_grad_(reentrant)
        return checkpoint(model, given, use_reentrant=reentrant)

    return how


@given(
    kind=kinds,
    name=st.sampled_from(["lighting", "rotation", "munit", "compose"]),
    seed=seeds,
    reentrant=st.booleans(),
    order=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    steps=st.integers(1, 2),
)
@settings(max_examples=30, deadline=None)
def test_what_is_computed_again_draws_the_same(kind, name, seed, reentrant, order, steps):
    """Several parts, other batches or the same one again, step after step."""
    batches = [IMAGES, IMAGES.flip(0), IMAGES.roll(1, 0)]
    found = []
    for how in (plainly, again(reentrant)):
        model = Net(build(kind, name, seed))
        found.append([gradient(model, [(batches[each], how) for each in order]) for _ in range(steps)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_generator_of_the_callers_is_not_drawn_from_twice(reentrant):
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage, self.generator = TailAugment(gi.Lighting(), torch.full((CLASSES,), 0.5)), None

        def forward(self, images):
            return self.stage(images, LABELS, generator=self.generator)[0]

    found, states = [], []
    for how in (plainly, again(reentrant)):
        restart()
        model = Net(Given())
        model.stage.generator = torch.Generator().manual_seed(9)
        found.append(gradient(model, [(IMAGES, how), (IMAGES.flip(0), how)]))
        states.append(model.stage.generator.get_state())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(*states)


# ---- copies and other processes


def saved_whole(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(module):
    average = AveragedModel(module)
    average.update_parameters(module)
    return average.module


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "saved whole": saved_whole,
    "averaged": averaged,
}


@given(
    kind=kinds,
    name=names,
    seed=seeds,
    used=st.integers(0, 2),
    how=st.sampled_from(sorted(COPIES)),
    step=st.sampled_from([0, 700]),
)
@settings(max_examples=40, deadline=None)
def test_copies_go_on_as_the_original_would(kind, name, seed, used, how, step):
    stage = build(kind, name, seed)
    if kind in ("cached", "bank"):
        stage.stage.refresh_cache(step)
    for _ in range(used):
        stage(IMAGES)
    twin = COPIES[how](stage)
    restart()
    expected = stage(IMAGES)
    restart()
    assert torch.equal(twin(IMAGES), expected)


def test_a_copy_of_a_cached_stage_shares_the_set():
    stage = build("bank", "rotation", 0).stage
    assert copy.deepcopy(stage)._plan.images is SET


class Collate:
    def __init__(self, stage):
        self.stage = stage

    def __call__(self, rows):
        return self.stage(torch.stack(rows))


def test_generators_are_not_sent_to_other_processes():
    """A process that is spawned cannot open them; what it opens is tried below."""
    for kind in ("tail", "kornia", "bank"):
        assert b"Generator" not in pickle.dumps(build(kind, "rotation", 0))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_spawned(method):
    """One process for all kinds: each takes seconds to start."""
    collate = Collate(nn.Sequential(*(Stage(kind, gi.Rotation(90), 0) for kind in ("tail", "kornia", "bank"))))
    loader = torch.utils.data.DataLoader(
        list(IMAGES), batch_size=8, num_workers=1, collate_fn=collate, multiprocessing_context=method,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    first, second = (next(iter(loader)) for _ in range(2))
    assert first.shape == IMAGES.shape
    assert not torch.equal(first, IMAGES)
    assert not torch.equal(first, second)


# ---- moves of the model around it


def emptied(model):
    state = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(state)


def through_meta(model):
    state = copy.deepcopy(model.state_dict())
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(state)


MOVES = {
    "to_empty": emptied,
    "meta and back": through_meta,
    "half and back": lambda model: model.half().float(),
    "bfloat16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "float": lambda model: model.float(),
    "zeroed": lambda model: model._apply(torch.zeros_like),
    "shared": lambda model: model.share_memory(),
}


@given(kind=kinds, name=names, moves=st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_the_nuisance_survives_what_happens_to_the_model(kind, name, moves):
    model = Net(build(kind, name, 5))
    restart()
    expected = copy.deepcopy(model.stage)(IMAGES)
    for move in moves:
        MOVES[move](model)
    restart()
    assert torch.equal(model.stage(IMAGES), expected)


def test_the_callers_own_translator_is_not_changed():
    network = munit()
    before = copy.deepcopy(network.state_dict())
    for stage in (TailAugment(network, torch.ones(CLASSES)), KorniaNuisance(network, p=1.0)):
        stage.to(torch.bfloat16)
        assert {value.dtype for value in stage.nuisance.state_dict().values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_weights_that_were_never_there_are_missed():
    with torch.device("meta"):
        network = munit()
    stage = TailAugment(network, torch.ones(CLASSES))
    with pytest.raises(SettingsError, match="made on the meta device and has no weights"):
        stage(IMAGES, LABELS)
    with torch.device("meta"), pytest.raises(SettingsError, match="probability has no values"):
        TailAugment(gi.Rotation(), torch.ones(CLASSES))


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_translators_are_loaded_whole_under_the_meta_device(tmp_path):
    gi.SpatialTranslator(1).save_pretrained(tmp_path)
    expected = gi.load_translator(tmp_path).state_dict()
    with torch.device("meta"):
        stage = TailAugment.from_pretrained(tmp_path, class_counts=[9, 3, 2, 1])
    assert all(torch.equal(expected[name], value) for name, value in stage.nuisance.state_dict().items())
    with accelerate.init_empty_weights(), pytest.raises(SettingsError, match="without weights"):
        gi.load_translator(tmp_path)


@pytest.mark.parametrize("kind", ["tail", "cached", "bank"])
@pytest.mark.parametrize("name", ["munit", "compose", "rotation"])
def test_first_used_for_a_prediction_then_trained(kind, name):
    model = Net(build(kind, name, 0))
    with torch.inference_mode():
        model(IMAGES)
    if kind == "bank":
        model.stage.stage.refresh_cache(5000)
    model(IMAGES).sum().backward()
    assert model.body[0].weight.grad.abs().sum() > 0


# ---- defaults of torch


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),  # stands for any device that is not the batch's
    "none": nullcontext,
}


@given(kind=kinds, name=names, seed=seeds, default=st.sampled_from(sorted(DEFAULTS)), built_inside=st.booleans())
@settings(max_examples=50, deadline=None)
def test_defaults_of_torch_change_nothing(kind, name, seed, default, built_inside):
    expected = build(kind, name, seed)
    restart()
    expected = expected(IMAGES)
    is_network = name in ("munit", "compose", "spatial")  # those take torch's defaults as every module does
    with DEFAULTS[default]() if built_inside and not is_network else nullcontext():
        stage = build(kind, name, seed)
    restart()
    with DEFAULTS[default]():
        moved = stage(IMAGES)
    assert moved.dtype == torch.float32
    assert torch.equal(moved, expected)


@given(name=names, default=st.sampled_from(["float64", "bfloat16", "meta"]))
@settings(max_examples=20, deadline=None)
def test_nuisances_by_themselves_draw_the_same(name, default):
    nuisance = NUISANCES[name]()
    expected = nuisance.sample(IMAGES.shape, generator=torch.Generator().manual_seed(0))
    with DEFAULTS[default]():
        drawn = nuisance.sample(IMAGES.shape, generator=torch.Generator("cpu").manual_seed(0))
    assert drawn.keys() == expected.keys()
    for key, value in expected.items():
        assert drawn[key].dtype == value.dtype
        assert torch.equal(drawn[key], value)
