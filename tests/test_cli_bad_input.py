"""Every kind of bad input ends in one line that names it, exit code 2, and leaves nothing behind in `out`."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen_invariance.cli import run

TINY = ["data=digits_rotation", "data.largest=24", "data.imbalance=4", "data.few_below=8", "data.many_above=16"]
FIT = ["fit", *TINY, "fit.steps=2", "fit.batch_size=8"]
TRAIN = ["train", *TINY, "training.epochs=2", "training.warmup=0"]


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "fit"
    assert run([*FIT, f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "train"
    assert run([*TRAIN, f"out={out}"]) == 0
    return out


def refused(arguments, capsys, *, code=2):
    """Run in this process; the one line on stderr, after checking that it is one and that nothing else happened."""
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == code
    return one_line(capsys.readouterr().err)


def one_line(stderr):
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("gen-invariance: ")
    assert not re.search(r"Traceback|__init__|<class|object at 0x", lines[0]), lines[0]
    return lines[0]


# --- settings ---------------------------------------------------------------------------------------------------

SETTINGS = {
    "verb misspelt": (["trian"], ["'trian'", "did you mean train"]),
    "option with dashes": (["fit", "--steps=3"], ["--steps=3", "no dashes"]),
    "key misspelt": (["fit", "fit.stepps=3"], ["fit.stepps", "did you mean fit.steps"]),
    "key misspelt, of the verb": (["train", "sed=3"], ["sed", "did you mean seed"]),
    "key of another verb": (["measure", "fit.steps=3", "run=x"], ["fit.steps"]),
    "no such choice": (["train", "classifier=resnet21"], ["resnet21", "resnet20", "small_conv"]),
    "no equals sign": (["fit", "steps"], ["steps"]),
    "unreadable value": (["fit", "fit.steps=[1,"], ["fit.steps"]),
    "missing setting": (["measure"], ["run=..."]),
    "missing translator": (["train", "stage=translator"], ["stage.translator"]),
    "missing path": (["fit", "data=npz"], ["npz", "path"]),
    "missing records": (["report"], ["records=..."]),
    "word for a number": (["fit", "fit.steps=abc"], ["fit.steps", "whole number", "'abc'"]),
    "word for the seed": (["fit", "seed=x"], ["seed", "whole number", "'x'"]),
    "fraction for a whole number": (["train", "data.largest=1.5"], ["data.largest", "whole number", "1.5"]),
    "number for a switch": (["fit", "resume=3"], ["resume", "true or false"]),
    "list for a folder": (["fit", "out=[a]"], ["out", "text"]),
    "word for a mapping": (["fit", "data.nuisance_options=3"], ["data.nuisance_options", "mapping"]),
    "too few milestones": (["train", "training.milestones=[3]"], ["training.milestones", "2 values"]),
    "infinite rate": (["train", "training.learning_rate=inf"], ["training.learning_rate", "finite"]),
    "NaN rate": (["train", "training.weight_decay=nan"], ["training.weight_decay", "finite"]),
    "negative steps": (["fit", "fit.steps=-1"], ["fit.steps", "-1"]),
    "no steps": (["fit", "fit.steps=0"], ["fit.steps", "0"]),
    "no batch": (["fit", "fit.batch_size=0"], ["fit.batch_size", "0"]),
    "no epochs": (["train", "training.epochs=0"], ["epochs", "0"]),
    "negative rate": (["train", "training.learning_rate=-1"], ["learning_rate", "-1"]),
    "negative class size": (["fit", "data.largest=-3"], ["largest", "-3"]),
    "negative imbalance": (["fit", "data.imbalance=-1"], ["imbalance", "-1"]),
    "validation fraction": (["fit", "data.validation_fraction=2"], ["fraction", "2"]),
    "image size": (["fit", "data.image_size=0"], ["image_size", "0"]),
    "group bounds": (["fit", "data.few_below=0"], ["few_below", "0"]),
    "too large a class": (["fit", "data.largest=9999"], ["largest"]),
    "head classes too large": ([*FIT, "fit.head_from=999"], ["999", "fit.head_from"]),
    "classes": (["fit", "fit.classes=tail"], ["fit.classes", "'tail'", "head, all"]),
    "precision": (["fit", "fit.mixed_precision=fp8"], ["fp8", "bf16"]),
    "source": (["fit", "data.source=cifar"], ["'cifar'", "npz"]),
    "profile": (["fit", "data.profile=long"], ["'long'", "exponential"]),
    "nuisance": (["fit", "data.nuisance=wind"], ["'wind'", "rotation"]),
    "nuisance option": (["fit", "data.nuisance_options={speed: 3}"], ["rotation", "speed"]),
    "nuisance option, by its own key": (["fit", "data.nuisance_options.speed=3"], ["rotation", "speed"]),
    "loss option's kind": ([*TRAIN, "classifier.loss=focal", "classifier.loss_options={gamma: far}"], ["gamma"]),
    "loss option's range": ([*TRAIN, "classifier.loss=focal", "classifier.loss_options={gamma: -1}"], ["gamma", "-1"]),
    "nuisance option's kind": (["fit", "data.nuisance_options={degrees: far}"], ["degrees"]),
    "translator": (["fit", *TINY, "translator.name=gan"], ["'gan'", "munit"]),
    "translator's network": (
        ["fit", *TINY, "+translator.network.depth=3"],
        ["translator.network", "'depth'", "operations"],
    ),
    "translator's operation": (["fit", *TINY, "translator.network.operations=[spin]"], ["spin", "rotation"]),
    "translator's start, a word": (["fit", *TINY, "translator.network.start=abc"], ["start"]),
    "translator's start": (["fit", *TINY, "translator.network.start=-1"], ["start", "-1"]),
    "translator's rate, a word": (["fit", *TINY, "translator.objective.learning_rate=abc"], ["learning_rate"]),
    "translator's rate": (["fit", *TINY, "translator.objective.learning_rate=-1"], ["learning"]),
    "translator's width": (["fit", *TINY, "translator=munit_small", "translator.network.width=0"], ["width", "0"]),
    "translator's width, a word": (["fit", *TINY, "translator=munit", "translator.network.width=a"], ["width"]),
    "weights of the losses": (["fit", *TINY, "translator=munit", "translator.objective.weights={kl: 1}"], ["kl"]),
    "weight of a loss": (["fit", *TINY, "translator=munit", "translator.objective.weights.image=a"], ["image"]),
    "backbone": ([*TRAIN, "classifier.backbone=resnet21"], ["resnet21", "small_conv"]),
    "head": ([*TRAIN, "classifier.head=round"], ["round", "cosine"]),
    "loss": ([*TRAIN, "classifier.loss=mse"], ["mse", "cross_entropy"]),
    "loss option": ([*TRAIN, "classifier.loss_options={gamma: 2}"], ["gamma"]),
    "sampling": ([*TRAIN, "training.sampling=often"], ["often", "class_balanced"]),
    "schedule": ([*TRAIN, "training.schedule=linear"], ["linear", "cosine"]),
    "stage's nuisance": ([*TRAIN, "stage.nuisance=wind"], ["wind", "randaugment"]),
    "stage's translator": ([*TRAIN, "stage.nuisance=translator"], ["stage.translator"]),
    "policy": ([*TRAIN, "stage=oracle", "stage.policy=often"], ["often", "hard_cutoff"]),
    "policy option": ([*TRAIN, "stage=oracle", "stage.policy_options={p: 2}"], ["auto", "p"]),
    "probability": ([*TRAIN, "stage=oracle", "stage.policy_options={maximum: 2}"], ["maximum", "2"]),
    "augmentation": ([*TRAIN, "augmentation=mixup"], ["mixup", "crop_flip"]),
    "device": ([*FIT, "device=abacus"], ["abacus", "cpu"]),
    "device that torch knows and nobody has": ([*FIT, "device=mps"], ["mps", "cpu"]),
    "demo without seeds": (["demo", "demo.seeds=0"], ["demo.seeds", "0"]),
    "word for the demo's seeds": (["demo", "demo.seeds=three"], ["demo.seeds", "'three'"]),
}


@pytest.mark.parametrize(("arguments", "words"), SETTINGS.values(), ids=SETTINGS)
def test_bad_settings(arguments, words, tmp_path, capsys):
    out = tmp_path / "out"
    where = [f"out={out}"] if len(arguments) > 1 and arguments[0] != "measure" else []
    if any(argument.startswith("out=") for argument in arguments):
        where = []
    line = refused([*arguments, *where], capsys)
    assert all(word in line for word in words), line
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(tmp_path, capsys):
    assert "device=cpu" in refused([*FIT, "device=cuda", f"out={tmp_path / 'out'}"], capsys)


# --- data -------------------------------------------------------------------------------------------------------


def image_folder(root, *, mode="L"):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "eel"):
        (root / name).mkdir(parents=True)
        for number in range(6):
            shape = (16, 16) if mode == "L" else (16, 16, 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / name / f"{number}.png")
    return root


def empty_class(root):
    (root / "fox").mkdir()


def no_class(root):
    shutil.rmtree(root)
    root.mkdir()


def corrupt(root):
    (root / "dog" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")


def truncated(root):
    file = root / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:60])


def other_size(root):
    Image.new("L", (20, 16)).save(root / "dog" / "3.png")


def gone(root):
    shutil.rmtree(root)


def a_file(root):
    shutil.rmtree(root)
    root.write_text("photos")


FOLDERS = {
    empty_class: ["fox"],
    no_class: ["photos"],
    corrupt: ["3.png", "skip_corrupt"],
    truncated: ["3.png", "skip_corrupt"],
    other_size: ["3.png", "20x16", "image_size"],
    gone: ["photos", "exist"],
    a_file: ["photos", "folder"],
}


@pytest.mark.parametrize(("damage", "words"), FOLDERS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_bad_image_folder(damage, words, tmp_path, capsys):
    root, out = image_folder(tmp_path / "photos"), tmp_path / "out"
    damage(root)
    line = refused(["fit", "data=folder", f"data.path={root}", f"out={out}"], capsys)
    assert all(word in line for word in words), line
    assert not out.exists()


@pytest.mark.parametrize("damage", [corrupt, truncated])
def test_corrupt_image_is_skipped_when_asked(damage, tmp_path, capsys):
    root, out = image_folder(tmp_path / "photos"), tmp_path / "out"
    damage(root)
    chosen = ["data=folder", f"data.path={root}", "data.skip_corrupt=true"]
    assert run(["fit", *chosen, "fit.head_from=1", "fit.steps=1", "fit.batch_size=4", f"out={out}"]) == 0
    assert len(np.load(out / "split.npz")["train_indices"]) == 17


def arrays():
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (30, 16, 16), dtype=np.uint8),
        "train_labels": np.arange(30) % 3,
        "test_images": rng.integers(0, 256, (12, 16, 16), dtype=np.uint8),
        "test_labels": np.arange(12) % 3,
        "class_names": np.array(["cat", "dog", "eel"]),
    }


def with_nan():
    images = arrays()["train_images"] / np.float32(255)
    images[3, 4, 5] = np.nan
    return images


ARRAYS = {
    "no labels": ({"train_labels": None}, ["train_labels"]),
    "test images without labels": ({"test_labels": None}, ["test_labels"]),
    "label too large": ({"train_labels": np.arange(30) % 4}, ["train_labels", "[0, 3)", "3"]),
    "negative label": ({"train_labels": np.arange(30) % 3 - 1}, ["train_labels", "-1"]),
    "class without images": ({"train_labels": np.arange(30) % 2}, ["'eel'"]),
    "too few labels": ({"train_labels": np.arange(29) % 3}, ["train_labels", "(29,)", "(30,)"]),
    "labels that are no whole numbers": ({"train_labels": np.arange(30) / 2}, ["train_labels", "float64"]),
    "NaN pixels": ({"train_images": with_nan()}, ["train_images", "NaN"]),
    "pixels above 1": ({"train_images": arrays()["train_images"].astype(np.float32)}, ["train_images", "[0, 1]"]),
    "two channels": ({"train_images": np.zeros((30, 16, 16, 2), np.uint8)}, ["(30, 16, 16, 2)", "RGB"]),
    "other channels for testing": ({"test_images": np.zeros((12, 16, 16, 3), np.uint8)}, ["test images"]),
    "no images": ({"train_images": np.zeros((0, 16, 16), np.uint8)}, ["(0, 16, 16)"]),
    "pickled objects": ({"train_labels": np.array([{}] * 30)}, ["train_labels", "pickled"]),
}


@pytest.mark.parametrize(("changes", "words"), ARRAYS.values(), ids=ARRAYS)
def test_bad_arrays(changes, words, tmp_path, capsys):
    path, out = tmp_path / "set.npz", tmp_path / "out"
    np.savez(path, **{key: value for key, value in (arrays() | changes).items() if value is not None})
    line = refused(["train", "data=npz", f"data.path={path}", f"out={out}"], capsys)
    assert all(word in line for word in words), line
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"plain text", None], ids=["empty", "text", "truncated"])
def test_file_that_is_no_npz(content, tmp_path, capsys):
    path, out = tmp_path / "set.npz", tmp_path / "out"
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    line = refused(["fit", "data=npz", f"data.path={path}", f"out={out}"], capsys)
    assert "set.npz" in line
    assert not out.exists()


def test_npz_without_test_part_trains_only_when_told_how_to_test(tmp_path, capsys):
    path, out = tmp_path / "set.npz", tmp_path / "out"
    np.savez(path, **{key: value for key, value in arrays().items() if not key.startswith("test")})
    chosen = ["data=npz", f"data.path={path}", f"out={out}"]
    assert "rest_is_test=true" in refused(["train", *chosen], capsys)
    assert not out.exists()
    assert run(["train", *chosen, "data.rest_is_test=true", "training.epochs=1"]) == 0


def test_hostile_names_cannot_write_over_the_terminal(tmp_path, capsys):
    root = image_folder(tmp_path / "photos")
    (root / "fox\x1b[2J\nBOO").mkdir()
    assert "\x1b" not in refused(["fit", "data=folder", f"data.path={root}", f"out={tmp_path / 'out'}"], capsys)


# --- checkpoints of another kind, or damaged ---------------------------------------------------------------------


def bare(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def config_is_text(folder):
    (folder / "translator" / "config.json").write_text("{not json")


def config_is_list(folder):
    (folder / "translator" / "config.json").write_text("[1, 2]")


def other_class(folder):
    (folder / "translator" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))


def other_shape(folder):
    path = folder / "translator" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"operations": ["rotation"]}))


def truncated_weights(folder):
    (weights,) = (folder / "translator").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-3])


def no_weights(folder):
    for weights in (folder / "translator").glob("*.safetensors"):
        weights.unlink()


@pytest.mark.parametrize(
    "damage", [bare, config_is_text, config_is_list, other_class, other_shape, truncated_weights, no_weights]
)
@pytest.mark.parametrize("verb", ["train", "measure"])
def test_damaged_translator(damage, verb, fitted, trained, tmp_path, capsys):
    copy, out = tmp_path / "fit", tmp_path / "out"
    shutil.copytree(fitted, copy)
    damage(copy)
    if verb == "train":
        arguments = [*TRAIN, "stage=translator", f"stage.translator={copy}", f"out={out}"]
    else:
        arguments = ["measure", f"run={trained}", "nuisance=translator", f"translator={copy}"]
    assert str(copy) in refused(arguments, capsys)
    assert not out.exists()


def test_run_of_another_kind(fitted, trained, tmp_path, capsys):
    out = tmp_path / "out"
    line = refused([*TRAIN, "stage=translator", f"stage.translator={trained}", f"out={out}"], capsys)
    assert str(trained) in line
    assert "fit wrote" in line
    line = refused(["measure", f"run={fitted}"], capsys)
    assert "'fit' run" in line
    assert "train wrote" in line
    assert not out.exists()


def test_translator_of_other_channels(fitted, tmp_path, capsys):
    out, shape = tmp_path / "out", (30, 16, 16, 3)
    munit = tmp_path / "munit"
    tiny = ["translator=munit_small", "translator.network={width: 4, residual_blocks: 1}"]
    assert run([*FIT, *tiny, "translator.objective.discriminator_layers=1", f"out={munit}"]) == 0
    colours = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "rgb.npz", **arrays() | {"train_images": colours, "test_images": colours[:12]})
    chosen = ["data=npz", f"data.path={tmp_path / 'rgb.npz'}", "training.epochs=1"]
    line = refused(["train", *chosen, "stage=translator", f"stage.translator={munit}", f"out={out}"], capsys)
    assert "1 channel(s)" in line
    assert not out.exists()
    plain = tmp_path / "plain"
    assert run(["train", *chosen, f"out={plain}"]) == 0
    assert "1 channel(s)" in refused(["measure", f"run={plain}", "nuisance=translator", f"translator={munit}"], capsys)


def run_json_is_text(folder):
    (folder / "run.json").write_text("{")


def run_json_is_bare(folder):
    (folder / "run.json").write_text(json.dumps({"kind": "train"}))


def run_json_lacks_data(folder):
    about = json.loads((folder / "run.json").read_text())
    del about["config"]["data"]
    (folder / "run.json").write_text(json.dumps(about))


def run_json_from_elsewhere(folder):
    about = json.loads((folder / "run.json").read_text())
    about["config"]["data"]["colour"] = "red"
    (folder / "run.json").write_text(json.dumps(about))


def no_checkpoint(folder):
    shutil.rmtree(folder / "checkpoints")


def flipped_bit(folder):
    for file in (folder / "checkpoints").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def truncated_checkpoint(folder):
    for file in (folder / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-10])


def foreign_checkpoint(folder):
    for file in (folder / "checkpoints").iterdir():
        torch.save({"model": {}}, file)


@pytest.mark.parametrize(
    "damage",
    [
        *(bare, run_json_is_text, run_json_is_bare, run_json_lacks_data, run_json_from_elsewhere),
        *(no_checkpoint, flipped_bit, truncated_checkpoint, foreign_checkpoint),
    ],
)
def test_damaged_run(damage, trained, tmp_path, capsys):
    copy = tmp_path / "train"
    shutil.copytree(trained, copy)
    damage(copy)
    capsys.readouterr()
    assert run(["measure", f"run={copy}", "draws=1"]) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert str(copy) in one_line(last)
    # A damaged checkpoint is named, too, before it is passed over.
    assert all(line.startswith("warning: ") for line in before)
    assert bool(before) == (damage in (flipped_bit, truncated_checkpoint, foreign_checkpoint))
    assert not (copy / "measures").exists()


def test_bad_measure_settings(trained, capsys):
    for setting, word in (
        ("split=tset", "tset"),
        ("split=validation", "validation_fraction"),
        ("nuisance=wind", "wind"),
        ("nuisance=translator", "translator=FOLDER"),
        ("draws=0", "draws"),
        ("batch_size=0", "batch_size"),
        ("nuisance=../../x", "x"),
    ):
        assert word in refused(["measure", f"run={trained}", setting], capsys)
    assert "nowhere" in refused(["measure", f"run={trained}/nowhere"], capsys)
    assert not (trained / "measures").exists()


def test_bad_report_settings(trained, tmp_path, capsys):
    out, measured = tmp_path / "out", tmp_path / "measured"
    assert "nowhere" in refused(["report", f"records={tmp_path / 'nowhere'}", f"out={out}"], capsys)
    assert "measure run=" in refused(["report", f"records={trained}", f"out={out}"], capsys)
    shutil.copytree(trained, measured)
    assert run(["measure", f"run={measured}", "draws=1"]) == 0
    assert "plain" in refused(["report", f"records={measured}", "baseline=plain", f"out={out}"], capsys)
    assert not out.exists()
    for file in (measured / "records").iterdir():
        file.write_text("not a record\n")
    capsys.readouterr()
    assert run(["report", f"records={measured}", f"out={out}"]) == 2
    warning, last = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert "damaged" in warning
    assert "measured" in one_line(last)
    assert not out.exists()


# --- output -----------------------------------------------------------------------------------------------------


def test_out_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "cannot write" in refused([*FIT, f"out={tmp_path / 'file' / 'out'}"], capsys)
    assert "file" in refused([*FIT, f"out={tmp_path / 'file'}"], capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", [FIT, TRAIN, ["demo"]], ids=["fit", "train", "demo"])
def test_out_where_nobody_may_write(verb, capsys):
    assert "/proc/nobody" in refused([*verb, "out=/proc/nobody/out"], capsys)


def test_out_with_foreign_files(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    for verb in (FIT, TRAIN, ["demo"]):
        assert "thesis.tex" in refused([*verb, f"out={tmp_path}"], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def snapshot(folder):
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_out_with_a_run(fitted, capsys):
    before = snapshot(fitted)
    assert "resume=true" in refused([*FIT, f"out={fitted}"], capsys)
    assert "settings differ" in refused([*FIT, f"out={fitted}", "resume=true", "fit.batch_size=9"], capsys)
    assert "seed" in refused([*FIT, f"out={fitted}", "resume=true", "seed=1"], capsys)
    assert "'fit' run" in refused([*TRAIN, f"out={fitted}", "resume=true"], capsys)
    assert snapshot(fitted) == before


def command(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "gen_invariance.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, check=False, **options)


@pytest.mark.parametrize(
    ("verb", "size"),
    [
        pytest.param(FIT, 1_000, marks=pytest.mark.slow),
        (FIT, 20_000),
        pytest.param(TRAIN, 20_000, marks=pytest.mark.slow),
        pytest.param(TRAIN, 1_000, marks=pytest.mark.slow),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_full_disk(verb, size, tmp_path):
    """A disk that takes no file above `size` bytes; the write that fails differs with it."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = command(*verb, f"out={tmp_path / 'out'}", preexec_fn=limit)
    assert done.returncode == 2
    assert "cannot write" in one_line(done.stderr)
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file.name.endswith(".tmp")]
    assert left == []
    assert not (tmp_path / "out" / "translator").exists()


def test_same_through_the_installed_command(tmp_path):
    installed = Path(sys.executable).with_name("gen-invariance")
    done = subprocess.run(
        [installed, "fit", "data=folder", f"data.path={tmp_path / 'nowhere'}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere" in one_line(done.stderr)
    assert list(tmp_path.iterdir()) == []
