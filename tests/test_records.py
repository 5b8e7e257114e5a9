import csv
import json
import math
import os
import signal
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gen_invariance.errors import DataError, DataNotFoundError, OutputError, SettingsError
from gen_invariance.records import (
    Cell,
    Record,
    RecordWriter,
    as_frame,
    finished_cells,
    load_records,
    measured,
    provenance,
    write_csv,
)
from gen_invariance.report.metrics import METRICS, metric_info
from gen_invariance.report.summary import repetitions, summarise


def record(**changes):
    facts = {"benchmark": "digits", "method": "DRS", "seed": 0, "metric": "balanced_accuracy", "value": 0.5}
    return Record(**{**facts, "config_digest": "aa", "versions": {"torch": "2.13.0"}, **changes})


def cell(seed=0, method="DRS", classes=4):
    whole = record(seed=seed, method=method, value=0.5 + seed / 10)
    return [whole] + [
        record(
            seed=seed, method=method, metric="ekld", value=k + seed, class_name=f"k{k}", class_index=k, class_count=9
        )
        for k in range(classes)
    ]


def test_what_is_written_is_read_back(tmp_path):
    unusual = record(
        class_name='<b> "é"\n\u2028',
        class_index=3,
        class_count=7,
        group="few",
        data_digest="d",
        commit="c",
        seconds=1.5,
        metric="ekld",
        value=math.nan,
        command="gen-invariance demo 'a b'",
    )
    infinite = record(metric="few_ekld", value=math.inf)
    writer = RecordWriter(tmp_path / "records")
    writer.write([unusual, infinite])
    writer.write(record(seed=1))
    frame = load_records(tmp_path / "records")
    pd.testing.assert_frame_equal(frame, as_frame([unusual, infinite, record(seed=1)]))
    assert frame["class_name"][0] == unusual.class_name
    assert np.isnan(frame["value"][0])
    assert frame["value"][1] == math.inf
    assert frame["versions"][2] == {"torch": "2.13.0"}
    for line in writer.path.read_text().split("\n")[:-1]:
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_each_writer_has_a_file_of_its_own_and_a_single_file_can_be_read(tmp_path):
    first, second = RecordWriter(tmp_path), RecordWriter(tmp_path)
    first.write(record(seed=0))
    second.write(record(seed=1))
    assert first.path != second.path
    assert load_records(tmp_path)["seed"].tolist() == [0, 1]
    assert load_records(second.path)["seed"].tolist() == [1]


def test_a_forked_writer_takes_a_new_file(tmp_path):
    writer = RecordWriter(tmp_path)
    writer.write(record(seed=0))
    child = os.fork()
    if child == 0:
        writer.write(record(seed=1))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    writer.write(record(seed=2))
    assert sorted(load_records(tmp_path)["seed"]) == [0, 1, 2]
    assert sorted(path.read_text().count("\n") for path in tmp_path.iterdir()) == [1, 2]


def test_a_figure_measured_twice_counts_once_as_last_written(tmp_path):
    old, new = RecordWriter(tmp_path), RecordWriter(tmp_path)
    new.path = tmp_path / "records-0.jsonl"  # sorts before any other file, so file order alone would keep the old one
    new._owner = os.getpid()
    old.write([record(value=0.1), record(value=0.2, metric="ekld", class_index=1, class_name="a")])
    new.write([record(value=0.3)])
    frame = load_records(tmp_path)
    assert len(frame) == 2
    assert frame.set_index("metric")["value"].to_dict() == {"balanced_accuracy": 0.3, "ekld": 0.2}


def test_other_seeds_classes_and_configurations_are_other_figures():
    records = [record(), record(seed=1), record(method="x"), record(config_digest="bb"), record(metric="ekld"),
               record(class_index=1), record(class_index=2), record(class_name="a"), record(group="few"),
               record(benchmark="b")]  # fmt: skip
    assert len(as_frame(records)) == len(records) == len({entry.key for entry in records})


@pytest.mark.parametrize("cut", [1, 30, -1])
def test_a_half_written_last_line_is_passed_over_silently(tmp_path, cut, recwarn):
    writer = RecordWriter(tmp_path)
    writer.write([record(seed=0), record(seed=1)])
    content = writer.path.read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    writer.path.write_bytes(content[:last] + content[last:-1][:cut])
    assert load_records(tmp_path)["seed"].tolist() == [0]
    assert len(recwarn) == 0


