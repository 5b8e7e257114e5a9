"""Benchmarks and arms by name: every one builds, published sizes, what names mean, what is refused; the list."""

import hashlib
import re

import pytest
import torch

from gen_invariance import configs
from gen_invariance.augment.policy import policy
from gen_invariance.benchmark.arms import METHOD_SETS, PAPER, arm_names, read_arm
from gen_invariance.benchmark.listing import (
    count_training_images,
    estimate_fit_seconds,
    estimate_seconds,
    format_list,
)
from gen_invariance.benchmark.registry import (
    benchmark_names,
    read_benchmark,
    read_every_benchmark,
)
from gen_invariance.benchmark.run import parse_numbers, parse_shard
from gen_invariance.data.split import compute_class_sizes
from gen_invariance.errors import CheckpointError, SettingsError
from gen_invariance.experiment.settings import StageSettings
from gen_invariance.experiment.task import prepare
from gen_invariance.nuisance.build import build_augmentation, build_nuisance
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.settings import read_settings
from gen_invariance.translator.settings import FitSettings
from gen_invariance.translator.spatial import SpatialTranslator

NAMES = benchmark_names()
ALL = {benchmark.name: benchmark for benchmark in read_every_benchmark()}
METHODS = [name for name in configs.choice_names("method") if name != "none"]
TRANSLATORS = [name for name in configs.choice_names("translator") if name != "auto"]


def test_the_benchmarks_of_the_field_are_there():
    nuisances = ("rot", "bg", "dil")
    sets = ("k49", "kmnist", "digits", "emnist_letters", "fashion_mnist", "devanagari", "omniglot")
    wanted = {f"{name}_{nuisance}_{tail}" for name in sets for nuisance in nuisances for tail in ("lt", "theta_lt")}
    wanted |= {f"{name}_{tail}_if{factor}" for name in ("cifar10", "cifar100") for tail in ("lt", "lt_step")
               for factor in (10, 50, 100)}  # fmt: skip
    wanted |= {"gtsrb200_lt", "cifar10cpu_lt", "cifar100cpu_lt"}
    wanted |= {"gtsrb_lt", "tiny_imagenet_lt", "imagenet_lt", "places_lt", "inaturalist2018", "folder"}
    assert wanted <= set(NAMES)
    assert len(NAMES) == len(set(NAMES)) == len(ALL)
    assert tuple(ALL) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_builds(name):
    benchmark = ALL[name]
    assert benchmark.summary
    assert build_nuisance(benchmark.task.nuisance, **benchmark.task.nuisance_options) is not None
    assert build_augmentation(benchmark.augmentation, flip=True) is None or benchmark.augmentation != "none"
    for choice in (None, "munit", "pose"):
        read_settings(FitSettings, {**benchmark.fit, **benchmark.fits.get(choice, {})}, "fit")
    arm = read_arm("ce_drs+spatial", benchmark)
    assert arm.method.training.sampling == "delayed"
    assert arm.method.stage.nuisance == "translator"
    seconds = estimate_seconds(benchmark)
    assert (seconds is None) == (name == "folder")
    assert seconds is None or 1 < seconds < 1e9


def test_fits_on_photographs_take_minutes_and_the_published_one_a_gpu():
    photos = [benchmark for benchmark in ALL.values() if benchmark.task.nuisance == "identity"]
    assert len(photos) > 15
    for benchmark in photos:
        seconds = [estimate_fit_seconds(benchmark, name) for name in ("redraw", "spatial", "flow", "munit_small")]
        assert max(seconds) <= 1200, "ten minutes on two cores"
        assert estimate_fit_seconds(benchmark, "munit") > 3600
        assert benchmark.fits["munit"]["steps"] == 140_000
    assert read_arm("ce+git", ALL["cifar10_lt_if100"]).fit.loop["steps"] == 140_000
    longer = read_benchmark("cifar10cpu_lt", changes={"fit": {"flow": {"steps": 8000}}})
    assert estimate_fit_seconds(longer, "flow") == 10 * estimate_fit_seconds(ALL["cifar10cpu_lt"], "flow")


