"""Pipelines of diffusers as translators, on tiny ones built from their configs: laws, folders, and what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from gen_invariance.augment.stage import TailAugment
from gen_invariance.contrib import img2img
from gen_invariance.contrib.img2img import DiffusersTranslator, open_pipeline
from gen_invariance.contrib.pipeline import TranslationPipeline
from gen_invariance.data.images import ImageData
from gen_invariance.errors import CheckpointError, DataNotFoundError, SettingsError, ShapeError
from gen_invariance.nuisance.protocol import Nuisance, select_rows
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.io import load_translator, save_translator
from gen_invariance.translator.quality.verdict import weights_digest
from gen_invariance.translator.settings import FitSettings

transformers = pytest.importorskip("transformers")
import diffusers  # noqa: E402  (the guard of the modules above comes first)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
FILE = "diffusion_pytorch_model.safetensors"


def tiny(kind="StableDiffusionImg2ImgPipeline"):
    """A pipeline of 16 x 16 pixels with random weights: networks of a few thousand numbers, a tokenizer of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: place for place, word in enumerate(words)}
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 16}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    common = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return getattr(diffusers, kind)(
            vae=diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                sample_size=16,
                **common,
            ),
            text_encoder=transformers.CLIPTextModel(
                transformers.CLIPTextConfig(**text, **ends, num_hidden_layers=1, num_attention_heads=2)
            ),
            tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16),
            unet=diffusers.UNet2DConditionModel(
                sample_size=8,
                in_channels=8 if "Pix2Pix" in kind else 4,
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=16,
                attention_head_dim=4,
                **common,
            ),
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folder of a saved pipeline; not to be changed."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(shared, tmp_path):
    """A copy that a test may damage."""
    import shutil

    return shutil.copytree(shared, tmp_path / "pipeline")


def made(**settings):
    return DiffusersTranslator(pipeline=tiny(), **{"prompts": ("night", "fog"), "steps": 4, **settings}).eval()


def images(count=3, channels=3, height=20, width=12):
    return torch.rand(count, channels, height, width, generator=seeded(1))


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("channels", [1, 3])
def test_laws_of_a_nuisance(channels):
    translator, source = made(channels=channels), images(channels=channels)
    before, state = source.clone(), torch.random.get_rng_state()
    draw = translator.sample(source.shape, generator=seeded())
    moved = translator.apply(source, draw)
    assert isinstance(translator, Nuisance)
    assert (moved.shape, moved.dtype) == (source.shape, source.dtype)
    assert 0 <= moved.min() <= moved.max() <= 1
    assert not torch.allclose(moved, source, atol=0.01)
    assert torch.equal(translator.apply(source, draw), moved)
    assert torch.equal(source, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    alone = translator.apply(source[1:2], select_rows(draw, torch.tensor([1])))
    torch.testing.assert_close(alone, moved[1:2], atol=1e-4, rtol=0)
    assert translator.apply(source.to(torch.bfloat16), draw).dtype == torch.bfloat16
    assert translator.apply(source[:0], select_rows(draw, torch.arange(0))).shape == (0, *source.shape[1:])
    with pytest.raises(ShapeError, match="img2img translator: expected"):
        translator.apply(images(channels=4 - channels), draw)


def test_seed_and_prompt_both_count():
    translator, source = made(), images()
    draw = {"prompt": torch.zeros(3, dtype=torch.int64), "seed": torch.arange(3)}
    moved = translator.apply(source, draw)
    for other in ({**draw, "seed": draw["seed"] + 1}, {**draw, "prompt": 1 - draw["prompt"]}):
        assert not torch.equal(translator.apply(source, other), moved)


def test_draws():
    translator = made()
    draw = translator.sample((200, 3, 16, 16), generator=seeded())
    assert draw["prompt"].unique().tolist() == [0, 1]
    assert draw["seed"].unique().numel() == 200
    again = translator.sample((200, 3, 16, 16), generator=seeded())
    assert all(torch.equal(value, again[name]) for name, value in draw.items())


def test_strength_zero_is_the_image_itself_and_any_other_works():
    translator, source = made(), images()
    draw = translator.sample(source.shape, generator=seeded())
    none = translator.apply(source, draw, strength=0)
    assert torch.equal(none, source)
    assert none is not source
    for strength in (0.05, 1.0):  # 4 steps of 5 % are less than one
        assert not torch.equal(translator.apply(source, draw, strength=strength), source)
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(SettingsError, match="strength must be in"):
            translator.apply(source, draw, strength=bad)


class Recorder:
    """Stands for a pipeline and keeps what it is called with."""

    components = SimpleNamespace(items=tuple)  # no networks
    vae_scale_factor = 2
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=8))
    withheld = None

    def set_progress_bar_config(self, **options):
        pass

    def __call__(
        self, image, prompt, strength=0.8, num_inference_steps=50, generator=None, output_type="pil", guidance_scale=7.5
    ):
        self.called = {**locals()}
        return SimpleNamespace(images=image.flip(3), nsfw_content_detected=self.withheld)


