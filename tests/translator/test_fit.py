"""The fitting loop: resuming to the bit, class-balanced draws, stopping in time, and what it leaves in the folder."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from sklearn.datasets import load_digits

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.errors import CheckpointError, OutputError, RunError, SettingsError
from gen_invariance.run import Run
from gen_invariance.translator.fit import fit_objective, fit_translator
from gen_invariance.translator.io import load_translator, save_translator
from gen_invariance.translator.redraw.fit import pick_aligned_rows
from gen_invariance.translator.redraw.tone import read_tone
from gen_invariance.translator.registry import build_objective
from gen_invariance.translator.samples import tile
from gen_invariance.translator.settings import FitSettings, parse_seconds

NETWORKS = {
    "munit": {"network": {"width": 4, "residual_blocks": 1, "mlp_width": 8}, "settings": {"discriminator_width": 4}},
    "spatial": {"settings": {"discriminator_width": 4}},
    "flow": {"network": {"width": 8, "bank_size": 16}},
}


def digits(counts=(30, 20, 5)):
    """Real digits of the first classes, so many of each, 16 x 16."""
    bunch = load_digits()
    rows = torch.cat(
        [torch.from_numpy((bunch.target == label).nonzero()[0])[:count] for label, count in enumerate(counts)]
    )
    ink = torch.from_numpy(bunch.images).float()[rows, None] / 16
    images = torch.nn.functional.interpolate(ink, size=(16, 16), mode="bilinear", align_corners=False)
    return ImageData(to_uint8(images), torch.from_numpy(bunch.target)[rows].long(), tuple("0123456789")[: len(counts)])


def objective(name="munit", seed=0):
    return build_objective(name, digits(), seed=seed, **NETWORKS[name])


def settings(**changes):
    return FitSettings(
        **{"steps": 6, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "sample_every": 6, **changes}
    )


class Interrupted(Exception):
    pass


def interrupt(whole, at):
    """Make the objective fail in step `at`, as a kill would."""
    steps, original = iter(range(10**6)), whole.forward

    def forward(images, draw):
        if next(steps) == at:
            raise Interrupted
        return original(images, draw)

    whole.forward = forward
    return whole


def weights(folder):
    return load_translator(folder).state_dict()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("at", [1, 3, 5])
def test_resumed_equals_uninterrupted_to_the_bit(name, at, tmp_path):
    straight = Run(tmp_path / "straight", kind="fit", seed=7)
    fit_objective(objective(name), digits(), settings(), run=straight, progress=False)

    halted = Run(tmp_path / "halted", kind="fit", seed=7)
    with pytest.raises(Interrupted):
        fit_objective(interrupt(objective(name), at), digits(), settings(), run=halted, progress=False)
    again = Run(tmp_path / "halted", kind="fit", seed=7, resume=True)
    fresh = objective(name, seed=99)  # every weight must come from the checkpoint, if there is one
    fit_objective(fresh if at > 2 else objective(name), digits(), settings(), run=again, progress=False)

    expected, got = weights(straight.path), weights(again.path)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert again.metrics() == straight.metrics()


def test_same_seed_same_weights_and_other_seed_others(tmp_path):
    found = []
    for place, seed in enumerate((1, 1, 2)):
        run = Run(tmp_path / str(place), kind="fit", seed=seed)
        state = torch.random.get_rng_state()
        fit_objective(objective(), digits(), settings(steps=2), run=run, progress=False)
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append(torch.cat([value.flatten() for value in weights(run.path).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_is_left_in_the_folder(tmp_path):
    run = Run(tmp_path / "run", kind="fit")
    whole = objective()
    translator = fit_objective(
        whole, digits(), settings(sample_every=3, log_every=2, classes="all"), run=run, progress=False
    )
    assert not translator.training
    names = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
    assert names == {
        "run.json",
        "metrics.jsonl",
        "translator/config.json",
        "translator/diffusion_pytorch_model.safetensors",
        "checkpoints/step-00000004.ckpt",
        "checkpoints/step-00000006.ckpt",
        "samples/step-00000003.png",
        "samples/step-00000006.png",
    }
    assert [row["step"] for row in run.metrics()] == [2, 4, 6]
    assert set(run.metrics()[0]) == {"step", "discriminator", "adversarial", "image", "style", "content"}
    saved = load_translator(run.path).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in translator.state_dict().items())


def test_sample_grid_is_a_png_of_classes_by_draws(tmp_path):
    run = Run(tmp_path / "run", kind="fit")
    data = digits()
    fit_objective(objective(), data, settings(classes="all"), run=run, progress=False)
    with Image.open(run.path / "samples" / "step-00000006.png") as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        assert picture.size == (8 * (64 + 2), 3 * (64 + 2))  # an untouched image and 7 draws; a class a row
        pixels = torch.from_numpy(np.array(picture))
    first = pixels[1:65:4, 1:65:4, 0]  # enlarged fourfold inside a frame of one pixel
    assert torch.equal(first, data.images[0, 0])


def test_tile_places_every_cell():
    cells = torch.rand(2, 3, 3, 4, 5)
    picture = torch.from_numpy(tile(cells, enlarge=2, gap=1)).float() / 255
    assert picture.shape == (2 * (8 + 2), 3 * (10 + 2), 3)
    for row in range(2):
        for column in range(3):
            top, left = row * 10 + 1, column * 12 + 1
            cell = picture[top : top + 8 : 2, left : left + 10 : 2].permute(2, 0, 1)
            torch.testing.assert_close(cell, cells[row, column], atol=0.5 / 255 + 1e-6, rtol=0)
    assert (picture[0] == 1).all()


class Watch:
    """Keeps the batches that an objective is shown."""

    def __init__(self, whole):
        self.seen, original = [], whole.forward
        whole.forward = lambda images, draw: self.seen.append(images) or original(images, draw)


def shares_of_classes(data, images):
    """How often each class is among `images`, found by looking the pixels up."""
    place = {image.numpy().tobytes(): int(label) for image, label in zip(data.images, data.labels, strict=True)}
    pixels = to_uint8(torch.cat(images))
    found = torch.tensor([place[image.numpy().tobytes()] for image in pixels])
    return torch.bincount(found, minlength=data.num_classes) / len(found)


def test_classes_are_drawn_evenly_and_tail_classes_not_at_all(tmp_path):
    data, whole = digits((30, 20, 5)), objective("spatial")
    watch = Watch(whole)
    fit_objective(
        whole, data, settings(steps=10, batch_size=60), run=Run(tmp_path / "head", kind="fit"), progress=False
    )
    shares = shares_of_classes(data, watch.seen)
    assert shares[2] == 0
    pixels = {image.numpy().tobytes() for image in to_uint8(torch.cat(watch.seen))}
    assert len(pixels) == 50, "and each image of a class has its turn"
    assert abs(shares[0] - 0.5) < 5 * (0.25 / 600) ** 0.5

    watch.seen.clear()
    every = settings(steps=10, batch_size=60, classes="all")
    fit_objective(whole, data, every, run=Run(tmp_path / "all", kind="fit"), progress=False)
    shares = shares_of_classes(data, watch.seen)
    assert (shares - 1 / 3).abs().max() < 5 * (2 / 9 / 600) ** 0.5


def test_flip_mirrors_about_half(tmp_path):
    data, whole = digits(), objective("spatial")
    watch = Watch(whole)
    fit_objective(
        whole, data, settings(steps=4, batch_size=50, flip=True), run=Run(tmp_path, kind="fit"), progress=False
    )
    own = {image.numpy().tobytes() for image in data.images}
    kept = [image.numpy().tobytes() in own for image in to_uint8(torch.cat(watch.seen))]
    assert 0.3 < sum(kept) / len(kept) < 0.7


@pytest.mark.parametrize("bad", ["image", "discriminator"])
def test_a_term_that_is_not_finite_stops_the_fit_and_is_named(bad, tmp_path):
    whole = objective()
    side = "translator_terms" if bad == "image" else "discriminator_terms"
    original, calls = getattr(whole, side), iter(range(100))

    def broken(out):
        terms = original(out)
        if next(calls) == 4:
            terms[bad] = terms[bad] * float("inf")
        return terms

    setattr(whole, side, broken)
    run = Run(tmp_path / "run", kind="fit")
    with pytest.raises(RunError, match=f"stopped at step 5: loss term '{bad}' is (inf|nan)"):
        fit_objective(whole, digits(), settings(), run=run, progress=False)
    state = run.load_latest()
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["translator"].values())
    assert not (run.path / "translator").exists()


def test_weights_that_broke_in_the_last_step_are_not_kept(tmp_path):
    """The terms of a step are finite although its update is not: the checkpoint after it must not be written."""
    whole = objective()
    run = Run(tmp_path / "run", kind="fit")
    original, calls = whole.compute_learning_rates, iter(range(100))
    whole.compute_learning_rates = lambda step, steps: (
        {**original(step, steps), "translator": float("inf")} if next(calls) == 5 else original(step, steps)
    )
    with pytest.raises(RunError, match="step 6: a weight of the translator"):
        fit_objective(whole, digits(), settings(), run=run, progress=False)
    assert run.load_latest()["step"] == 4
    assert not (run.path / "translator").exists()


def test_no_class_is_large_enough(tmp_path):
    with pytest.raises(SettingsError, match=r"no class has 31 images or more \(largest: 30\); lower fit.head_from"):
        fit_objective(objective(), digits(), settings(head_from=31), run=Run(tmp_path, kind="fit"), progress=False)


@pytest.mark.parametrize("name", ["munit", "spatial", "flow", "pose", "redraw"])
def test_every_translator_takes_a_subset_of_classes(name, tmp_path, monkeypatch):
    """Only images of the named classes reach grids and banks, however small the classes are."""
    data, loop = digits((30, 20, 9)), settings(classes=["2", 0], steps=1)
    rows = {}
    monkeypatch.setattr(
        "gen_invariance.translator.fit.write_grid",
        lambda name, translator, data, members, run: rows.update(members=members),
    )
    network = {"flow": {"width": 16, "bank_size": 4}, "munit": NETWORKS["munit"]["network"]}.get(name, {})
    chosen = {"redraw": {"parts": ["tone"], "kind": "figure"}}.get(name, network)
    translator = fit_translator(name, data, loop, network=chosen, out=tmp_path / "run", progress=False)
    assert {int(data.labels[own].unique()) for own in rows["members"]} == {0, 2}
    if name == "redraw":  # its bank holds what was read off images of these classes, and of no others
        ink = read_tone(data.float_images(), kind="figure").ink
        allowed = set(ink[data.labels != 1].flatten().tolist())
        assert set(translator.ink.flatten().tolist()) <= allowed
        assert len(set(translator.ink.flatten().tolist())) > 5


def test_bank_of_poses_is_of_the_named_classes():
    data, loop = digits((30, 20, 9)), settings(classes=["2"])
    head, tail = pick_aligned_rows(data, loop, Run(None, kind="fit"), most=200)
    assert [int(data.labels[rows].unique()) for rows in head] == [2]
    assert [int(data.labels[rows].unique()) for rows in tail] == [0, 1]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["0", "nine"], r"data has no class 'nine' to fit on; choose of 0, 1, 2, 3$"),
        (["3"], r"data: class '3' has no image to fit on; name another one$"),
    ],
)
def test_classes_that_are_not_there(classes, message, tmp_path):
    run = Run(tmp_path, kind="fit")
    data = digits()
    data = ImageData(data.images, data.labels, ("0", "1", "2", "3"))
    with pytest.raises(SettingsError, match=message):
        fit_objective(objective(), data, settings(classes=classes), run=run, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": []},
        {"classes": ["0", 0]},
        {"average": 1.0},
        {"average": -0.1},
        {"budget": "ten minutes"},
        {"budget": "0min"},
        {"budget": "5 m"},
        {"watch_every": -1},
        {"patience": 3},
        {"steps": 0},
        {"batch_size": 0},
        {"head_from": 0},
        {"log_every": 0},
        {"checkpoint_every": -1},
        {"classes": "tail"},
        {"mixed_precision": "fp8"},
    ],
)
def test_bad_settings_are_named(change):
    with pytest.raises(SettingsError, match=next(iter(change))):
        FitSettings(**change)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5 min", 90), ("2h", 7200), (" 10min ", 600)])
def test_times_are_read(text, seconds):
    assert parse_seconds(text) == seconds


def test_identity_names_what_was_added_later_only_where_it_is_on():
    """Runs that were begun before there was a moving average go on."""
    before = {"steps", "batch_size", "classes", "head_from", "flip", "mixed_precision"}
    assert set(settings(budget="1h").identity()) == before
    assert set(settings(average=0.9, watch_every=2, patience=1).identity()) == before | {
        "average",
        "watch_every",
        "patience",
    }


def test_identity_leaves_out_how_often_one_looks():
    assert settings(log_every=1).identity() == settings(log_every=5, checkpoint_every=1, sample_every=1).identity()
    assert settings(steps=3).identity() != settings(steps=4).identity()
    json.dumps(settings().identity())


def test_a_checkpoint_of_another_translator_is_refused(tmp_path):
    run = Run(tmp_path / "run", kind="fit")
    fit_objective(objective("munit"), digits(), settings(steps=2), run=run, progress=False)
    with pytest.raises(CheckpointError, match="does not fit this translator"):
        fit_objective(objective("spatial"), digits(), settings(), run=run, progress=False)


def test_a_finished_fit_is_only_saved_again(tmp_path):
    run = Run(tmp_path / "run", kind="fit")
    fit_objective(objective(), digits(), settings(steps=2), run=run, progress=False)
    before = weights(run.path)
    for path in (run.path / "translator").iterdir():
        path.unlink()  # killed between the last checkpoint and the end
    whole = objective(seed=5)
    watch = Watch(whole)
    fit_objective(whole, digits(), settings(steps=2), run=run, progress=False)
    assert watch.seen == []
    assert all(torch.equal(value, before[name]) for name, value in weights(run.path).items())


def test_saving_where_a_file_is_in_the_way(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        save_translator(objective().translator, tmp_path / "taken" / "translator")


def test_unknown_translator_and_setting():
    with pytest.raises(
        SettingsError, match="unknown translator 'gan'; choose one of redraw, pose, spatial, flow, munit"
    ):
        fit_translator("gan", digits())
    with pytest.raises(SettingsError, match="widht"):
        fit_translator("munit", digits(), network={"widht": 3})
    with pytest.raises(SettingsError, match=r"translator.network: width must be at least 1, got 0"):
        fit_translator("munit", digits(), network={"width": 0})
    with pytest.raises(SettingsError, match=r"translator.objective.learning_rate must be positive, got 0"):
        fit_translator("spatial", digits(), objective={"learning_rate": 0.0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision fits on a GPU only")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_precision_fits_about_alike_on_a_gpu(name, precision, tmp_path):
    """Without unscaling, fp16 gradients would be 65536 times too large for the weight decay, or overflow."""
    AcceleratorState._reset_state(reset_partial_state=True)
    found = {}
    for kind in dict.fromkeys(("no", precision)):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = Run(tmp_path / kind, kind="fit")
        how = settings(steps=20, mixed_precision=kind)
        fit_objective(objective(name), digits().to("cuda"), how, run=run, progress=False)
        found[kind] = torch.cat([value.flatten() for value in weights(run.path).values()])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert found[precision].isfinite().all()
    torch.testing.assert_close(found[precision], found["no"], atol=5e-3, rtol=0.05)


PROGRAM = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from test_fit import digits, objective, settings
from gen_invariance.run import Run, named_generator
from gen_invariance.translator.fit import fit_objective
import os
rank = os.environ["RANK"]
run = Run(sys.argv[1] + rank, kind="fit", seed=3)
translator = fit_objective(objective(sys.argv[2]), digits(), settings(steps=3), run=run, progress=False)
torch.save(translator.state_dict(), sys.argv[1] + rank + ".pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_fit_what_one_does(name, tmp_path):
    """No batch statistics and equal shares: the mean of two half-batch gradients is the whole batch's."""
    run = Run(tmp_path / "one", kind="fit", seed=3)
    one = fit_objective(objective(name), digits(), settings(steps=3), run=run, progress=False).state_dict()
    program = textwrap.dedent(PROGRAM).format(paths=[os.path.dirname(__file__)])
    port = str(20000 + os.getpid() % 20000)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "rank"), name],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in one.items():
        assert torch.equal(ranks[0][key], ranks[1][key]), key
        torch.testing.assert_close(ranks[0][key], value, atol=1e-4, rtol=1e-3)


