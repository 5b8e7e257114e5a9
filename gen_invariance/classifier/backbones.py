"""Image classifiers with declared, ordered stages: CIFAR ResNets, a small conv net, and pretrained families.

Every model here is a `Classifier`: images in [0, 1] go in, it normalises them itself, logits come out. Its stages
are named from input to output, so a transfer plan can freeze, thaw or slow down the same part of any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_invariance.data.images import check_images
from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.run import named_generator

Stages = Mapping[str, Sequence[str]]
"""Stage name -> dotted paths, inside the backbone, of the modules and parameters that belong to it; input first."""

COSINE_SCALE = 30.0
"""Logits of a cosine head are this many times the cosine; s of LDAM (Cao et al. 2019)."""


@dataclass(frozen=True)
class Backbone:
    """A feature extractor and the facts a `Classifier` needs about it.

    Attributes:
        module: maps normalised images (B, C, H, W) to features (B, D).
        num_features: D.
        channels: C of the images that `module` takes, 1 or 3.
        stages: paths of each stage, input to output; empty when nobody declared them.
        mean, std: per-channel normalisation of its pretrained weights, or None.
        input_size: side in pixels that images are resized to first; None takes any size.
    """

    module: nn.Module
    num_features: int
    channels: int
    stages: Stages
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: int | None = None


class CosineHead(nn.Module):
    """Last layer whose logits are `scale` times the cosine between features and class weights.

    The scale is part of the layer, not of the loss, so probabilities at test time are those that were trained.
    """

    def __init__(self, in_features: int, num_classes: int, *, scale: float = COSINE_SCALE) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, num_classes, None
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.register_buffer("scale", torch.tensor(float(scale)))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, K) in [-scale, scale]."""
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


class Classifier(nn.Module):
    """Normalisation, a backbone with ordered stages, and a head layer.

    Args:
        backbone: the feature extractor with its facts.
        head: maps features (B, D) to logits (B, K).
        channels: channels of the images it is given. One-channel images are repeated when the backbone takes three.
        input_size: resize images to this side first (bilinear, antialiased); default the backbone's own wish.

    Attributes:
        stages: stage names, input to output. Empty if the backbone declares none.
        stage_paths: for each stage the paths, inside `backbone`, of what belongs to it.

    Raises:
        SettingsError: a stage names something that is not in the backbone, or leaves part of it out.
    """

    def __init__(
        self, backbone: Backbone, head: nn.Module, *, channels: int | None = None, input_size: int | None = None
    ) -> None:
        super().__init__()
        self.channels = backbone.channels if channels is None else channels
        if self.channels not in (1, backbone.channels):
            raise SettingsError(
                f"this backbone takes {backbone.channels} channel(s), not {self.channels}; "
                f"convert the images or use channels={backbone.channels}"
            )
        self.num_features = backbone.num_features
        self.input_size = backbone.input_size if input_size is None else input_size
        self.backbone, self.head = backbone.module, head
        self.register_buffer("mean", torch.zeros(backbone.channels))
        self.register_buffer("std", torch.ones(backbone.channels))
        if backbone.mean is not None and backbone.std is not None:
            self.set_normalisation(backbone.mean, backbone.std)
        self.stage_paths = {name: tuple(paths) for name, paths in backbone.stages.items()}
        self.stages = tuple(self.stage_paths)
        self._eval_stages: frozenset[str] = frozenset()
        if self.stages:
            self._check_stages()

    @property
    def num_classes(self) -> int:
        """K, the number of logits."""
        return self.head.out_features

    def set_normalisation(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> None:
        """Set mean and std, one number for each channel or one for all; measured on training images in [0, 1].

        Raises:
            ShapeError: neither one number nor one for each channel.
            SettingsError: a std is not positive and finite.
        """
        for name, values in (("mean", mean), ("std", std)):
            values = torch.as_tensor(values, dtype=self.mean.dtype, device=self.mean.device).reshape(-1)
            if values.numel() not in (1, self.mean.numel()):
                raise ShapeError(
                    f"{name} must hold 1 or {self.mean.numel()} numbers, got {values.numel()}; one for each channel"
                )
            if not torch.isfinite(values).all() or (name == "std" and not (values > 0).all()):
                raise SettingsError(
                    f"{name} must be finite, and std positive, got {values.tolist()}; is the data empty or constant?"
                )
            getattr(self, name).copy_(values)

    def normalise(self, images: Tensor) -> Tensor:
        """What the backbone sees: `images` repeated to its channels, resized and normalised.

        Raises:
            ShapeError: not floating point (B, C, H, W), or another number of channels than the model was built for.
        """
        check_images(images, channels=self.channels, where="classifier input")
        if self.input_size is not None and images.shape[-2:] != (self.input_size, self.input_size):
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        # Broadcasting against the three-channel mean repeats a one-channel image.
        return (images - self.mean[:, None, None]) / self.std[:, None, None]

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D) of `images`, float (B, C, H, W) in [0, 1]."""
        return self.backbone(self.normalise(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of `images`, float (B, C, H, W) in [0, 1]."""
        return self.head(self.features(images))

    # ---- stages

    def stage_parameters(self, stage: str) -> dict[str, nn.Parameter]:
        """Parameters of `stage` by their name in the whole model ("backbone. ...")."""
        return {f"backbone.{name}": value for name, value in self.backbone.named_parameters() if self._in(name, stage)}

    def stage_modules(self, stage: str) -> Iterator[nn.Module]:
        """Modules of `stage`, outermost first."""
        return (module for name, module in self.backbone.named_modules() if name and self._in(name, stage))

    def keep_in_eval(self, stages: Sequence[str]) -> None:
        """Keep `stages` in eval mode from now on, whatever `train()` says: their batch-norm statistics stay fixed."""
        self._eval_stages = frozenset(self._known(stage) for stage in stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """As `nn.Module.train`, except that stages under `keep_in_eval` stay in eval mode."""
        super().train(mode)
        if self._eval_stages and self._eval_stages == frozenset(self.stages):
            self.backbone.eval()  # also containers that belong to no single stage
        for stage in self._eval_stages:
            for module in self.stage_modules(stage):
                module.training = False
        return self

    def _known(self, stage: str) -> str:
        if stage not in self.stage_paths:
            raise SettingsError(f"no stage {stage!r}; this backbone has {', '.join(self.stages) or 'none declared'}")
        return stage

    def _in(self, name: str, stage: str) -> bool:
        return any(name == path or name.startswith(f"{path}.") for path in self.stage_paths[self._known(stage)])

    def _check_stages(self) -> None:
        tensors = [name for name, _ in self.backbone.named_parameters()] + [n for n, _ in self.backbone.named_buffers()]
        known = set(tensors) | {name for name, _ in self.backbone.named_modules()}
        for stage, paths in self.stage_paths.items():
            for path in paths:
                if path not in known:
                    raise SettingsError(f"stage {stage!r} names {path!r}, which the backbone lacks; check its spelling")
        for name in tensors:
            owners = [stage for stage in self.stages if self._in(name, stage)]
            if len(owners) != 1:
                raise SettingsError(
                    f"backbone tensor {name!r} belongs to {len(owners)} stages ({', '.join(owners) or 'none'}); "
                    "declare stages so that each tensor is in exactly one"
                )


class _Block(nn.Module):
    """Two 3x3 convolutions with the parameter-free shortcut, "option A" of He et al. 2016."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + shortcut)


class CifarResNet(nn.Sequential):
    """ResNet-(6n+2) for images of about 32 pixels (He et al. 2016, section 4.2): widths 16, 32, 64, n blocks each."""

    def __init__(self, channels: int, blocks: int) -> None:
        stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        super().__init__()
        self.add_module("stem", stem)
        width = 16
        for number, outputs in enumerate((16, 32, 64), start=1):
            strides = [1 if number == 1 else 2] + [1] * (blocks - 1)
            stage = nn.Sequential()
            for stride in strides:
                stage.append(_Block(width, outputs, stride))
                width = outputs
            self.add_module(f"stage{number}", stage)
        self.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))


class SmallConv(nn.Sequential):
    """Four 3x3 convolutions of 32, 64, 128, 128 channels, the first three pooled; from 1x1 pixel up.

    Each has batch norm; a global average follows. The last one sees 38 pixels of the image at a time.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(((channels, 32), (32, 64), (64, 128), (128, 128)), start=1):
            layers = [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)]
            if number < 4:
                # Before the ReLU, which gives the same and has a quarter to do; sides of any length.
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            layers.append(nn.ReLU())
            self.add_module(f"conv{number}", nn.Sequential(*layers))
        self.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def _own_backbone(name: str, channels: int) -> Backbone:
    if name == "small_conv":
        module, width, stages = SmallConv(channels), 128, ("conv1", "conv2", "conv3", "conv4")
    else:
        blocks = (int(name.removeprefix("resnet")) - 2) // 6
        module, width, stages = CifarResNet(channels, blocks), 64, ("stem", "stage1", "stage2", "stage3")
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return Backbone(module, width, channels, {stage: (stage,) for stage in stages})