def test_a_damaged_line_is_named_and_its_cell_is_unfinished(tmp_path):
    writer = RecordWriter(tmp_path)
    writer.write_cell(cell(seed=0))
    writer.write_cell(cell(seed=1))
    assert finished_cells(tmp_path) == {Cell("digits", "aa", "DRS", 0), Cell("digits", "aa", "DRS", 1)}
    lines = writer.path.read_text().splitlines(keepends=True)
    lines[2] = '{"seed": 0, "value": 3}\n'
    writer.path.write_text("".join(lines))
    with pytest.warns(UserWarning, match=r"line 3 is damaged"):
        assert finished_cells(tmp_path) == {Cell("digits", "aa", "DRS", 1)}


def test_a_cell_is_finished_by_its_marker_only(tmp_path):
    assert finished_cells(tmp_path / "not yet") == set()
    writer = RecordWriter(tmp_path)
    writer.write(cell(seed=0))
    writer.write_failure(record(seed=2), ValueError("no image of 'a'"))
    assert finished_cells(tmp_path) == set()
    writer.write_cell(cell(seed=1))
    assert finished_cells(load_records(tmp_path)) == {Cell("digits", "aa", "DRS", 1)}
    frame = load_records(tmp_path)
    assert frame.loc[frame["metric"] == "failed", "group"].item() == "ValueError: no image of 'a'"
    assert set(measured(frame)["metric"]) == {"balanced_accuracy", "ekld"}
    writer.write_cell(cell(seed=0))
    assert Cell("digits", "aa", "DRS", 0) in finished_cells(tmp_path)


def test_write_cell_takes_one_whole_cell(tmp_path):
    writer = RecordWriter(tmp_path)
    for wrong in ([], cell(seed=0) + cell(seed=1)):
        with pytest.raises(SettingsError, match="exactly one cell"):
            writer.write_cell(wrong)
    with pytest.raises(SettingsError, match="one figure twice"):
        writer.write_cell([record(), record(value=0.7)])
    assert list(tmp_path.iterdir()) == []


def start_worker(folder, name, cells):
    """Fork a process that writes `cells` cells of 40 records, and return its id."""
    child = os.fork()
    if child == 0:
        writer = RecordWriter(folder)
        for seed in range(cells):
            facts = {"benchmark": "b", "method": name, "seed": seed, "metric": "m", "value": seed}
            writer.write_cell([record(**facts, class_index=k, class_name="x" * 200) for k in range(40)])
        os._exit(0)
    return child


def test_killed_and_concurrent_writers_lose_and_double_nothing(tmp_path):
    killed = [start_worker(tmp_path, f"killed{n}", 1_000_000) for n in range(2)]
    whole = start_worker(tmp_path, "whole", 30)
    assert os.waitpid(whole, 0)[1] == 0
    for worker in killed:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    frame = measured(load_records(tmp_path))
    cells = finished_cells(tmp_path)
    assert {seed for _, _, method, seed, _ in cells if method == "whole"} == set(range(30))
    assert {method for _, _, method, _, _ in cells} == {"whole", "killed0", "killed1"}
    sizes = frame.groupby(["method", "seed"]).size()
    for _, _, method, seed, _ in cells:
        assert sizes[method, seed] == 40
    assert len(sizes) - len(cells) <= 2  # at most the cell in hand of each killed writer
    assert (frame["value"] == frame["seed"]).all()


def test_class_orders_are_told_apart(tmp_path):
    writer = RecordWriter(tmp_path)
    for order in (None, 0, 1):
        writer.write_cell([record(order=order, value=0.1 * (order or 0))])
    found = Cell("digits", "aa", "DRS", 0)
    assert finished_cells(tmp_path) == {found, found._replace(order=0), found._replace(order=1)}
    frame = measured(load_records(tmp_path))
    assert frame["order"].isna().tolist() == [True, False, False]
    assert frame["value"].tolist() == [0.0, 0.0, 0.1]


