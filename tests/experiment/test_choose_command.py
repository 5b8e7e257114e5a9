"""The verb `choose` and what follows from a choice: real commands on tiny sets."""

import json

import numpy as np
import pytest
from referee_toys import save_blank, toned_patterns

from gen_invariance.benchmark.arms import read_arm
from gen_invariance.benchmark.registry import read_benchmark
from gen_invariance.cli.main import run
from gen_invariance.errors import SettingsError
from gen_invariance.experiment import choose as choosing
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.verdict import read_verdict

DATA = ["data=digits_rotation", "data.test_images=5", "data.largest=60", "data.imbalance=12", "data.image_size=8"]
QUICK = ["steps=20", "splits=1", "batch_size=8", "fit_steps=2"]
WORDS = ["candidates=[none,trivialaugment@every_row,redraw@tail:0.5]"]


def test_the_verb_prints_a_ranking_and_keeps_it(tmp_path, capsys):
    command = ["choose", *DATA, *QUICK, *WORDS, f"out={tmp_path / 'run'}"]
    assert run(command) == 0
    printed = capsys.readouterr().out
    for word in ("trivialaugment@every_row", "redraw@tail:0.5", "<- chosen", "on 1 simulated tail"):
        assert word in printed
    saved = json.loads((tmp_path / "run" / "choice.json").read_text(encoding="utf-8"))
    assert {row["name"] for row in saved["ranking"]} == {"none", "trivialaugment@every_row", "redraw@tail:0.5"}
    assert saved["reason"] in printed
    assert run(command) == 2
    assert "resume=true" in capsys.readouterr().err
    assert run([*command, "resume=true"]) == 0
    assert json.loads((tmp_path / "run" / "choice.json").read_text(encoding="utf-8")) == saved
    assert run([*command, "resume=true", "splits=2", "budget=1h"]) == 0
    assert json.loads((tmp_path / "run" / "choice.json").read_text(encoding="utf-8"))["splits"] == 2
    assert run([*command, "resume=true", "steps=21"]) == 2
    assert "differ from the run's in choose" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["candidates=[none,nothing@tail]"], "unknown nuisance 'nothing'"),
        (["candidates=[none]"], "two candidates or more"),
        (["budget=soon"], "choose.budget must be a time"),
        (["data.largest=9", "data.imbalance=3"], "too few images to choose an augmentation by"),
    ],
)
def test_what_cannot_be_chosen_by_is_one_line_and_leaves_nothing(words, message, tmp_path, capsys):
    assert run(["choose", *DATA, *QUICK, *words, f"out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def toned(tmp_path_factory):
    """A set whose only nuisance is its tone, as a file."""
    data, path = toned_patterns(), tmp_path_factory.mktemp("toned") / "set.npz"
    arrays = {"train_images": data.images.permute(0, 2, 3, 1).numpy(), "train_labels": data.labels.numpy()}
    np.savez(path, **arrays, test_images=arrays["train_images"][::4], test_labels=arrays["train_labels"][::4])
    return ["data=npz", f"data.path={path}", "data.profile=none", "device=cpu", "progress=false"]


TONE = "redraw:photo:tone@everywhere"
TOY = {"steps": 60, "splits": 2, "batch_size": 16, "score_images": 20, "mixed_precision": "no"}
SHORT = [f"choose.{name}={value}" for name, value in TOY.items()]


def words(*candidates):
    return f"choose.candidates=[{','.join(candidates)}]"


def test_fit_auto_fits_what_helps_and_says_what_it_gains(toned, tmp_path, capsys):
    command = ["fit", *toned, "translator=auto", *SHORT, words("none", TONE), f"out={tmp_path / 'fit'}"]
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert f"translator: {tmp_path / 'fit' / 'translator'}" in printed
    translator = load_translator(tmp_path / "fit")
    assert (translator.config.kind, tuple(translator.config.parts)) == ("photo", ("tone",))
    verdict = read_verdict(tmp_path / "fit")
    assert verdict.word == "use"
    saved = json.loads((tmp_path / "fit-choice" / "choice.json").read_text(encoding="utf-8"))
    gain = next(row["gain"] for row in saved["ranking"] if row["name"] == TONE)
    assert verdict.gain.points == pytest.approx(gain["points"], abs=1e-3)
    assert verdict.gain.low > 0
    assert run(command) == 2
    assert "resume=true" in capsys.readouterr().err


def test_fit_auto_writes_no_translator_where_none_helps(toned, tmp_path, capsys):
    blank = save_blank(tmp_path / "blank")
    command = ["fit", *toned, "translator=auto", *SHORT, words("none", f"{blank}@everywhere")]
    assert run([*command, f"out={tmp_path / 'fit'}"]) == 0
    printed = capsys.readouterr().out
    assert "so none is used" in printed
    assert "no translator is written" in printed
    assert not (tmp_path / "fit").exists()


def test_train_auto_trains_with_what_was_chosen(toned, tmp_path, capsys):
    """Interrupted after the choice, it goes on to the very run that an uninterrupted one gives."""
    brief = ["training.epochs=2", "training.warmup=0", *SHORT, words("none", TONE, "translation@every_row")]
    command = ["train", *toned, "stage=auto", *brief, "augmentation=crop_flip"]
    assert run([*command, f"out={tmp_path / 'whole'}"]) == 0
    about = json.loads((tmp_path / "whole" / "run.json").read_text(encoding="utf-8"))
    stage = about["config"]["stage"]
    assert stage["nuisance"] == "translator"
    assert stage["translator"] == str(tmp_path / "whole-translator")
    assert (stage["policy"], stage["policy_options"]) == ("everywhere", {"probability": 0.7})
    assert about["config"]["augmentation"] == "crop_flip"
    assert about["facts"]["choice"]["chosen"] == TONE
    assert "so it is used" in about["facts"]["choice"]["reason"]
    before = (tmp_path / "whole-choice" / "choice.json").read_text(encoding="utf-8")
    assert run([*command, f"out={tmp_path / 'whole'}"]) == 2
    assert "resume=true" in capsys.readouterr().err
    assert run([*command, f"out={tmp_path / 'whole'}", "resume=true"]) == 0
    assert (tmp_path / "whole-choice" / "choice.json").read_text(encoding="utf-8") == before
    assert run(["measure", f"run={tmp_path / 'whole'}", "nuisance=identity"]) == 0


def test_train_auto_without_a_translator(toned, tmp_path, capsys):
    brief = [
        "training.epochs=2",
        "training.warmup=0",
        *SHORT,
        "choose.splits=1",
        words("none", "translation@every_row"),
    ]
    assert run(["train", *toned, "stage=auto", *brief, f"out={tmp_path / 'run'}"]) == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["config"]
    assert config["stage"]["nuisance"] == "none"
    assert config["augmentation"] in ("none", "translation")
    capsys.readouterr()
    assert run(["train", *toned, "stage=auto", *brief, "stage.policy=everywhere", f"out={tmp_path / 'other'}"]) == 2
    assert "chooses the whole stage" in capsys.readouterr().err


def test_inspect_speaks_in_points(toned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(choosing, "_STEPS", 150)
    monkeypatch.setattr(choosing, "_LEAST_SCORED", 50)
    blank = save_blank(tmp_path / "blank")
    quick = ["inspect.judge_epochs=1", "inspect.draws=2", "inspect.max_images=40"]
    assert run(["inspect", *toned, f"translator={blank}", *quick, "inspect.budget=1s"]) == 0
    printed = capsys.readouterr().out
    assert "In simulated tails of these data it gains -" in printed
    saved = json.loads((tmp_path / "blank" / "quality.json").read_text(encoding="utf-8"))
    assert saved["verdict"] == "do not use"
    assert saved["gain"]["high"] < 0
    assert saved["gain"]["against"] in ("none", "trivialaugment@every_row")
    assert saved["reasons"][1:]  # figures explain
    said = []
    assert choosing.judge_translator(blank, toned_patterns((7, 6, 3)), say=said.append) is None
    assert "no gain can be measured" in said[0]
    monkeypatch.setattr(choosing, "_LEAST_SCORED", 1000)
    assert choosing.judge_translator(blank, toned_patterns(), say=said.append) is None
    assert "of 1000 that it takes" in said[1]


def test_a_launcher_of_several_processes_is_refused(toned, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["choose", *toned, *QUICK, *WORDS, f"out={tmp_path / 'run'}"]) == 2
    assert "without it" in capsys.readouterr().err


def test_a_benchmark_names_its_translators():
    with pytest.raises(SettingsError, match="gen-invariance choose finds the one to name"):
        read_arm("ce_drs+auto", read_benchmark("digits_rot_lt"))
