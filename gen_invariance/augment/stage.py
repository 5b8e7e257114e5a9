"""The stage: gives the nuisance to the tail part of a batch.

Two faces over one function, `translate_rows`:

    augment = TailAugment(translator, probability)      # class-aware: probability has one number for each class
    images, labels = augment(images, labels)

    pipeline = kornia.augmentation.AugmentationSequential(
        kornia.augmentation.RandomHorizontalFlip(), KorniaNuisance(translator, p=0.5)
    )                                                    # class-blind, replayable: pipeline(x, params=pipeline._params)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from kornia.augmentation import IntensityAugmentationBase2D
from kornia.augmentation.random_generator import RandomGeneratorBase
from torch import Tensor, nn

from gen_invariance.augment.policy import auto
from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.nuisance.protocol import Draw, Nuisance, select_rows


class Gate(NamedTuple):
    """Everything random about one call of the stage; the same gate gives the same batch.

    Attributes:
        rows: bool (B,), the rows that get the nuisance.
        draw: the nuisance's draw for those rows only, leading `rows.sum()`.
    """

    rows: Tensor
    draw: Draw

    def share(self, part: slice) -> Gate:
        """The gate of the rows that `part` picks out of the batch, as a process of several needs it."""
        place = torch.zeros(len(self.rows), dtype=torch.int64)
        place[self.rows] = torch.arange(int(self.rows.sum()))
        return Gate(self.rows[part], select_rows(self.draw, place[part][self.rows[part]]))


def translate_rows(nuisance: Nuisance, images: Tensor, gate: Gate) -> Tensor:
    """`images` (B, C, H, W) with the gated rows transformed; the network sees those rows and no others."""
    rows = gate.rows.nonzero().squeeze(1).to(images.device)
    if not len(rows):
        return images
    return images.index_copy(0, rows, nuisance.apply(images.index_select(0, rows), gate.draw))


class TailAugment(nn.Module):
    """Class-aware stage: each row gets the nuisance with the probability of its class.

    The nuisance is held outside the module tree: it stays in eval mode, its weights take no gradient, and neither
    `parameters()` nor `state_dict()` of a model that contains the stage mentions it.

    Args:
        nuisance: hand-written or learned.
        probability: float (K,) in [0, 1], see `policy`.
        seed: of the stage's own generator, used where a call brings none.

    Raises:
        RangeError: a probability outside [0, 1] or NaN.
    """

    def __init__(self, nuisance: Nuisance, probability: Tensor, *, seed: int = 0) -> None:
        super().__init__()
        probability = torch.as_tensor(probability, dtype=torch.float32)
        if probability.ndim != 1 or not bool(((probability >= 0) & (probability <= 1)).all()):
            raise RangeError("stage: probability must hold one number in [0, 1] for each class; a policy makes it")
        if isinstance(nuisance, nn.Module):
            nuisance.eval().requires_grad_(False)
        self._held = (nuisance,)  # a tuple hides it from nn.Module's registry
        self.register_buffer("probability", probability, persistent=False)
        self.generator = torch.Generator().manual_seed(seed)

    @classmethod
    def from_pretrained(
        cls, path: Path | str, *, class_counts: Tensor, probability: Tensor | None = None, seed: int = 0
    ) -> TailAugment:
        """The stage over the translator saved in `path`, by default with `policy.auto` of the class counts."""
        from gen_invariance.translator.load import load_translator  # diffusers is slow to import

        counts = torch.as_tensor(class_counts)
        return cls(load_translator(path), auto(counts) if probability is None else probability, seed=seed)

    @property
    def nuisance(self) -> Nuisance:
        """The nuisance that is given to the gated rows."""
        return self._held[0]

    def _apply(self, fn: Any, recurse: bool = True) -> TailAugment:
        if isinstance(self.nuisance, nn.Module):
            self.nuisance._apply(fn)
        return super()._apply(fn, recurse)

    def sample(
        self, shape: torch.Size | tuple[int, ...], labels: Tensor, *, generator: torch.Generator | None = None
    ) -> Gate:
        """Decide which rows of a batch with int64 `labels` (B,) get the nuisance, and draw it for them."""
        generator = generator if generator is not None else self.generator
        chance = torch.rand(len(labels), generator=generator)
        rows = chance < self.probability.to("cpu")[labels.to("cpu")]
        return Gate(rows, self.nuisance.sample((int(rows.sum()), *shape[1:]), generator=generator))

    @torch.no_grad()
    def apply(
        self, images: Tensor, labels: Tensor, gate: Gate, *, source: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Carry out a gate: `forward` without its randomness."""
        if source is None:
            return translate_rows(self.nuisance, images, gate), labels
        rows = gate.rows.nonzero().squeeze(1).to(images.device)
        if not len(rows):
            return images, labels
        translated = self.nuisance.apply(source[0].index_select(0, rows), gate.draw)
        return images.index_copy(0, rows, translated), labels.index_copy(0, rows, source[1].index_select(0, rows))

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        source: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Augment one batch.

        Args:
            images: float (B, C, H, W) in [0, 1], or uint8 (divided by 255); any device. Not changed.
            labels: int64 (B,).
            source: images and labels of a second, usually class-balanced, stream of the same shapes. Where given, a
                gated row is replaced by the translated row of the source *and its label*, and the gate looks at the
                source's labels (Zhou et al. 2022). Rows that are not gated stay as they are.
            generator: CPU generator of this call's randomness; None uses the stage's own.

        Returns:
            images float (B, C, H, W) in [0, 1] and labels (B,).

        Raises:
            ShapeError: labels or source do not fit the images.
        """
        images = _as_float(images)
        _check(images, labels)
        if source is None:
            return self.apply(images, labels, self.sample(images.shape, labels, generator=generator))
        source = (_as_float(source[0]), source[1])
        _check(*source)
        if source[0].shape != images.shape:
            raise ShapeError(
                f"stage: source images {tuple(source[0].shape)} must have the batch's {tuple(images.shape)}"
            )
        gate = self.sample(images.shape, source[1], generator=generator)
        return self.apply(images, labels, gate, source=source)

    def extra_repr(self) -> str:
        """Nuisance and the classes it is given to."""
        given = int((self.probability > 0).sum())
        return f"{type(self.nuisance).__name__}, {given} of {len(self.probability)} classes"


def _as_float(images: Tensor) -> Tensor:
    return images.float().div(255) if images.dtype == torch.uint8 else images


def _check(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4 or labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ShapeError(
            f"stage: expected images (B, C, H, W) and integer labels (B,), got {tuple(images.shape)} and "
            f"{labels.dtype} {tuple(labels.shape)}; call the stage before mixup makes labels soft"
        )


class _DrawGenerator(RandomGeneratorBase):
    """Draws for kornia from an own CPU generator, so draws do not depend on device, dtype or global random state."""

    def __init__(self, nuisance: Nuisance, seed: int) -> None:
        super().__init__()
        self._held = (nuisance,)
        self.generator = torch.Generator().manual_seed(seed)

    def make_samplers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to move: sampling stays on the CPU in float32."""

    def forward(self, batch_shape: tuple[int, ...], same_on_batch: bool = False) -> dict[str, Tensor]:
        """The nuisance's draw, one row for each image; one shared row where `same_on_batch`."""
        count = batch_shape[0]
        if not same_on_batch or count == 0:
            return self._held[0].sample(batch_shape, generator=self.generator)
        one = self._held[0].sample((1, *batch_shape[1:]), generator=self.generator)
        return select_rows(one, torch.zeros(count, dtype=torch.int64))


