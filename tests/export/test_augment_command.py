"""`augment` and its neighbours through the real command: what inspect said, what a trained classifier says, sizes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from gen_invariance import SpatialTranslator, load_source, load_translator
from gen_invariance.cli.main import run
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.augment import _Judge
from gen_invariance.experiment.evaluate import open_run
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.manifest import read_manifest
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings, target_sizes
from gen_invariance.translator.quality.verdict import weights_digest

COUNTS = {0: 30, 6: 12, 9: 6}


def as_folder(root):
    data = load_source("digits").train
    for label, count in COUNTS.items():
        (root / str(label)).mkdir(parents=True)
        for row in (data.labels == label).nonzero().flatten()[:count].tolist():
            Image.fromarray(data.images[row, 0].numpy()).save(root / str(label) / f"{row}.png")
    return root


@pytest.fixture
def photos(tmp_path):
    return as_folder(tmp_path / "photos")


def command(capsys, *words):
    capsys.readouterr()
    code = run(["augment", "progress=false", "off_distribution=null", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def translator_with_verdict(folder, word, *, in_run=False):
    """A saved translator and the file that `inspect` leaves."""
    where = folder / "translator" if in_run else folder
    SpatialTranslator(1, start=0.3).save_pretrained(where)
    about = {"verdict": word, "reasons": ["Draws hardly differ."], "translator_digest": weights_digest(where)}
    (folder / "quality.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("in_run", [False, True])
def test_the_verdict_lowers_the_strength(in_run, photos, tmp_path, capsys):
    folder = translator_with_verdict(tmp_path / "t", "use with lower strength", in_run=in_run)
    words = [f"data.path={photos}", f"translator={folder}", "target=max"]
    code, out, err = command(capsys, *words, f"out={tmp_path / 'advised'}")
    assert (code, err) == (0, [])
    assert "note: inspect says 'use with lower strength', so strength=0.5" in out
    assert "6: 12 -> 21" in out
    assert "9: 6 -> 18" in out
    assert "lacks" not in out
    if in_run:
        return
    code, out, _ = command(capsys, *words, f"out={tmp_path / 'asked'}", "strength=1")
    assert "note" not in out
    assert "9: 6 -> 30" in out
    code, out, _ = command(capsys, *words, f"out={tmp_path / 'forced'}", "force=true")
    assert "9: 6 -> 30" in out
    code, _, err = command(capsys, *words, f"out={tmp_path / 'asked'}", "strength=0.5", "resume=true")
    assert code == 2
    assert "strength changed" in err[0]


def test_a_translator_that_should_not_be_used_is_refused_unless_forced(photos, tmp_path, capsys):
    folder = translator_with_verdict(tmp_path / "t", "do not use")
    words = [f"data.path={photos}", f"translator={folder}", f"out={tmp_path / 'out'}", "target=max"]
    for more in ([], ["strength=0.5"]):
        code, out, err = command(capsys, *words, *more)
        assert (code, out, len(err)) == (2, "", 1)
        assert "inspect says 'do not use'" in err[0]
        assert "Draws hardly differ; fit a better one, or add force=true" in err[0]
        assert not (tmp_path / "out").exists()
    assert command(capsys, *words, "force=true")[0] == 0


def test_a_good_verdict_and_a_damaged_one(photos, tmp_path, capsys):
    folder = translator_with_verdict(tmp_path / "t", "use")
    words = [f"data.path={photos}", f"translator={folder}", "target=max"]
    code, out, _ = command(capsys, *words, f"out={tmp_path / 'one'}")
    assert "9: 6 -> 30" in out
    assert "note" not in out
    (folder / "quality.json").write_text("{")
    code, _, err = command(capsys, *words, f"out={tmp_path / 'two'}")
    assert code == 2
    assert "quality.json is damaged" in err[0]


@pytest.mark.parametrize("strength", ["half", "0", "1.5", "true"])
def test_strengths_that_are_none(strength, photos, tmp_path, capsys):
    folder = translator_with_verdict(tmp_path / "t", "use")
    words = [f"data.path={photos}", f"translator={folder}", f"out={tmp_path / 'out'}", f"strength={strength}"]
    code, _, err = command(capsys, *words)
    assert code == 2
    assert "strength" in err[0]


def test_goals_of_classes():
    assert target_sizes([20, 9, 3], ExportSettings(target="max")) == [20, 20, 20]
    assert target_sizes([20, 9, 3], ExportSettings(target=10, strength=0.5)) == [20, 10, 7]
    assert target_sizes([20, 9, 3], ExportSettings(target="max", strength=1e-9)) == [20, 10, 4]
    assert target_sizes([20, 0, 9], ExportSettings(target="median")) == [20, 14, 14]
    with pytest.raises(SettingsError, match="strength must be in"):
        ExportSettings(strength=0)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A real training run on the digits of `as_folder`."""
    folder = tmp_path_factory.mktemp("classifier")
    words = ["data=folder", f"data.path={as_folder(folder / 'photos')}", "data.rest_is_test=true", "progress=false"]
    words += ["data.few_below=5", "data.many_above=20", "training.epochs=12", "training.warmup=0"]
    assert run(["train", *words, f"out={folder / 'run'}"]) == 0
    return folder / "run"


