"""Files that are written whole or not at all, and checkpoints that notice damage."""

import errno
import os
from pathlib import Path

import pytest
import torch

from gen_invariance.errors import CheckpointError, OutputError
from gen_invariance.files import atomic_write, load_checkpoint, save_checkpoint, write_json, write_text

# ---- atomic files


def test_atomic_write_makes_parents_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt()])
def test_atomic_write_keeps_the_old_file_when_the_block_fails(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"file\.txt.*No space left.*free some space") as caught:
        write_text(tmp_path / "file.txt", "text")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_copy_that_finds_no_room_is_about_its_target(tmp_path):
    """Python names the source then, which is not at fault."""
    no_room = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "source.jpg")
    not_there = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "source.jpg")
    target = tmp_path / "target.jpg"
    with pytest.raises(OutputError, match=r"cannot write .*target\.jpg: No space left"), atomic_write(target):
        raise no_room
    with pytest.raises(FileNotFoundError, match=r"source\.jpg"), atomic_write(target):
        raise not_there


@pytest.mark.parametrize("below", ["", "deep", "deep/er"])
def test_a_file_where_a_folder_should_be(tmp_path, below):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_json(tmp_path / "taken" / below / "out.json", {})


def test_folders_that_cannot_be_made_are_output_errors():
    with pytest.raises(OutputError, match="cannot write /proc"):  # not even root may create there
        write_text("/proc/no/such/file.txt", "")


def test_errors_about_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "out.txt"):
        Path(tmp_path / "elsewhere").read_text()


# ---- checkpoints


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


STATE = {"kind": "fit", "step": 3, "weights": torch.arange(6.0).view(2, 3), "names": ["a", "b"], "nested": {"x": 1.5}}


def test_checkpoint_round_trip(tmp_path):
    save_checkpoint(tmp_path / "one.ckpt", STATE)
    loaded = load_checkpoint(tmp_path / "one.ckpt", kind="fit")
    assert loaded.keys() == STATE.keys()
    assert all(same(loaded[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("keep", [0, 1, 20, 60, 200, -1])
def test_truncated_checkpoint(tmp_path, keep):
    path = tmp_path / "one.ckpt"
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"one\.ckpt"):
        load_checkpoint(path)


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "one.ckpt"
    save_checkpoint(path, STATE)
    content = path.read_bytes()
    for place in [*range(100), *range(100, len(content), 97)]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"one\.ckpt"):
            load_checkpoint(path)


def test_foreign_and_other_kinds_of_checkpoint(tmp_path):
    torch.save(STATE, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of gen_invariance"):
        load_checkpoint(tmp_path / "foreign.pt")
    save_checkpoint(tmp_path / "one.ckpt", STATE)
    with pytest.raises(CheckpointError, match="kind 'fit', not 'train'"):
        load_checkpoint(tmp_path / "one.ckpt", kind="train")
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        load_checkpoint(tmp_path / "missing.ckpt")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "one.ckpt", {"kind": "fit", "step": 1, "harm": Harmful()})
    with pytest.raises(CheckpointError, match=r"one\.ckpt"):
        load_checkpoint(tmp_path / "one.ckpt")
    assert not (tmp_path / "executed").exists()