@pytest.mark.parametrize(("name", "largest", "least"), [("cifar10cpu_lt", 5000, 50), ("cifar100cpu_lt", 500, 5)])
def test_photographs_for_one_core_are_trained_out_in_minutes(name, largest, least):
    benchmark = ALL[name]
    counts = compute_class_sizes(benchmark.task, benchmark.classes, largest=benchmark.task.largest)
    assert (int(counts.max()), int(counts.min()), benchmark.task.shuffle_order) == (largest, least, False)
    steps = benchmark.training.epochs * int(counts.sum()) / benchmark.training.batch_size
    assert 2400 < steps < 2600
    assert estimate_seconds(benchmark) < 600
    assert benchmark.stage == StageSettings(policy="everywhere", policy_options={"probability": 0.5})
    assert benchmark.augmentation == "crop_flip"


PUBLISHED = {
    "k49_rot_lt": 7822, "k49_bg_theta_lt": 7822, "cifar10_lt_if100": 12_406, "cifar10_lt_if50": 13_996,
    "cifar10_lt_if10": 20_431, "cifar100_lt_if100": 10_847, "cifar100_lt_if50": 12_608, "cifar100_lt_if10": 19_573,
    "cifar10_lt_step_if100": 25_250, "tiny_imagenet_lt": 21_549, "imagenet_lt": 115_846, "places_lt": 62_500,
    "inaturalist2018": 437_513,
}  # fmt: skip


@pytest.mark.parametrize(("name", "images"), PUBLISHED.items())
def test_training_sizes_are_the_published_ones(name, images):
    assert count_training_images(ALL[name]) == images


def test_k49_is_the_papers():
    task = ALL["k49_rot_lt"].task
    assert (task.validation_fraction, task.shuffle_order, task.shortage) == (0.2, True, "repeat")
    assert ALL["k49_dil_theta_lt"].task.base_images == 5
    training, net = ALL["k49_bg_lt"].training, ALL["k49_bg_lt"].classifier
    assert (training.epochs, training.batch_size, net.backbone) == (50, 128, "resnet20")
    assert (training.learning_rate, training.momentum, training.weight_decay) == (0.1, 0.9, 2e-4)
    assert (ALL["k49_rot_lt"].measure.draws, ALL["k49_rot_lt"].measure.invariance_images) == (100, 40)
    cifar = ALL["cifar10_lt_if100"]
    points = [(how.warmup_epochs, *how.milestone_epochs, how.second_phase_start) for how in (training, cifar.training)]
    assert points == [(5, 30, 40, 30), (5, 160, 180, 160)]
    assert (cifar.training.epochs, cifar.augmentation) == (200, "crop_flip")
    assert (cifar.classifier.backbone, cifar.task.shuffle_order) == ("resnet32", False)


CHOSEN = {
    ("digits_rot_lt", 0): "bd78097bebae6619",
    ("digits_rot_lt", 1): "2f12583bcb8b036b",
    ("digits_rot_theta_lt", 0): "53a703c93e71117f",
}
PIXELS = {
    ("digits_bg_lt", 0): "5522bb3bfd41b15f5068",
    ("digits_dil_lt", 1): "0657758f8eb9dc36a2db",
    ("digits_bg_theta_lt", 0): "67ec439589c22c4b7cc2",
}


def digest_of(*tensors):
    return hashlib.sha256(b"".join(tensor.numpy().astype("<i8").tobytes() for tensor in tensors)).hexdigest()[:16]


@pytest.mark.parametrize(("name", "order"), CHOSEN)
def test_class_orders_and_chosen_images_stay_the_same(name, order):
    split = prepare(ALL[name].task, seed=order).split
    assert digest_of(split.order, split.train_indices, split.train.labels, split.test_indices) == CHOSEN[name, order]


