import dataclasses
import json
import re

import pytest
import torch

from gen_invariance.augment.policy import auto
from gen_invariance.cli.main import run
from gen_invariance.errors import CheckpointError, DataError, SettingsError
from gen_invariance.experiment import inspect as inspecting
from gen_invariance.experiment.inspect import (
    Truth,
    differences_from_fit,
    inspect_translator,
    obey_verdict,
    output_folder,
    policy_from_verdict,
    select_head_classes,
    write_inspection,
)
from gen_invariance.experiment.settings import InspectSettings, StageSettings, Task
from gen_invariance.experiment.task import prepare
from gen_invariance.nuisance.compose import Compose, Identity
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Lighting
from gen_invariance.translator.io import save_translator
from gen_invariance.translator.quality.inspection import compare_parameters
from gen_invariance.translator.quality.verdict import (
    DO_NOT,
    LOWER,
    USE,
    Gain,
    judge_by_gain,
    read_verdict,
    weights_digest,
)
from gen_invariance.translator.spatial import SpatialTranslator

TASK = Task(
    largest=110, imbalance=22, rest_is_test=True, nuisance="rotation", many_above=44, few_below=20, shuffle_order=False
)
SETTINGS = InspectSettings(judge_epochs=25)
EVIL = "<script>alert(1)</script>"


class Noise:
    def sample(self, shape, *, generator):
        return {"noise": torch.rand(tuple(shape), generator=generator)}

    def apply(self, images, draw):
        return draw["noise"].to(images)


@pytest.fixture(scope="module")
def prepared():
    return prepare(TASK, seed=0)


