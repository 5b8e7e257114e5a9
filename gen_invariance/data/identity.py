"""Which images a run saw: kept in its folder, and compared by whatever opens the run again.

A split is a function of the data and the seed, so an image that is added, or a class that is renamed, moves it: images
that were trained on come into the test set, and class numbers mean other classes. `data.json` in the run folder
therefore holds the classes and a SHA-256 of the images of each part, as they are before a nuisance acts on them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gen_invariance.data.images import ImageData
from gen_invariance.data.split import LongTailSplit, load_split_indices
from gen_invariance.errors import CheckpointError, DataError, printable
from gen_invariance.files import read_json, write_json
from gen_invariance.run import Run, is_first_process

PARTS = ("train", "validation", "test")
DATA_FILE = "data.json"
_WORDS = {"train": "training", "validation": "validation", "test": "test"}

DataIdentity = Mapping[str, Any]
"""Of each part its number of images, their SHA-256, and (class, images) of each class; JSON-able."""


def describe_data(parts: Mapping[str, ImageData]) -> dict[str, Any]:
    """The identity of the images of each part. Takes a pass over the pixels: a second or two for a gigabyte."""
    return {
        part: {
            "images": len(data),
            "sha256": data.digest,
            "classes": [list(pair) for pair in zip(data.class_names, data.counts.tolist(), strict=True)],
        }
        for part, data in parts.items()
    }


def find_data_change(before: DataIdentity, now: DataIdentity) -> str:
    """What differs between two identities, in words such as "class 'cat' is gone"; empty where nothing does.

    Args:
        before: what `describe_data` gave then, maybe of more parts; it may come from a file.
        now: what it gives now.

    Raises:
        ValueError, KeyError, TypeError: `before` is no identity.
    """
    changed = [part for part in now if before[part]["sha256"] != now[part]["sha256"]]
    for part in changed:
        classes = {str(name): int(count) for name, count in before[part]["classes"]}
        change = _compare_classes(_WORDS[part], classes, dict(now[part]["classes"]))
        if change:
            return change
    return f"its {_WORDS[changed[0]]} images are others, or their pixels have changed" if changed else ""


def _compare_classes(part: str, old: Mapping[str, int], new: Mapping[str, int]) -> str:
    gone, added = [name for name in old if name not in new], [name for name in new if name not in old]
    if len(gone) == len(added) == 1:
        return f"class {printable(gone[0])!r} is gone and class {printable(added[0])!r} is new"
    for names, what in ((gone, "gone"), (added, "new")):
        if names:
            others = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
            return f"class {printable(names[0])!r}{others} {what}"
    if list(old) != list(new):
        return "the classes come in another order"
    for name, count in old.items():
        if new[name] != count:
            return f"class {printable(name)!r} had {count} {part} images, now it has {new[name]}"
    return ""


def tie_run(run: Run, parts: Mapping[str, ImageData], *, split: LongTailSplit | None = None) -> None:
    """Keep with a new run which images it sees; of a run that goes on, compare them.

    Args:
        run: just opened. One without a folder has nothing to keep, and one that goes on under other settings of its
            data (as allowed) is described anew.
        parts: images by part ("train", "validation", "test"), those that the run depends on.
        split: where they come from; compared with `split.npz` where an earlier version made the run.

    Raises:
        DataError: other images than the run began with; names the first difference.
        CheckpointError: `data.json` is damaged.
    """
    if run.path is None:
        return
    now = describe_data(parts)
    if not {"data", "seed"} & set(run.changed_settings):
        refuse_other_data(run.path, now, split=split, remedy="restore them, or choose another folder")
    if is_first_process():
        write_json(run.path / DATA_FILE, {**(_read_identity(run.path) or {}), **now})


def check_run_data(folder: Path, parts: Mapping[str, ImageData], *, split: LongTailSplit | None = None) -> None:
    """Compare images with those that the run in `folder` saw; arguments and errors as of `tie_run`, nothing is kept."""
    remedy = "restore them, or make another run with the data as they are"
    refuse_other_data(folder, describe_data(parts), split=split, remedy=remedy)


def refuse_other_data(folder: Path, now: DataIdentity, *, split: LongTailSplit | None, remedy: str) -> None:
    """Raise `DataError` where the run in `folder` saw other images than those that are described in `now`."""
    before = _read_identity(folder)
    change = _find_old_change(folder, split) if before is None else _find_change(folder, before, now)
    if change:
        raise DataError(f"the data are not those of the run in {printable(folder)}: {change}; {remedy}")


def tie_folder(folder: Path, name: str, source: DataIdentity) -> None:
    """Keep with a folder of several runs, such as a grid, what data called `name` they share, or compare it.

    Raises:
        DataError: they are others than those that the folder was begun on; names the first difference.
        CheckpointError: the file that says so is damaged.
    """
    path = folder / "data" / f"{name}.json"
    if not path.exists():
        write_json(path, source)
    try:
        before = dict(read_json(path))
        parts = [part for part in PARTS if (part in before) != (part in source)]
        change = f"{_WORDS[parts[0]]} images have come or gone" if parts else find_data_change(before, source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); copy it anew, or choose another folder") from error
    if change:
        raise DataError(
            f"the data are not those that {printable(folder)} was begun on: {change}; restore them, or choose another "
            "folder"
        )


def find_change_since(folder: Path, parts: Mapping[str, ImageData]) -> str:
    """`find_data_change` of images and those that the run in `folder` saw; empty where that is not known."""
    before = _read_identity(folder)
    return "" if before is None else _find_change(folder, before, describe_data(parts))


def _find_change(folder: Path, before: DataIdentity, now: DataIdentity) -> str:
    try:
        return find_data_change(before, now)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / DATA_FILE} is damaged ({error!r}); copy it anew, or run again") from error


def _read_identity(folder: Path) -> dict[str, Any] | None:
    """What `tie_run` kept; None for a run that is new, or of an earlier version."""
    path = folder / DATA_FILE
    try:
        return dict(read_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy it anew, or run again") from error


def _find_old_change(folder: Path, split: LongTailSplit | None) -> str:
    """What the saved indices of an earlier version's run tell; warns that they tell little."""
    saved_at = folder / "split.npz"
    if not saved_at.is_file():
        return ""  # a run that has just begun, or one without a split
    change = "" if split is None else find_split_change(load_split_indices(saved_at), split)
    if not change:
        warnings.warn(
            f"{printable(folder)} was made by an earlier version, which did not keep which images it saw; only the "
            "split was compared",
            stacklevel=4,
        )
    return change


def find_split_change(saved: Mapping[str, torch.Tensor], split: LongTailSplit) -> str:
    """What differs between saved indices of a split (`load_split_indices`) and `split`; empty where nothing does."""
    for part in PARTS:
        old, new = saved.get(f"{part}_indices"), getattr(split, f"{part}_indices")
        if (old is None) != (new is None) or (old is not None and not torch.equal(old, new)):
            return f"other images come into its {_WORDS[part]} part"
    if not torch.equal(saved["counts"], split.counts) or not torch.equal(saved["order"], split.order):
        return "its classes have other sizes"
    return ""


def split_parts(split: LongTailSplit, names: Iterable[str] = PARTS) -> dict[str, ImageData]:
    """The images of a split by part."""
    return {name: getattr(split, name) for name in names}