@pytest.mark.parametrize(("name", "order"), PIXELS)
def test_generated_images_stay_the_same(name, order):
    """Of the nuisances that do not interpolate, whose pixels are the same on every machine."""
    prepared = prepare(ALL[name].task, seed=order)
    assert prepared.train.digest[:16] + prepared.test.digest[:4] == PIXELS[name, order]


def test_five_images_of_each_class_under_a_long_tail_of_draws():
    prepared, images = (prepare(ALL[f"digits_rot_{tail}"].task, seed=0) for tail in ("theta_lt", "lt"))
    assert torch.equal(prepared.train.counts, images.train.counts)
    for label in range(10):
        rows = prepared.train.labels == label
        assert len(prepared.split.train_indices[rows].unique()) == 5
        assert len(prepared.draws["train"]["degrees"][rows].unique()) == int(rows.sum())  # each use a draw of its own
    assert not set(prepared.split.train_indices.tolist()) & set(prepared.split.test_indices.tolist())


def test_arms_by_name():
    benchmark = ALL["digits_rot_lt"]
    arm = read_arm("ldam_drw+munit_small", benchmark)
    assert (arm.name, arm.method.name, arm.method.translator) == ("ldam_drw+munit_small",) * 2 + ("munit_small",)
    assert (arm.fit.name, arm.fit.network["width"], arm.fit.network["style_dim"]) == ("munit", 16, 8)
    assert arm.method.classifier.loss == "ldam"
    assert read_arm("ce+git", benchmark).fit.choice == "munit"
    assert read_arm("ce+pose+randaugment", benchmark).method.stage.nuisance == "translator+randaugment"
    oracle = read_arm("ce_drs+oracle", benchmark)
    assert (oracle.method.stage.nuisance, oracle.fit) == ("true", None)
    assert oracle.method.stage.policy == "hard_cutoff"
    assert read_arm("ce", benchmark).method.stage.nuisance == "none"
    photos = ALL["cifar10_lt_if100"]
    assert read_arm("ce", photos).method.augmentation == "crop_flip"
    assert read_arm("randaugment", photos).method.augmentation == "crop_flip+randaugment"


@pytest.mark.parametrize(
    "stage", ["", "+oracle", "+randaugment", "+trivialaugment", *(f"+{name}" for name in TRANSLATORS)]
)
def test_every_method_with_everything_the_stage_can_give(stage):
    for name in METHODS:
        arm = read_arm(name + stage, ALL["digits_rot_lt"])
        changed = configs.read_choice("method", name)
        assert arm.method.training.sampling == changed["training"]["sampling"]
        assert (arm.fit is not None) == (stage[1:] in TRANSLATORS)


def test_the_rows_of_the_paper():
    rows = METHOD_SETS["paper"]
    assert len(rows) == 12
    assert rows[:4] == ("ce", "ce+git", "ce_drs", "ce_drs+git")
    assert set(PAPER) <= set(METHODS)
    assert arm_names(["stages", "ce", "ce_drs"], ALL["digits_rot_lt"])[-1] == "ce"
    assert configs.read_choice("method", "ldam_drs")["training"]["sampling"] == "delayed"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ce_dsr", "no method 'ce_dsr'; choose balanced_softmax"),
        ("ce+gan", "unknown nuisance 'gan'; choose one of background"),
        ("ce+redraw@tails", "redraw cannot be given to 'tails'; choose everywhere, head, tail, every_row"),
        ("ce+redraw@every_row", "not every row; write redraw@everywhere"),
        ("ce+rotation@head+redraw@tail", "the stage acts in one place, not head and tail"),
        ("ce+more_real", "method 'ce+more_real': data.fill_tail (more_real) needs images that the cut leaves out"),
        ("ce+rotation@every_row+nothing:Here", "nuisance 'nothing:Here' cannot be imported"),
        ("ce+runs/nothing", "runs/nothing holds no translator"),
        ("ce+pose+spatial", "names 2 translators"),
    ],
)
def test_bad_arms_are_named(name, message):
    with pytest.raises((SettingsError, CheckpointError), match=re.escape(message)):
        read_arm(name, ALL["digits_rot_lt"])


