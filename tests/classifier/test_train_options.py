"""Options of the loop: parts of a batch, worst of k, consistency, mixing, a second loss, several processes."""

import copy
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_train import Interrupted, digits, interrupt_at, network, same_weights, settings, train
from torch import nn

from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier.batches import Batches
from gen_invariance.classifier.losses import build_loss
from gen_invariance.classifier.model import Backbone, Classifier, CosineHead, build_head
from gen_invariance.classifier.objective import choose_hardest, consistency_term, row_losses
from gen_invariance.data.sampling import epoch_indices
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.compose import Identity
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Background
from gen_invariance.run import Run, named_generator


def plain(classes=3, seed=0):
    """A classifier without batch norm: a batch in parts, or on several processes, gives the same gradient."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        first = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.Tanh())
        second = nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    module = nn.Sequential()
    module.add_module("one", first)
    module.add_module("two", second)
    head = build_head("linear", 32, classes, generator=named_generator(seed, "head"))
    return Classifier(Backbone(module, 32, 1, {"one": ("one",), "two": ("two",)}), head)


def stage(probability=0.7, degrees=90.0):
    return TailAugment(Rotation(degrees), torch.full((3,), probability))


def batches(folder, how, *, data=None, **options):
    data = data or digits()
    return Batches(data, how, Run(folder, kind="train"), **options)


# ---- parts of a batch


@pytest.mark.parametrize("parts", [2, 3, 64])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(parts, tmp_path):
    counts = digits().counts
    results = []
    for accumulate in (1, parts):
        how = settings(epochs=2, accumulate=accumulate, consistency=0.5)
        loss = build_loss("cross_entropy", counts=counts, weights="inverse")
        results.append(train(tmp_path / str(accumulate), how, model=plain(), loss=loss, stage=stage()))
    for one, other in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
    assert not same_weights(results[0], plain())


def test_the_weighted_mean_is_that_of_torch(tmp_path):
    """One step by hand, with weighted rows: the sum over parts must be torch's weighted mean."""
    data = digits((4, 3, 2))
    how = settings(epochs=1, batch_size=9, accumulate=4, momentum=0.0, weight_decay=0.0, learning_rate=1.0)
    loss = build_loss("cross_entropy", counts=data.counts, weights="inverse")
    trained = train(tmp_path / "run", how, data=data, model=plain(), loss=loss)

    model = plain()
    weights = 1 / data.counts.float()
    F.cross_entropy(model(data.float_images()), data.labels, weight=weights).backward()
    for before, after in zip(model.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(after, before - before.grad, atol=1e-6, rtol=1e-5)


def test_row_weights_of_soft_labels_are_their_mean():
    loss = build_loss("cross_entropy", counts=[9, 1], weights={"1": 4.0})
    soft = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    torch.testing.assert_close(loss.row_weights(soft), torch.tensor([0.25 + 3.0, 1.0]))
    logits = torch.randn(2, 2)
    expected = row_losses(loss, logits, soft).sum() / loss.row_weights(soft).sum()
    torch.testing.assert_close(loss(logits, soft), expected)


# ---- worst of k and consistency


def test_hardest_against_a_loop(generator):
    model, loss = network(), build_loss("cross_entropy", counts=[3, 2, 1])
    images = torch.rand(6, 1, 16, 16, generator=generator)
    labels, rows = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 2, 5])
    candidates = [images, *(images.clone() for _ in range(3))]
    for candidate in candidates[1:]:
        candidate[rows] = torch.rand(3, 1, 16, 16, generator=generator)
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = choose_hardest(model, loss, candidates, labels, rows)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    model.eval()
    winners = set()
    for row in range(6):
        if row not in rows.tolist():
            assert torch.equal(found[row], images[row])
            continue
        with torch.no_grad():
            losses = [float(F.cross_entropy(model(one[row : row + 1]), labels[row : row + 1])) for one in candidates]
        winner = max(range(4), key=losses.__getitem__)
        winners.add(winner)
        assert torch.equal(found[row], candidates[winner][row])
    assert winners - {0}