def build_head(kind: str, width: int, num_classes: int, *, generator: torch.Generator) -> nn.Linear | CosineHead:
    """A new head layer for features (B, `width`), "linear" or "cosine", drawn from `generator`.

    Raises:
        SettingsError: unknown kind.
    """
    if kind not in ("linear", "cosine"):
        raise SettingsError(f"no head {kind!r}; choose linear or cosine")
    with _lent_global_stream(generator):
        if kind == "cosine":
            return CosineHead(width, num_classes)
        layer = nn.Linear(width, num_classes)
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer


@contextmanager
def _lent_global_stream(generator: torch.Generator) -> Iterator[None]:
    """Layer constructors draw from the global stream: lend them a copy of it, seeded by `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


OWN_BACKBONES = ("resnet20", "resnet32", "small_conv")
"""Names that need no other library; `build_classifier` takes torchvision, timm:NAME, efficientnet_lite0 too."""


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
        name: "resnet20", "resnet32" (CIFAR style), "small_conv" (tiny images), a torchvision model of the families
            ResNet, ConvNeXt, EfficientNet, ViT, Swin ("resnet18", "convnext_tiny", ...), "timm:NAME" when timm is
            installed, or "efficientnet_lite0" with the extra `pretrained-lite`.
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
    with _lent_global_stream(generator):
        backbone = _build_backbone(name, channels=channels, weights=weights)
    layer = build_head(head, backbone.num_features, num_classes, generator=generator)
    model = Classifier(backbone, layer, channels=channels, input_size=input_size)
    if weights is not None:
        from gen_invariance.classifier.pretrained import is_local, load_weights

        if is_local(weights):
            load_weights(model, weights, keep_head=keep_head, name=name)
        elif keep_head:
            raise SettingsError(f"keep_head needs a file or run folder that holds a head, got weights={str(weights)!r}")
    return model


def _build_backbone(name: str, **options: Any) -> Backbone:
    from gen_invariance.classifier import pretrained

    if name in OWN_BACKBONES:
        pretrained.require_local(options["weights"], name=name)
        return _own_backbone(name, options["channels"])
    return pretrained.library_backbone(name, weights=options["weights"])
