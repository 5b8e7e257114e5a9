"""`TailAugment`, the class-aware stage: it gives the nuisance to the tail part of a batch.

augment = TailAugment(translator, probability)      # one probability for each class, see `policy`
images, labels = augment(images, labels)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gen_invariance.augment.cache import CODE_BYTES, CachePlan, IndexedCache
from gen_invariance.augment.inputs import LAYOUTS, as_images, as_labels, row_probability
from gen_invariance.augment.policy import auto
from gen_invariance.augment.reference import FrozenReference, Stream, describe_kind, refuse_scripting, refuse_vmap
from gen_invariance.data.images import to_float
from gen_invariance.devices import plain_defaults, send
from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.nuisance.protocol import Draw, Nuisance, select_rows
from gen_invariance.translator.quality.verdict import read_verdict


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
        index = torch.zeros(len(self.rows), dtype=torch.int64)
        index[self.rows] = torch.arange(int(self.rows.sum()))
        return Gate(self.rows[part], select_rows(self.draw, index[part][self.rows[part]]))


def replace_rows(images: Tensor, rows: Tensor, translate: Callable[[Tensor], Tensor]) -> Tensor:
    """`images` (B, C, H, W), or a copy in the same memory format whose rows bool (B,) are those of `translate`.

    Args:
        images: any floating-point dtype.
        rows: which ones.
        translate: int64 (M,), M > 0, to images (M, C, H, W), which are computed in the nuisance's own precision:
            autocast would round coordinates, and so move pixels.
    """
    if type(images) is not Tensor:  # subclasses that say what an image is would come back for some batches only
        images = images.as_subclass(Tensor)
    indices = rows.nonzero().squeeze(1).to(images.device)
    if not len(indices):
        return images
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        translated = translate(indices)
    return images.clone().index_copy_(0, indices, translated.to(images.dtype))


class TailAugment(nn.Module):
    """Class-aware stage: each row gets the nuisance with the probability of its class.

    The nuisance is held outside the module tree: it stays in eval mode, its weights take no gradient, and neither
    `parameters()` nor `state_dict()` of a model that contains the stage mentions it. It goes where the images are;
    `stage.to(torch.bfloat16)` makes its network compute in half precision (an autocast around the stage does not).
    `torch.compile` of a step that calls the stage breaks the graph around it. Under activation checkpointing a call
    that is computed again draws what it drew before.

    Args:
        nuisance: hand-written or learned; it is not changed, but it is set to eval mode and takes no gradient any more.
        probability: float (K,) in [0, 1], see `policy`.
        seed: of the stage's own generator, used where a call brings none; None draws from torch's global stream, as
            dropout does. Each rank and each worker of a `DataLoader` draws from its own stream.
        layout: "channels_first", or "channels_last" where batches arrive as (B, H, W, C); they leave channels first.

    Raises:
        RangeError: a probability outside [0, 1] or NaN.
        SettingsError: an unknown layout.

    >>> from gen_invariance import Rotation
    >>> augment = TailAugment(Rotation(90), torch.tensor([0.0, 1.0]))
    >>> images, labels = augment(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
    >>> images.shape
    torch.Size([4, 1, 8, 8])
    """

    def __init__(
        self, nuisance: Nuisance, probability: Tensor, *, seed: int | None = None, layout: str = "channels_first"
    ) -> None:
        super().__init__()
        if isinstance(probability, Tensor) and probability.is_meta:
            raise SettingsError('stage: probability has no values, make it outside of torch.device("meta")')
        probability = torch.as_tensor(probability, dtype=torch.float32, device="cpu")
        if probability.ndim != 1 or not bool(((probability >= 0) & (probability <= 1)).all()):
            raise RangeError("stage: probability must hold one number in [0, 1] for each class; a policy makes it")
        if layout not in LAYOUTS:
            raise SettingsError(f"stage: layout must be {' or '.join(LAYOUTS)}, got {layout!r}")
        # Plain attributes: half precision would round the probabilities, and rows are chosen on the CPU.
        self.probability, self.layout = probability, layout
        self._reference = FrozenReference(nuisance)
        self._stream = Stream(seed, type(self).__name__, describe_kind(nuisance))
        self._plan: CachePlan | None = None
        self._cache: IndexedCache | None = None
        self._is_built = False  # the cache of the plan; there is none where the nuisance has no codes
        self._step = 0  # that the cache was last refreshed for

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_is_built": False}  # built anew from the plan

    @classmethod
    @plain_defaults()
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        class_counts: Tensor | Sequence[int],
        probability: Tensor | None = None,
        seed: int | None = None,
        layout: str = "channels_first",
    ) -> TailAugment:
        """The stage over the translator saved in `path`, by default with `policy.auto` of the class counts (K,).

        The default obeys the verdict on the translator, see `translator.quality.verdict.read_verdict`: it halves the
        probabilities of one that is to be used with lower strength, and translates nothing with one that is not to be
        used, which it says in a warning. A `probability` that is given is kept, with the same warning.

        Raises:
            CheckpointError: no intact translator in `path`, or a damaged verdict on it.
            ShapeError: `probability` and `class_counts` are of different lengths.
        """
        from gen_invariance.translator.io import load_translator  # diffusers is slow to import

        counts, translator = torch.as_tensor(class_counts), load_translator(path)
        verdict = read_verdict(path)
        if verdict is not None and verdict.strength == 0:
            advice = "it is used as you ask with probability=..."
            if probability is None:
                advice = "nothing is translated; give probability=... to use it all the same, or fit another one"
            warnings.warn(
                f"the verdict on the translator in {path} is '{verdict.word}': {verdict.first_reason}; {advice}",
                stacklevel=3,  # past the decorator
            )
        if probability is None:
            probability = auto(counts) * (1.0 if verdict is None else verdict.strength)
        elif len(probability) != len(counts):
            raise ShapeError(f"stage: {len(probability)} probabilities for {len(counts)} classes; give one for each")
        return cls(translator, probability, seed=seed, layout=layout)

    @property
    def nuisance(self) -> Nuisance:
        """The nuisance that is given to the gated rows."""
        return self._reference.nuisance

    @property
    def generator(self) -> torch.Generator:
        """Where draws come from; save and restore its state to resume a loop exactly. Torch's own without a seed."""
        if self._stream.seed is None:
            return torch.default_generator
        return self._stream.generator()

    def _apply(self, fn: Any, recurse: bool = True) -> TailAugment:
        self._reference.change(fn)
        self._cache, self._is_built = None, False  # codes are of the network as it was
        return super()._apply(fn, recurse)

    # ---- cache of a fixed set

    def enable_cache(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        versions: int = 0,
        uses: Tensor | None = None,
        period: int = 1000,
        seed: int | None = None,
        max_bytes: int = CODE_BYTES,
    ) -> None:
        """Cache a fixed set by index: calls that give `indices` need less of the nuisance's network from now on.

        Without `versions` codes of images are kept, which is exact, where the nuisance has codes (MUNIT's content);
        other nuisances work as before. With `versions` all translations come from a `TranslationBank`.

        Args:
            images: uint8 (N, C, H, W), the set, on the device that trains.
            labels: int64 (N,).
            versions: translations of an image in a bank, on average; 0 for no bank.
            uses: (N,), how often each image comes, in any unit, so that all translations of a bank are used alike;
                None is alike.
            period: steps after which each translation of the bank has been replaced.
            seed: of the bank's draws; None draws one.
            max_bytes: most that kept codes may take.
        """
        if seed is None:
            seed = int(torch.randint(2**62, (), generator=self._stream.generator(), device="cpu"))
        self._plan = CachePlan(images, labels, versions, uses, period, seed, max_bytes)
        self._cache, self._is_built = None, False

    def disable_cache(self) -> None:
        """Drop the cache; calls work as if `enable_cache` had never been called."""
        self._plan = self._cache = None
        self._is_built = False

    def refresh_cache(self, step: int) -> None:
        """Bring the cache to the state that `step` of a training needs: a bank redraws its share."""
        self._step = step
        if self.cache is not None:
            self.cache.refresh(step)

    @property
    def cache(self) -> IndexedCache | None:
        """The cache that `enable_cache` asked for, built at its first use; None where there is none."""
        if not self._is_built and self._plan is not None:
            with plain_defaults(), torch.inference_mode(False):  # it may serve a training later
                self._cache = self._plan.build(self._reference.on(self._plan.images.device), self.probability)
                if self._cache is not None and self._step:
                    self._cache.refresh(self._step)
            self._is_built = True
        return self._cache

    # ---- batches

    @plain_defaults()
    def sample(
        self,
        shape: torch.Size | tuple[int, ...],
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        indexed: bool = False,
    ) -> Gate:
        """Decide which rows of a batch get the nuisance, and draw it for them.

        Args:
            shape: (B, C, H, W) of the images.
            labels: whole numbers (B,), or soft labels (B, K), see `forward`.
            generator: CPU generator; None uses the stage's own.
            indexed: whether `apply_gate` will be given `indices`.
        """
        generator = generator if generator is not None else self._stream.generator()
        rows = torch.rand(shape[0], generator=generator) < row_probability(labels, self.probability, count=shape[0])
        nuisance = (self.cache if indexed else None) or self.nuisance
        return Gate(rows, nuisance.sample((int(rows.sum()), *shape[1:]), generator=generator))

    @plain_defaults()
    def apply_gate(
        self,
        images: Tensor,
        labels: Tensor,
        gate: Gate,
        *,
        source: tuple[Tensor, Tensor] | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Carry out a gate: `forward` without its randomness and its checks; takes and returns the same tensors."""
        cache = None if indices is None else self.cache
        given = images if source is None else source[0]

        def translate(rows: Tensor) -> Tensor:
            if cache is not None:
                return cache.translate(indices.to(rows.device)[rows], gate.draw)
            return self._reference.on(images.device).apply(given.index_select(0, rows), gate.draw)

        if source is not None:
            rows = gate.rows.nonzero().squeeze(1).to(labels.device)
            labels = labels.index_copy(0, rows, source[1].index_select(0, rows))
        return replace_rows(images, gate.rows, translate), labels

    @plain_defaults()
    @torch.no_grad()
    def translate(self, images: Tensor, indices: Tensor, draw: Draw) -> Tensor:
        """What `apply_gate` puts into rows, for many of them at once: the translations of images of the cached set.

        Args:
            images: uint8 (N, C, H, W), the set that `enable_cache` was given.
            indices: int64 (M,), M > 0, on the CPU.
            draw: of the cache where there is one, else of the nuisance; leading M, on the CPU.
        """
        with torch.autocast(images.device.type, enabled=False):
            if self.cache is not None:
                return self.cache.translate(indices, draw)
            chosen = to_float(images.index_select(0, send(indices, images.device)))
            return self._reference.on(images.device).apply(chosen, draw)

    @torch.compiler.disable
    @plain_defaults()
    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        source: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Augment one batch.

        Args:
            images: floating point (B, C, H, W) in [0, 1], or uint8 (divided by 255); any device, also no rows at all.
                Not changed. (B, H, W, C) where the stage was built with layout="channels_last".
            labels: whole numbers (B,), also as a list or an array, or soft labels (B, K) after mixup or label
                smoothing: the probability of such a row is that of its classes, weighted by the label.
            source: images and labels of a second, usually class-balanced, stream of the same shapes. Where given, a
                gated row is replaced by the translated row of the source *and its label*, and the gate looks at the
                source's labels (Zhou et al. 2022). Rows that are not gated stay as they are.
            generator: CPU generator of this call's randomness; None uses the stage's own.
            indices: int64 (B,), which rows of the set given to `enable_cache` the images (those of the source, where
                given) are, unchanged; None where they are not of that set or were augmented first.

        Returns:
            images (B, C, H, W) in [0, 1], in the floating-point dtype and memory format they came in (float32 for
            uint8), and labels of the shape and dtype they came in.

        Raises:
            ShapeError: dtype, axes, labels or source do not fit.
            RangeError: a label that is no class, or pixels that were normalised or are 8-bit.
        """
        if torch.compiler.is_exporting():
            raise SettingsError("stage: it draws at random and cannot be exported; export the model without it")
        refuse_vmap(images, labels, where="stage")
        images, labels = as_images(images, layout=self.layout), as_labels(labels)
        if source is not None:
            source = (as_images(source[0], layout=self.layout).to(images.dtype), as_labels(source[1]))
            if source[0].shape != images.shape or (source[1].shape, source[1].dtype) != (labels.shape, labels.dtype):
                raise ShapeError(
                    f"stage: source images {tuple(source[0].shape)} with {source[1].dtype} labels "
                    f"{tuple(source[1].shape)} must be like the batch's {tuple(images.shape)} with {labels.dtype} "
                    f"{tuple(labels.shape)}"
                )
        gate_labels = labels if source is None else source[1]
        generator = self._stream.of_call(generator, images, gate_labels)
        gate = self.sample(images.shape, gate_labels, generator=generator, indexed=indices is not None)
        return self.apply_gate(images, labels, gate, source=source, indices=indices)

    def __prepare_scriptable__(self) -> NoReturn:
        """What `torch.jit.script` asks for first."""
        refuse_scripting("stage")

    def extra_repr(self) -> str:
        """Nuisance and the classes it is given to."""
        given = int((self.probability > 0).sum())
        return f"{type(self.nuisance).__name__}, {given} of {len(self.probability)} classes"
