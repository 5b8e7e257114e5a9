"""Indexed caches: translations of a fixed set of images that come again and again, at less cost.

Both kinds stand in for a nuisance where images are known by their index in the set and arrive unchanged. Keeping codes
is exact; a bank uses each translation several times, which is another training (docs/performance.md says what it
changes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gen_invariance.data.images import round_levels, to_float, to_uint8
from gen_invariance.data.storage import check_pixels_fit
from gen_invariance.devices import send
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.compose import Compose
from gen_invariance.nuisance.protocol import Coded, Draw, Nuisance, draw_to
from gen_invariance.run import named_generator

CODE_BYTES = 2**30
"""Memory that kept codes may take unless told otherwise."""


class _CodedComposition:
    """A composition whose first part has codes: the other parts belong to its second half."""

    def __init__(self, composition: Compose) -> None:
        self.composition, self.sample = composition, composition.sample
        first: Any = composition.nuisances[0]
        self.first, self.encode = first, first.encode

    def render(self, codes: Tensor, draw: Draw, size: tuple[int, int]) -> Tensor:
        images = self.first.render(codes, self.composition.part_of_draw(0, draw), size)
        return self.composition.apply_from(1, images, draw)


def as_coded(nuisance: Nuisance) -> Coded | None:
    """`nuisance` in two halves, or None where it has no codes; a composition has them if its first part does."""
    if isinstance(nuisance, Compose):
        return cast("Coded", _CodedComposition(nuisance)) if isinstance(nuisance.nuisances[0], Coded) else None
    return nuisance if isinstance(nuisance, Coded) else None


class CodeCache:
    """Codes of images are made when first asked for, a block at a time, and kept; exact, up to float rounding.

    Which images are kept, and which are encoded together, does not depend on what was asked for before, so a resumed
    run gets the very codes of an uninterrupted one. Images beyond the memory are encoded anew at each call.

    Args:
        nuisance: its weights must not change from now on.
        images: uint8 (N, C, H, W), or float in [0, 1]; the set.
        indices: int64 (M,), the images worth keeping, first come first kept; None is all.
        max_bytes: most that the codes may take, on the device of `images`.
        block: images encoded together.
    """

    def __init__(
        self,
        nuisance: Coded,
        images: Tensor,
        *,
        indices: Tensor | None = None,
        max_bytes: int = CODE_BYTES,
        block: int = 64,
    ) -> None:
        self.nuisance, self.images, self.max_bytes, self.block = nuisance, images, max_bytes, block
        self.indices, self._slots = _indices_and_slots(images, indices)
        self._codes: Tensor | None = None
        self._encoded: Tensor | None = None  # which blocks are there, on the CPU

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """The nuisance's own draw."""
        return self.nuisance.sample(shape, generator=generator)

    @torch.inference_mode(False)
    @torch.no_grad()
    def translate(self, indices: Tensor, draw: Draw) -> Tensor:
        """As `nuisance.apply` of those images, in float32; of `indices` on the CPU without waiting for the device."""
        codes = self.codes(indices)
        return self.nuisance.render(codes, draw_to(draw, codes), tuple(self.images.shape[-2:])).float()

    @torch.inference_mode(False)  # what is kept for a prediction serves a training, too
    @torch.no_grad()
    def codes(self, indices: Tensor) -> Tensor:
        """Codes of the images `indices`, int64 (M,), M > 0; made now where they are not kept."""
        device = self.images.device
        if self._codes is None:
            self._allocate()
        slots = self._slots[indices.cpu()]
        is_kept = (slots >= 0) & (slots < len(self._codes))
        kept, others = (rows.nonzero().squeeze(1) for rows in (is_kept, ~is_kept))
        self._encode_blocks(slots[kept])
        if not len(others):
            return self._codes[send(slots, device)]
        fresh = self.nuisance.encode(to_float(self.images[send(indices.cpu()[others], device)]))
        codes = fresh.new_empty((len(indices), *fresh.shape[1:]))
        codes[send(kept, device)], codes[send(others, device)] = self._codes[send(slots[kept], device)], fresh
        return codes

    def refresh(self, step: int) -> None:
        """Nothing to do: codes do not depend on the step."""

    def _allocate(self) -> None:
        one = self.nuisance.encode(to_float(self.images[:1]))
        room = min(len(self.indices), self.max_bytes // (one.numel() * one.element_size()))
        self._codes = one.new_empty((room, *one.shape[1:]))
        self._encoded = torch.zeros(-(-room // self.block), dtype=torch.bool, device="cpu")

    def _encode_blocks(self, slots: Tensor) -> None:
        """Encode the blocks that `slots` lie in, where that has not been done."""
        blocks = (slots // self.block).unique()
        for block in blocks[~self._encoded[blocks]].tolist():
            rows = slice(block * self.block, min((block + 1) * self.block, len(self._codes)))
            chosen = send(self.indices[rows], self.images.device)
            self._codes[rows] = self.nuisance.encode(to_float(self.images[chosen]))
            self._encoded[block] = True


class TranslationBank:
    """Translations of images drawn ahead as uint8; a part at a time, all of them are redrawn in `period` steps.

    What the bank holds is a function of (seed, step) alone, so a resumed run finds the bank of an uninterrupted one.
    Images that come more often get more translations, so that each translation is used about
    (rows of a step) * period / (images * versions) times, those of the smallest class as often as those of the largest.

    Args:
        nuisance: any.
        images: uint8 (N, C, H, W), the set.
        indices: int64 (M,), the images that may be asked for; None is all. Others raise `SettingsError`.
        versions: translations of an image on average; each has at least one.
        uses: (M,), how often each of `indices` is asked for, in any unit; None is alike.
        period: steps after which every translation has been replaced once.
        seed: of the draws.
        block: translations renewed together.

    Raises:
        SettingsError: `versions`, `period` or `block` below 1; more translations than the memory holds.
    """

    def __init__(
        self,
        nuisance: Nuisance,
        images: Tensor,
        *,
        indices: Tensor | None = None,
        versions: int = 4,
        uses: Tensor | None = None,
        period: int = 1000,
        seed: int = 0,
        block: int = 64,
    ) -> None:
        if min(versions, period, block) < 1:
            raise SettingsError(
                f"bank: versions, period and block must be at least 1, got {versions}, {period} and {block}"
            )
        self.nuisance, self.images, self.versions, self.period, self.seed = nuisance, images, versions, period, seed
        self.indices, self._slots = _indices_and_slots(images, indices)
        self.counts = _versions_by_image(versions, len(self.indices), uses)
        check_pixels_fit((int(self.counts.sum()), *images.shape[1:]), device=images.device)
        self._first = self.counts.cumsum(0) - self.counts
        self._owner = torch.repeat_interleave(torch.arange(len(self.counts), device="cpu"), self.counts)
        self._bank = images.new_empty((len(self._owner), *images.shape[1:]))
        self._blocks = [slice(start, start + block) for start in range(0, len(self._owner), block)]
        self._generations, self._is_full = [-1] * len(self._blocks), False
        self.drawn = 0

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`version`: float32 (B,) in [0, 1), which of an image's translations, as a share of them."""
        return {"version": torch.rand(shape[0], generator=generator)}

    @torch.inference_mode(False)
    def translate(self, indices: Tensor, draw: Draw) -> Tensor:
        """Those versions of those images, float32; a bank that was never refreshed is filled now.

        Of `indices` and a `draw` on the CPU without waiting for the device.
        """
        if self._generations and self._generations[0] < 0:
            self.refresh(0)
        slots = self._slots[indices.cpu()]
        if bool((slots < 0).any()):
            raise SettingsError("bank: asked for an image it does not hold; give the indices of the images it may need")
        count = self.counts[slots]
        version = (draw["version"].cpu() * count).long().minimum(count - 1)
        return to_float(self._bank[send(self._first[slots] + version, self._bank.device)])

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Redraw the blocks whose turn has come by `step`; the first call fills the bank."""
        for block, rows in enumerate(self._blocks):
            # Blocks take turns, so that each step renews about as many translations as the next.
            generation = (step + block * self.period // len(self._blocks)) // self.period
            if generation != self._generations[block]:
                self._generations[block] = generation
                self._redraw(rows, named_generator(self.seed, "bank", block, generation))
        self._is_full = True

    def _redraw(self, rows: slice, generator: torch.Generator) -> None:
        # Translations of an image lie side by side, so an image's codes are made once for its share of the block.
        owners, owner_of_row = self._owner[rows].unique_consecutive(return_inverse=True)
        images = to_float(self.images[send(self.indices[owners], self.images.device)])
        owner_of_row = send(owner_of_row, images.device)
        draw = self.nuisance.sample((len(owner_of_row), *images.shape[1:]), generator=generator)
        draw, coded = draw_to(draw, images), as_coded(self.nuisance)
        if coded is None:
            translated = self.nuisance.apply(images[owner_of_row], draw)
        else:
            translated = coded.render(coded.encode(images)[owner_of_row], draw, tuple(images.shape[-2:]))
        # Whether a translation is one is asked of a GPU while the bank is filled, and not at each renewal.
        asked = self.images.device.type == "cpu" or not self._is_full
        self._bank[rows] = to_uint8(translated) if asked else round_levels(translated)
        self.drawn += len(owner_of_row)


IndexedCache = CodeCache | TranslationBank
"""Stands in for a nuisance: `sample` draws, `translate` gives images by index, `refresh` follows the step."""


@dataclass(frozen=True)
class CachePlan:
    """What `enable_cache` was asked for. Copies of a stage share it, and it travels to other processes."""

    images: Tensor
    labels: Tensor
    versions: int
    uses: Tensor | None
    period: int
    seed: int
    max_bytes: int

    def __deepcopy__(self, memo: dict[int, Any]) -> CachePlan:
        return self

    def build(self, nuisance: Nuisance, probability: Tensor) -> IndexedCache | None:
        """The cache for a stage that gives `nuisance` with `probability`, float (K,); None where there are no codes."""
        frequency = probability[self.labels.cpu()] * (1 if self.uses is None else self.uses.cpu())
        indices = (frequency > 0).nonzero().squeeze(1)
        if self.versions:
            bank = {"versions": self.versions, "period": self.period, "seed": self.seed}
            return TranslationBank(nuisance, self.images, indices=indices, uses=frequency[indices], **bank)
        coded = as_coded(nuisance)
        return None if coded is None else CodeCache(coded, self.images, indices=indices, max_bytes=self.max_bytes)


def _versions_by_image(versions: int, images: int, uses: Tensor | None) -> Tensor:
    """`versions` for each of `images` on average, int64 (M,), in proportion to `uses`, at least one each."""
    if uses is None or not images:
        return torch.full((images,), versions)
    share = uses.detach().cpu().double()
    share = share / share.mean().clamp_min(1e-12)
    return (share * versions).round().long().clamp_min(1)


def _indices_and_slots(images: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """`indices`, and where in them each image is, int64 (N,), -1 for nowhere; on the CPU, where all is looked up."""
    indices = torch.arange(len(images), device="cpu") if indices is None else indices.cpu()
    slots = torch.full((len(images),), -1, device="cpu")
    slots[indices] = torch.arange(len(indices), device="cpu")
    return indices, slots
