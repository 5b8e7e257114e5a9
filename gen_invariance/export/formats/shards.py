"""WebDataset: tar shards of samples, KEY.png beside KEY.cls (or a KEY.json with "label"); new images get shards."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gen_invariance.data.readers.folder import SUFFIXES
from gen_invariance.errors import DataError, DataNotFoundError
from gen_invariance.errors import printable as shown
from gen_invariance.export.formats.base import Entry, Finish, Row, Stored, in_order, unique_keys
from gen_invariance.export.pictures import UnusablePictureError
from gen_invariance.files import atomic_write


class ShardForm:
    """The shards of a folder, or one of them. Shards are indexed once and read in place; they must not be packed.

    Args:
        path: a folder of .tar files, or one .tar file.
    """

    name = "webdataset"
    keeps_size = False
    copied_whole = "shards"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise DataNotFoundError(f"{shown(path)} does not exist; give a folder of .tar shards or one of them")
        self._root = path if path.is_dir() else path.parent
        self._shards = sorted(file.name for file in path.glob("[!.]*.tar")) if path.is_dir() else [path.name]
        if not self._shards:
            raise DataError(f"{shown(path)} holds no .tar shard; packed ones (.tar.gz) must be unpacked to .tar first")
        self.class_names = in_order(label for _, _, label, _ in self._samples())
        if not self.class_names:
            raise DataError(f"{shown(path)}: no sample has an image and a label (KEY.cls, or KEY.json with 'label')")

    def _samples(self) -> Iterator[tuple[str, tuple[str, int, int], str, tuple[str, str]]]:
        """Key, (shard, offset, size), label, and (suffix, text) of the label's member, of each sample."""
        for shard in self._shards:
            try:
                with tarfile.open(self._root / shard, "r:") as tar:
                    yield from _samples_of(tar, shard)
            except tarfile.TarError as error:
                reason = shown(error)[:100]
                raise DataError(
                    f"{shown(self._root / shard)} is truncated or no plain tar file ({reason}); write it again"
                ) from error

    def entries(self) -> Sequence[Entry]:
        """One for each sample that has an image and a label."""
        samples = list(self._samples())
        numbers = {name: label for label, name in enumerate(self.class_names)}
        keys = unique_keys(key for key, *_ in samples)
        return [
            Entry(key, numbers[label], (*place, *member))
            for key, (_, place, label, member) in zip(keys, samples, strict=True)
        ]

    def read(self, entry: Entry) -> bytes:
        """The image's bytes, straight from its place in the shard."""
        shard, offset, size, *_ = entry.place
        with open(self._root / shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise UnusablePictureError("its shard ends before the image does")
        return content

    def file_of(self, entry: Entry, stem: str | None) -> str:
        """Originals stay in their shard; a new image is a member of its unit's shard, which `store` names."""
        return entry.place[0] if stem is None else f"{entry.key.rpartition('/')[2].replace('#', '-')}{stem}"

    def store(self, out: Path, state: Path, unit: str, items: Sequence[Stored], *, originals: str) -> None:
        """The unit's new images as one shard, without times or owners, so that its bytes depend on them alone."""
        new = [item for item in items if item.generated]
        if not new:
            return
        with atomic_write(out / f"augmented-{unit}.tar") as temporary, tarfile.open(temporary, "w:") as tar:
            for item in new:
                suffix, text = item.entry.place[3:]
                for ending, content in (("png", item.content), (suffix, text.encode())):
                    member = tarfile.TarInfo(f"{item.file}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    def finish(self, work: Finish) -> None:
        """The original shards."""
        if work.originals == "reference":
            return
        for shard in self._shards:
            with atomic_write(work.out / shard) as temporary:
                if work.originals == "link":
                    temporary.symlink_to((self._root / shard).resolve())
                else:
                    shutil.copyfile(self._root / shard, temporary)

    def manifest_file(self, row: Row, number: int) -> str:
        """The shard of an original; SHARD/MEMBER of a new image."""
        return row["file"] if row["kind"] == "original" else f"augmented-{row['unit']}.tar/{row['file']}.png"

    def read_back(self, out: Path, row: Row) -> bytes:
        """The member of the unit's shard."""
        shard, _, member = row["file"].partition("/")
        with tarfile.open(out / shard) as tar:
            return tar.extractfile(member).read()


def _samples_of(tar: tarfile.TarFile, shard: str) -> Iterator[tuple[str, tuple[str, int, int], str, tuple[str, str]]]:
    """The samples of one shard; members of a sample share their name up to the first dot and lie together."""
    key, image, label = None, None, None
    for member in [*(part for part in tar if part.isfile()), None]:
        folder, _, base = member.name.rpartition("/") if member else ("", "", "")
        stem, _, suffix = base.partition(".")
        found = f"{folder}/{stem}" if folder else stem
        if member is None or found != key:
            if image and label:
                yield f"{shard}/{key}", image, label[0], label[1]
            key, image, label = found, None, None
        if member is None:
            break
        if f".{suffix.lower()}" in SUFFIXES:
            image = (shard, member.offset_data, member.size)
        elif suffix in ("cls", "json"):
            label = _label(tar.extractfile(member).read(), suffix, f"{shard}/{member.name}") or label


def _label(content: bytes, suffix: str, where: str) -> tuple[str, tuple[str, str]] | None:
    """The label, and the member that a new sample carries for it; None where a .json has none."""
    try:
        text = content.decode("utf-8").strip()
        if suffix == "cls":
            return text, ("cls", text)
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{shown(where)} is no label ({shown(error)[:80]}); store a class number or name") from error
    found = value.get("label", value.get("cls")) if isinstance(value, dict) else None
    return None if found is None else (str(found), ("json", json.dumps({"label": found})))
