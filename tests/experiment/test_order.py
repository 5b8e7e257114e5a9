import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError, SettingsError, ShapeError
from gen_invariance.experiment.order import choose_subsets, list_figures, run_order
from gen_invariance.experiment.settings import OrderRun
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.order import separability
from gen_invariance.order.cells import Cells, Plan
from gen_invariance.order.relation import SubsetOrder
from gen_invariance.order.settings import AnalysisSettings, OrderSettings, SourceSettings
from gen_invariance.report.order_page import findings

CLASSES = 4
PATTERNS = torch.randint(30, 226, (CLASSES, 1, 6, 6), generator=torch.Generator().manual_seed(5))


def images(per_class, seed, classes=CLASSES, names="abcd"):
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randint(-60, 60, (len(labels), 1, 6, 6), generator=torch.Generator().manual_seed(seed))
    return ImageData((PATTERNS[labels] + noise).clamp(0, 255).to(torch.uint8), labels, tuple(names), "toy")


TRAIN, TEST = images(16, 0), images(14, 1)
FAST = AnalysisSettings(threshold=0.9, resamples=100)
TWO = {"choose": "list", "subsets": ((0, 1), (2, 3)), "seeds": (0, 1)}


def projection(subset, seed):
    """A backbone without training: it keeps its classes' patterns and some noise of its seed."""
    own = PATTERNS[list(subset)].flatten(1).float() / 255 if subset else torch.zeros(1, 36)
    noise = torch.randn(2, 36, generator=torch.Generator().manual_seed(seed)) * 0.1
    weight = torch.cat([own - 0.5, noise])
    return lambda batch: (batch.flatten(1) - 0.5) @ weight.T


def study(out=None, *, fit=projection, images=(TRAIN, TEST), nuisance=None, resume=False, seed=0, **options):
    """A run on toy images; without `out` in memory, which leaves pictures, tables and page out."""
    options = {"choose": "pairs", "seeds": (0, 1, 2), "pool": 8, "analysis": FAST, **options}
    settings = OrderRun(order=OrderSettings(**options), out=out and str(out), resume=resume, seed=seed, device="cpu")
    return run_order(settings, images=images, fit_backbone=fit, nuisance=nuisance)


def test_everything_is_written_and_says_the_same(tmp_path):
    found = study(tmp_path / "run", subsets=((0, 1, 2, 3),), nuisance=Rotation(20), draws=2, invariance_images=4)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"order.json", "order.svg", "order.png", "order.dot", "order.txt", "order.html", "subsets.csv"} <= names
    assert len(list((folder / "cells").iterdir())) == 8 * 3
    about = json.loads((folder / "run.json").read_text())
    assert about["kind"] == "order"
    assert about["config"]["train"] == TRAIN.digest
    again = SubsetOrder.load(folder / "order.json")
    assert again.to_json() == found.order.to_json()
    assert found.order.subsets[0] == ()
    assert (0, 1, 2, 3) in found.order.maximal(relation="estimated")
    assert found.facts["all_classes_on_top"]
    assert len(found.table) == 8
    assert set(found.predictors["price"]) == {"before training", "after training"}
    assert np.isnan(found.predictors.set_index("predictor").loc["leep", "tau"]), "no source head, no LEEP"
    assert found.measured.ekld.shape == (3, 8, 4)
    page = (folder / "order.html").read_text()
    assert all(line.split("{")[0][:30] in page for line in findings(found)[:3])
    assert "http" not in page.replace("http-equiv", "").split("<img")[0]
    records = list(list_figures(found))
    assert {record["metric"] for record in records} == {"separated_pairs", "balanced_accuracy", "ekld"}
    by_seed = [r["value"] for r in records if r["metric"] == "separated_pairs" and r["method"] == "{a, b}"]
    assert len(by_seed) == 3


