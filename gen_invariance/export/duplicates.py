"""Files that are in the training part of a set and in another part alike, or stand under two labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from gen_invariance.data.duplicates import DuplicateReport, compare_marked, find_duplicates
from gen_invariance.data.readers.arrays import read_npz
from gen_invariance.errors import printable as shown
from gen_invariance.export.formats.base import Entry, Form
from gen_invariance.export.pictures import UnusablePictureError


def set_duplicates(form: Form) -> DuplicateReport:
    """The report on the set of `form`: by pixels for an .npz file, otherwise by the bytes of each encoded image.

    All parts but the training part count as test images. A set that is one part only is not read: nothing is found.
    Images that cannot be read are left out, since the export names them.
    """
    if form.name == "npz":
        train, test = read_npz(form.path)
        return DuplicateReport() if test is None else find_duplicates(train, test)
    entries = [entry for entry in form.entries() if not entry.ignored]
    parts = [[entry for entry in entries if (entry.part == "train") == wanted] for wanted in (True, False)]
    if not all(parts):
        return DuplicateReport()
    (train, names), (test, test_names) = (_transposed(_marked(form, part)) for part in parts)
    return compare_marked(train, test, train_name=names.__getitem__, test_name=test_names.__getitem__)


def _marked(form: Form, entries: Iterable[Entry]) -> Iterator[tuple[tuple[bytes, str], str]]:
    """Digest and class of each image that can be read, and its name."""
    for entry in entries:
        try:
            content = form.read(entry)
        except (OSError, UnusablePictureError):
            continue
        yield (hashlib.blake2b(content, digest_size=20).digest(), form.class_names[entry.label]), shown(entry.key)


def _transposed(marked: Iterable[tuple[tuple[bytes, str], str]]) -> tuple[list[tuple[bytes, str]], list[str]]:
    both = list(marked)
    return [mark for mark, _ in both], [name for _, name in both]
