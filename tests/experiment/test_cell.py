"""Benchmark cells: the stage a method asks for, and records that say what was measured on what."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import slow_accuracy, slow_invariance

from gen_invariance.augment.policy import auto, hard_cutoff
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.data.longtail import long_tailed_indices
from gen_invariance.errors import SettingsError
from gen_invariance.experiment import cell as module
from gen_invariance.experiment import train as train_module
from gen_invariance.experiment.build import build_model, build_stage, select_stage_source
from gen_invariance.experiment.cell import CellInputs, Method, cell_digest, cell_settings, run_cell
from gen_invariance.experiment.settings import ClassifierSettings, MeasureSettings, StageSettings, Task
from gen_invariance.experiment.task import prepare
from gen_invariance.nuisance.build import build_augmentation
from gen_invariance.nuisance.compose import Compose, Identity
from gen_invariance.nuisance.generic import RandAugment, TrivialAugment
from gen_invariance.nuisance.geometry import CropFlip
from gen_invariance.nuisance.intensity import Lighting
from gen_invariance.run import Run, named_generator

TASK = Task(
    nuisance="rotation",
    nuisance_options={"degrees": 60},
    largest=30,
    imbalance=10.0,
    rest_is_test=True,
    many_above=20,
    few_below=8,
)
TRAINING = TrainSettings(epochs=2, batch_size=32, learning_rate=0.02, warmup=0, milestones=(1, 2))
CLASSIFIER = ClassifierSettings(backbone="small_conv")
MEASURE = MeasureSettings(draws=2, invariance_images=None)
ONE_DRAW = MeasureSettings(draws=1, invariance_images=None)


@pytest.fixture(scope="module")
def prepared():
    whole = prepare(TASK, seed=0)
    few = torch.arange(0, len(whole.test), 15)  # few test images, for the slow oracle
    split = replace(whole.split, test=whole.split.test.subset(few))
    return replace(whole, test=whole.test.subset(few), split=split)


def method(name="drs", nuisance="true", **changes):
    return Method(
        **{"name": name, "stage": StageSettings(nuisance), "training": TRAINING, "classifier": CLASSIFIER, **changes}
    )


@pytest.fixture(scope="module")
def cell(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells") / "drs"
    return folder, run_cell(
        TASK, method(), CellInputs(prepared, fit_seconds=1.5), seed=0, folder=folder, measure=MEASURE
    )


# ---- stages


def test_no_stage(prepared):
    assert build_stage(StageSettings("none"), prepared) is None


def test_the_stage_gives_what_was_asked_for(prepared):
    fitted = Lighting()
    expected = {
        "identity": Identity,
        "true": type(prepared.nuisance),
        "translator": Lighting,
        "randaugment": RandAugment,
        "trivialaugment": TrivialAugment,
    }
    for name, kind in expected.items():
        stage = build_stage(StageSettings(name), prepared, translator=fitted)
        assert isinstance(stage.nuisance, kind), name
        torch.testing.assert_close(stage.probability, auto(prepared.train.counts))
    assert build_stage(StageSettings("translator"), prepared, translator=fitted).nuisance is fitted
    assert build_stage(StageSettings("true"), prepared).nuisance is prepared.nuisance


def test_several_are_composed_in_their_order(prepared):
    stage = build_stage(StageSettings("translator + randaugment"), prepared, translator=Lighting())
    assert isinstance(stage.nuisance, Compose)
    assert [type(part) for part in stage.nuisance.nuisances] == [Lighting, RandAugment]


def test_the_policy_is_built_from_training_counts(prepared):
    settings = StageSettings("true", policy="hard_cutoff", policy_options={"cutoff": 10, "probability": 0.25})
    table = build_stage(settings, prepared).probability
    assert torch.equal(table, hard_cutoff(prepared.train.counts, cutoff=10, probability=0.25))
    assert 0 < (table > 0).sum() < len(table)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (StageSettings("translator"), "needs stage.translator"),
        (StageSettings("rotating"), "unknown nuisance 'rotating'"),
        (StageSettings("rotation", nuisance_options={"rotation": {"degree": 3}}), "rotation has no option 'degree'"),
        (StageSettings("true+munit"), "unknown nuisance 'munit'"),
        (StageSettings("true", policy="ramp"), "unknown policy 'ramp'"),
        (StageSettings("true", policy_options={"maximun": 1}), "maximun"),
    ],
)
def test_bad_stages_are_named(settings, message, prepared):
    with pytest.raises(SettingsError, match=message):
        build_stage(settings, prepared)


def test_plain_augmentation():
    assert build_augmentation("none", flip=True) is None
    assert isinstance(build_augmentation("crop_flip", flip=True), CropFlip)
    assert build_augmentation("crop_flip", flip=True).flip
    assert not build_augmentation("crop_flip", flip=False).flip
    options = {"crop_flip": {"padding": 2}, "other": {"x": 1}}
    both = build_augmentation("crop_flip+rotation", flip=False, options=options)
    crop = both.nuisances[0]
    assert (crop.padding, crop.flip) == (2, False)
    with pytest.raises(SettingsError, match="unknown nuisance 'crop'"):
        build_augmentation("crop", flip=True)


# ---- models


def test_the_model_normalises_by_the_training_images_and_follows_its_seed(prepared):
    model = build_model(CLASSIFIER, prepared.train, seed=1)
    pixels = prepared.train.float_images()
    torch.testing.assert_close(model.mean, pixels.mean((0, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.std, pixels.std((0, 2, 3)), atol=1e-4, rtol=0)
    twin, other = (build_model(CLASSIFIER, prepared.train, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(value, twin[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.state_dict()["head.weight"], other["head.weight"])


# ---- cells


def values(records, metric):
    return {record.class_index: record.value for record in records if record.metric == metric}


def test_records_are_what_the_loops_measure(cell, prepared):
    folder, records = cell
    model = build_model(CLASSIFIER, prepared.train, seed=0).eval()
    model.load_state_dict(
        Run(folder, kind="train", config=cell_settings(TASK, method()), resume=True).load_latest()["model"]
    )
    images, labels = prepared.test.float_images(), prepared.test.labels
    with torch.no_grad():
        accuracy, _ = slow_accuracy(model(images), labels, 10)
    ekld, agreement, _ = slow_invariance(
        model,
        images,
        labels,
        prepared.nuisance,
        originals=prepared.split.test.float_images(),
        num_classes=10,
        draws=2,
        generator=named_generator(0, "evaluation"),
    )
    for metric, expected in {"accuracy": accuracy, "ekld": ekld, "agreement": agreement}.items():
        found = values(records, metric)
        assert list(found) == list(range(10))
        assert list(found.values()) == pytest.approx(expected, abs=1e-4, nan_ok=True), metric

    few = [label for label, count in enumerate(prepared.train.counts.tolist()) if count < 8]
    assert 0 < len(few) < 10
    assert values(records, "balanced_accuracy")[None] == pytest.approx(sum(accuracy) / 10)
    assert values(records, "few_accuracy")[None] == pytest.approx(sum(accuracy[label] for label in few) / len(few))
    assert values(records, "mean_ekld")[None] == pytest.approx(sum(ekld) / 10, abs=1e-4)
    assert values(records, "few_ekld")[None] == pytest.approx(sum(ekld[label] for label in few) / len(few), abs=1e-4)


def test_nothing_is_said_of_invariance_under_the_identity_nor_of_groups_without_classes(tmp_path):
    """Under the identity every model has eKLD 0, which is no finding; a mean over no class is no figure."""
    level = {"profile": "step", "imbalance": 1, "largest": 15, "few_below": 1}  # classes of one size: none is small
    task = replace(TASK, nuisance="identity", nuisance_options={}, many_above=10, **level)
    whole = prepare(task, seed=0)
    upright = method(nuisance="none")
    records = run_cell(
        task, upright, CellInputs(whole, learned=Lighting()), seed=0, folder=tmp_path / "a", measure=ONE_DRAW
    )
    totals = {"balanced_accuracy", "many_accuracy", "mean_learned_ekld", "train_seconds"}
    assert {record.metric for record in records} == totals | {"accuracy", "learned_ekld"}
    assert not any(math.isnan(record.value) for record in records)


def test_more_real_images_for_as_many_steps(tmp_path, monkeypatch):
    """The oracle of photos trains on the filled set, for the steps of the cut, and is recorded beside the cut."""
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for part, each in (("train", 24), ("test", 6)):
        arrays[f"{part}_images"] = torch.randint(256, (3 * each, 8, 8), generator=generator, dtype=torch.uint8).numpy()
        arrays[f"{part}_labels"] = torch.arange(3).repeat_interleave(each).numpy()
    np.savez(tmp_path / "set.npz", **arrays)
    task = Task(source="npz", path=str(tmp_path / "set.npz"), largest=20, imbalance=5.0)
    cut, filled = prepare(task, seed=0), prepare(replace(task, fill_tail=True), seed=0)
    assert (cut.train.counts.sum(), filled.train.counts.tolist()) == (32, [20, 20, 20])
    assert set(cut.split.train_indices.tolist()) < set(filled.split.train_indices.tolist())
    assert cut.test.digest == filled.test.digest
    arm = method(nuisance="none", more_real=True, training=replace(TRAINING, epochs=3))
    trained, fit = [], train_module.fit_classifier
    monkeypatch.setattr(
        train_module, "fit_classifier", lambda model, train, how, **more: trained.append((len(train), how.epoch_images))
        or fit(model, train, how, **more),
    )  # fmt: skip
    records = run_cell(task, arm, CellInputs(cut, filled), seed=0, folder=tmp_path / "run", measure=ONE_DRAW)
    assert trained == [(60, 32)], "an epoch draws as many images as on the cut"
    assert {record.data_digest for record in records} == {cut.train.digest}, "so that it pairs with the other arms"
    assert {r.class_count for r in records if r.class_index is not None} == set(cut.train.counts.tolist())
    plain = run_cell(
        task, replace(arm, more_real=False), CellInputs(cut), seed=0, folder=tmp_path / "plain", measure=ONE_DRAW
    )
    assert values(plain, "accuracy") != values(records, "accuracy")


def test_records_say_where_they_come_from(cell, prepared):
    _, records = cell
    assert {record.benchmark for record in records} == {"digits-rotation"}
    assert {(record.method, record.seed) for record in records} == {("drs", 0)}
    assert {record.config_digest for record in records} == {cell_digest(TASK, method(), draws=2)}
    assert {record.data_digest for record in records} == {prepared.train.digest}
    assert values(records, "fit_seconds") == {None: 1.5}
    assert values(records, "train_seconds")[None] > 0
    counts = prepared.train.counts.tolist()
    for record in records:
        assert "torch" in record.versions
        if record.class_index is None:
            continue
        assert record.class_count == counts[record.class_index]
        assert record.class_name == prepared.train.class_names[record.class_index]
        expected = "many" if record.class_count > 20 else "few" if record.class_count < 8 else "medium"
        assert record.group == expected


def test_a_cell_is_a_function_of_its_settings_and_can_be_run_again(cell, prepared, tmp_path):
    folder, records = cell
    fresh = run_cell(TASK, method(), CellInputs(prepared), seed=0, folder=tmp_path / "fresh", measure=MEASURE)
    again = run_cell(TASK, method(), CellInputs(prepared), seed=0, folder=folder, measure=MEASURE)
    other = run_cell(TASK, method(), CellInputs(prepared), seed=1, folder=tmp_path / "other", measure=MEASURE)
    for metric in ("accuracy", "ekld", "agreement"):
        assert values(fresh, metric) == pytest.approx(values(records, metric), nan_ok=True)
        assert values(again, metric) == pytest.approx(values(records, metric), nan_ok=True)
    assert values(other, "ekld") != values(records, "ekld")
    assert not any(math.isnan(value) for value in values(fresh, "accuracy").values())


def test_digests_tell_settings_apart_but_not_seeds():
    arms = [
        (TASK, method(), 2),
        (TASK, method(), 3),
        (TASK, method(name="other"), 2),
        (TASK, method(nuisance="identity"), 2),
        (TASK, method(training=TrainSettings(epochs=3)), 2),
        (TASK, method(classifier=ClassifierSettings("small_conv", loss="balanced_softmax")), 2),
        (Task(nuisance="rotation"), method(), 2),
    ]
    assert len({cell_digest(task, arm, draws=draws) for task, arm, draws in arms}) == len(arms)
    assert cell_digest(TASK, method(), draws=2) == cell_digest(TASK, method(), draws=2)


def test_how_often_to_look_and_where_data_lie_do_not_make_another_cell():
    looks = replace(TRAINING, log_every=7, checkpoint_every=1)
    assert cell_digest(TASK, method(training=looks), draws=2) == cell_digest(TASK, method(), draws=2)
    here, there = (Task(source="npz", path=f"{folder}/letters.npz") for folder in ("/a", "/b/c"))
    assert cell_digest(here, method(), draws=2) == cell_digest(there, method(), draws=2)
    other = Task(source="npz", path="/a/digits.npz")
    assert cell_digest(here, method(), draws=2) != cell_digest(other, method(), draws=2)
    assert cell_digest(here, method(), draws=2) != cell_digest(here, method(), draws=2, fit={"steps": 3})


def test_fewer_images_and_a_learned_nuisance(cell, prepared):
    """eKLD on two images a class is the oracle's on those images; identity as the learned nuisance is 0."""
    folder, records = cell
    again = run_cell(
        TASK, method(), CellInputs(prepared, learned=Identity()), seed=0, folder=folder,
        measure=MeasureSettings(draws=2, invariance_images=2), benchmark="mine", order=4, config_digest="dd",
    )  # fmt: skip
    assert {(record.benchmark, record.order, record.config_digest) for record in again} == {("mine", 4, "dd")}
    assert set(values(again, "learned_ekld").values()) == {0.0}
    assert values(again, "mean_learned_ekld") == {None: 0.0}
    assert values(again, "accuracy") == values(records, "accuracy")
    generator = named_generator(0, "evaluation", "images")
    rows = long_tailed_indices(prepared.test.labels, prepared.test.counts.clamp(max=2), generator=generator)
    model = build_model(CLASSIFIER, prepared.train, seed=0).eval()
    run = Run(folder, kind="train", config=cell_settings(TASK, method()), resume=True)
    model.load_state_dict(run.load_latest()["model"])
    expected, _, _ = slow_invariance(
        model, prepared.test.float_images(rows), prepared.test.labels[rows], prepared.nuisance,
        originals=prepared.split.test.float_images(rows), num_classes=10, draws=2,
        generator=named_generator(0, "evaluation"),
    )  # fmt: skip
    assert list(values(again, "ekld").values()) == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_images_that_stand_for_all_and_the_plan_know_groups(prepared, monkeypatch):
    groups = prepared.test.labels.clone()  # one group a class, and one image of another
    alone = torch.stack([(groups == label).nonzero()[-1, 0] for label in range(10)])
    groups[alone] += 100
    rows = module._select_some_of_each(replace(prepared.test, groups=groups), 2)
    assert set(alone.tolist()) <= set(rows.tolist())
    given = {}
    monkeypatch.setattr(
        train_module, "measure_similarity", lambda features, labels, *, groups: given.update(groups=groups) or 0.5
    )
    train = replace(prepared.train, groups=torch.arange(len(prepared.train)))
    train_module.resolve_plan(TransferPlan("auto"), build_model(CLASSIFIER, train, seed=0), train)
    assert torch.equal(given["groups"], train.groups)


def test_a_folder_of_another_arm_is_refused(cell, prepared):
    folder, _ = cell
    with pytest.raises(SettingsError, match="settings differ"):
        run_cell(TASK, method(nuisance="identity"), CellInputs(prepared), seed=0, folder=folder, measure=MEASURE)


def test_only_the_oracle_takes_the_images_before_they_met_the_nuisance(prepared):
    assert select_stage_source(StageSettings("translator+randaugment"), prepared) is None
    assert select_stage_source(StageSettings("none"), prepared) is None
    source = select_stage_source(StageSettings("true+randaugment"), prepared)
    assert torch.equal(source.images, prepared.split.train.images)
    assert not torch.equal(source.images, prepared.train.images)
