"""The verb `choose` and what follows from a choice: real commands on tiny sets."""

import json

import pytest

from gen_invariance.cli.main import run

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
