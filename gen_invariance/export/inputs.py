"""What is looked at in a set before it is exported: duplicates, and the images that a translator is fitted on."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gen_invariance.data.duplicates import DuplicateReport, compare_digests, find_duplicates
from gen_invariance.data.images import ImageData
from gen_invariance.data.readers.arrays import choose_npz_test, find_npz_parts, read_npz, read_npz_part
from gen_invariance.data.readers.pictures import UnusablePictureError
from gen_invariance.errors import DataError, printable
from gen_invariance.export.formats.base import Entry, Format
from gen_invariance.export.pictures import decode, prepare

_THREADS = 4


def find_format_duplicates(data: Format) -> DuplicateReport:
    """The report on a set: by pixels for an .npz file, otherwise by the bytes of each encoded image.

    All parts but the training part count as test images. A set that is one part only is not read: nothing is found.
    Images that cannot be read are left out, since the export names them.
    """
    if data.name == "npz":
        return _find_npz_duplicates(data.path)
    entries = [entry for entry in data.entries() if not entry.ignored and not entry.problem]
    train = [entry for entry in entries if entry.part == "train"]
    test = [entry for entry in entries if entry.part != "train"]
    if not train or not test:
        return DuplicateReport()
    (train_marks, train_names), (test_marks, test_names) = _mark(data, train), _mark(data, test)
    return compare_digests(
        train_marks, test_marks, train_name=train_names.__getitem__, test_name=test_names.__getitem__
    )


def _find_npz_duplicates(path: Path) -> DuplicateReport:
    train, test = read_npz(path)
    if test is None:
        return DuplicateReport()
    report, parts = find_duplicates(train, test), find_npz_parts(path)
    others = [part for part in parts if part not in ("train", choose_npz_test(parts))]
    more = [read_npz_part(path, part, class_names=test.class_names).data for part in others]
    alike = [
        part for part in more if (part.images.shape[1:], part.class_names) == (test.images.shape[1:], test.class_names)
    ]
    if not alike:
        return report
    images, labels = (torch.cat([getattr(part, name) for part in (test, *alike)]) for name in ("images", "labels"))
    everything = ImageData(images, labels, test.class_names)
    return replace(find_duplicates(train, everything), shared_groups=report.shared_groups)


def _mark(data: Format, entries: list[Entry]) -> tuple[list[tuple[bytes, str | None]], list[str]]:
    """Digest and class of each image that can be read, and their names; no class where it is not known."""
    marks, names = [], []
    for entry in entries:
        try:
            digest = hashlib.blake2b(data.read(entry), digest_size=20).digest()
        except (OSError, UnusablePictureError):
            continue
        marks.append((digest, data.class_names[entry.label] if entry.label >= 0 else None))
        names.append(printable(entry.key))
    return marks, names


def read_training_images(data: Format, *, image_size: int | None = None, most: int = 50_000) -> ImageData:
    """The usable training images of a set, uint8 (N, C, S, S), in memory; grey when all pictures are.

    Args:
        data: see `open_format`.
        image_size: side to which the central square of each picture is scaled; None keeps sizes, which must be equal.
        most: images to take; of more, a random but fixed part is taken.

    Raises:
        DataError: no usable image, or pictures of several sizes.
    """
    entries = [entry for entry in data.entries() if entry.part == "train" and not entry.ignored and not entry.problem]
    if len(entries) > most:
        entries = sorted(entries, key=lambda entry: hashlib.sha256(ascii(entry.key).encode()).digest())[:most]

    def read(entry: Entry) -> np.ndarray | None:
        try:
            return prepare(decode(data.read(entry)), size=image_size, channels=3).pixels
        except (OSError, UnusablePictureError):
            return None  # the export names it

    pictures, labels = [], []
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for entry, picture in zip(entries, pool.map(read, entries), strict=True):
            if picture is None:
                continue
            pictures.append(picture)
            labels.append(entry.label)
            if picture.shape != pictures[0].shape:
                raise DataError(
                    f"{printable(data.path)}: images differ in size ({printable(entry.key)} is {picture.shape[2]}x"
                    f"{picture.shape[1]}); set data.image_size=N to fit on squares of N x N"
                )
    finally:
        pool.shutdown(cancel_futures=True)
    if not pictures:
        raise DataError(f"{printable(data.path)} holds no image that can be used; check the files")
    if all((picture == picture[:1]).all() for picture in pictures):
        pictures = [picture[:1] for picture in pictures]
    return ImageData(torch.from_numpy(np.stack(pictures)), torch.tensor(labels), data.class_names, data.path.stem)
