"""The grid: what is missing is measured, failures stop nothing, shards share out, `kill -9` loses no record."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
from forked import ForkedCommand

from gen_invariance.benchmark import grid as module
from gen_invariance.benchmark.arms import read_arm
from gen_invariance.benchmark.grid import GridCell, load_grid, run_grid
from gen_invariance.benchmark.registry import read_benchmark, read_translator_fit
from gen_invariance.benchmark.run import list_cells, run_benchmark
from gen_invariance.benchmark.settings import BenchmarkRun
from gen_invariance.cli.main import compose, run
from gen_invariance.errors import RunError, SettingsError
from gen_invariance.jobs import Done, run_jobs
from gen_invariance.records import FAILED, finished_cells, load_records, measured
from gen_invariance.report.summary import summarise
from gen_invariance.settings import read_settings
from gen_invariance.translator.quality.discern import tell_apart
from gen_invariance.translator.quality.verdict import weights_digest
from gen_invariance.translator.spatial import SpatialTranslator

QUICK = [
    "training_options={epochs: 2, warmup: 0, checkpoint_every: 1}",
    "data_options={largest: 24, imbalance: 6, test_images: 10, many_above: 12, few_below: 8}",
    "fit_options={spatial: {steps: 2, batch_size: 8}, head_from: 12}",
    "stage_options.policy_options={cutoff: 12}",
    "measure_options={draws: 2}",
]


ARMS = "methods=[ce_drs,ce_drs+spatial]"


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


def words(*more):
    return ["benchmark", "run", "benchmark=digits_rot_lt", *QUICK, *more]


def cells(*more):
    return list_cells(read_settings(BenchmarkRun, compose("benchmark", words(*more)[1:]), ""))


def totals(out):
    """Figures without those that time decides, by cell and metric."""
    frame = measured(load_records(out / "records"))
    frame = frame[~frame["metric"].str.endswith("seconds")]
    return frame.set_index(["benchmark", "method", "order", "seed", "metric", "class_index"])["value"].sort_index()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A grid of two orders, two seeds and two arms, measured in one go."""
    out = tmp_path_factory.mktemp("grid") / "whole"
    assert run(words(ARMS, "orders=0-1", "seeds=0-1", f"out={out}")) == 0
    return out


OLD_CELLS = json.loads((Path(__file__).parent.parent / "fixtures" / "cells_58c00f3.json").read_text())
"""Of commit 58c00f3, by benchmark and arm: digests of the cell alone and with a learned nuisance, folder of its fit."""


FITTED_SHORTER = {"cifar10_lt_if100", "gtsrb_lt"}
"""Whose translators are fitted for minutes by now, not for 140,000 steps: other fits, so other cells."""


@pytest.mark.parametrize("name", OLD_CELLS)
def test_cells_that_an_earlier_version_measured_are_known_by_their_digests(name):
    benchmark = read_benchmark(name)
    learned = read_translator_fit("redraw", benchmark)
    for arm_name, (digest, with_learned, fit_folder) in OLD_CELLS[name].items():
        arm = read_arm(arm_name, benchmark)
        cell = GridCell(benchmark, arm, order=1, seed=0)
        if name in FITTED_SHORTER:
            assert cell.digest == digest or arm.fit.choice != "munit", arm_name
            continue
        assert (cell.digest, cell.fit_folder) == (digest, fit_folder), arm_name
        assert GridCell(benchmark, arm, 1, 0, learned).digest == with_learned, arm_name


def test_every_cell_is_there_once_and_what_is_shared_is_shared(whole):
    found = finished_cells(whole / "records")
    assert {(cell.method, cell.order, cell.seed) for cell in found} == {
        (method, order, seed) for method in ("ce_drs", "ce_drs+spatial")
        for order in (0, 1) for seed in (0, 1)}  # fmt: skip
    assert len(list(whole.glob("fits/digits_rot_lt/spatial-*/order*/seconds.json"))) == 2
    frame = load_records(whole / "records")
    data = frame.groupby("order")["data_digest"].unique()
    assert [len(digests) for digests in data] == [1, 1]  # seeds train on the same images
    assert data[0][0] != data[1][0]


