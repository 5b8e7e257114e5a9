"""Hugging Face sets in and out: read again by the library itself, killed and resumed, refused by name."""

import io
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from export_inputs import tree
from PIL import Image
from sklearn.datasets import load_digits

from gen_invariance import Rotation, SpatialTranslator
from gen_invariance.cli.main import run
from gen_invariance.data.images import to_uint8
from gen_invariance.errors import DataError
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.manifest import read_manifest
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings
from gen_invariance.export.units import draw_generator

datasets = pytest.importorskip("datasets")

COUNTS = (9, 3, 1)
NAMES = ["zero", "one", "two"]
SETTINGS = ExportSettings(target="max", batch_size=4, off_distribution=None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rows():
    """Real digits 8 x 8, encoded, with their labels."""
    bunch = load_digits()
    places = np.concatenate([np.flatnonzero(bunch.target == label)[:count] for label, count in enumerate(COUNTS)])
    pictures = [png(bunch.images[place].astype(np.uint8) * 15) for place in places]
    return pictures, bunch.target[places].tolist()


def data_set(**changes):
    pictures, labels = rows()
    columns = {
        "id": [f"n{number}" for number in range(len(labels))],
        "image": [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(pictures)],
        "label": labels,
        **changes,
    }
    features = {
        "id": datasets.Value("string"),
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
    }
    features = datasets.Features({name: features[name] for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def as_saved(folder):
    data_set().save_to_disk(folder / "set")
    return folder / "set"


def as_saved_splits(folder):
    """The labels of "test" are hidden, as in sets of competitions."""
    whole = data_set()
    hidden = data_set(label=[-1] * len(whole)).select(range(5))
    datasets.DatasetDict({"train": whole, "test": hidden}).save_to_disk(folder / "set")
    return folder / "set"


def as_parquet(folder):
    folder.mkdir(parents=True, exist_ok=True)
    data_set().to_parquet(folder / "set.parquet")
    return folder / "set.parquet"


def as_parquet_folder(folder):
    (folder / "set" / "data").mkdir(parents=True)
    for index in range(2):
        file = folder / "set" / "data" / f"train-0000{index}-of-00002.parquet"
        data_set().shard(2, index, contiguous=True).to_parquet(file)
    data_set().select(range(4)).to_parquet(folder / "set" / "data" / "test-00000-of-00001.parquet")
    return folder / "set"


INPUTS = {
    "saved": as_saved,
    "saved splits": as_saved_splits,
    "parquet": as_parquet,
    "parquet folder": as_parquet_folder,
}


def read_again(out, kind):
    """The splits of the output, by the library, as any user of it would read them."""
    if kind.startswith("saved"):
        found = datasets.load_from_disk(out)
    elif kind == "parquet":
        found = datasets.load_dataset("parquet", data_files=str(out / "set.parquet"))
    else:
        found = datasets.load_dataset(str(out))
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


@pytest.mark.parametrize("kind", INPUTS)
def test_the_output_is_a_set_of_the_same_kind(kind, tmp_path):
    path = INPUTS[kind](tmp_path / "in")
    before = tree(tmp_path / "in")
    summary = export_dataset(open_format("huggingface", path), Rotation(30), tmp_path / "out", SETTINGS)
    assert tree(tmp_path / "in") == before
    assert (summary.before, summary.after) == (COUNTS, (9, 9, 9))
    old, new = data_set(), read_again(tmp_path / "out", kind)
    train = new["train"]
    assert train.features == old.features
    assert np.bincount(train["label"]).tolist() == [9, 9, 9]
    assert train.select(range(13)).with_format("arrow")[:] == old.with_format("arrow")[:]
    kept = [row for row in read_manifest(tmp_path / "out") if row["status"] == "kept"]
    assert len(kept) == sum(map(len, new.values()))
    for row in kept:
        split, _, place = row["file"].partition("/")
        found = new[split][int(place)]
        if row["kind"] == "generated":  # the draw that the manifest names, and the other columns of the source
            source = old[int(row["source"].partition("/")[2])]
            images = torch.from_numpy(np.array(source["image"]))[None, None].float() / 255
            generator = draw_generator(0, row["source"], row["copy"])
            expected = Rotation(30).apply(images, Rotation(30).sample(images.shape, generator=generator))
            assert np.array_equal(np.array(found["image"]), to_uint8(expected)[0, 0].numpy())
            assert (found["id"], found["label"]) == (source["id"], source["label"])
        else:
            assert found["id"] == f"n{row['source'].partition('/')[2]}"
    if kind in ("saved splits", "parquet folder"):
        count = {"saved splits": 5, "parquet folder": 4}[kind]
        assert new["test"]["id"][:] == [f"n{number}" for number in range(count)]
        assert set(new["test"]["label"]) == ({-1} if kind == "saved splits" else {0})


@pytest.mark.parametrize("kind", ["saved splits", "parquet folder"])
def test_the_output_is_an_input(kind, tmp_path):
    export_dataset(open_format("huggingface", INPUTS[kind](tmp_path / "in")), Rotation(30), tmp_path / "one", SETTINGS)
    summary = export_dataset(
        open_format("huggingface", tmp_path / "one"), Rotation(20), tmp_path / "two", ExportSettings(target=10)
    )
    assert summary.before == (9, 9, 9)


@pytest.mark.parametrize("kind", ["saved splits", "parquet"])
def test_resumed_at_any_moment_it_ends_in_the_same_bytes(kind, tmp_path, monkeypatch):
    form = open_format("huggingface", INPUTS[kind](tmp_path / "in"))
    export_dataset(form, Rotation(30), tmp_path / "whole", SETTINGS)
    real, left, stopped = os.replace, [0], 0

    class Stop(BaseException):
        pass

    def fail(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        real(*args)

    for moment in (2, 15, 17):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            left[0] = moment
            try:
                export_dataset(form, Rotation(30), tmp_path / "out", SETTINGS, resume=True)
            except Stop:
                stopped += 1
        export_dataset(open_format("huggingface", form.path), Rotation(30), tmp_path / "out", SETTINGS, resume=True)
        assert tree(tmp_path / "out") == tree(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")
    assert stopped >= 2


def test_only_the_new_rows_where_originals_are_referenced(tmp_path):
    settings = ExportSettings(target="max", off_distribution=None, originals="reference")
    export_dataset(
        open_format("huggingface", as_saved_splits(tmp_path / "in")), Rotation(30), tmp_path / "out", settings
    )
    found = datasets.load_from_disk(tmp_path / "out")
    assert list(found) == ["train"]
    assert np.bincount(found["train"]["label"]).tolist() == [0, 6, 8]


def test_unusable_rows_are_named_and_left_out(tmp_path):
    pictures, labels = rows()
    pictures[2], pictures[10], labels[4] = b"no picture", None, None
    images = [content and {"bytes": content, "path": None} for content in pictures]
    data_set(image=images, label=labels).save_to_disk(tmp_path / "set")
    summary = export_dataset(open_format("huggingface", tmp_path / "set"), Rotation(30), tmp_path / "out", SETTINGS)
    assert summary.problems == (
        ("train/2", "not an image of a known format"),
        ("train/10", "its row holds no image"),
    )
    assert summary.ignored == (("train/4", "has no label"),)
    found = datasets.load_from_disk(tmp_path / "out")
    assert found["id"][:10] == [f"n{number}" for number in (0, 1, 3, 5, 6, 7, 8, 9, 11, 12)]
    for row in read_manifest(tmp_path / "out"):
        if row["status"] == "kept" and row["kind"] == "original":
            place = int(row["file"].partition("/")[2])
            assert found[place]["id"] == f"n{row['source'].partition('/')[2]}"


def test_labels_of_text_and_pictures_as_plain_bytes(tmp_path):
    pictures, labels = rows()
    frame = pd.DataFrame({"scan": pictures, "kind": [NAMES[label] for label in labels]})
    frame.to_parquet(tmp_path / "scans.parquet")
    form = open_format("huggingface", tmp_path / "scans.parquet", label_column="kind")
    assert form.class_names == ("one", "two", "zero")
    export_dataset(form, Rotation(30), tmp_path / "out", SETTINGS)
    again = pd.read_parquet(tmp_path / "out" / "scans.parquet")
    assert again["kind"].value_counts().tolist() == [9, 9, 9]
    assert all(Image.open(io.BytesIO(content)).size == (8, 8) for content in again["scan"])


def test_image_folder_with_metadata_and_with_class_folders(tmp_path):
    pictures, labels = rows()
    lines = []
    for number, (content, label) in enumerate(zip(pictures, labels, strict=True)):
        for file in (tmp_path / "flat" / f"{number}.png", tmp_path / "tree" / NAMES[label] / f"{number}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        lines.append(json.dumps({"file_name": f"{number}.png", "label": label, "note": {"by": "Zoë"}}))
    (tmp_path / "flat" / "metadata.jsonl").write_text("\n".join(lines))
    for name, found_format in (("flat", "table"), ("tree", "folder")):
        found = open_format("huggingface", tmp_path / name)
        assert found.name == found_format
        assert sorted(export_dataset(found, Rotation(30), tmp_path / f"{name}-out", SETTINGS).after) == [9, 9, 9]
    again = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "flat-out"), split="train")
    assert np.bincount(again["label"]).tolist() == [9, 9, 9]
    assert again["note"][0] == {"by": "Zoë"}
    again = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "tree-out"), split="train")
    assert again.features["label"].names == sorted(NAMES)
    assert np.bincount(again["label"]).tolist() == [9, 9, 9]


def save_dict(path, **splits):
    datasets.DatasetDict(splits).save_to_disk(path)


def two_columns(path):
    pictures, labels = rows()
    two = {"left": pictures, "right": pictures, "label": labels}
    pd.DataFrame(two).to_parquet(path.with_suffix(".parquet"))


def torn(path):
    data_set().save_to_disk(path)
    file = path / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:200])


