"""An export ends in the same bytes whoever computes it, and however often it is killed or runs out of disk."""

import itertools
import json
import os
import pickle
import random
import signal
import traceback
from dataclasses import replace

import numpy as np
import pytest
from export_inputs import INPUTS, SETTINGS, build_small, rows_of, tree
from PIL import Image

from gen_invariance import Compose, Lighting, Rotation
from gen_invariance.errors import DataError, OutputError, RunError, SettingsError
from gen_invariance.export import units, workers
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings, WorkerSettings

# ---- shared out


def test_units_done_alone_and_in_another_order_write_the_same_bytes(photos, tmp_path, monkeypatch):
    """What a worker process does, without the seconds that one takes to start."""
    nuisance = Compose([build_small(), Lighting()])
    export_dataset(open_format("folder", photos), nuisance, tmp_path / "one", SETTINGS)

    def run(job, todo):
        units.start_worker(pickle.loads(pickle.dumps(job)))
        return [units.run_unit(pickle.loads(pickle.dumps(unit))) for unit in reversed(list(todo))]

    monkeypatch.setattr(workers, "_run_overlapped", run)
    export_dataset(open_format("folder", photos), nuisance, tmp_path / "two", SETTINGS)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(photos, tmp_path):
    nuisance = Compose([build_small(), Lighting()])
    for processes in (1, 2):
        export_dataset(
            open_format("folder", photos),
            nuisance,
            tmp_path / str(processes),
            SETTINGS,
            workers=WorkerSettings(processes=processes),
        )
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


@pytest.mark.slow
def test_a_killed_worker_ends_in_one_line(photos, tmp_path):
    with pytest.raises(RunError, match="a worker process died"):
        export_dataset(
            open_format("folder", photos), _Deadly(), tmp_path / "out", SETTINGS, workers=WorkerSettings(processes=2)
        )


class _Deadly(Rotation):
    def apply(self, images, draw):
        os.kill(os.getpid(), signal.SIGKILL)


# ---- killed


