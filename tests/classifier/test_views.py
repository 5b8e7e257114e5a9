"""Heads on stored features of augmented views: what is stored and refused, spread, first and best weights, AdamW."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.model import cache_features
from gen_invariance.classifier.optimizer import build_optimizer
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.classifier.views import FeatureSpread, ViewBatches, describe_nuisance, start_at_class_means
from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.geometry import CropFlip
from gen_invariance.run import Run, named_generator

FROZEN = TransferPlan("frozen")
SETTINGS = TrainSettings(epochs=3, batch_size=8, warmup=0, schedule="cosine", views=2, optimizer="adamw",
                         learning_rate=0.01)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gen_invariance" / "features"


@pytest.fixture
def data():
    labels = torch.tensor([0] * 12 + [1] * 6 + [2] * 2)
    pixels = torch.randint(0, 256, (20, 1, 12, 12), generator=named_generator(0, "pixels"), dtype=torch.uint8)
    return ImageData(pixels, labels, ("a", "b", "c"))


def build(head="linear"):
    model = build_classifier("small_conv", num_classes=3, channels=1, head=head)
    FROZEN.apply(model.eval())
    return model


def fit(data, settings=SETTINGS, *, out=None, resume=False, **options):
    return fit_classifier(
        build(), data, settings, plan=FROZEN, augmentation=CropFlip(), out=out, resume=resume, progress=False, **options
    )


def test_views_are_features_of_augmented_images_and_are_kept(data, cache):
    model, run = build(), Run(None, kind="train", seed=3)
    batches = ViewBatches(model, data, SETTINGS, run, augmentation=CropFlip())
    augmentation = CropFlip()
    for view in range(2):
        draw = augmentation.sample(data.images.shape, generator=named_generator(3, "views", view, 0))
        expected = cache_features(model, augmentation.apply(data.float_images(), draw))
        assert torch.allclose(batches.features[view].float(), expected, rtol=2e-3, atol=1e-3)
    (file,) = cache.iterdir()
    stamp = file.stat().st_mtime_ns
    assert torch.equal(ViewBatches(model, data, SETTINGS, run, augmentation=CropFlip()).features, batches.features)
    assert file.stat().st_mtime_ns == stamp  # nothing was computed again
    file.write_bytes(b"damaged")
    assert torch.equal(ViewBatches(model, data, SETTINGS, run, augmentation=CropFlip()).features, batches.features)


def test_what_decides_the_views_is_in_their_digest(data):
    def digest(*, model=None, images=data, settings=SETTINGS, seed=0, augmentation=None):
        run = Run(None, kind="train", seed=seed)
        return ViewBatches(model or build(), images, settings, run, augmentation=augmentation)._digest()

    other = build()
    with torch.no_grad():
        other.backbone.conv1[0].weight[0] += 1
    larger = build()
    larger.input_size = 24
    digests = [
        digest(),
        digest(model=other),
        digest(model=larger),
        digest(images=data.subset(torch.arange(19))),
        digest(settings=TrainSettings(views=3)),
        digest(seed=1),
        digest(augmentation=CropFlip()),
        digest(augmentation=CropFlip(flip=False)),
    ]
    assert len(set(digests)) == len(digests)
    head = build()
    nn.init.zeros_(head.head.weight)
    same = [digest(model=head), digest(settings=TrainSettings(views=2, epochs=9, sampling="class_balanced"))]
    assert set(same) == {digests[0]}
    assert describe_nuisance(CropFlip()) == describe_nuisance(CropFlip())


def test_training_on_views_trains_the_head_alone_and_resumes_to_the_same(data, tmp_path):
    before, whole = build().state_dict(), fit(data, out=tmp_path / "whole")
    after = whole.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone."))
    assert not torch.equal(before["head.weight"], after["head.weight"])
    short = TrainSettings(**{**vars(SETTINGS), "checkpoint_every": 1})

    class Stop(Exception):
        pass

    calls = []

    def stop_second(model):
        calls.append(1)
        if len(calls) == 2:
            raise Stop
        return {}

    with pytest.raises(Stop):
        fit(data, short, out=tmp_path / "cut", evaluate=stop_second)
    resumed = fit(data, short, out=tmp_path / "cut", resume=True)
    assert torch.equal(resumed.head.weight, whole.head.weight)


def test_spread_moves_small_classes_by_differences_within_larger_ones(data, generator):
    views = torch.randn(2, 20, 4, generator=generator)
    spread = FeatureSpread(data, 1.0)
    assert spread.givers.tolist() == [0, 1]  # the median of 12, 6, 2
    labels = torch.tensor([0, 2] * 500)
    draws = spread.sample(1000, generator=generator)
    moved = spread.apply(torch.zeros(1000, 4), labels, draws, views)
    assert (moved[labels == 0] == 0).all()
    assert 0.75 < float((moved[labels == 2] != 0).any(1).double().mean()) < 0.9  # 1 - 2 / 12
    means = torch.stack([views[:, data.labels == label].flatten(0, 1).mean(0) for label in range(3)])
    allowed = torch.cat([(view[data.labels < 2] - means[data.labels[data.labels < 2]]) for view in views])
    for row in moved[labels == 2][:50]:
        assert (row == 0).all() or float((allowed - row).abs().amax(1).min()) < 1e-5
    # A mean of differences within a class is zero: the class means stay where they are.
    assert float(moved[labels == 2].mean(0).abs().max()) < 0.25


def test_a_cosine_head_starts_at_the_class_means(data):
    model = build("cosine")
    start_at_class_means(model, data)
    features = F.normalize(cache_features(model, data.images), dim=1)
    for label in range(3):
        mean = features[data.labels == label].mean(0)
        assert torch.allclose(model.head.weight[label], mean / mean.norm(), atol=1e-5)
    with pytest.raises(SettingsError, match=r"classifier\.head=cosine"):
        start_at_class_means(build(), data)


def test_the_best_epoch_is_kept_and_survives_a_stop(data, tmp_path):
    scores, seen = iter([0.2, 0.9, 0.3, 0.3, 0.1]), []

    def evaluate(model):
        seen.append(model.head.weight.detach().clone())
        return {"balanced_accuracy": next(scores)}

    settings = TrainSettings(**{**vars(SETTINGS), "keep": "best"})
    model = fit(data, settings, out=tmp_path / "run", evaluate=evaluate)
    assert torch.equal(model.head.weight, seen[1])
    again = fit(data, settings, out=tmp_path / "run", resume=True, evaluate=evaluate)
    assert torch.equal(again.head.weight, seen[1])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["balanced_accuracy"] for row in rows] == [0.2, 0.9, 0.3]
    with pytest.raises(SettingsError, match=r"data\.validation_fraction"):
        fit(data, settings)


BAD = {
    "mode": ({}, TransferPlan("full"), "use transfer=frozen, got full"),
    "mixing": ({"mixing": "cutmix"}, FROZEN, "training.mixing acts on images"),
    "bank": ({"stage_source": "balanced"}, FROZEN, "stage_source=balanced acts on images"),
    "spread": ({"views": 0, "spread": 1.0}, FROZEN, "training.spread moves stored features"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_stored_features_cannot_do(name, data):
    changes, plan, message = BAD[name]
    settings = TrainSettings(**{**vars(SETTINGS), **changes})
    with pytest.raises(SettingsError, match=message):
        fit_classifier(build(), data, settings, plan=plan, progress=False)


def test_adamw_takes_the_rate_of_the_settings_and_keeps_those_of_groups():
    model = build_classifier("small_conv", num_classes=3, channels=1)
    settings = TrainSettings(optimizer="adamw", learning_rate=0.002, momentum=0.8)
    plan = TransferPlan("full", backbone_lr_scale=0.1, layer_decay=0.5)
    optimizer = build_optimizer(model, settings, plan)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.8, 0.999)
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates["head"] == 0.002
    assert rates["conv4"] == pytest.approx(0.002 * 0.1 * 0.5)
    assert rates["conv1"] == pytest.approx(0.002 * 0.1 * 0.5**4)
    sgd = build_optimizer(model, TrainSettings(), TransferPlan("full"))
    assert sgd.param_groups[-1]["initial_lr"] == 0.1  # as before there was AdamW
    named = build_optimizer(model, settings, TransferPlan("frozen", lr=0.5))
    assert named.param_groups[-1]["initial_lr"] == 0.5


def test_settings_and_plans_of_before_have_the_identity_of_before():
    assert not {"optimizer", "views", "spread", "head_start", "keep"} & set(TrainSettings().identity())
    assert TrainSettings(views=2).identity()["views"] == 2
    assert TransferPlan("full").identity()["lr"] == 0.1


@pytest.mark.parametrize(
    ("counts", "similarity", "mode", "words"),
    [
        ((400, 300, 60, 46, 40, 5), 0.9, "frozen", "a median of 53 images a class, the smallest 5"),
        ((60, 45, 30), 0.9, "frozen", "a small and similar target"),
        ((900, 800, 700), 0.9, "full", "a large target"),
        ((900, 800, 19), 0.9, "frozen", "1 of 3 classes have fewer than 20"),
        ((400, 300, 5), 0.2, "partial", "a distant target"),
        ((300, 200, 100), 0.9, "partial", "the last half trains"),
    ],
)
def test_auto_counts_the_tail(counts, similarity, mode, words):
    model = build_classifier("small_conv", num_classes=len(counts), channels=1)
    plan = TransferPlan("auto").resolve(model, num_images=sum(counts), similarity=similarity, counts=counts)
    assert plan.mode == mode
    assert words in plan.reason