def test_what_the_pipeline_is_called_with():
    recorder = Recorder()
    translator = DiffusersTranslator(
        pipeline=recorder, prompts=("a", "b"), strength=0.3, steps=10, call_options={"guidance_scale": 2.0}
    )
    source = images(2)
    draw = {"prompt": torch.tensor([1, 0]), "seed": torch.tensor([7, 8])}
    translator.apply(source, draw)
    called = recorder.called
    assert called["image"].shape == (2, 3, 16, 16)
    assert called["prompt"] == ["b", "a"]
    assert (called["strength"], called["num_inference_steps"], called["guidance_scale"]) == (0.3, 10, 2.0)
    assert [each.initial_seed() for each in called["generator"]] == [7, 8]
    assert called["output_type"] == "pt"
    translator.apply(source, draw, strength=0.01)
    assert recorder.called["num_inference_steps"] == 100  # at least one step is taken


def test_images_come_back_in_their_size_and_grey_stays_grey():
    translator = DiffusersTranslator(pipeline=Recorder(), channels=1, size=40)
    smooth = torch.linspace(0, 1, 20).expand(2, 1, 20, 20).contiguous()
    moved = translator.apply(smooth, translator.sample(smooth.shape, generator=seeded()))
    assert moved.shape == smooth.shape
    torch.testing.assert_close(moved, smooth.flip(3), atol=0.02, rtol=0)


def test_what_the_safety_checker_withholds_stays_as_it_is():
    recorder = Recorder()
    recorder.withheld = [False, True]
    translator, source = DiffusersTranslator(pipeline=recorder), images(2)
    moved = translator.apply(source, translator.sample(source.shape, generator=seeded()))
    assert torch.equal(moved[1], source[1])
    assert not torch.allclose(moved[0], source[0], atol=0.01)


def test_saved_and_opened_it_gives_the_same_bits(shared, tmp_path):
    translator = DiffusersTranslator.from_folder(shared, prompts=["night", "fog"], strength=0.6, steps=4)
    save_translator(translator, tmp_path / "run" / "translator")
    source = images()
    draw = translator.sample(source.shape, generator=seeded())
    moved = translator.apply(source, draw)
    for path in (tmp_path / "run", tmp_path / "run" / "translator"):
        again = load_translator(path)
        assert isinstance(again, DiffusersTranslator)
        assert torch.equal(again.apply(source, draw), moved)
        assert not again.training
        assert not any(parameter.requires_grad for parameter in again.parameters())
    assert "strength 0.6" in again.describe()
    assert list(again.config.prompts) == ["night", "fog"]
    assert not list(tmp_path.rglob("*.bin"))

    digest = weights_digest(tmp_path / "run")
    other = load_translator(tmp_path / "run")
    with torch.no_grad():
        next(other.networks["unet"].parameters()).add_(1)
    save_translator(other, tmp_path / "run" / "translator")
    assert weights_digest(tmp_path / "run") != digest


def test_as_a_translation_pipeline_with_strength(tmp_path):
    pipeline = TranslationPipeline(made())
    pipeline.set_progress_bar_config(disable=True)
    source = images(2)
    assert torch.equal(pipeline(source, strength=0.0, generator=seeded())[:, 0], source)
    half = pipeline(source, strength=0.5, num_draws=2, generator=seeded())
    pipeline.save_pretrained(tmp_path)
    again = TranslationPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(source, strength=0.5, num_draws=2, generator=seeded()), half)


def test_the_stage_takes_it_and_copies_work():
    translator, source = made(), images(4)
    stage = TailAugment(translator, torch.tensor([0.0, 1.0]))
    moved, labels = stage(source, torch.tensor([0, 1, 0, 1]))
    assert labels.tolist() == [0, 1, 0, 1]
    assert [torch.equal(a, b) for a, b in zip(moved, source, strict=True)] == [True, False, True, False]
    double = copy.deepcopy(translator).double()
    assert next(translator.parameters()).dtype == torch.float32
    assert double.pipeline.unet.dtype == torch.float64  # the copy's pipeline holds the copy's networks


def test_a_pipeline_that_follows_instructions():
    with pytest.raises(SettingsError, match="knows no strength; set strength to null"):
        DiffusersTranslator(pipeline=tiny("StableDiffusionInstructPix2PixPipeline"), strength=0.5)
    translator = DiffusersTranslator(
        pipeline=tiny("StableDiffusionInstructPix2PixPipeline"), strength=None, steps=2, prompts=("make it night",)
    )
    source = images(2)
    draw = translator.sample(source.shape, generator=seeded())
    assert not torch.equal(translator.apply(source, draw), source)
    assert torch.equal(translator.apply(source, draw, strength=0), source)
    with pytest.raises(SettingsError, match="knows no strength but 1"):
        translator.apply(source, draw, strength=0.5)