def test_the_oracle_of_photos_is_more_real_images():
    arm = read_arm("ce+oracle", ALL["cifar10_lt_if100"])
    assert arm.method.more_real
    assert arm.method.stage.nuisance == "none"
    with pytest.raises(SettingsError, match="needs images that the cut leaves out"):
        read_arm("ce+oracle", ALL["imagenet_lt"])
    with pytest.raises(SettingsError, match="the stage has nothing to do"):
        read_arm("ce+more_real+identity", ALL["cifar10_lt_if100"])
    kept = {name: arm_names("stages", ALL[name]) for name in ("cifar10_lt_if100", "imagenet_lt", "folder")}
    assert "ce_drs+oracle" in kept["cifar10_lt_if100"]
    assert not any("+oracle" in arm for arm in kept["imagenet_lt"] + kept["folder"])
    assert arm_names(["ce+oracle"], ALL["folder"]) == ["ce+oracle"], "asked for by name it is not dropped"


def test_whom_the_stage_gives_to_and_what_every_row_is_given():
    benchmark = read_benchmark("cifar10_lt_if100", changes={"nuisances": {"rotation": {"degrees": 7}}})
    here = read_arm("ce_drs+redraw+trivialaugment@every_row", benchmark).method
    assert (here.stage.nuisance, here.stage.policy) == ("translator", "linear_ramp")
    assert here.augmentation == "crop_flip+trivialaugment"
    for where, name in (("everywhere", "everywhere"), ("head", "head"), ("tail", "auto")):
        moved = read_arm(f"ce_drs+redraw@{where}", benchmark).method
        assert (moved.stage.policy, list(moved.stage.policy_options.values())) == (name, [0.5])
        table = policy(name, torch.tensor([500, 50, 5]), **moved.stage.policy_options)
        assert ((table > 0).tolist()) == {"everywhere": [1, 1, 1], "head": [1, 0, 0], "tail": [0, 1, 1]}[where]
    every = read_arm("ce+rotation@every_row", benchmark).method
    assert (every.augmentation, every.augmentation_options) == ("crop_flip+rotation", {"rotation": {"degrees": 7}})
    assert every.stage.nuisance == "none"
    tail = read_arm("ce+rotation", benchmark).method
    assert tail.stage.nuisance_options == {"rotation": {"degrees": 7}}
    plain = read_benchmark("cifar10_lt_if100", changes={"augmentation": "none"})
    assert read_arm("ce", plain).method.augmentation == "none"


def test_another_policy_drops_the_options_of_the_files_own():
    swept = read_benchmark("digits_rot_lt", changes={"stage": {"policy": "everywhere"}})
    assert (swept.stage.policy, swept.stage.policy_options) == ("everywhere", {})
    kept = read_benchmark("digits_rot_lt", changes={"stage": {"policy": "hard_cutoff"}})
    assert kept.stage.policy_options == {"cutoff": 44, "probability": 0.5}


def test_a_translators_network_from_the_command_line():
    given = {"munit_small": {"network": {"width": 8}}}
    fit = read_arm("ce+munit_small", read_benchmark("digits_rot_lt", changes={"translators": given})).fit
    assert (fit.network["width"], fit.network["residual_blocks"]) == (8, 2)
    wrong = read_benchmark("digits_rot_lt", changes={"translators": {"redraw": {"netwrk": {}}}})
    with pytest.raises(SettingsError, match=r"translator_options.redraw has no 'netwrk'"):
        read_arm("ce+redraw", wrong)


