"""Which images of each class a long tail keeps: by a rule of this package, or by one of the rules tables are made with.

Published long-tailed CIFAR figures come from two cuts: that of Cao et al., whose loader shuffles each class by NumPy's
legacy generator, and the first images of each class in the order of the files. Both depend on the class sizes alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gen_invariance.data.longtail import long_tailed_indices
from gen_invariance.errors import SettingsError
from gen_invariance.run import named_generator

CUTS = ("own", "cao", "first")


def cut_indices(labels: Tensor, counts: Tensor, *, cut: str = "own", seed: int, groups: Tensor | None = None) -> Tensor:
    """The images that a cut keeps, counts[c] of class c; int64 (sum of counts,), ascending.

    A smaller count picks a subset of what a larger one picks, under every rule.

    Args:
        labels: int64 (N,), in [0, K), in the order of the files.
        counts: int64 (K,), images wanted of each class.
        cut: "own" (drawn, in turn over groups), "cao" (each class in turn shuffled by
            `numpy.random.RandomState(seed)`; their tables are of seed 0), or "first" (the first images of each class,
            whatever the seed).
        seed: of "own" and "cao".
        groups: int64 (N,), see `longtail.long_tailed_indices`; only "own" looks at them.

    Raises:
        SettingsError: an unknown rule.
        DataError: a class has fewer images than asked for.

    Reference:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019: the data
        sets of their code.
    """
    if cut not in CUTS:
        raise SettingsError(f"data.cut must be one of {', '.join(CUTS)}, got {cut!r}")
    own = long_tailed_indices(labels, counts, generator=named_generator(seed, "longtail", "subset"), groups=groups)
    if cut == "own":
        return own  # the others pass its checks, too
    # The legacy generator, for its stream is what the published cut was drawn from.
    shuffling = np.random.RandomState(seed)
    kept = []
    for label, count in enumerate(counts.tolist()):
        rows = np.flatnonzero(labels.cpu().numpy() == label)
        if cut == "cao":
            shuffling.shuffle(rows)
        kept.append(rows[:count])
    return torch.from_numpy(np.sort(np.concatenate(kept)))
