"""A data set whose images have each met the nuisance once, as the benchmarks of Zhou et al. (2022) are made."""

from __future__ import annotations

from dataclasses import replace

import torch

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.nuisance.protocol import Draw, Nuisance, select_rows


def transform_once(
    data: ImageData, nuisance: Nuisance, *, generator: torch.Generator, chunk: int = 4096
) -> tuple[ImageData, Draw]:
    """Each image of `data` under one draw of `nuisance`, and the draws; row i comes from row i.

    Args:
        data: any number of images, also none.
        nuisance: what acts on them.
        generator: CPU generator; one draw for the whole set, so `chunk` does not change the result.
        chunk: images at a time; bounds the memory for their float copies.
    """
    draw = nuisance.sample(data.images.shape, generator=generator)
    parts = [
        to_uint8(nuisance.apply(data.float_images(rows), select_rows(draw, rows)))
        for rows in torch.arange(len(data)).split(chunk)
    ]
    return (replace(data, images=torch.cat(parts)) if parts else data), draw
