import gzip
import io
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gen_invariance import load_source
from gen_invariance.data.readers.arrays import read_idx, read_idx_pair, read_npz
from gen_invariance.errors import DataError, DataNotFoundError, GenInvarianceError, RangeError, ShapeError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
TRUE = {"train_images": PIXELS, "train_labels": np.array([0, 1, 2, 0])}
TRUE |= {"test_images": PIXELS[:2], "test_labels": np.array([1, 2])}
NAN = np.where(np.arange(4 * 5 * 6).reshape(4, 5, 6) == 7, np.nan, 0.5)


def written(folder, **changes):
    """An .npz of `TRUE` with some keys replaced, or left out where None."""
    arrays = {key: value for key, value in (TRUE | changes).items() if value is not None}
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


@pytest.mark.parametrize(
    "form",
    [
        PIXELS,
        PIXELS.transpose(0, 3, 1, 2),
        PIXELS.transpose(0, 3, 1, 2) / 255,
        (PIXELS / 255).astype(np.float32),
        (PIXELS / 255).astype(">f8"),
        (PIXELS / 255).astype(np.longdouble),
        np.asfortranarray(PIXELS),
    ],
)
def test_colour_images_in_every_form_are_the_same(tmp_path, form):
    train, test = read_npz(written(tmp_path, train_images=form))
    assert train.images.dtype == torch.uint8
    assert np.array_equal(train.images.numpy(), PIXELS.transpose(0, 3, 1, 2))
    assert train.labels.tolist() == [0, 1, 2, 0]
    assert train.class_names == test.class_names == ("0", "1", "2")
    assert test.labels.tolist() == [1, 2]


@pytest.mark.parametrize("form", [PIXELS[..., 0], PIXELS[..., :1], PIXELS[..., 0][:, None]])
def test_grey_images_in_every_form_are_the_same(tmp_path, form):
    train, test = read_npz(written(tmp_path, train_images=form, test_images=None, test_labels=None))
    assert np.array_equal(train.images.numpy(), PIXELS[..., 0][:, None])
    assert test is None


def test_class_names_are_kept(tmp_path):
    train, test = read_npz(written(tmp_path, class_names=["käse", "b", "c", "never shown"]))
    assert train.class_names == test.class_names == ("käse", "b", "c", "never shown")
    train, test = read_npz(written(tmp_path, class_names=np.array([b"a", b"b", b"c"]), test_class_names=list("xyz")))
    assert (train.class_names, test.class_names) == (tuple("abc"), tuple("xyz"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, ">i4"])
def test_labels_of_any_whole_number_type_are_int64(tmp_path, dtype):
    train, _ = read_npz(written(tmp_path, train_labels=TRUE["train_labels"].astype(dtype)))
    assert train.labels.dtype == torch.int64
    assert train.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("train_images", None, DataError, "no train_images"),
        ("train_labels", None, DataError, "no train_labels"),
        ("test_images", None, DataError, "no test_images"),
        ("test_labels", None, DataError, "no test_labels"),
        ("train_images", NAN, RangeError, "NaN"),
        ("train_images", NAN * np.inf, RangeError, "NaN or infinite"),
        ("train_images", np.full((4, 5, 6), 2.0), RangeError, "[0, 1]"),
        ("train_images", np.full((4, 5, 6), -0.1), RangeError, "[0, 1]"),
        ("train_images", PIXELS.astype(np.int64), DataError, "int64"),
        ("train_images", PIXELS > 9, DataError, "bool"),
        ("train_images", PIXELS.astype(object), DataError, "pickled"),
        ("train_images", PIXELS[..., :2], ShapeError, "(4, 5, 6, 2)"),
        ("train_images", np.concatenate([PIXELS, PIXELS[..., :1]], 3), ShapeError, "(4, 5, 6, 4)"),
        ("train_images", PIXELS[0, 0], ShapeError, "(6, 3)"),
        ("train_images", PIXELS[:0], ShapeError, "(0, 5, 6, 3)"),
        ("train_images", PIXELS[:, :0], ShapeError, "(4, 0, 6, 3)"),
        ("train_labels", np.array([0.0, 1.0, 2.0, 0.0]), DataError, "float64"),
        ("train_labels", np.array(list("abca")), DataError, "<U1"),
        ("train_labels", np.array([0, 1, 2]), ShapeError, "(3,)"),
        ("train_labels", np.eye(4, dtype=int), ShapeError, "(4, 4)"),
        ("train_labels", np.array([0, 1, -1, 0]), RangeError, "-1 to 1"),
        ("train_labels", np.array([0, 1, 10**9, 0]), RangeError, "1000000000"),
        ("train_labels", np.array([0, 1, 2**64 - 1, 0], np.uint64), RangeError, str(2**64 - 1)),
        ("test_labels", np.array([1, 3]), RangeError, "[0, 3)"),
        ("class_names", ["a", "b"], RangeError, "[0, 2)"),
        ("class_names", [1, 2, 3], DataError, "strings"),
        ("class_names", np.array(["a", None], object), DataError, "pickled"),
        ("class_names", ["a", "b", "a"], DataError, "'a' twice"),
        ("class_names", np.array([b"\xff", b"b", b"c"]), DataError, "UTF-8"),
        ("class_names", "abc", DataError, "strings"),
    ],
)
def test_each_defect_is_named_with_its_file_and_key(tmp_path, key, value, error, words):
    path = written(tmp_path, **{key: value})
    with pytest.raises(error) as caught:
        read_npz(path)
    one_line(caught, path, "train_labels" if key == "class_names" and error is RangeError else key, words)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text, not a zip file", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_npz_are_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_npz(tmp_path / "x.npz")
    one_line(caught, tmp_path / "x.npz", "no .npz file")


