"""Strict readers of array files: .npz with images and labels, and the IDX files of the MNIST family.

A file is either read whole and checked, or refused with one line that names it, the part of it that is wrong, and
what would be right. Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from gen_invariance.data.grouping import number_groups
from gen_invariance.data.images import ImageData, names_or_numbers, to_uint8
from gen_invariance.data.readers.base import Reader, ReadOptions, Source, check_same_shape
from gen_invariance.errors import DataError, DataNotFoundError, RangeError, ShapeError, printable

DAMAGED = (
    *(ValueError, OSError, EOFError, MemoryError, NotImplementedError, TypeError, RecursionError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""What reading a damaged .npz file raises; array headers are parsed as Python literals."""
KeyOf = Callable[[Any, int, str], Hashable]
_TESTED_ON = ("test", "val", "valid", "validation")  # the first that a file has


class NpzReader(Reader):
    """Arrays in an .npz file; `read_npz` documents its keys. Flips are not safe: wrong ones harm more than none."""

    needs_path = "the .npz file with train_images, train_labels[, test_images, test_labels, class_names]"
    takes_group = True

    def read(self, options: ReadOptions) -> Source:
        """Both parts of the file."""
        train, test = read_npz(self.path, group=options.group)
        train, test = train.resized(options.image_size), None if test is None else test.resized(options.image_size)
        check_same_shape(train, test, printable(self.path))
        parts = find_npz_parts(self.path)
        unused = [name for name in parts if name not in ("train", choose_npz_test(parts))]
        where = printable(self.path)
        notes = tuple(f"note: {name}_images of {where} are neither trained nor tested on" for name in unused)
        return Source(train, test, self.flip_safe, notes=notes)


def read_npz(
    path: Path | str, *, group: str | None = None, usual: str = "groups", key_of: KeyOf | None = None
) -> tuple[ImageData, ImageData | None]:
    """Training and test images of an .npz file; None for the test images when it holds none.

    Keys: `train_images`, `train_labels`, and optionally `test_images`, `test_labels`, `class_names`, and
    `test_class_names` when the test part shows other classes. Without a test part `val_images` and `val_labels` are it
    (or `valid_...`, `validation_...`). Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3, uint8, or
    floating point in [0, 1]; labels are whole numbers (N,) or (N, 1) from 0; names are strings. Without names, classes
    are called by their numbers. `train_groups` and `test_groups`, whole numbers or strings (N,),
    say which images show the same thing; equal values mean the same thing in both. Other keys are ignored.

    Args:
        path: the file.
        group: "track" takes `train_track`, which must be there, and `test_track` in place of the keys `..._groups`.
        usual: which keys tell the groups, where they are there, when `group` is None.
        key_of: makes the key of a group out of its value, the label and the class name, for values that begin anew in
            each class; None takes the value alone.

    Raises:
        DataNotFoundError: no such file.
        DataError: truncated, damaged or no .npz file, a missing key, pickled objects, or a dtype that does not fit.
        ShapeError: axes, channels or lengths that do not fit.
        RangeError: non-finite pixels, or pixels or labels out of range.
    """
    path, name = Path(path), group or usual
    part = choose_npz_test(find_npz_parts(path))
    train = read_npz_part(path, "train", group=name)
    where = printable(path)
    if group is not None and train.group_values is None:
        raise DataError(
            f"{where} has no train_{group}, which group={printable(group)} asks for; add it, or leave group out"
        )
    train_keys = train.group_keys(key_of)
    if part is None:
        return replace(train.data, groups=number_groups(train_keys)[0]), None
    test = read_npz_part(path, part, class_names=train.data.class_names, group=name)
    train_groups, test_groups = number_groups(train_keys, test.group_keys(key_of))
    return replace(train.data, groups=train_groups), replace(test.data, groups=test_groups)


class NpzPart(NamedTuple):
    """One part of an .npz file: its images, and what tells the group of each."""

    data: ImageData
    group_values: list[Hashable] | None

    def group_keys(self, key_of: KeyOf | None) -> list[Hashable] | None:
        """The key of the group of each image; None where they are not known."""
        if self.group_values is None or key_of is None:
            return self.group_values
        names, labels = self.data.class_names, self.data.labels.tolist()
        values = zip(self.group_values, labels, strict=True)
        return [key_of(value, label, names[label]) for value, label in values]


