"""`export`: what timm, torchvision, ONNX and `load_classifier` make of what is written answers like the run itself."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gen_invariance import build_classifier, load_classifier
from gen_invariance.classifier.library_names import find_library_names
from gen_invariance.cli.main import run
from gen_invariance.errors import CheckpointError
from gen_invariance.experiment import export_model
from gen_invariance.run import Run

DATA = ["data=digits", "data.largest=20", "data.imbalance=5", "progress=false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert run(["train", *DATA, "classifier=small_conv", "training.epochs=2", "training.warmup=0", f"out={out}"]) == 0
    return out


def images_of(side, channels, generator):
    return torch.rand(3, channels, side, side, generator=generator)


def run_of(tmp_path, backbone, generator, **options):
    """A run folder of an untrained classifier, with the files that `export` reads."""
    model = build_classifier(backbone, num_classes=3, channels=3, generator=generator, **options)
    classifier = {"backbone": backbone, "head": "linear", "loss": "cross_entropy"}
    config = {"data": {"source": "folder"}, "classifier": classifier, "training": {"epochs": 1}, "stage": {}}
    with Run.open(tmp_path / "run", kind="train", config=config) as made:
        made.note(image_shape=[3, 40, 40])
        made.save(1, {"model": model.state_dict()})
    data = {"train": {"classes": [["a|b", 5], ["b", 4], ["c", 2]]}}
    (tmp_path / "run" / "data.json").write_text(json.dumps(data))
    return model.eval()


def test_our_own_folder_is_loaded_again(trained, tmp_path, generator, capsys):
    out = tmp_path / "model"
    assert run(["export", f"run={trained}", f"out={out}"]) == 0
    assert f'load_classifier("{out}")' in capsys.readouterr().out
    assert sorted(entry.name for entry in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    first, second = load_classifier(trained), load_classifier(out)
    images = images_of(16, 1, generator)
    assert torch.equal(first.predict(images), second.predict(images))
    assert (first.class_names, first.shape, first.about) == (second.class_names, second.shape, second.about)
    assert torch.equal(first.counts, second.counts)
    card = (out / "README.md").read_text()
    assert "Not measured" in card
    assert run(["measure", f"run={trained}", "nuisance=identity"]) == 0
    assert run(["export", f"run={trained}", f"out={out}"]) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert run(["export", f"run={trained}", f"out={out}", "overwrite=true"]) == 0
    assert "| Balanced accuracy (%) |" in (out / "README.md").read_text()
    (out / "mine.txt").write_text("mine")
    assert run(["export", f"run={trained}", f"out={out}", "overwrite=true"]) == 2
    assert (out / "mine.txt").exists()
    (out / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="export it again"):
        load_classifier(out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_torchvision_loads_the_folder(tmp_path, generator, capsys):
    models = pytest.importorskip("torchvision.models")
    model = run_of(tmp_path, "resnet18", generator)
    assert run(["export", f"run={tmp_path / 'run'}", f"out={tmp_path / 'model'}"]) == 0
    full = models.get_model("resnet18", num_classes=3).eval()
    full.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    images = images_of(40, 3, generator)
    with torch.no_grad():
        assert torch.allclose(full(model.normalise(images)), model(images), atol=1e-5)
        assert torch.allclose(load_classifier(tmp_path / "model").model(images), model(images), atol=1e-6)
    assert 'get_model("resnet18", num_classes=3)' in capsys.readouterr().out
    assert "a\\|b" in (tmp_path / "model" / "README.md").read_text()


def test_a_cosine_head_becomes_a_linear_one_that_names_the_same_classes(tmp_path, generator):
    models = pytest.importorskip("torchvision.models")
    model = run_of(tmp_path, "resnet18", generator, head="cosine")
    images = images_of(40, 3, generator)
    with torch.no_grad():
        norm = float(model.features(images).norm(dim=1).mean())
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    about["facts"]["feature_norm"] = norm
    about["config"]["classifier"]["head"] = "cosine"
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    assert run(["export", f"run={tmp_path / 'run'}", f"out={tmp_path / 'model'}"]) == 0
    full = models.get_model("resnet18", num_classes=3).eval()
    full.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    with torch.no_grad():
        expected, lengths = model(images), model.features(images).norm(dim=1, keepdim=True)
        assert torch.allclose(full(model.normalise(images)), expected * lengths / norm, atol=1e-3)
    assert "became a linear one here" in (tmp_path / "model" / "README.md").read_text()


def test_timm_loads_the_folder(tmp_path, generator):
    timm = pytest.importorskip("timm")
    model = run_of(tmp_path, "timm:test_convnext.r160_in1k", generator)
    assert run(["export", f"run={tmp_path / 'run'}", f"out={tmp_path / 'model'}"]) == 0
    full = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert full.pretrained_cfg["label_names"] == ["a|b", "b", "c"]
    images = images_of(40, 3, generator)
    with torch.no_grad():
        assert torch.allclose(full(model.normalise(images)), model(images), atol=1e-5)


@pytest.mark.slow
def test_efficientnet_lite0_is_one_of_timm(generator):
    pytest.importorskip("timm"), pytest.importorskip("efficientnet_lite_pytorch")
    model = build_classifier("efficientnet_lite0", num_classes=3, generator=generator).eval()
    found = find_library_names(model, "efficientnet_lite0", side=(64, 64))
    assert (found.library, found.architecture) == ("timm", "tf_efficientnet_lite0")


def test_a_cosine_head_keeps_our_names(generator):
    model = build_classifier("resnet18", num_classes=3, head="cosine", generator=generator)
    found = find_library_names(model, "resnet18", side=(32, 32))
    assert found.library == "gen_invariance"
    assert all(new == own for own, new in found.names.items())


@pytest.mark.slow
def test_onnx_answers_alike(trained, tmp_path, generator):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    assert run(["export", f"run={trained}", f"out={tmp_path / 'm.onnx'}", "format=onnx"]) == 0
    model = onnx.load(tmp_path / "m.onnx")
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["class_names"])[0] == "0"
    images = images_of(16, 1, generator)
    _, probabilities = ReferenceEvaluator(model).run(None, {"images": images.numpy()})
    expected = load_classifier(trained).predict(images)
    assert torch.allclose(torch.from_numpy(probabilities).double(), expected, atol=1e-5)


def test_a_full_disk_is_one_line_and_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export_model, "save_file", full)
    assert run(["export", f"run={trained}", f"out={tmp_path / 'm'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"cannot write {tmp_path / 'm'}" in said
    assert "No space left" in said
    assert not list(tmp_path.iterdir())


def test_bad_input(trained, tmp_path, capsys, monkeypatch):
    assert run(["export", f"run={trained}", f"out={tmp_path / 'm.bin'}", "format=onnx"]) == 2
    assert ".onnx" in capsys.readouterr().err
    assert run(["export", f"run={tmp_path}", f"out={tmp_path / 'm'}"]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(["export", f"run={trained}", f"out={tmp_path / 'm.onnx'}", "format=onnx"]) == 2
    assert "pip install 'gen_invariance[onnx]'" in capsys.readouterr().err
    shutil.rmtree(trained / "checkpoints")
    assert run(["export", f"run={trained}", f"out={tmp_path / 'm'}"]) == 2
    assert "holds no intact checkpoint" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