def without_file(path):
    data_set().save_to_disk(path)
    (path / "state.json").unlink()


def parts_with_metadata(path):
    (path / "train").mkdir(parents=True)
    (path / "train" / "metadata.csv").write_text("file_name,label\na.png,1\n")


BAD = {
    "nothing there": (lambda p: None, "does not exist"),
    "text": (lambda p: p.write_text("x"), "is no Parquet file"),
    "empty folder": (lambda p: p.mkdir(), "has no sub-folders"),
    "no train split": (lambda p: save_dict(p, test=data_set()), "no split 'train' (it has test)"),
    "torn": (torn, "cannot be read as a Hugging Face data set"),
    "incomplete": (without_file, "cannot be read as a Hugging Face data set"),
    "junk": (lambda p: p.with_suffix(".parquet").write_bytes(b"PAR1junk"), "cannot be read as a Hugging Face data set"),
    "no label": (lambda p: data_set().remove_columns("label").save_to_disk(p), "has no column 'label'"),
    "no image": (lambda p: data_set().remove_columns("image").save_to_disk(p), "no column holds encoded images"),
    "two images": (two_columns, "columns left, right hold images"),
    "many labels": (
        lambda p: data_set().remove_columns("label").add_column("label", [[0, 1]] * 13).save_to_disk(p),
        "labels must be class numbers or names",
    ),
    "no label at all": (lambda p: data_set(label=[None] * 13).save_to_disk(p), "no image that can be used"),
    "metadata by part": (parts_with_metadata, "keeps its metadata by part"),
    "splits that differ": (
        lambda p: save_dict(p, train=data_set(), test=data_set().remove_columns("label")),
        "split 'test' has no column 'label'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_in_one_line(name, tmp_path, capsys, caplog):
    make, text = BAD[name]
    path = tmp_path / "in"
    make(path)
    path = path.with_suffix(".parquet") if path.with_suffix(".parquet").exists() else path
    SpatialTranslator(1, start=0.3).save_pretrained(tmp_path / "t")
    capsys.readouterr()
    words = ["data=huggingface", f"data.path={path}", f"out={tmp_path / 'out'}", f"translator={tmp_path / 't'}"]
    assert run(["augment", "progress=false", *words]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1, err
    assert text in err
    assert not out


def test_by_the_command_with_a_column_of_its_own(tmp_path, capsys):
    pictures, labels = rows()
    frame = {"left": pictures, "right": pictures, "label": labels}
    pd.DataFrame(frame).to_parquet(tmp_path / "set.parquet")
    SpatialTranslator(1, start=0.3).save_pretrained(tmp_path / "t")
    words = ["data=huggingface", f"data.path={tmp_path / 'set.parquet'}", f"out={tmp_path / 'out'}", "target=5"]
    assert run(["augment", *words, f"translator={tmp_path / 't'}", "image_column=right", "off_distribution=null"]) == 0
    found = pd.read_parquet(tmp_path / "out" / "set.parquet")
    assert found["label"].value_counts().to_dict() == {0: 9, 1: 5, 2: 5}
    assert found["left"].iloc[-1] in pictures
    assert found["right"].iloc[-1] not in pictures


def test_a_worker_opens_the_set_again(tmp_path):
    import pickle

    form = open_format("huggingface", as_saved(tmp_path / "in"))
    copy = pickle.loads(pickle.dumps(form))
    assert len(pickle.dumps(form)) < 1000
    assert copy.entries() == form.entries()
    with pytest.raises(DataError, match="these hold images: image"):
        open_format("huggingface", as_parquet(tmp_path / "p"), image_column="id")
