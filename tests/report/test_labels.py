"""Labels of runs: short, never two alike, and saying no less than the settings do."""

import itertools
import random

import pytest

from gen_invariance.report.drawing import legend_names
from gen_invariance.report.labels import (
    LONGEST,
    differing_keys,
    flatten_settings,
    make_distinct,
    make_labels,
    shorten,
    telling_keys,
    wrap_name,
)

PLAIN = {"stage.nuisance": "none", "stage.translator": None, "transfer.mode": "none", "training.epochs": 40,
         "training.warmup": 5, "classifier.backbone": "resnet20", "augmentation": "none"}  # fmt: skip


def labels(*changes):
    return make_labels([{**PLAIN, **change} for change in changes])


def test_settings_are_flattened_by_dotted_key():
    config = {"stage": {"nuisance": "true", "policy_options": {"maximum": 0.5}}, "transfer": {}, "augmentation": "none"}
    found = {"stage.nuisance": "true", "stage.policy_options.maximum": 0.5, "augmentation": "none"}
    assert flatten_settings(config) == found


def test_a_label_says_what_differs_and_not_what_most_runs_have():
    oracle = {"stage.nuisance": "true"}
    assert labels({}, oracle) == ["stage=none", "stage=oracle"]
    assert labels({}, {"transfer.mode": "full"}, oracle) == ["stage=none", "transfer=full", "stage=oracle"]
    both = {**oracle, "training.epochs": 20}
    assert labels({}, both) == ["epochs=40", "stage=oracle, epochs=20"]
    assert labels({}, {}) == ["", ""]


def test_what_another_setting_of_its_group_implies_is_left_out():
    learned = {"stage.nuisance": "translator", "stage.translator": "runs/fit"}
    assert labels({}, learned) == ["stage=none", "stage=translator"]
    assert labels({"training.epochs": 3, "training.warmup": 0}, {}) == ["epochs=3", "epochs=40"]
    drawn = {"training.sampling": "square_root", "training.warmup": 9}  # the more telling of the two is named
    found = labels({"training.epochs": 3}, {}, {**drawn, "training.epochs": 3}, drawn)
    assert found == ["epochs=3", "epochs=40", "epochs=3, sampling=square_root", "epochs=40, sampling=square_root"]
    other = {**learned, "stage.translator": "runs/other"}
    assert labels({}, learned, other) == ["stage=none", "translator=fit", "translator=other"]
    far = {**learned, "stage.translator": "runs/a/fit"}, {**learned, "stage.translator": "runs/b/fit"}
    assert labels(*far) == ["translator=a/fit", "translator=b/fit"]


def test_settings_of_one_name_are_told_by_their_whole_key():
    settings = [{"a.size": 1, "b.size": 1}, {"a.size": 2, "b.size": 2}]
    assert make_labels(settings) == ["a.size=1, b.size=1", "a.size=2, b.size=2"]


def test_what_the_cut_leaves_alike_is_counted():
    words = [f"{'y' * 20}{number}{'y' * 20}" for number in "12"]
    assert labels(*({"augmentation": word} for word in words))[1].endswith(" (2)")
    assert len(set(legend_names([f"{'y' * 20}{word}{'y' * 20}" for word in words]).values())) == 2


@pytest.mark.parametrize("seed", range(20))
def test_labels_of_any_settings_are_unique_and_fit(seed):
    """Whatever settings: no two labels alike, none too long, and as many parts told apart as there are."""
    draw = random.Random(seed)
    values = ["none", None, "x" * 70 + str(seed), 0.1, 40, True, "runs/fit", [1, 2], "a, b=c"]
    keys = [f"{group}.{name}" for group in ("stage", "training", "zoo") for name in ("nuisance", "b", "c")]
    every = [{key: draw.choice(values) for key in keys} for _ in range(8)]
    settings = list({repr(one): one for one in every}.values())
    found = make_labels(settings)
    assert len(set(found)) == len(settings)
    assert max(map(len, found)) <= LONGEST + 4  # a number behind it
    kept = telling_keys(settings)
    assert set(kept) <= set(differing_keys(settings))
    assert len({tuple(repr(one[key]) for key in kept) for one in settings}) == len(settings)
    names = legend_names(found)
    assert len(set(names.values())) == len(found)


def test_names_are_cut_in_the_middle_counted_and_broken_into_lines():
    assert shorten("a" * 9, 9) == "a" * 9
    assert shorten("abcdefghi", 5) == "ab…hi"
    assert make_distinct(["a", "a", "b", "a (2)"], ["b"]) == ["a", "a (2)", "b (2)", "a (2) (2)"]
    text = "ce_drs+more_real+trivialaugment@every_row, epochs=40"
    lines = wrap_name(text, 20).splitlines()
    assert lines == ["ce_drs+more_real+", "trivialaugment@every_row,", "epochs=40"]
    for a, b in itertools.pairwise(lines):
        assert len(a) + len(b) > 20


def test_long_names_of_arms_stay_apart_in_legends():
    start = "ce_drs+a_translator_with_a_long_name+trivialaugment@every_row+more_real@"
    names = legend_names([start + "tail", start + "head", "$x$"])
    assert len(set(names.values())) == 3
    assert names["$x$"] == r"\$x\$"