def find_npz_parts(path: Path | str) -> tuple[str, ...]:
    """Names of the parts of an .npz file, such as "train", "test" and "val": those with images or labels.

    Raises:
        DataNotFoundError, DataError: as `load_arrays`.
    """
    names = list_arrays(path)
    return tuple(part for part in ("train", *_TESTED_ON) if {f"{part}_images", f"{part}_labels"} & set(names))


def choose_npz_test(parts: Sequence[str]) -> str | None:
    """The part that is tested on, if there is one."""
    return next((part for part in _TESTED_ON if part in parts), None)


def read_npz_part(
    path: Path | str, part: str, *, class_names: tuple[str, ...] | None = None, group: str = "groups"
) -> NpzPart:
    """One part of an .npz file; see `read_npz`.

    Args:
        path: the file.
        part: what its keys begin with.
        class_names: of its classes, where the file has no names for this part.
        group: which keys tell the groups.
    """
    path, where = Path(path), printable(path)
    names_key = "class_names" if part == "train" else f"{part}_class_names"
    groups_key = f"{part}_{group}"
    arrays = load_arrays(path, (f"{part}_images", f"{part}_labels", names_key, groups_key))
    names = _class_names(arrays, names_key, where) or class_names
    data = _part(arrays, part, names, path)
    return NpzPart(data, _group_values(arrays, groups_key, len(data), where))


def list_arrays(path: Path | str) -> list[str]:
    """Names of the arrays in an .npz file, in their order; errors as for `load_arrays`."""
    with _open_npz(Path(path)) as stored:
        return list(stored.files)


