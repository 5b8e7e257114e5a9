"""Time and memory of the subset order at size: cached features in, relation and diagram out.

    python -m benchmarks.order [subsets=200] [classes=100] [seeds=5]

Aim: 200 subsets, 100 classes, 5 seeds in under 60 s and 4 GB on two cores. Making the random features is not
counted. Wall time, processor time (of all threads) and the peak memory of the process are printed; on a machine that
others use, only the last two say something.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.program import read_settings
from benchmarks.timing import Stopwatch, peak_memory
from gen_invariance.order.bootstrap import cell_bounds, crossed_bootstrap
from gen_invariance.order.relation import subset_order
from gen_invariance.order.separability import Features, pack_hits, pair_hits
from gen_invariance.order.sets import class_pairs, random_subsets
from gen_invariance.report.diagram import write_diagram


def make_features(subset: tuple[int, ...], seed: int, *, classes: int, width: int, per_class: int) -> Features:
    """Random features in which the subset's own classes, and some others by luck, lie further apart."""
    generator = torch.Generator().manual_seed(hash((subset, seed)) % 2**31)
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(1)) * 0.42
    means[list(subset)] *= 1.3
    labels = torch.arange(classes).repeat_interleave(per_class)
    train, test = (means[labels] + torch.randn(len(labels), width, generator=generator) for _ in range(2))
    return Features(train.half(), labels, test.half(), labels, num_classes=classes)


def main() -> None:
    options = read_settings(
        __doc__, subsets=200, classes=100, seeds=5, width=64, per_class=20, threads=2, resamples=2000
    )
    torch.set_num_threads(options.threads)
    subsets = random_subsets(
        options.classes, options.subsets, sizes=(2, options.classes), generator=torch.Generator().manual_seed(0)
    )
    watch = Stopwatch()
    packed, labels = [], torch.empty(0)
    for seed in range(options.seeds):
        for subset in subsets:
            shape = {"classes": options.classes, "width": options.width, "per_class": options.per_class}
            with watch.time("features"):
                features = make_features(subset, seed, **shape)
            with watch.time("hits"):
                packed.append(pack_hits(pair_hits(features)))
            labels = features.test_labels
    table = np.array(packed).reshape(options.seeds, len(subsets), *packed[0].shape)

    with watch.time("bootstrap"):
        drawn = crossed_bootstrap(
            table,
            labels.numpy(),
            num_classes=options.classes,
            resamples=options.resamples,
            edge_draws=50,
            generator=torch.Generator().manual_seed(0),
        )
    with watch.time("relation"):
        order = subset_order(
            cell_bounds(drawn, simultaneous="bootstrap"),
            subsets=subsets,
            pairs=class_pairs(options.classes),
            class_names=[str(c) for c in range(options.classes)],
            threshold=0.9,
        )
        counts, covers = order.counts(), len(order.covers(relation="estimated"))
    with watch.time("diagram"), tempfile.TemporaryDirectory() as folder:
        write_diagram(Path(folder), order)

    print(*watch.lines(without="features"), f"peak memory {peak_memory():.2f} GB", sep="\n")
    print(f"{len(order)} subsets, {len(order.pairs)} pairs, {options.seeds} seeds; {counts}; {covers} estimated covers")


if __name__ == "__main__":
    main()
