"""Signals, checkpoints, full disks: a run ends with one line, loses nothing that was saved, and goes on to the same."""

import hashlib
import io
import json
import os
import signal
import subprocess
import threading
import time
import warnings
from dataclasses import replace

import pytest
import torch
from forked import ForkedCommand
from sklearn.datasets import load_digits

from gen_invariance import run as running
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.losses import build_loss
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.cli.main import run as command
from gen_invariance.cli.verbs import VERBS
from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.errors import CheckpointError, SettingsError
from gen_invariance.files import load_checkpoint, save_checkpoint
from gen_invariance.run import Run, named_generator
from gen_invariance.stopping import Terminated, signals_noted, sigterm_raises
from gen_invariance.translator.fit import fit_objective
from gen_invariance.translator.registry import build_objective
from gen_invariance.translator.settings import FitSettings


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


def digits():
    bunch = load_digits()
    images = torch.from_numpy(bunch.images[:40]).float()[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    return ImageData(to_uint8(images), torch.from_numpy(bunch.target[:40] % 3).long(), ("a", "b", "c"))


# ---- signals, inside one process


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_noted_signal_acts_when_the_block_ends(number, kind):
    before, steps = handlers(), []

    def loop():
        with sigterm_raises(), signals_noted() as stop_asked:
            for step in range(5):
                if step == 2:
                    signal.raise_signal(number)
                steps.append(step)
                if stop_asked():
                    break

    with pytest.raises(KeyboardInterrupt) as caught:
        loop()
    assert caught.type is kind
    assert steps == [0, 1, 2]
    assert handlers() == before


def test_a_second_signal_acts_at_once():
    steps = []

    def loop():
        with signals_noted():
            for step in range(5):
                steps.append(step)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert steps == [0, 1]


def test_handlers_of_others_and_other_threads_are_left_alone():
    seen, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with signals_noted() as stop_asked:
            signal.raise_signal(signal.SIGINT)
            assert not stop_asked()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]

    def elsewhere():
        with sigterm_raises(), signals_noted() as stop_asked:
            seen.append(stop_asked())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.SIGINT, False]


def test_an_error_in_the_block_is_not_hidden_by_the_signal():
    before = handlers()

    def loop():
        with signals_noted():
            signal.raise_signal(signal.SIGINT)
            raise ValueError

    with pytest.raises(ValueError):
        loop()
    assert handlers() == before


def stop_at(module, at):
    """Make `module` send its process a Ctrl-C when it is called for the `at`-th time."""
    calls, original = iter(range(10**6)), module.forward

    def forward(*arguments, **options):
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    module.forward = forward
    return module


@pytest.mark.parametrize(("at", "average"), [(0, 0.0), (3, 0.9), (9, 0.0), (12, 0.9), (19, 0.9)])  # five steps an epoch
def test_training_saves_in_the_middle_of_an_epoch(at, average, tmp_path):
    data = digits()
    settings = TrainSettings(
        epochs=4, batch_size=8, warmup=0, milestones=(2, 3), checkpoint_every=4, average_decay=average
    )

    def train(folder, loss, *, resume=False):
        model = build_classifier("small_conv", num_classes=3, channels=1, generator=named_generator(0, "net"))
        run = Run(folder, kind="train", resume=resume)
        return fit_classifier(model, data, settings, loss=loss, out=run, progress=False), run

    def loss():
        return build_loss("cross_entropy", counts=data.counts)

    whole, straight = train(tmp_path / "whole", loss())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halted", stop_at(loss(), at))
    saved = load_checkpoint(max((tmp_path / "halted" / "checkpoints").iterdir()))
    assert (saved["step"], saved.get("steps_of_epoch", 0)) == divmod(at + 1, 5)
    again, halted = train(tmp_path / "halted", loss(), resume=True)
    assert halted.metrics() == straight.metrics()
    assert checkpoint_names(tmp_path / "halted") == checkpoint_names(tmp_path / "whole")
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("at", [0, 4])
def test_fitting_saves_at_the_step_in_hand(at, tmp_path):
    settings = FitSettings(steps=6, batch_size=4, head_from=1, log_every=2, checkpoint_every=6, sample_every=6)

    def objective():
        return build_objective("spatial", digits(), settings={"discriminator_width": 4})

    def fit(folder, whole, *, resume=False):
        run = Run(folder, kind="fit", resume=resume)
        return fit_objective(whole, digits(), settings, run=run, progress=False), run

    expected, straight = fit(tmp_path / "whole", objective())
    halted = stop_at(objective(), at)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "halted", halted)
    assert checkpoint_names(tmp_path / "halted") == [f"stop-{at + 1:08d}.ckpt"]
    found, run = fit(tmp_path / "halted", objective(), resume=True)
    assert run.metrics() == straight.metrics()
    assert checkpoint_names(tmp_path / "halted") == checkpoint_names(tmp_path / "whole")
    assert all(map(torch.equal, expected.state_dict().values(), found.state_dict().values()))


