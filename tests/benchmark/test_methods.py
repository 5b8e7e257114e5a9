"""Methods by name: every file builds, is what the command line composes, and trains; the comparison resumes."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gen_invariance.benchmark import methods as module
from gen_invariance.benchmark.methods import (
    Comparison,
    build_method,
    in_order,
    read_method,
    run_comparison,
    stage_table,
    with_stage,
)
from gen_invariance.benchmark.transferring import SCRATCH, UNTOUCHED, TransferComparison, effects, run_transfer
from gen_invariance.classifier.train import TrainSettings
from gen_invariance.cli.help import config_folder
from gen_invariance.data.readers.registry import load_source
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.build import ClassifierSettings, StageSettings, build_losses, build_model
from gen_invariance.experiment.task import Task, prepare

FOLDER = config_folder() / "method"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "none")
TASK = Task(
    source="digits", largest=24, imbalance=6, rest_is_test=True, nuisance="rotation", many_above=12, few_below=8
)
STAGE = StageSettings("translator", "hard_cutoff", {"cutoff": 12})


def quick(epochs=2):
    return TrainSettings(epochs=epochs, batch_size=32, learning_rate=0.02, schedule="cosine", warmup=0, second_phase=1)


def test_the_names_people_use_are_there():
    wanted = """ce ce_drs ce_drw class_balanced square_root progressive effective_number focal ldam ldam_drw
    balanced_softmax logit_adjustment logit_adjustment_posthoc vector_scaling mixup remix cutmix cmo crt tau_norm lws
    randaugment trivialaugment"""
    assert set(wanted.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_what_the_command_line_composes(name):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        composed = OmegaConf.to_container(compose("train", overrides=[f"method={name}"]))
    own = read_method(name, FOLDER)
    assert own["training"]
    assert composed["augmentation"] == own["augmentation"]
    for group in ("classifier", "training"):
        assert {key: composed[group][key] for key in own[group]} == own[group]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_differs_from_plain_cross_entropy(name):
    plain = build_method("ce", FOLDER, training=quick(), classifier=ClassifierSettings("small_conv"))
    method = build_method(name, FOLDER, training=quick(), classifier=ClassifierSettings("small_conv"))
    same = (method.training, method.classifier, method.augmentation) == (
        plain.training, plain.classifier, plain.augmentation)  # fmt: skip
    assert same == (name == "ce")
    prepared = prepare(TASK, seed=0)
    first, second = build_losses(method.classifier, prepared.train)
    logits = build_model(method.classifier, prepared.train, seed=0)(prepared.train.float_images(torch.arange(4)))
    assert torch.isfinite(first(logits, prepared.train.labels[:4]))
    assert (second is not None) == name.endswith("drw")


def test_unknown_methods_and_settings_are_named(tmp_path):
    with pytest.raises(SettingsError, match=r"no method 'ldma'; choose balanced_softmax, ce"):
        read_method("ldma", FOLDER)
    (tmp_path / "odd.yaml").write_text("training: {sampel: instance}")
    with pytest.raises(SettingsError, match="method odd: training has no setting 'sampel'"):
        build_method("odd", tmp_path, training=quick(), classifier=ClassifierSettings())


def test_arms_with_and_without_the_stage():
    arms = with_stage(["ce", "ce_drs"], FOLDER, stage=STAGE, reference="ce_drs", training=quick(),
                      classifier=ClassifierSettings("small_conv"))  # fmt: skip
    assert [arm.name for arm in arms] == ["ce", "ce + stage", "ce_drs", "ce_drs + stage", "ce_drs + true nuisance"]
    assert [arm.translator for arm in arms] == [None, "spatial", None, "spatial", None]


def test_a_comparison_measures_what_is_missing(tmp_path, monkeypatch):
    calls = []
    real = module.run_cell
    monkeypatch.setattr(module, "run_cell", lambda *a, **k: calls.append(a[2].name) or real(*a, **k))

    def comparison(names):
        arms = with_stage(names, FOLDER, stage=STAGE, training=quick(), classifier=ClassifierSettings("small_conv"))
        return Comparison(TASK, arms, seeds=1, draws=1, fit_steps=2)

    lines = []
    run_comparison(comparison(["lws"]), tmp_path, say=lines.append)
    assert calls == ["lws", "lws + stage"]
    assert len(lines) == 2
    both = comparison(["randaugment", "lws"])
    frame = in_order(run_comparison(both, tmp_path), both.methods)
    assert calls[2:] == ["randaugment", "randaugment + stage"]
    assert list(dict.fromkeys(frame["method"])) == ["randaugment", "randaugment + stage", "lws", "lws + stage"]
    values = frame[frame["metric"] == "balanced_accuracy"]["value"]
    assert len(values) == 4
    lines = stage_table(frame).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["randaugment", "lws"]
    plain, staged = (100 * values.iloc[number] for number in (0, 1))
    assert lines[2].split("|")[2].strip() == f"{plain:.1f} → {staged:.1f}"
    assert values.between(0, 1).all()


def test_transfer_modes_on_digits(tmp_path):
    data = load_source("digits", None, image_size=None).train
    half = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).chunk(2)
    comparison = TransferComparison(
        "digits",
        source_classes=6,
        source_images=40,
        target_images=(5,),
        test_images=20,
        source_epochs=6,
        steps=30,
        seeds=2,
    )
    frame = run_transfer(comparison, data.subset(half[0]), data.subset(half[1]), tmp_path)
    totals = frame[frame["metric"] == "balanced_accuracy"]
    assert set(totals["method"]) == {SCRATCH, UNTOUCHED, "frozen", "partial", "full", "joint", "auto"}
    assert totals.groupby("method")["value"].mean().drop(SCRATCH).min() > 0.4  # four classes: 0.25 by chance
    by_class = frame[(frame["metric"] == "accuracy") & (frame["method"] == "full")]
    for seed, part in by_class.groupby("seed"):
        whole = totals[(totals["method"] == "full") & (totals["seed"] == seed)]["value"].item()
        assert np.mean(part["value"]) == pytest.approx(whole)
    table = effects(frame, [SCRATCH, UNTOUCHED])
    assert set(table["against"]) == {SCRATCH, UNTOUCHED, "better of both"}
    assert (table[["helps", "harms", "undecided"]].sum(axis=1) == 4).all()