@given(st.data())
def test_a_truncated_or_altered_file_is_read_whole_or_refused(tmp_path_factory, data):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **TRUE)
    content = bytearray(buffer.getvalue())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    path.write_bytes(bytes(content))
    refusal = None
    try:
        train, _ = read_npz(path)
    except GenInvarianceError as error:
        refusal = str(error)
    if refusal is None:  # the change hit a byte that no checksum covers, such as a time stamp
        assert np.array_equal(train.images.numpy(), PIXELS.transpose(0, 3, 1, 2))
    else:
        assert "\n" not in refusal
        assert str(path) in refusal


def test_missing_npz_is_not_found(tmp_path):
    for path in (tmp_path / "nothing.npz", tmp_path):
        with pytest.raises(DataNotFoundError) as caught:
            read_npz(path)
        one_line(caught, path)


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_come_back(tmp_path, suffix):
    images, labels = PIXELS[..., 0], np.array([3, 1, 0, 2])
    for name, array in (("images", images), ("labels", labels)):
        content = idx(array)
        (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    found, numbers = read_idx_pair(tmp_path / f"images{suffix}", tmp_path / f"labels{suffix}", num_classes=4)
    assert np.array_equal(found.numpy(), images[:, None])
    assert numbers.dtype == torch.int64
    assert numbers.tolist() == [3, 1, 0, 2]


@given(cut=st.integers(0, 27))
def test_truncated_idx_is_refused(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("idx")
    content = idx(PIXELS[:2, :2, :3, 0])  # 28 bytes
    assert len(content) == 28
    (folder / "images").write_bytes(content[:cut])
    (folder / "images.gz").write_bytes(gzip.compress(content)[: -1 - cut])
    for name in ("images", "images.gz"):
        with pytest.raises(DataError) as caught:
            read_idx(folder / name)
        one_line(caught, folder / name)


@pytest.mark.parametrize(
    "content",
    [
        idx(PIXELS) + b"\0",
        b"\x00\x00\x0d" + idx(PIXELS)[3:],
        b"\x1f\x8b" + idx(PIXELS),
        b"\x00\x00\x08\x04" + b"\xff" * 16 + b"1234",
        b"<html>not found</html>",
    ],
)
def test_files_that_are_no_idx_are_refused(tmp_path, content):
    (tmp_path / "images").write_bytes(content)
    (tmp_path / "images.gz").write_bytes(content)
    for name in ("images", "images.gz"):
        with pytest.raises(DataError) as caught:
            read_idx(tmp_path / name)
        one_line(caught, tmp_path / name)


@pytest.mark.parametrize(
    ("images", "labels", "error"),
    [
        (PIXELS[..., 0], np.zeros(3), DataError),
        (PIXELS, np.zeros(4), DataError),
        (PIXELS[:0, ..., 0], np.zeros(0), DataError),
        (PIXELS[..., 0], np.array([0, 1, 2, 4]), RangeError),
    ],
)
def test_idx_files_that_do_not_belong_together_are_refused(tmp_path, images, labels, error):
    (tmp_path / "images").write_bytes(idx(images))
    (tmp_path / "labels").write_bytes(idx(labels))
    with pytest.raises(error) as caught:
        read_idx_pair(tmp_path / "images", tmp_path / "labels", num_classes=4)
    one_line(caught, tmp_path / "labels")
    with pytest.raises(DataNotFoundError):
        read_idx_pair(tmp_path / "images", tmp_path / "nothing", num_classes=4)


def test_labels_may_stand_in_a_column_and_a_validation_part_serves_as_test(tmp_path):
    """As MedMNIST stores them."""
    rows = np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
    parts = {"train": rows[:4], "val": rows[4:6], "test": rows[6:]}
    arrays = {f"{part}_images": images for part, images in parts.items()}
    arrays |= {
        f"{part}_labels": (np.arange(len(images)) % 2).astype(np.uint8)[:, None] for part, images in parts.items()
    }
    np.savez(tmp_path / "a.npz", **arrays)
    source = load_source("npz", tmp_path / "a.npz")
    assert source.train.labels.tolist() == [0, 1, 0, 1]
    assert np.array_equal(source.test.images[:, 0], rows[6:])
    assert source.notes == (f"note: val_images of {tmp_path / 'a.npz'} are neither trained nor tested on",)
    np.savez(tmp_path / "b.npz", **{name: array for name, array in arrays.items() if not name.startswith("test")})
    source = load_source("npz", tmp_path / "b.npz")
    assert np.array_equal(source.test.images[:, 0], rows[4:6])
    assert source.notes == ()


def test_what_a_file_holds_instead_is_said(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.zeros((2, 4, 4), np.uint8), y_train=np.arange(2))
    with pytest.raises(DataError, match=r"has no train_images; found x_train, y_train"):
        read_npz(tmp_path / "a.npz")
