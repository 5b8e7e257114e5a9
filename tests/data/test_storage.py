"""Pixels in a mapped file are the pixels in memory; the file leaves nothing behind; a full disk is one line."""

import errno
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gen_invariance.data import storage
from gen_invariance.data.images import ImageData
from gen_invariance.data.readers.folder import read_image_folder
from gen_invariance.data.storage import empty_images, is_mapped, take_rows
from gen_invariance.errors import OutputError
from gen_invariance.experiment.settings import Task
from gen_invariance.experiment.task import prepare
from gen_invariance.nuisance.compose import Identity, transform_once
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.run import named_generator


@pytest.fixture(autouse=True)
def pixels(tmp_path, monkeypatch):
    """The folder of mapped files; whatever is taken out of mapped images is mapped, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_SMALL", 1)
    return tmp_path / "cache" / "gen_invariance" / "pixels"


def mapped(images):
    room = empty_images(images.shape, map_from=0)
    assert is_mapped(room)
    return room.copy_(images)


def some_images(count=12, channels=3, seed=0):
    return torch.randint(0, 256, (count, channels, 9, 7), generator=named_generator(seed), dtype=torch.uint8)


def photos(folder, *, colours):
    """Two classes of five pictures; `colours` says which of a class are no grey ones."""
    dice = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(5):
            shape = (20, 24, 3) if number in colours else (20, 24)
            Image.fromarray(dice.integers(0, 256, shape, dtype=np.uint8)).save(folder / name / f"{number}.png")


def test_room_is_in_memory_below_the_bound_and_leaves_no_file_above(pixels):
    assert not is_mapped(empty_images((10, 3, 8, 8), map_from=1921))
    assert not pixels.exists()
    room = empty_images((10, 3, 8, 8), map_from=1920)
    assert is_mapped(room)
    assert is_mapped(room[3:].flatten(1))
    assert list(pixels.iterdir()) == [], "the file has no name any more, so nothing can leave it behind"
    room.fill_(7)
    assert room.float().mean() == 7
    assert empty_images((0, 3, 8, 8), map_from=0).shape == (0, 3, 8, 8)


def test_a_full_disk_is_named_before_anything_is_read(pixels, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"images of 0.0 GB do not fit in .*No space left.*data.map_from"):
        empty_images((2, 3, 8, 8), map_from=0)
    assert list(pixels.iterdir()) == []


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(rows=st.lists(st.integers(0, 11), max_size=30), at_once=st.integers(1, 5))
def test_rows_are_those_of_an_index_whatever_is_copied_at_a_time(rows, at_once, monkeypatch):
    monkeypatch.setattr(storage, "_CHUNK", at_once * some_images()[0].numel())
    images, rows = some_images(), torch.tensor(rows, dtype=torch.int64)
    taken = take_rows(mapped(images), rows)
    assert torch.equal(taken, images[rows])
    assert is_mapped(taken) == bool(len(rows))


def test_a_set_of_mapped_images_is_the_set_in_memory(monkeypatch):
    monkeypatch.setattr(storage, "_CHUNK", 5 * some_images()[0].numel())
    labels = torch.arange(12) % 3
    plain = ImageData(some_images(), labels, ("a", "b", "c"))
    other = ImageData(mapped(some_images()), labels, ("a", "b", "c"))
    assert other.digest == plain.digest
    for before, after in zip(plain.mean_std(), other.mean_std(), strict=True):
        assert torch.equal(before, after)
    assert other.select_classes([2, 0]).digest == plain.select_classes([2, 0]).digest
    assert is_mapped(other.select_classes([2, 0]).images)
    for nuisance in (Identity(), Rotation(90)):
        moved = [transform_once(each, nuisance, generator=named_generator(0), chunk=5)[0] for each in (plain, other)]
        assert moved[0].digest == moved[1].digest
        assert is_mapped(moved[1].images)
    assert other.digest == plain.digest, "the images themselves stay"


@pytest.mark.parametrize("colours", [(), (0,), (3,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_a_folder_is_read_alike_into_memory_and_into_a_file(colours, channels, tmp_path, pixels):
    photos(tmp_path / "photos", colours=colours)
    (tmp_path / "photos" / "cat" / "2.png").write_bytes(b"damaged")
    how = {"image_size": 16, "channels": channels, "skip_corrupt": True}
    plain, report = read_image_folder(tmp_path / "photos", **how)
    other, same = read_image_folder(tmp_path / "photos", map_from=0, **how)
    assert (is_mapped(plain.images), is_mapped(other.images)) == (False, True)
    assert plain.images.shape == (9, channels or (3 if colours else 1), 16, 16)
    assert plain.digest == other.digest
    assert report == same
    assert list(pixels.iterdir()) == []


def test_what_is_prepared_does_not_depend_on_where_pixels_lie(tmp_path):
    photos(tmp_path / "photos", colours=(1,))
    values = {"source": "folder", "path": str(tmp_path / "photos"), "profile": "none", "validation_fraction": 0.4}
    tasks = [Task(**values), Task(**values, map_from=0)]
    assert tasks[0].identity() == tasks[1].identity()
    plain, other = (prepare(task, seed=0, need_test=False) for task in tasks)
    for part in ("train", "validation"):
        assert is_mapped(getattr(other, part).images)
        assert getattr(plain, part).digest == getattr(other, part).digest