def test_heads_know_the_groups_of_their_samples(monkeypatch):
    real, given = separability.split_indices, []

    def spy(labels, **options):
        given.append(options["groups"])
        return real(labels, **options)

    monkeypatch.setattr(separability, "split_indices", spy)
    train = replace(TRAIN, groups=torch.arange(len(TRAIN)) // 2)
    found = study(images=(train, TEST), choose="list", subsets=((0, 1),), seeds=(0,), head="logistic")
    assert given
    assert all(len(groups) == 2 * len(groups.unique()) for groups in given)
    groups = found.measured.cached((), 0)["train_groups"]
    assert len(set(groups.tolist())) * 2 == len(groups)


def test_two_shots_show_two_groups():
    train = replace(TRAIN, groups=torch.where(torch.arange(64) % 16 == 5, 99, TRAIN.labels))
    rows = Plan(train, TEST, torch.arange(64), shots=2).rows(seed=0)
    assert sorted(train.groups[rows].tolist()) == [0, 1, 2, 3, 99, 99, 99, 99]


def test_separated_pairs_are_those_of_the_features():
    found = study()
    measured = found.measured
    for row, subset in enumerate(measured.subsets):
        for line, seed in enumerate(measured.seeds):
            data = measured.features(subset, seed)
            means = torch.stack([data.train[data.train_labels == c].mean(0) for c in range(4)])
            distance = torch.cdist(data.test, means)
            right = (distance.argmin(1) == data.test_labels).double()
            per_class = [right[data.test_labels == c].mean() for c in range(4)]
            assert measured.on_target((0, 1, 2, 3))[line, row] == pytest.approx(float(np.mean(per_class)), abs=0.02)


def test_a_killed_run_goes_on_and_gives_the_same(tmp_path):
    whole = study(tmp_path / "one/run", **TWO)
    calls = []

    def failing(subset, seed):
        calls.append((subset, seed))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return projection(subset, seed)

    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "two/run", fit=failing, **TWO)
    path = Cells(tmp_path / "two/run").path(*calls[0])
    path.write_bytes(path.read_bytes()[:100])  # a damaged cell is measured again
    calls.clear()
    resumed = study(tmp_path / "two/run", fit=lambda s, r: calls.append((s, r)) or projection(s, r), resume=True, **TWO)
    assert len(calls) == 3 * 2 - 3 + 1
    assert resumed.order.to_json() == whole.order.to_json()
    assert (tmp_path / "two/run/order.svg").read_bytes() == (tmp_path / "one/run/order.svg").read_bytes()


def test_another_threshold_or_more_seeds_reuse_the_cells_and_other_training_does_not(tmp_path):
    study(tmp_path / "run", **TWO)
    calls = []
    fit = lambda s, r: calls.append((s, r)) or projection(s, r)  # noqa: E731
    study(tmp_path / "run", fit=fit, resume=True, analysis=replace(FAST, threshold=0.8), head="knn", **TWO)
    assert calls == []
    more = study(tmp_path / "run", fit=fit, resume=True, **{**TWO, "seeds": (0, 1, 2)})
    assert {seed for _, seed in calls} == {2}
    assert more.order.about["seeds"] == 3
    with pytest.raises(SettingsError, match="settings differ from the run's in source"):
        study(tmp_path / "run", resume=True, source=SourceSettings(epochs=7), **TWO)
    with pytest.raises(SettingsError, match="already holds a run"):
        study(tmp_path / "run", **TWO)


def test_another_nuisance_is_noticed(tmp_path):
    options = {**TWO, "seeds": (0,), "draws": 1, "invariance_images": 2}
    study(tmp_path / "run", nuisance=Rotation(30), **options)
    before = (tmp_path / "run" / "order.json").read_bytes()
    for other in (Rotation(60), None):
        with pytest.raises(SettingsError, match="settings differ from the run's in nuisance"):
            study(tmp_path / "run", nuisance=other, resume=True, **options)
    study(tmp_path / "run", nuisance=Rotation(30.0), resume=True, **options)
    assert (tmp_path / "run" / "order.json").read_bytes() == before


@pytest.mark.parametrize(("part", "words"), [(0, "its training images;"), (1, "its test images;")])
def test_other_images_are_noticed(tmp_path, part, words):
    options = {**TWO, "seeds": (0,)}
    study(tmp_path / "run", **options)
    altered = [TRAIN, TEST]
    pixels = altered[part].images.clone()
    pixels[3, 0, 2, 2] ^= 1
    altered[part] = replace(altered[part], images=pixels)
    with pytest.raises(SettingsError, match=f"settings differ from the run's in {words}"):
        study(tmp_path / "run", images=tuple(altered), resume=True, **options)


def test_diverged_runs_are_missing_and_never_zero():
    def fit(subset, seed):
        if subset == (0, 1) and seed == 1:
            return lambda batch: torch.full((len(batch), 3), torch.nan)
        if subset == (2, 3):
            return lambda batch: torch.ones(len(batch), 3)  # constant features
        return projection(subset, seed)

    found = study(fit=fit, fewest_seeds=2)
    assert (2, 3) not in found.order.subsets
    assert (0, 1) in found.order.subsets
    assert found.measured.seeds == (0, 2)
    notes = "\n".join(found.facts["notes"])
    assert "4 diverged or missing runs" in notes
    assert "{c, d} is left out" in notes
    assert "2 of 3 seeds" in notes
    with pytest.raises(DataError, match="lower the learning rate"):
        study(fit=lambda s, r: lambda batch: torch.ones(len(batch), 2))


def test_one_seed_one_source_and_one_class():
    found = study(choose="list", subsets=(("a", "b"),), seeds=(0,))
    assert any("seeds=1" in note for note in found.facts["notes"])
    assert found.accuracy is None
    assert np.isnan(found.split_half)
    assert found.order.generalises_to([2]) == ["trivial"] * 2
    assert found.predictors.empty
    with pytest.raises(SettingsError, match="at least 2"):
        study(choose="list", subsets=(("a",),))
    with pytest.raises(SettingsError, match="given twice"):
        study(choose="list", subsets=(("a", "b"), ("b", "a")))