def load_arrays(path: Path | str, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Those of `keys` that the .npz file `path` holds, None for all; nothing is unpickled.

    Raises:
        DataNotFoundError: no such file.
        DataError: truncated, damaged or no .npz file, or pickled objects under one of `keys`.
    """
    path = Path(path)
    with _open_npz(path) as stored:
        names = stored.files if keys is None else [key for key in keys if key in stored.files]
        return {key: _load_array(stored, key, path) for key in names}


def _load_array(stored: NpzFile, key: str, path: Path) -> np.ndarray:
    try:
        array = stored[key]
    except DAMAGED as error:
        if "Object arrays" in str(error):
            raise DataError(
                f"{printable(path)}: {printable(key)} holds pickled objects, which are never loaded; "
                "store plain numbers or strings"
            ) from error
        raise _damaged(path, key, error) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{printable(path)}: {printable(key)} is no array; write the file with numpy.savez")
    return array


@contextmanager
def _open_npz(path: Path) -> Iterator[NpzFile]:
    if not path.is_file():
        raise DataNotFoundError(f"{printable(path)} does not exist or is not a file; give the path of an .npz file")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise DataError(f"{printable(path)} is truncated or no .npz file; write it with numpy.savez")
        stored = np.load(path, allow_pickle=False)
    except DataError:
        raise
    except DAMAGED as error:
        raise _damaged(path, "its index", error) from error
    with stored:
        yield stored


def _damaged(path: Path, what: str, error: Exception) -> DataError:
    reason = printable(error)[:200] or type(error).__name__
    return DataError(
        f"{printable(path)}: {printable(what)} cannot be read ({reason}); the file is damaged, write it anew"
    )


def _class_names(arrays: dict[str, np.ndarray], key: str, where: str) -> tuple[str, ...] | None:
    if key not in arrays:
        return None
    names = arrays[key]
    if names.ndim != 1 or names.dtype.kind not in "US" or not len(names):
        raise DataError(
            f"{where}: {key} must be a list of strings, got {names.dtype} {names.shape}; store one per class"
        )
    try:
        decoded = tuple(name.decode() if isinstance(name, bytes) else name for name in names.tolist())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {key} holds bytes that are not UTF-8; store the names as strings") from error
    if len(set(decoded)) < len(decoded):
        double = next(name for name in decoded if decoded.count(name) > 1)
        raise DataError(f"{where}: {key} names {double!r} twice; give each class a name of its own")
    return decoded


def _part(arrays: dict[str, np.ndarray], part: str, names: tuple[str, ...] | None, path: Path) -> ImageData:
    """The images and labels of "train" or another part."""
    where = printable(path)
    for key in (f"{part}_images", f"{part}_labels"):
        if key not in arrays:
            found = ", ".join(map(printable, list_arrays(path)[:8])) or "nothing"
            raise DataError(f"{where} has no {key}; found {found}; add that array")
    images = _images(arrays[f"{part}_images"], f"{where}: {part}_images")
    labels = _labels(arrays[f"{part}_labels"], len(images), names, f"{where}: {part}_labels")
    return ImageData(images, labels, names or names_or_numbers(None, int(labels.max()) + 1), path.stem)


def _group_values(arrays: dict[str, np.ndarray], key: str, num_images: int, where: str) -> list[Hashable] | None:
    """What tells the group of each image; None without that array."""
    if key not in arrays:
        return None
    array = arrays[key]
    if array.dtype.kind not in "iuUS":
        raise DataError(f"{where}: {key} has dtype {array.dtype}; store whole numbers or strings, one for each image")
    if array.shape != (num_images,):
        raise ShapeError(f"{where}: {key} has shape {array.shape}, expected ({num_images},); store one for each image")
    return array.tolist()


def _images(array: np.ndarray, where: str) -> Tensor:
    """Uint8 (N, C, H, W) of an array in any of the accepted forms."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise DataError(f"{where} has dtype {array.dtype}; store uint8 pixels, or floating point in [0, 1]")
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ShapeError(
            f"{where} has shape {array.shape}; store (N, H, W), (N, H, W, C) or (N, C, H, W), none of them 0"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[-1] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.shape[1] not in (1, 3):
        raise ShapeError(f"{where} has shape {array.shape}, so neither last nor second axis is 1 (grey) or 3 (RGB)")
    dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float64)  # torch has no wider
    images = torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
    if images.dtype == torch.uint8:
        return images
    try:
        return to_uint8(images)
    except RangeError as error:
        raise RangeError(f"{where}: {error}") from error


def _labels(array: np.ndarray, num_images: int, names: tuple[str, ...] | None, where: str) -> Tensor:
    """Int64 (N,) of an array of whole numbers in [0, K)."""
    if array.dtype.kind not in "iu":
        raise DataError(f"{where} has dtype {array.dtype}; store whole numbers, one class number for each image")
    if array.shape not in ((num_images,), (num_images, 1)):
        raise ShapeError(f"{where} has shape {array.shape}, expected ({num_images},); store one label for each image")
    # Without names a number beyond the images cannot belong to 0, 1, ..., K - 1, all of which occur.
    limit = num_images if names is None else len(names)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= limit:
        raise RangeError(
            f"{where} must lie in [0, {limit}), got {low} to {high}; number the classes from 0 or name them"
        )
    return torch.from_numpy(array.astype(np.int64).reshape(-1))


def read_idx(path: Path | str) -> Tensor:
    """The uint8 array of an IDX file, plain or gzipped (by its name's .gz).

    Raises:
        DataNotFoundError: no such file.
        DataError: truncated, damaged, too long, or not IDX of unsigned bytes.
    """
    path = Path(path)
    if not path.is_file():
        raise DataNotFoundError(f"{printable(path)} does not exist; put the IDX file there")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{printable(path)} is damaged ({printable(error)}); get the file again") from error
    # Header: two zero bytes, type code (8: unsigned byte), number of axes, then each axis as a big-endian int32.
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != b"\x00\x00\x08" or len(content) < start:
        raise DataError(f"{printable(path)} is truncated or no IDX file of unsigned bytes; get the file again")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    expected = int(np.prod(shape, dtype=object))
    if len(content) - start != expected:
        raise DataError(
            f"{printable(path)} holds {len(content) - start} bytes where its header {shape} promises {expected}; "
            "get the file again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def read_idx_pair(images_path: Path | str, labels_path: Path | str, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 1, H, W) and labels int64 (N,) of two IDX files that belong together.

    Raises:
        DataNotFoundError, DataError: as `read_idx`, and when the two do not belong together.
        RangeError: a label is not below `num_classes`.
    """
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not images.numel():
        raise DataError(
            f"{printable(images_path)} {tuple(images.shape)} and {printable(labels_path)} {tuple(labels.shape)} do not "
            "belong together; expected images (N, H, W) and labels (N,), get both files again"
        )
    if int(labels.max()) >= num_classes:
        raise RangeError(
            f"{printable(labels_path)}: label {int(labels.max())} is not below {num_classes}; get the file again"
        )
    return images.unsqueeze(1), labels.long()