def test_seeds_change_the_training_and_orders_the_images(whole):
    counts = measured(load_records(whole / "records")).groupby(["order", "seed", "class_index"])["class_count"].first()
    assert counts[0, 0].tolist() == counts[0, 1].tolist() != counts[1, 0].tolist()
    ekld = totals(whole).xs("mean_ekld", level="metric").xs("ce_drs", level="method")
    assert ekld.nunique() == 4


def test_the_report_is_over_orders(whole):
    summary = pd.read_csv(whole / "report" / "summary.csv")
    summary = summary[summary["class_index"].isna()]
    assert set(summary["seeds"]) == {2}
    frame = load_records(whole / "records")
    mean = frame[(frame["metric"] == "balanced_accuracy") & (frame["method"] == "ce_drs")]["value"].mean()
    row = summary[(summary["metric"] == "balanced_accuracy") & (summary["method"] == "ce_drs")]
    assert row["mean"].item() == pytest.approx(mean)
    table = (whole / "report" / "table.md").read_text()
    assert r"ce\_drs (baseline)" in table
    effects = pd.read_csv(whole / "report" / "class_size.csv")
    assert effects["method"].tolist() == ["ce_drs", "ce_drs+spatial"]
    assert effects["classes"].tolist() == [20, 20]
    assert effects["spearman"].between(effects["spearman_low"], effects["spearman_high"]).all()


def test_the_same_from_python(whole):
    said = []
    options = compose("benchmark", words()[1:])
    options = {name: value for name, value in options.items() if name.endswith("_options")}
    frame = run_benchmark(
        "digits_rot_lt", ["ce_drs", "ce_drs+spatial"], out=whole, orders=range(2), seeds=[0, 1], say=said.append,
        **options,
    )  # fmt: skip
    assert said == ["8 cells, 0 to measure and 0 translators to fit", f"report: {whole / 'report' / 'report.html'}"]
    everything = load_records(whole / "records")
    assert len(frame) == len(everything)
    assert frame["value"].sum() == pytest.approx(everything["value"].sum())


