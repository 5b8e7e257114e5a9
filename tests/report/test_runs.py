"""Runs of any settings on one page: what they are called, which of them are repetitions, and what is compared."""

import json

import pytest

from gen_invariance.errors import SettingsError
from gen_invariance.records import Record, RecordWriter
from gen_invariance.report.report_page import write_report
from gen_invariance.report.runs import find_method, merge_sources, read_sources
from gen_invariance.report.settings import ReportSettings

CONFIG = {
    "data": {"source": "digits", "path": None, "nuisance": "identity", "largest": 110},
    "stage": {"nuisance": "none", "translator": None},
    "transfer": {"mode": "none"},
    "training": {"epochs": 3},
    "augmentation": "none",
}


@pytest.fixture
def make(tmp_path):
    """A run folder as `train` and `measure` leave it, with the figures `value` and 1 - `value`."""

    def made(name, value=0.5, *, seed=0, method="none", against="lighting", digest=None, facts=None, **changes):
        folder = tmp_path / name
        config = json.loads(json.dumps(CONFIG))
        for key, setting in changes.items():
            group, _, word = key.partition("_")
            config[group] = {**config[group], word: setting} if word else setting
        about = {"kind": "train", "seed": seed, "config": config, "facts": facts or {}}
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps(about))
        measure(folder, value, seed=seed, method=method, against=against, digest=digest or f"images {seed}")
        return folder

    return made


def measure(folder, value, *, seed=0, method="none", against="lighting", digest="images 0", setting="0"):
    benchmark = f"digits against {against}" if against else "digits"
    about = {"benchmark": benchmark, "method": method, "seed": seed, "data_digest": digest, "config_digest": setting}
    figures = {"balanced_accuracy": value, **({"mean_ekld": 1 - value} if against else {})}
    RecordWriter(folder / "records").write_cell([Record(metric=name, value=v, **about) for name, v in figures.items()])


def write_page(folders, out, *, baseline):
    settings = ReportSettings(baseline=None if baseline is None else str(baseline))
    return write_report(folders, out / "page", settings, pictures=())


def frame_of(*folders):
    return merge_sources(read_sources(folders))


def methods(*folders):
    return list(dict.fromkeys(frame_of(*folders)["method"]))


def values(frame, metric="balanced_accuracy"):
    rows = frame[frame["metric"] == metric]
    return {(b, m, s): v for b, m, s, v in rows[["benchmark", "method", "seed", "value"]].itertuples(index=False)}


def test_runs_that_differ_in_everything_are_labelled_by_it(make):
    plain = make("plain")
    full = make("full", transfer_mode="full", training_epochs=4)
    oracle = make("oracle", method="true", stage_nuisance="true", augmentation="randaugment")
    assert methods(plain, full, oracle) == [
        "stage=none",
        "transfer=full, epochs=4",
        "stage=oracle, augmentation=randaugment",
    ]


def test_runs_that_differ_by_the_seed_alone_are_repetitions(make):
    folders = [make("a"), make("b", 0.6, seed=1), make("c", 0.7, method="true", stage_nuisance="true")]
    found = values(frame_of(*folders))
    assert {(method, seed): value for (_, method, seed), value in found.items()} == {
        ("stage=none", 0): 0.5, ("stage=none", 1): 0.6, ("stage=oracle", 0): 0.7}  # fmt: skip
    assert methods(*folders[:2]) == ["none"]  # nothing to tell apart: the name in the records
    assert methods(folders[0], make("again", 0.9)) == ["none", "none (again)"]


def test_a_given_name_wins_where_no_other_run_has_it(make):
    plain, mine = make("a"), make("b", method="mine", training_epochs=9)
    assert methods(plain, mine) == ["epochs=3", "mine"]
    assert methods(plain, mine, make("c", method="mine", training_epochs=12)) == ["epochs=3", "epochs=9", "epochs=12"]


