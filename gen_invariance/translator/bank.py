"""Banks of style codes: what translators draw from that keep the styles of real images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gen_invariance.data.images import ImageData
from gen_invariance.run import Run


@torch.no_grad()
def fill_bank(translator: nn.Module, data: ImageData, members: list[Tensor], run: Run) -> None:
    """Put styles of images of the chosen classes in the bank, every class with the same weight.

    Args:
        translator: has `config.bank_size`, `style(images)` and a buffer `bank` (bank_size, S); one without a bank, or
            with an empty one, is left as it is.
        data: on the device of the translator.
        members: rows of each chosen class.
        run: for its generator; the same at every call.
    """
    size = getattr(getattr(translator, "config", None), "bank_size", 0)
    if not size:
        return
    generator = run.generator("bank")
    sizes = torch.tensor([len(rows) for rows in members])
    classes = torch.randint(len(members), (size,), generator=generator)
    within = (torch.rand(size, generator=generator) * sizes[classes]).long()
    rows = torch.cat(members)[(sizes.cumsum(0) - sizes)[classes] + within]
    parts = [translator.style(data.float_images(part)) for part in rows.split(256)]
    translator.bank.copy_(torch.cat(parts))
