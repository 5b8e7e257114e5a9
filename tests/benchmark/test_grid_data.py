"""A grid is tied to its data: what is measured later comes from the same images."""

import shutil

import numpy as np
import pytest
from PIL import Image

from gen_invariance.benchmark import grid
from gen_invariance.cli.main import run
from gen_invariance.records import load_records

QUICK = [
    "training_options={epochs: 1, warmup: 0}",
    "data_options={largest: 8, imbalance: 2, few_below: 3, many_above: 5, rest_is_test: true}",
    "classifier_options.backbone=small_conv",
]


def write_images(root, *, seed=0, names=("ant", "bee", "cat")):
    shutil.rmtree(root, ignore_errors=True)
    pixels = np.random.default_rng(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(16):
            Image.fromarray(pixels.integers(0, 256, (16, 16), dtype=np.uint8)).save(root / name / f"{index:02d}.png")


@pytest.mark.parametrize("changes", [{"seed": 1}, {"names": ("ant", "bee", "cow")}])
def test_another_order_is_refused_on_other_data(tmp_path, capsys, changes):
    data, out = tmp_path / "some", tmp_path / "out"
    words = ["benchmark", "run", "benchmark=folder", f"data_options.path={data}", "methods=ce", f"out={out}", *QUICK]

    def measure(orders, **images):
        write_images(data, **images)
        grid._prepare.cache_clear()  # as in another process
        return run([*words, f"orders={orders}"])

    assert measure("0") == 0, capsys.readouterr().err
    assert measure("0-1", **changes) == 2
    assert f"the data are not those that {out} was begun on" in capsys.readouterr().err
    assert set(load_records(out)["order"]) == {0}
    assert measure("0-1") == 0
    assert set(load_records(out)["order"]) == {0, 1}
