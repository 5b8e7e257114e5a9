"""Run folders from elsewhere: links that lead out, pipes and devices are named; nothing is written or waited for."""

import os
import shutil

import pytest
import torch

from gen_invariance.errors import CheckpointError, GenInvarianceError, OutputError
from gen_invariance.files import load_checkpoint, read_json, refuse_strangers
from gen_invariance.run import Run
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.verdict import read_verdict
from gen_invariance.translator.spatial import SpatialTranslator


@pytest.fixture
def folder(tmp_path):
    """A run folder with everything in it, and a folder outside."""
    run = Run(tmp_path / "run", kind="fit", config={"steps": 1})
    run.log(step=1, loss=0.5)
    run.save(1, {"weight": torch.zeros(2)})
    for name in ("records", "measures", "samples"):
        (run.path / name).mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "step-00000001.ckpt").write_text("mine")
    (tmp_path / "outside" / "metrics.jsonl").write_text("mine\n")
    return run.path


def open_again(folder):
    run = Run(folder, kind="fit", config={"steps": 1}, resume=True)
    run.load_latest()
    run.log(step=2, loss=0.4)
    run.save(2, {"weight": torch.zeros(2)})


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "records", "measures", "samples", "run.json"])
@pytest.mark.parametrize("kind", ["absolute", "relative", "pipe"])
def test_a_run_folder_cannot_write_elsewhere(folder, name, kind):
    path, outside = folder / name, folder.parent / "outside"
    path.unlink() if path.is_file() else shutil.rmtree(path)
    target = outside / "metrics.jsonl" if "." in name else outside
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target if kind == "absolute" else os.path.relpath(target, folder))
    before = {each.name: each.read_bytes() for each in outside.iterdir()}
    with pytest.raises((OutputError, CheckpointError), match=name):
        open_again(folder)
    assert {each.name: each.read_bytes() for each in outside.iterdir()} == before


def test_links_within_the_folder_and_to_the_folder_are_fine(folder):
    (folder / "checkpoints").rename(folder / "kept")
    (folder / "checkpoints").symlink_to("kept")
    (folder.parent / "link").symlink_to(folder)
    open_again(folder.parent / "link")
    refuse_strangers(folder.parent / "nowhere")


def spoil(path, kind):
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"")
        os.truncate(path, 2**40)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "sparse"])
@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "quality.json"])
def test_a_translator_of_odd_files_is_refused(tmp_path, name, kind):
    SpatialTranslator(1).save_pretrained(tmp_path)
    (tmp_path / "quality.json").write_text("{}")
    spoil(tmp_path / name, kind)
    if name == "quality.json" and kind != "sparse":
        assert read_verdict(tmp_path) is None  # there is no such file
        return
    with pytest.raises(CheckpointError, match=tmp_path.name):
        read_verdict(tmp_path) if name == "quality.json" else load_translator(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "sparse"])
def test_checkpoints_and_descriptions_of_odd_files_are_refused(folder, kind):
    checkpoint = folder / "checkpoints" / "step-00000001.ckpt"
    spoil(checkpoint, kind)
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_checkpoint(checkpoint)
    spoil(folder / "run.json", kind)
    with pytest.raises(OSError, match=r"regular|bytes|directory"):
        read_json(folder / "run.json")
    with pytest.raises(GenInvarianceError):
        open_again(folder)
