"""A task: a source, a long tail cut out of it, and a nuisance that acted on every image once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gen_invariance.data.duplicates import DuplicateReport, split_duplicates
from gen_invariance.data.identity import DataIdentity, describe_data
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import shot_groups
from gen_invariance.data.readers.registry import load_source
from gen_invariance.data.split import LongTailSplit, make_long_tailed
from gen_invariance.data.storage import GIGABYTE, room_like
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.settings import Task
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.nuisance.compose import transform_once
from gen_invariance.nuisance.protocol import Draw, Nuisance
from gen_invariance.run import named_generator


@dataclass(frozen=True)
class Prepared:
    """The images of a task for one seed.

    Attributes:
        train, validation, test: as the classifier sees them, the nuisance applied.
        split: indices, class counts and order; its images are those before the nuisance.
        draws: the nuisance's draw of each part, row for row.
        nuisance: what acted.
        groups: bool masks (K,) "many", "medium", "few".
        flip_safe: whether a mirrored image keeps its label.
        files: of the source's training and test images, row for row; None where they did not come as files.
        source: identity of all images of the source, whatever the seed chose of them, if it was asked for.
        notes: lines that say what of the source is not used.
    """

    train: ImageData
    validation: ImageData
    test: ImageData
    split: LongTailSplit
    draws: Mapping[str, Draw]
    nuisance: Nuisance
    groups: Mapping[str, Tensor]
    flip_safe: bool
    files: tuple[tuple[str, ...] | None, tuple[str, ...] | None] = (None, None)
    source: DataIdentity | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def duplicates(self) -> DuplicateReport:
        """Images that are in training and test, or stand under two labels, compared before they met the nuisance."""
        return split_duplicates(self.split, files=self.files)

    def originals(self, part: str) -> ImageData:
        """The images of a part before they met the nuisance, row for row, on the device of the part."""
        return getattr(self.split, part).to(getattr(self, part).device)

    def file_names(self, part: str) -> list[str]:
        """Of each row of "train", "validation" or "test" its file, or "test row 3" where it came from no file."""
        indices, of_train = getattr(self.split, f"{part}_indices"), self.files[0]
        count, of_test = len(getattr(self.split, part)), self.files[1]
        if indices is not None and of_train is not None:
            return [of_train[row] for row in indices.tolist()]
        if indices is None and of_test is not None and len(of_test) == count:
            return list(of_test)
        return [f"{part} row {row}" for row in range(count)]

    def to(self, device: torch.device | str) -> Prepared:
        """The same with all images on `device`."""
        parts = {part: getattr(self, part).to(device) for part in ("train", "validation", "test")}
        return replace(self, **parts)


def prepare(
    task: Task, *, seed: int, need_test: bool = True, progress: bool = False, describe_source: bool = False
) -> Prepared:
    """Read the source, cut the long tail, apply the nuisance once to every image; a function of (task, seed).

    Args:
        task: what to prepare.
        seed: of the class order, the chosen images and the draws.
        need_test: whether a source without test images is an error; without them the test part is empty.
        progress: show a bar while files are read.
        describe_source: also identify the source, for what is prepared of it under several seeds.
    """
    source = load_source(
        task.source,
        task.path,
        image_size=task.image_size,
        skip_corrupt=task.skip_corrupt,
        progress=progress,
        group=task.group,
        map_from=task.map_from * GIGABYTE,
    )
    test = source.test
    if test is None and not need_test and not task.rest_is_test:
        test = source.train.subset(torch.zeros(0, dtype=torch.int64))
    split = make_long_tailed((source.train, test), task, seed=seed)
    nuisance = build_nuisance(task.nuisance, **task.nuisance_options)
    images, draws = {}, {}
    for part in ("train", "validation", "test"):
        generator = named_generator(seed, "nuisance", part)
        images[part], draws[part] = transform_once(getattr(split, part), nuisance, generator=generator)
    images["train"] = _restore_other_ranks(task, split, images["train"])
    return Prepared(
        **images,
        split=split,
        draws=draws,
        nuisance=nuisance,
        groups=shot_groups(split.train.counts, many_above=task.many_above, few_below=task.few_below),
        flip_safe=source.flip_safe,
        files=(source.train_files, source.test_files),
        source=describe_data(source.parts) if describe_source else None,
        notes=source.notes,
    )


def _restore_other_ranks(task: Task, split: LongTailSplit, moved: ImageData) -> ImageData:
    """`moved`, but the classes that are not among the task's ranks as they were before."""
    if task.transformed_ranks is None:
        return moved
    beyond = [rank for rank in task.transformed_ranks if rank >= len(split.order)]
    if beyond:
        raise SettingsError(f"data: transformed_ranks names rank {beyond[0]}, there are {len(split.order)} classes")
    labels = split.order[list(task.transformed_ranks)]
    rows = torch.isin(moved.labels, labels.to(moved.device)).view(-1, 1, 1, 1)
    images = room_like(moved.images, moved.images.shape)
    return replace(moved, images=torch.where(rows, moved.images, split.train.images, out=images))