@pytest.fixture(scope="module")
def good(prepared):
    said = []
    truth = Truth(prepared.nuisance, prepared.originals("train"))
    return inspect_translator(Rotation(180), prepared.train, SETTINGS, truth=truth, say=said.append), said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with a translator in it that turns by every angle."""
    path = tmp_path_factory.mktemp("run")
    translator = SpatialTranslator(operations=("rotation",), start=1.0)
    save_translator(translator.eval(), path / "translator")
    about = {"kind": "fit", "seed": 0, "config": {"data": TASK.identity()}}
    (path / "run.json").write_text(json.dumps(about))
    return path


def test_the_true_rotation_may_be_used(good):
    found, said = good
    assert found.quality.verdict.word == USE, found.quality.verdict
    assert found.oracle.verdict.word == USE
    assert found.quality.figures["accuracy"].floor > 0.6  # the judge learned something
    assert len(said) == 3
    assert "judge" in said[0]


def test_noise_must_not_be_used(prepared):
    found = inspect_translator(Noise(), prepared.train, dataclasses.replace(SETTINGS, judge_epochs=4))
    assert found.quality.verdict.word == DO_NOT
    assert found.oracle is None


def test_judge_and_translations_share_no_image(good, prepared):
    found, _ = good
    head = found.head
    assert set(head.counts.tolist()) <= set(prepared.train.counts[prepared.train.counts >= 20].tolist())
    assert len(found.held_out.unique()) == len(found.held_out) == int(found.quality.count_by_class.sum())
    assert abs(len(found.held_out) - len(head) / 2) < head.num_classes
    assert found.examples.shape[:2] == (head.num_classes, 9)
    assert torch.equal(head.float_images(found.held_out)[0], found.examples[:, 0][int(head.labels[found.held_out][0])])


def test_the_same_seed_gives_the_same_figures(prepared):
    short = dataclasses.replace(SETTINGS, judge_epochs=2)
    found = [inspect_translator(Rotation(180), prepared.train, short, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (each.quality.to_json() for each in found)
    assert first == again
    assert first != other


def test_head_classes_are_renumbered(prepared):
    head = select_head_classes(prepared.train, head_from=50)
    assert head.counts.tolist() == prepared.train.counts[prepared.train.counts >= 50].tolist()
    assert head.class_names == tuple("0123")[: head.num_classes]
    rows = torch.isin(prepared.train.labels, torch.arange(head.num_classes)).nonzero()[:, 0]
    assert torch.equal(head.images, prepared.train.images[rows])
    with pytest.raises(DataError, match="a judge needs two"):
        select_head_classes(prepared.train, head_from=110)


@pytest.mark.parametrize(
    "changes",
    [{"held_out": 1.0}, {"draws": 1}, {"head_from": 1}, {"judge_epochs": 0}, {"max_images": 5}, {"failures": -1}],
)
def test_settings_out_of_range_are_named(changes):
    with pytest.raises(SettingsError, match=f"inspect.{next(iter(changes))}"):
        InspectSettings(**changes)


def test_parameters_are_compared_with_the_truth(prepared):
    images = prepared.train.float_images(torch.arange(200))
    narrow, same = (compare_parameters(which, images, truth=Rotation(90))[0] for which in (Rotation(45), Rotation(90)))
    assert narrow.name == "rotation"
    assert narrow.drawn.shape == (16, 200)
    assert narrow.distance[0] == pytest.approx(0.25, abs=0.03)  # of uniform on +-45 from uniform on +-90
    assert same.distance[0] < 2 * same.distance[1]
    assert narrow.resultant.value == pytest.approx(0.90, abs=0.01)  # sin(a) / a at 45 degrees
    names = [each.name for each in compare_parameters(Compose([Rotation(9), Lighting()]), images)]
    assert names == ["rotation", "brightness", "contrast", "gamma"]
    assert compare_parameters(Noise(), images) == ()
    assert compare_parameters(Identity(), images, truth=Rotation(9)) == ()


def test_a_learned_translator_shows_its_parameters(prepared):
    translator = SpatialTranslator(operations=("rotation", "gain"), start=0.25)
    found = compare_parameters(translator, prepared.train.float_images(torch.arange(50)), truth=Rotation(180))
    assert [each.name for each in found] == ["rotation", "gain"]
    assert found[0].drawn.abs().max() <= 45
    assert found[0].distance[0] == pytest.approx(0.375, abs=0.04)
    assert found[1].true is None
    assert found[1].resultant is None


def test_the_page_holds_everything_and_escapes_names(good, folder, tmp_path):
    found, _ = good
    names = (EVIL, *found.head.class_names[1:])
    evil = dataclasses.replace(found, head=dataclasses.replace(found.head, class_names=names))
    facts = TASK.identity()
    page = write_inspection(evil, tmp_path, translator=folder, data=facts, settings=SETTINGS, seed=0).read_text()
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert "//" not in re.sub(r"data:image/png;base64,[^\"]+", "", page)
    for figure in found.quality.figures.values():
        assert f"{figure.estimate.value:.3f}" in page
    for reason in found.quality.verdict.reasons:
        assert reason.split(" (")[0] in page
    assert page.count("<img ") == 3 == len(re.findall(r'alt="[^"]{20,}"', page))

    about = json.loads((tmp_path / "quality.json").read_text())
    assert about["verdict"] == "use"
    assert about["oracle"]["verdict"] == "use"
    assert about["parameters"]["rotation"]["kolmogorov_distance"] < 0.1
    assert about["figures"]["precision"]["untouched"] > 0.9


def test_a_measured_gain_leads_the_page(good, folder, tmp_path):
    found, _ = good
    verdict = judge_by_gain(Gain(2.1, 0.8, 3.4, "trivialaugment"), found.quality.verdict.reasons)
    judged = dataclasses.replace(found, quality=dataclasses.replace(found.quality, verdict=verdict))
    facts = TASK.identity()
    page = write_inspection(judged, tmp_path, translator=folder, data=facts, settings=SETTINGS, seed=0).read_text()
    assert page.index(f"<strong>{verdict.reasons[0]}</strong>") < page.index("Use.")
    assert page.count(verdict.reasons[0]) == 1
    about = json.loads((tmp_path / "quality.json").read_text())
    assert about["gain"] == {"points": 2.1, "low": 0.8, "high": 3.4, "against": "trivialaugment"}


def test_a_folder_is_inspected_and_its_verdict_written_beside_it(folder, prepared):
    short = dataclasses.replace(SETTINGS, judge_epochs=2, failures=0)
    found = inspect_translator(folder, prepared.train, short, out=output_folder(folder))
    assert read_verdict(folder).word == found.quality.verdict.word
    assert "(nuisance in the data" not in (folder / "inspect.html").read_text()
    for name in ("quality.json", "inspect.html"):
        (folder / name).unlink()


def test_the_policy_follows_the_verdict(folder):
    counts = torch.tensor([100, 40, 5])
    assert torch.equal(policy_from_verdict(counts, folder), auto(counts))
    assert torch.equal(policy_from_verdict(counts, None), auto(counts))
    path = output_folder(folder / "translator") / "quality.json"
    for word, factor in ((USE, 1), (LOWER, 0.5), (DO_NOT, 0)):
        about = {"verdict": word, "reasons": [], "translator_digest": weights_digest(folder)}
        path.write_text(json.dumps(about))
        assert read_verdict(folder / "translator").word == word
        assert torch.allclose(policy_from_verdict(counts, folder), auto(counts) * factor)
        stage = StageSettings(nuisance="translator+randaugment")
        assert obey_verdict(stage, folder).policy_options.get("maximum", 0.5) == 0.5 * factor
        stage = dataclasses.replace(stage, policy_options={"maximum": 0.8})
        assert obey_verdict(stage, folder).policy_options == {"maximum": 0.8 * factor}
        for other in ({"nuisance": "true"}, {"policy": "everywhere"}):
            stage = dataclasses.replace(StageSettings(nuisance="translator"), **other)
            assert obey_verdict(stage, folder) == stage
    path.unlink()


def test_other_data_than_the_fit_are_named(folder, tmp_path):
    assert differences_from_fit(folder, TASK, seed=0) == []
    other = dataclasses.replace(TASK, nuisance="identity")
    assert differences_from_fit(folder, other, seed=2) == ["data.nuisance=rotation", "seed=0"]
    assert differences_from_fit(folder / "translator", other, seed=0) == ["data.nuisance=rotation"]
    assert differences_from_fit(tmp_path, TASK, seed=0) == []
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(CheckpointError, match="damaged"):
        differences_from_fit(tmp_path, TASK, seed=0)


def test_the_command(folder, capsys):
    given = [f"translator={folder}", "data=digits_rotation", "data.shuffle_order=false", "inspect.judge_epochs=5"]
    assert run(["inspect", *given, "inspect.budget=null", "seed=1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "fitted with seed=0" in out
    assert out.splitlines()[-1] == f"page: {folder / 'inspect.html'}"
    assert read_verdict(folder).word in out.splitlines()
    (folder / "quality.json").unlink()


def test_train_obeys_the_verdict(folder, tmp_path, capsys):
    about = {"verdict": LOWER, "reasons": [], "translator_digest": weights_digest(folder)}
    (folder / "quality.json").write_text(json.dumps(about))
    given = ["stage=translator", f"stage.translator={folder}", "training.epochs=2", f"out={tmp_path / 'train'}"]
    assert run(["train", *given]) == 0
    assert "use with lower strength" in capsys.readouterr().out
    settings = json.loads((tmp_path / "train" / "run.json").read_text())["config"]
    assert settings["stage"]["policy_options"] == {"maximum": 0.25}
    (folder / "quality.json").write_text(json.dumps({**about, "verdict": DO_NOT}))
    assert run(["train", *given[:-1], f"out={tmp_path / 'plain'}"]) == 0
    said = capsys.readouterr().out
    assert "note: inspect says 'do not use', so nothing is translated; " in said
    assert "weaker" not in said
    (folder / "quality.json").unlink()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["translator=nowhere"], "no translator in nowhere"),
        ([], "translator"),
        (["inspect.draws=1"], "inspect.draws must be at least 2"),
        (["inspect.drawz=1"], "drawz"),
        (["inspect.head_from=500"], "a judge needs two"),
        (["inspect.judge=resnet9000"], "resnet9000"),
    ],
)
def test_bad_input_is_one_line(given, match, folder, capsys):
    if given and not given[0].startswith("translator"):
        given = [f"translator={folder}", *given]
    assert run(["inspect", *given]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert match in err
    assert not (folder / "quality.json").exists()


def test_the_judge_has_seen_no_other_image_of_what_is_looked_at(prepared, monkeypatch):
    train = dataclasses.replace(prepared.train, groups=torch.arange(len(prepared.train)) // 4)
    seen, looked_at = [], []
    monkeypatch.setattr(inspecting, "train_judge", lambda data, *_, **__: seen.append(data))

    class Stop(Exception):
        pass

    def stop(nuisance, data, **_):
        looked_at.append(data.groups)
        raise Stop

    monkeypatch.setattr(inspecting, "assess", stop)
    with pytest.raises(Stop):
        inspect_translator(Rotation(180), train, SETTINGS)
    assert len(looked_at[0]) > 100
    assert not set(seen[0].groups.tolist()) & set(looked_at[0].tolist())


def test_other_groups_than_at_the_fit_are_named(tmp_path):
    about = {"kind": "fit", "seed": 0, "config": {"data": {"group": "track"}}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert differences_from_fit(tmp_path, Task(), seed=0) == ["data.group=track"]
    assert not differences_from_fit(tmp_path, Task(group="track"), seed=0)
    (tmp_path / "run.json").write_text(json.dumps({**about, "config": {"data": {}}}))
    assert differences_from_fit(tmp_path, Task(group="track"), seed=0) == ["data.group=None"]


def test_a_translator_that_augment_fitted_is_known_by_the_path_of_its_data(tmp_path):
    about = {"kind": "fit", "seed": 3, "config": {"learn": {"steps": 2}, "data": "photos", "image_size": 16}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert differences_from_fit(tmp_path, Task(source="folder", path="photos"), seed=3) == []
    assert differences_from_fit(tmp_path, Task(source="folder", path="other"), seed=0) == ["data.path=photos", "seed=3"]
