"""Networks of our own for small images: CIFAR-style ResNets and four convolutions; they need no other library."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gen_invariance.classifier.model import Backbone

OWN_BACKBONES = ("resnet20", "resnet32", "small_conv")
"""Names that need no other library; `build_classifier` takes those of torchvision, timm and efficientnet_lite0 too."""


class _Residual(nn.Module):
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
    """ResNet-(6n+2) for images of about 32 pixels (He et al. 2016, section 4.2): 16, 32, 64 channels, n = `depth`."""

    def __init__(self, channels: int, depth: int) -> None:
        stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        super().__init__()
        self.add_module("stem", stem)
        width = 16
        for number, outputs in enumerate((16, 32, 64), start=1):
            layers = nn.Sequential()
            for index in range(depth):
                stride = 2 if number > 1 and index == 0 else 1
                layers.append(_Residual(width, outputs, stride))
                width = outputs
            self.add_module(f"stage{number}", layers)
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


def build_own_backbone(name: str, channels: int) -> Backbone:
    """The backbone `name` of `OWN_BACKBONES` for images of 1 or 3 channels, drawn from torch's global stream."""
    if name == "small_conv":
        module, width, blocks = SmallConv(channels), 128, ("conv1", "conv2", "conv3", "conv4")
    else:
        depth = int(name.removeprefix("resnet"))
        module, width, blocks = CifarResNet(channels, (depth - 2) // 6), 64, ("stem", "stage1", "stage2", "stage3")
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return Backbone(module, width, channels, {block: (block,) for block in blocks})
