"""Folders of pipelines from strangers: code that a config names, weights that are not there, absurd sizes."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_img2img import FILE, change, refused, tiny

from gen_invariance.contrib.folders import check_configs
from gen_invariance.contrib.img2img import open_pipeline
from gen_invariance.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "pipeline")


CODE = [
    {"auto_map": {"AutoConfig": "evil.Evil"}},
    {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    {"auto_map": "evil.Evil"},
    {"attn_implementation": "evil-owner/attention"},
    {"_attn_implementation": "evil-owner/attention:forward"},
]
FILES = [
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "video_preprocessor_config.json", "scheduler_config.json", "generation_config.json", "model_index.json",
]  # fmt: skip


@given(
    part=st.sampled_from(["", "vae", "unet", "text_encoder", "tokenizer", "scheduler", "feature_extractor", "a/b"]),
    name=st.sampled_from(FILES),
    code=st.sampled_from(CODE),
    around=st.lists(st.one_of(st.none(), st.sampled_from(["image_processor", "text_config"])), max_size=3),
)
def test_code_that_any_config_names_is_refused(shared, tmp_path_factory, part, name, code, around):
    folder = tmp_path_factory.mktemp("hostile")
    for key in around:
        code = [code] if key is None else {key: code}
    file = folder / part / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(code))
    with pytest.raises(CheckpointError, match="names code to be run"):
        check_configs(folder)


def test_nobody_is_asked_about_a_processor_with_code_of_its_own(folder, tmp_path, monkeypatch):
    """A part that no text names as code; transformers asks on the terminal, and any "y" there ran it."""
    asked, ran = [], tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    part = folder / "feature_extractor"
    part.mkdir()
    (part / "evil.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()\nclass Evil: pass\n")
    (part / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}})
    )
    (part / "config.json").write_text(json.dumps({"model_type": "clip", "auto_map": {"AutoConfig": "evil.Evil"}}))
    change(folder, feature_extractor=["transformers", "CLIPProcessor"])
    refused(folder, "names code to be run")
    assert not asked
    assert not ran.exists()


def test_what_names_no_code_is_left_alone(folder):
    vocabulary = folder / "tokenizer" / "vocab.json"
    vocabulary.write_text(json.dumps({"auto_map": 7}))
    change(folder, _attn_implementation="sdpa")
    check_configs(folder)


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_weights_elsewhere(folder, name):
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, "names weights outside of its folder")


@pytest.mark.parametrize("kind", ["AutoModel", "DiffusionPipeline", "StableDiffusionPipeline"])
def test_parts_whose_kind_is_found_out_while_loading(folder, kind):
    change(folder, unet=["diffusers", kind])
    refused(folder, f"the part unet is a {kind}")


@pytest.mark.parametrize("part", [f"unet/{FILE}", f"vae/{FILE}", "text_encoder/model.safetensors"])
def test_every_network_needs_all_its_weights(folder, part):
    weights = load_file(folder / part)
    for name in (min(weights), max(weights)):
        save_file({key: value for key, value in weights.items() if key != name}, folder / part, {"format": "pt"})
        refused(folder, "lacks 1 of its weights")


def test_networks_are_those_of_the_files(folder):
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    loaded = open_pipeline(folder).text_encoder.state_dict()
    assert {tuple(value.shape) for value in weights.values()} == {tuple(value.shape) for value in loaded.values()}
    total = sum(value.double().sum() for value in weights.values())
    torch.testing.assert_close(sum(value.double().sum() for value in loaded.values()), total)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("unet/config.json", "layers_per_block", 10**6),
        ("unet/config.json", "transformer_layers_per_block", [1, 10**6]),
        ("unet/config.json", "block_out_channels", [8, 160_000_000]),
        ("text_encoder/config.json", "num_hidden_layers", 300_000),
        ("text_encoder/config.json", "vocab_size", 10**9),
        ("vae/config.json", "latent_channels", 2**40),
    ],
)
def test_absurd_sizes_cost_nothing(folder, file, key, value):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, key: value}))
    refused(folder, f"{key} is .*, more than its weights can be of")


def test_links_to_devices_and_back(folder):
    (folder / "unet" / "again").symlink_to(folder)
    open_pipeline(folder)
    for name in ("model_index.json", "vae/config.json", f"vae/{FILE}"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(folder, "no file that can be read")
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    (folder / "unet" / "broken.json").symlink_to(folder / "nothing")
    refused(folder, "no file that can be read")