def test_a_fitted_translator_and_a_class_of_ones_own_are_arms(tmp_path):
    SpatialTranslator(channels=1).save_pretrained(tmp_path / "run/translator")
    benchmark = ALL["digits_rot_lt"]
    arm = read_arm(f"ce+{tmp_path}/run", benchmark)
    assert (arm.fit, arm.method.stage.nuisance) == (None, "translator")
    assert isinstance(arm.given.load(), SpatialTranslator)
    assert read_arm(f"ce+{tmp_path}/run/translator", benchmark).given.digest == arm.given.digest
    with open(next((tmp_path / "run/translator").glob("*.safetensors")), "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="has changed"):
        arm.given.load()
    own = read_arm("ce+gen_invariance.nuisance.geometry:Rotation", benchmark).method
    assert isinstance(build_nuisance(own.stage.nuisance), Rotation)


def test_bad_benchmarks_and_settings_are_named():
    with pytest.raises(SettingsError, match=r"no benchmark 'k49_rot'; choose k49_rot_lt, "):
        read_benchmark("k49_rot")
    with pytest.raises(SettingsError, match=r"digits_rot_lt: data has no setting 'largst'"):
        read_benchmark("digits_rot_lt", changes={"data": {"largst": 3}})
    with pytest.raises(SettingsError, match=r"digits_rot_lt: training.epochs"):
        read_benchmark("digits_rot_lt", changes={"training": {"epochs": "many"}})


def test_changes_replace_what_the_file_says():
    changes = {"data": {"largest": 50}, "training": {"epochs": 3}, "fit": {"steps": 7, "pose": {"steps": 9}}}
    benchmark = read_benchmark("digits_rot_lt", changes=changes)
    assert (benchmark.task.largest, benchmark.training.epochs) == (50, 3)
    assert read_arm("ce+pose", benchmark).fit.loop["steps"] == 9
    assert read_arm("ce+munit", benchmark).fit.loop["steps"] == 7
    assert read_arm("ce+pose", ALL["digits_rot_lt"]).fit.loop["steps"] == 400  # others are not touched


def test_data_is_found_below_a_folder(tmp_path):
    (tmp_path / "k49.npz").write_bytes(b"anything")
    found = read_benchmark("k49_rot_lt", data_root=tmp_path)
    assert found.task.path == str(tmp_path / "k49.npz")
    assert found.missing() == []
    lacking = read_benchmark("cifar10_lt_if100", data_root=tmp_path)
    assert lacking.task.path == str(tmp_path / "cifar10")
    assert "data_batch_1.bin" in lacking.missing()
    assert read_benchmark("digits_rot_lt", data_root=tmp_path).missing() == []


def test_the_list_says_what_is_missing(tmp_path):
    lines = format_list(data_root=tmp_path)
    text = "\n".join(lines)
    assert all(re.search(rf"^{name} ", text, flags=re.MULTILINE) for name in NAMES)
    assert re.search(r"^digits_rot_lt +\d+ s( +\d+ (s|minutes)){5}  found$", text, flags=re.MULTILINE)
    assert re.search(r"^gtsrb_lt .* GPU  lacks GTSRB/Final_Training/Images", text, flags=re.MULTILINE)
    some = format_list(("k49", "gtsrb"))
    assert {line.split()[0] for line in some if "lacks" in line} == {n for n in NAMES if n.startswith(("k49", "gtsrb"))}
    with pytest.raises(SettingsError, match="no benchmark starts with 'q'"):
        format_list("q")


def test_numbers_and_shards():
    assert parse_numbers(3, "orders") == [3]
    assert parse_numbers("0-2", "orders") == [0, 1, 2]
    assert parse_numbers("0,4-5", "orders") == [0, 4, 5]
    assert parse_numbers([1, "1-2"], "orders") == [1, 2]
    for wrong in ("2-0", "a", True, -1, "", "1.5"):
        with pytest.raises(SettingsError, match="orders must be whole numbers"):
            parse_numbers([wrong] if wrong is True else wrong, "orders")
    assert parse_shard("2/4") == (2, 4)
    for wrong in ("4/4", "1", "a/b", 3):
        with pytest.raises(SettingsError, match="shard must be i/n"):
            parse_shard(wrong)
