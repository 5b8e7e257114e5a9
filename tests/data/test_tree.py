"""What a folder of images holds: parts, classes, files. Trees of every kind are made, and two readers have to agree."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gen_invariance import load_source, open_format
from gen_invariance.data.readers.folder import read_image_folder
from gen_invariance.data.readers.tree import choose_test_part, find_parts
from gen_invariance.errors import DataError, GenInvarianceError


def put(root, *names):
    """Small pictures under these names, each another."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 10, 200)).save(path, format="PNG")
    return root


def counts(root):
    train = load_source("folder", root).train
    return dict(zip(train.class_names, train.counts.tolist(), strict=True))


def exported(root, part="train"):
    """(key, class) of what an export takes over of a part."""
    data = open_format("folder", root)
    found = [entry for entry in data.entries() if entry.part == part and not entry.ignored and not entry.problem]
    return sorted((entry.key, data.class_names[entry.label] if entry.label >= 0 else "") for entry in found)


TRAINING = ["train", "Train", "TRAIN", "training", "Training", "train_set", "training-data", "train2017"]
OTHERS = [
    "test",
    "Test",
    "testing",
    "valid",
    "val",
    "VAL",
    "validation",
    "eval",
    "evaluation",
    "dev",
    "test_set",
    "val2017",
]


@given(training=st.sampled_from(TRAINING), others=st.sets(st.sampled_from(OTHERS), max_size=3), flat=st.booleans())
@settings(max_examples=40, deadline=None)
def test_parts_under_any_name_are_all_taken_over(tmp_path_factory, training, others, flat):
    root = tmp_path_factory.mktemp("parts")
    put(root, *(f"{training}/{name}/{number}.png" for name in ("cat", "dog") for number in range(3)))
    for part in others:
        put(root, f"{part}/cat/7.png", f"{part}/owl/8.png", *([f"{part}/9.png"] if flat else []))
    (root / "annotations").mkdir()
    (root / "annotations" / "boxes.json").write_text("{}")
    assert find_parts(root) == {"train": root / training, **{part: root / part for part in others}}
    assert exported(root) == sorted(
        (f"{training}/{name}/{number}.png", name) for name in ("cat", "dog") for number in range(3)
    )
    for part in others:
        stray = [(f"{part}/9.png", "")] if flat else []
        assert exported(root, part) == sorted([(f"{part}/cat/7.png", "cat"), (f"{part}/owl/8.png", ""), *stray])


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["val", "test"], "test"),
        (["valid", "Testing"], "Testing"),
        (["eval", "val"], "eval"),
        (["validation"], "validation"),
        (["train", "extra"], None),
    ],
)
def test_the_part_that_is_tested_on(names, chosen):
    assert choose_test_part(names) == chosen


def test_the_reader_tests_on_one_part_and_names_the_others(tmp_path):
    put(tmp_path, "Training/cat/1.png", "Training/dog/2.png", "Testing/cat/3.png", "valid/dog/4.png")
    source = load_source("folder", tmp_path)
    assert source.train.counts.tolist() == [1, 1]
    assert source.test.counts.tolist() == [1, 0]
    assert source.test_files == ("Testing/cat/3.png",)
    assert source.notes == (f"note: {tmp_path / 'valid'} is neither trained nor tested on",)


def test_a_class_may_be_called_train(tmp_path):
    put(tmp_path, "bus/1.png", "train/2.png", "train/night/3.png", "car/4.png", "car/day/5.png")
    assert find_parts(tmp_path) == {}
    assert counts(tmp_path) == {"bus": 1, "car": 2, "train": 2}
    assert len(exported(tmp_path)) == 5


def test_images_below_a_class_folder_are_of_that_class(tmp_path):
    put(tmp_path, *(f"cat/day/{number}.png" for number in range(10)), "cat/1.png", "dog/2.png", "cat/night/deep/3.png")
    (tmp_path / "cat" / "empty.png").mkdir()
    assert counts(tmp_path) == {"cat": 12, "dog": 1}
    assert [key for key, name in exported(tmp_path) if name == "cat"].count("cat/night/deep/3.png") == 1
    assert len(exported(tmp_path)) == 13