def test_held_out_pairs_are_new_to_every_source():
    analysis = replace(FAST, heldout_classes=(2, 3))
    found = study(analysis=analysis)
    assert found.order.subsets == ((), (0, 1))
    assert found.order.pairs.tolist() == [[2, 3]]
    with pytest.raises(SettingsError, match="held-out class 3 is in a source"):
        study(analysis=analysis, choose="list", subsets=((0, 3),))


def test_relative_thresholds_make_each_pair_reach_its_own():
    found = study(analysis=replace(FAST, relative_margin=0.02))
    place = {tuple(pair): column for column, pair in enumerate(found.order.pairs.tolist())}
    for row, subset in enumerate(found.order.subsets):
        if len(subset) == 2:
            assert found.order.separated[row, place[subset]]
    with pytest.raises(SettingsError, match="every pair among the sources"):
        study(choose="list", subsets=((0, 1),), analysis=replace(FAST, relative_margin=0.02))


def test_own_cuts_need_pairs_and_leave_the_start_out():
    source = SourceSettings(images_per_class=8, epochs=2, batch_size=8)
    found = study(fit=None, head="own", source=source, seeds=(0, 1))
    assert () not in found.order.subsets
    assert found.order.head == "own"
    assert found.order.separated_counts.max() <= 4, "one cut separates at most 2 x 2 pairs of four classes"
    with pytest.raises(SettingsError, match="choose pairs"):
        study(head="own", choose="size", size=3)


@pytest.mark.parametrize("mode", ["partial", pytest.param("joint", marks=pytest.mark.slow)])
def test_other_modes_fine_tune_to_every_pair(mode):
    source = SourceSettings(images_per_class=6, epochs=1, steps=3, batch_size=8)
    found = study(fit=None, mode=mode, choose="list", subsets=((0, 1), (0, 1, 2)), source=source, seeds=(0,))
    assert (found.order.mode, found.order.head) == (mode, "linear")
    assert np.isfinite(found.measured.on_target((0, 1, 2, 3))).all()
    with pytest.raises(SettingsError, match="needs the built-in trainer"):
        study(mode=mode)


def test_built_in_training_with_a_curriculum():
    source = SourceSettings(images_per_class=6, epochs=2, batch_size=8)
    found = study(
        fit=None,
        choose="head",
        sizes=(2, 3, 4),
        source=source,
        seeds=(0, 1),
        curriculum=True,
        head="logistic",
    )
    assert found.order.subsets == ((), (0, 1), (0, 1, 2), (0, 1, 2, 3))
    assert (
        np.isfinite(found.predictors.set_index("predictor").loc["leep", "concordance"])
        or not found.order.estimated.strict.any()
    )


def test_random_subsets_belong_to_the_seed():
    few = {"choose": "random", "count": 2, "seeds": (0,)}
    one, two, other = (study(seed=seed, **few).order.subsets for seed in (3, 3, 5))
    assert one == two != other


def test_choices_of_subsets():
    counts = torch.tensor([5, 20, 10, 1])
    choose = lambda **o: choose_subsets(OrderSettings(**o), class_names="abcd", counts=counts)  # noqa: E731
    assert len(choose(choose="pairs")) == 6
    assert len(choose(choose="all")) == 11
    assert choose(choose="tail", sizes=(2,)) == ((0, 3),)
    assert choose(choose="size", size=3, subsets=(("a", "b"),))[-1] == (0, 1)
    assert choose(choose="head", sizes=(2, 3)) == ((1, 2), (0, 1, 2))
    assert len(choose(choose="random", count=3)) == 3
    held = OrderSettings(choose="pairs", analysis=AnalysisSettings(heldout_classes=(0, 1)))
    assert choose_subsets(held, class_names="abcd", counts=counts) == ((2, 3),)


@pytest.mark.parametrize(
    "bad",
    [
        {"choose": "some"},
        {"mode": "half"},
        {"head": "svm"},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"pool": 0},
        {"shots": 0},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(SettingsError) as caught:
        OrderSettings(**bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"threshold": 0.5},
        {"relative_margin": 0.7},
        {"heldout_classes": (1,)},
        {"predictor_shots": 1},
        {"alpha": 0.5},
        {"simultaneous": "some"},
        {"resamples": 99},
        {"ways": 1},
        {"shots": 0},
    ],
)
def test_bad_analysis_is_refused(bad):
    with pytest.raises(SettingsError):
        AnalysisSettings(**bad)


def test_data_that_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="differ in classes"):
        study(images=(TRAIN, images(10, 0, names="abce")))
    with pytest.raises(DataError, match="no image"):
        study(images=(TRAIN, TEST.subset(torch.arange(20))))


def test_odd_class_names_are_escaped(tmp_path):
    names = ("<script>alert(1)</script>", "b&b", "c", "d")
    study(tmp_path / "run", images=(images(16, 0, names=names), images(14, 1, names=names)), **TWO)
    page = (tmp_path / "run" / "order.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
