"""Stratified draws (randomised quasi-Monte Carlo): each image's own draws spread over the nuisance's range.

With independent draws an image may meet three small angles and no large one. Here each round draws once for every
image, as always; the draws are then sorted, and image i of N gets the one of rank N * frac(u_i + k g), where k is the
round, g the golden ratio and u_i the image's own uniform start. For any number of rounds the ranks of an image are
evenly spread (a Kronecker sequence with a random shift; Cranley and Patterson 1976), while each single draw is still
a draw of the nuisance: means stay unbiased and vary less. Draws are sorted by their first number only; where a nuisance
draws several numbers, the others are independent.
"""

from __future__ import annotations

import torch

from gen_invariance.nuisance.protocol import Draw, select_rows

_GOLDEN = 0.6180339887498949


class StratifiedDraws:
    """Assigns the draws of each round to images.

    Args:
        count: images.
        generator: CPU generator of the starts.
    """

    def __init__(self, count: int, *, generator: torch.Generator) -> None:
        self._start = torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)
        self._round = 0

    def assign(self, draw: Draw) -> Draw:
        """The round's draws, leading (N,), one for each image; a permutation of `draw`."""
        position = (self._start + self._round * _GOLDEN) % 1
        self._round += 1
        if not draw:
            return draw
        first = next(iter(draw.values())).detach().cpu().reshape(len(position), -1)
        if not first.shape[1]:
            return draw
        rows = torch.empty(len(position), dtype=torch.int64, device="cpu")
        rows[position.argsort()] = first[:, 0].argsort(stable=True)
        return select_rows(draw, rows)
