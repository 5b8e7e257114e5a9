"""Every kind of bad data ends in one line that names it, exit code 2, and leaves nothing behind in `out`."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli_bad_settings import one_line, refused

from gen_invariance.cli.main import run


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


# ---- folders of images


def image_folder(root, *, mode="L"):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "eel"):
        (root / name).mkdir(parents=True)
        for number in range(6):
            shape = (16, 16) if mode == "L" else (16, 16, 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / name / f"{number}.png")
    return root


def empty_class(root):
    (root / "fox").mkdir()


def no_class(root):
    shutil.rmtree(root)
    root.mkdir()


def corrupt(root):
    (root / "dog" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")


def truncated(root):
    file = root / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:60])


def other_size(root):
    Image.new("L", (20, 16)).save(root / "dog" / "3.png")


def gone(root):
    shutil.rmtree(root)


def a_file(root):
    shutil.rmtree(root)
    root.write_text("photos")


FOLDERS = {
    empty_class: ["fox"],
    no_class: ["photos"],
    corrupt: ["3.png", "skip_corrupt"],
    truncated: ["3.png", "skip_corrupt"],
    other_size: ["3.png", "20x16", "image_size"],
    gone: ["photos", "exist"],
    a_file: ["photos", "folder"],
}


@pytest.mark.parametrize(("damage", "words"), FOLDERS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_bad_image_folder(damage, words, tmp_path, capsys):
    root, out = image_folder(tmp_path / "photos"), tmp_path / "out"
    damage(root)
    line = refused(["fit", "data=folder", f"data.path={root}", f"out={out}"], capsys)
    assert all(word in line for word in words), line
    assert not out.exists()


@pytest.mark.parametrize("damage", [corrupt, truncated])
def test_corrupt_image_is_skipped_when_asked(damage, tmp_path, capsys):
    root, out = image_folder(tmp_path / "photos"), tmp_path / "out"
    damage(root)
    chosen = ["data=folder", f"data.path={root}", "data.skip_corrupt=true"]
    assert run(["fit", *chosen, "fit.head_from=1", "fit.steps=1", "fit.batch_size=4", f"out={out}"]) == 0
    assert len(np.load(out / "split.npz")["train_indices"]) == 17


def test_hostile_names_cannot_write_over_the_terminal(tmp_path, capsys):
    root = image_folder(tmp_path / "photos")
    (root / "fox\x1b[2J\nBOO").mkdir()
    assert "\x1b" not in refused(["fit", "data=folder", f"data.path={root}", f"out={tmp_path / 'out'}"], capsys)


def test_same_through_the_installed_command(tmp_path):
    installed = Path(sys.executable).with_name("gen-invariance")
    done = subprocess.run(
        [installed, "fit", "data=folder", f"data.path={tmp_path / 'nowhere'}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere" in one_line(done.stderr)
    assert list(tmp_path.iterdir()) == []


# ---- arrays


def arrays():
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (30, 16, 16), dtype=np.uint8),
        "train_labels": np.arange(30) % 3,
        "test_images": rng.integers(0, 256, (12, 16, 16), dtype=np.uint8),
        "test_labels": np.arange(12) % 3,
        "class_names": np.array(["cat", "dog", "eel"]),
    }


def with_nan():
    images = arrays()["train_images"] / np.float32(255)
    images[3, 4, 5] = np.nan
    return images


ARRAYS = {
    "no labels": ({"train_labels": None}, ["train_labels"]),
    "test images without labels": ({"test_labels": None}, ["test_labels"]),
    "label too large": ({"train_labels": np.arange(30) % 4}, ["train_labels", "[0, 3)", "3"]),
    "negative label": ({"train_labels": np.arange(30) % 3 - 1}, ["train_labels", "-1"]),
    "class without images": ({"train_labels": np.arange(30) % 2}, ["'eel'"]),
    "too few labels": ({"train_labels": np.arange(29) % 3}, ["train_labels", "(29,)", "(30,)"]),
    "labels that are no whole numbers": ({"train_labels": np.arange(30) / 2}, ["train_labels", "float64"]),
    "NaN pixels": ({"train_images": with_nan()}, ["train_images", "NaN"]),
    "pixels above 1": ({"train_images": arrays()["train_images"].astype(np.float32)}, ["train_images", "[0, 1]"]),
    "two channels": ({"train_images": np.zeros((30, 16, 16, 2), np.uint8)}, ["(30, 16, 16, 2)", "RGB"]),
    "other channels for testing": ({"test_images": np.zeros((12, 16, 16, 3), np.uint8)}, ["test images"]),
    "no images": ({"train_images": np.zeros((0, 16, 16), np.uint8)}, ["(0, 16, 16)"]),
    "pickled objects": ({"train_labels": np.array([{}] * 30)}, ["train_labels", "pickled"]),
}


@pytest.mark.parametrize(("changes", "words"), ARRAYS.values(), ids=ARRAYS)
def test_bad_arrays(changes, words, tmp_path, capsys):
    path, out = tmp_path / "set.npz", tmp_path / "out"
    np.savez(path, **{key: value for key, value in (arrays() | changes).items() if value is not None})
    line = refused(["train", "data=npz", f"data.path={path}", f"out={out}"], capsys)
    assert all(word in line for word in words), line
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"plain text", None], ids=["empty", "text", "truncated"])
def test_file_that_is_no_npz(content, tmp_path, capsys):
    path, out = tmp_path / "set.npz", tmp_path / "out"
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    line = refused(["fit", "data=npz", f"data.path={path}", f"out={out}"], capsys)
    assert "set.npz" in line
    assert not out.exists()


def test_npz_without_test_part_trains_only_when_told_how_to_test(tmp_path, capsys):
    path, out = tmp_path / "set.npz", tmp_path / "out"
    np.savez(path, **{key: value for key, value in arrays().items() if not key.startswith("test")})
    chosen = ["data=npz", f"data.path={path}", f"out={out}"]
    assert "rest_is_test=true" in refused(["train", *chosen], capsys)
    assert not out.exists()
    assert run(["train", *chosen, "data.rest_is_test=true", "training.epochs=2"]) == 0
