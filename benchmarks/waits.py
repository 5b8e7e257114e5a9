"""What each path asks of a GPU, counted where there is none: operations launched, and places where the program waits.

    python -m benchmarks.waits                       # a table of all paths, minutes
    python -m benchmarks.waits paths=step,redraw out=FILE.json

A device is pretended (`tests/devices/pretended.py`): operations run on the CPU and are counted. Counts are of one
training step, of one batch of a measure, or of one image of an export; they depend on the code, not on the machine. No
time is measured. A path that names a nuisance is what the stage adds to the step "bare" with that nuisance, and
"growth" is how much more there is a step where the set has twice the images.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.program import markdown, read_settings
from gen_invariance.augment.stage import TailAugment
from gen_invariance.classifier import train
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.batches import Batches
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.data.images import ImageData
from gen_invariance.export.encoding import Encoding
from gen_invariance.export.formats.base import Entry
from gen_invariance.export.settings import ExportSettings
from gen_invariance.export.units import Job, Unit
from gen_invariance.measure.invariance import measure_invariance
from gen_invariance.nuisance.generic import RandAugment
from gen_invariance.nuisance.geometry import CropFlip, Rotation
from gen_invariance.nuisance.thickness import Thickness
from gen_invariance.run import Run, named_generator
from gen_invariance.translator import fit
from gen_invariance.translator.flow.model import FlowTranslator
from gen_invariance.translator.munit.model import MunitTranslator
from gen_invariance.translator.quality.assess import Memory, assess
from gen_invariance.translator.redraw.model import RedrawTranslator
from gen_invariance.translator.redraw.pose import PoseTranslator
from gen_invariance.translator.settings import FitSettings
from gen_invariance.translator.spatial import SpatialTranslator
from tests.devices.pretended import Count, PretendedDevice, register

CLASSES, BATCH, STEPS = 4, 8, 64


def stored(count: int, channels: int = 3, side: int = 32) -> ImageData:
    """`count` images of noise on the pretended device."""
    pixels = torch.randint(256, (count, channels, side, side), generator=named_generator(0, "waits"))
    names = tuple(map(str, range(CLASSES)))
    return ImageData(pixels.to(torch.uint8), torch.arange(count) % CLASSES, names).to(register())


def munit(**options: object) -> MunitTranslator:
    return MunitTranslator(3, width=4, residual_blocks=2, mlp_width=8, **options)


def strokes() -> RedrawTranslator:
    translator = RedrawTranslator(3)
    translator.log_width.copy_(torch.linspace(0, math.log(4), len(translator.log_width)))
    return translator


NUISANCES = {
    "rotation": lambda: Rotation(),
    "spatial": lambda: SpatialTranslator(3, start=0.3),
    "pose": lambda: PoseTranslator(3),
    "redraw": lambda: RedrawTranslator(3, ("tone", "colour", "sharpness"), "photo"),
    "redraw of figures": strokes,
    "munit with codes kept": munit,
    "munit with styles of its bank": lambda: munit(styles="bank", bank_size=32),
    "flow": lambda: FlowTranslator(3, width=8),
    "thickness": lambda: Thickness(),
    "randaugment": lambda: RandAugment(),
}
"""What the stage gives; "redraw" is the default translator on photographs, with the parts that CIFAR-10 shows."""


def counted_training(**settings: object) -> tuple[Count, int]:
    """Whole steps of a ResNet-32, after the first one of an epoch, before its end."""
    marks: list[tuple[int, int]] = []
    data, original = stored(BATCH * 4), train._State.set_rates
    with Count() as count:

        def set_rates(self: object, factor: float) -> None:
            marks.append((count.operations, count.waits))
            if len(marks) == 2:
                count.places.clear()
            original(self, factor)

        train._State.set_rates = set_rates
        try:
            model = build_classifier("resnet32", num_classes=CLASSES, channels=3)
            how = TrainSettings(epochs=1, batch_size=BATCH, warmup=0, milestones=(1, 2), **settings)
            train.fit_classifier(model, data, how, progress=False)
        finally:
            train._State.set_rates = original
    steps = len(marks) - 2
    found = Count()
    found.operations, found.waits = marks[-1][0] - marks[1][0], marks[-1][1] - marks[1][1]
    return found, steps


def counted_stage(nuisance: object | None, *, images: int = BATCH * STEPS, **settings: object) -> tuple[Count, int]:
    """The batches of an epoch alone, without a model: what a stage adds is counted, and nothing else."""
    augmentation = settings.pop("augmentation", None)
    stage = None if nuisance is None else TailAugment(nuisance, torch.full((CLASSES,), 0.25))
    how = TrainSettings(epochs=2, batch_size=BATCH, warmup=0, milestones=(1, 2), stage_source="batch", **settings)
    run = Run(None, kind="train")
    batches = Batches(stored(images), how, run, stage=stage, augmentation=augmentation)
    with torch.no_grad():
        batches.at(0)  # banks and caches are filled, and that is no part of a step
        if settings.get("stage_bank") is None and nuisance is not None:
            for step in range(batches.per_epoch):
                batches.at(step)
        with Count() as count:
            for step in range(batches.per_epoch, 2 * batches.per_epoch):
                batches.at(step)
    return count, batches.per_epoch


def counted_fit(name: str, **network: object) -> tuple[Count, int]:
    """Steps of a fit, before anything is logged."""
    marks: list[tuple[int, int, Counter]] = []
    original = fit.draw_images
    settings = FitSettings(steps=4, batch_size=4, log_every=100, sample_every=100, checkpoint_every=100, head_from=1)
    with Count() as count:

        def draw_images(*given: object) -> torch.Tensor:
            marks.append((count.operations, count.waits, Counter(count.places)))
            return original(*given)

        fit.draw_images = draw_images
        try:
            fit.fit_translator(name, stored(40), settings, network=network, progress=False)
        finally:
            fit.draw_images = original
    found = Count()
    found.operations, found.waits = marks[3][0] - marks[1][0], marks[3][1] - marks[1][1]
    found.places = marks[3][2] - marks[1][2]
    return found, 2


def counted_pose_fit() -> tuple[Count, int]:
    """A step of the pose estimator's training, as the difference of a longer and a shorter one."""
    counts = []
    for steps in (2, 6):
        settings = FitSettings(steps=steps, batch_size=4, head_from=1)
        with Count() as count:
            fit.fit_translator("pose", stored(40), settings, objective={"images_per_class": 2}, progress=False)
        counts.append(count)
    return _difference(counts), 4


