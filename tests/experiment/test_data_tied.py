"""A run is tied to its data: changed images or classes are refused, or change nothing of what the run saw."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError, GenInvarianceError, SettingsError
from gen_invariance.experiment.evaluate import open_run, read_stage
from gen_invariance.experiment.settings import ClassifierSettings, Task, TrainRun
from gen_invariance.experiment.task import prepare
from gen_invariance.experiment.train import run_train
from gen_invariance.run import Run
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.settings import FitSettings

SIZES = {"ant": 8, "bee": 6, "cat": 4}


def write_images(root, sizes=SIZES):
    pixels = np.random.default_rng(0)
    for name, number in sizes.items():
        (root / name).mkdir(parents=True)
        for index in range(number):
            Image.fromarray(pixels.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / name / f"{index:03d}.png")


def settings_of(root, out, **changes):
    task = Task(source="folder", path=str(root), profile="none", rest_is_test=True)
    training = TrainSettings(epochs=1, warmup=0, sampling="instance", batch_size=32)
    how = {"classifier": ClassifierSettings("small_conv"), "training": training, "progress": False, **changes}
    return TrainRun(data=task, out=str(out), **how)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images and a run on it."""
    folder = tmp_path_factory.mktemp("trained")
    write_images(folder / "images")
    run_train(settings_of(folder / "images", folder / "run"))
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of both, of which the images may be changed."""
    shutil.copytree(trained, tmp_path / "copy")
    about = json.loads((tmp_path / "copy" / "run" / "run.json").read_text())
    about["config"]["data"]["path"] = str(tmp_path / "copy" / "images")
    (tmp_path / "copy" / "run" / "run.json").write_text(json.dumps(about))
    return tmp_path / "copy"


CLASSES = st.sampled_from(sorted(SIZES))
CHANGES = st.one_of(
    st.tuples(st.just("add"), CLASSES, st.sampled_from(["000a.png", "zz.png"])),
    st.tuples(st.just("remove"), CLASSES, st.integers(0, 3)),
    st.tuples(st.just("rename image"), CLASSES, st.integers(0, 3)),
    st.tuples(st.just("alter"), CLASSES, st.integers(0, 3)),
    st.tuples(st.just("swap"), CLASSES, CLASSES),
    st.tuples(st.just("rename class"), CLASSES, st.sampled_from(["aaa", "zzz"])),
    st.tuples(st.just("new class"), st.just("dog"), st.just("")),
    st.tuples(st.just("text file"), CLASSES, st.just("")),
)


def change(root, kind, name, how):
    folder = root / name
    images = sorted(folder.glob("*.png")) if folder.is_dir() else []
    if kind == "add" and folder.is_dir():
        Image.fromarray(np.full((8, 8), 9, np.uint8)).save(folder / how)
    elif kind == "remove" and len(images) > 2:
        images[how % len(images)].unlink()
    elif kind == "rename image" and images:
        images[how % len(images)].rename(folder / "renamed.png")
    elif kind == "alter" and images:
        pixels = np.asarray(Image.open(images[how % len(images)])).copy()
        pixels[3, 4] ^= 1
        Image.fromarray(pixels).save(images[how % len(images)])
    elif kind == "swap" and folder.is_dir() and (root / how).is_dir():
        folder.rename(root / "aside")
        (root / how).rename(folder) if how != name else None
        (root / "aside").rename(root / how)
    elif kind == "rename class" and folder.is_dir() and not (root / how).exists():
        folder.rename(root / how)
    elif kind == "new class" and not folder.exists():
        write_images(root, {name: 4})
    elif kind == "text file" and folder.is_dir():
        (folder / "note.txt").write_text("not an image")


def seen(prepared):
    """All that a run saw: the images, class names and class numbers of each part."""
    parts = (prepared.train, prepared.validation, prepared.test)
    return [(part.class_names, part.labels.tolist(), part.images.numpy().tobytes()) for part in parts]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_changed_data_are_refused_or_change_nothing(trained, tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(trained / "images", folder / "images")
    shutil.copytree(trained / "run", folder / "run")
    about = json.loads((folder / "run" / "run.json").read_text())
    about["config"]["data"]["path"] = str(folder / "images")
    (folder / "run" / "run.json").write_text(json.dumps(about))
    for each in changes:
        change(folder / "images", *each)
    before = seen(prepare(settings_of(trained / "images", "").data, seed=0))
    try:
        now = seen(prepare(settings_of(folder / "images", "").data, seed=0))
    except DataError:
        return  # a class without images: nothing opens it
    attempts = {
        "open": lambda: open_run(folder / "run"),
        "resume": lambda: run_train(settings_of(folder / "images", folder / "run", resume=True)),
    }
    if now == before:
        for attempt in attempts.values():
            attempt()
    else:
        for attempt in attempts.values():
            with pytest.raises(DataError, match="the data are not those of the run in"):
                attempt()
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("rename class", "bee", "zzz"), "class 'bee' is gone and class 'zzz' is new"),
        (("new class", "dog", ""), "class 'dog' is new"),
        (("remove", "ant", 0), "class 'ant' had 4 test images, now it has 3"),
        (("alter", "cat", 0), "images are others, or their pixels have changed"),
    ],
)
def test_the_first_difference_is_named(copy, changed, words):
    change(copy / "images", *changed)
    with pytest.raises(DataError, match=words):
        open_run(copy / "run")


def test_a_refused_resume_writes_nothing(copy):
    files = sorted(path for path in (copy / "run").rglob("*") if path.is_file())
    before = [path.read_bytes() for path in files]
    change(copy / "images", "add", "cat", "000a.png")
    with pytest.raises(DataError):
        run_train(settings_of(copy / "images", copy / "run", resume=True))
    assert sorted(path for path in (copy / "run").rglob("*") if path.is_file()) == files
    assert [path.read_bytes() for path in files] == before


def test_allowed_changes_of_the_settings_of_the_data_are_kept(copy):
    asked = settings_of(copy / "images", copy / "run", resume=True, seed=1)
    with pytest.raises(SettingsError, match="seed"):
        run_train(asked)
    with pytest.warns(UserWarning, match="other settings: seed"):
        run_train(settings_of(copy / "images", copy / "run", resume=True, seed=1, allow_changed_settings=True))
    open_run(copy / "run")
    change(copy / "images", "alter", "cat", 0)
    with pytest.raises(DataError):
        open_run(copy / "run")


def test_a_run_of_an_earlier_version_is_compared_by_its_split(copy):
    (copy / "run" / "data.json").unlink()
    with pytest.warns(UserWarning, match="earlier version"):
        open_run(copy / "run")
    change(copy / "images", "add", "cat", "000a.png")
    with pytest.raises(DataError, match="other images come into its training part"):
        open_run(copy / "run")


def test_a_run_with_a_relative_path_is_opened_from_elsewhere(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    run_train(settings_of("images", tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    assert len(open_run("run")[1].train) == 9


VALUES = st.one_of(
    st.sampled_from([None, True, -1, 10**30, 0.5, "", "x", [], {}, [None], {"a": 1}, "a" * 5000, "\ud800", "../.."]),
    st.recursive(st.integers() | st.text(max_size=3), st.lists, max_leaves=3),
)


def places(value, before=()):
    """The keys on the way to every value in nested mappings."""
    for name, part in value.items():
        yield (*before, name)
        if isinstance(part, dict):
            yield from places(part, (*before, name))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_description_of_a_run_is_taken_or_refused_in_one_line(trained, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzzed") / "run"
    shutil.copytree(trained / "run", folder)
    name = data.draw(st.sampled_from(["run.json", "data.json"]))
    about = json.loads((folder / name).read_text())
    *way, last = data.draw(st.sampled_from(sorted(places(about))))
    holder = about
    for key in way:
        holder = holder[key]
    holder[last] = data.draw(VALUES)
    (folder / name).write_text(json.dumps(about))
    refusal = None
    try:
        read_stage(open_run(folder)[-1])
    except GenInvarianceError as error:
        refusal = error
    assert refusal is None or (refusal.exit_code == 2 and "\n" not in str(refusal))
    shutil.rmtree(folder.parent)


def digits(**changes):
    pixels = torch.arange(6 * 16 * 16).remainder(251).to(torch.uint8).view(6, 1, 16, 16)
    return ImageData(changes.get("images", pixels), torch.tensor([0, 0, 0, 0, 1, 1]), changes.get("names", ("a", "b")))


@pytest.mark.parametrize("changes", [{"names": ("a", "c")}, {"images": torch.zeros(6, 1, 16, 16, dtype=torch.uint8)}])
def test_the_library_refuses_to_go_on_with_other_data(tmp_path, changes):
    def train(data):
        model = build_classifier("small_conv", num_classes=2, channels=1)
        fit_classifier(
            model, data, TrainSettings(epochs=1, warmup=0, sampling="instance"), out=tmp_path / "t", resume=True,
            progress=False,
        )  # fmt: skip

    def fit(data):
        loop = FitSettings(steps=1, batch_size=2, head_from=2)
        fit_translator("spatial", data, loop, out=tmp_path / "f", resume=True, progress=False)

    for do in (train, fit):
        do(digits())
        do(digits())
        with pytest.raises(DataError, match="the data are not those"):
            do(digits(**changes))


def test_a_run_in_memory_keeps_nothing():
    from gen_invariance.data.identity import tie_run

    tie_run(Run(None, kind="train"), {"train": digits()})