def test_a_pipeline_for_text_to_image_is_opened_as_its_image_to_image_sister(tmp_path):
    tiny("StableDiffusionPipeline").save_pretrained(tmp_path)
    assert type(open_pipeline(tmp_path)) is diffusers.StableDiffusionImg2ImgPipeline


def test_a_pipeline_without_images_is_refused(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    noise = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(SettingsError, match="DDPMPipeline takes no image"):
        DiffusersTranslator(pipeline=noise)
    noise.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="DDPMPipeline takes no image"):
        open_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompts": ()}, "at least one text"),
        ({"prompts": (1,)}, "at least one text"),
        ({"strength": 1.2}, "strength must be in"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"channels": 2}, "channels 1 or 3"),
        ({"call_options": {"guidence": 1}}, "has no call option 'guidence'"),
        ({"call_options": {"prompt": "x"}}, "has no call option 'prompt'"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(SettingsError, match=match):
        DiffusersTranslator(pipeline=Recorder(), **settings)


def test_a_pipeline_that_does_not_tell_its_size():
    recorder = Recorder()
    recorder.unet = None
    with pytest.raises(SettingsError, match="give size, in pixels"):
        DiffusersTranslator(pipeline=recorder)
    assert "at 24 pixels" in DiffusersTranslator(pipeline=recorder, size=24).describe()


def change(folder, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        open_pipeline(folder)
    assert "\n" not in str(caught.value)


def test_parts_of_two_unknown_kinds_are_both_named(folder):
    change(folder, unet=["evil", "Evil"], vae=[3, "Evil"])
    refused(folder, "holds parts of 'evil', 3, not of diffusers")


def test_what_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setattr(img2img, "is_transformers_available", lambda: False)
    with pytest.raises(SettingsError, match=r'needs transformers: pip install "gen_invariance\[img2img\]"'):
        open_pipeline(folder)


def test_code_beside_the_weights_is_not_run(folder):
    ran = folder.parent / "ran"
    (folder / "unet" / "evil.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()")
    (folder / "pipeline.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()")
    change(folder, unet=["evil", "Evil"])
    refused(folder, "holds parts of 'evil'.*is not run")
    change(folder, unet=["diffusers", "UNet2DConditionModel"], _class_name=["pipeline", "Evil"])
    refused(folder, r"holds a \['pipeline', 'Evil'\]")
    change(folder, _class_name="Evil")
    refused(folder, "holds a Evil")
    change(folder, _class_name="UNet2DModel")
    refused(folder, "holds a UNet2DModel")
    assert not ran.exists()


def test_pickled_weights_are_not_opened(folder):
    state = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    (folder / "unet" / FILE).unlink()
    torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin")
    refused(folder, "cannot load the pipeline in")


@pytest.mark.parametrize("part", [f"unet/{FILE}", f"vae/{FILE}", "text_encoder/model.safetensors"])
def test_truncated_weights(folder, part):
    content = (folder / part).read_bytes()
    (folder / part).write_bytes(content[: len(content) // 2])
    refused(folder, f"{part} is damaged")


def test_no_pipeline_in_the_folder(tmp_path):
    with pytest.raises(DataNotFoundError, match="no folder"):
        open_pipeline(tmp_path / "none")
    refused(tmp_path, "holds no diffusers pipeline")
    for text in ("{", "[]", "{}"):
        (tmp_path / "model_index.json").write_text(text)
        refused(tmp_path, "holds no diffusers pipeline")


def test_a_saved_translator_that_was_tampered_with(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    save_translator(DiffusersTranslator.from_folder(folder, steps=2), tmp_path / "translator")
    weights = tmp_path / "translator" / "pipeline" / "unet" / FILE
    content = load_file(weights)
    save_file({key: value for key, value in content.items() if key != "conv_in.weight"}, weights)
    with pytest.raises(CheckpointError, match=r"weights are those of another model|cannot load") as missing:
        load_translator(tmp_path)
    broken = {**content, "conv_in.weight": content["conv_in.weight"] * float("nan")}
    save_file(broken, weights)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load_translator(tmp_path)
    assert "\n" not in str(missing.value)


def test_by_name(shared, tmp_path):
    data = ImageData((images(24, 3, 16, 16) * 255).byte(), torch.arange(24) % 2, ("a", "b"))
    folder, loop = tmp_path / "run", FitSettings(head_from=5)
    network = {"pipeline": str(shared), "prompts": ["night"], "steps": 2, "size": None}
    translator = fit_translator("img2img", data, loop, network=network, objective={}, out=folder, progress=False)
    assert isinstance(translator, DiffusersTranslator)
    assert (folder / "samples" / "step-00000000.png").is_file()
    assert list(load_translator(folder).config.prompts) == ["night"]
    with pytest.raises(SettingsError, match=r"needs translator\.network\.pipeline=FOLDER"):
        fit_translator("img2img", data, loop, network={"pipeline": ""})
    with pytest.raises(SettingsError, match="no option 'prompt'"):
        fit_translator("img2img", data, loop, network={**network, "prompt": "x"})
