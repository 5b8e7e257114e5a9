"""What lies in an image folder: its parts, its classes, and what becomes of each file.

Reading and exporting ask here, so that both see the same images. What could be read in two ways is refused.

    root/class/*.png                      classes; images in folders below a class folder are of that class
    root/train/class/*.png, root/test/... parts: one for training, and others under any name
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gen_invariance.data.readers.pictures import SUFFIXES, UNREAD_SUFFIXES, is_picture_inside
from gen_invariance.errors import DataError, DataNotFoundError, printable

_WHOLE = r"(?:[ _-]?(?:set|data|images|imgs|part|split|dataset))?\d*"
_TRAINING = re.compile(rf"(?:train|training){_WHOLE}")
_TEST = tuple(
    re.compile(rf"(?:{names}){_WHOLE}")
    for names in ("test|tests|testing", "eval|evaluation|holdout|heldout|hold_out", "val|valid|validation|dev")
)
_LITTER_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
_LITTER_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "zbthumbnail.info", "picasa.ini"}
_PICTURES = SUFFIXES | UNREAD_SUFFIXES


@dataclass(frozen=True)
class FoundFile:
    """A file below a class folder, or beside class folders.

    Attributes:
        path: the file.
        problem: why a picture cannot be read, as its name or place says.
        ignored: why it is taken for no picture of a class.
    """

    path: Path
    problem: str = ""
    ignored: str = ""


def existing_folder(path: Path | str) -> Path:
    """`path` as a `Path`, or `DataNotFoundError` when it is no folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataNotFoundError(
            f"{printable(folder)} {kind}; give a folder with one sub-folder of images for each class"
        )
    return folder


def is_litter(name: str, *, folder: bool = False) -> bool:
    """Whether a file or folder is hidden, or left there by an operating system."""
    return name.startswith(".") or name.casefold() in (_LITTER_FOLDERS if folder else _LITTER_FILES)


def sub_folders(folder: Path) -> list[Path]:
    """Folders in `folder`, links to folders among them, sorted; none that are hidden or an operating system's."""
    return sorted(entry for entry in folder.iterdir() if not is_litter(entry.name, folder=True) and entry.is_dir())


def is_training_name(name: str) -> bool:
    """Whether `name` says the training part: train, Training, train_set, ..."""
    return _TRAINING.fullmatch(name.strip().casefold()) is not None


def is_other_part_name(name: str) -> bool:
    """Whether `name` says a part for testing or validation: test, Testing, valid, eval, ..."""
    return any(pattern.fullmatch(name.strip().casefold()) for pattern in _TEST)


def name_part(name: str) -> str:
    """Of the training part "train", of another part its name as it is, of any other word ""."""
    return "train" if is_training_name(name) else name if is_other_part_name(name) else ""


def choose_test_part(names: Iterable[str]) -> str | None:
    """The one to test on: a test part before one for evaluation, and that before one for validation."""
    names = list(names)
    for pattern in _TEST:
        for name in names:
            if pattern.fullmatch(name.strip().casefold()):
                return name
    return None


def find_parts(path: Path | str) -> dict[str, Path]:
    """The parts of a folder: "train", and all others under their folders' names; empty where it holds classes.

    A folder is divided into parts where one called train (`is_training_name`) holds class folders, and what stands
    beside it are no classes.

    Raises:
        DataNotFoundError: no such folder.
        DataError: no training part, more than one, or what may be parts as well as classes.
    """
    root = existing_folder(path)
    folders = sub_folders(root)
    _refuse_detection(root, folders)
    training = [folder for folder in folders if is_training_name(folder.name) and _class_names(folder)]
    if not training:
        _refuse_unclear(root, folders)
        return {}
    others = [folder for folder in folders if folder not in training and _has_images(folder)]
    named = [folder for folder in others if is_other_part_name(folder.name)]
    if not named and any(map(_has_own_images, others)):
        return {}  # bus/, car/ and a class called train/, whose images lie in folders
    training += [folder for folder in others if is_training_name(folder.name)]
    if len(training) > 1:
        raise DataError(
            f"{printable(root)} has {len(training)} training parts ({_listed(training)}); give the folder of one"
        )
    unnamed = [folder for folder in others if folder not in named]
    if unnamed and not named:
        raise DataError(
            f"{printable(root)}: {_listed(training)} may be a part or a class beside {_listed(unnamed)}; call other "
            "parts test or val, or move the images of each class up into its folder"
        )
    return {"train": training[0], **{folder.name: folder for folder in others}}


def find_classes(path: Path) -> list[Path]:
    """The class folders of `path`, sorted.

    Raises:
        DataError: `path` holds parts, or no sub-folder.
    """
    parts = find_parts(path)
    if parts:
        raise DataError(
            f"{printable(path)} holds train/ and test/ parts, not classes; read {printable(parts['train'])}"
        )
    folders = sub_folders(path)
    if not folders:
        raise DataError(
            f"{printable(path)} has no sub-folders; put the images of each class into a sub-folder named after the "
            "class"
        )
    for folder in folders:
        if folder.is_symlink() and path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{printable(folder)} links to a folder that holds it; remove the link")
    return folders


