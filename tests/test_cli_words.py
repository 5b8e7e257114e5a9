"""Paths and other text are taken as they are typed, whatever letters they have, and streams that fail end no work."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gen_invariance.cli.main import compose, run
from gen_invariance.cli.streams import LastingStream, lasting_streams
from gen_invariance.cli.verbs import VERBS
from gen_invariance.configs import default_choices
from gen_invariance.experiment.settings import FitRun, MeasureRun, Task
from gen_invariance.run import Run
from gen_invariance.settings import get_texts, read_settings

PATHS = [
    (verb, key)
    for verb in VERBS
    for key in get_texts(VERBS[verb].settings)
    if key not in default_choices(verb) and key.rpartition(".")[2] in ("path", "out", "translator", "run", "records")
] + [("benchmark", "data_options.path"), ("train", "classifier.weights"), ("benchmark", "data_root")]
NAMES = [
    "my photos", "photos (1)", "photos, old", "a=b", "it's mine", "photos [raw]", "{a}", "$HOME", "${oc.env:HOME}",
    "née", "猫", "#hash", "a;b", "a&b", "a:b", "123", "007", "1e5", "true", "a\\b", '"quoted', "~~", "trailing ", "*",
    "a\nb", "\udce9", "'", "\\${x}", "null/x", "./null",
]  # fmt: skip
LETTERS = st.sampled_from("aé猫 ,=()[]{}'\"#$:~\\/1-+*?;&\n")


def find(values, key):
    for part in key.split("."):
        values = values[part]
    return values


def test_there_are_paths():
    assert len(PATHS) > 20
    assert {verb for verb, _ in PATHS} == set(VERBS)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(PATHS), st.one_of(st.sampled_from(NAMES), st.text(LETTERS, min_size=1, max_size=8)))
@example(("report", "records"), "a, b (1)")
def test_every_path_is_taken_as_it_is_typed(path, name):
    verb, key = path
    name = f"d/{name}"  # so that it is neither null nor in quotes
    assert find(compose(verb, [f"{key}={name}"], missing_is_error=False), key) == name


def test_null_quotes_and_lists_keep_their_meaning():
    def read(verb, word):
        return find(compose(verb, [word], missing_is_error=False), word.partition("=")[0])

    assert read("order", "out=null") is None
    assert read("fit", "out='a b'") == "a b"
    assert read("report", "records=[a,b]") == ["a", "b"]
    assert read("report", "records=[née (1), b]") == ["née (1)", "b"]
    assert read("order", "order.subsets=[[猫,犬],[1,猫]]") == [["猫", "犬"], [1, "猫"]]
    assert read("fit", "fit.classes=[猫]") == ["猫"]
    assert read("augment", "strength=0.5") == 0.5
    assert read("measure", "method=1e5") == "1e5"
    assert read("benchmark", "data_options.group=(\\w+)_'x") == "(\\w+)_'x"


def test_home_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for values in (compose("fit", ["out=~/run", "data.path=~/images"]), {"out": "~/run", "data": {"path": "~/images"}}):
        read = read_settings(FitRun, values, "")
        assert (read.out, read.data.path) == (str(tmp_path / "run"), str(tmp_path / "images"))
    assert MeasureRun(run="~").run == str(tmp_path)
    assert Task(path="a~b").path == "a~b"
    assert Run("~/made", kind="fit").path == tmp_path / "made"
    assert not Path("~").exists()


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


class Gone(io.StringIO):
    """A pipe that nobody reads."""

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


def test_what_a_terminal_cannot_show_is_escaped():
    shown = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(shown, encoding="ascii"))
    print("école 猫", file=stream, flush=True)
    assert shown.getvalue() == b"\\xe9cole \\u732b\n"
    assert stream.failure is None


@pytest.mark.parametrize(("broken", "code"), [(Full, 2), (Gone, 0), (None, 0)])
def test_work_is_done_without_a_reader(broken, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", broken and broken())
    assert run(["--version"]) == code
    assert ("No space left" in capsys.readouterr().err) == (broken is Full)


def test_streams_are_given_back():
    before = sys.stdout, sys.stderr
    with lasting_streams() as out:
        assert sys.stdout is out
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.slow
def test_a_command_in_a_pipe_that_nobody_reads_is_carried_out(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = "from gen_invariance.cli.main import main; main()"
    words = ["fit", "data=digits_rotation", "translator=spatial", "fit.steps=1", f"out={tmp_path / 'né (1), #2'}"]
    try:
        ended = subprocess.run(
            [sys.executable, "-c", command, *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "né (1), #2" / "translator" / "config.json").is_file()
