"""The referee against an exhaustive loop, and that it survives kills, processes and harmful candidates."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from referee_toys import TOY, save_blank, toned_patterns

from gen_invariance.errors import DataError, RunError, SettingsError
from gen_invariance.measure.accuracy import measure_accuracy
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.referee import work
from gen_invariance.referee.candidates import Candidate, read_candidate
from gen_invariance.referee.choose import choose_augmentation
from gen_invariance.referee.simulate import simulate_tail
from gen_invariance.referee.train import fit_candidate_translator, make_train_settings, train_candidate, translator_key

TONE = "redraw:photo:tone@everywhere"


@pytest.fixture(scope="module")
def data():
    return toned_patterns()


def test_a_helpful_translator_is_chosen_and_a_harmful_one_never(data, tmp_path):
    blank = f"{save_blank(tmp_path / 'blank')}@everywhere"
    choice = choose_augmentation(data, ["none", TONE, blank], TOY)
    assert choice.chosen.name == TONE
    assert choice.gain_of(TONE).low > 0
    assert choice.gain_of(blank).high < 0
    assert choice.generic == "none"
    assert "so it is used" in choice.reason
    alone = choose_augmentation(data, [blank], TOY)  # `none` comes along
    assert alone.chosen.name == "none"
    assert "so none is used" in alone.reason


def test_against_an_exhaustive_loop(data):
    """Every candidate on every split in a plain loop gives the same figures and the same choice."""
    words = ["none", "rotation@everywhere:0.5", TONE, "translation@every_row"]
    settings = replace(TOY, splits=3, steps=20)
    choice = choose_augmentation(data, words, settings, seed=5)
    table = {}
    for split in (1, 2, 3):
        tail = simulate_tail(data, settings, number=split, seed=5)
        train, held = data.subset(tail.train_rows), data.subset(tail.score_rows)
        seed = work.training_seed(5, split)
        for name in words:
            candidate = read_candidate(name)
            fitted = {
                translator_key(each): fit_candidate_translator(each, train, seed=seed) for each in candidate.translators
            }
            model = train_candidate(candidate, train, make_train_settings(settings), seed=seed, fitted=fitted)
            scores = measure_accuracy(model, held.images, held.labels, num_classes=data.num_classes)
            table[name, split] = 100 * scores.balanced
    means = {name: np.mean([table[name, split] for split in (1, 2)]) for name in words}
    kept = sorted(words, key=means.get, reverse=True)[:2]  # a third of four, and two at least
    plain = max((name for name in words if name != TONE), key=means.get)
    kept = {*kept, TONE, plain}
    ranking = {row.name: row for row in choice.ranking}
    for name in words:
        splits = (1, 2, 3) if name in kept else (1, 2)
        assert ranking[name].accuracy == pytest.approx(np.mean([table[name, split] for split in splits]))
        assert ranking[name].splits == len(splits)
        assert ranking[name].dropped_after == (None if name in kept else 2)
        both = [split for split in splits if choice.generic in kept or split < 3]
        gain = np.mean([table[name, split] - table[choice.generic, split] for split in both])
        assert ranking[name].gain.points == pytest.approx(gain)
    assert choice.generic in kept


def test_held_back_images_are_seen_by_no_training_and_no_fit(data, monkeypatch):
    """Every image tells its row, so what a training or a fit is given can be looked up."""
    rows = torch.arange(len(data))
    images = data.images.clone()
    images[:, 0, 0, 0], images[:, 1, 0, 0] = (rows // 256).byte(), (rows % 256).byte()
    marked = replace(data, images=images)
    met = []

    def spy(name):
        original = getattr(work, name)

        def wrapped(what, train, *more, **options):
            met.append(train.images[:, 0, 0, 0].long() * 256 + train.images[:, 1, 0, 0].long())
            return original(what, train, *more, **options)

        monkeypatch.setattr(work, name, wrapped)

    spy("train_candidate")
    spy("fit_candidate_translator")
    settings = replace(TOY, splits=2, steps=20)
    choose_augmentation(marked, ["none", TONE], settings)
    assert len(met) == 2 * 3
    for number, seen in enumerate(met):
        tail = simulate_tail(marked, settings, number=1 + number // 3)
        assert set(seen.tolist()) == set(tail.train_rows.tolist())
        assert not set(seen.tolist()) & set(tail.score_rows.tolist())


@pytest.mark.slow
def test_two_processes_give_the_same_choice(data):
    words, settings = ["none", TONE], replace(TOY, steps=20, splits=2)
    alone = choose_augmentation(data, words, settings)
    assert choose_augmentation(data, words, replace(settings, processes=2)) == alone


PROGRAM = """
import sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from referee_toys import TOY, toned_patterns
from gen_invariance.referee.choose import choose_augmentation
words = ["none", "redraw:photo:tone@everywhere", "rotation@everywhere", "translation@every_row"]
choose_augmentation(toned_patterns(), words, replace(TOY, splits=4, steps=20), out=sys.argv[1], resume=True)
"""


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on_to_the_same_choice(tmp_path):
    def start(out):
        line = [sys.executable, "-c", PROGRAM, str(out), os.path.dirname(os.path.dirname(__file__))]
        return subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"})

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(whole).wait(300) == 0
    process, end = start(out), time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < 4:
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 2, "candi')  # half a line
    before = (out / "metrics.jsonl").read_bytes().splitlines()
    assert start(out).wait(300) == 0
    saved, expected = (json.loads((each / "choice.json").read_text()) for each in (out, whole))
    assert {**saved, "seconds": 0} == {**expected, "seconds": 0}
    assert (out / "metrics.jsonl").read_bytes().splitlines()[: len(before) - 1] == before[:-1]


def test_interrupted_it_goes_on_to_the_same_choice(data, tmp_path, monkeypatch):
    words, settings = ["none", TONE, "rotation@everywhere", "translation@every_row"], replace(TOY, steps=20, splits=3)
    whole, left = choose_augmentation(data, words, settings), [5]

    def stop_soon(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return train_candidate(*arguments, **options)

    monkeypatch.setattr(work, "train_candidate", stop_soon)
    with pytest.raises(KeyboardInterrupt):
        choose_augmentation(data, words, settings, out=tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 2, "candi')  # half a line
    assert choose_augmentation(data, words, settings, out=tmp_path / "run", resume=True) == whole
    assert left[0] == -7  # four trainings before, seven after


def test_a_run_is_tied_to_its_data_and_goes_on_with_more_splits(data, tmp_path):
    settings = replace(TOY, splits=1, steps=20)
    words = ["none", "rotation@every_row"]
    choose_augmentation(data, words, settings, out=tmp_path / "run")
    with pytest.raises(SettingsError, match="already holds a run"):
        choose_augmentation(data, words, settings, out=tmp_path / "run")
    with pytest.raises(SettingsError, match="differ from the run's in data"):
        choose_augmentation(toned_patterns(seed=1), words, settings, out=tmp_path / "run", resume=True)
    more = choose_augmentation(data, words, replace(settings, splits=2), out=tmp_path / "run", resume=True)
    assert more == choose_augmentation(data, words, replace(settings, splits=2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["candidate"]) for line in lines] == [
        (1, words[0]),
        (1, words[1]),
        (2, words[0]),
        (2, words[1]),
    ]


def test_a_short_budget_makes_one_split_and_says_so(data):
    choice = choose_augmentation(data, ["none", "rotation@every_row"], replace(TOY, steps=20, budget="0.001s"))
    assert choice.splits == 1
    assert not choice.enough


def test_slow_translators_are_left_out_and_failing_ones_too(data):
    choice = choose_augmentation(data, ["none", "spatial@everywhere", "redraw:photo:pose@tail"], replace(TOY, steps=20))
    assert "fit it first" in choice.left_out["spatial@everywhere"]
    assert "redraw:photo:pose@tail" in choice.left_out
    assert choice.chosen.name == "none"


class Broken:
    def sample(self, shape, *, generator):
        return {}

    def apply(self, images, draw):
        raise ValueError("broken")


def test_candidates_of_ones_own(data):
    mine = Candidate("mine", stage=(Rotation(20),), policy="auto", policy_options={"maximum": 0.5})
    rows = Candidate("rows", every_row=(Rotation(5), "translation"))
    choice = choose_augmentation(data, ["none", mine, rows], replace(TOY, steps=20, splits=1))
    assert {row.name for row in choice.ranking} == {"none", "mine", "rows"}
    assert not math.isnan(choice.ranking[0].gain_over_none.points)
    with pytest.raises(RunError, match=r"'mine' could not be trained on split 1: .*broken"):
        choose_augmentation(data, ["none", replace(mine, stage=(Broken(),))], replace(TOY, steps=20))


def test_too_small_sets_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="too few images"):
        choose_augmentation(toned_patterns((7, 6, 3)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nothing@everywhere", "unknown nuisance 'nothing'"),
        ("redraw@nowhere", "nothing can be given to 'nowhere'"),
        ("redraw@tail:2", "nothing can be given to 'tail:2'"),
        ("redraw@tail+rotation@head", "acts in one place"),
        ("runs/nothing@tail", "no translator in runs/nothing"),
    ],
)
def test_words_that_are_no_candidate(words, message):
    with pytest.raises(SettingsError, match=message):
        read_candidate(words)


def test_words():
    candidate = read_candidate("redraw:photo:tone:0.5@tail:0.3+trivialaugment@every_row+rotation@every_row")
    (translator,) = candidate.translators
    assert translator.network | {"width": 0} == translator.network | {
        "width": 0,
        "strength": 0.5,
        "parts": ("tone",),
        "kind": "photo",
    }
    assert (candidate.policy, candidate.policy_options) == ("auto", {"maximum": 0.3})
    assert candidate.every_row == ("trivialaugment", "rotation")
    assert not read_candidate("none").stage
    with pytest.raises(SettingsError, match="twice"):
        choose_augmentation(toned_patterns(), ["none", "none"])
