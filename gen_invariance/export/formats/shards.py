"""WebDataset: tar shards of samples, KEY.png beside KEY.cls (or a KEY.json with "label"); new images get shards."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gen_invariance.data.readers.pictures import SUFFIXES, UnusablePictureError
from gen_invariance.errors import DataError, DataNotFoundError, printable
from gen_invariance.export.formats.base import Entry, Format, Output, Row, Stored, sort_class_names, unique_keys
from gen_invariance.files import atomic_write

_Sample = tuple[str, str, tuple[str, int, int, str, str, str]]
"""Key, class name, and location: shard, offset and size of the image, suffix and text of the label's member, and what
the image's name ends in."""


class ShardFormat(Format):
    """The shards of a folder, or one of them. Shards are indexed once and read in place; they must not be packed.

    Args:
        path: a folder of .tar files, or one .tar file.
    """

    name = "webdataset"
    copied_whole = "shards"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise DataNotFoundError(f"{printable(path)} does not exist; give a folder of .tar shards or one of them")
        self._root = path if path.is_dir() else path.parent
        self._shards = sorted(file.name for file in path.glob("[!.]*.tar")) if path.is_dir() else [path.name]
        if not self._shards:
            raise DataError(
                f"{printable(path)} holds no .tar shard; packed ones (.tar.gz) must be unpacked to .tar first"
            )
        # The output of an export holds shards of new images already, which must not be written over.
        self._prefix = _free_prefix(self._shards)
        self.class_names = sort_class_names(name for _, name, _ in self._samples())
        if not self.class_names:
            raise DataError(
                f"{printable(path)}: no sample has an image and a label (KEY.cls, or KEY.json with 'label')"
            )

    def _samples(self) -> Iterator[_Sample]:
        for shard in self._shards:
            try:
                with tarfile.open(self._root / shard, "r:") as tar:
                    yield from _read_samples(tar, shard)
            except tarfile.TarError as error:
                reason = printable(error)[:100]
                raise DataError(
                    f"{printable(self._root / shard)} is truncated or no plain tar file ({reason}); write it again"
                ) from error

    def entries(self) -> Sequence[Entry]:
        """One for each sample that has an image and a label."""
        keys, names, locations = zip(*self._samples(), strict=True)
        labels = map(self.labels.get, names)
        return [Entry(*entry) for entry in zip(unique_keys(keys), labels, locations, strict=True)]

    def read(self, entry: Entry) -> bytes:
        """The image's bytes, straight from where they are in the shard."""
        shard, offset, size, *_ = entry.location
        with open(self._root / shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise UnusablePictureError("its shard ends before the image does")
        return content

    def file_name(self, entry: Entry, suffix: str | None) -> str:
        """Originals stay in their shard; a new image is a member of its unit's shard, which `store_new` names."""
        return entry.location[0] if suffix is None else f"{entry.key.rpartition('/')[2].replace('#', '-')}{suffix}"

    def store_new(self, output: Output, unit: str, items: Sequence[Stored]) -> None:
        """The unit's new images as one shard, without times or owners, so that its bytes depend on them alone."""
        shard = output.folder / f"{self._prefix}{unit}.tar"
        with atomic_write(shard) as temporary, tarfile.open(temporary, "w:") as tar:
            for item in items:
                label_suffix, text, _ = item.entry.location[3:]
                label_name = f"{item.file.partition('.')[0]}.{label_suffix}"
                for name, content in ((item.file, item.content), (label_name, text.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    def extension(self, entry: Entry) -> str:
        """That of the member."""
        return entry.location[5]

    def holds_unit(self, output: Output, unit: str, rows: Sequence[Row]) -> bool:
        """Whether the unit's shard is there."""
        is_new = any(row["kind"] == "generated" for row in rows)
        return not is_new or (output.folder / f"{self._prefix}{unit}.tar").is_file()

    def holds_image(self, out: Path, row: Row) -> bool:
        """Whether its shard is there."""
        return not row["file"] or (out / row["file"].partition("/")[0]).is_file()

    def finish(self, output: Output, rows: Iterable[Row], entries: Mapping[str, Entry]) -> None:
        """The original shards."""
        if output.originals != "reference":
            for shard in self._shards:
                output.take_over(self._root / shard, shard)

    def manifest_file(self, row: Row, index: int) -> str:
        """The shard of an original; SHARD/MEMBER of a new image."""
        return row["file"] if row["kind"] == "original" else f"{self._prefix}{row['unit']}.tar/{row['file']}"

    def read_back(self, out: Path, row: Row) -> bytes:
        """The member of the unit's shard."""
        shard, _, member = row["file"].partition("/")
        with tarfile.open(out / shard) as tar:
            return tar.extractfile(member).read()


def _free_prefix(shards: Sequence[str]) -> str:
    """What names of new shards begin with: nothing that an original's name begins with."""
    prefixes = itertools.chain(["augmented-"], (f"augmented{number}-" for number in itertools.count(2)))
    return next(prefix for prefix in prefixes if not any(shard.startswith(prefix) for shard in shards))


def _read_samples(tar: tarfile.TarFile, shard: str) -> Iterator[_Sample]:
    """The samples of one shard; members of a sample share their name up to the first dot and lie together."""
    files = (member for member in tar if member.isfile())
    for key, members in itertools.groupby(files, key=lambda member: _split_name(member)[0]):
        image, label, extension = None, None, ""
        for member in members:
            suffix = _split_name(member)[1]
            if f".{suffix.lower()}" in SUFFIXES:
                image, extension = (shard, member.offset_data, member.size), f".{suffix}"
            elif suffix in ("cls", "json"):
                label = _read_label(tar.extractfile(member).read(), suffix, f"{shard}/{member.name}") or label
        if image and label:
            name, suffix, text = label
            yield f"{shard}/{key}", name, (*image, suffix, text, extension)


def _split_name(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key of the sample, and what is behind the first dot of the member's own name."""
    folder, slash, base = member.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}" if folder else stem, suffix


def _read_label(content: bytes, suffix: str, where: str) -> tuple[str, str, str] | None:
    """Class name, and suffix and text of the member that a new sample carries for it; None where a .json has none."""
    try:
        text = content.decode("utf-8").strip()
        if suffix == "cls":
            return text, "cls", text
        value = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{printable(where)} is no label ({printable(error)[:80]}); store a class number or name"
        ) from error
    label = value.get("label", value.get("cls")) if isinstance(value, dict) else None
    return None if label is None else (str(label), "json", json.dumps({"label": label}))
