"""A task: a source, a long tail cut out of it, and a nuisance that acted on every image once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gen_invariance.data.cuts import CUTS
from gen_invariance.data.duplicates import DuplicateReport, split_duplicates
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import long_tailed_indices, shot_groups
from gen_invariance.data.readers.registry import load_source
from gen_invariance.data.repeated import SHORTAGES, make_filled
from gen_invariance.data.split import LongTailSplit, make_long_tailed
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.nuisance.once import transform_once
from gen_invariance.nuisance.protocol import Draw, Nuisance
from gen_invariance.run import named_generator


@dataclass(frozen=True)
class Task:
    """Which images, how long their tail, and what acted on them.

    Attributes:
        source: a name of `data.readers.registry`.
        path: file or folder of the source, where it needs one.
        image_size: side to scale images to; None keeps the size.
        skip_corrupt: leave damaged image files out instead of stopping.
        group: what tells which images show the same thing and must not be parted, see `load_source`.
        profile, largest, imbalance, power, smallest, validation_fraction, rest_is_test, shuffle_order: of the long
            tail, see `data.split.make_long_tailed`. Profile "none" keeps a set that is long-tailed already.
        shortage: what becomes of classes with fewer images than their size: "error", "repeat" (images are used again,
            each time under another draw), or "cap" (the class stays smaller).
        base_images: different images of a class at most, with shortage "repeat": 5 leaves the long tail to the number
            of draws.
        test_images: of each class at most.
        cut: rule by which images of a class are chosen: "own", "cao" or "first", see `data.cuts.cut_indices`.
        fill_tail: fill small classes up towards the size of the largest, with images that the cut leaves out: an
            oracle for sets whose nuisance cannot be drawn.
        nuisance: name of the hand-written nuisance that acts once on each image; "identity" leaves the set as it is.
        nuisance_options: of that nuisance.
        transformed_ranks: classes whose training images meet the nuisance, by rank in size from 0; None is all. Test
            images always meet it.
        many_above, few_below: bounds of many- and few-shot classes, training images; None, or bounds that leave one of
            them empty, give thirds of the classes by size (`data.longtail.shot_groups`).
    """

    source: str = "digits"
    path: str | None = None
    image_size: int | None = None
    skip_corrupt: bool = False
    group: str | None = None
    profile: str = "exponential"
    largest: int | None = None
    imbalance: float = 100.0
    power: float = 2.0
    smallest: int = 1
    validation_fraction: float = 0.0
    rest_is_test: bool = False
    shuffle_order: bool = True
    shortage: str = "error"
    base_images: int | None = None
    test_images: int | None = None
    cut: str = "own"
    fill_tail: bool = False
    nuisance: str = "identity"
    nuisance_options: Mapping[str, Any] = field(default_factory=dict)
    transformed_ranks: tuple[int, ...] | None = None
    many_above: int | None = 100
    few_below: int | None = 20

    def __post_init__(self) -> None:
        bounds = (self.few_below, self.many_above)
        if None not in bounds and not 0 < bounds[0] <= bounds[1] + 1:
            raise SettingsError(
                f"data: few_below must be positive and at most many_above + 1, got {self.few_below}, {self.many_above}"
            )

        if self.shortage not in SHORTAGES:
            raise SettingsError(f"data: shortage must be one of {', '.join(SHORTAGES)}, got {self.shortage!r}")
        if self.base_images is not None and (self.base_images < 1 or self.shortage != "repeat"):
            raise SettingsError(
                f"data: base_images must be at least 1 and needs shortage=repeat, got {self.base_images} and "
                f"{self.shortage!r}"
            )
        if self.cut not in CUTS or (self.cut != "own" and self.shortage != "error"):
            raise SettingsError(
                f"data: cut must be one of {', '.join(CUTS)}, and own with shortage={self.shortage}, got {self.cut!r}"
            )
        if self.fill_tail and (self.shortage == "repeat" or self.rest_is_test or self.profile == "none"):
            raise SettingsError(
                "data.fill_tail (more_real) needs images that the cut leaves out, and there are none with "
                f"shortage={self.shortage}, rest_is_test={str(self.rest_is_test).lower()}, profile={self.profile}"
            )
        if self.test_images is not None and self.test_images < 1:
            raise SettingsError(f"data: test_images must be at least 1 a class, got {self.test_images}")
        if self.transformed_ranks is not None:
            object.__setattr__(self, "transformed_ranks", tuple(self.transformed_ranks))
            if min(self.transformed_ranks, default=0) < 0:
                raise SettingsError(f"data: transformed_ranks count from 0, got {list(self.transformed_ranks)}")

    @property
    def name(self) -> str:
        """For records and titles: source and nuisance."""
        return self.source if self.nuisance == "identity" else f"{self.source}-{self.nuisance}"

    def build_nuisance(self) -> Nuisance:
        """The nuisance that is in the data: the oracle's."""
        return build_nuisance(self.nuisance, **self.nuisance_options)

    def identity(self) -> dict[str, Any]:
        """The settings as JSON-able values, for a run's config."""
        # Runs that were made before these settings were there stay what they are.
        added = {"group": None, "cut": "own", "fill_tail": False}
        return {name: value for name, value in asdict(self).items() if name not in added or value != added[name]}


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

    @cached_property
    def duplicates(self) -> DuplicateReport:
        """Images that are in training and test, or stand under two labels, compared before they met the nuisance."""
        return split_duplicates(self.split, files=self.files)

    def originals(self, part: str) -> ImageData:
        """The images of a part before they met the nuisance, row for row, on the device of the part."""
        return getattr(self.split, part).to(getattr(self, part).device)

    def to(self, device: torch.device | str) -> Prepared:
        """The same with all images on `device`."""
        parts = {part: getattr(self, part).to(device) for part in ("train", "validation", "test")}
        return replace(self, **parts)