def test_worst_of_draws_differ_in_gated_rows_only(tmp_path):
    seen = []

    def choose(candidates, labels, rows):
        seen.append((candidates, rows))
        return candidates[-1]

    how = settings(worst_of=3)
    batch = batches(tmp_path / "run", how, stage=stage(0.5)).at(0, choose=choose)
    (candidates, rows), others = seen[0], None
    others = torch.ones(8, dtype=torch.bool)
    others[rows] = False
    assert len(candidates) == 3
    assert 0 < len(rows) < 8
    assert torch.equal(candidates[0][others], candidates[2][others])
    assert not torch.equal(candidates[0][rows], candidates[1][rows])
    assert torch.equal(batch.images, candidates[-1])
    first = batches(tmp_path / "other", settings(), stage=stage(0.5)).at(0)
    assert torch.equal(first.images, candidates[0])  # the first of k draws is the only one of one


def test_consistency_term_against_its_formula(generator):
    clean, moved = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    p, q = clean.softmax(1), moved.softmax(1)
    expected = sum(float(p[i, c] * (p[i, c] / q[i, c]).log()) for i in range(5) for c in range(4))
    assert float(consistency_term(clean, moved)) == pytest.approx(expected, rel=1e-5)
    assert float(consistency_term(clean, clean)) == pytest.approx(0, abs=1e-6)
    clean.requires_grad_(True)
    moved.requires_grad_(True)
    consistency_term(clean, moved).backward()
    assert clean.grad is None
    assert moved.grad is not None


@pytest.mark.parametrize("source", ["batch", "balanced"])
def test_consistency_pairs_a_row_with_itself(source, tmp_path):
    how = settings(consistency=1.0, stage_source=source)
    same = TailAugment(Rotation(0.0), torch.full((3,), 0.6))
    batch = batches(tmp_path / "run", how, stage=same).at(1)
    assert 0 < len(batch.clean_rows) < 8
    torch.testing.assert_close(batch.clean, batch.images[batch.clean_rows], atol=1e-5, rtol=0)
    pieces = batch.split(3)
    assert torch.equal(torch.cat([piece.clean for piece in pieces]), batch.clean)
    for piece in pieces:
        torch.testing.assert_close(piece.clean, piece.images[piece.clean_rows], atol=1e-5, rtol=0)


class Nothing(nn.Module):
    def forward(self, logits, labels):
        return 0 * logits.sum()


def test_consistency_alone_makes_answers_steadier(tmp_path):
    images = digits().float_images()
    moved = Rotation(90.0).apply(images, Rotation(90.0).sample(images.shape, generator=named_generator(5)))

    def drift(model):
        with torch.no_grad():
            return float(consistency_term(model(images), model(moved)))

    how = settings(epochs=15, consistency=30.0, weight_decay=0.0)
    trained = train(tmp_path / "run", how, model=plain(), loss=Nothing(), stage=stage(1.0))
    assert drift(trained) < 0.5 * drift(plain())


# ---- mixing


def test_cmo_takes_its_foreground_from_balanced_classes(tmp_path):
    data = digits((40, 10, 2))
    loader = batches(tmp_path / "run", settings(mixing="cmo", batch_size=52), data=data)
    batch = loader.at(0)
    assert batch.labels.shape == (52, 3)
    torch.testing.assert_close(batch.labels.sum(1), torch.ones(52))
    rows = epoch_indices(data.labels, rule="class_balanced", epoch=0, seed=0, num_epochs=4, stream="foreground")
    kept = 1 - (batch.labels * F.one_hot(data.labels[loader.rows.indices(0)], 3)).sum(1)
    given = batch.labels.gather(1, data.labels[rows][:, None])[:, 0]
    differs = data.labels[rows] != data.labels[loader.rows.indices(0)]
    assert differs.sum() > 20
    torch.testing.assert_close(given[differs], kept[differs], atol=1e-6, rtol=0)


