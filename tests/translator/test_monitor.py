"""Looking at a fit: held-out images stay out, the best weights are kept, collapses are named once, time is kept."""

import math
from dataclasses import replace
from statistics import harmonic_mean

import pytest
import torch
from test_fit import Interrupted, Watch, digits, interrupt, objective, settings, weights

from gen_invariance.errors import CheckpointError, DataError, SettingsError
from gen_invariance.files import load_checkpoint
from gen_invariance.nuisance.compose import Identity
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.run import Run
from gen_invariance.translator.fit import fit_objective, fit_translator
from gen_invariance.translator.quality import monitor as monitoring
from gen_invariance.translator.quality.monitor import compute_score, make_evaluator, split_for_judge, split_members

FINE = {"accuracy_kept": 1.0, "precision": 1.0, "coverage": 1.0, "diversity": 0.5}


def scripted(*shown):
    """A watch that gives these figures look by look, and keeps the weights it was shown."""
    seen, figures = [], iter(shown)

    def look(nuisance, step):
        seen.append((step, {name: value.clone() for name, value in nuisance.state_dict().items()}))
        return {**FINE, **next(figures)}

    look.seen = seen
    return look


def measured(nuisance, step):
    """Figures that depend on the weights alone, as real ones do."""
    return {
        **FINE,
        "precision": abs(math.sin(1e3 * float(sum(value.detach().sum() for value in nuisance.parameters())))),
    }


def fit(tmp_path, evaluate=None, *, name="spatial", whole=None, resume=False, said=None, **changes):
    run = Run(tmp_path, kind="fit", seed=7, resume=resume)
    lines = [] if said is None else said
    built = whole or objective(name)
    return fit_objective(
        built, digits(), settings(**changes), run=run, progress=False, evaluate=evaluate, say=lines.append
    )


# ---- what is looked at


def test_a_fifth_of_each_class_is_held_out():
    members = [torch.arange(10, 33), torch.arange(4), torch.arange(50, 55)]
    fitted, held = split_members(members, seed=3)
    assert [len(rows) for rows in held] == [4, 0, 1]
    for rows, a, b in zip(members, fitted, held, strict=True):
        assert torch.equal(torch.cat([a, b]).sort().values, rows)
    again, other = (split_members(members, seed=seed)[1][0] for seed in (3, 4))
    assert torch.equal(again, held[0])
    assert not torch.equal(other, held[0])


def test_groups_are_held_out_whole():
    members = [torch.arange(10, 34), torch.arange(4), torch.arange(50, 70)]
    groups = torch.zeros(70, dtype=torch.int64)
    for rows, frames in ((members[0], 3), (members[1], 1), (members[2], 4)):
        groups[rows] = 100 * int(rows[0]) + torch.arange(len(rows)) // frames
    fitted, held = split_members(members, seed=3, groups=groups)
    assert [len(rows) for rows in held] == [3, 0, 4]  # a fifth, in whole groups
    for rows, a, b in zip(members, fitted, held, strict=True):
        assert torch.equal(torch.cat([a, b]).sort().values, rows)
        assert not set(groups[a].tolist()) & set(groups[b].tolist())


