"""The stage: gives the nuisance to the tail part of a batch.

Two faces over one function, `translate_rows`:

    augment = TailAugment(translator, probability)      # class-aware: probability has one number for each class
    images, labels = augment(images, labels)

    pipeline = kornia.augmentation.AugmentationSequential(
        kornia.augmentation.RandomHorizontalFlip(), KorniaNuisance(translator, p=0.5)
    )                                                    # class-blind, replayable: pipeline(x, params=pipeline._params)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kornia.augmentation import IntensityAugmentationBase2D
from kornia.augmentation.random_generator import RandomGeneratorBase
from torch import Tensor, nn

from gen_invariance.augment.batches import as_images, check_layout, check_range, row_probability
from gen_invariance.augment.cache import CODE_BYTES, Numbered, known_by_number
from gen_invariance.augment.policy import auto
from gen_invariance.augment.reference import HeldNuisance, Stream
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
    return _replaced(images, rows, _transformed(nuisance, images.index_select(0, rows), gate.draw))


def _replaced(images: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """A copy with other `rows`; unlike `images.index_copy` it keeps the memory format."""
    return images.clone().index_copy_(0, rows, new)


def _transformed(nuisance: Nuisance, images: Tensor, draw: Draw) -> Tensor:
    return _autocast_off(images, nuisance.apply, images, draw)


@torch.no_grad()
def _autocast_off(images: Tensor, translate: Callable[..., Tensor], *given: Any) -> Tensor:
    """Translate in the nuisance's own precision: autocast would round coordinates, and so move pixels."""
    with torch.autocast(images.device.type, enabled=False):
        return translate(*given)


