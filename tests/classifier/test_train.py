"""The training loop: it learns, repeats itself to the bit, resumes as if nothing had happened, and stops on NaN."""

import json
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits

from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.losses import build_loss
from gen_invariance.classifier.mixing import mixup
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.errors import CheckpointError, RunError, SettingsError
from gen_invariance.nuisance.geometry import CropFlip, Rotation
from gen_invariance.run import Run, named_generator


def digits(counts=(20, 12, 4)):
    """Real digits of the first classes, so many of each, 16 x 16."""
    bunch = load_digits()
    rows = torch.cat([torch.from_numpy((bunch.target == c).nonzero()[0])[:count] for c, count in enumerate(counts)])
    ink = torch.from_numpy(bunch.images).float()[rows, None] / 16
    images = torch.nn.functional.interpolate(ink, size=(16, 16), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bunch.target)[rows].long()
    return ImageData(to_uint8(images), labels, tuple("0123456789")[: len(counts)])


def network(classes=3, seed=0):
    return build_classifier("small_conv", num_classes=classes, channels=1, generator=named_generator(seed, "net"))


def settings(**changes):
    usual = {"epochs": 4, "batch_size": 8, "learning_rate": 0.02, "warmup": 0, "milestones": (2, 3)}
    return TrainSettings(**{**usual, "checkpoint_every": 1, **changes})


def train(folder, how=None, *, data=None, seed=0, resume=False, model=None, **options):
    data, model = data or digits(), model or network()
    run = Run(folder, kind="train", seed=seed, resume=resume)
    loss = options.pop("loss", None) or build_loss("cross_entropy", counts=data.counts)
    return fit_classifier(model, data, how or settings(), loss=loss, out=run, progress=False, **options)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- it learns


def test_overfits_32_images(tmp_path):
    data = digits((16, 8, 8))
    model = train(tmp_path, settings(epochs=25, learning_rate=0.05, milestones=(100, 101)), data=data)
    assert not model.training
    with torch.no_grad():
        assert (model(data.float_images()).argmax(1) == data.labels).all()
    losses = [row["loss"] for row in Run(tmp_path, kind="train", resume=True).metrics()]
    assert len(losses) == 25
    assert losses[-1] < 0.1 * losses[0]


# ---- it repeats itself


def everything():
    """All that draws random numbers in a step, at once."""
    return {
        "stage": TailAugment(Rotation(), torch.tensor([0.0, 0.5, 1.0])),
        "augmentation": CropFlip(2),
        "mix": partial(mixup, num_classes=3),
    }


def test_same_seed_same_weights_other_seed_others(tmp_path):
    state = torch.random.get_rng_state()
    one, two = (train(tmp_path / str(place), seed=4, **everything()) for place in range(2))
    other = train(tmp_path / "other", seed=5, **everything())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same_weights(one, two)
    assert not same_weights(one, other)


class Interrupted(Exception):
    pass


def interrupt_at(epoch):
    epochs = iter(range(1, 1000))

    def evaluate(model):
        if next(epochs) == epoch:
            raise Interrupted
        return {"seen": 1.0}

    return evaluate


