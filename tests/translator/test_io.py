"""Opening saved translators, and what is said of folders that hold none."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gen_invariance.errors import CheckpointError
from gen_invariance.translator.io import load_translator, save_translator
from gen_invariance.translator.munit.model import MunitTranslator
from gen_invariance.translator.spatial import SpatialTranslator

KINDS = {
    "munit": lambda: MunitTranslator(width=4, residual_blocks=1, mlp_width=8),
    "spatial": lambda: SpatialTranslator(operations=("rotation", "gain"), start=0.7),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    translator = KINDS[request.param]()
    translator.save_pretrained(tmp_path / "run" / "translator")
    return translator, tmp_path / "run" / "translator"


def test_round_trip_frozen_in_eval_and_from_the_run_folder(saved):
    translator, folder = saved
    images = torch.rand(3, 1, 16, 16)
    draw = translator.sample(images.shape, generator=torch.Generator().manual_seed(0))
    for path in (folder, folder.parent, str(folder)):
        again = load_translator(path)
        assert type(again) is type(translator)
        assert not again.training
        assert not any(parameter.requires_grad for parameter in again.parameters())
        assert torch.equal(again.apply(images, draw), translator.eval().apply(images, draw))


def test_global_stream_is_left_alone(saved):
    state = torch.random.get_rng_state()
    load_translator(saved[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights(saved, share):
    cut(saved[1] / WEIGHTS, share)
    with pytest.raises(CheckpointError, match="cannot load the translator in") as caught:
        load_translator(saved[1])
    assert "\n" not in str(caught.value)


def test_missing_weights(saved):
    (saved[1] / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_translator(saved[1])


def test_pickled_weights_are_not_opened(saved):
    (saved[1] / WEIGHTS).unlink()
    torch.save(saved[0].state_dict(), saved[1] / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_translator(saved[1])


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_damaged_config(saved, text):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_translator(saved[1])


@pytest.mark.parametrize(("config", "kind"), [([], "nameless"), ({"_class_name": "UNet2DModel"}, "UNet2DModel")])
def test_other_models(saved, config, kind):
    (saved[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"holds a {kind}.*not a translator"):
        load_translator(saved[1])


def test_weights_that_do_not_fit_their_config(tmp_path):
    for width in (4, 8):
        MunitTranslator(width=width, residual_blocks=1, mlp_width=8).save_pretrained(tmp_path / str(width))
    (tmp_path / "4" / WEIGHTS).replace(tmp_path / "8" / WEIGHTS)
    with pytest.raises(CheckpointError, match="cannot load the translator in"):
        load_translator(tmp_path / "8")


def test_weights_of_the_other_kind(tmp_path):
    for name, build in KINDS.items():
        build().save_pretrained(tmp_path / name)
    (tmp_path / "munit" / WEIGHTS).replace(tmp_path / "spatial" / WEIGHTS)
    with pytest.raises(CheckpointError, match="cannot load the translator in"):
        load_translator(tmp_path / "spatial")


def test_nan_weights(saved):
    """A translator that diverged would turn every tail image into NaN, silently."""
    translator, folder = saved
    with torch.no_grad():
        next(translator.parameters()).view(-1)[0] = float("nan")
    translator.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load_translator(folder)


def test_no_folder_and_no_config(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match="no translator in"):
            load_translator(path)


@contextmanager
def another_user():
    """Root reads everything; then somebody else does the reading. Who is not root is stopped by mode 000 alone."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared():
    """A folder that every user may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_written_weights_have_the_usual_mode(mask, mode, tmp_path):
    """Their own writer gives them 600 whatever the mask."""
    before = os.umask(mask)
    try:
        save_translator(SpatialTranslator(1), tmp_path / "translator")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "translator").iterdir()} == {
        "config.json": mode,
        WEIGHTS: mode,
    }


def test_a_translator_may_be_shared(shared):
    before = os.umask(0o022)
    try:
        save_translator(SpatialTranslator(1), shared / "translator")
    finally:
        os.umask(before)
    with another_user():
        load_translator(shared)


@pytest.mark.parametrize("closed", [WEIGHTS, "config.json", "."])
def test_files_that_may_not_be_read_are_no_damage(closed, shared):
    save_translator(SpatialTranslator(1), shared / "translator")
    load_translator(shared)  # imports what it needs
    (shared / "translator" / closed).chmod(0)
    with another_user(), pytest.raises(CheckpointError, match=r"cannot read .*translator.*: permission denied; ask"):
        load_translator(shared)
