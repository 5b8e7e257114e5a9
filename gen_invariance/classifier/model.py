"""`Classifier`: normalisation, a backbone with declared and ordered blocks, and a head.

Every classifier here takes images in [0, 1], normalises them itself and gives logits. The blocks of its backbone are
named from input to output, so a transfer plan can freeze, thaw or slow down the same part of any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_invariance.data.images import check_images, to_float
from gen_invariance.errors import SettingsError, ShapeError

_TOO_SMALL = ("greater than actual input size", "Output size is too small", "should be less than the corresponding")
"""What torch says of convolutions, pools and paddings that images are too small for."""

Blocks = Mapping[str, Sequence[str]]
"""Block name -> dotted paths, inside the backbone, of the modules and parameters that belong to it; input first."""

COSINE_SCALE = 30.0
"""Logits of a cosine head are this many times the cosine; s of LDAM (Cao et al. 2019)."""


@dataclass(frozen=True)
class Backbone:
    """A feature extractor and the facts a `Classifier` needs about it.

    Attributes:
        module: maps normalised images (B, C, H, W) to features (B, D).
        num_features: D.
        channels: C of the images that `module` takes, 1 or 3.
        blocks: paths of each block, input to output; empty when nobody declared them.
        mean, std: per-channel normalisation of its pretrained weights, or None.
        input_size: side in pixels that images are resized to first; None takes any size.
    """

    module: nn.Module
    num_features: int
    channels: int
    blocks: Blocks
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
    """Normalisation, a backbone with ordered blocks, and a head layer.

    Args:
        backbone: the feature extractor with its facts.
        head: maps features (B, D) to logits (B, K).
        channels: channels of the images it is given. One-channel images are repeated when the backbone takes three.
        input_size: resize images to this side first (bilinear, antialiased); default the backbone's own wish.

    Attributes:
        blocks: block names, input to output. Empty if the backbone declares none.
        block_paths: for each block the paths, inside `backbone`, of what belongs to it.

    Raises:
        SettingsError: a block names something that is not in the backbone, or leaves part of it out.
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
        self.block_paths = {name: tuple(paths) for name, paths in backbone.blocks.items()}
        self.blocks = tuple(self.block_paths)
        self._eval_blocks: frozenset[str] = frozenset()
        if self.blocks:
            self._check_blocks()

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
        """Features (B, D) of `images`, float (B, C, H, W) in [0, 1].

        Raises:
            ShapeError: images of fewer pixels than the backbone's convolutions and pools need.
        """
        try:
            return self.backbone(self.normalise(images))
        except RuntimeError as error:
            if any(words in str(error) for words in _TOO_SMALL):
                height, width = images.shape[-2:]
                raise ShapeError(
                    f"images of {height} x {width} pixels are too small for this backbone; scale them up "
                    "(data.image_size, or input_size of the classifier), or choose small_conv"
                ) from error
            raise

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of `images`, float (B, C, H, W) in [0, 1]."""
        return self.head(self.features(images))

    # ---- blocks

    def block_parameters(self, block: str) -> dict[str, nn.Parameter]:
        """Parameters of `block` by their name in the whole model ("backbone. ...")."""
        return {f"backbone.{name}": value for name, value in self.backbone.named_parameters() if self._in(name, block)}

    def block_modules(self, block: str) -> Iterator[nn.Module]:
        """Modules of `block`, outermost first."""
        return (module for name, module in self.backbone.named_modules() if name and self._in(name, block))

    def has_batch_norm(self, block: str) -> bool:
        """Whether `block`, or "head", normalises by statistics of the batch."""
        modules = self.head.modules() if block == "head" else self.block_modules(block)
        return any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm) for module in modules)

    def keep_in_eval(self, blocks: Sequence[str]) -> None:
        """Keep `blocks` in eval mode from now on, whatever `train()` says: their batch-norm statistics stay fixed."""
        self._eval_blocks = frozenset(self._known(block) for block in blocks)
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """As `nn.Module.train`, except that blocks under `keep_in_eval` stay in eval mode."""
        super().train(mode)
        if self._eval_blocks and self._eval_blocks == frozenset(self.blocks):
            self.backbone.eval()  # also containers that belong to no single block
        for block in self._eval_blocks:
            for module in self.block_modules(block):
                module.training = False
        return self

    def require_blocks(self) -> tuple[str, ...]:
        """Names of the blocks.

        Raises:
            SettingsError: the backbone declares none.
        """
        if not self.blocks:
            raise SettingsError(
                "the backbone declares no blocks; wrap it with Classifier(Backbone(..., blocks=...), head)"
            )
        return self.blocks

    def _known(self, block: str) -> str:
        if block not in self.block_paths:
            raise SettingsError(f"no block {block!r}; this backbone has {', '.join(self.blocks) or 'none declared'}")
        return block

    def _in(self, name: str, block: str) -> bool:
        return any(name == path or name.startswith(f"{path}.") for path in self.block_paths[self._known(block)])

    def _check_blocks(self) -> None:
        tensors = dict(self.backbone.named_parameters()) | dict(self.backbone.named_buffers())
        known = set(tensors) | {name for name, _ in self.backbone.named_modules()}
        for block, paths in self.block_paths.items():
            unknown = [path for path in paths if path not in known]
            if unknown:
                raise SettingsError(
                    f"block {block!r} names {unknown[0]!r}, which the backbone lacks; check its spelling"
                )
        for name in tensors:
            owners = [block for block in self.blocks if self._in(name, block)]
            if len(owners) != 1:
                raise SettingsError(
                    f"backbone tensor {name!r} belongs to {len(owners)} blocks ({', '.join(owners) or 'none'}); "
                    "declare blocks so that each tensor is in exactly one"
                )


def cache_features(model: Classifier, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Features (N, D) of all `images` at once, for heads on a frozen backbone: each image passes it only once.

    Args:
        model: its backbone frozen, as mode "frozen" leaves it.
        images: uint8 (N, C, H, W), or float in [0, 1].
        batch_size: images at a time.

    Raises:
        SettingsError: part of the backbone still trains, so that stored features would go stale.
        ShapeError: images of another form.
    """
    trains = any(parameter.requires_grad for parameter in model.backbone.parameters())
    if trains or any(module.training for module in model.backbone.modules()):
        raise SettingsError("features can be stored for a frozen backbone only; apply TransferPlan('frozen') first")
    device = model.mean.device
    features = [torch.zeros(0, model.num_features, device=device)]
    with torch.no_grad():
        for part in images.split(batch_size):
            part = to_float(part.to(device))
            check_images(part, where="cache_features")
            features.append(model.features(part))
    return torch.cat(features)


def build_head(kind: str, width: int, num_classes: int, *, generator: torch.Generator) -> nn.Linear | CosineHead:
    """A new head layer for features (B, `width`), "linear" or "cosine", drawn from `generator`.

    Raises:
        SettingsError: unknown kind.
    """
    if kind not in ("linear", "cosine"):
        raise SettingsError(f"no head {kind!r}; choose linear or cosine")
    with lend_global_stream(generator):
        if kind == "cosine":
            return CosineHead(width, num_classes)
        layer = nn.Linear(width, num_classes)
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer


@contextmanager
def lend_global_stream(generator: torch.Generator) -> Iterator[None]:
    """Layer constructors draw from the global stream: lend them a copy of it, seeded by `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