class TailAugment(nn.Module):
    """Class-aware stage: each row gets the nuisance with the probability of its class.

    The nuisance is held outside the module tree: it stays in eval mode, its weights take no gradient, and neither
    `parameters()` nor `state_dict()` of a model that contains the stage mentions it. It goes where the images are;
    `stage.to(torch.bfloat16)` makes its network compute in half precision (an autocast around the stage does not).
    `torch.compile` of a step that calls the stage breaks the graph around it.

    Args:
        nuisance: hand-written or learned.
        probability: float (K,) in [0, 1], see `policy`.
        seed: of the stage's own generator, used where a call brings none; each rank draws from its own stream.
        layout: "channels_first", or "channels_last" where batches arrive as (B, H, W, C); they leave channels first.

    Raises:
        RangeError: a probability outside [0, 1] or NaN.
        SettingsError: an unknown layout.
    """

    def __init__(
        self, nuisance: Nuisance, probability: Tensor, *, seed: int = 0, layout: str = "channels_first"
    ) -> None:
        super().__init__()
        probability = torch.as_tensor(probability, dtype=torch.float32, device="cpu")
        if probability.ndim != 1 or not bool(((probability >= 0) & (probability <= 1)).all()):
            raise RangeError("stage: probability must hold one number in [0, 1] for each class; a policy makes it")
        check_layout(layout)
        # Plain attributes: half precision would round the probabilities, and rows are chosen on the CPU.
        self.probability, self.layout = probability, layout
        self._held, self._stream = HeldNuisance(nuisance), Stream(seed)
        self._range_seen = False
        self._make_numbered: Callable[[], Numbered | None] | None = None
        self._numbered: Numbered | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        class_counts: Tensor | Sequence[int],
        probability: Tensor | None = None,
        seed: int = 0,
        layout: str = "channels_first",
    ) -> TailAugment:
        """The stage over the translator saved in `path`, by default with `policy.auto` of the class counts (K,).

        Raises:
            CheckpointError: no intact translator in `path`.
            ShapeError: `probability` and `class_counts` are of different lengths.
        """
        from gen_invariance.translator.io import load_translator  # diffusers is slow to import

        counts = torch.as_tensor(class_counts)
        if probability is None:
            probability = auto(counts)
        elif len(probability) != len(counts):
            raise ShapeError(f"stage: {len(probability)} probabilities for {len(counts)} classes; give one for each")
        return cls(load_translator(path), probability, seed=seed, layout=layout)

    @property
    def nuisance(self) -> Nuisance:
        """The nuisance that is given to the gated rows."""
        return self._held.nuisance

    @property
    def generator(self) -> torch.Generator:
        """The stage's own generator; save and restore its state to resume a loop exactly."""
        return self._stream.generator()

    def _apply(self, fn: Any, recurse: bool = True) -> TailAugment:
        self._held.move(fn)
        self._numbered = None  # codes are of the network as it was
        return super()._apply(fn, recurse)

    def remember(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        versions: int = 0,
        uses: Tensor | None = None,
        period: int = 1000,
        seed: int = 0,
        max_bytes: int = CODE_BYTES,
    ) -> None:
        """Know a fixed set by number: calls that give `numbers` need less of the nuisance's network from now on.

        Without `versions` codes of images are kept, which is exact, where the nuisance has codes (MUNIT's content);
        other nuisances work as before. With `versions` all translations come from a `TranslationBank`.

        Args:
            images: uint8 (N, C, H, W), the set, on the device that trains.
            labels: int64 (N,).
            versions: translations of an image in a bank, on average; 0 for no bank.
            uses: (N,), how often each image comes, in any unit, so that all translations of a bank are used alike;
                None is alike.
            period: steps after which each translation of the bank has been replaced.
            seed: of the bank's draws.
            max_bytes: most that kept codes may take.
        """
        how = {"versions": versions, "period": period, "seed": seed, "max_bytes": max_bytes}

        def make() -> Numbered | None:
            often = self.probability[labels.cpu()] * (1 if uses is None else uses.cpu())
            return known_by_number(self._held.on(images.device), images, often, **how)

        self._make_numbered, self._numbered = make, None

    def forget(self) -> None:
        """Let go of what `remember` keeps; calls work as if it had never been called."""
        self._make_numbered = self._numbered = None

    def drawer(self, *, numbered: bool = False) -> Nuisance | Numbered:
        """What draws for rows known by number, or for others; its `sample` takes the shape of the gated rows."""
        return (self._known() if numbered else None) or self.nuisance

    def _known(self) -> Numbered | None:
        if self._numbered is None and self._make_numbered is not None:
            self._numbered = self._make_numbered()
        return self._numbered

    def sample(
        self,
        shape: torch.Size | tuple[int, ...],
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        numbered: bool = False,
    ) -> Gate:
        """Decide which rows of a batch get the nuisance, and draw it for them.

        Args:
            shape: (B, C, H, W) of the images.
            labels: whole numbers (B,), or soft labels (B, K), see `forward`.
            generator: CPU generator; None uses the stage's own.
            numbered: whether `apply` will be given `numbers`.
        """
        generator = generator if generator is not None else self.generator
        rows = torch.rand(shape[0], generator=generator) < row_probability(labels, self.probability, count=shape[0])
        drawer = self.drawer(numbered=numbered)
        return Gate(rows, drawer.sample((int(rows.sum()), *shape[1:]), generator=generator))

    def apply(
        self,
        images: Tensor | Callable[[nn.Module], None],
        labels: Tensor | None = None,
        gate: Gate | None = None,
        *,
        source: tuple[Tensor, Tensor] | None = None,
        numbers: Tensor | None = None,
    ) -> Any:
        """Carry out a gate: `forward` without its randomness and its checks.

        `nn.Module.apply(function)`, which a model calls on all its parts, has the same name and works as well.
        """
        if labels is None or gate is None:
            return super().apply(images)
        rows = gate.rows.nonzero().squeeze(1).to(images.device)
        if not len(rows):
            return images, labels
        known = self._known() if numbers is not None else None
        if known is not None:
            translated = _autocast_off(images, known.translate, numbers.to(rows.device)[rows], gate.draw)
            translated = translated.to(images.dtype)
        else:
            given = images if source is None else source[0]
            translated = _transformed(self._held.on(images.device), given.index_select(0, rows), gate.draw)
        if source is not None:
            labels = labels.index_copy(0, rows, source[1].index_select(0, rows))
        return _replaced(images, rows, translated), labels

    def advance(self, step: int) -> None:
        """Let what `remember` set up be as `step` of a training needs it: a bank redraws its share."""
        known = self._known()
        if known is not None:
            known.advance(step)

    @torch.compiler.disable
    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        source: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        numbers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Augment one batch.

        Args:
            images: floating point (B, C, H, W) in [0, 1], or uint8 (divided by 255); any device, also no rows at all.
                Not changed. (B, H, W, C) where the stage was built with layout="channels_last".
            labels: whole numbers (B,), or soft labels (B, K) after mixup or label smoothing: the probability of
                such a row is that of its classes, weighted by the label.
            source: images and labels of a second, usually class-balanced, stream of the same shapes. Where given, a
                gated row is replaced by the translated row of the source *and its label*, and the gate looks at the
                source's labels (Zhou et al. 2022). Rows that are not gated stay as they are.
            generator: CPU generator of this call's randomness; None uses the stage's own.
            numbers: int64 (B,), rows of the set given to `remember` that the images (those of the source, where
                given) are, unchanged; None where they are not of that set or were augmented first.

        Returns:
            images (B, C, H, W) in [0, 1], in the floating-point dtype and memory format they came in (float32 for
            uint8), and labels of the shape and dtype they came in.

        Raises:
            ShapeError: dtype, axes, labels or source do not fit.
            RangeError: a label that is no class; or, at the first call, pixels that were normalised or are 8-bit.
        """
        images = as_images(images, layout=self.layout)
        self._check_range_once(images)
        how = {"generator": generator, "numbered": numbers is not None}
        if source is None:
            return self.apply(images, labels, self.sample(images.shape, labels, **how), numbers=numbers)
        source = (as_images(source[0], layout=self.layout).to(images.dtype), source[1])
        if source[0].shape != images.shape or (source[1].shape, source[1].dtype) != (labels.shape, labels.dtype):
            raise ShapeError(
                f"stage: source images {tuple(source[0].shape)} with {source[1].dtype} labels "
                f"{tuple(source[1].shape)} must be like the batch's {tuple(images.shape)} with {labels.dtype} "
                f"{tuple(labels.shape)}"
            )
        gate = self.sample(images.shape, source[1], **how)
        return self.apply(images, labels, gate, source=source, numbers=numbers)

    def _check_range_once(self, images: Tensor) -> None:
        """The usual mistake, a stage behind Normalize, shows in the first batch; reading every batch would cost."""
        if not self._range_seen:
            check_range(images)
            self._range_seen = bool(len(images))

    def extra_repr(self) -> str:
        """Nuisance and the classes it is given to."""
        given = int((self.probability > 0).sum())
        return f"{type(self.nuisance).__name__}, {given} of {len(self.probability)} classes"


class _DrawGenerator(RandomGeneratorBase):
    """Draws for kornia from an own CPU generator, so draws do not depend on device, dtype or global random state."""

    def __init__(self, nuisance: Nuisance, seed: int) -> None:
        super().__init__()
        self._held, self._stream = (nuisance,), Stream(seed)

    @property
    def generator(self) -> torch.Generator:
        """The generator of this process, see `Stream`."""
        return self._stream.generator()

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
        self._held = HeldNuisance(nuisance)
        self._param_generator = _DrawGenerator(nuisance, seed)

    @property
    def nuisance(self) -> Nuisance:
        """The nuisance that is given to the gated rows."""
        return self._held.nuisance

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> KorniaNuisance:
        self._held.move(fn)
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
        nuisance = self._held.on(input.device)
        return translate_rows(nuisance, input, Gate(rows, select_rows(own, rows)))
