"""Run folders: resuming only what is the same run, passing over damaged checkpoints; named generators."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from gen_invariance.errors import CheckpointError, OutputError, RunError, SettingsError
from gen_invariance.run import Run, config_digest, named_generator

# ---- named generators


def test_named_generator_is_pinned():
    """These streams decide published figures: another value here makes every old result unrepeatable."""
    drawn = torch.randint(1_000_000, (3,), generator=named_generator(0, "train", 5))
    assert drawn.tolist() == [922237, 410161, 943281]
    drawn = torch.randint(1_000_000, (3,), generator=named_generator(3, "loader", 0))
    assert drawn.tolist() == [689150, 896432, 306853]


def test_named_generators_differ_in_seed_and_in_every_word():
    names = [(0, "fit", 1), (0, "fit", 2), (1, "fit", 1), (0, "train", 1), (0, "fit"), (0, "fit", 1, 2), (0, "fit", 12)]
    streams = {tuple(torch.randint(2**40, (2,), generator=named_generator(*name)).tolist()) for name in names}
    assert len(streams) == len(names)


def test_named_generator_leaves_the_global_stream_alone():
    before = torch.random.get_rng_state()
    torch.rand(3, generator=named_generator(0, "style"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_neighbouring_streams_are_uncorrelated():
    rows = torch.stack([torch.rand(2000, generator=named_generator(0, "fit", step)) for step in range(8)])
    off_diagonal = torch.corrcoef(rows)[~torch.eye(8, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 4 / 2000**0.5


# ---- run folders


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_resume_passes_over_damaged_checkpoints_and_names_them(tmp_path):
    run = Run(tmp_path / "run", kind="fit")
    for step in (1, 2, 3):
        run.log(step=step, loss=step / 10)
        run.save(step, {"value": torch.tensor(step)}, keep=3)
    damage(run.path / "checkpoints" / "step-00000003.ckpt")
    (run.path / "checkpoints" / "step-00000002.ckpt").write_bytes(b"")
    again = Run(tmp_path / "run", kind="fit", resume=True)
    with pytest.warns(UserWarning, match=r"step-0000000[23]\.ckpt") as caught:
        state = again.load_latest()
    assert len(caught) == 2
    assert (state["step"], int(state["value"])) == (1, 1)
    assert [row["step"] for row in again.metrics()] == [1]


def test_all_checkpoints_damaged_starts_from_nothing(tmp_path):
    run = Run(tmp_path / "run", kind="fit")
    run.log(step=1, loss=1.0)
    damage(run.save(1, {}))
    with pytest.warns(UserWarning, match="trying an older one"):
        assert run.load_latest() is None
    assert run.metrics() == []


def test_metrics_are_cut_back_to_the_checkpoint_and_half_lines_dropped(tmp_path):
    run = Run(tmp_path / "run", kind="train")
    run.save(2, {})
    for step in range(1, 5):
        run.log(step=step, loss=0.5)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.load_latest()
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n'


def test_only_the_newest_checkpoints_stay(tmp_path):
    run = Run(tmp_path / "run", kind="fit")
    for step in (5, 10, 999, 1000):
        run.save(step, {})
    assert sorted(os.listdir(run.path / "checkpoints")) == ["step-00000999.ckpt", "step-00001000.ckpt"]
    assert run.load_latest()["step"] == 1000


def test_no_checkpoint_is_none(tmp_path):
    assert Run(tmp_path / "run", kind="fit").load_latest() is None


def test_run_describes_itself(tmp_path):
    run = Run(tmp_path / "new" / "run", kind="fit", seed=4, config={"steps": 10, "pair": (1, 2)})
    about = json.loads((run.path / "run.json").read_text())
    assert about["kind"] == "fit"
    assert about["seed"] == 4
    assert about["config"] == {"steps": 10, "pair": [1, 2]}
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert about["config_digest"] == config_digest({"steps": 10, "pair": [1, 2]})
    assert torch.equal(
        torch.rand(2, generator=run.generator("a", 1)), torch.rand(2, generator=named_generator(4, "a", 1))
    )


def test_same_settings_resume(tmp_path):
    config = {"steps": 10, "pair": (1, 2), "path": Path("x")}
    Run(tmp_path / "run", kind="fit", config=config)
    before = (tmp_path / "run" / "run.json").read_bytes()
    Run(tmp_path / "run", kind="fit", config=config, resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resume": False}, "already holds a run; add resume=true"),
        ({"kind": "train"}, "holds a 'fit' run, not 'train'"),
        ({"config": {"steps": 11, "rate": 0.1}}, "settings differ from the run's in steps;"),
        ({"config": {"steps": 10}}, "settings differ from the run's in rate;"),
        ({"config": {"steps": 10, "rate": 0.1, "new": None, "more": 1}}, "in more;"),
        ({"seed": 1}, "settings differ from the run's in seed;"),
        ({"seed": 1, "config": {"steps": 9, "rate": 0.1}}, "in seed, steps;"),
    ],
)
def test_refuses_another_run(tmp_path, change, message):
    Run(tmp_path / "run", kind="fit", config={"steps": 10, "rate": 0.1})
    arguments = {"kind": "fit", "config": {"steps": 10, "rate": 0.1}, "resume": True, **change}
    with pytest.raises(SettingsError) as caught:
        Run(tmp_path / "run", **arguments)
    assert message in str(caught.value)


def test_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"holds no run \(found 'thesis\.tex'\)"):
        Run(tmp_path, kind="fit", resume=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "fit"}', '{"kind": "fit", "config": 3}', "\xff"])
def test_damaged_description(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        Run(tmp_path, kind="fit", resume=True)


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        Run(tmp_path / "file", kind="fit")


def test_metrics_that_cannot_be_written(tmp_path):
    run = Run(tmp_path / "run", kind="fit")
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl"):
        run.log(step=1)


# ---- runs opened for a block


def open_and_fail(folder, error, work=lambda run: None, **options):
    with Run.open(folder, kind="fit", **options) as run:
        work(run)
        raise error


@pytest.mark.parametrize("resume", [True, None])
def test_open_starts_a_run_and_goes_on_in_one_that_is_there(tmp_path, resume):
    with Run.open(tmp_path / "run", kind="fit", resume=resume) as run:
        run.save(3, {})
    with Run.open(tmp_path / "run", kind="fit", resume=resume) as again:
        assert again.load_latest()["step"] == 3
    with pytest.raises(SettingsError, match="already holds a run"), Run.open(tmp_path / "run", kind="fit"):
        pass


@pytest.mark.parametrize("was_there", [True, False])
def test_bad_input_before_anything_was_computed_leaves_no_folder(tmp_path, was_there):
    folder = tmp_path / "run"
    if was_there:
        folder.mkdir()
    with pytest.raises(SettingsError, match="bad"):
        open_and_fail(folder, SettingsError("bad"), lambda run: (run.path / "split.npz").write_bytes(b""))
    assert folder.is_dir() == was_there
    assert not was_there or os.listdir(folder) == []


@pytest.mark.parametrize(
    ("error", "work"),
    [
        (RunError("diverged"), lambda run: None),
        (SettingsError("bad"), lambda run: run.log(step=1)),
        (SettingsError("bad"), lambda run: run.save(1, {})),
        (KeyboardInterrupt(), lambda run: None),
    ],
)
def test_a_run_that_computed_or_failed_otherwise_stays(tmp_path, error, work):
    with pytest.raises(type(error)):
        open_and_fail(tmp_path / "run", error, work)
    assert (tmp_path / "run" / "run.json").is_file()


def test_bad_input_leaves_a_former_run_alone(tmp_path):
    Run(tmp_path / "run", kind="fit")
    with pytest.raises(SettingsError, match="bad"):
        open_and_fail(tmp_path / "run", SettingsError("bad"), resume=True)
    assert (tmp_path / "run" / "run.json").is_file()


def test_later_processes_join_the_run_and_do_not_remove_it(tmp_path, monkeypatch):
    Run(tmp_path / "run", kind="fit")
    monkeypatch.setenv("RANK", "1")
    with Run.open(tmp_path / "run", kind="fit") as run:
        assert run.path == tmp_path / "run"
    with pytest.raises(SettingsError, match="bad"):
        open_and_fail(tmp_path / "other", SettingsError("bad"))
    assert (tmp_path / "other" / "run.json").is_file()


def test_a_run_in_memory_keeps_metrics_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Run.open(None, kind="fit", seed=4, config={"steps": 1}) as run:
        run.log(step=1, loss=torch.tensor(0.5))
        run.note(found="nothing")
        assert run.save(1, {}) is None
        assert run.load_latest() is None
    assert run.metrics() == [{"step": 1, "loss": 0.5}]
    assert (run.path, run.config) == (None, {"steps": 1})
    assert torch.equal(torch.rand(2, generator=run.generator("a")), torch.rand(2, generator=named_generator(4, "a")))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stops", [[98], [41, 42, 43, 79, 81, 119], [40, 80]])
def test_stops_leave_the_checkpoints_of_a_run_that_was_not_stopped(tmp_path, stops):
    whole, stopped = (Run(tmp_path / name, kind="fit") for name in ("whole", "stopped"))
    for step in range(1, 121):
        for run in (whole, stopped):
            if step % 40 == 0:
                run.save(step, {"weight": torch.tensor(step)})
        if step in stops:
            stopped.save(step, {"weight": torch.tensor(step)}, is_due=step % 40 == 0)
            stopped = Run(tmp_path / "stopped", kind="fit", resume=True)
            assert stopped.load_latest()["step"] == step
    names = [sorted(os.listdir(run.path / "checkpoints")) for run in (whole, stopped)]
    assert names == [["step-00000080.ckpt", "step-00000120.ckpt"]] * 2


def test_a_run_that_begins_anew_writes_its_metrics_anew(tmp_path):
    run = Run(tmp_path, kind="fit")
    run.log(step=0, loss=1.0)
    run.log(note="before the first checkpoint")
    run = Run(tmp_path, kind="fit", resume=True)
    assert run.load_latest() is None
    run.log(step=0, loss=1.0)
    assert run.metrics() == [{"step": 0, "loss": 1.0}]