def test_a_benchmark_without_nuisance_has_accuracy_alone(tmp_path, capsys):
    upright = ["data_options.nuisance=identity", "data_options.nuisance_options={}", "methods=[ce,ce_drs]"]
    assert run(words(*upright, "orders=0", f"out={tmp_path}")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "ce_drs - " in line]
    assert re.search(r": ce_drs - balanced 0\.\d{3}, many 0\.\d{3}, few 0\.\d{3}, \d+ s$", lines[0])
    found = set(measured(load_records(tmp_path / "records"))["metric"])
    assert not [metric for metric in found if "ekld" in metric or metric == "agreement"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Bought where" in page
    assert "eKLD" not in page
    assert not (tmp_path / "report" / "class_size.csv").exists()


def test_a_second_run_measures_nothing_and_more_orders_only_what_is_new(whole, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "run_cell", lambda *a, **k: calls.append((a[1].name, k["order"])) or [])
    monkeypatch.setattr(module.RecordWriter, "write_cell", lambda *_: None)
    everything = [ARMS, "seeds=0-1"]
    assert run_grid(cells(*everything, "orders=0-1"), whole) == []
    assert calls == []
    run_grid(cells("methods=[ce,ce_drs]", "orders=0-1"), whole)
    assert calls == [("ce", 0), ("ce", 1)]
    other = ["training_options={epochs: 2, warmup: 0, learning_rate: 0.01}"]
    run_grid(cells("methods=ce_drs", "orders=0", *other), whole)
    assert calls[2:] == [("ce_drs", 0)]  # another rate is another cell
    looks = ["training_options={epochs: 2, warmup: 0, checkpoint_every: 2, log_every: 2}"]
    run_grid(cells("methods=ce_drs", "orders=0", *looks), whole)
    assert len(calls) == 3  # looking less often is not


@pytest.mark.slow
def test_several_processes_find_the_same(whole, tmp_path):
    given = ["methods=[ce_drs,ce_drs+spatial]", "orders=0", "seeds=0"]
    assert run_grid(cells(*given), tmp_path, processes=2) == []
    expected = totals(whole)
    pd.testing.assert_series_equal(totals(tmp_path), expected[expected.index.isin(totals(tmp_path).index)])


def test_a_failed_cell_is_recorded_and_stops_no_other(tmp_path, monkeypatch, capsys):
    real = module.run_cell

    def fail(task, method, inputs, **more):
        if method.name == "ce_drs":
            raise RunError("the loss became NaN\nat step 3")
        return real(task, method, inputs, **more)

    monkeypatch.setattr(module, "run_cell", fail)
    given = words("methods=[ce_drs,ce]", "orders=0", f"out={tmp_path}")
    assert run(given) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.match(r"gen-invariance: 1 cell\(s\) failed, the first: .*RunError: the loss became NaN at step 3", line)
    assert "1 of 2 cells are missing" in captured.out
    frame = load_records(tmp_path / "records")
    assert {(cell.method) for cell in finished_cells(frame)} == {"ce"}
    (failure,) = frame[frame["metric"] == FAILED].itertuples()
    assert (failure.method, failure.order, failure.group) == ("ce_drs", 0, "RunError: the loss became NaN\nat step 3")
    assert "the loss became NaN" in (tmp_path / "report" / "report.html").read_text()

    monkeypatch.setattr(module, "run_cell", real)
    assert run(given) == 0
    assert len(finished_cells(tmp_path / "records")) == 2
    assert "the loss became NaN" not in (tmp_path / "report" / "report.html").read_text()


def test_a_failed_fit_fails_its_cells_and_no_other(tmp_path):
    given = ["methods=[ce,ce+spatial]", "orders=0", "fit_options={head_from: 999}"]
    lines = []
    failed = run_grid(cells(*given), tmp_path, say=lines.append)
    assert len(failed) == 1
    assert "translator could not be fitted (SettingsError" in failed[0]
    assert {cell.method for cell in finished_cells(tmp_path / "records")} == {"ce"}


def refuse(folder, reason):
    about = {"verdict": "do not use", "reasons": [reason], "translator_digest": weights_digest(folder)}
    (folder / "quality.json").write_text(json.dumps(about))


def test_a_verdict_against_a_translator_is_said_and_its_cells_are_measured(whole, tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(module, "run_jobs", lambda given, *args, **more: jobs.extend(given) or [])
    given, out = tmp_path / "given", tmp_path / "out"
    SpatialTranslator(channels=1).save_pretrained(given)
    refuse(given, "It blurs.")
    shutil.copytree(whole / "fits", out / "fits")
    refuse(next((out / "fits").glob("*/*/order0")), "It darkens.")
    asked, lines = cells(f"methods=[ce,ce+{given}/,ce_drs+spatial]", "orders=0"), []
    run_grid(asked, out, say=lines.append)
    warned = [line for line in lines if "warning" in line]
    assert len(warned) == 2
    assert "'do not use': It blurs; it is measured all the same" in warned[0]
    assert "order 0: ce_drs+spatial" in warned[1]
    assert "It darkens" in warned[1]
    assert [job.cell for job in jobs] == asked
    (given / "quality.json").write_text("{")
    run_grid(asked, out, say=lines.append)
    assert any("quality.json is damaged" in line for line in lines)


def test_a_fit_at_its_limit_is_said(tmp_path, monkeypatch):
    def only_fits(jobs, do, **more):
        return [Done(job, do(job, None)) for job in jobs if job.cell is None]

    monkeypatch.setattr(module, "run_jobs", only_fits)
    monkeypatch.setattr("gen_invariance.translator.spatial.tell_apart", functools.partial(tell_apart, steps=20))
    network = "translator_options.spatial.network={start: 1.0, operations: [bias]}"
    lines = []
    run_grid(cells("methods=ce_drs+spatial", "orders=0", network), tmp_path, say=lines.append)
    assert "spatial fitted in" in lines[-1]
    assert "warning: spatial: the verdict on this translator is 'do not use': Not identified: bias" in lines[-1]


def test_shards_share_out_whole_orders(tmp_path):
    everything = cells("methods=[ce,ce_drs]", "orders=0-4", "seeds=0-1")
    shards = [list(module._select_shard(everything, index, 3)) for index in range(3)]
    keys = [cell.key for shard in shards for cell in shard]
    assert len(keys) == len(set(keys)) == len(everything)
    assert [{cell.order for cell in shard} for shard in shards] == [{0, 3}, {1, 4}, {2}]
    with pytest.raises(SettingsError, match="0 <= i < n"):
        list(module._select_shard(everything, 3, 3))


def test_invariance_to_the_learned_nuisance(whole, tmp_path):
    shutil.copytree(whole / "fits", tmp_path / "fits")
    given = ["methods=ce_drs", "orders=0", "learned=spatial"]
    lines = []
    assert run_grid(cells(*given), tmp_path, say=lines.append) == []
    assert "0 translators to fit" in lines[0]
    found = totals(tmp_path).xs("ce_drs", level="method").xs(0, level="order")
    assert found.xs("mean_learned_ekld", level="metric").notna().all()
    assert len(found.xs("learned_ekld", level="metric")) == 10


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["benchmark=digits"], "no benchmark 'digits'"),
        (["methods=[ce_dsr]"], "no method 'ce_dsr'"),
        (["methods=[ce+gan]"], "unknown nuisance 'gan'"),
        (["orders=many"], "orders must be whole numbers"),
        (["shard=4/4"], "shard must be i/n"),
        (["processes=0"], "processes must be at least 1"),
        (["action=walk"], "action must be one of run, list, report"),
        (["data_options={largst: 3}"], "no setting 'largst'"),
        (["learned=gan"], "no translator 'gan'"),
        (
            ["benchmark=gtsrb_lt", "data_root=nowhere", "data_options={}"],
            "gtsrb: nowhere/gtsrb lacks GTSRB/Final",
        ),
        (["benchmark=folder", "data_options={}"], "needs a path"),
    ],
)
def test_bad_input_is_one_line(changed, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert run([*words("methods=ce"), *changed, f"out={out}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()


def test_jobs_wait_for_those_they_need():
    needs = {"c": ("a", "b"), "d": ("c",), "e": ("gone",)}
    seen = []

    def do(job, error):
        seen.append((job, error))
        if job == "b":
            raise ValueError("no\nluck")
        if error:
            raise RuntimeError(error)
        return job.upper()

    ended = {done.job: done for done in run_jobs("abcde", do, needs=lambda job: needs.get(job, ()))}
    assert [job for job, _ in seen] == list("abcde")
    assert (ended["a"].answer, ended["e"].answer) == ("A", "E")
    assert ended["b"].error == "ValueError: no luck"
    assert ended["c"].error == "RuntimeError: ValueError: no luck"
    assert "ValueError: no luck" in ended["d"].error


# ---- kill -9


def start(given):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    line = [sys.executable, "-m", "gen_invariance.cli.main", *given]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
                            start_new_session=True)  # fmt: skip


def kill_after_news(process, out, moments):
    """SIGKILL of all its processes at a random moment after something new was written; whether it came in time."""
    before, end = written(out), time.monotonic() + 300
    while process.poll() is None and written(out) == before and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(moments.uniform(0, 0.6))
    in_time = process.poll() is None
    if in_time:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return in_time


def written(out):
    return (
        sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and "tmp" not in path.name)
        if out.exists()
        else 0
    )


@pytest.mark.parametrize(("kills", "processes"), [(1, 1), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, processes, tmp_path, whole):
    grid = [ARMS, "seeds=0-1", "orders=0-1" if kills > 2 else "orders=0"]
    given = words(*grid, f"out={tmp_path / 'out'}", f"processes={processes}")
    out, moments, in_time, attempts = tmp_path / "out", random.Random(kills), 0, 0
    while in_time < kills and attempts < 3 * kills:
        attempts += 1
        if len(finished_cells(out / "records")) == len(cells(*grid)):  # begin anew with what the cells left behind
            shutil.rmtree(out / "records")
        process = ForkedCommand(given) if processes == 1 else start(given)  # workers come of a process of its own
        in_time += kill_after_news(process, out, moments)
    assert in_time == kills
    assert run(given) == 0
    left, right = totals(out), totals(whole)
    assert not left.index.duplicated().any()
    pd.testing.assert_series_equal(left, right[right.index.isin(left.index)], check_exact=True)
    everything = cells(*grid)
    assert finished_cells(out / "records") == {cell.key for cell in everything}
    mine, expected = (
        summarise(load_grid(everything, folder), baseline="ce_drs").set_index(["method", "metric", "class_index"])
        for folder in (out, whole)
    )
    timed = mine.index.get_level_values("metric").str.endswith("seconds")
    pd.testing.assert_frame_equal(mine[~timed], expected[~timed])
    for path in out.glob("cells/*/*/*/run.json"):
        assert json.loads(path.read_text())["kind"] == "train"
