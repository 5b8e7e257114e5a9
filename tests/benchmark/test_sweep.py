"""Sweeps: parts of a grid as Hydra jobs; launchers that are not installed are skipped."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from gen_invariance.configs import config_folder
from gen_invariance.records import finished_cells

ROOT = Path(__file__).parent.parent.parent
LAUNCHERS = {"local": "hydra_joblib_launcher", "slurm": "hydra_submitit_launcher", "on_ray": "hydra_ray_launcher"}
QUICK = [
    "benchmark=digits_rot_lt", "methods=ce_drs", "orders=0-1", "'training_options={epochs: 2}'",
    "'measure_options={draws: 1}'", "'data_options={test_images: 5}'",
]  # fmt: skip


def is_there(plugin):
    try:
        return find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:
        return False


def sweep(out, *words):
    line = [sys.executable, ROOT / "scripts" / "sweep.py", *words, f'grid="{" ".join(QUICK)} out={out}"']
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(
        line, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def test_every_launcher_has_a_config_over_that_of_its_plugin():
    folder = config_folder() / "hydra" / "launcher"
    assert {path.stem for path in folder.glob("*.yaml")} == set(LAUNCHERS)
    parents = {name: yaml.safe_load((folder / f"{name}.yaml").read_text())["defaults"] for name in LAUNCHERS}
    assert parents == {"local": ["joblib"], "slurm": ["submitit_slurm"], "on_ray": ["ray"]}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_composes(launcher, tmp_path):
    if not is_there(LAUNCHERS[launcher]):
        pytest.skip(f"{LAUNCHERS[launcher]} is not installed")
    done = sweep(tmp_path / "out", "--cfg", "hydra", f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stderr
    assert "launcher" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "local", "on_ray"])
def test_parts_make_the_whole(launcher, tmp_path):
    if launcher != "basic" and not is_there(LAUNCHERS[launcher]):
        pytest.skip(f"{LAUNCHERS[launcher]} is not installed")
    out = tmp_path / "out"
    done = sweep(out, "-m", "shard=0/2,1/2", f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stderr
    assert {cell.order for cell in finished_cells(out / "records")} == {0, 1}
    assert (out / "report" / "report.html").is_file()


@pytest.mark.slow
def test_a_part_that_fails_fails_the_sweep(tmp_path):
    done = sweep(tmp_path / "out", "-m", "shard=3/2")
    assert done.returncode != 0
    assert "shard must be i/n" in done.stderr
