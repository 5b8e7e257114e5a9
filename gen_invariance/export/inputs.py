"""What is looked at in a set before it is exported: duplicates, and the images that a translator is fitted on."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from gen_invariance.data.duplicates import DuplicateReport, compare_digests, find_duplicates
from gen_invariance.data.images import ImageData, to_float
from gen_invariance.data.readers.arrays import choose_npz_test, find_npz_parts, read_npz, read_npz_part
from gen_invariance.data.readers.pictures import UnusablePictureError
from gen_invariance.errors import DataError, GenInvarianceError, SettingsError, printable
from gen_invariance.export.formats.base import Entry, Format
from gen_invariance.export.native import translate_native, working_size
from gen_invariance.export.pictures import decode, prepare, read_size
from gen_invariance.export.settings import ExportSettings
from gen_invariance.export.units import draw_generator, explain
from gen_invariance.nuisance.protocol import Nuisance, takes_any_size

_THREADS = 4
_LARGEST_FIT = 128  # side: larger pictures are scaled down to be fitted on, unless a size is asked for
_FIT_SIZE = 64
_MOST_BYTES = 1 << 30  # of images that are fitted on


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


def count_training_images(data: Format) -> list[int]:
    """Training images of each class by their names; some may turn out not to be usable."""
    counts = [0] * len(data.class_names)
    for entry in _training_entries(data):
        counts[entry.label] += 1
    return counts


def choose_fit_size(data: Format) -> int | None:
    """Side of the squares to fit on where nobody says so; None where all are of one size that is small enough."""
    size = None
    for entry in _training_entries(data):
        try:
            found = read_size(data.read(entry))
        except (OSError, UnusablePictureError):
            continue  # the export names it
        if min(found) > _LARGEST_FIT or found != (size or found):
            return _FIT_SIZE
        size = found
    return None


def check_sizes(data: Format, nuisance: Nuisance, settings: ExportSettings, name: str, *, looked_at: int = 16) -> None:
    """Raise `SettingsError` where a translator of one size moves things, so that results cannot have their source's.

    Args:
        data: see `open_format`.
        nuisance: the translator.
        settings: of the export.
        name: of the translator, for the error.
        looked_at: pictures tried; the translator is refused if results of most are.
    """
    if (settings.results != "native" and not data.keeps_size) or takes_any_size(nuisance):
        return
    channels = getattr(getattr(nuisance, "config", None), "channels", None)
    refused, tried = [], 0
    for entry in _in_fixed_order(_training_entries(data))[:looked_at]:
        try:
            pixels = prepare(decode(data.read(entry)), size=None, channels=channels).pixels
        except (OSError, UnusablePictureError):
            continue
        tried += 1
        generator = draw_generator(settings.seed, entry.key, 0)
        translate = partial(_translate, nuisance, generator)
        try:
            size = working_size(nuisance, pixels.shape[1:], image_size=settings.image_size)
            with torch.no_grad():
                usable = translate_native(to_float(torch.from_numpy(pixels)[None]), translate, size=size)[1]
        except (RuntimeError, GenInvarianceError):
            continue  # the export says of each picture what is wrong
        if not usable:
            refused.append((entry, pixels.shape[1:], min(size)))
    if 2 * len(refused) > tried:
        entry, (height, width), side = refused[0]
        raise SettingsError(
            f"the translator in {printable(name)} works at {side} pixels and moves or redraws shapes, which cannot be "
            f"brought to the {width}x{height} of {printable(entry.key)}; fit one with data.image_size="
            f"{min(height, width)}, or set results=square for results of {side} pixels"
        )


def _translate(nuisance: Nuisance, generator: torch.Generator, images: torch.Tensor) -> torch.Tensor:
    return nuisance.apply(images, nuisance.sample(images.shape, generator=generator))


def _training_entries(data: Format) -> list[Entry]:
    entries = (entry for entry in data.entries() if entry.part == "train" and entry.label >= 0)
    return [entry for entry in entries if not entry.ignored and not entry.problem]


def _in_fixed_order(entries: list[Entry]) -> list[Entry]:
    """Random, but always the same."""
    return sorted(entries, key=lambda entry: hashlib.sha256(ascii(entry.key).encode()).digest())


def read_training_images(
    data: Format, *, image_size: int | None = None, most: int = 50_000, channels: int | None = None
) -> ImageData:
    """The usable training images of a set, uint8 (N, C, S, S), in memory; grey when all pictures are.

    Args:
        data: see `open_format`.
        image_size: side to which the central square of each picture is scaled; None keeps sizes, which must be equal.
        most: images to take; of more, a random but fixed part is taken.
        channels: 1 or 3; None gives 1 where all pictures are grey.

    Raises:
        DataError: no usable image, or pictures of several sizes.
    """
    entries = _training_entries(data)
    if image_size is not None:
        most = min(most, _MOST_BYTES // (3 * image_size**2))
    if len(entries) > most:
        entries = _in_fixed_order(entries)[:most]
    return _read_entries(data, entries, image_size, channels)


def read_test_images(data: Format, *, image_size: int | None = None) -> ImageData | None:
    """The usable images of the part that is tested on, as `read_training_images`; None where a set has no such part.

    That is "test", or the first other part beside "train".
    """
    if data.name == "npz":
        images = read_npz(data.path)[1]
        return None if images is None else images.resized(image_size)
    entries = [entry for entry in data.entries() if entry.part != "train" and entry.label >= 0]
    entries = [entry for entry in entries if not entry.ignored and not entry.problem]
    if not entries:
        return None
    parts = {entry.part for entry in entries}
    part = "test" if "test" in parts else entries[0].part
    return _read_entries(data, [entry for entry in entries if entry.part == part], image_size, None)


def _read_entries(data: Format, entries: list[Entry], image_size: int | None, channels: int | None) -> ImageData:
    def read(entry: Entry) -> np.ndarray | str:
        try:
            return prepare(decode(data.read(entry)), size=image_size, channels=3).pixels
        except (OSError, UnusablePictureError) as error:
            return explain(error)  # the export names all of them

    pictures, labels, problem = [], [], ""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for entry, picture in zip(entries, pool.map(read, entries), strict=True):
            if isinstance(picture, str):
                problem = problem or f"; the first of {len(entries)} files, {printable(entry.key)}: {picture}"
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
        raise DataError(f"{printable(data.path)} holds no image that can be used{problem}")
    if channels != 3 and all((picture == picture[:1]).all() for picture in pictures):
        pictures = [picture[:1] for picture in pictures]
    return ImageData(torch.from_numpy(np.stack(pictures)), torch.tensor(labels), data.class_names, data.path.stem)
