"""Draws dealt to images so that each image's own draws spread over the nuisance's range.

With independent draws an image may meet three small angles and no large one. Here a round's draws, which are as
independent as ever, are put in order and dealt out: image i of N gets the one at place N * frac(u_i + k g), k being the
round, g the golden ratio and u_i its own uniform start. For any number of rounds an image's places are then evenly
spread (a Kronecker sequence with a random shift; Cranley and Patterson 1976), while each single draw is still a draw of
the nuisance, whatever that is: so means stay unbiased and vary less. Only the order by a draw's first number is used;
where a nuisance draws several numbers, the others are as independent as before.
"""

from __future__ import annotations

import torch

from gen_invariance.nuisance.protocol import Draw, select_rows

_GOLDEN = 0.6180339887498949


class Dealer:
    """Deals the rounds of one measurement.

    Args:
        count: images.
        generator: CPU generator of the starts.
    """

    def __init__(self, count: int, *, generator: torch.Generator) -> None:
        self._start = torch.rand(count, dtype=torch.float64, generator=generator)
        self._round = 0

    def deal(self, draw: Draw) -> Draw:
        """The round's draws, leading (N,), each given to an image; a permutation of `draw`."""
        place = (self._start + self._round * _GOLDEN) % 1
        self._round += 1
        if not draw:
            return draw
        first = next(iter(draw.values())).detach().cpu().reshape(len(place), -1)
        if not first.shape[1]:
            return draw
        rows = torch.empty(len(place), dtype=torch.int64)
        rows[place.argsort()] = first[:, 0].argsort(stable=True)
        return select_rows(draw, rows)
