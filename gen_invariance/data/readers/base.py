"""What every reader of a data set gives and takes: `Source`, `ReadOptions` and the base class `Reader`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gen_invariance.data.images import ImageData
from gen_invariance.data.storage import GIGABYTE
from gen_invariance.errors import DataError


@dataclass(frozen=True)
class Source:
    """A data set as its publisher splits it.

    Attributes:
        train: training images.
        test: test images, or None when the set has no test part. Their classes may differ from those of `train`
            (Omniglot), then `class_names` does, too.
        flip_safe: a horizontal flip keeps the label (true of photos, false of letters and digits).
        skipped: (path, reason) of each damaged file that was left out.
        train_files, test_files: the file of each row, where the images came as files of their own.
        notes: lines that say what of the data set is not used.
    """

    train: ImageData
    test: ImageData | None
    flip_safe: bool
    skipped: tuple[tuple[Path, str], ...] = ()
    train_files: tuple[str, ...] | None = None
    test_files: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, ImageData]:
        """The images that there are, by part: "train" and, if it has one, "test"."""
        return {"train": self.train} if self.test is None else {"train": self.train, "test": self.test}


@dataclass(frozen=True)
class ReadOptions:
    """How a data set is read, see `registry.load_source`."""

    image_size: int | None = None
    skip_corrupt: bool = False
    progress: bool = False
    group: str | None = None
    map_from: float = GIGABYTE


class Reader:
    """A data set at `path`, a file or folder; None is where the reader looks by itself.

    Attributes:
        flip_safe: a horizontal flip keeps the label.
        needs_path: what `path` must be; None where the set is found without one.
        takes_group: whether `ReadOptions.group` means something.
    """

    flip_safe = False
    needs_path: str | None = None
    takes_group = False

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def missing(self) -> list[str]:
        """Names of files that are not there; empty when the set can be read."""
        return []

    def read(self, options: ReadOptions) -> Source:
        """The data set, at the size that `options` ask for."""
        raise NotImplementedError


def check_same_shape(train: ImageData, test: ImageData | None, where: str) -> None:
    """Raise `DataError` when training and test images differ in channels or size."""
    if test is not None and train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{where}: training images are {tuple(train.images.shape[1:])} and test images "
            f"{tuple(test.images.shape[1:])} (channels, height, width); store them alike, or set data.image_size=N"
        )
