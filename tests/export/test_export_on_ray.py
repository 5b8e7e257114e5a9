"""On a Ray cluster: the bytes of one process, also when a worker is killed; what fails ends in one line."""

import builtins
import importlib.util
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from export_inputs import tree
from PIL import Image
from sklearn.datasets import load_digits

from gen_invariance import MunitTranslator, Rotation, SpatialTranslator
from gen_invariance.cli.main import run
from gen_invariance.errors import RunError, SettingsError
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings, WorkerSettings

SETTINGS = ExportSettings(target="max", batch_size=4, off_distribution=None, near_copy=0.03)
ON_RAY = WorkerSettings(processes=2, engine="ray")


@pytest.fixture
def photos(tmp_path):
    bunch = load_digits()
    for label, count in enumerate((16, 6, 2)):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        for row in np.flatnonzero(bunch.target == label)[:count]:
            Image.fromarray(bunch.images[row].astype(np.uint8) * 15).save(tmp_path / "photos" / f"{label}/{row}.png")
    return open_format("folder", tmp_path / "photos")


class DeadlyOnce(Rotation):
    """Kills its process when it is used for the first time, which a file remembers."""

    def __init__(self, flag):
        super().__init__(30)
        self.flag = str(flag)

    def apply(self, images, draw):
        if not os.path.exists(self.flag):
            open(self.flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().apply(images, draw)


class Deadly(Rotation):
    def apply(self, images, draw):
        os.kill(os.getpid(), signal.SIGKILL)


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray")


@needs_ray
@pytest.mark.slow
def test_by_the_command_on_a_cluster_of_its_own(photos, tmp_path, capfd):
    import ray

    assert not ray.is_initialized()  # it comes before the tests that share a cluster
    SpatialTranslator(1, start=0.3).save_pretrained(tmp_path / "t")
    words = [f"data.path={photos.path}", f"translator={tmp_path / 't'}", "off_distribution=null", "target=max"]
    assert run(["augment", *words, f"out={tmp_path / 'ray'}", "engine=ray", "processes=2"]) == 0
    assert capfd.readouterr().err == ""  # Ray writes past Python's streams
    assert run(["augment", *words, f"out={tmp_path / 'one'}"]) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "ray")
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster():
    """One local cluster for all tests: exports join what is there."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors do not find this file
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
    yield
    ray.shutdown()


@needs_ray
@pytest.mark.slow
def test_one_process_two_processes_and_two_actors_write_the_same_bytes(photos, tmp_path, cluster):
    nuisance = MunitTranslator(1, width=8, downsamples=1, residual_blocks=1, style_downsamples=2, mlp_width=8)
    workers = {"one": WorkerSettings(), "two": WorkerSettings(processes=2), "ray": ON_RAY}
    for name, settings in workers.items():
        export_dataset(photos, nuisance, tmp_path / name, SETTINGS, workers=settings)
    assert any(name.endswith(".png") and "__" in name for name in tree(tmp_path / "one"))
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "ray")


@needs_ray
@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_the_bytes_are_the_same(photos, tmp_path, cluster):
    flag = tmp_path / "flag"
    export_dataset(photos, DeadlyOnce(flag), tmp_path / "ray", SETTINGS, workers=ON_RAY)
    assert flag.exists()
    export_dataset(photos, DeadlyOnce(flag), tmp_path / "one", SETTINGS)
    assert tree(tmp_path / "one") == tree(tmp_path / "ray")


@needs_ray
@pytest.mark.slow
def test_a_unit_that_kills_every_actor_ends_in_one_line(photos, tmp_path, cluster):
    with pytest.raises(RunError, match="died and could not be replaced"):
        export_dataset(photos, Deadly(), tmp_path / "out", SETTINGS, workers=ON_RAY)
    export_dataset(photos, Deadly(), tmp_path / "none", ExportSettings(target=1), workers=ON_RAY)  # none is needed


@needs_ray
@pytest.mark.slow
def test_errors_of_actors_are_those_of_the_package(photos, tmp_path, cluster, monkeypatch):
    export_dataset(photos, Rotation(30), tmp_path / "out", ExportSettings(target=1))
    from gen_invariance.errors import OutputError
    from gen_invariance.export import ray as on_ray
    from gen_invariance.export import units
    from gen_invariance.export.formats.base import Output

    job = units.Job(photos, Output(tmp_path / "out", tmp_path / "elsewhere"), SETTINGS, Rotation(30), "")
    unit = units.Unit("a-0", "original", ((photos.entries()[0], -1),))
    (tmp_path / "elsewhere").write_text("in the way")
    with on_ray.start_ray_workers(job, workers=1) as run_units, pytest.raises(OutputError, match="cannot write"):
        list(run_units([unit]))

    (tmp_path / "elsewhere").unlink()
    with on_ray.start_ray_workers(job, workers=1) as run_units:
        names = run_units([unit])
        monkeypatch.setattr(Path, "is_file", lambda path: False)  # it is written, but on another machine's disk
        with pytest.raises(RunError, match="all machines share"):
            next(names)


@needs_ray
@pytest.mark.parametrize(("workers", "gpus", "share"), [(1, 1, 1.0), (2, 8, 1.0), (8, 2, 0.25), (5, 2, 1 / 3)])
def test_actors_share_the_gpus(workers, gpus, share, monkeypatch):
    """More actors than GPUs fit on them all the same; one that asks for more than is left waits for ever."""
    from gen_invariance.export import ray as on_ray

    monkeypatch.setattr(on_ray.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    assert on_ray._share_of_gpu(workers) == pytest.approx(share)
    assert gpus * int(1 / share + 1e-9) >= workers
    monkeypatch.setattr(on_ray.ray, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(SettingsError, match="no GPU"):
        on_ray._share_of_gpu(workers)


@needs_ray
def test_no_cluster_at_the_address(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    workers = WorkerSettings(engine="ray", ray_address="127.0.0.1:1")
    with pytest.raises(SettingsError, match="cannot join the Ray cluster at 127"):
        export_dataset(photos, Rotation(30), tmp_path / "out", SETTINGS, workers=workers)


def test_without_ray_it_says_what_to_install(photos, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "gen_invariance.export.ray", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match=r"gen_invariance\[ray\]"):
        export_dataset(photos, Rotation(30), tmp_path / "out", SETTINGS, workers=WorkerSettings(engine="ray"))


def test_unknown_engine():
    with pytest.raises(SettingsError, match="engine must be one of local, ray"):
        WorkerSettings(engine="spark")