def test_mixing_probability(tmp_path):
    mixed = []
    loader = batches(tmp_path / "run", settings(epochs=40, mixing="mixup", mixing_probability=0.3))
    for step in range(200):
        mixed.append(loader.at(step).labels.ndim == 2)
    assert 35 < sum(mixed) < 90  # 60 expected, 3.9 standard deviations


# ---- a second loss


def test_the_second_loss_starts_with_the_second_phase(tmp_path):
    calls = []

    class Spy(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, logits, labels):
            calls.append(self.name)
            return F.cross_entropy(logits, labels)

    how = settings(epochs=4, second_phase=3)
    train(tmp_path / "run", how, loss=Spy("first"), second_loss=Spy("second"))
    assert calls == ["first"] * 15 + ["second"] * 5


# ---- bad settings


def test_bad_settings_are_named_before_training(tmp_path):
    for change, words in (
        ({"worst_of": 2}, "worst_of works on what the stage does"),
        ({"consistency": 0.1}, "consistency works on what the stage does"),
        ({"mixing": "mixup", "mixing_options": {"beta": 1}}, "mixup has no option 'beta'"),
        ({"head_correction": "crt", "head_correction_options": {"tau": 1}}, "has no setting 'tau'"),
        ({"head_correction": "tau_norm", "head_correction_options": {"tau": 2}}, "tau must be in"),
    ):
        with pytest.raises(SettingsError, match=words):
            train(tmp_path / words[:8], settings(**change))
    for change, words in (
        ({"average_decay": 1.0}, r"average_decay must be in \[0, 1\)"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"mixing": "blend"}, "mixing must be one of"),
        ({"mixing": "mixup", "consistency": 1.0}, "drop one of them"),
    ):
        with pytest.raises(SettingsError, match=words):
            settings(**change)
    model = network()
    model.head = CosineHead(128, 3)
    with pytest.raises(SettingsError, match="needs a linear head, got CosineHead"):
        train(tmp_path / "cosine", settings(head_correction="lws"), model=model)


# ---- several processes


PROGRAM = """
import os, sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from test_train_options import one_or_several
one_or_several(sys.argv[1] + os.environ["RANK"], int(sys.argv[2]))
torch.distributed.destroy_process_group()
"""


HOW = [
    # 36 images in batches of 5: the last batch of an epoch has one image, so one of two processes has none.
    {"batch_size": 5, "mixing": "cutmix", "mixing_probability": 0.5, "accumulate": 2, "average_decay": 0.8},
    {"batch_size": 5, "consistency": 0.5, "worst_of": 2, "stage_source": "balanced"},
]


def one_or_several(path, number):
    model, data = plain(), digits()
    loss = build_loss("cross_entropy", counts=data.counts, weights="inverse")
    train(path, settings(epochs=3, **HOW[number]), model=model, data=data, loss=loss, stage=stage(0.5))
    rows = Run(path, kind="train", resume=True).metrics()
    torch.save({"model": model.state_dict(), "loss": [row["loss"] for row in rows]}, path + ".pt")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(HOW)))
def test_two_processes_train_as_one(number, tmp_path):
    one_or_several(str(tmp_path / "one"), number)
    program = textwrap.dedent(PROGRAM).format(paths=[os.path.dirname(__file__)])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    common["MASTER_PORT"] = str(20000 + (os.getpid() * 3 + number) % 20000)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "rank"), str(number)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    one, *ranks = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "rank0", "rank1")]
    assert one["loss"] == pytest.approx(ranks[0]["loss"], rel=1e-4)
    for rank in ranks:
        for name, value in one["model"].items():
            torch.testing.assert_close(rank["model"][name], value, atol=1e-5, rtol=1e-4)


# ---- the stage's own source