def test_a_full_disk_while_weights_are_written_is_one_error(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from gen_invariance.errors import OutputError
    from gen_invariance.translator.io import save_translator
    from gen_invariance.translator.spatial import SpatialTranslator

    def full(self, *_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(SpatialTranslator, "save_pretrained", full)
    with pytest.raises(OutputError, match="No space left"):
        save_translator(SpatialTranslator(1), tmp_path / "translator")
    assert not (tmp_path / "translator").exists()


def test_in_memory_and_in_a_folder_the_same_is_fitted(tmp_path):
    """Without a folder nothing is written; with one the result is there, and `resume` goes on."""
    how = {"settings": settings(steps=4), "seed": 5, "progress": False}
    inside = fit_translator("spatial", digits(), **how)
    assert list(tmp_path.iterdir()) == []
    written = fit_translator("spatial", digits(), **how, out=tmp_path / "run")
    assert torch.equal(inside.width_shares, written.width_shares)
    assert torch.equal(weights(tmp_path / "run")["width_shares"], inside.width_shares)
    with pytest.raises(SettingsError, match="already holds a run"):
        fit_translator("spatial", digits(), **how, out=tmp_path / "run")
    (tmp_path / "run" / "translator" / "config.json").unlink()
    fit_translator("spatial", digits(), **how, out=tmp_path / "run", resume=True)
    assert torch.equal(weights(tmp_path / "run")["width_shares"], inside.width_shares)
    with pytest.raises(SettingsError, match="settings differ from the run's in fit"):
        fit_translator("spatial", digits(), settings(steps=5), seed=5, out=tmp_path / "run", resume=True)


def test_a_folder_made_for_bad_input_is_removed(tmp_path):
    with pytest.raises(SettingsError, match="no class has 31 images"):
        fit_translator("redraw", digits(), settings(head_from=31), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