def in_child(work):
    """Run `work` in a forked process; its exit status. What it raises is raised here, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            os.write(writing, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as file:
        said = file.read()  # until the child is gone
    status = os.waitpid(child, 0)[1]
    if said:
        pytest.fail(f"in the child:\n{said}")
    return status


def kill_at(moment):
    """Make this process die by SIGKILL when it renames a file for the `moment`-th time, before or after doing so.

    Several threads rename: each asks for its own number, as a shared one may have moved on when it is looked at again.
    """
    real, numbers = os.replace, itertools.count(1)

    def replace(*args):
        number = next(numbers)
        if number == moment and moment % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)
        if number == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def kill_and_resume(source, out, settings, nuisance, moments):
    kills = 0
    for moment in moments:

        def work(moment=moment):
            kill_at(moment)
            export_dataset(source, nuisance, out, settings, resume=True)

        status = in_child(work)
        assert status in (0, signal.SIGKILL), status
        kills += status == signal.SIGKILL
    export_dataset(source, nuisance, out, settings, resume=True)
    return kills


@pytest.mark.parametrize("moments", [6, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["folder", "table", "npz", "webdataset"])
def test_killed_at_random_moments_ends_in_the_same_bytes(name, moments, tmp_path):
    data, nuisance = open_format(name, INPUTS[name](tmp_path / "in")), Rotation(30)
    settings = ExportSettings(target="max", batch_size=4, near_copy=0.05)  # some are rejected: more than one round
    export_dataset(data, nuisance, tmp_path / "whole", settings)
    assert rows_of(tmp_path / "whole", status="rejected")
    draw = random.Random(f"{name}{moments}")
    kills = 0
    for _ in range(max(1, moments // 10)):  # each folder is killed several times
        out = tmp_path / f"killed-{kills}"
        chosen = [draw.randint(1, 25 if name in ("folder", "table") else 8) for _ in range(min(moments, 10))]
        kills += kill_and_resume(data, out, settings, nuisance, chosen)
        assert tree(out) == tree(tmp_path / "whole")
    assert kills >= 3


def test_killed_while_finishing(photos, tmp_path):
    source = open_format("folder", photos)
    export_dataset(source, Rotation(30), tmp_path / "whole", SETTINGS)

    def count():
        real, numbers = os.replace, itertools.count()

        def replace(*args):
            next(numbers)
            real(*args)

        os.replace = replace
        export_dataset(source, Rotation(30), tmp_path / "count", SETTINGS)
        os._exit(next(numbers))

    total = in_child(count) >> 8
    assert total > 30
    for back in range(5):
        out = tmp_path / f"late{back}"
        kill_and_resume(source, out, SETTINGS, Rotation(30), [total - back])
        assert tree(out) == tree(tmp_path / "whole")


# ---- resumed

RECORD = {
    "classifier": False,
    "entries": "4c3e75f886f5616a9d3e72e89f162e90966ce1eec51d00e096d47c6fdef9f522",
    "form": "folder",
    "settings": {
        "batch_size": 8,
        "image_size": None,
        "near_copy": 0.004,
        "off_distribution": None,
        "originals": "copy",
        "per_source": None,
        "restore_size": False,
        "seed": 0,
        "strength": 1.0,
        "target": "max",
        "tries": 5,
    },
    "translator": "6f4ffd43f465c6533366a73e94b49f3ae78680e39f88dc728982bdeadd5a154f",
}


def test_the_record_of_an_export_is_that_of_earlier_versions(photos, tmp_path):
    """So exports that were begun or finished before go on; taken from the version before formats were called so."""
    settings = replace(SETTINGS, results="square", per_source=None)
    export_dataset(open_format("folder", photos), Rotation(30.0), tmp_path / "out", settings)
    assert json.loads((tmp_path / "out" / ".gen_invariance.json").read_text()) == RECORD


def test_resume_of_a_finished_export_changes_nothing_and_other_settings_are_refused(photos, tmp_path):
    source, out = open_format("folder", photos), tmp_path / "out"
    first = export_dataset(source, Rotation(30), out, SETTINGS)
    before = tree(out)
    assert export_dataset(source, Rotation(30), out, SETTINGS, resume=True) == first
    assert tree(out) == before
    with pytest.raises(SettingsError, match="already holds an export"):
        export_dataset(source, Rotation(30), out, SETTINGS)
    with pytest.raises(SettingsError, match="target changed"):
        export_dataset(source, Rotation(30), out, replace(SETTINGS, target=5), resume=True)
    with pytest.raises(SettingsError, match="translator changed"):
        export_dataset(source, Rotation(31), out, SETTINGS, resume=True)
    (photos / "two" / "new.png").write_bytes((photos / "zero" / "000.png").read_bytes())
    with pytest.raises(SettingsError, match="images were added"):
        export_dataset(source, Rotation(30), out, SETTINGS, resume=True)


def test_a_second_export_into_the_same_folder_waits_outside(photos, tmp_path):
    import fcntl

    out = tmp_path / "out"
    (out / ".gen_invariance").mkdir(parents=True)
    with open(out / ".gen_invariance" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another export"):
            export_dataset(open_format("folder", photos), Rotation(30), out, SETTINGS)


def test_a_full_disk_stops_with_one_line_and_goes_on_later(photos, tmp_path, monkeypatch):
    whole = export_dataset(open_format("folder", photos), Rotation(30), tmp_path / "whole", SETTINGS)
    real, left = os.replace, [20]

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        export_dataset(open_format("folder", photos), Rotation(30), tmp_path / "out", SETTINGS)
    monkeypatch.setattr(os, "replace", real)
    again = export_dataset(open_format("folder", photos), Rotation(30), tmp_path / "out", SETTINGS, resume=True)
    assert again.after == whole.after
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("form", ["folder", "npz"])
@pytest.mark.parametrize("finished", [False, True])
def test_an_export_does_not_go_on_with_other_originals(form, finished, tmp_path, monkeypatch):
    source = INPUTS[form](tmp_path / form)
    out, nuisance = tmp_path / "out", Rotation(20)

    def export(*, resume):
        return export_dataset(open_format(form, source), nuisance, out, SETTINGS, resume=resume)

    if finished:
        export(resume=False)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(units.Job, "translate", stop)
            with pytest.raises(KeyboardInterrupt):
                export(resume=False)
    alter_one_pixel(source)
    with pytest.raises(DataError, match="is not the image it was when the export began"):
        export(resume=True)


def stop(self, unit, decoded):
    if unit.kind == "generated":
        raise KeyboardInterrupt
    return []


def alter_one_pixel(source):
    if source.is_dir():
        path = sorted(source.rglob("*.png"))[-1]
        pixels = np.asarray(Image.open(path)).copy()
        pixels.reshape(-1)[7] ^= 1
        Image.fromarray(pixels).save(path)
        return
    with np.load(source) as arrays:
        values = dict(arrays)
    values["train_images"].reshape(-1)[7] ^= 1
    np.savez(source, **values)
