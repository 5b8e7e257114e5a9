"""Real digits, few of some classes, in every format that an export reads; and what tests ask of its output."""

import io
import json
import tarfile

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.datasets import load_digits

from gen_invariance import MunitTranslator
from gen_invariance.export.manifest import read_manifest
from gen_invariance.export.pictures import encode
from gen_invariance.export.settings import ExportSettings

COUNTS = {"zero": 20, "one": 9, "two": 3}
SETTINGS = ExportSettings(target="max", batch_size=8, off_distribution=None)


def digits():
    """Real digits, uint8 (N, 8, 8), and labels, as many of each class as COUNTS says."""
    bunch = load_digits()
    rows = np.concatenate([np.flatnonzero(bunch.target == label)[:n] for label, n in enumerate(COUNTS.values())])
    return (bunch.images[rows] * 255 / 16).astype(np.uint8), bunch.target[rows]


def as_folder(root, *, size=None):
    images, labels = digits()
    for row, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / list(COUNTS)[label]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels)
        (picture if size is None else picture.resize(size)).save(folder / f"{row:03d}.png")
    return root


def as_table(root, *, suffix=".csv"):
    as_folder(root / "files")
    files = sorted((root / "files").rglob("*.png"))
    table = pd.DataFrame(
        {
            "split": "train",
            "path": [str(file.relative_to(root)) for file in files],
            "label": [file.parent.name for file in files],
        }
    )
    path = root / f"set{suffix}"
    table.to_parquet(path) if suffix == ".parquet" else table.to_csv(path, index=False)
    return path


def as_npz(root, *, layout="nhwc", dtype=np.uint8):
    root.mkdir(parents=True, exist_ok=True)
    images, labels = digits()
    images = images if dtype == np.uint8 else (images / 255).astype(dtype)
    images = {"nhw": images, "nhwc": np.stack([images] * 3, -1), "nchw": np.stack([images] * 3, 1)}[layout]
    names = np.array(list(COUNTS))
    np.savez(root / "set.npz", train_images=images, train_labels=labels.astype(np.int32), class_names=names)
    return root / "set.npz"


def as_shards(root, *, json_labels=False):
    root.mkdir(parents=True, exist_ok=True)
    images, labels = digits()
    for shard, rows in enumerate(np.array_split(np.arange(len(labels)), 3)):
        with tarfile.open(root / f"set-{shard}.tar", "w") as tar:
            for row in rows:
                label = ("json", json.dumps({"label": int(labels[row])})) if json_labels else ("cls", str(labels[row]))
                for suffix, content in (("png", encode(images[row][None])), (label[0], label[1].encode())):
                    member = tarfile.TarInfo(f"a/{row:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


INPUTS = {"folder": as_folder, "table": as_table, "npz": as_npz, "webdataset": as_shards}


def build_small():
    with torch.random.fork_rng():
        torch.random.set_rng_state(torch.Generator().manual_seed(1).get_state())
        return MunitTranslator(1, width=8, downsamples=1, residual_blocks=1, style_downsamples=2, mlp_width=8)


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def rows_of(out, **wanted):
    return [row for row in read_manifest(out) if all(row[name] == value for name, value in wanted.items())]