@pytest.mark.parametrize("source", ["batch", "balanced"])
def test_the_stage_takes_its_rows_from_the_source_row_for_row(source, tmp_path):
    data = digits()
    dark = replace(data, images=data.images // 2)
    how = settings(epochs=1, stage_source=source)
    always = TailAugment(Identity(), torch.ones(3))
    plainly = batches(tmp_path / "plain", how, data=data, stage=always).at(0)
    given = batches(tmp_path / "given", how, data=data, stage=always, stage_source=dark).at(0)
    assert torch.equal(given.labels, plainly.labels)
    expected = (plainly.images * 255).round().to(torch.uint8) // 2
    assert torch.equal((given.images * 255).round().to(torch.uint8), expected)


def test_plain_augmentation_acts_on_the_source_too(tmp_path):
    how = settings(epochs=1, stage_source="balanced")
    common = {"stage": TailAugment(Identity(), torch.ones(3))}
    plainly = batches(tmp_path / "plain", how, **common).at(0)
    moved = batches(tmp_path / "moved", how, augmentation=Background(256), **common).at(0)
    assert torch.equal(plainly.labels, moved.labels)
    empty = plainly.images == 0
    assert float(moved.images[empty].mean()) > 0.2
    assert torch.equal(moved.images[~empty], plainly.images[~empty])


@pytest.mark.parametrize("source", ["batch", "balanced"])
def test_the_stage_sees_stored_images_and_plain_augmentation_comes_after_it(source, tmp_path):
    seen, data = [], digits()

    class Seeing(Identity):
        def apply(self, images, draw):
            seen.append(images.clone())
            return images

    how = settings(epochs=1, stage_source=source, consistency=1.0)
    given = batches(tmp_path, how, data=data, stage=TailAugment(Seeing(), torch.ones(3)), augmentation=Background(256))
    batch = given.at(0)
    stored = {image.numpy().tobytes() for image in data.float_images()}
    assert {image.numpy().tobytes() for image in seen[0]} <= stored
    assert not {image.numpy().tobytes() for image in batch.images} & stored, "every row was augmented"
    assert torch.equal(batch.clean, batch.images), "both sides of consistency under the same augmentation"


def test_the_log_says_how_rows_were_drawn_and_how_many_the_stage_worked_on(tmp_path):
    how = settings(epochs=4, sampling="delayed", second_phase=2, stage_from="second_phase", stage_source="balanced")
    with pytest.raises(Interrupted):
        train(tmp_path / "halted", how, stage=stage(), evaluate=interrupt_at(2))
    train(tmp_path / "halted", how, stage=stage(), resume=True)
    train(tmp_path / "whole", how, stage=stage())
    lines = [Run(tmp_path / name, kind="train", resume=True).metrics() for name in ("whole", "halted")]
    shown = [(line["sampling"], line["staged_rows"]) for line in lines[0]]
    assert [rule for rule, _ in shown] == ["instance", "instance", "class_balanced", "class_balanced"]
    given = batches(tmp_path / "again", how, stage=stage())
    expected = [0] * 4
    for step in range(4 * given.per_epoch):
        labels = given.labels[given.balanced.indices(step)]
        if step >= 2 * given.per_epoch:
            gate = given._draw_gates((len(labels), 1, 16, 16), labels, given.run.generator("train", step))[0]
            expected[step // given.per_epoch] += int(gate.rows.sum())
    assert [rows for _, rows in shown] == expected
    assert min(expected[2:]) > 0
    assert [line["staged_rows"] for line in lines[1]][-2:] == expected[-2:]


def test_an_epoch_of_so_many_images(tmp_path):
    how, data = settings(epochs=2, epoch_images=50), digits()
    given = batches(tmp_path, how, data=data)
    assert given.per_epoch == 7
    rows = torch.cat([given.rows.indices(step) for step in range(7)])
    assert len(rows) == 50
    assert torch.bincount(rows, minlength=len(data)).min() >= 1, "no image twice before each came once"
    assert given.rows.expected_uses([0]).sum() == pytest.approx(50)


def test_a_source_of_another_size_is_refused(tmp_path):
    short = digits().subset(torch.arange(5))
    with pytest.raises(SettingsError, match="row for row"):
        batches(tmp_path, settings(), stage=stage(), stage_source=short)
