"""Negative transfer: did a source help, harm, or is it undecided? Paired over seeds, for totals or by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gen_invariance.errors import SettingsError
from gen_invariance.stats import PairedDifference, holm_adjusted, paired_difference

HELPS, HARMS, UNDECIDED = "helps", "harms", "undecided"


@dataclass(frozen=True)
class TransferEffect:
    """What transfer changed.

    Attributes:
        difference: transferred minus baseline, mean over seeds with its interval, (...).
        state: "helps", "harms" or "undecided" of each figure, object (...).
    """

    difference: PairedDifference
    state: NDArray[np.object_]

    def share(self, state: str) -> float:
        """Share of the figures with a known difference that are in `state`; NaN without any."""
        known = np.isfinite(np.asarray(self.difference.mean))
        return float(np.mean(self.state[known] == state)) if known.any() else float("nan")


def transfer_effect(
    transferred: ArrayLike, baseline: ArrayLike, *, level: float = 0.95, holm: bool = False
) -> TransferEffect:
    """The effect of transfer on scores where larger is better, three-valued.

    A figure is decided when the interval of its paired difference leaves zero out, which is a two-sided t-test at
    1 - `level`. One seed decides nothing.

    Args:
        transferred: scores after transfer, (..., R) over seeds; NaN pairs are left out.
        baseline: scores without it on the same seeds, same shape.
        level: confidence, in (0, 1).
        holm: correct for the number of figures (Holm 1979), as many sources or classes ask for.

    Raises:
        ShapeError: shapes differ.
        SettingsError: `level` outside (0, 1).

    Example:
        >>> transfer_effect([[0.8, 0.9, 0.85], [0.2, 0.3, 0.4]], [[0.5, 0.6, 0.54], [0.3, 0.2, 0.4]]).state.tolist()
        ['helps', 'undecided']
    """
    difference = paired_difference(transferred, baseline, level)
    chance = np.atleast_1d(np.asarray(difference.t_p_value, dtype=np.float64))
    chance = holm_adjusted(chance) if holm else chance
    mean = np.atleast_1d(np.asarray(difference.mean))
    decided = (chance < 1 - level) & np.isfinite(mean)
    state = np.where(decided & (mean > 0), HELPS, np.where(decided & (mean < 0), HARMS, UNDECIDED)).astype(object)
    return TransferEffect(difference, state.reshape(np.shape(difference.mean)))


def best_baseline(baselines: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
    """Scores (..., R) of the baseline with the highest mean over seeds, chosen for each figure on its own.

    Transfer harms only what was within reach without it: training from scratch, or the start left as it is.

    Raises:
        SettingsError: no baseline, or baselines of different shapes.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in baselines.values()]
    if not arrays or len({array.shape for array in arrays}) != 1:
        raise SettingsError(f"need baselines of one shape, got {[array.shape for array in arrays]}; align them by seed")
    stacked = np.stack(arrays)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0).sum(axis=-1)
    means = np.divide(total, known.sum(axis=-1), out=np.full(total.shape, -np.inf), where=known.any(axis=-1))
    best = means.argmax(axis=0)
    return np.take_along_axis(stacked, best[None, ..., None], axis=0)[0]
