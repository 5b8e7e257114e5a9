"""Families of hostile input for `fuzz.py`: each writes an input below `case/in` and says how it is read."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gen_invariance.cli import main as cli
from gen_invariance.configs import config_folder
from gen_invariance.contrib.pipeline import TranslationPipeline
from gen_invariance.data.readers.arrays import read_idx, read_npz
from gen_invariance.data.readers.folder import read_image_folder
from gen_invariance.experiment.evaluate import open_run
from gen_invariance.files import load_checkpoint
from gen_invariance.records import finished_cells, load_records
from gen_invariance.translator.io import load_translator
from tests.stress import fuzz_inputs as make
from tests.stress.resume import DIGITS

TINY = [*DIGITS, "progress=false"]
FIT = [
    "fit",
    *TINY,
    "fit.steps=2",
    "fit.batch_size=4",
    "fit.sample_every=9",
    "translator.objective.discriminator_width=4",
]
TRAIN = ["train", *TINY, "training.epochs=1", "training.sampling=instance", "training.batch_size=64"]
SMALL_FIT = ["fit.steps=1", "fit.batch_size=2", "fit.head_from=1", "translator.objective.discriminator_width=4"]
MUNIT = ["translator=munit_small", "translator.network={width: 4, residual_blocks: 1}"]

Door = list[str] | Callable[[], object]
"""A command line, or a call of a reader."""


def settings(dice: random.Random, case: Path, base: Path) -> Door:
    """One or two settings of a verb replaced by odd words."""
    verb = dice.choice(("fit", "train", "measure", "augment", "order", "report", "inspect", "demo"))
    line = {
        "fit": FIT, "train": TRAIN, "measure": ["measure", f"run={case / 'out'}", "draws=1"],
        "augment": ["augment", f"data.path={base / 'in'}", f"translator={base / 'fit'}", "target=6"],
        "order": ["order", "order.count=1", "order.seeds=[0]", "order.analysis.resamples=20", "order.source.epochs=1",
                  "order.source.images_per_class=8"],
        "report": ["report", f"records={base / 'train'}"], "demo": ["demo"],
        "inspect": ["inspect", f"translator={base / 'fit'}", *TINY, "inspect.judge_epochs=1", "inspect.draws=1",
                    "inspect.max_images=20", "inspect.held_out=0.3", "inspect.budget=null"],
    }[verb]  # fmt: skip
    known = keys_of(verb)
    words = []
    for _ in range(dice.choice((1, 1, 2))):
        key, word = dice.choice(known), dice.choice(make.WORDS if dice.random() < 0.5 else make.NUMBERS)
        if dice.random() < 0.1:
            key = make.mutated(key.encode(), dice).decode("latin-1").replace("\x00", "")
        if re.search(r"steps|epochs|draws|resamples|seeds|tries|milestones|count|operations|layers|blocks|depth", key):
            word = "2" if re.fullmatch(r"9+|0x10|1_000", word) else word  # long work is no fault
        words.append(f"{key}={word}" if dice.random() < 0.97 else dice.choice(make.WORDS))
    if verb == "demo":  # whole seeds of it are long work, which is no fault
        words = [*(word for word in words if not word.startswith("demo.seeds")), "demo.seeds=0"]
    if any(word.split("=")[0] == "out" for word in words):
        return [*line, *words]
    if verb == "measure":
        make.copy_tree(base / "train", case / "out")
        return [*line, *words]
    return [*line, *words, f"out={case / 'out'}"]


KEYS: dict[str, list[str]] = {}


def dotted(settings: dict, before: str = "") -> Iterator[str]:
    """Names of all settings, those in groups with dots."""
    for name, value in settings.items():
        yield before + name
        if isinstance(value, dict):
            yield from dotted(value, f"{before}{name}.")


def keys_of(verb: str) -> list[str]:
    if verb not in KEYS:
        found = cli.compose(verb, [], missing_is_error=False)
        groups = [path.name for path in config_folder().iterdir() if path.is_dir()]
        KEYS[verb] = [*dotted(found), *groups, "data.nuisance_options.degrees", "classifier.loss_options.gamma"]
    return KEYS[verb]


def images(dice: random.Random, case: Path, base: Path) -> Door:
    """An image folder with odd files, for fitting, for a reader, or for an export."""
    root = case / "in" / (dice.choice(make.NAMES) if dice.random() < 0.05 else "photos")
    make.image_folder(root, dice)
    return images_door(root, dice, case, base)


def images_door(root: Path, dice: random.Random, case: Path, base: Path) -> Door:
    size = dice.choice((None, None, 16, 8))
    if dice.random() < 0.4:
        skip = dice.random() < 0.7
        return lambda: read_image_folder(root, image_size=size, skip_corrupt=skip)
    sized = [] if size is None else [f"data.image_size={size}"]
    skips = ["data.skip_corrupt=true"] if dice.random() < 0.7 else []
    where = ["data=folder", quoted("data.path", root), *sized]
    if dice.random() < 0.2:
        return ["fit", *where, *skips, *SMALL_FIT, f"out={case / 'out'}"]
    return ["augment", *where, *export_options(dice, base), f"out={case / 'out'}"]


def export_options(dice: random.Random, base: Path) -> list[str]:
    options = [f"target={dice.choice(('max', '7', 'median', '3'))}", f"batch_size={dice.choice((2, 64))}", "tries=2"]
    options += [dice.choice(("originals=copy", "originals=link", "originals=reference"))]
    options += ["results=square"] if dice.random() < 0.2 else []
    return [*options, f"translator={base / 'fit'}"]


def quoted(key: str, path: Path) -> str:
    return f"{key}='" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def names(dice: random.Random, case: Path, base: Path) -> Door:
    """Readable images, every class and file name hostile."""
    root = case / "in" / "photos"
    for number in range(3):
        for place in range(4):
            file = root / dice.choice(make.NAMES) / (dice.choice(make.NAMES)[: 200 + 55 * (place % 2)] + ".png")
            make.put(file, make.good_png(dice))
            make.put(root / f"plain{number}" / f"{place}.png", make.good_png(dice))
    return images_door(root, dice, case, base)


def npz(dice: random.Random, case: Path, base: Path) -> Door:
    """Array files."""
    file = case / "in" / "data.npz"
    make.put(file, make.npz(dice))
    if dice.random() < 0.75:
        return lambda: read_npz(file)
    where = ["data=npz", f"data.path={file}"]
    if dice.random() < 0.5:
        return ["fit", *where, *SMALL_FIT, f"out={case / 'out'}"]
    return ["augment", *where, *export_options(dice, base), f"out={case / 'out'}"]


def tables(dice: random.Random, case: Path, base: Path) -> Door:
    """Tables of paths and labels."""
    file = make.csv_table(case / "in", dice)
    return ["augment", "data=table", f"data.path={file}", *export_options(dice, base), f"out={case / 'out'}"]


def shards(dice: random.Random, case: Path, base: Path) -> Door:
    """WebDataset tars."""
    for number in range(dice.choice((1, 1, 2))):
        make.put(case / "in" / f"part-{number}.tar", make.shard(dice))
    where = ["data=webdataset", f"data.path={case / 'in'}"]
    return ["augment", *where, *export_options(dice, base), f"out={case / 'out'}"]


def idx(dice: random.Random, case: Path, base: Path) -> Door:
    """IDX files."""
    file = case / "in" / dice.choice(("images.gz", "images"))
    make.put(file, make.idx(dice))
    return lambda: read_idx(file)


def checkpoints(dice: random.Random, case: Path, base: Path) -> Door:
    """Checkpoints and descriptions of runs, read when measuring and when going on."""
    kind = dice.choice(("train", "train", "fit"))
    out = make.copy_tree(base / kind, case / "out")
    file = max((out / "checkpoints").iterdir())
    how = dice.random()
    if how < 0.3:
        file.write_bytes(make.mutated(file.read_bytes(), dice))
    elif how < 0.7:
        file.write_bytes(make.checkpoint(load_checkpoint(file), dice))
    elif how < 0.9:
        about = json.loads((out / "run.json").read_text())
        (out / "run.json").write_bytes(make.json_bytes(make.mutated_json(about, dice), dice))
    else:
        other = dice.choice([path for path in out.rglob("*") if path.is_file()])
        other.write_bytes(make.mutated(other.read_bytes(), dice))
    if dice.random() < 0.4:
        return lambda: load_checkpoint(file, kind=kind)
    if kind == "fit":
        return [*FIT, f"out={out}", "resume=true"]
    if dice.random() < 0.5:
        return [*TRAIN, f"out={out}", "resume=true"]
    return dice.choice((["measure", f"run={out}", "draws=1"], lambda: open_run(out, device=torch.device("cpu"))))


def translators(dice: random.Random, case: Path, base: Path) -> Door:
    """Saved translators: settings, weights, verdicts."""
    folder = make.copy_tree(base / dice.choice(("fit", "munit")), case / "in" / "t")
    config, weights = (
        folder / "translator" / "config.json",
        folder / "translator" / "diffusion_pytorch_model.safetensors",
    )
    how = dice.random()
    if how < 0.4:
        config.write_bytes(make.json_bytes(make.mutated_json(json.loads(config.read_text()), dice), dice))
    elif how < 0.75:
        weights.write_bytes(make.safetensors_file(weights.read_bytes(), dice))
    elif how < 0.85:
        index = {"metadata": {}, "weight_map": {"x": dice.choice(make.TEXTS), "width": "../../../etc/passwd"}}
        name = "diffusion_pytorch_model.safetensors.index.json"
        (folder / "translator" / name).write_bytes(make.json_bytes(index, dice))
        if dice.random() < 0.5:
            weights.unlink()
    else:
        quality = {"verdict": "usable", "reasons": ["a"], "figures": {"x": {"value": 1}}, "data": {}}
        (folder / "quality.json").write_bytes(make.json_bytes(make.mutated_json(quality, dice), dice))
    if dice.random() < 0.5:
        return dice.choice((lambda: load_translator(folder), lambda: TranslationPipeline.from_pretrained(folder)))
    staged = [*TRAIN, "stage=translator", f"stage.translator={folder}", f"out={case / 'out'}"]
    exported = ["augment", f"data.path={base / 'in'}", f"translator={folder}", "target=max", f"out={case / 'out'}"]
    return dice.choice((staged, exported))


def records(dice: random.Random, case: Path, base: Path) -> Door:
    """Measured records, with hostile names of classes and methods, some lines damaged."""
    source = next((base / "train").rglob("records-*.jsonl"))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    odd = dice.choice(make.TEXTS)
    lines = []
    for row in rows:
        if dice.random() < 0.05:
            row = make.mutated_json(row, dice)
        elif (isinstance(row.get("class_name"), str) and row.get("class_index") == 1) or dice.random() < 0.01:
            row = {**row, "class_name": odd}
        lines.append(json.dumps(row))
    if dice.random() < 0.3:
        lines = [line.replace('"method": "', f'"method": {json.dumps(odd)[:-1]}') for line in lines]
    content = "\n".join(lines).encode() + b"\n"
    folder = case / "in" / "records"
    make.put(folder / "records-0.jsonl", make.mutated(content, dice) if dice.random() < 0.3 else content)
    if dice.random() < 0.7:
        return lambda: finished_cells(load_records(folder))
    return ["report", f"records={case / 'in'}", f"out={case / 'out'}", f"baseline={dice.choice(('null', 'none'))}"]


def exports(dice: random.Random, case: Path, base: Path) -> Door:
    """A half-done or finished export, its state damaged, then resumed."""
    out = make.copy_tree(base / "export", case / "out")
    found = [path for path in out.rglob("*") if path.is_file()]
    for file in dice.sample(found, dice.choice((1, 1, 2))):
        how = dice.random()
        if how < 0.3:
            file.unlink()
        elif file.suffix == ".json" and how < 0.7:
            value = json.loads(file.read_text())
            file.write_bytes(make.json_bytes(make.mutated_json(value, dice), dice))
        elif file.suffix == ".jsonl" and how < 0.7:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            place = dice.randrange(len(rows))
            rows[place] = make.mutated_json(rows[place], dice)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.write_bytes(make.mutated(file.read_bytes(), dice))
    return [*EXPORT, f"data.path={base / 'in'}", f"translator={base / 'fit'}", f"out={out}", "resume=true"]


EXPORT = ["augment", "data=folder", "target=16", "batch_size=4"]
FAMILIES = {
    settings: 16, images: 20, names: 8, npz: 14, tables: 8, shards: 6, idx: 4, checkpoints: 9, translators: 9,
    records: 4, exports: 2,
}  # fmt: skip
