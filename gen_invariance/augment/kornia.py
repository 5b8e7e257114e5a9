"""`KorniaNuisance`, any nuisance as a kornia augmentation: class-blind, and replayable.

pipeline = kornia.augmentation.AugmentationSequential(
    kornia.augmentation.RandomHorizontalFlip(), KorniaNuisance(translator, p=0.5)
)
pipeline(images, params=pipeline._params)  # the same once more
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from gen_invariance.augment.reference import FrozenReference, Stream, describe_kind, refuse_scripting, refuse_vmap
from gen_invariance.augment.stage import replace_rows
from gen_invariance.data.images import check_axes, check_pixels
from gen_invariance.devices import plain_defaults
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Nuisance, select_rows

_KORNIA_PARAMS = ("batch_prob", "forward_input_shape", "data_keys")
"""What is no draw of the nuisance; containers add more, none of which has a row for each image."""


class KorniaNuisance(IntensityAugmentationBase2D):
    """Any nuisance as a kornia augmentation: class-blind, replayable, and cheap at small `p`.

    kornia hands `apply_transform` the whole batch and blends afterwards; here the network runs on the gated rows
    only. Geometric nuisances move pixels but not boxes, masks or keypoints: use them for classification.

    Args:
        nuisance: hand-written or learned; kept out of `parameters()` and `state_dict()`.
        p: probability of each row.
        p_batch, same_on_batch, keepdim: as everywhere in kornia.
        seed: of a generator of its own for draws and gates; None draws from torch's global stream, as kornia does. See
            `TailAugment`.

    Raises:
        SettingsError: `p` or `p_batch` outside [0, 1].

    >>> from gen_invariance import Rotation
    >>> KorniaNuisance(Rotation(90), p=1.0)(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        nuisance: Nuisance,
        *,
        p: float = 0.5,
        p_batch: float = 1.0,
        same_on_batch: bool = False,
        keepdim: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(p=p, p_batch=p_batch, same_on_batch=same_on_batch, keepdim=keepdim)
        if not (0 <= p <= 1 and 0 <= p_batch <= 1):
            raise SettingsError(f"KorniaNuisance: p and p_batch must lie in [0, 1], got {p} and {p_batch}")
        self._reference = FrozenReference(nuisance)
        self._stream = Stream(seed, type(self).__name__, describe_kind(nuisance))

    @property
    def nuisance(self) -> Nuisance:
        """The nuisance that is given to the gated rows."""
        return self._reference.nuisance

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> KorniaNuisance:
        self._reference.change(fn)
        return super()._apply(fn, *args, **kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """What `torch.jit.script` asks for first."""
        refuse_scripting("KorniaNuisance")

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002  (kornia's name)
        """As in every kornia augmentation."""
        refuse_vmap(input, where="KorniaNuisance")
        return super().forward(input, *args, **kwargs)

    @torch.compiler.disable
    @plain_defaults()
    def forward_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Gate and draw on the CPU; always the same count of numbers, whatever `p` is."""
        generator, count = self._stream.of_call(None, tuple(batch_shape)), batch_shape[0]
        call = torch.rand(1, generator=generator) < self.p_batch
        rows = torch.rand(1 if self.same_on_batch else count, generator=generator) < self.p
        drawn = 1 if self.same_on_batch and count else count
        draw = self.nuisance.sample((drawn, *batch_shape[1:]), generator=generator)
        if drawn < count:
            draw = select_rows(draw, torch.zeros(count, dtype=torch.int64))
        return {
            **draw,
            "batch_prob": (call & rows).expand(count).float(),
            "forward_input_shape": torch.tensor(batch_shape),
        }

    @torch.compiler.disable
    @plain_defaults()
    def apply_transform(
        self,
        input: Tensor,  # noqa: A002  (kornia's name)
        params: dict[str, Tensor],
        flags: dict[str, Any],
        transform: Tensor | None = None,
    ) -> Tensor:
        """The batch with its gated rows transformed.

        Raises:
            ShapeError: (B, H, W, C).
            RangeError: pixels that were normalised or are 0..255.
        """
        check_axes(input, where="KorniaNuisance")
        check_pixels(input, where="KorniaNuisance")
        gate = params["batch_prob"].to("cpu") > 0.5
        drawn = {
            name: value
            for name, value in params.items()
            if name not in _KORNIA_PARAMS and isinstance(value, Tensor) and value.shape[:1] == gate.shape
        }
        draw = select_rows(drawn, gate)

        def translate(rows: Tensor) -> Tensor:
            return self._reference.on(input.device).apply(input.index_select(0, rows), draw)

        return replace_rows(input, gate, translate)
