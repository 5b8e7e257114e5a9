import json
import subprocess
import sys
from pathlib import Path

import diffusers.utils.hub_utils
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from gen_invariance.contrib import pipeline as module
from gen_invariance.contrib.pipeline import TranslationPipeline
from gen_invariance.errors import CheckpointError, DataNotFoundError, OutputError, SettingsError, ShapeError
from gen_invariance.translator.munit.model import MunitTranslator
from gen_invariance.translator.redraw.pose import PoseTranslator
from gen_invariance.translator.spatial import SpatialTranslator


def made(kind, channels=1):
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        if kind == "munit":
            translator = MunitTranslator(channels, width=4, residual_blocks=1, mlp_width=8)
        elif kind == "pose":
            translator = PoseTranslator(channels, width=4, bank_size=16)
        else:
            translator = SpatialTranslator(channels, start=0.5)
    pipeline = TranslationPipeline(translator.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(count=5, channels=1, size=16):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture
def saved(tmp_path):
    made("spatial").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


QUALITY = {
    "verdict": "use",
    "reasons": ["fine | <b>"],
    "translator_digest": "0",
    "data": {"source": "digits", "path": "/home/somebody/x"},
    "figures": {"precision": {"value": 0.9, "low": 0.8, "high": None, "untouched": 0.95}},
}


@pytest.mark.parametrize("kind", ["spatial", "munit", "pose"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_pipeline_gives_the_same_bits(kind, channels, tmp_path):
    pipeline, source = made(kind, channels), images(channels=channels)
    pipeline.save_pretrained(tmp_path)
    again = TranslationPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    moved = pipeline(source, num_draws=3, generator=seeded())
    assert moved.shape == (5, 3, channels, 16, 16)
    assert moved.dtype == torch.float32
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert torch.equal(moved, again(source, num_draws=3, generator=seeded()))
    for name, weights in pipeline.translator.state_dict().items():
        assert torch.equal(weights, again.translator.state_dict()[name]), name
    assert not again.translator.training


def test_it_draws_what_the_translator_draws():
    pipeline, source, generator = made("munit"), images(), seeded(3)
    translator, expected = pipeline.translator, []
    for _ in range(2):
        draw = translator.sample(source.shape, generator=generator)
        expected.append(translator.apply(source, draw))
    moved = pipeline(source, num_draws=2, generator=seeded(3))
    assert torch.allclose(moved, torch.stack(expected, 1), atol=1e-6)
    assert torch.allclose(moved, pipeline(source, num_draws=2, generator=seeded(3), batch_size=2), atol=1e-5)
    assert not torch.allclose(moved[:, 0], moved[:, 1], atol=1e-4)
    assert not torch.equal(pipeline(source), pipeline(source))  # no generator: drawn afresh


def test_pil_images_and_bytes_are_the_same_as_floats():
    pipeline, bytes_ = made("spatial"), (images() * 255).round().byte()
    pil = [Image.fromarray(image.numpy()) for image in bytes_[:, 0]]
    expected = pipeline(bytes_.float() / 255, generator=seeded())
    assert torch.equal(pipeline(bytes_, generator=seeded()), expected)
    assert torch.equal(pipeline(pil, generator=seeded()), expected)
    assert torch.equal(pipeline([image.convert("RGB") for image in pil], generator=seeded()), expected)
    assert torch.equal(pipeline(pil[0], generator=seeded()), pipeline(pil[:1], generator=seeded()))
    colour = Image.fromarray((images(1, 3)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    assert made("spatial", 3)([colour, colour], num_draws=2).shape == (2, 2, 3, 16, 16)


def test_strength_goes_from_the_image_to_the_full_translation():
    pipeline, source = made("spatial"), images()
    full, none, half = (pipeline(source, strength=s, generator=seeded())[:, 0] for s in (1.0, 0.0, 0.1))
    assert torch.allclose(none, source, atol=1e-5)
    assert 0.001 < (half - source).abs().mean() < (full - source).abs().mean()

    pipeline = made("munit")
    translator = pipeline.translator
    with torch.no_grad():
        own = translator.apply(source, {"style": translator.style(source)})
    assert torch.allclose(pipeline(source, strength=0.0, generator=seeded())[:, 0], own, atol=1e-5)
    with pytest.raises(SettingsError, match="PoseTranslator has no strength"):
        made("pose")(source, strength=0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_draws": 0}, SettingsError, "num_draws"),
        ({"batch_size": 0}, SettingsError, "batch_size"),
        ({"strength": 1.5}, SettingsError, "strength"),
        ({"images": []}, ShapeError, "at least one PIL"),
        ({"images": ["cat.png"]}, ShapeError, "PIL image"),
        ({"images": [Image.new("L", (16, 16)), Image.new("L", (8, 8))]}, ShapeError, "one size, got 16x16, 8x8"),
        ({"images": torch.rand(2, 3, 16, 16)}, ShapeError, "1 channel"),
        ({"images": torch.rand(16, 16)}, ShapeError, r"\(B, C, H, W\)"),
    ],
)
def test_bad_input_is_named(arguments, error, match):
    with pytest.raises(error, match=match):
        made("spatial")(**{"images": images(), **arguments})


def test_the_progress_bar_counts_translations(capsys):
    pipeline = made("spatial")
    pipeline.set_progress_bar_config(disable=False)
    pipeline(images(), num_draws=3, batch_size=2)
    assert "15/15" in capsys.readouterr().err


def test_what_is_written(saved):
    found = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert found == {
        "README.md",
        "model_index.json",
        "translator/config.json",
        "translator/diffusion_pytorch_model.safetensors",
    }
    index = json.loads((saved / "model_index.json").read_text())
    assert index["translator"] == ["gen_invariance.translator.spatial", "SpatialTranslator"]
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "from_pretrained" in card
    assert "not stated" in card
    assert "Not inspected" in card


def test_the_card_tells_licence_data_and_quality(tmp_path):
    pipeline = made("spatial")
    pipeline.quality = QUALITY
    pipeline.save_pretrained(tmp_path / "a", license="cc-by-4.0")
    card = (tmp_path / "a" / "README.md").read_text()
    assert 'license: "cc-by-4.0"' in card.split("---")[1]
    assert "source: `digits`" in card
    assert "| precision | 0.900 | 0.800 to – | 0.950 |" in card
    assert "* fine ' 'b'" in card  # nothing that Markdown would act on
    assert "somebody" not in card
    assert "somebody" not in (tmp_path / "a" / "quality.json").read_text()

    TranslationPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == card
    assert json.loads((tmp_path / "b" / "quality.json").read_text())["verdict"] == "use"


def test_a_run_folder_is_opened_with_what_is_known_of_it(tmp_path):
    made("spatial").translator.save_pretrained(tmp_path / "translator")
    (tmp_path / "run.json").write_text(json.dumps({"kind": "fit", "config": {"data": {"source": "letters"}}}))
    (tmp_path / "quality.json").write_text(json.dumps(QUALITY))
    for folder in (tmp_path, tmp_path / "translator"):
        pipeline = TranslationPipeline.from_pretrained(folder)
        assert "source: `letters`" in pipeline.card()
        assert pipeline.quality["verdict"] == "use"


def test_uploading_sends_the_folder_with_its_own_card(monkeypatch, saved):
    sent = {}

    class Made:
        repo_id = "me/rotation"

    def upload_folder(*, repo_id, folder_path, **options):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        content = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in files}
        sent.update(repo_id=repo_id, files=content, **options)
        return "https://hub/me/rotation/commit/1"

    monkeypatch.setattr(module, "create_repo", lambda name, **options: sent.update(asked=name, **options) or Made)
    monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", upload_folder)
    address = TranslationPipeline.from_pretrained(saved).push_to_hub("rotation", private=True, license="mit")
    assert address == "https://hub/me/rotation/commit/1"
    assert (sent["asked"], sent["private"], sent["repo_id"]) == ("rotation", True, "me/rotation")
    assert {"model_index.json", "README.md", "translator/diffusion_pytorch_model.safetensors"} <= set(sent["files"])
    assert b'license: "mit"' in sent["files"]["README.md"]

    sent.clear()
    TranslationPipeline.from_pretrained(saved).save_pretrained(saved.parent / "turned", push_to_hub=True)
    assert sent["asked"] == "turned"


def test_a_repository_is_fetched_without_code_or_pickles(monkeypatch, saved):
    asked = {}

    def fetch(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(saved)

    monkeypatch.setattr(module, "snapshot_download", fetch)
    found = TranslationPipeline.from_pretrained("me/rotation", revision="v1")
    assert isinstance(found.translator, SpatialTranslator)
    assert (asked["name"], asked["revision"]) == ("me/rotation", "v1")
    wanted = ["translator/config.json", "translator/unet/weights.safetensors", "translator/tokenizer/merges.txt"]
    unwanted = ["run.py", "translator/unet/pipeline.py", "translator/unet/weights.bin", "translator/weights.pt"]
    assert list(filter_repo_objects([*wanted, *unwanted], allow_patterns=asked["patterns"])) == wanted


def test_a_name_that_leads_nowhere_is_one_line(monkeypatch):
    def fetch(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(module, "snapshot_download", fetch)
    with pytest.raises(DataNotFoundError, match="neither a folder nor a repository") as caught:
        TranslationPipeline.from_pretrained("me/nothing")
    assert "\n" not in str(caught.value)


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model_index.json", lambda content: b"{"),
        ("model_index.json", lambda content: b"[1]"),
        ("model_index.json", lambda content: content.replace(b"TranslationPipeline", b"DDIMPipeline")),
        ("translator/config.json", lambda content: content[:-5]),
        ("translator/config.json", lambda content: content.replace(b"SpatialTranslator", b"os.system")),
        ("translator/diffusion_pytorch_model.safetensors", lambda content: content[:-3]),
        ("translator/diffusion_pytorch_model.safetensors", lambda content: b""),
    ],
)
def test_damage_is_one_line(saved, file, change):
    damage(saved / file, change)
    with pytest.raises(CheckpointError) as caught:
        TranslationPipeline.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_classes_that_the_index_names_are_not_imported(saved):
    index = json.loads((saved / "model_index.json").read_text())
    index["translator"] = ["this_module_must_not_be_imported", "Evil"]
    (saved / "model_index.json").write_text(json.dumps(index))
    assert isinstance(TranslationPipeline.from_pretrained(saved).translator, SpatialTranslator)


def test_writing_where_one_may_not_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        made("spatial").save_pretrained(tmp_path / "file" / "inside")


@pytest.mark.slow
def test_a_fresh_process_draws_the_same_bits(saved):
    script = (
        "import torch; from gen_invariance.contrib.pipeline import TranslationPipeline as P;"
        f"p = P.from_pretrained({str(saved)!r}); g = torch.Generator().manual_seed(1);"
        "x = torch.rand(5, 1, 16, 16, generator=g); g = torch.Generator().manual_seed(0);"
        "print(p(x, num_draws=2, generator=g).double().sum().item().hex())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = TranslationPipeline.from_pretrained(saved)(images(), num_draws=2, generator=seeded())
    assert found.stdout.strip() == expected.double().sum().item().hex()