def test_the_judge_has_seen_no_group_that_it_judges(tmp_path):
    data, whole = digits((60, 50, 5)), objective("spatial")
    data = replace(data, groups=torch.arange(len(data)) // 3)
    spy, loop = Watch(whole), settings(steps=10, batch_size=120, watch_every=5)
    run = Run(tmp_path / "run", kind="fit", seed=7)
    fit_objective(whole, data, loop, run=run, progress=False, evaluate=lambda nuisance, step: FINE)
    seen, held = split_for_judge(data, loop, seed=7)
    assert not set(seen.groups.tolist()) & set(held.groups.tolist())
    pixels = {image.numpy().tobytes() for image in (torch.cat(spy.seen) * 255).round().byte()}
    assert pixels == {image.numpy().tobytes() for image in seen.images}


def test_held_out_images_are_never_fitted_on(tmp_path):
    data, whole = digits((60, 50, 5)), objective("spatial")
    spy, loop = Watch(whole), settings(steps=10, batch_size=120, watch_every=5)
    run = Run(tmp_path / "run", kind="fit", seed=7)
    fit_objective(whole, data, loop, run=run, progress=False, evaluate=lambda nuisance, step: FINE)
    seen, held = split_for_judge(data, loop, seed=7)
    pixels = {image.numpy().tobytes() for image in (torch.cat(spy.seen) * 255).round().byte()}
    assert pixels == {image.numpy().tobytes() for image in seen.images}
    assert not pixels & {image.numpy().tobytes() for image in held.images}


def test_sets_of_the_judge_number_the_chosen_classes():
    data = digits((30, 0, 45, 60))
    seen, held = split_for_judge(data, settings(classes=["3", "2"]), seed=1)
    assert seen.class_names == held.class_names == ("2", "3")
    assert seen.counts.tolist() == [36, 48]
    assert held.counts.tolist() == [9, 12]
    own = {image.numpy().tobytes(): int(label) for image, label in zip(data.images, data.labels, strict=True)}
    assert [own[image.numpy().tobytes()] for image in held.images] == [2] * 9 + [3] * 12


@pytest.mark.parametrize("counts", [(150,), (30, 30, 30)])
def test_too_little_to_look_at_is_named(counts):
    with pytest.raises(DataError, match=r"monitoring a fit needs two classes and 20 held-out images, got \d"):
        split_for_judge(digits(counts), settings(), seed=0)


class MeansJudge:
    """The nearest class mean of the pixels."""

    def __init__(self, means):
        self.means = means

    def __call__(self, images):
        return -torch.cdist(self.features(images), self.means)

    def features(self, images):
        return images.flatten(1)


def test_figures_of_a_nuisance_that_does_nothing_and_of_one_that_does():
    """With the class means as judge: an identity keeps all and scores 0, a half turn loses classes."""
    seen, held = split_for_judge(digits((100, 100, 100)), settings(), seed=0)
    ink = seen.float_images().flatten(1)
    means = torch.stack([ink[seen.labels == label].mean(0) for label in range(3)])
    look = make_evaluator(seen, held, judge=MeansJudge(means), seed=0)
    still = look(Identity(), 1)
    assert still["accuracy_kept"] == still["precision"] == still["coverage"] == 1
    assert still["diversity"] == compute_score(still) == 0
    turned, again = look(Rotation(180), 1), look(Rotation(180), 9)
    assert turned == again, "looks differ by the translator alone"
    assert turned["accuracy_kept"] < 0.9
    assert turned["diversity"] > 0.3
    assert compute_score(look(Rotation(20), 1)) > 0


def test_halves_of_a_look_share_no_group(monkeypatch):
    data = replace(digits((100, 100)), groups=torch.arange(200) // 5)
    seen, held = split_for_judge(data, settings(), seed=0)
    given = []
    monkeypatch.setattr(monitoring, "assess", lambda nuisance, data, **_: given.append((data.images, data.groups)))
    look = make_evaluator(seen, held, judge=None, seed=0, most=25)
    with pytest.raises(AttributeError):  # no figures
        look(Identity(), 1)
    group_of = {image.numpy().tobytes(): int(group) for image, group in zip(data.images, data.groups, strict=True)}
    images, groups = given[0]
    assert [group_of[image.numpy().tobytes()] for image in images] == groups.tolist()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({}, [1, 1, 1, 1]),
        ({"precision": 1.4, "coverage": 0.5}, [1, 1, 0.5, 1]),
        ({"accuracy_kept": 0.8, "diversity": 0.04}, [0.8, 1, 1, 0.8]),
        ({"diversity": 0.0}, [0, 1, 1, 1]),
        ({"accuracy_kept": math.nan}, [0, 1, 1, 1]),
    ],
)
def test_score_is_a_harmonic_mean(change, parts):
    assert compute_score({**FINE, **change}) == pytest.approx(harmonic_mean(parts))


# ---- what is done about it


def test_best_weights_are_kept_and_patience_ends_the_fit(tmp_path):
    values = [0.2, 0.9, 0.5, 0.6, 0.95, 1.0]
    look, said = scripted(*({"precision": value} for value in values)), []
    fitted = fit(tmp_path / "run", look, said=said, steps=12, watch_every=1, patience=2)
    assert [step for step, _ in look.seen] == [1, 2, 3, 4]
    best = look.seen[1][1]
    assert all(torch.equal(value, best[name]) for name, value in fitted.state_dict().items())
    assert all(torch.equal(value, best[name]) for name, value in weights(tmp_path / "run").items())
    assert not torch.equal(look.seen[3][1]["width_shares"], best["width_shares"])
    assert said == ["step 4: stopped, no better score in 2 evaluations since step 2"]
    run = Run(tmp_path / "run", kind="fit", seed=7, resume=True)
    assert [row["quality_precision"] for row in run.metrics() if "quality_score" in row] == values[:4]
    assert (tmp_path / "run" / "samples" / "kept.png").exists()

    again = scripted()
    fit(tmp_path / "run", again, said=said, resume=True, steps=12, watch_every=1, patience=2)
    assert again.seen == [], "a fit that stopped for good makes no more steps"
    assert all(torch.equal(value, best[name]) for name, value in weights(tmp_path / "run").items())


def test_each_collapse_is_named_when_it_begins_and_when_it_ends(tmp_path):
    figures = [
        {"accuracy_kept": 0.3},
        {"accuracy_kept": 0.2, "diversity": 0.001},
        {"accuracy_kept": 0.72, "diversity": 0.001},  # better, and not yet well
        {"accuracy_kept": 0.9, "diversity": math.nan},
        {"accuracy_kept": 0.9, "diversity": 0.2},
        {"accuracy_kept": 0.69, "diversity": 0.2},
    ]
    said = []
    fit(tmp_path / "run", scripted(*figures), said=said, watch_every=1)
    assert said == [
        "step 1: identity collapse: translated images lose their class (accuracy_kept 0.3, below 0.7)",
        "step 2: mode collapse: draws of one image hardly differ (diversity 0.001, below 0.03)",
        "step 4: no identity collapse any more (accuracy_kept 0.9)",
        "step 5: no mode collapse any more (diversity 0.2)",
        "step 6: identity collapse: translated images lose their class (accuracy_kept 0.69, below 0.7)",
    ]
    run = Run(tmp_path / "run", kind="fit", seed=7, resume=True)
    assert [f"step {row['step']}: {row['note']}" for row in run.metrics() if "note" in row] == said


