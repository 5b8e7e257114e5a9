"""`augment` asks what a translator is good for before it writes anything, and refuses what does harm."""

import json

import numpy as np
import pytest
from export_inputs import tree
from PIL import Image

from gen_invariance import SpatialTranslator, load_source
from gen_invariance.cli.main import run
from gen_invariance.experiment import augment
from gen_invariance.translator.quality.verdict import DO_NOT, LOWER, USE, Verdict, read_verdict, weights_digest

COUNTS = {0: 30, 1: 24, 6: 9}


@pytest.fixture
def photos(tmp_path):
    """Real digits, enough of two classes for a judge."""
    return as_folder(tmp_path / "photos")


def as_folder(root, counts=COUNTS):
    data = load_source("digits").train
    for label, count in counts.items():
        (root / str(label)).mkdir(parents=True)
        for row in (data.labels == label).nonzero().flatten()[:count].tolist():
            Image.fromarray(data.images[row, 0].numpy()).save(root / str(label) / f"{row}.png")
    return root


def command(capsys, *words):
    capsys.readouterr()
    code = run(["augment", "progress=false", "off_distribution=null", "target=max", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


class Asked:
    """Stands for the judge: counts how often it is asked, keeps its answer where it is told to."""

    def __init__(self, word):
        self.word, self.times, self.images = word, 0, None

    def __call__(self, translator, images, *, out, **_):
        self.times, self.images = self.times + 1, images
        if self.word is None:
            return None
        verdict = Verdict(self.word, ("It costs 3.1 points.",))
        if out is not None:
            about = {"verdict": self.word, "reasons": list(verdict.reasons), "translator_digest": weights_digest(out)}
            (out / "quality.json").write_text(json.dumps(about))
        return verdict


@pytest.fixture
def asked(request, monkeypatch):
    judge = Asked(request.param)
    monkeypatch.setattr(augment, "judge_translator", judge)
    return judge


@pytest.fixture
def translator(tmp_path):
    SpatialTranslator(1, start=0.2).save_pretrained(tmp_path / "t")
    return tmp_path / "t"


@pytest.mark.parametrize("asked", [DO_NOT], indirect=True)
def test_harm_is_refused_before_anything_is_written(asked, photos, translator, tmp_path, capsys):
    before, weights = tree(photos), tree(translator)
    words = [f"data.path={photos}", f"translator={translator}", f"out={tmp_path / 'out'}"]
    code, out, err = command(capsys, *words)
    assert (code, len(err), asked.times) == (2, 1, 1)
    assert "'do not use' of the translator in" in err[0]
    assert "It costs 3.1 points; fit a better one, or add force=true" in err[0]
    assert out == "do not use: It costs 3.1 points.\n"
    assert not (tmp_path / "out").exists()
    assert (tree(photos), tree(translator)) == (before, weights)
    code, out, _ = command(capsys, *words, "force=true")
    assert (code, asked.times) == (0, 1)
    assert "6: 9 -> 30" in out


@pytest.mark.parametrize("asked", [DO_NOT], indirect=True)
def test_a_translator_that_was_just_fitted_is_refused_too(asked, photos, tmp_path, capsys):
    words = [f"data.path={photos}", f"out={tmp_path / 'out'}", "fit=true", "learn.translator=spatial", "learn.steps=3"]
    words += ["learn.batch_size=4"]
    assert command(capsys, *words)[0] == 2
    assert not (tmp_path / "out").exists()
    assert read_verdict(tmp_path / "out-translator").word == DO_NOT
    code, _, err = command(capsys, *words, "resume=true")  # what was said is kept, and nobody asked again
    assert (code, asked.times) == (2, 1)
    assert "out-translator: It costs 3.1 points" in err[0]
    assert command(capsys, *words, "resume=true", "force=true")[0] == 0


@pytest.mark.parametrize(("asked", "share"), [(USE, 30), (LOWER, 20), (None, 30)], indirect=["asked"])
def test_what_is_said_decides_how_many_are_made(asked, share, photos, translator, tmp_path, capsys, monkeypatch):
    words = [f"data.path={photos}", f"translator={translator}", f"out={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr("gen_invariance.export.runner.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command(capsys, *words)
    code, out, _ = command(capsys, *words, "resume=true")
    assert (code, asked.times) == (0, 1)  # what was said when it began holds
    assert f"6: 9 -> {share}" in out
    assert asked.images.images.shape == (63, 1, 16, 16)


def test_the_judge_itself_is_asked(photos, tmp_path, capsys):
    SpatialTranslator(1, start=0.0).save_pretrained(tmp_path / "t")  # changes nothing
    words = [f"data.path={photos}", f"translator={tmp_path / 't'}", f"out={tmp_path / 'out'}"]
    code, out, err = command(capsys, *words)
    assert code == 2
    assert "training a judge on" in out
    assert "'do not use'" in err[0]
    assert not (tmp_path / "out").exists()


def test_what_the_judge_says_of_a_fit_lies_beside_it(photos, tmp_path, capsys):
    words = [f"data.path={photos}", f"out={tmp_path / 'out'}", "fit=true", "learn.translator=spatial", "learn.steps=3"]
    code, out, err = command(capsys, *words, "learn.batch_size=4", "learn.objective_options={learning_rate: 1e-9}")
    verdict = read_verdict(tmp_path / "out-translator")
    assert f"{verdict.word}: {verdict.reasons[0]}" in out
    assert (code, (tmp_path / "out").exists()) == ((2, False) if verdict.word == DO_NOT else (0, True))
    assert "translated" in (tmp_path / "out-translator" / "inspect.html").read_text()
    assert len(err) == (code == 2)


def test_too_few_images_to_tell(translator, tmp_path, capsys):
    root = as_folder(tmp_path / "in", {0: 12, 1: 5})
    code, out, err = command(capsys, f"data.path={root}", f"translator={translator}", f"out={tmp_path / 'out'}")
    assert (code, err) == (0, [])
    assert "note: nobody can say whether this translator helps here" in out
    assert "1: 5 -> 12" in out


@pytest.mark.parametrize("asked", [USE], indirect=True)
def test_where_nothing_lacks_nothing_is_fitted_or_asked(asked, tmp_path, capsys):
    root = as_folder(tmp_path / "in", {0: 12, 1: 12})
    words = [f"data.path={root}", f"out={tmp_path / 'out'}", "fit=true"]
    code, out, err = command(capsys, *words)
    assert (code, err, asked.times) == (0, [], 0)
    assert "no class lacks images to the target" in out
    assert not (tmp_path / "out-translator").exists()
    written = tree(tmp_path / "out")
    assert {name: written[name] for name in tree(root)} == tree(root)
    assert command(capsys, *words, "resume=true")[0] == 0


@pytest.mark.parametrize("asked", [USE], indirect=True)
def test_pictures_of_several_sizes_are_fitted_on_squares_and_keep_their_size(asked, tmp_path, capsys):
    for name, count in (("few", 3), ("many", 24)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
            size = (90, 70) if number % 2 else (70, 100)
            Image.fromarray(noise).resize(size).save(tmp_path / "in" / name / f"{number}.jpg")
    words = [f"data.path={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "fit=true", "learn.steps=2", "near_copy=0"]
    code, out, err = command(capsys, *words, "learn.network_options={parts: [tone], kind: photo}")
    assert (code, err) == (0, [])
    assert "fitting on squares of 64 x 64 pixels" in out
    assert asked.images.images.shape == (27, 3, 64, 64)
    assert "few: 3 -> 24" in out
    sizes = [Image.open(file).size for file in sorted((tmp_path / "out").glob("few/*__*.jpg"))]
    assert sorted(set(sizes)) == [(70, 100), (90, 70)]
    assert len(sizes) == 21


def test_a_translator_whose_results_cannot_have_the_size_is_refused(tmp_path, capsys, monkeypatch):
    """Strokes are counted in pixels, so figures of 64 pixels are not those of 16, and turned ones cannot be brought."""
    data = load_source("digits").train
    for label, count in {0: 24, 6: 9}.items():
        (tmp_path / "in" / str(label)).mkdir(parents=True)
        for row in (data.labels == label).nonzero().flatten()[:count].tolist():
            large = Image.fromarray(data.images[row, 0].numpy()).resize((64, 64), Image.Resampling.BICUBIC)
            large.save(tmp_path / "in" / str(label) / f"{row}.png")
    monkeypatch.setattr(augment, "judge_translator", Asked(USE))
    words = [f"data.path={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "fit=true", "learn.translator=munit_small"]
    words += ["learn.steps=2", "learn.batch_size=4", "data.image_size=16"]
    code, _, err = command(capsys, *words)
    assert (code, len(err)) == (2, 1)
    assert "works at 16 pixels and moves or redraws shapes" in err[0]
    assert "fit one with data.image_size=64, or set results=square for results of 16 pixels" in err[0]
    assert not (tmp_path / "out").exists()
    assert command(capsys, *words, "resume=true", "results=square", "near_copy=0")[0] == 0


@pytest.mark.parametrize("budget", ["soon", "0s", "10"])
def test_a_time_that_is_none(budget, photos, translator, tmp_path, capsys):
    words = [f"data.path={photos}", f"translator={translator}", f"out={tmp_path / 'out'}", f"judge_budget={budget}"]
    code, _, err = command(capsys, *words)
    assert code == 2
    assert "judge_budget" in err[0]