def prepare(task: Task, *, seed: int, need_test: bool = True, progress: bool = False) -> Prepared:
    """Read the source, cut the long tail, apply the nuisance once to every image; a function of (task, seed).

    Args:
        task: what to prepare.
        seed: of the class order, the chosen images and the draws.
        need_test: whether a source without test images is an error; without them the test part is empty.
        progress: show a bar while files are read.
    """
    source = load_source(
        task.source,
        task.path,
        image_size=task.image_size,
        skip_corrupt=task.skip_corrupt,
        progress=progress,
        group=task.group,
    )
    pair = (source.train, source.test)
    if not need_test and source.test is None and not task.rest_is_test:
        pair = (source.train, source.train.subset(torch.zeros(0, dtype=torch.int64)))
    split = _cut(task, pair, seed=seed)
    nuisance = task.build_nuisance()
    moved = {
        part: transform_once(images, nuisance, generator=named_generator(seed, "nuisance", part))
        for part, images in (("train", split.train), ("validation", split.validation), ("test", split.test))
    }
    moved["train"] = (_only_ranks(task, split, moved["train"][0]), moved["train"][1])
    return Prepared(
        **{part: images for part, (images, _) in moved.items()},
        split=split,
        draws={part: draw for part, (_, draw) in moved.items()},
        nuisance=nuisance,
        groups=shot_groups(split.train.counts, many_above=task.many_above, few_below=task.few_below),
        flip_safe=source.flip_safe,
        files=(source.train_files, source.test_files),
    )


def _cut(task: Task, pair: tuple[ImageData, ImageData | None], *, seed: int) -> LongTailSplit:
    """The long-tailed split of the source's parts."""
    shape = {
        name: getattr(task, name)
        for name in (
            "profile", "largest", "imbalance", "power", "smallest", "validation_fraction", "rest_is_test",
            "shuffle_order",
        )
    }  # fmt: skip
    if task.shortage == "error":
        split = make_long_tailed(pair, **shape, cut=task.cut, fill_tail=task.fill_tail, seed=seed)
    else:
        split = make_filled(
            pair, shortage=task.shortage, base_images=task.base_images, **shape, fill_tail=task.fill_tail, seed=seed
        )
    if task.test_images is None:
        return split
    labels = split.test.labels.cpu()
    wanted = split.test.counts.clamp(max=task.test_images)
    generator = named_generator(seed, "longtail", "test")
    kept = long_tailed_indices(labels, wanted, generator=generator, groups=split.test.groups)
    rows = None if split.test_indices is None else split.test_indices[kept]
    return replace(split, test=split.test.subset(kept), test_indices=rows)


def _only_ranks(task: Task, split: LongTailSplit, moved: ImageData) -> ImageData:
    """`moved`, but the classes that are not among the task's ranks as they were before."""
    if task.transformed_ranks is None:
        return moved
    beyond = [rank for rank in task.transformed_ranks if rank >= len(split.order)]
    if beyond:
        raise SettingsError(f"data: transformed_ranks names rank {beyond[0]}, there are {len(split.order)} classes")
    chosen = split.order[list(task.transformed_ranks)]
    rows = torch.isin(moved.labels, chosen.to(moved.device)).view(-1, 1, 1, 1)
    return replace(moved, images=torch.where(rows, moved.images, split.train.images))
