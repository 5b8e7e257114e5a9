"""Images or groups in training and test alike, and images that stand under two labels: counted, and the first named.

Either makes figures say something else than they seem to: a test image that was trained on is no new image, and of two
labels of one image one is wrong. Equal means every pixel, found by a cryptographic digest of each image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.errors import printable

if TYPE_CHECKING:
    from gen_invariance.data.split import LongTailSplit

_EXAMPLES = 3
_CHUNK = 4096  # images that are copied to the CPU at once

Digests = Sequence[tuple[bytes, str | None]]
"""The digest of each image, and the name of its class; None where that is not known, which contradicts no label."""


@dataclass(frozen=True)
class DuplicateReport:
    """What was found.

    Attributes:
        shared: test images that are training images, too.
        test_images: how many test images there are.
        shared_groups: test images of which a group shows the same thing in training, see `ImageData.groups`.
        contradictory: different images that stand under two labels or more, in training and test together.
        shared_examples: (test image, training image, class of the test image) of the first few.
        contradictory_examples: (image, its class, the same image elsewhere, its class there) of the first few.
    """

    shared: int = 0
    test_images: int = 0
    shared_groups: int = 0
    contradictory: int = 0
    shared_examples: tuple[tuple[str, str, str], ...] = ()
    contradictory_examples: tuple[tuple[str, str, str, str], ...] = ()

    def lines(self) -> list[str]:
        """A line of plain English for each kind that was found; none for clean data."""
        lines = []
        of_test = f"of {self.test_images:,} test images"
        if self.shared:
            test, train, label = self.shared_examples[0]
            what = "is also a training image" if self.shared == 1 else "are also training images"
            lines.append(
                f"note: {self.shared:,} {of_test} {what} (first: {test} = {train}, class {label!r}); "
                "their accuracy says nothing about new images"
            )
        if self.shared_groups:
            what = "is of a group" if self.shared_groups == 1 else "are of groups"
            lines.append(
                f"note: {self.shared_groups:,} {of_test} {what} that training images show, too; "
                "their accuracy says little about new things"
            )
        if self.contradictory:
            one, label, other, wrong = self.contradictory_examples[0]
            what = "image stands" if self.contradictory == 1 else "images stand"
            lines.append(
                f"note: {self.contradictory:,} {what} under two labels (first: {one}, class {label!r} = {other}, class "
                f"{wrong!r}); correct the labels, or remove what is wrong"
            )
        return lines


def find_duplicates(
    train: ImageData,
    test: ImageData | None,
    *,
    train_name: Callable[[int], str] = "training row {}".format,
    test_name: Callable[[int], str] = "test row {}".format,
) -> DuplicateReport:
    """Images of `test` that are in `train`, and images with two labels in both together.

    Classes are told apart by name, since the parts may number them differently. Takes a second for 50,000 images of
    32x32x3.

    Args:
        train: training images.
        test: test images; None or none at all looks at the labels of `train` only.
        train_name: what a row of `train` is called in the report.
        test_name: what a row of `test` is called.
    """
    test_digests = [] if test is None else _digests(test)
    report = compare_digests(_digests(train), test_digests, train_name=train_name, test_name=test_name)
    if test is None or train.groups is None or test.groups is None:
        return report
    return replace(report, shared_groups=int(torch.isin(test.groups, train.groups.to(test.device)).sum()))


def split_duplicates(
    split: LongTailSplit, *, files: tuple[Sequence[str] | None, Sequence[str] | None] = (None, None)
) -> DuplicateReport:
    """`find_duplicates` of the training and test images of `split`, named by their rows in the source.

    Args:
        split: the images as the source gives them.
        files: of the source's training and test images, row for row, where they came as files.
    """
    train_files, test_files = files

    def train_name(row: int, indices: Tensor = split.train_indices) -> str:
        index = int(indices[row])
        return f"training row {index}" if train_files is None else printable(train_files[index])

    def test_name(row: int) -> str:
        if split.test_indices is not None:
            return train_name(row, split.test_indices)
        known = test_files is not None and len(test_files) == len(split.test)
        return printable(test_files[row]) if known else f"test row {row}"

    return find_duplicates(split.train, split.test, train_name=train_name, test_name=test_name)


def compare_digests(
    train: Digests, test: Digests, *, train_name: Callable[[int], str], test_name: Callable[[int], str]
) -> DuplicateReport:
    """The report on images that are known by digest and class; `*_name` say what the i-th one is called."""
    names = (train_name, test_name)
    contradictory: dict[bytes, tuple[str, str, str, str]] = {}
    shared: list[tuple[int, int]] = []
    first: dict[bytes, tuple[int, int, str | None]] = {}  # part, row and class where an image comes first
    for part, digests in enumerate((train, test)):
        for row, (digest, label) in enumerate(digests):
            first_part, first_row, first_label = first.setdefault(digest, (part, row, label))
            if None not in (label, first_label) and label != first_label and digest not in contradictory:
                contradictory[digest] = (names[first_part](first_row), first_label, names[part](row), label)
            if part == 1 and first_part == 0:
                shared.append((row, first_row))
    return DuplicateReport(
        shared=len(shared),
        test_images=len(test),
        contradictory=len(contradictory),
        shared_examples=tuple((test_name(a), train_name(b), test[a][1] or train[b][1]) for a, b in shared[:_EXAMPLES]),
        contradictory_examples=tuple(contradictory.values())[:_EXAMPLES],
    )


def _digests(data: ImageData) -> Digests:
    """Digest and class name of each image; images of another shape never match."""
    start = hashlib.blake2b(repr(tuple(data.images.shape[1:])).encode(), digest_size=20)
    digests = []
    for chunk in data.images.split(_CHUNK):
        for row in chunk.cpu().contiguous().flatten(1).numpy():
            digest = start.copy()
            digest.update(row)
            digests.append(digest.digest())
    return [(digest, data.class_names[label]) for digest, label in zip(digests, data.labels.tolist(), strict=True)]