def test_groups_may_be_folders_inside_a_class(tmp_path):
    put(tmp_path, "ill/p1/1.png", "ill/p1/2.png", "ill/p2/1.png", "well/p3/1.png")
    data, report = read_image_folder(tmp_path, group="^([^/]+)/")
    assert report.groups == ("p1", "p1", "p2", "p3")
    assert len(data.groups.unique()) == 3


UNCLEAR = {
    "parts without training": (["test/cat/1.png", "val/cat/2.png"], "no training part"),
    "parts without classes": (["train/1.png", "test/2.png"], "no training part"),
    "two training parts": (["train/cat/1.png", "training/cat/2.png", "test/cat/3.png"], "2 training parts"),
    "a flat one beside it": (["train/1.png", "training/cat/2.png", "test/cat/3.png"], "2 training parts"),
    "one folder around all": (["photos/cat/1.png", "photos/dog/2.png"], "holds one folder"),
    "the same folders in each": (["a/cat/1.png", "a/dog/2.png", "b/cat/3.png", "b/dog/4.png"], "all hold the folders"),
    "a part or a class": (["train/cat/1.png", "more/cat/2.png"], "may be a part or a class"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, kind):
    names, words = UNCLEAR[kind]
    put(tmp_path, *names)
    for read in (lambda: load_source("folder", tmp_path), lambda: open_format("folder", tmp_path)):
        with pytest.raises(DataError) as caught:
            read()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


LITTER = ["__MACOSX/cat/._1.png", "__MACOSX/._cat", "cat/Thumbs.db", "cat/desktop.ini", "cat/.DS_Store", "cat/._1.png",
          "@eaDir/cat/1.png", "Thumbs.db", "cat/Icon\r", "cat/__MACOSX/._2.png"]  # fmt: skip


@given(names=st.sets(st.sampled_from(LITTER)))
@settings(max_examples=30, deadline=None)
def test_what_operating_systems_leave_is_no_class_and_no_image(tmp_path_factory, names):
    root = put(tmp_path_factory.mktemp("litter"), "cat/1.png", "dog/2.png")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7" + bytes(60))
    assert counts(root) == {"cat": 1, "dog": 1}
    assert load_source("folder", root).notes == ()
    assert [entry.key for entry in open_format("folder", root).entries()] == ["cat/1.png", "dog/2.png"]


UNREAD = {
    "cat/a.heic": b"\0\0\0\x18ftypheic",
    "cat/a.dcm": b"DICM",
    "cat/a.png.bak": b"\x89PNG\r\n\x1a\n",
    "cat/a.tmp": b"\xff\xd8\xff\xe0",
    "cat/deep/a.svg": b"<svg/>",
}


@pytest.mark.parametrize("name", UNREAD)
def test_pictures_that_are_not_read_are_named(tmp_path, name):
    put(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(UNREAD[name])
    with pytest.raises(DataError, match=name.rpartition("/")[2]):
        load_source("folder", tmp_path)
    source = load_source("folder", tmp_path, skip_corrupt=True)
    assert [path for path, _ in source.skipped] == [tmp_path / name]
    assert [entry.key for entry in open_format("folder", tmp_path).entries() if entry.problem] == [name]


def test_other_files_are_said_to_be_left_out(tmp_path):
    put(tmp_path, "cat/1.png", "cat/noending", "dog/2.png")
    (tmp_path / "cat" / "notes.txt").write_text("a note")
    (tmp_path / "cat" / "readme").write_text("another")
    source = load_source("folder", tmp_path)
    assert source.notes == (
        f"note: 2 files are not read, the first is {tmp_path / 'cat/notes.txt'}: no image by its name",
    )
    assert counts(tmp_path) == {"cat": 2, "dog": 1}  # a picture without an ending is one
    listed = {entry.key: entry.ignored for entry in open_format("folder", tmp_path).entries() if entry.ignored}
    assert listed == dict.fromkeys(("cat/notes.txt", "cat/readme"), "no image by its name")


def test_links_do_not_lead_in_circles(tmp_path):
    root = put(tmp_path / "set", "cat/1.png", "dog/2.png")
    (root / "cat" / "again").symlink_to(root)
    entries = open_format("folder", root).entries()
    assert [entry.key for entry in entries if entry.problem] == ["cat/again"]
    with pytest.raises(DataError, match="a link to a folder"):
        load_source("folder", root)
    (root / "cat" / "again").unlink()
    (root / "cat" / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match="cannot be read"):
        load_source("folder", root)
    (root / "cat" / "loop.png").unlink()
    (root / "all").symlink_to(root)
    for read in (lambda: load_source("folder", root), lambda: open_format("folder", root)):
        with pytest.raises(DataError, match="links to a folder that holds it"):
            read()
    (root / "all").unlink()
    (root / "owl").symlink_to(put(tmp_path / "owls", "3.png"))  # a class elsewhere
    assert counts(root) == {"cat": 1, "dog": 1, "owl": 1}


NAMES = st.sampled_from(
    ["cat", "dog", "train", "Test", "val", "1.png", "2.png", "a.txt", ".x.png", "Thumbs.db", "__MACOSX"]
)


@given(files=st.sets(st.lists(NAMES, min_size=2, max_size=4).map("/".join), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_whatever_the_tree_no_image_is_lost_and_both_readers_agree(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("any")
    made = []
    for name in files:
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir() and path.suffix in (".png", ".txt", ".db"):
                put(root, name) if path.suffix == ".png" else path.write_text("x")
                made.append(name)
        except OSError:  # a file where a folder should be
            continue
    pictures = {name for name in made if name.endswith(".png") and not {".x.png", "__MACOSX"} & set(name.split("/"))}
    try:
        data = open_format("folder", root)
        entries = data.entries()
    except GenInvarianceError:
        with pytest.raises(GenInvarianceError):
            load_source("folder", root)
        return
    assert {
        entry.key for entry in entries if entry.key.endswith(".png")
    } == pictures  # each is somewhere, with its fate
    assert len({entry.key for entry in entries}) == len(entries)
    taken = [entry for entry in entries if entry.part == "train" and not entry.ignored]
    try:
        train = load_source("folder", root).train
    except GenInvarianceError:
        return  # an empty class, which an export takes as it is, or a test class that training lacks
    assert train.class_names == data.class_names
    assert train.labels.tolist() == [entry.label for entry in taken]


@pytest.mark.parametrize(
    ("images", "note"),
    [
        (("images/train/0.jpg", "images/val/1.jpg"), "labels/train/0.txt"),
        (("train/images/0.jpg", "valid/images/1.jpg"), "train/labels/0.txt"),
        (("JPEGImages/0.jpg",), "Annotations/0.xml"),
        (("train2017/0.jpg", "val2017/1.jpg"), "annotations/instances_train2017.json"),
        (("train/0.jpg", "test/1.jpg"), "train/_annotations.coco.json"),
    ],
)
def test_sets_with_boxes_are_refused_by_their_kind(tmp_path, images, note):
    root = put(tmp_path, *images)
    (root / note).parent.mkdir(parents=True, exist_ok=True)
    (root / note).write_text("0 .5 .5 .1 .1")
    for read in (counts, exported):
        with pytest.raises(DataError, match=r"object detection .*cut the boxes out into a folder for each class"):
            read(root)


def test_classes_may_be_called_images_and_labels(tmp_path):
    root = put(tmp_path, "images/0.jpg", "labels/1.jpg")
    (root / "labels" / "1.txt").write_text("a caption")
    assert counts(root) == {"images": 1, "labels": 1}