def test_results_that_a_trained_classifier_takes_for_another_class_are_rejected(classifier, photos, tmp_path, capsys):
    SpatialTranslator(1, start=0.99).save_pretrained(tmp_path / "t")  # turns 6 into 9 and back
    words = [f"data.path={photos}", f"translator={tmp_path / 't'}", f"classifier={classifier}", "target=max"]
    code, out, err = command(capsys, *words, f"out={tmp_path / 'out'}", "near_copy=0")
    assert (code, err) == (0, [])
    model, translator = open_run(classifier)[0], load_translator(tmp_path / "t")
    names, said = [str(label) for label in COUNTS], {True: 0, False: 0}
    for row in read_manifest(tmp_path / "out"):
        if row["kind"] != "generated":
            continue
        source = torch.from_numpy(np.array(Image.open(photos / row["source"])))[None, None].float() / 255
        draw = translator.sample(source.shape, generator=torch.Generator().manual_seed(int(row["draw_seed"], 16)))
        with torch.no_grad():
            answer = names[int(model(translator.apply(source, draw)).argmax())]
        assert row["status"] == ("kept" if answer == row["class"] else "rejected")
        assert row["reason"] == ("" if answer == row["class"] else f"the classifier takes it for {answer!r}")
        said[answer == row["class"]] += 1
    assert said[True] > 20
    assert said[False] > 3
    assert f"{said[False]} results rejected" in out


def test_the_classifier_is_shown_what_it_was_trained_on(classifier, tmp_path):
    model, prepared, *_ = open_run(classifier)
    judge = _Judge(model, prepared.train.images.shape[1:], [2, 0, 1]).eval()
    grey = prepared.train.images[:6].float() / 255
    with torch.no_grad():
        expected = model(grey)[:, [2, 0, 1]]
        assert torch.equal(judge(grey), expected)
        assert torch.allclose(judge(grey.expand(-1, 3, -1, -1)), expected, atol=1e-4)
        wide = torch.nn.functional.pad(grey, (3, 3))  # the central square is what it was trained on
        assert torch.equal(judge(wide), expected)
        large = grey.repeat_interleave(4, 2).repeat_interleave(4, 3)
        assert (judge(large).argmax(1) == expected.argmax(1)).float().mean() > 0.8


def test_another_classifier_of_other_classes_is_refused(classifier, photos, tmp_path, capsys):
    (photos / "9").rename(photos / "nine")
    SpatialTranslator(1, start=0.3).save_pretrained(tmp_path / "t")
    words = [f"data.path={photos}", f"translator={tmp_path / 't'}", f"classifier={classifier}"]
    code, _, err = command(capsys, *words, f"out={tmp_path / 'out'}")
    assert code == 2
    assert "knows the classes 0, 6, 9..., the data 0, 6, nine..." in err[0]


def test_resuming_with_another_classifier_is_refused(photos, tmp_path):
    form, settings = open_format("folder", photos), ExportSettings(target=7, off_distribution=None)
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3)) for _ in range(2)]
    translator = SpatialTranslator(1, start=0.3)
    export_dataset(form, translator, tmp_path / "out", settings, predict=networks[0])
    export_dataset(form, translator, tmp_path / "out", settings, predict=networks[0], resume=True)
    with pytest.raises(SettingsError, match="classifier changed"):
        export_dataset(form, translator, tmp_path / "out", settings, predict=networks[1], resume=True)


@pytest.mark.parametrize("inside", [False, True])
def test_pictures_are_scaled_to_the_size_the_translator_was_fitted_at(inside, tmp_path, capsys):
    words = ["data=digits", "fit.steps=2", "fit.batch_size=4", "progress=false", f"out={tmp_path / 'fit'}"]
    assert run(["fit", *words]) == 0
    for label, count in ((0, 2), (1, 1)):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        for row in range(count):
            picture = Image.effect_noise((60, 40), 90 + row)
            picture.save(tmp_path / "photos" / str(label) / f"{row}.png")
    folder = tmp_path / "fit" / "translator" if inside else tmp_path / "fit"
    words = [f"data.path={tmp_path / 'photos'}", f"translator={folder}", "target=max", "near_copy=0"]
    for back, size in (("square", (16, 16)), ("native", (60, 40))):
        out = tmp_path / f"out-{back}"
        assert command(capsys, *words, f"out={out}", f"results={back}")[0] == 0
        (new,) = (row for row in read_manifest(out) if row["kind"] == "generated" and row["status"] == "kept")
        assert Image.open(out / new["file"]).size == size
