"""The two studies of docs/subset_order.md: which class subsets of CIFAR-10, or of digits, generalise to which?

    python -m studies.order study=digits out=runs/order-digits
    python -m studies.order study=cifar10 data=cifar10.npz out=runs/order-cifar10

The .npz holds train_images, train_labels, test_images, test_labels and class_names of CIFAR-10; 500 training and
400 test images of each class are used. Stopped and started again, a study goes on with what is missing. The figures
are printed, and stand in OUT with the picture and the page.
"""

import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.program import read_settings
from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.data.readers.registry import load_source
from gen_invariance.errors import GenInvarianceError
from gen_invariance.experiment.order import run_order
from gen_invariance.experiment.settings import OrderRun
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.order.sets import random_subsets
from gen_invariance.order.settings import AnalysisSettings, OrderSettings, SourceSettings
from gen_invariance.report.order_page import findings
from gen_invariance.run import named_generator

PAPERS_BEST = ("bird", "cat", "deer", "dog", "horse", "ship")


def digits() -> tuple[ImageData, ImageData, OrderSettings]:
    """1,000 images for training and heads, 797 for testing; 15 random subsets and all ten classes; five seeds."""
    data = load_source("digits").train
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    settings = OrderSettings(
        choose="random",
        count=15,
        largest=7,
        subsets=(tuple(range(10)),),
        seeds=(0, 1, 2, 3, 4),
        curriculum=True,
    )
    return data.subset(order[:1000]), data.subset(order[1000:]), settings


def cifar10(path: Path, *, seeds: int) -> tuple[ImageData, ImageData, OrderSettings]:
    """CIFAR-10 at 16 pixels: all pairs, nine six-class subsets and all ten classes; the same steps for everyone."""
    source = load_source("npz", str(path))
    if source.test is None:
        raise SystemExit(f"{path} has no test images; give an .npz with test_images and test_labels")
    train, test = shrunk(source.train, 500), shrunk(source.test, 400)
    best = tuple(sorted(train.class_names.index(name) for name in PAPERS_BEST))
    six = random_subsets(10, 8, sizes=(6, 6), generator=named_generator(0, "six"))
    settings = OrderSettings(
        choose="pairs",
        subsets=(*(subset for subset in six if subset != best), best, tuple(range(10))),
        seeds=tuple(range(seeds)),
        pool=100,
        source=SourceSettings(budget="steps", steps=60, images_per_class=400, flip=True),
        analysis=AnalysisSettings(threshold=0.75),
        draws=3,
    )
    return train, test, settings


def shrunk(data: ImageData, count: int) -> ImageData:
    """The first `count` images of each class at half the size."""
    rows = torch.cat([(data.labels == label).nonzero().flatten()[:count] for label in range(data.num_classes)])
    part = data.subset(rows)
    small = to_uint8(F.avg_pool2d(part.float_images(), 2))
    return ImageData(small, part.labels, part.class_names, "CIFAR-10 at 16 pixels")


def main() -> None:
    given = read_settings(__doc__, study=str, data=Path(), out=Path, seeds=3)
    if given.study not in ("cifar10", "digits") or (given.study == "cifar10" and not given.data.is_file()):
        raise SystemExit("give study=digits, or study=cifar10 data=cifar10.npz")
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        train, test, settings = digits() if given.study == "digits" else cifar10(given.data, seeds=given.seeds)
        command = f"python -m studies.order {given.study}"
        run = OrderRun(order=settings, out=str(given.out), device="cpu", resume=True, progress=True)
        study = run_order(run, images=(train, test), nuisance=Rotation(30), command=command)
    except GenInvarianceError as error:
        raise SystemExit(f"studies.order: {error}") from error
    print("\n".join(findings(study)))
    print(study.table.to_string(), study.predictors.to_string(), sep="\n\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    spent = time.perf_counter() - began
    print(f"{spent:.0f} s on the clock, {time.process_time():.0f} s of processor, peak memory {peak:.2f} GB")
    print(f"page: {given.out / 'order.html'}")


if __name__ == "__main__":
    main()