def test_training_seeds_are_averaged_within_class_orders():
    """The interval is over orders: 0.2 and 0.6, not over the four trainings."""
    values = {(0, 0): 0.1, (0, 1): 0.3, (1, 0): 0.5, (1, 1): 0.7}
    records = [record(order=order, seed=seed, value=value) for (order, seed), value in values.items()]
    better = [record(order=order, seed=seed, value=value + 0.1 * (order + 1), method="GIT")
              for (order, seed), value in values.items()]  # fmt: skip
    alone = [record(benchmark="other", order=3, seed=seed, value=seed) for seed in (0, 1)]
    frame = as_frame([*records, *better, *alone])
    found = repetitions(frame)
    assert found["value"].tolist() == pytest.approx([0.2, 0.6, 0.3, 0.8, 0, 1])
    assert found["seed"].tolist() == [0, 1, 0, 1, 0, 1]
    summary = summarise(frame[frame["benchmark"] == "digits"], baseline="DRS").set_index("method")
    assert summary.loc["DRS", ["mean", "seeds"]].tolist() == pytest.approx([0.4, 2])
    assert summary.loc["GIT", ["difference", "pairs"]].tolist() == pytest.approx([0.15, 2])
    half_width = stats.t.ppf(0.975, 1) * np.std([0.1, 0.2], ddof=1) / math.sqrt(2)
    assert summary.loc["GIT", "difference_half_width"] == pytest.approx(half_width)
    pd.testing.assert_frame_equal(repetitions(found), found)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_a_later_write_is_whole(tmp_path, monkeypatch):
    writer = RecordWriter(tmp_path)
    writer.write(record(seed=0))
    real_write = os.write

    def half_then_full(descriptor, view):
        monkeypatch.setattr(os, "write", lambda descriptor, view: real_write(os.open("/dev/full", os.O_WRONLY), view))
        return real_write(descriptor, bytes(view[: len(view) // 2]))

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(OutputError, match="No space left"):
        writer.write(record(seed=1))
    monkeypatch.undo()
    writer.write(record(seed=2))
    assert load_records(tmp_path)["seed"].tolist() == [0, 2]
    assert writer.path.read_text().count("\n") == 2


def test_bad_places_and_bad_records_are_one_line_errors(tmp_path):
    with pytest.raises(DataNotFoundError, match="no records at"):
        load_records(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        RecordWriter(tmp_path / "file").write(record())
    with pytest.raises(SettingsError, match=r"record\.method must not be empty"):
        record(method="")
    with pytest.raises(SettingsError, match=r"record\.value must be a finite number, got 'high'"):
        record(value="high")


def test_an_empty_folder_gives_an_empty_frame(tmp_path):
    frame = load_records(tmp_path)
    assert len(frame) == 0
    assert len(summarise(frame)) == 0
    assert list(frame) == list(as_frame([record()]))


def seeds_of(method, values, **changes):
    return [record(method=method, seed=seed, value=value, **changes) for seed, value in enumerate(values)]


def test_the_summary_is_scipys_mean_interval_and_paired_test():
    ours, base = [0.70, 0.68, 0.74, 0.69], [0.60, 0.63, 0.61, 0.66]
    records = seeds_of("ours", ours) + list(reversed(seeds_of("DRS", base))) + seeds_of("ours", [1, 2], metric="ekld")
    summary = summarise(as_frame(records), baseline="DRS").set_index(["method", "metric"])
    row = summary.loc["ours", "balanced_accuracy"]
    low, _ = stats.t.interval(0.95, 3, loc=np.mean(ours), scale=stats.sem(ours))
    assert row["mean"] - row["half_width"] == pytest.approx(low)
    assert row["difference"] == pytest.approx(np.mean(ours) - np.mean(base))
    assert row["t_p_value"] == pytest.approx(stats.ttest_rel(ours, base).pvalue)
    assert row["permutation_p_value"] == pytest.approx(2 / 2**4)
    assert (row["seeds"], row["pairs"]) == (4, 4)
    assert np.isnan(summary.loc["DRS", "balanced_accuracy"]["difference"])
    assert np.isnan(summary.loc["ours", "ekld"]["difference"])


def test_only_common_seeds_are_paired():
    records = [record(method="a", seed=s, value=s) for s in (0, 1, 2)] + [
        record(seed=s, value=10 + s) for s in (1, 2, 7)
    ]
    row = summarise(as_frame(records), baseline="DRS").set_index("method").loc["a"]
    assert (row["seeds"], row["pairs"], row["difference"]) == (3, 2, -10)


def test_classes_and_groups_are_summarised_apart():
    frame = as_frame(cell(seed=0) + cell(seed=1) + cell(seed=0, method="b") + [record(group="few", value=0.9)])
    summary = summarise(frame, baseline="DRS")
    assert len(summary) == 1 + 4 + 1 + 4 + 1
    one = summary[(summary["class_index"] == 2) & (summary["method"] == "DRS")].iloc[0]
    assert (one["mean"], one["seeds"], one["class_name"], one["class_count"]) == (2.5, 2, "k2", 9)
    other = summary[(summary["class_index"] == 2) & (summary["method"] == "b")].iloc[0]
    assert (other["difference"], other["pairs"]) == (0, 1)


def test_two_configurations_are_never_averaged_silently():
    frame = as_frame(seeds_of("DRS", [0.1, 0.2]) + seeds_of("DRS", [0.5, 0.7], config_digest="bb"))
    with pytest.raises(DataError, match="'aa', 'bb'"):
        summarise(frame)
    assert summarise(frame[frame["config_digest"] == "bb"])["mean"].item() == pytest.approx(0.6)


def test_pairs_on_different_data_are_left_out():
    records = seeds_of("DRS", [0.1, 0.2], data_digest="x") + seeds_of("a", [0.2, 0.3], data_digest="y")
    rows = summarise(as_frame(records), baseline="DRS")
    assert rows["mean"].tolist() == pytest.approx([0.15, 0.25])
    assert rows["difference"].isna().all()
    assert rows["pairs"].tolist() == [0, 0]


def test_a_missing_baseline_is_named_with_the_choice():
    with pytest.raises(SettingsError, match="baseline 'DSR' has no record; choose one of 'DRS'"):
        summarise(as_frame([record()]), baseline="DSR")


def test_csv_holds_every_record(tmp_path):
    frame = as_frame([*cell(), record(class_name='a,"b"\nc', class_index=0, commit="é")])
    write_csv(frame, tmp_path / "deep" / "records.csv")
    again = pd.read_csv(tmp_path / "deep" / "records.csv", keep_default_na=False)
    assert again["class_name"].tolist() == ["", "k0", "k1", "k2", "k3", 'a,"b"\nc']
    assert json.loads(again["versions"][0]) == {"torch": "2.13.0"}


@pytest.mark.parametrize(
    "text", ["=1+1", "=cmd|'/C calc'!A0", "+x", "-x", "@SUM(A1)", "\t=1", " =1", "\r@x", "-1-1", "--1"]
)
def test_no_cell_of_a_csv_is_a_formula(tmp_path, text):
    plain = ["-1.5", "a=b", "'x", "", "é", "-1e3"]
    write_csv(pd.DataFrame({text: [text, *plain], "value": [-1.5, *range(6)]}), tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == [f"'{text}", "value"]
    assert [row[0] for row in rows[1:]] == [f"'{text}", *plain]
    assert rows[1][1] == "-1.5"


def test_provenance_fits_a_record():
    entry = Record(benchmark="b", method="m", seed=0, metric="x", value=1, **provenance())
    assert entry.versions["python"] == sys.version.split()[0]


def test_known_metrics_say_unit_and_direction_and_unknown_ones_stay_plain():
    names = {"balanced_accuracy", "many_accuracy", "medium_accuracy", "few_accuracy", "accuracy", "ekld", "agreement",
             "few_ekld", "mean_ekld", "learned_ekld", "mean_learned_ekld", "fit_seconds", "train_seconds",
             "calibration_error", "many_calibration_error", "medium_calibration_error",
             "few_calibration_error"}  # fmt: skip
    assert set(METRICS) == names
    lower = {name for name in names if not METRICS[name].higher_is_better}
    assert lower == {name for name in names if any(word in name for word in ("ekld", "seconds", "error"))}
    assert metric_info("balanced_accuracy").show(0.12345) == "12.3"
    assert metric_info("ekld").show(math.nan) == "n/a"
    assert metric_info("mean_width").title == "Mean width"


@pytest.mark.parametrize("ahead", [1e10, 9e14, 1e300, "Infinity", "NaN", "null"])
def test_what_is_written_last_counts_whatever_the_clocks_say(tmp_path, ahead):
    RecordWriter(tmp_path).write_cell([record(value=0.1)])
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    text = "".join(json.dumps(row).replace(json.dumps(row["written"]), str(ahead)) + "\n" for row in rows)
    (tmp_path / "records-ahead.jsonl").write_text(text)
    file.unlink()
    for value in (0.2, 0.3):
        RecordWriter(tmp_path).write_cell([record(value=value)])
        assert measured(load_records(tmp_path))["value"].tolist() == [value]
    writer = RecordWriter(tmp_path)
    for value in (0.4, 0.5):
        writer.write_cell([record(value=value)])
        assert measured(load_records(tmp_path))["value"].tolist() == [value]


def test_a_pipe_among_the_records_is_named(tmp_path):
    os.mkfifo(tmp_path / "records-0.jsonl")
    RecordWriter(tmp_path).write(record())
    with pytest.raises(OSError, match="not a regular file"):
        load_records(tmp_path)
