"""Groups and duplicates through the real command: what is cut, and what is said at the start."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from gen_invariance import SpatialTranslator, load_source
from gen_invariance.cli.main import compose, run
from gen_invariance.data.split import load_split_indices
from gen_invariance.experiment.evaluate import open_run

TRAIN = ["train", "training.epochs=1", "training.sampling=instance", "progress=false", "device=cpu"]
FRAMES = 5


def command(capsys, *words):
    capsys.readouterr()
    code = run([*map(str, words)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def digits(count):
    """`count` images of each of the digits 0 to 2, uint8 (N, 16, 16), and labels."""
    bunch = load_digits()
    rows = np.concatenate([np.flatnonzero(bunch.target == label)[:count] for label in range(3)])
    return (bunch.images[rows] * 255 / 16).astype(np.uint8).repeat(2, 1).repeat(2, 2), bunch.target[rows]


def as_npz(path, **more):
    """40 training images of each class in tracks that begin anew in each class, and 8 test images."""
    images, labels = digits(48)
    test = np.tile(np.arange(48) >= 40, 3)
    tracks = np.tile(np.arange(40) // FRAMES, 3)
    arrays = {"train_images": images[~test], "train_labels": labels[~test], "train_track": labels[~test] * 8 + tracks}
    np.savez(path, **arrays, test_images=images[test], test_labels=labels[test], **more)
    return path


def as_folder(root, *, copied=0):
    """24 files of each class named by patient, and 6 test files with copies of the first `copied` training files."""
    images, labels = digits(30)
    for row, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        place = row % 30
        part, name = ("train", f"{place // FRAMES}_{place}") if place < 24 else ("test", f"9_{place}")
        for folder, stem in [(part, name), *([("test", f"dup_{place}")] if place < copied else [])]:
            (root / folder / f"{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{label}" / f"{stem}.png")
    return root


def test_an_npz_is_cut_and_held_out_by_its_tracks(tmp_path, capsys):
    file = as_npz(tmp_path / "set.npz")
    cut = ["data.profile=exponential", "data.largest=15", "data.imbalance=3", "data.validation_fraction=0.2"]
    words = [*TRAIN, "data=npz", f"data.path={file}", "data.group=track", *cut, f"out={tmp_path / 'run'}"]
    code, out, err = command(capsys, *words)
    assert (code, err) == (0, [])
    assert not any(line.startswith("note:") for line in out)
    split, tracks = (
        load_split_indices(tmp_path / "run" / "split.npz"),
        load_source("npz", file, group="track").train.groups,
    )
    train, held = tracks[split["train_indices"]], tracks[split["validation_indices"]]
    assert len(held) == 3 * 2 * FRAMES
    assert not set(train.tolist()) & set(held.tolist())
    labels = load_source("npz", file).train.labels[split["train_indices"]]
    assert [len(train[labels == label].unique()) for label in range(3)] == [6, 6, 5]
    _, prepared, task, _ = open_run(tmp_path / "run")  # the run knows its groups
    assert task.group == "track"
    assert torch.equal(prepared.train.groups.sort().values, train.sort().values)


def test_a_folder_is_cut_by_its_file_names(tmp_path, capsys):
    root = as_folder(tmp_path / "set")
    words = [*TRAIN, "data=folder", f"data.path={root / 'train'}", "data.rest_is_test=true"]
    code, _, err = command(capsys, *words, r"data.group=^(\d+)_", f"out={tmp_path / 'run'}")
    assert (code, err) == (0, [])
    split, patients = (
        load_split_indices(tmp_path / "run" / "split.npz"),
        load_source("folder", root / "train", group=r"^(\d+)_"),
    )
    sides = [set(patients.train.groups[split[f"{part}_indices"]].tolist()) for part in ("train", "test")]
    assert all(sides)
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    "group",
    [
        r"^(\d+)_",
        "([a-z]+)$",
        "it's (.)",
        r"(\\)",
        "(a)\\",
        "x=(a),[b]{2}",
        "(a|b)",
        '"(.)"x',
        "track",
        "a.b-c",
        " (.)",
    ],
)
def test_an_expression_needs_no_quotes_but_those_of_the_shell(group):
    assert compose("train", [f"data.group={group}"])["data"]["group"] == group
    assert compose("benchmark", [f"data_options.group={group}"])["data_options"]["group"] == group


@pytest.mark.parametrize(
    ("given", "group"), [("null", None), ("'a b'", "a b"), ('"(.)"', "(.)"), (r"'^(\d+)_'", r"^(\d+)_"), ("", "")]
)
def test_groups_in_quotes_and_none_are_read_as_ever(given, group):
    assert compose("train", [f"data.group={given}"])["data"]["group"] == group


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data=npz", "data.path={npz}", "data.group=site"], "has no train_site, which group=site asks for"),
        (["data=folder", "data.path={folder}", "data.group='^(x'"], "is no regular expression"),
        (["data=folder", "data.path={folder}", "data.group='^[0-9]'"], "one capturing group, it has 0"),
        (["data=folder", "data.path={folder}", "data.group='^(x)'"], "does not match '0_0.png'"),
        (["data=digits", "data.group=site"], "data set 'digits' does not tell groups"),
    ],
)
def test_bad_groups_end_in_one_line(words, said, tmp_path, capsys):
    places = {"npz": as_npz(tmp_path / "set.npz"), "folder": as_folder(tmp_path / "set")}
    code, _, err = command(capsys, *TRAIN, *(word.format(**places) for word in words), f"out={tmp_path / 'run'}")
    assert (code, len(err)) == (2, 1)
    assert said in err[0]
    assert not (tmp_path / "run").exists()


def test_copies_in_the_test_part_are_counted_and_named_by_every_verb(tmp_path, capsys):
    root, run_folder, translator = as_folder(tmp_path / "set", copied=2), tmp_path / "run", tmp_path / "translator"
    said = (
        "note: 6 of 24 test images are also training images (first: test/0/dup_0.png = train/0/0_0.png, class '0'); "
        "their accuracy says nothing about new images"
    )
    data = ["data=folder", f"data.path={root}", "data.image_size=16"]
    code, out, _ = command(capsys, *TRAIN, *data, f"out={run_folder}")
    assert (code, out[0]) == (0, said)
    code, out, _ = command(capsys, "measure", f"run={run_folder}", "draws=1")
    assert (code, out[0]) == (0, said)
    SpatialTranslator(1, start=0.3).save_pretrained(translator)
    words = ["progress=false", f"translator={translator}", "off_distribution=null", "target=max"]
    code, out, _ = command(capsys, "augment", *data, *words, f"out={tmp_path / 'more'}")
    assert (code, out[0]) == (0, said)
    looked = ["inspect.judge_epochs=1", "inspect.draws=2", "inspect.held_out=0.7", "inspect.budget=null", "device=cpu"]
    code, out, _ = command(capsys, "inspect", *data, f"translator={translator}", *looked, f"out={tmp_path / 'look'}")
    assert (code, out[0]) == (0, said)


def test_the_order_says_so_too(tmp_path, capsys):
    small = {"choose": "list", "subsets": "[[0,1]]", "seeds": "[0]", "pool": 5, "source.images_per_class": 5}
    small |= {"source.epochs": 1, "source.batch_size": 8, "analysis.resamples": 100}
    words = [f"order.{name}={value}" for name, value in small.items()]
    place = ["data=folder", f"data.path={as_folder(tmp_path / 'set', copied=1)}", f"out={tmp_path / 'order'}"]
    code, out, _ = command(capsys, "order", *place, *words, "device=cpu", "progress=false")
    assert code == 0
    assert out[0].startswith("note: 3 of 21 test images are also training images (first: test/0/dup_0.png")


def test_clean_sets_and_sets_of_one_part_say_nothing(tmp_path, capsys):
    root, translator = as_folder(tmp_path / "set"), tmp_path / "translator"
    SpatialTranslator(1, start=0.3).save_pretrained(translator)
    for place in (root, root / "train"):
        words = ["augment", "progress=false", f"data.path={place}", f"translator={translator}", "target=max"]
        code, out, _ = command(
            capsys, *words, "data=folder", "off_distribution=null", f"out={tmp_path / place.name}-out"
        )
        assert code == 0
        assert not any(line.startswith("note:") for line in out)


@pytest.mark.parametrize("group", ["site", "'^(x)'"])
def test_augment_takes_no_groups_where_it_tells_none(group, tmp_path, capsys):
    words = ["augment", "data=table", f"data.path={tmp_path / 'set.csv'}", "translator=t", f"data.group={group}"]
    code, _, err = command(capsys, *words, f"out={tmp_path / 'out'}")
    assert (code, len(err)) == (2, 1)
    assert "augment tells no groups in data=table; leave data.group out" in err[0]


def test_augment_names_images_of_an_npz_under_two_labels(tmp_path, capsys):
    images, labels = digits(8)
    np.savez(
        tmp_path / "set.npz",
        train_images=np.concatenate([images, images[:1]]),
        train_labels=np.append(labels, 2),
        test_images=images[::-1][:2],
        test_labels=labels[::-1][:2],
    )
    SpatialTranslator(1, start=0.3).save_pretrained(tmp_path / "t")
    words = ["augment", "data=npz", f"data.path={tmp_path / 'set.npz'}", f"translator={tmp_path / 't'}", "target=max"]
    code, out, _ = command(capsys, *words, "progress=false", "off_distribution=null", f"out={tmp_path / 'out'}")
    assert code == 0
    assert out[0].startswith("note: 2 of 2 test images are also training images (first: test row 0 = training row 23,")
    assert out[1].startswith(
        "note: 1 image stands under two labels (first: training row 0, class '0' = training row 24, class '2')"
    )


def test_augment_keeps_the_groups_of_an_npz(tmp_path, capsys):
    file = as_npz(tmp_path / "set.npz")
    SpatialTranslator(1, start=0.3).save_pretrained(tmp_path / "t")
    words = [
        "augment",
        "data=npz",
        f"data.path={file}",
        "data.group=track",
        f"translator={tmp_path / 't'}",
        "target=43",
        "force=true",
    ]
    code, _, err = command(capsys, *words, "progress=false", "off_distribution=null", f"out={tmp_path / 'out'}")
    assert (code, err) == (0, [])
    found = load_source("npz", tmp_path / "out" / "set.npz", group="track").train
    assert found.counts.tolist() == [43, 43, 43]
    assert [len(found.groups[found.labels == label].unique()) for label in range(3)] == [8, 8, 8]


def test_a_benchmark_says_it_once(tmp_path, capsys):
    root = as_folder(tmp_path / "set", copied=1)
    code, out, err = command(
        capsys, "benchmark", "run", "benchmark=folder", "methods=ce", "seeds=0-1", "orders=0",
        f"data_options={{path: {root}, image_size: 16}}", "training_options={epochs: 1}",
        "classifier_options={backbone: small_conv}",
        "measure_options={draws: 2}", f"out={tmp_path / 'out'}",
    )  # fmt: skip
    assert code == 0, err
    notes = [line for line in out if "note:" in line]
    assert len(notes) == 1
    assert notes[0].startswith("folder: note: 3 of 21 test images are also training images (first: test/0/dup_0.png")