def counted_measure(nuisance: object, *, images: int = 32) -> tuple[Count, int]:
    """Batches of an eKLD, as the difference of a longer and a shorter one."""
    data, counts = stored(images), []
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES)).to(register())
    if isinstance(nuisance, nn.Module):
        nuisance.to(register())
    for draws in (2, 4):
        with Count() as count:
            measure_invariance(model, data.images, data.labels, nuisance, draws=draws, batch_size=8)
        counts.append(count)
    return _difference(counts), 2 * images // 8


class _Looks(nn.Module):
    """A judge of images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 8))
        self.head = nn.Linear(8, CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def counted_assessment(images: int) -> tuple[Count, int]:
    """All that `inspect` asks when it assesses a translator on so many images."""
    judge, nuisance = _Looks().to(register()), SpatialTranslator(3, start=0.3).to(register())
    data, memory, generator = stored(images), Memory(stored(40).float_images()), named_generator(1)
    with Count() as count:
        assess(nuisance, data, judge=judge, memory=memory, generator=generator)
    return count, 1


def counted_export(images: int) -> tuple[Count, int]:
    """A batch of so many images as `augment` translates it; styles come from MUNIT's bank."""
    data = SimpleNamespace(class_names=tuple(map(str, range(CLASSES))), keeps_size=True)
    translator = munit(styles="bank", bank_size=32).eval()
    job = Job(data, None, ExportSettings(), translator, "", device=str(register())).on_device()
    job._translated_and_judged(*_batch(2))  # the bank has been fetched then
    with Count() as count:
        job._translated_and_judged(*_batch(images))
    return count, 1