@pytest.mark.parametrize("name", ["spatial", "munit"])
def test_watched_and_averaged_resumed_equals_uninterrupted_to_the_bit(name, tmp_path):
    how = {"average": 0.5, "watch_every": 2, "name": name}
    fit(tmp_path / "straight", measured, **how)
    with pytest.raises(Interrupted):
        fit(tmp_path / "halted", measured, whole=interrupt(objective(name), 5), **how)
    fit(tmp_path / "halted", measured, whole=objective(name, seed=99), resume=True, **how)
    expected, got = weights(tmp_path / "straight"), weights(tmp_path / "halted")
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    files = [
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.stem != "run"}
        for folder in (tmp_path / "straight", tmp_path / "halted")
    ]
    assert files[0] == files[1]


def test_a_judge_is_needed_and_a_watched_checkpoint(tmp_path):
    with pytest.raises(SettingsError, match=r"fit.watch_every needs a judge"):
        fit(tmp_path / "run", watch_every=2)
    fit(tmp_path / "plain", steps=2)
    with pytest.raises(CheckpointError, match="use the settings it was fitted with"):
        fit(tmp_path / "plain", measured, resume=True, watch_every=2)


# ---- the average of the weights


def test_the_average_by_hand(tmp_path, monkeypatch):
    """The first step counts whole, later ones by 1 - min(decay, (1 + n) / (10 + n)); grids show the average."""
    whole, trail, grids = objective("spatial"), [], []
    rates = whole.compute_learning_rates
    whole.compute_learning_rates = lambda step, steps: (
        trail.append(whole.translator.width_shares.detach().clone().clamp(0, 1)) or rates(step, steps)
    )
    monkeypatch.setattr(
        "gen_invariance.translator.fit.write_grid",
        lambda name, translator, *_: grids.append(translator.width_shares.detach().clone()),
    )
    fitted = fit(tmp_path / "run", whole=whole, average=0.3, steps=6, sample_every=3)
    last = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000006.ckpt")["translator"]["width_shares"]
    average = trail[1]
    for count, current in enumerate([*trail[2:], last], start=1):
        decay = min(0.3, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * current
        if count == 2:
            torch.testing.assert_close(grids[0], average)
    torch.testing.assert_close(fitted.width_shares.detach(), average)
    torch.testing.assert_close(weights(tmp_path / "run")["width_shares"], average)
    assert not torch.allclose(average, last, atol=1e-4)


# ---- time


class Clock:
    """Each look at the time takes a second."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        self.now += 1.0
        return self.now


def test_the_budget_ends_the_fit_and_all_its_parts_count(tmp_path, monkeypatch):
    monkeypatch.setattr(monitoring, "time", Clock())
    fit(tmp_path / "whole", name="munit")
    said = []
    fit(tmp_path / "run", name="munit", budget="3s", said=said)
    run = Run(tmp_path / "run", kind="fit", seed=7, resume=True)
    state = run.load_latest()
    assert state["step"] == 3
    assert state["seconds"] >= 3
    assert said == ["step 3: stopped, fit.budget=3s is used up"]
    assert (run.path / "samples" / "step-00000003.png").exists()
    assert weights(run.path)

    spent = objective("munit", seed=5)
    spy = Watch(spent)
    fit(tmp_path / "run", whole=spent, resume=True, budget="3s", said=said)
    assert spy.seen == []
    assert said[1:] == said[:1]
    fit(tmp_path / "run", whole=objective("munit", seed=5), resume=True, budget="0.2h")
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("name", ["pose", "redraw", "img2img"])
@pytest.mark.parametrize("change", [{"budget": "1h"}, {"average": 0.5}, {"watch_every": 5}])
def test_settings_that_would_be_passed_over_are_refused(name, change):
    with pytest.raises(SettingsError, match=f"'{name}' is fitted in one go, so it has no fit.{next(iter(change))}"):
        fit_translator(name, digits(), settings(**change))


def test_flow_is_watched_and_has_its_own_average(tmp_path):
    with pytest.raises(SettingsError, match="keeps an average anyway"):
        fit_translator("flow", digits(), settings(average=0.5))
    look, said = scripted({"precision": 0.9}, {"precision": 0.4}, {"precision": 0.3}), []
    run = Run(tmp_path / "run", kind="fit", seed=7)
    loop = settings(watch_every=1, patience=1, sample_every=9)
    small = {"width": 16, "bank_size": 8}
    fit_translator("flow", digits(), loop, network=small, out=run, progress=False, evaluate=look, say=said.append)
    assert said == ["step 2: stopped, no better score in 1 evaluations since step 1"]
    assert all(torch.equal(value, look.seen[0][1][name]) for name, value in weights(run.path).items())
