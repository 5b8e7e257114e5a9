"""The samples of a tar shard: which members are its image and its label, and what is wrong where there is none."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from gen_invariance.data.readers.pictures import MOST_BYTES, SUFFIXES, UNREAD_SUFFIXES
from gen_invariance.data.readers.tree import is_litter
from gen_invariance.errors import DataError, printable

_MOST_LABEL_BYTES = 1 << 20
_LABELS = ("cls", "json")


class Place(NamedTuple):
    """Where in a shard the image and the label of a sample are, in bytes, and what their names end in."""

    shard: str
    image: int
    image_size: int
    extension: str
    label: int
    label_size: int
    label_suffix: str


class Sample(NamedTuple):
    """One sample.

    Attributes:
        key: names it within its shard.
        label: name of its class; None where it has no label.
        place: where it is.
        problem: why its image cannot be used.
        ignored: why it is left out.
    """

    key: str
    label: str | None
    place: Place
    problem: str = ""
    ignored: str = ""


class _Member(NamedTuple):
    info: tarfile.TarInfo
    stem: str  # up to the last dot
    suffix: str  # behind it, in lower case

    @property
    def is_image(self) -> bool:
        return f".{self.suffix}" in SUFFIXES or f".{self.suffix}" in UNREAD_SUFFIXES

    @property
    def is_label(self) -> bool:
        return self.suffix in _LABELS


def read_samples(tar: tarfile.TarFile, shard: str) -> Iterator[Sample]:
    """The samples of one shard, in order; those without an image, a label or both are among them, with the reason.

    Members of a sample lie together and share their name up to the first dot. Where a name has further dots, those
    whose names agree up to the last dot belong together (0.5x_1.png and 0.5x_1.cls), if there are any; 7.input.png and
    7.target.cls are one sample.

    Raises:
        DataError: a label that cannot be read.
    """
    files = (member for member in tar if not member.isdir() and not _is_left_by_a_system(member.name))
    for key, infos in itertools.groupby(files, key=_key):
        members = [_member(info) for info in infos]
        for name, part in _divide(key, members):
            sample = _read_sample(tar, shard, name, part)
            if sample is not None:
                yield sample


def read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, where: str) -> str | None:
    """The class name in the member of a label; None for a .json that has none.

    Raises:
        DataError: it is no text, no JSON, nested, too long, or no regular member.
    """
    if not member.isreg() or member.sparse is not None or member.size > _MOST_LABEL_BYTES:
        raise DataError(f"{printable(where)} is no label (a link, sparse, or too long); store a class number or name")
    try:
        text = tar.extractfile(member).read().decode("utf-8").strip()
        value = text if suffix == "cls" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{printable(where)} is no label ({printable(error)[:80]}); store a class number or name"
        ) from error
    if suffix == "json":
        value = value.get("label", value.get("cls")) if isinstance(value, dict) else None
    if isinstance(value, dict | list):
        raise DataError(f"{printable(where)} holds several labels ({printable(value)[:40]}); store one")
    return None if value in (None, "") else str(value)


def _divide(key: str, members: list[_Member]) -> Iterator[tuple[str, list[_Member]]]:
    """The samples among members that share their name up to the first dot, each with its key."""
    by_stem: dict[str, list[_Member]] = {}
    for member in members:
        by_stem.setdefault(member.stem, []).append(member)
    whole = [stem for stem, part in by_stem.items() if _has_both(part)]
    if not whole and _has_both(members):
        yield key, members
        return
    for stem, part in by_stem.items():
        extra = any(stem.startswith(f"{other}.") for other in whole)  # 7.mask.png beside 7.png and 7.cls
        if not extra:
            yield stem, part


def _has_both(members: list[_Member]) -> bool:
    return any(member.is_image for member in members) and any(member.is_label for member in members)


def _read_sample(tar: tarfile.TarFile, shard: str, key: str, members: list[_Member]) -> Sample | None:
    images = [member for member in members if member.is_image]
    labels = [member for member in members if member.is_label]
    if not images and not labels:
        return None
    name, source = None, None
    for label in labels:
        name = read_label(tar, label.info, label.suffix, f"{shard}/{label.info.name}") or name
        source = label if name is not None else None
    if not images:
        return Sample(key, name, Place(shard, 0, 0, "", 0, 0, ""), ignored="has no image") if name is not None else None
    info, suffix = images[-1].info, images[-1].info.name.rpartition(".")[2]
    place = Place(shard, info.offset_data, info.size, f".{suffix}", *(
        (source.info.offset_data, source.info.size, source.suffix) if source else (0, 0, "")
    ))  # fmt: skip
    if name is None:
        return Sample(key, None, place, ignored="has no label")
    return Sample(key, name, place, problem=_problem(images))


def _problem(images: list[_Member]) -> str:
    if len(images) > 1:
        names = ", ".join(printable(image.info.name) for image in images[:3])
        return f"{len(images)} images in one sample ({names})"
    info, suffix = images[0].info, f".{images[0].suffix}"
    if not info.isreg() or info.sparse is not None:
        return "a link, or sparse, inside its shard; write the shard with whole files"
    if info.size > MOST_BYTES:
        return f"{info.size:,} bytes, which is more than {MOST_BYTES:,}"
    return f"{suffix} pictures are not read; convert it to PNG or JPEG" if suffix not in SUFFIXES else ""


def _is_left_by_a_system(name: str) -> bool:
    *folders, base = name.split("/")
    return is_litter(base) or any(is_litter(part, folder=True) for part in folders if part not in (".", ".."))


def _key(info: tarfile.TarInfo) -> str:
    """The name up to the first dot of its last part."""
    folder, slash, base = info.name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _member(info: tarfile.TarInfo) -> _Member:
    folder, slash, base = info.name.rpartition("/")
    stem, _, suffix = base.rpartition(".")
    return _Member(info, f"{folder}{slash}{stem or base}", suffix.lower())