def checkpoint_names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---- signals, real processes

DATA = ["data=digits_rotation", "data.largest=24", "data.imbalance=4", "data.few_below=8", "data.many_above=16"]


def wait_for(condition, process, *, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sigterm_leaves_one_line_and_a_checkpoint(tmp_path):
    out = tmp_path / "out"
    process = ForkedCommand(["train", *DATA, "training.epochs=5000", "training.checkpoint_every=5000", f"out={out}"])
    wait_for((out / "metrics.jsonl").exists, process)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error == "gen-invariance: stopped; the same command with resume=true goes on from the last checkpoint\n"
    assert len(list((out / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
@pytest.mark.parametrize("verb", ["fit", "augment", "order", "demo", "measure", "report"])
def test_every_verb_says_how_to_go_on(verb, raised, code, monkeypatch, capsys):
    def stopped(settings):
        raise raised

    monkeypatch.setitem(VERBS, verb, replace(VERBS[verb], run=stopped))
    needed = {"measure": ["run=x"], "report": ["records=x"], "augment": ["out=x"]}.get(verb, [])
    assert command([verb, *needed]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("gen-invariance: stopped; ")
    assert ("resume=true" in error) == (verb in ("fit", "augment", "order"))


# ---- checkpoints


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_old_checkpoints_stay_while_the_newest_does_not_read_back(tmp_path, monkeypatch):
    run = Run(tmp_path, kind="fit")
    for step in (1, 2):
        run.save(step, {})
    write = save_checkpoint

    def lying_disk(path, state):
        write(path, state)
        flip_bit(path)

    monkeypatch.setattr(running, "save_checkpoint", lying_disk)
    with pytest.warns(UserWarning, match=r"step-00000003\.ckpt.*damaged.*check the disk"):
        run.save(3, {}, keep=1)
    monkeypatch.undo()
    assert len(os.listdir(tmp_path / "checkpoints")) == 3
    with pytest.warns(UserWarning, match=r"step-00000003\.ckpt"):
        assert run.load_latest()["step"] == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_checkpoint_does_not_push_out_intact_ones(keep, tmp_path):
    run = Run(tmp_path, kind="fit")
    for step in (2, 9):
        run.save(step, {}, keep=2)
    flip_bit(tmp_path / "checkpoints" / "step-00000009.ckpt")
    with pytest.warns(UserWarning, match=r"step-00000009\.ckpt"):
        assert run.load_latest()["step"] == 2
    for step in (3, 4):
        run.save(step, {}, keep=keep)
        assert run.load_latest()["step"] == step
    assert len(os.listdir(tmp_path / "checkpoints")) == keep


@pytest.mark.parametrize("state", [{}, {"step": "3"}, {"step": -1}, {"step": True}, {"step": 2.0}])
def test_a_checkpoint_without_a_step_is_passed_over(state, tmp_path):
    run = Run(tmp_path, kind="fit")
    run.save(1, {})
    save_checkpoint(tmp_path / "checkpoints" / "step-00000002.ckpt", {"kind": "fit", **state})
    with pytest.warns(UserWarning, match=r"step-00000002\.ckpt does not say after which step"):
        assert run.load_latest()["step"] == 1


def test_a_checkpoint_that_is_no_mapping(tmp_path):
    path = tmp_path / "one.ckpt"
    save_checkpoint(path, {"kind": "fit"})
    content = path.read_bytes()
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest().encode()
    path.write_bytes(content.partition(b"1 ")[0] + b"1 " + digest + b"\n" + buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"one\.ckpt"):
        load_checkpoint(path, kind="fit")


def test_changed_settings_go_on_only_when_told_to(tmp_path):
    Run(tmp_path, kind="fit", config={"steps": 10})
    with pytest.raises(SettingsError, match="or add allow_changed_settings=true"):
        Run(tmp_path, kind="fit", config={"steps": 20}, resume=True, allow_changed_settings=False)
    with pytest.raises(SettingsError, match="already holds a run"):
        Run(tmp_path, kind="fit", config={"steps": 20}, allow_changed_settings=True)
    with pytest.raises(SettingsError, match="holds a 'fit' run"):
        Run(tmp_path, kind="train", config={"steps": 20}, resume=True, allow_changed_settings=True)
    for steps, seed, changed in ((20, 0, "steps"), (20, 1, "seed"), (30, 1, "steps")):
        with pytest.warns(UserWarning, match=f"other settings: {changed}$"):
            Run(tmp_path, kind="fit", seed=seed, config={"steps": steps}, resume=True, allow_changed_settings=True)
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["config"], about["seed"]) == ({"steps": 30}, 1)
    assert [(old["config"]["steps"], old["seed"]) for old in about["earlier"]] == [(10, 0), (20, 0), (20, 1)]
    assert all("earlier" not in old for old in about["earlier"])
    Run(tmp_path, kind="fit", seed=1, config={"steps": 30}, resume=True)


def test_the_command_line_goes_on_anyway(tmp_path, capsys):
    out = f"out={tmp_path / 'out'}"
    fit = ["fit", *DATA, "fit.batch_size=4", "fit.checkpoint_every=2", out]
    assert command([*fit, "fit.steps=2"]) == 0
    assert command([*fit, "fit.steps=4", "resume=true"]) == 2
    assert "allow_changed_settings=true" in capsys.readouterr().err
    assert command([*fit, "fit.steps=4", "resume=true", "allow_changed_settings=true"]) == 0
    assert "warning: " in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step-00000002.ckpt", "step-00000004.ckpt"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    run = Run(tmp_path / "run", kind="fit")
    run.save(1, {})
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = [f".metrics.jsonl.{os.getpid()}.tmp", ".notes.tmp", "notes.tmp"]
    for name in [f".run.json.{dead.pid}.tmp", f"checkpoints/.step-00000002.ckpt.{dead.pid}.tmp", *kept]:
        (run.path / name).write_text("half")
    Run(run.path, kind="fit", resume=True)
    assert sorted(os.listdir(run.path)) == sorted(["run.json", "checkpoints", *kept])
    assert os.listdir(run.path / "checkpoints") == ["step-00000001.ckpt"]


def test_a_run_killed_while_its_folder_was_made_can_be_started(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".run.json.{dead.pid}.tmp").write_text("{")
    Run(tmp_path, kind="fit")
    assert os.listdir(tmp_path) == ["run.json"]


def test_equal_states_are_equal_bytes_wherever_they_came_from(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    save_checkpoint(first, {"kind": "fit", "step": 1, "optimizer": optimizer.state_dict()})
    save_checkpoint(second, load_checkpoint(first))
    assert first.read_bytes() == second.read_bytes()


def test_what_a_killed_report_left_is_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / f".01.png.{dead.pid}.tmp").write_text("half")
    running.remove_leftovers(tmp_path)
    running.remove_leftovers(tmp_path / "not there yet")
    assert os.listdir(tmp_path / "figures") == []