def _batch(number: int) -> tuple[Unit, list[SimpleNamespace]]:
    pixels = stored(number).images.cpu().numpy()
    items = tuple((Entry(str(place), place % CLASSES, ()), 0) for place in range(number))
    decoded = [SimpleNamespace(picture=SimpleNamespace(pixels=each), encoding=Encoding()) for each in pixels]
    return Unit("counted", "generated", items), decoded


def _difference(counts: list[Count]) -> Count:
    """What the second counted beyond the first."""
    found = Count()
    found.operations, found.waits = (getattr(counts[1], n) - getattr(counts[0], n) for n in ("operations", "waits"))
    found.places = counts[1].places - counts[0].places
    return found


PATHS: dict[str, Callable[[], tuple[Count, int]]] = {
    "bare": counted_training,
    "bare with average_decay": lambda: counted_training(average_decay=0.99),
    "no stage": lambda: counted_stage(None),
    "crop_flip": lambda: counted_stage(None, augmentation=CropFlip()),
    **{name: (lambda make=make: counted_stage(make())) for name, make in NUISANCES.items()},
    "bank of spatial": lambda: counted_stage(SpatialTranslator(3, start=0.3), stage_bank=2),
    "fit spatial": lambda: counted_fit("spatial"),
    "fit munit": lambda: counted_fit("munit", width=4, residual_blocks=2, mlp_width=8),
    "fit flow": lambda: counted_fit("flow", width=8),
    "fit pose": counted_pose_fit,
    "eKLD of rotation": lambda: counted_measure(Rotation()),
    "eKLD of munit": lambda: counted_measure(munit().eval()),
    "eKLD of thickness": lambda: counted_measure(Thickness()),
    "inspect on 60 images": lambda: counted_assessment(60),
    "inspect on 120 images": lambda: counted_assessment(120),
    "augment 8 images": lambda: counted_export(8),
    "augment 16 images": lambda: counted_export(16),
}
GROWTH = ("spatial", "redraw")
"""Paths that are counted once more on a set of twice the images."""


@contextmanager
def on_pretended_device() -> Iterator[None]:
    """The device, and what asks of a GPU where values lie, answered for it."""
    import safetensors.torch
    from huggingface_hub.serialization import _torch

    register()
    _torch.storage_ptr, safetensors.torch._find_shared_tensors = id, lambda tensors: []
    torch.__future__.set_swap_module_params_on_conversion(True)
    with PretendedDevice():
        yield


def count_all(paths: tuple[str, ...]) -> dict[str, dict[str, object]]:
    """Operations and waits of one step, batch or image of each path, and the lines that wait."""
    found: dict[str, dict[str, object]] = {}
    with on_pretended_device():
        for name in paths:
            count, steps = PATHS[name]()
            lines = {place: round(number / steps, 3) for place, number in count.places.most_common(6)}
            found[name] = {"operations": count.operations / steps, "waits": count.waits / steps, "lines": lines}
            if name in GROWTH:
                more, others = counted_stage(NUISANCES[name](), images=2 * BATCH * STEPS)
                found[name]["growth"] = more.operations / others - count.operations / steps
    return found


if __name__ == "__main__":
    given = read_settings(__doc__, paths=(), out=None)
    counts = count_all(given.paths or tuple(PATHS))
    if given.out:
        Path(given.out).write_text(json.dumps(counts, indent=1))
    rows = [
        (name, f"{row['waits']:.2f}", f"{row['operations']:.1f}", "; ".join(map(str, row["lines"].items())))
        for name, row in counts.items()
    ]
    print(markdown(("path", "waits", "operations", "where it waits"), rows))