RESUMED = {
    "plain": (settings(), dict),
    "all draws": (settings(sampling="delayed", second_phase=2, stage_source="balanced"), everything),
    "sparse checkpoints": (settings(epochs=5, checkpoint_every=2), dict),
    "averaged": (settings(average_decay=0.9, weight_decay=1e-2), dict),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder and result of each of `RESUMED`, trained once."""
    folder, trained = tmp_path_factory.mktemp("straight"), {}

    def find(name):
        if name not in trained:
            how, options = RESUMED[name]
            trained[name] = train(folder / name, how, evaluate=lambda model: {"seen": 1.0}, **options())
        return folder / name, trained[name]

    return find


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_resumed_equals_uninterrupted_to_the_bit(name, at, tmp_path, uninterrupted):
    how, options = RESUMED[name]
    folder, straight = uninterrupted(name)
    with pytest.raises(Interrupted):
        train(tmp_path / "halted", how, evaluate=interrupt_at(at), **options())
    resumed = train(
        tmp_path / "halted",
        how,
        resume=True,
        model=network(seed=0 if at == 1 or how.checkpoint_every > 1 else 77),  # weights must come from the checkpoint
        evaluate=lambda model: {"seen": 1.0},
        **options(),
    )
    assert same_weights(straight, resumed)
    logged = [Run(run, kind="train", resume=True).metrics() for run in (folder, tmp_path / "halted")]
    assert logged[0] == logged[1]
    assert [row["step"] for row in logged[0]] == list(range(1, how.epochs + 1))


def test_a_finished_run_gives_its_weights_back(tmp_path):
    done = train(tmp_path)
    again = train(tmp_path, resume=True, model=network(seed=5), evaluate=interrupt_at(1))
    assert same_weights(done, again)
    assert not again.training


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        train(tmp_path, resume=True, model=network(classes=5))


# ---- where it is kept


def test_a_folder_an_open_run_and_no_folder_train_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, common = digits(), {"progress": False, "seed": 3}
    alone = fit_classifier(network(), data, settings(), **common)
    assert os.listdir(tmp_path) == []
    in_folder = fit_classifier(network(), data, settings(), out="run", **common)
    assert same_weights(alone, in_folder)
    assert same_weights(alone, train(tmp_path / "open", seed=3, loss=build_loss("cross_entropy", counts=data.counts)))
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (about["kind"], about["seed"]) == ("train", 3)
    assert about["config"]["training"]["epochs"] == 4
    state = Run(tmp_path / "run", kind="train", seed=3, config=about["config"], resume=True).load_latest()
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in state["model"].items())


def test_a_folder_is_continued_on_demand_and_under_the_same_settings_only(tmp_path):
    common = {"out": tmp_path / "run", "progress": False}
    with pytest.raises(Interrupted):
        fit_classifier(network(), digits(), settings(), evaluate=interrupt_at(2), **common)
    with pytest.raises(SettingsError, match="already holds a run"):
        fit_classifier(network(), digits(), settings(), **common)
    with pytest.raises(SettingsError, match="settings differ"):
        fit_classifier(network(), digits(), settings(batch_size=4), resume=True, **common)
    resumed = fit_classifier(network(seed=9), digits(), settings(), resume=True, **common)
    assert same_weights(resumed, fit_classifier(network(), digits(), settings(), progress=False))


def test_settings_that_do_not_fit_leave_no_folder(tmp_path):
    with pytest.raises(SettingsError, match="no stage"):
        fit_classifier(network(), digits(), settings(worst_of=2), out=tmp_path / "run", progress=False)
    assert os.listdir(tmp_path) == []


# ---- who sees what, and when


class Watch:
    """A nuisance that changes nothing and keeps what it is shown, apart by the moment `turn` is called."""

    def __init__(self):
        self.seen = [[]]

    def sample(self, shape, *, generator):
        return {}

    def apply(self, images, draw):
        self.seen[-1].append(images)
        return images.clone()

    def turn(self, _model=None):
        self.seen.append([])
        return {}


def rows_of(data, images):
    place = {image.numpy().tobytes(): row for row, image in enumerate(data.images)}
    return [place[image.numpy().tobytes()] for part in images for image in to_uint8(part)]


def test_delayed_sampling_and_stage_start_at_the_same_epoch(tmp_path):
    """The reference switched its sampler at `epoch >= m` and its generator at `epoch > m`."""
    data = digits((60, 6, 6))
    plain, given = Watch(), Watch()
    how = settings(epochs=5, milestones=(3, 4), sampling="delayed", stage_from="second_phase")
    train(
        tmp_path,
        how,
        data=data,
        augmentation=plain,
        stage=TailAugment(given, torch.ones(3)),
        evaluate=lambda model: {**plain.turn(), **given.turn()},
    )
    shares = [(data.labels[rows_of(data, epoch)] == 0).float().mean().item() for epoch in plain.seen[:5]]
    assert shares[:3] == pytest.approx([60 / 72] * 3), "an instance-sampled epoch is each image once"
    assert all(share < 0.6 for share in shares[3:])
    assert [bool(epoch) for epoch in given.seen[:5]] == [False, False, False, True, True]


def test_second_phase_may_be_another_epoch_than_the_milestone():
    how = settings(milestones=(2, 3), second_phase=1, stage_from="second_phase", sampling="delayed")
    assert [how.stage_is_on(epoch) for epoch in range(4)] == [False, True, True, True]
    assert [how.rule()(epoch) for epoch in range(3)] == ["instance", "class_balanced", "class_balanced"]
    assert settings(stage_from="start").stage_is_on(0)


def test_every_image_once_an_epoch_and_another_order_in_the_next(tmp_path):
    data, watch = digits(), Watch()
    train(tmp_path, settings(epochs=2), data=data, augmentation=watch, evaluate=watch.turn)
    first, second = (rows_of(data, epoch) for epoch in watch.seen[:2])
    assert sorted(first) == sorted(second) == list(range(36))
    assert first != second


def test_every_step_of_every_epoch_has_draws_of_its_own(tmp_path):
    angles = []

    class Noted(Rotation):
        def apply(self, images, draw):
            angles.extend(draw["degrees"].tolist())
            return super().apply(images, draw)

    train(tmp_path, settings(epochs=3), augmentation=Noted())
    assert len(set(angles)) == len(angles) == 3 * 36


def test_the_stage_sees_tail_rows_only(tmp_path):
    data, watch = digits(), Watch()
    stage = TailAugment(watch, torch.tensor([0.0, 0.0, 1.0]))
    train(tmp_path, settings(epochs=2), data=data, stage=stage, evaluate=watch.turn)
    assert sorted(rows_of(data, watch.seen[0])) == list(range(32, 36))


def inputs_of(model):
    """What the network is shown while it trains."""
    seen = []
    model.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()) if module.training else None)
    return seen


def test_a_balanced_source_replaces_rows_with_their_labels(tmp_path):
    """Head rows give way to tail rows of the second stream, so tail images are seen more often than they exist."""
    data, shown = digits((60, 6, 6)), []

    class Loss(torch.nn.Module):
        def forward(self, logits, labels):
            shown.append(labels.clone())
            return torch.nn.functional.cross_entropy(logits, labels)

    model = network()
    seen = inputs_of(model)
    stage = TailAugment(Watch(), torch.tensor([0.0, 1.0, 1.0]))
    train(tmp_path, settings(epochs=3, stage_source="balanced"), data=data, model=model, stage=stage, loss=Loss())
    labels = torch.cat(shown)
    rows = rows_of(data, seen)
    assert torch.equal(data.labels[rows], labels), "each image must keep its own label"
    assert (labels > 0).float().mean() > 0.5


# ---- rates


def test_protocol_schedule():
    """Linear warm-up over 5 epochs, then 0.1, times 0.01 after epoch 160, times 0.0001 after epoch 180."""
    how = TrainSettings()
    expected = {
        0: 0.02,
        1: 0.04,
        2: 0.06,
        3: 0.08,
        4: 0.1,
        5: 0.1,
        159: 0.1,
        160: 1e-3,
        179: 1e-3,
        180: 1e-5,
        199: 1e-5,
    }
    for epoch, rate in expected.items():
        assert how.learning_rate_at(epoch) == pytest.approx(rate), epoch
        assert how.learning_rate_at(epoch + 0.99) == pytest.approx(rate), epoch
    k49 = TrainSettings(epochs=50, milestones=(30, 40))
    assert [k49.learning_rate_at(e) for e in (29, 30, 39, 40)] == pytest.approx([0.1, 1e-3, 1e-3, 1e-5])


def test_cosine_schedule():
    how = TrainSettings(epochs=10, schedule="cosine", warmup=2, learning_rate=1.0)
    rates = [how.learning_rate_at(place / 10) for place in range(100)]
    assert 0 < rates[0] < 0.1
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (19, 20)
    assert how.learning_rate_at(6) == pytest.approx(0.5)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert how.learning_rate_at(10) == pytest.approx(0, abs=1e-12)


def test_rates_are_those_of_the_schedule(tmp_path):
    train(tmp_path, settings(warmup=2, milestones=(2, 3)))
    logged = [row["learning_rate"] for row in Run(tmp_path, kind="train", resume=True).metrics()]
    assert logged == pytest.approx([0.01, 0.02, 0.0002, 0.000002])


def test_one_step_is_sgd_by_hand(tmp_path):
    """Two full-batch steps without momentum and decay: w - rate * gradient, computed with autograd alone."""
    data = digits((4, 4, 4))
    model, twin = network(), network().train()
    train(
        tmp_path,
        settings(epochs=2, batch_size=12, momentum=0.0, weight_decay=0.0, milestones=(5, 6)),
        data=data,
        model=model,
    )
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(twin(data.float_images()), data.labels)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
            parameter.data -= 0.02 * gradient
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# ---- when it fails


class BreaksIn(torch.nn.Module):
    """Cross-entropy that turns infinite in one step."""

    def __init__(self, step):
        super().__init__()
        self.steps, self.step = iter(range(10**6)), step

    def forward(self, logits, labels):
        value = torch.nn.functional.cross_entropy(logits, labels)
        return value / 0.0 if next(self.steps) == self.step else value


def test_non_finite_loss_names_the_epoch_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(RunError, match=r"training stopped in epoch 3: the loss is (inf|nan); lower .*learning_rate"):
        train(tmp_path, loss=BreaksIn(12))  # 5 steps an epoch
    run = Run(tmp_path, kind="train", resume=True)
    assert [row["step"] for row in run.metrics()] == [1, 2]
    state = run.load_latest()
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_weights_that_broke_in_the_last_step_are_not_kept(tmp_path):
    """The loss of every step is finite although the last update is not: no checkpoint may hold such weights."""
    model = network()
    steps = iter(range(10**6))

    def explode(gradient):
        return gradient * float("inf") if next(steps) == 9 else gradient

    model.head.weight.register_hook(explode)
    with pytest.raises(RunError, match=r"training stopped in epoch 2: .*weight"):
        train(tmp_path, model=model)
    assert Run(tmp_path, kind="train", resume=True).load_latest()["step"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"momentum": 1.0},
        {"weight_decay": -1},
        {"warmup": -1},
        {"schedule": "linear"},
        {"stage_from": "later"},
        {"stage_source": "tail"},
        {"mixed_precision": "int8"},
        {"checkpoint_every": 0},
        {"milestones": (1, 2, 3)},
        {"milestones": (3,)},
        {"milestones": (180, 160)},
        {"second_phase": -1},
    ],
)
def test_bad_settings_are_named(change):
    with pytest.raises(SettingsError, match=next(iter(change))):
        TrainSettings(**change)


def test_unknown_sampling_rule_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"training\.sampling must be one of instance, .*, got 'balanced'"):
        train(tmp_path, settings(sampling="balanced"))


def test_identity_leaves_out_how_often_one_looks():
    assert settings(log_every=2).identity() == settings(checkpoint_every=3).identity()
    assert settings(warmup=1).identity() != settings().identity()
    json.dumps(settings().identity())


# ---- mixed precision


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_trained_in_bf16_answers_as_its_saved_weights(fails, tmp_path):
    """accelerate gives the model a `forward` under autocast for the training; it must not stay."""
    model, images = network(), digits().float_images()
    if fails:
        with pytest.raises(Interrupted):
            train(tmp_path, settings(epochs=1, mixed_precision="bf16"), model=model, evaluate=interrupt_at(1))
    else:
        train(tmp_path, settings(epochs=1, mixed_precision="bf16"), model=model)
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(images), model.eval()(images), atol=1e-5, rtol=1e-5)
    assert not {"forward", "_original_forward"} & set(vars(model))


# ---- several processes

PROGRAM = """
import os, sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from test_train import inputs_of, network, settings, train, everything
rank = os.environ["RANK"]
model = network()
seen = inputs_of(model)
options = everything()
options.pop("mix")
train(sys.argv[1] + rank, settings(epochs=2), model=model, seed=3, **options)
torch.save({{"seen": seen, "parameters": dict(model.named_parameters())}}, sys.argv[1] + rank + ".pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_see_the_rows_and_draws_of_one(tmp_path):
    model, options = network(), everything()
    options.pop("mix")
    seen = inputs_of(model)
    train(tmp_path / "one", settings(epochs=2), model=model, seed=3, **options)

    program = textwrap.dedent(PROGRAM).format(paths=[os.path.dirname(__file__)])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    common["MASTER_PORT"] = str(20000 + (os.getpid() + 7919) % 20000)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "rank")],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(ranks[0]["seen"]) == len(ranks[1]["seen"]) == len(seen) == 10
    for step, whole in enumerate(seen):
        for rank in range(2):
            torch.testing.assert_close(ranks[rank]["seen"][step], whole[rank::2], atol=1e-5, rtol=0)
    for name, value in ranks[0]["parameters"].items():
        assert torch.equal(value, ranks[1]["parameters"][name]), name
