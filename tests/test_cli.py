"""The command line used as it should be: help, settings, a whole pass from fit to report, Ctrl-C, closed pipes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version

import numpy as np
import pytest
import yaml
from PIL import Image

from gen_invariance.cli.main import run
from gen_invariance.cli.verbs import VERBS

DATA = ["data.largest=40", "data.imbalance=8", "data.few_below=10", "data.many_above=20", "data.test_images=10"]
SHORT = ["training.epochs=2", "training.warmup=0"]


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


def printed(arguments, capsys):
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_help_and_version(capsys):
    everything = printed(["--help"], capsys)
    assert printed([], capsys) == everything
    assert all(f"\n  {verb} " in everything for verb in VERBS)
    assert printed(["--version"], capsys) == f"gen_invariance {version('gen_invariance')}\n"
    assert max(map(len, everything.splitlines())) <= 140


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb, capsys):
    text = printed([verb, "--help"], capsys)
    assert text.startswith(f"gen-invariance {verb}: ")
    assert f"  gen-invariance {verb} " in text  # an example
    assert "settings:\n" in text
    assert printed([verb, "seed=3", "-h"], capsys) == text


def test_help_on_another_choice(capsys):
    text = printed(["fit", "translator=munit_small", "--help"], capsys)
    assert "\nsettings of translator (here munit_small):\n" in text
    assert "\n  translator.network.width: 16\n" in text  # its own, over the one of munit
    assert "\n  translator.network.style_dim: 8\n" in text
    assert printed(["fit", "translator=../../setup", "--help"], capsys) == printed(["fit", "--help"], capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_job_prints_the_settings_and_does_nothing(verb, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(
        printed([verb, "--cfg", "job", "run=there" if verb == "measure" else "out=there"], capsys)
    )
    assert "there" in settings.values()
    assert list(tmp_path.iterdir()) == []


def test_options_named_by_another_setting(capsys):
    for word in ("data.nuisance_options={degrees: 30}", "data.nuisance_options.degrees=30"):
        settings = yaml.safe_load(printed(["fit", "--cfg", "job", word], capsys))
        assert settings["data"]["nuisance_options"] == {"degrees": 30}


def test_a_folder_where_other_verbs_have_a_group(capsys):
    settings = yaml.safe_load(printed(["measure", "--cfg", "job", "run=a", "translator=runs/fit"], capsys))
    assert settings["translator"] == "runs/fit"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "plain"
    assert run(["train", "data=digits_rotation", *DATA, *SHORT, f"out={out}"]) == 0
    return out


def test_under_the_identity_there_is_accuracy_alone(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    lines = printed(["measure", f"run={copy}", "nuisance=identity", "draws=2"], capsys).splitlines()
    assert lines[0].split() == ["class", "group", "train", "test", "accuracy"]
    assert sorted(line.split()[0] for line in lines[1:11]) == list("0123456789")
    assert {len(line.split()) for line in lines[1:11]} == {5}
    assert lines[-3] == "no invariance figure: the nuisance is the identity, under which every model has eKLD 0"
    figures = json.loads((copy / "measures" / "identity" / "figures.json").read_text())
    assert not [name for name in figures if "ekld" in name or "agreement" in name]
    assert (copy / "measures" / "identity" / "classes.csv").read_text().splitlines()[0].endswith(",accuracy")
    assert {record["benchmark"] for record in records_in(copy)} == {"digits-rotation"}
    assert not [record for record in records_in(copy) if record["metric"] in ("ekld", "agreement")]
    printed(["report", f"records={copy}", f"out={tmp_path / 'page'}"], capsys)
    page = (tmp_path / "page" / "report.html").read_text()
    assert "eKLD" not in page
    assert "Agreement" not in page


def records_in(folder):
    lines = [line for file in (folder / "records").iterdir() for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda record: record["written"])


def test_what_invariance_is_measured_against(trained, tmp_path, capsys):
    """What acted on the images; else the translator that the stage used; else, or where it is gone, lighting."""
    few = ["data=digits", *DATA, *SHORT]
    fit, plain, staged, idle = (tmp_path / name for name in ("fit", "plain", "staged", "idle"))
    printed(["fit", "data=digits", *DATA, "fit.steps=1", "fit.batch_size=8", f"out={fit}"], capsys)
    assert "nothing is translated" not in printed(["train", *few, f"out={plain}"], capsys)
    stage = ["stage=translator", f"stage.translator={fit}"]
    assert "nothing is translated" not in printed(["train", *few, *stage, f"out={staged}"], capsys)
    everybody = ["stage.policy=everywhere", "stage.policy_options.probability=0"]
    said = printed(["train", *few, *stage, *everybody, f"out={idle}"], capsys)
    assert "note: nothing is translated: stage.policy=everywhere gives every class the probability 0\n" in said
    shares = [json.loads((run / "run.json").read_text())["facts"]["given_share"] for run in (plain, staged, idle)]
    assert [share["classes"] > 0 for share in shares] == [False, True, False]
    assert 0 < shares[1]["rows"] < shares[1]["classes"] < 0.5  # the small classes get it, and have fewer rows

    def against(folder, *words):
        text = printed(["measure", f"run={folder}", "draws=1", *words], capsys)
        last = records_in(folder)[-1]
        return text.splitlines()[-3].removeprefix("nuisance "), last["benchmark"], last["method"]

    copy = shutil.copytree(trained, tmp_path / "copy")
    assert against(copy) == ("data: it acted on the images", "digits-rotation", "none")
    nothing = "nothing acted on the images and"
    assert against(plain) == (f"lighting: {nothing} the stage used no translator", "digits against lighting", "none")
    line, benchmark, method = against(staged)
    kind = benchmark.removeprefix("digits against ")
    assert re.fullmatch(r"translator spatial [0-9a-f]{6}", kind)
    assert (line, method) == (f"{kind}: {nothing} the stage used {fit}", "translator")
    _, benchmark, method = against(idle)
    assert (benchmark, method) == ("digits against lighting", "translator (nothing translated)")
    assert against(plain, f"translator={fit}")[:2] == (f"{kind}: translator= names it", f"digits against {kind}")
    fit.rename(tmp_path / "elsewhere")
    assert against(staged)[0] == f"lighting: {nothing} {fit}, the translator of the stage, is gone"
    assert run(["measure", f"run={plain}", "nuisance_options={degrees: 9}"]) == 2
    assert "nuisance_options needs nuisance=NAME" in capsys.readouterr().err


def test_from_fit_to_report(trained, tmp_path, capsys):
    fit, learned, page = tmp_path / "fit", tmp_path / "learned", tmp_path / "page"
    small = ["data=digits_rotation", *DATA]
    text = printed(["fit", *small, "fit.steps=3", "fit.batch_size=8", "fit.sample_every=2", f"out={fit}"], capsys)
    assert f"translator: {fit / 'translator'}\n" in text
    assert re.search(r"rotation: uniform in \[-[\d.]+, [\d.]+\] degrees", text)
    grids = sorted((fit / "samples").iterdir())
    assert [grid.name for grid in grids] == ["step-00000002.png", "step-00000003.png"]
    assert str(grids[-1]) in text
    with Image.open(grids[-1]) as grid:
        assert len(np.unique(np.asarray(grid))) > 50

    stage = ["stage=translator", f"stage.translator={fit}", "stage.policy=everywhere"]
    assert f"measure run={learned}" in printed(["train", *small, *stage, *SHORT, f"out={learned}"], capsys)
    for folder in (trained, learned):
        table = printed(["measure", f"run={folder}", "draws=2"], capsys)
        assert "balanced accuracy" in table
    against = printed(["measure", f"run={learned}", "nuisance=translator", f"translator={fit}", "draws=1"], capsys)
    assert "against translator" in against
    text = printed(["report", f"records=[{trained},{learned}]", "baseline=none", f"out={page}"], capsys)
    assert text == f"report: {page / 'report.html'}\n"
    assert "translator" in (page / "report.html").read_text()


def started(*arguments):
    line = [sys.executable, "-m", "gen_invariance.cli.main", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def group_is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition, process, *, seconds=180):
    """Poll until `condition`; fails if the process ends first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_leaves_one_line(tmp_path):
    out = tmp_path / "out"
    process = started("train", "data=digits_rotation", "training.epochs=5000", f"out={out}")
    wait_for((out / "metrics.jsonl").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "gen-invariance: stopped; the same command with resume=true goes on from the last checkpoint\n"


def test_reader_that_goes_away():
    process = started("fit", "--help")
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""


@pytest.mark.slow
def test_ctrl_c_stops_the_workers_of_the_demo(tmp_path):
    out = tmp_path / "out"
    process = started("demo", "demo.seeds=1", "demo.munit_steps=100000", f"out={out}")
    wait_for(lambda: list(out.glob("fits/*munit*/metrics.jsonl")), process)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    end = time.monotonic() + 20
    while group_is_alive(process.pid):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert process.returncode == 130
    assert error == "gen-invariance: stopped; the same command goes on with what is left\n"
