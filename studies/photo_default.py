"""`train classifier=efficientnet_lite0` as it comes, beside a plain AdamW script, on long-tailed photographs.

    python -m studies.photo_default source=folder path=clothing10_dev largest=80 imbalance=20 draws=0-4 out=runs/photo
    python -m studies.photo_default source=folder path=clothing10_dev largest=80 imbalance=20 draws=10 arms=plain_full
        rates=0.0001,0.0003,0.001 out=runs/rates
    python -m studies.photo_default part=table out=runs/photo

All arms start from the same weights (extra `pretrained-lite`) and see the same images. `seconds` is processor time from
images in memory to a trained classifier. Draws 10 and 11 chose the settings of the default, others are to be reported.
Lines that are in OUT/lines.jsonl are not run again; `table` prints them and writes OUT/table.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import gen_invariance.torchvision_guard  # noqa: F401
from benchmarks.program import append_line, format_gap, format_mean, markdown, read_lines, read_settings
from gen_invariance.benchmark.run import parse_numbers
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.model import Classifier
from gen_invariance.cli.main import compose
from gen_invariance.cli.verbs import VERBS
from gen_invariance.data.readers.registry import load_source
from gen_invariance.data.split import LongTailSplit, make_long_tailed
from gen_invariance.experiment.train import run_train
from gen_invariance.experiment.trained import load_classifier
from gen_invariance.files import write_text
from gen_invariance.run import named_generator
from gen_invariance.settings import read_settings as read_verb_settings

from torchvision.transforms import v2  # isort: skip  (after the guard)

BACKBONE = "efficientnet_lite0"
PLAIN_RATES = {"plain_full": 1e-3, "plain_frozen": 1e-3}
"""Peak rates of the plain script, the better of 0.0003 and 0.001 on draw 10."""

OURS: Mapping[str, list[str]] = {
    "default": [],
    "without_spread": ["training.spread=0"],
    "before_frozen": ["training=digits", "training.epochs=10", "transfer=frozen", "classifier.head=linear",
                      "classifier.loss=cross_entropy"],
}  # fmt: skip
"""Words after `gen-invariance train classifier=efficientnet_lite0 data=...`; the last are what was advised before."""


def main() -> None:
    """Read the settings and do the part that is asked for."""
    given = read_settings(
        __doc__, part="run", source="folder", path="", largest=80, imbalance=20.0, test_images=0, image_size=64,
        draws="0-4", arms=("plain_full", "plain_frozen", "default"), rates=(), out=str,
    )  # fmt: skip
    torch.set_num_threads(1)
    if given.part == "table":
        print(write_table(Path(given.out)))
    else:
        run(given)


def train_plainly(split: LongTailSplit, *, frozen: bool, rate: float, seed: int, epochs: int = 20) -> Classifier:
    """What a plain script does: AdamW with a cosine, a balanced sampler, torchvision's crops, flips and RandAugment."""
    images, labels = split.train.images, split.train.labels
    model = build_classifier(
        BACKBONE, num_classes=split.train.num_classes, weights="DEFAULT", generator=named_generator(seed, "head")
    )
    side = images.shape[-1]
    augment = v2.Compose([v2.RandomCrop(side, padding=side // 8), v2.RandomHorizontalFlip(), v2.RandAugment()])
    trained: nn.Module = model.head if frozen else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, weight_decay=0.05)
    weights = 1 / torch.bincount(labels)[labels].double()
    steps, generator = epochs * math.ceil(len(labels) / 32), named_generator(seed, "sampler")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for step in range(steps):
            model.train(not frozen)
            rows = torch.multinomial(weights, 32, replacement=True, generator=generator)
            batch = torch.stack([augment(images[row]) for row in rows]).float() / 255
            with torch.set_grad_enabled(not frozen):
                features = model.features(batch)
            loss = F.cross_entropy(model.head(features), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (step + 1) / steps))
    return model.eval()


def train_ours(given: SimpleNamespace, words: list[str], *, draw: int, folder: Path) -> Classifier:
    """`gen-invariance train` with `words` behind the data."""
    data = ["data=folder"] if given.source == "folder" else ["data=npz", f"data.source={given.source}"]
    data += [f"data.path={given.path}", f"data.image_size={given.image_size}", "data.profile=exponential"]
    data += [f"data.largest={given.largest}", f"data.imbalance={given.imbalance}", "data.rest_is_test=false"]
    data += [f"data.test_images={given.test_images}"] if given.test_images else []
    common = [f"seed={draw}", f"out={folder}", "progress=false"]
    config = compose("train", [f"classifier={BACKBONE}", *data, *words, *common])
    return load_classifier(run_train(read_verb_settings(VERBS["train"].settings, config, ""))).model


@torch.no_grad()
def score(model: Classifier, split: LongTailSplit) -> dict[str, float]:
    """Balanced accuracy, and its means over the 30 % of classes with the most and the fewest images, in percent."""
    found = torch.cat([model(part).argmax(1) for part in split.test.float_images().split(64)])
    right = (found == split.test.labels).double()
    by_class = torch.stack([right[split.test.labels == label].mean() for label in range(split.test.num_classes)])
    order, part = split.counts.argsort(descending=True, stable=True), max(1, round(0.3 * len(by_class)))
    groups = {"balanced": by_class, "many": by_class[order[:part]], "few": by_class[order[-part:]]}
    return {name: 100 * float(values.mean()) for name, values in groups.items()}


def run(given: SimpleNamespace) -> None:
    """Train and score every arm on every draw that is not there yet."""
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    done = {(line["arm"], line["draw"]) for line in read_lines(out / "lines.jsonl")}
    source = load_source(given.source, given.path, image_size=given.image_size)
    cut = {"largest": given.largest, "imbalance": given.imbalance, "test_images": given.test_images or None}
    for draw in parse_numbers(given.draws, "draws"):
        split = make_long_tailed(source, seed=draw, **cut)
        for arm in given.arms:
            for rate in map(float, given.rates or [PLAIN_RATES.get(arm, 0.0)]):
                name = f"{arm} {rate:g}" if given.rates else arm
                if (name, draw) in done:
                    continue
                started = time.process_time()
                if arm in PLAIN_RATES:
                    model = train_plainly(split, frozen=arm == "plain_frozen", rate=rate, seed=draw)
                else:
                    model = train_ours(given, OURS[arm], draw=draw, folder=out / f"{arm}-{draw}")
                seconds = round(time.process_time() - started, 1)
                line = {"arm": name, "draw": draw, **score(model, split), "seconds": seconds}
                append_line(out / "lines.jsonl", line)
                print(line, flush=True)


def write_table(out: Path) -> str:
    """Means over draws with 95 % intervals, and differences to the plain script, paired over the draws of both."""
    lines = read_lines(out / "lines.jsonl")
    by_arm: dict[str, dict[int, dict]] = {}
    for line in lines:
        by_arm.setdefault(line["arm"], {})[line["draw"]] = line
    plain, rows = by_arm.get("plain_full", {}), []
    for arm, found in by_arm.items():
        row = [arm, len(found)]
        row += [format_mean([line[name] for line in found.values()]) for name in ("balanced", "many", "few")]
        both = [draw for draw in found if draw in plain and arm != "plain_full"]
        for name in ("balanced", "few"):
            pairs = [[lines_of[draw][name] for draw in both] for lines_of in (found, plain)]
            row.append(format_gap(*pairs) if both else "–")
        rows.append([*row, f"{sum(line['seconds'] for line in found.values()) / len(found):.0f}"])
    head = (
        "arm",
        "draws",
        "balanced (%)",
        "many (%)",
        "few (%)",
        "balanced, over plain",
        "few, over plain",
        "seconds",
    )
    text = markdown(head, rows)
    write_text(out / "table.md", text)
    return text


if __name__ == "__main__":
    main()
