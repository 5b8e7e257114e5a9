"""Batches from images that stay on the device, and a sampler for those who use a `DataLoader` of their own.

Any step can be addressed without replaying the ones before it, which is what makes resuming exact. Every rank
computes the same epoch list and takes its share of it, so results do not depend on the number of ranks. There are no
worker processes: images are resident as uint8, and a batch is one gather.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, Subset

from gen_invariance.data.images import ImageData
from gen_invariance.data.sampling import check_sampled, epoch_indices, sampling_probabilities
from gen_invariance.data.settings import Rule, rule_name
from gen_invariance.data.storage import check_batch
from gen_invariance.devices import send
from gen_invariance.errors import SettingsError


def find_labels(data: Any) -> Tensor:
    """The labels of `data`, int64 (N,), without decoding an image.

    Args:
        data: labels themselves (tensor, array, list, pandas series), an `ImageData`, a data set with `.targets` or
            `.labels`, a Hugging Face data set with a column `label`, or `torch.utils.data.Subset`s of one, nested as
            deep as you like.

    Raises:
        SettingsError: no labels to be found.
    """
    if isinstance(data, Subset):
        return find_labels(data.dataset)[torch.as_tensor(data.indices, dtype=torch.int64)]
    if isinstance(data, Tensor | np.ndarray | list | tuple):
        return check_sampled(_as_tensor(data))
    if hasattr(data, "__array__") and not hasattr(data, "column_names"):
        return check_sampled(_as_tensor(np.asarray(data)))
    column = next((name for name in ("label", "labels") if name in (getattr(data, "column_names", None) or ())), None)
    if column is not None:
        return check_sampled(_as_tensor(list(data[column])))
    for name in ("targets", "labels"):
        found = getattr(data, name, None)
        if isinstance(found, Tensor | np.ndarray | list | tuple):
            return check_sampled(_as_tensor(found))
    raise SettingsError(
        f"cannot find the labels of a {type(data).__name__} (it has no .targets and no .labels); "
        "pass the labels themselves, one whole number for each image"
    )


def _as_tensor(labels: Tensor | np.ndarray | Sequence[Any]) -> Tensor:
    try:
        return labels if isinstance(labels, Tensor) else torch.as_tensor(np.array(labels))
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"labels must be whole numbers, one for each image, got {type(labels).__name__} of something else; "
            "number the classes from 0"
        ) from error


class LongTailSampler(Sampler[int]):
    """Indices for a `DataLoader` by a sampling rule, seeded by (seed, epoch).

    `set_epoch` says which epoch comes next, and has to be called where a run goes on in the middle. Loops that never
    call it get one epoch after another: each time the sampler is gone through is the next.

    The epoch's list is the same on all ranks, and rank r takes items r, r + world_size, ...: together the ranks
    draw exactly what one process would, with no item twice to fill up, so their lengths may differ by one. Under
    `accelerate` leave rank and world_size alone: its batch sharding splits the list, and since this sampler has no
    `.generator` attribute nothing re-seeds it.

    Args:
        labels_or_dataset: what `find_labels` accepts.
        rule: one of `RULES`, or a callable such as `DelayedRule`.
        seed: root of the random numbers.
        num_epochs: epochs of the whole run, for "progressive".
        num_samples: draws of an epoch over all ranks; None is the number of images.
        rank: this process.
        world_size: how many there are.

    Raises:
        SettingsError: labels that cannot be found, an unknown rule, or a rank outside the world.

    Example:
        >>> import torch
        >>> from gen_invariance import LongTailSampler
        >>> sampler = LongTailSampler(torch.tensor([0] * 8 + [1] * 2), rule="class_balanced")
        >>> sampler.set_epoch(0)
        >>> len(list(sampler))
        10
    """

    def __init__(
        self,
        labels_or_dataset: Any,
        *,
        rule: Rule = "class_balanced",
        seed: int = 0,
        num_epochs: int = 1,
        num_samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise SettingsError(
                f"rank must lie in [0, world_size), got rank {rank} of {world_size}; check the launcher"
            )
        if num_samples is not None and num_samples < 1:
            raise SettingsError(f"num_samples must be at least 1, got {num_samples}; leave it out for one per image")
        self.labels = find_labels(labels_or_dataset)
        self.rule, self.seed, self.num_epochs = rule, seed, num_epochs
        self.num_samples = len(self.labels) if num_samples is None else num_samples
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        self._is_told, self._begun = False, 0
        rule_name(rule)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration draw the list of `epoch`."""
        self.epoch, self._is_told = epoch, True

    def __len__(self) -> int:
        return len(range(self.rank, self.num_samples, self.world_size))

    def __iter__(self) -> Iterator[int]:
        if not self._is_told:
            self.epoch, self._begun = self._begun, self._begun + 1
        return iter(self.draw(self.epoch)[self.rank :: self.world_size].tolist())

    def draw(self, epoch: int, *, stream: str = "loader") -> Tensor:
        """The images of `epoch` over all ranks, int64 (num_samples,); `stream` separates loaders that share a seed."""
        return epoch_indices(
            self.labels,
            rule=rule_name(self.rule, epoch),
            epoch=epoch,
            seed=self.seed,
            num_epochs=self.num_epochs,
            num_samples=self.num_samples,
            stream=stream,
        )


