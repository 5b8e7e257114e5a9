"""Check the subset order where the truth is known: wrong certain edges, and how much is decided, by seeds.

    python -m studies.simulate_order [runs=1000] [hits=20]

Part 1: 12 subsets, 20 pairs, true separability within 0.1 of the threshold, seed deviation 0.02, 95 % level.
Part 2: the whole way from single answers of a shared test set (7 classes, 21 pairs, 400 test samples a class), with
the crossed bootstrap. A run is wrong when any certain edge is false or any refuted edge is true. The reference
figures are for a table that was drawn in another, unpublished way.
"""

import numpy as np
import torch

from benchmarks.program import read_settings
from gen_invariance.order.bootstrap import CellBounds, Resamples, cell_bounds, crossed_bootstrap
from gen_invariance.order.relation import inclusion, subset_order

REFERENCE = {3: 35, 5: 47, 10: 62, 20: 71}
THRESHOLD, DEVIATION, SUBSETS = 0.9, 0.02, 12


def judge(bounds: CellBounds, truth: np.ndarray) -> tuple[bool, float]:
    """Whether anything said with certainty is false, and the share of ordered pairs decided."""
    count, pairs = truth.shape
    order = subset_order(
        bounds,
        subsets=[(a,) for a in range(count)],
        pairs=np.stack([np.arange(pairs), np.arange(pairs) + 1], axis=1),
        threshold=THRESHOLD,
        class_names=[str(c) for c in range(pairs + 1)],
    )
    real = inclusion(truth >= THRESHOLD, truth >= THRESHOLD)
    wrong = (order.certain.leq & ~real).any() or (order.refuted & real).any()
    counts = order.counts()
    return bool(wrong), (counts["certain"] + counts["refuted"]) / (count * (count - 1))


def draw_truth(pairs: int, rng: np.random.Generator) -> np.ndarray:
    """True separability with a real order in it: a subset separates the pairs whose skill, of five, it has."""
    skills = rng.random((SUBSETS, 5)) < 0.5
    separated = skills[:, rng.integers(0, 5, pairs)]
    return THRESHOLD + np.where(separated, 1, -1) * rng.uniform(0.0, 0.1, (SUBSETS, pairs))


def from_scores(seeds: int, simultaneous: str, rng: np.random.Generator) -> tuple[bool, float]:
    truth = draw_truth(20, rng)
    scores = truth + rng.normal(0, DEVIATION, (seeds, *truth.shape))
    return judge(cell_bounds(Resamples(scores), simultaneous=simultaneous), truth)


def from_hits(seeds: int, simultaneous: str, rng: np.random.Generator) -> tuple[bool, float]:
    classes, samples = 7, 400
    first, second = np.triu_indices(classes, 1)
    truth = draw_truth(len(first), rng)
    right = np.zeros((SUBSETS, classes, classes))
    right[:, first, second] = right[:, second, first] = truth
    labels = np.arange(classes).repeat(samples)
    # Each sample's difficulty is one number for all seeds and subsets, so the test set is shared in earnest.
    difficulty = rng.random((len(labels), classes))
    chance = right[None][:, :, labels] + rng.normal(0, DEVIATION, (seeds, SUBSETS, 1, 1))
    packed = np.packbits(difficulty < chance, axis=-1)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    drawn = crossed_bootstrap(packed, labels, num_classes=classes, resamples=300, generator=generator)
    bounds = cell_bounds(drawn, simultaneous=simultaneous)
    return judge(bounds, truth)


def main() -> None:
    options = read_settings(__doc__, runs=1000, hits=20, seed=0)
    print("part   seeds  adjustment  runs  wrong at all  decided  (reference, Bonferroni)")
    for name, simulate, runs, kinds in (
        ("scores", from_scores, options.runs, ("none", "bonferroni")),
        ("hits", from_hits, options.hits, ("bootstrap",)),
    ):
        for seeds, reference in REFERENCE.items():
            for kind in kinds:
                rng = np.random.default_rng(options.seed)
                found = [simulate(seeds, kind, rng) for _ in range(runs)]
                wrong, decided = np.mean(found, axis=0) if found else (np.nan, np.nan)
                print(
                    f"{name:6} {seeds:5}  {kind:10} {runs:5} {wrong:12.1%} {decided:8.0%}   {reference} %", flush=True
                )


if __name__ == "__main__":
    main()