def test_a_run_in_which_nothing_is_translated_is_not_called_a_translator(make):
    nothing = {"given_share": {"rows": 0.0, "classes": 0.0}}
    learned = make("learned", method="translator", stage_nuisance="translator")
    idle = make("idle", method="translator", stage_nuisance="translator", facts=nothing)
    old = make("old", method="translator (nothing translated)", stage_nuisance="translator", training_epochs=4)
    assert methods(learned, idle) == ["stage=translator", "stage=translator (nothing translated)"]
    assert methods(learned, old)[1] == "stage=translator (nothing translated), epochs=4"


def test_other_data_make_another_benchmark_and_another_place_does_not(make, tmp_path):
    one, small = make("one"), make("small", data_largest=50, digest="fewer")
    assert set(frame_of(one, small)["benchmark"]) == {
        "digits [largest=110] against lighting", "digits [largest=50] against lighting"}  # fmt: skip
    moved = make("moved", data_path="elsewhere", training_epochs=9)
    assert set(frame_of(one, moved)["benchmark"]) == {"digits against lighting"}
    changed = make("changed", digest="other images", training_epochs=9)
    page = write_page([one, changed], tmp_path, baseline="one").read_text()
    assert "No paired difference is shown of epochs=9 and epochs=3 at seed 0: their data differ." in page


def test_accuracy_stands_together_whatever_invariance_was_measured_against(make, tmp_path):
    plain = make("plain")
    learned = make("learned", 0.7, method="translator", stage_nuisance="translator", against="translator munit 0123ab")
    frame = frame_of(plain, learned)
    assert set(values(frame)) == {("digits", "stage=none", 0), ("digits", "stage=translator", 0)}
    assert set(values(frame, "mean_ekld")) == {("digits against lighting", "stage=none", 0),
                                               ("digits against translator munit", "stage=translator", 0)}  # fmt: skip
    page = write_page([plain, learned], tmp_path, baseline=None).read_text()
    assert "measured against several nuisances" in page
    measure(learned, 0.7, method="translator")
    assert set(values(frame_of(plain, learned), "mean_ekld")) >= {("digits against lighting", "stage=translator", 0)}


def test_translators_of_one_kind_are_kept_apart_only_where_a_seed_met_both(make):
    first, second = "translator munit 0123ab", "translator munit ba3210"
    seeds = make("a", against=first), make("b", seed=1, against=second)
    assert set(frame_of(*seeds)["benchmark"]) == {"digits against translator munit"}
    both = make("c", against=first), make("d", against=second, training_epochs=9)
    found = {benchmark for benchmark, _, _ in values(frame_of(*both), "mean_ekld")}
    assert found == {f"digits against {first}", f"digits against {second}"}


def test_what_was_measured_twice_counts_once(make):
    folder = make("a")
    measure(folder, 0.8, setting="more draws")
    assert list(values(frame_of(folder)).values()) == [0.8]


def test_the_baseline_is_a_label_a_folder_or_a_place(make, tmp_path):
    folders = [make("plain"), make("other", 0.6, method="true", stage_nuisance="true", training_epochs=9)]
    sources = read_sources(folders)
    for baseline in ("epochs=3", "plain", str(folders[0]), "0", "none"):
        assert find_method(baseline, sources, "baseline") == "epochs=3"
    page = write_page(folders, tmp_path, baseline=0).read_text()
    assert '<th scope="row">epochs=3<small>baseline</small>' in page
    with pytest.raises(SettingsError, match="baseline=x is no method here; choose 'epochs=3', 'stage=o"):
        write_page(folders, tmp_path, baseline="x")


def test_records_of_a_grid_keep_their_names(make, tmp_path):
    grid = tmp_path / "grid"
    measure(grid, 0.4, method="ce_drs+redraw", against="", setting="grid")
    measure(grid, 0.3, method="none", against="", setting="grid")
    found = frame_of(grid, make("run", against="", digest="images 0"))
    assert list(dict.fromkeys(found["method"])) == ["none (2)", "ce_drs+redraw", "none"]
    assert list(dict.fromkeys(frame_of(grid)["method"])) == ["ce_drs+redraw", "none"]