class ResidentLoader:
    """Batches of an `ImageData`, on its device, addressed by step.

    Args:
        data: images and labels; move them to the accelerator first.
        batch_size: images of a batch over all ranks.
        rule: one of `RULES`, or a callable such as `DelayedRule`.
        seed: root of the random numbers.
        num_epochs: epochs of the whole run, for "progressive".
        num_samples: draws of an epoch; None is the number of images.
        drop_last: leave out the incomplete batch at the end of an epoch.
        rank: this process; it takes rows rank, rank + world_size, ... of each batch.
        world_size: how many there are; it may not exceed `batch_size`.
        stream: separates loaders that share a seed.

    Raises:
        SettingsError: unknown rule, a batch size that gives no batch, or a rank outside the world.
        DataError: no image.

    Example:
        >>> from gen_invariance import ResidentLoader, load_source
        >>> loader = ResidentLoader(load_source("digits").train, batch_size=32, rule="class_balanced")
        >>> images, labels = loader.batch(0)
        >>> images.shape, images.dtype, len(loader)
        (torch.Size([32, 1, 16, 16]), torch.float32, 57)
    """

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int,
        rule: Rule = "instance",
        seed: int = 0,
        num_epochs: int = 1,
        num_samples: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        stream: str = "loader",
    ) -> None:
        self._sampler = LongTailSampler(
            data.labels,
            rule=rule,
            seed=seed,
            num_epochs=num_epochs,
            num_samples=num_samples,
            rank=rank,
            world_size=world_size,
        )
        self.num_samples = self._sampler.num_samples
        most = self.num_samples if drop_last else math.inf
        if not world_size <= batch_size <= most:
            raise SettingsError(
                f"batch_size must be at least {world_size} (one image a rank) and, with drop_last, at most "
                f"{self.num_samples} (the draws of an epoch), got {batch_size}"
            )
        check_batch(data.images, min(batch_size, self.num_samples) // world_size, where="training")
        self.data, self.batch_size, self.stream = data, batch_size, stream
        self.steps_per_epoch = self.num_samples // batch_size if drop_last else -(-self.num_samples // batch_size)
        self._drawn: tuple[int, Tensor] | None = None  # an epoch and its list, on the CPU

    def __len__(self) -> int:
        return self.steps_per_epoch

    def rule_at(self, epoch: int) -> str:
        """The name of the sampling rule in `epoch`."""
        return rule_name(self._sampler.rule, epoch)

    def expected_uses(self, epochs: Sequence[int]) -> Tensor:
        """How often each image comes in an epoch, float64 (N,): the expected number, a mean over `epochs`."""
        labels, last = self._sampler.labels, max(self._sampler.num_epochs - 1, 1)
        counts = torch.bincount(labels)
        rates = [sampling_probabilities(counts, rule=self.rule_at(epoch), progress=epoch / last) for epoch in epochs]
        return (self.num_samples * torch.stack(rates).mean(0) / counts.clamp_min(1))[labels]

    def indices(self, step: int) -> Tensor:
        """This rank's rows of the data for global step `step`, int64 (B,), on the data's device.

        In the incomplete last batch of an epoch ranks may differ by one row, and a rank may have none.
        """
        return send(self.indices_here(step), self.data.device)

    def indices_here(self, step: int) -> Tensor:
        """As `indices`, but on the CPU, where looking at them makes nobody wait."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._sampler.draw(epoch, stream=self.stream)
        rows = self._drawn[1][batch * self.batch_size :][: self.batch_size]
        return rows[self._sampler.rank :: self._sampler.world_size]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float32 (B, C, H, W) in [0, 1] and labels int64 (B,) of global step `step`."""
        rows = self.indices(step)
        return self.data.float_images(rows), self.data.labels[rows]

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `number`, in order."""
        first = number * self.steps_per_epoch
        return (self.batch(step) for step in range(first, first + self.steps_per_epoch))
