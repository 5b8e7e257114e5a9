"""WebDataset: tar shards of samples, KEY.png beside KEY.cls (or a KEY.json with "label"); new images get shards."""

from __future__ import annotations

import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gen_invariance.data.readers.pictures import UnusablePictureError
from gen_invariance.data.readers.tree import is_litter, name_part
from gen_invariance.errors import DataError, DataNotFoundError, printable
from gen_invariance.export.formats.base import Entry, Format, Output, Row, Stored, sort_class_names, unique_keys
from gen_invariance.export.formats.tar_samples import Place, Sample, read_samples
from gen_invariance.files import atomic_write

_LOOKED_AT = 1 << 20  # bytes behind the last member, which are zeros
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class ShardFormat(Format):
    """The shards of a folder, or one of them. Shards are indexed once and read in place; they must not be packed.

    Shards whose names say so (test-000.tar, val/000.tar) are other parts, where there are any others: taken over, and
    not augmented.

    Args:
        path: a folder of .tar files, in folders of it too, or one .tar file.
    """

    name = "webdataset"
    copied_whole = "shards"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise DataNotFoundError(f"{printable(path)} does not exist; give a folder of .tar shards or one of them")
        self._root = path if path.is_dir() else path.parent
        self._parts = _find_shards(path) if path.is_dir() else {path.name: "train"}
        # The output of an export holds shards of new images already, which must not be written over.
        self._prefix = _free_prefix(list(self._parts))
        labels = (sample.label for shard, sample in self._samples() if self._parts[shard] == "train")
        self.class_names = sort_class_names(label for label in labels if label is not None)
        if not self.class_names:
            raise DataError(
                f"{printable(path)}: no sample has an image and a label (KEY.cls, or KEY.json with 'label')"
            )

    def _samples(self) -> Iterator[tuple[str, Sample]]:
        """Each sample, and its shard."""
        for shard in self._parts:
            with self._open(shard) as tar:
                for sample in read_samples(tar, shard):
                    yield shard, sample
                self._check_end(shard, tar.offset)

    @contextmanager
    def _open(self, shard: str) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self._root / shard, "r:") as tar:
                yield tar
        except tarfile.TarError as error:
            reason = printable(error)[:100]
            raise DataError(
                f"{printable(self._root / shard)} is truncated or no plain tar file ({reason}); write it again"
            ) from error

    def _check_end(self, shard: str, end: int) -> None:
        """Raise where members follow behind what was read: a damaged header looks like the end."""
        with open(self._root / shard, "rb") as file:
            file.seek(end)
            if file.read(_LOOKED_AT).strip(b"\0"):
                raise DataError(
                    f"{printable(self._root / shard)} is damaged at byte {end}, and what follows would be lost; write "
                    "it again"
                )

    def entries(self) -> Sequence[Entry]:
        """One for each sample; in other parts than the training part it need have no label."""
        samples, labels, entries = list(self._samples()), self.labels, []
        keys = unique_keys(f"{shard}/{sample.key}" for shard, sample in samples)
        for key, (shard, sample) in zip(keys, samples, strict=True):
            part, label = self._parts[shard], -1 if sample.label is None else labels.get(sample.label, -1)
            ignored = sample.ignored if part == "train" or not sample.place.extension else ""
            entries.append(Entry(key, label, tuple(sample.place), part, ignored, sample.problem))
        return entries

    def read(self, entry: Entry) -> bytes:
        """The image's bytes, straight from where they are in the shard."""
        place = Place(*entry.location)
        return self._read_bytes(place.shard, place.image, place.image_size)

    def _read_bytes(self, shard: str, offset: int, size: int) -> bytes:
        with open(self._root / shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise UnusablePictureError("its shard ends before the image does")
        return content

    def file_name(self, entry: Entry, suffix: str | None) -> str:
        """Originals stay in their shard; a new image is a member of its unit's shard, which `store_new` names."""
        if suffix is None:
            return Place(*entry.location).shard
        # What is behind the first dot is the kind of a member; the hash in `suffix` tells keys apart.
        name = entry.key.rpartition("/")[2].replace("#", "-").replace(".", "-")
        return f"{os.fsdecode(os.fsencode(name)[:160])}{suffix}"

    def store_new(self, output: Output, unit: str, items: Sequence[Stored]) -> None:
        """The unit's new images as one shard, without times or owners, so that its bytes depend on them alone."""
        shard = output.folder / f"{self._prefix}{unit}.tar"
        with atomic_write(shard) as temporary, tarfile.open(temporary, "w:") as tar:
            for item in items:
                place = Place(*item.entry.location)
                label = self._read_bytes(place.shard, place.label, place.label_size)
                label_name = f"{item.file.partition('.')[0]}.{place.label_suffix}"
                for name, content in ((item.file, item.content), (label_name, label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    def extension(self, entry: Entry) -> str:
        """That of the member."""
        return Place(*entry.location).extension

    def holds_unit(self, output: Output, unit: str, rows: Sequence[Row]) -> bool:
        """Whether the unit's shard is there."""
        is_new = any(row["kind"] == "generated" for row in rows)
        return not is_new or (output.folder / f"{self._prefix}{unit}.tar").is_file()

    def holds_image(self, out: Path, row: Row) -> bool:
        """Whether its shard is there."""
        shard = row["file"] if row["kind"] == "original" else row["file"].partition("/")[0]
        return not shard or (out / shard).is_file()

    def finish(self, output: Output, rows: Iterable[Row], entries: Mapping[str, Entry]) -> None:
        """The original shards."""
        if output.originals != "reference":
            for shard in self._parts:
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


def _find_shards(path: Path) -> dict[str, str]:
    """The shards of a folder in order, below it, and the part that the name of each says."""
    files = sorted(
        file.relative_to(path)
        for file in path.rglob("*.tar*")
        if not any(is_litter(name, folder=True) for name in file.relative_to(path).parts)
    )
    shards = [file for file in files if file.suffix == ".tar"]
    packed = [file for file in files if file.name.endswith(_PACKED)]
    if packed or not shards:
        found = f"packed shards ({printable(packed[0])})" if packed else "no .tar shard"
        raise DataError(f"{printable(path)} holds {found}; packed ones (.tar.gz) must be unpacked to .tar first")
    named = {file.as_posix(): [name_part(word) for word in re.split(r"[^A-Za-z]+", file.as_posix())] for file in shards}
    parts = {shard: next(filter(None, names), "") for shard, names in named.items()}
    if all(part not in ("", "train") for part in parts.values()):
        if len(set(parts.values())) > 1:
            found = ", ".join(sorted(set(parts.values())))
            raise DataError(f"{printable(path)} holds shards of the parts {found} and none for training; give one part")
        return dict.fromkeys(parts, "train")  # somebody asks for that part
    return {shard: part or "train" for shard, part in parts.items()}