class KorniaNuisance(IntensityAugmentationBase2D):
    """Any nuisance as a kornia augmentation: class-blind, replayable, and cheap at small `p`.

    kornia hands `apply_transform` the whole batch and blends afterwards; here the network runs on the gated rows
    only. Geometric nuisances move pixels but not boxes, masks or keypoints: use them for classification.

    Args:
        nuisance: hand-written or learned; kept out of `parameters()` and `state_dict()`.
        p: probability of each row.
        p_batch, same_on_batch, keepdim: as everywhere in kornia.
        seed: of the generator of draws and gates; kornia's global random state is not touched.
    """

    def __init__(
        self,
        nuisance: Nuisance,
        *,
        p: float = 0.5,
        p_batch: float = 1.0,
        same_on_batch: bool = False,
        keepdim: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(p=p, p_batch=p_batch, same_on_batch=same_on_batch, keepdim=keepdim)
        if not (0 <= p <= 1 and 0 <= p_batch <= 1):
            raise SettingsError(f"KorniaNuisance: p and p_batch must lie in [0, 1], got {p} and {p_batch}")
        if isinstance(nuisance, nn.Module):
            nuisance.eval().requires_grad_(False)
        self._held = (nuisance,)
        self._param_generator = _DrawGenerator(nuisance, seed)

    @property
    def nuisance(self) -> Nuisance:
        """The nuisance that is given to the gated rows."""
        return self._held[0]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> KorniaNuisance:
        if isinstance(self.nuisance, nn.Module):
            self.nuisance._apply(fn)
        return super()._apply(fn, *args, **kwargs)

    def forward_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Gate and draw from the own generator; always the same count of numbers, whatever `p` is."""
        generator, count = self._param_generator.generator, batch_shape[0]
        call = torch.rand(1, generator=generator) < self.p_batch
        rows = torch.rand(1 if self.same_on_batch else count, generator=generator) < self.p
        draw = self._param_generator(batch_shape, self.same_on_batch)
        return {
            **draw,
            "batch_prob": (call & rows).expand(count).float(),
            "forward_input_shape": torch.tensor(batch_shape),
        }

    @torch.no_grad()
    def apply_transform(
        self,
        input: Tensor,  # noqa: A002  (kornia's name)
        params: dict[str, Tensor],
        flags: dict[str, Any],
        transform: Tensor | None = None,
    ) -> Tensor:
        """The batch with its gated rows transformed."""
        rows = params["batch_prob"].to("cpu") > 0.5
        kornias = ("batch_prob", "forward_input_shape", "data_keys")  # the last is added by AugmentationSequential
        own = {name: value for name, value in params.items() if name not in kornias}
        return translate_rows(self.nuisance, input, Gate(rows, select_rows(own, rows)))