def list_visible(folder: Path) -> list[Path]:
    """Files in `folder` itself, sorted; none that are hidden or an operating system's."""
    return sorted(entry for entry in folder.iterdir() if not is_litter(entry.name) and not entry.is_dir())


def list_files(folder: Path) -> Iterator[FoundFile]:
    """All files below `folder`, in an order that does not depend on the file system."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        path = folder / entry.name
        is_folder = path.is_dir()  # unlike that of `entry`, False for a link to itself
        if is_litter(entry.name, folder=is_folder):
            continue
        if is_folder and not entry.is_symlink():
            yield from list_files(path)
        elif is_folder:
            reason = "a link to a folder, which is not followed; link the class folder itself, or files"
            yield FoundFile(path, problem=reason)
        else:
            yield judge_file(path)


def judge_file(path: Path) -> FoundFile:
    """`path`, and whether it is a picture by its name; where it has no ending, by its content."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return FoundFile(path)
    if suffix in UNREAD_SUFFIXES:
        return FoundFile(path, problem=f"{suffix} pictures are not read; convert it to PNG or JPEG")
    try:
        inside = is_picture_inside(path)
    except OSError:  # no regular file, or one that may not be read
        inside = False
    if inside and suffix:
        return FoundFile(
            path, problem=f"a picture inside, but its name ends in {printable(suffix)}; rename or remove it"
        )
    return FoundFile(path) if inside else FoundFile(path, ignored="no image by its name")


def _refuse_detection(root: Path, folders: list[Path]) -> None:
    """Raise where images come with boxes, as the usual tools lay them out; none of those folders is a class."""
    by_name = {folder.name.casefold(): folder for folder in folders}
    coco = [root, *folders]
    kinds = {
        "YOLO, images/ beside labels/*.txt": "images" in by_name and _has_file(by_name.get("labels"), ".txt"),
        "YOLO, images/ beside labels/*.txt in each part": any(
            (folder / "images").is_dir() and _has_file(folder / "labels", ".txt") for folder in folders
        ),
        "Pascal VOC, JPEGImages/ beside Annotations/*.xml": "jpegimages" in by_name
        and _has_file(by_name.get("annotations"), ".xml"),
        "COCO, annotations/instances_*.json": any((root / "annotations").glob("instances_*.json")),
        "COCO, _annotations.coco.json": any((folder / "_annotations.coco.json").is_file() for folder in coco),
    }
    found = next((kind for kind, is_so in kinds.items() if is_so), None)
    if found:
        raise DataError(
            f"{printable(root)} is a set for object detection ({found}), and only classification is supported; cut the "
            "boxes out into a folder for each class"
        )


def _has_file(folder: Path | None, suffix: str) -> bool:
    """Whether files with that ending lie below `folder`, and no images."""
    return folder is not None and folder.is_dir() and any(folder.glob(f"**/*{suffix}")) and not _has_images(folder)


def _refuse_unclear(root: Path, folders: list[Path]) -> None:
    """Raise where folders without a training part, with class folders in it, cannot be classes."""
    if folders and all(is_training_name(folder.name) or is_other_part_name(folder.name) for folder in folders):
        raise DataError(
            f"{printable(root)} holds {_listed(folders)}, but no training part with a sub-folder for each class; put "
            "the images of each class into train/CLASS, or give the folder that holds the classes"
        )
    inner = []
    for folder in folders:
        if _has_own_images(folder):
            return
        inner.append(_class_names(folder))
    if len(folders) == 1 and len(inner[0]) > 1:
        raise DataError(
            f"{printable(root)} holds one folder, and that {len(inner[0])} others; give {printable(folders[0])} if "
            "those are the classes"
        )
    if len(folders) > 1 and len(inner[0]) > 1 and all(names == inner[0] for names in inner):
        raise DataError(
            f"{printable(root)}: {_listed(folders)} all hold the folders {', '.join(map(printable, inner[0][:3]))}, so "
            "either may be the classes; call parts train and test, or move the images up into the class folders"
        )


def _class_names(folder: Path) -> list[str]:
    """Names of the folders in `folder` that hold images."""
    return [inner.name for inner in sub_folders(folder) if _has_images(inner)]


def _has_own_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_looks_like_image(entry.name) and not os.path.isdir(entry) for entry in entries)


def _has_images(folder: Path) -> bool:
    return _has_own_images(folder) or any(_has_images(inner) for inner in sub_folders(folder) if not inner.is_symlink())


def _looks_like_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _PICTURES and not is_litter(name)


def _listed(folders: list[Path]) -> str:
    more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
    return ", ".join(f"{printable(folder.name)}/" for folder in folders[:3]) + more
