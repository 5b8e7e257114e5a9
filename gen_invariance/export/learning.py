"""The images of a set as a translator is fitted on: all of one size, resident."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError
from gen_invariance.errors import printable as shown
from gen_invariance.export.formats.base import Entry, Form
from gen_invariance.export.pictures import UnusablePictureError, decode, prepare

_THREADS, _CHUNK = 4, 256


def image_data(form: Form, *, image_size: int | None = None, most: int = 50_000) -> ImageData:
    """The usable training images of `form`, uint8 (N, C, S, S); grey when all pictures are.

    Args:
        form: see `open_form`.
        image_size: side to which the central square of each picture is scaled; None keeps sizes, which must be equal.
        most: images to take; of more, a random but fixed part is taken.

    Raises:
        DataError: no usable image, or pictures of several sizes.
    """
    entries = [entry for entry in form.entries() if entry.part == "train" and not entry.ignored]
    if len(entries) > most:
        entries = sorted(entries, key=lambda entry: hashlib.sha256(ascii(entry.key).encode()).digest())[:most]
    pictures, labels, grey = [], [], True
    for entry, picture in _pictures(form, entries, image_size):
        if pictures and picture.shape != pictures[0].shape:
            raise DataError(
                f"{shown(form.path)}: images differ in size ({shown(entry.key)} is {picture.shape[2]}x"
                f"{picture.shape[1]}); set data.image_size=N to fit on squares of N x N"
            )
        pictures.append(picture)
        labels.append(entry.label)
        grey = grey and bool((picture == picture[:1]).all())
    if not pictures:
        raise DataError(f"{shown(form.path)} holds no image that can be used; check the files")
    images = np.stack([picture[:1] for picture in pictures] if grey else pictures)
    return ImageData(torch.from_numpy(images), torch.tensor(labels), form.class_names, form.path.stem)


def _pictures(form: Form, entries: Sequence[Entry], image_size: int | None) -> Iterator[tuple[Entry, np.ndarray]]:
    def load(entry: Entry) -> np.ndarray | None:
        try:
            return prepare(decode(form.read(entry)), size=image_size, whole=False, channels=3).pixels
        except (OSError, UnusablePictureError):
            return None  # the export names it

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(entries), _CHUNK):
            part = entries[start : start + _CHUNK]
            yield from (
                (entry, found) for entry, found in zip(part, pool.map(load, part), strict=True) if found is not None
            )
