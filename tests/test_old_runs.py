"""Runs that an earlier version wrote are still read: tests/fixtures/runs_58c00f3 says how they were made."""

import json
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import gen_invariance.run as run_folders
from gen_invariance.cli.main import run
from gen_invariance.records import load_records
from gen_invariance.run import named_generator
from gen_invariance.translator.io import load_translator

ARCHIVE = Path(__file__).parent / "fixtures" / "runs_58c00f3" / "runs.tar.xz"
DATA = ["data.largest=40", "data.imbalance=8", "data.few_below=10", "data.many_above=20"]
FIT = ["fit.steps=4", "fit.batch_size=8", "fit.checkpoint_every=2", "fit.sample_every=4"]
SPATIAL = [
    *("fit", "data=digits_rotation", *DATA, *FIT),
    *("translator=spatial", "translator.objective.discriminator_width=4"),
]
TRAIN = [
    *("train", "data=digits_rotation", *DATA, "classifier.weights=start.safetensors", "training.epochs=2"),
    *("training.warmup=0", "training.batch_size=32", "training.checkpoint_every=1"),
]
STAGE = [
    *("training.momentum=0", "training.learning_rate=1e-12"),
    *("stage=translator", "stage.translator=fit-spatial", "stage.policy=everywhere"),
]
GRID = [
    *("benchmark", "run", "benchmark=digits_rot_lt", "methods=[ce_drs,ce_drs+spatial]", "orders=0", "out=grid"),
    *("training_options.epochs=3", "fit_options.spatial.steps=2", "fit_options.spatial.batch_size=8"),
    *("measure_options.draws=1", "measure_options.invariance_images=10", "data_options.largest=40"),
]
ORDER = [
    *("order", "data.test_images=4", "order.choose=list", "order.subsets=[[0,1,2]]", "order.seeds=[0]"),
    *("order.draws=1", "order.source.epochs=2", "order.source.images_per_class=10"),
    *("order.analysis.resamples=100", "order.pool=5"),
]
AUGMENT = [
    *("augment", "data=npz", "data.path=some.npz", "data.image_size=16", "data.rest_is_test=false", "target=median"),
    *("translator=fit-spatial", "force=true", "learn.head_from=4"),
    *("results=square", "per_source=null"),  # the defaults of then
]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder that the old runs lie in, which the process works in."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own
    return tmp_path


def printed(arguments, capsys):
    capsys.readouterr()
    assert run(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["spatial", "redraw", "pose", "flow", "munit"])
def test_translators_load_and_translate(runs, kind):
    translator = load_translator(f"fit-{kind}")
    # On a plain ground: of noise `redraw` once made blank images, which are not emitted any more.
    images = F.pad(torch.rand(3, 1, 10, 10, generator=named_generator(0, "images")), (3, 3, 3, 3))
    draw = translator.sample(images.shape, generator=named_generator(0, "draw"))
    moved = translator.apply(images, draw)
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not torch.equal(moved, images)
    stored = load_file(Path(f"fit-{kind}") / "translator" / "diffusion_pytorch_model.safetensors")
    state = translator.state_dict()
    assert set(stored) == set(state)
    assert all(torch.equal(state[name], value) for name, value in stored.items())


def test_a_finished_run_has_nothing_left_to_do(runs, capsys, monkeypatch):
    """The same commands with resume=true leave the weights as they are."""
    files = [*runs.glob("*/checkpoints/*"), *runs.glob("fit-spatial/translator/*.safetensors")]
    before = {path: path.read_bytes() for path in files}
    assert len(before) == 6
    printed([*SPATIAL, "out=fit-spatial", "resume=true"], capsys)
    printed([*TRAIN, "transfer=frozen", "out=train-plain", "resume=true"], capsys)
    assert {path: path.read_bytes() for path in before} == before


def test_a_stopped_fit_goes_on_to_where_the_other_got(runs, capsys):
    printed([*SPATIAL, "out=fit-half", "resume=true"], capsys)
    went_on, whole = (load_translator(folder).state_dict() for folder in ("fit-half", "fit-spatial"))
    assert set(went_on) == set(whole)
    for name, value in whole.items():
        torch.testing.assert_close(went_on[name], value, rtol=1e-3, atol=1e-4)
    steps = [json.loads(line)["step"] for line in Path("fit-half/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_stopped_training_goes_on_to_where_the_other_got(runs, capsys):
    printed([*TRAIN, *STAGE, "out=train-half", "resume=true"], capsys)
    went_on, whole = (
        run_folders.load_checkpoint(Path(folder) / "checkpoints" / "step-00000002.ckpt")
        for folder in ("train-half", "train-stage")
    )
    assert set(went_on["model"]) == set(whole["model"])
    for name, value in whole["model"].items():
        torch.testing.assert_close(went_on["model"][name], value, rtol=1e-3, atol=1e-3)


def test_a_training_is_measured_as_it_was(runs, capsys):
    name = Path("train-plain/measures/data/figures.json")
    before = json.loads(name.read_text())
    printed(["measure", "run=train-plain", "draws=2"], capsys)
    after = json.loads(name.read_text())
    assert set(after) == set(before) | {f"{group}calibration_error" for group in ("", "many_", "medium_", "few_")}
    assert after["balanced_accuracy"] == pytest.approx(before["balanced_accuracy"], abs=0.01)


def test_records_are_read_and_reported(runs, capsys):
    grid, trained, order = (load_records(f"{folder}/records") for folder in ("grid", "train-plain", "order"))
    assert set(grid["method"]) == {"ce_drs", "ce_drs+spatial"}
    assert set(trained["benchmark"]) == {"digits-rotation"}
    assert len(order) > 0
    assert set(grid.columns) == set(trained.columns) == set(order.columns)
    printed(["report", "records=[grid,train-plain]", "out=page"], capsys)
    assert "ce_drs+spatial" in Path("page/report.html").read_text()


def test_a_grid_knows_its_cells_by_their_digests(runs, capsys):
    said = printed(GRID, capsys)
    assert said.startswith("2 cells, 0 to measure and 0 translators to fit\n")


def test_an_order_is_read_again_from_its_cells(runs, capsys):
    before = {path: path.read_bytes() for path in Path("order/cells").iterdir()}
    assert len(before) == 2
    printed([*ORDER, "out=order", "resume=true"], capsys)
    assert {path: path.read_bytes() for path in Path("order/cells").iterdir()} == before
    assert Path("order/order.html").exists()


def test_an_augmented_set_has_nothing_left_to_make(runs, capsys):
    before = Path("augmented/manifest.jsonl").read_bytes()
    assert "2 new images" in printed([*AUGMENT, "out=augmented", "resume=true"], capsys)
    assert Path("augmented/manifest.jsonl").read_bytes() == before
