"""A plain reading of the published recipe (Zhou et al., ICLR 2022), to hold the package's speed against.

Own code, written from the paper and from MUNIT's (Huang et al., ECCV 2018) in the way such code is usually written:
one image at a time through PIL and a `DataLoader`, two domains of which one is kept, every network asked for each
thing that is needed of it, the optimiser looping over parameters. It is correct; nothing is slowed down on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import gen_invariance.torchvision_guard  # noqa: F401  (before torchvision)

# isort: split
from torchvision import transforms

RANDOM = np.random.default_rng(0)

# ---- images, one at a time


class PlainImages(Dataset):
    """uint8 (N, C, H, W) and labels, each image through PIL, a tensor and a normalisation; the pair of an item."""

    def __init__(self, images: Tensor, labels: Tensor, *, change: Callable | None = None, flip: bool = False) -> None:
        self.images, self.labels = images.permute(0, 2, 3, 1).squeeze(3).numpy(), labels.tolist()
        self.change = change
        steps = [transforms.ToPILImage()]
        if flip:
            steps += [transforms.RandomCrop(self.images.shape[1], padding=4), transforms.RandomHorizontalFlip()]
        steps += [transforms.ToTensor(), transforms.Normalize((0.5,) * images.shape[1], (0.5,) * images.shape[1])]
        self.chain = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        image = self.images[item]
        return self.chain(image if self.change is None else self.change(image)), self.labels[item]


def background(image: np.ndarray, *, level: int | None = None) -> np.ndarray:
    """Zeros of one uint8 (H, W) image become one level."""
    level = int(RANDOM.integers(100)) if level is None else level
    changed = image.copy()
    changed[changed == 0] = level
    return changed


def thickness(image: np.ndarray, *, grow: bool | None = None, side: int | None = None) -> np.ndarray:
    """Dilate or erode one uint8 (H, W) image."""
    grow = RANDOM.random() < 0.6 if grow is None else grow
    side = int(RANDOM.choice((2, 3, 4) if grow else (1, 2))) if side is None else side
    kernel = np.ones((side, side), np.uint8)
    return (cv2.dilate if grow else cv2.erode)(image, kernel, iterations=1)


def rotation(image: np.ndarray, *, degrees: float | None = None) -> np.ndarray:
    """Rotate one uint8 (H, W) image about its centre, bicubic."""
    degrees = RANDOM.uniform(-180, 180) if degrees is None else degrees
    return np.asarray(Image.fromarray(image).rotate(degrees, resample=Image.Resampling.BICUBIC))


CHANGES = {"background": background, "thickness": thickness, "rotation": rotation}

# ---- MUNIT


class Convolution(nn.Module):
    """Pad by reflection, convolve, normalise, activate."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, pad: int, norm: str, act: str) -> None:
        super().__init__()
        self.pad, self.conv = nn.ReflectionPad2d(pad), nn.Conv2d(inputs, outputs, kernel, stride)
        norms = {"in": nn.InstanceNorm2d, "adain": AdaptiveNorm, "ln": LayerNorm}
        self.norm = norms[norm](outputs) if norm != "none" else None
        acts = {"relu": nn.ReLU(inplace=True), "lrelu": nn.LeakyReLU(0.2, inplace=True), "tanh": nn.Tanh()}
        self.act = acts.get(act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pad(x))
        x = x if self.norm is None else self.norm(x)
        return x if self.act is None else self.act(x)


class AdaptiveNorm(nn.Module):
    """Instance normalisation with a scale and shift that are set from outside before each call."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features, self.weight, self.bias = features, None, None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        count, channels = x.shape[:2]
        mean, var = self.running_mean.repeat(count), self.running_var.repeat(count)
        flat = x.reshape(1, count * channels, *x.shape[2:])
        return F.batch_norm(flat, mean, var, self.weight, self.bias, True, 0.1, 1e-5).view(x.shape)


class LayerNorm(nn.Module):
    """Over channels and places of each image."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, 1, 1, 1)
        mean = x.view(len(x), -1).mean(1).view(shape)
        deviation = (x.view(len(x), -1).var(1, unbiased=False) + 1e-5).sqrt().view(shape)
        return (x - mean) / deviation * self.gamma.view(1, -1, 1, 1) + self.beta.view(1, -1, 1, 1)


class Residual(nn.Module):
    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.first = Convolution(width, width, 3, 1, 1, norm, "relu")
        self.second = Convolution(width, width, 3, 1, 1, norm, "none")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class PlainGenerator(nn.Module):
    """Content encoder, style encoder and AdaIN decoder at the published sizes; images in [-1, 1]."""

    def __init__(self, channels: int, *, width: int = 64, blocks: int = 4, style: int = 8, hidden: int = 256) -> None:
        super().__init__()
        deep = 4 * width
        self.content = nn.Sequential(
            Convolution(channels, width, 7, 1, 3, "in", "relu"),
            Convolution(width, 2 * width, 4, 2, 1, "in", "relu"),
            Convolution(2 * width, deep, 4, 2, 1, "in", "relu"),
            *(Residual(deep, "in") for _ in range(blocks)),
        )
        self.style = nn.Sequential(
            Convolution(channels, width, 7, 1, 3, "none", "relu"),
            Convolution(width, 2 * width, 4, 2, 1, "none", "relu"),
            *(Convolution(min(2 * width * 2**n, deep), deep, 4, 2, 1, "none", "relu") for n in range(3)),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(deep, style, 1),
        )
        self.decoder = nn.Sequential(
            *(Residual(deep, "adain") for _ in range(blocks)),
            nn.Upsample(scale_factor=2),
            Convolution(deep, 2 * width, 5, 1, 2, "ln", "relu"),
            nn.Upsample(scale_factor=2),
            Convolution(2 * width, width, 5, 1, 2, "ln", "relu"),
            Convolution(width, channels, 7, 1, 3, "none", "tanh"),
        )
        self.norms = [part for part in self.decoder.modules() if isinstance(part, AdaptiveNorm)]
        parameters = 2 * sum(norm.features for norm in self.norms)
        self.mlp = nn.Sequential(
            nn.Linear(style, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, parameters)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Content and style."""
        return self.content(x), self.style(x).flatten(1)

    def decode(self, content: Tensor, style: Tensor) -> Tensor:
        """Set the scale and shift of every AdaIN layer, then decode."""
        parameters = self.mlp(style)
        for norm in self.norms:
            # Per layer first the scale, then the shift.
            norm.weight = parameters[:, : norm.features].reshape(-1)
            norm.bias = parameters[:, norm.features : 2 * norm.features].reshape(-1)
            parameters = parameters[:, 2 * norm.features :]
        return self.decoder(content)


class PlainDiscriminator(nn.Sequential):
    """Four halvings, a 1 x 1 judge."""

    def __init__(self, channels: int, *, width: int = 64) -> None:
        sizes = [channels, width, 2 * width, 4 * width, 8 * width]
        layers = [Convolution(first, second, 4, 2, 1, "none", "lrelu") for first, second in pairwise(sizes)]
        super().__init__(*layers, nn.Conv2d(sizes[-1], 1, 1))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                nn.init.zeros_(layer.bias)


class PlainMunit:
    """The two updates of a step. `domains=2` is the recipe (one generator and discriminator each, the first is kept);
    `domains=1` is the same with one domain, the like-for-like partner of the package's step."""

    def __init__(self, channels: int, *, domains: int = 2, device: torch.device | str = "cpu", width: int = 64) -> None:
        self.gens = [PlainGenerator(channels, width=width).to(device) for _ in range(domains)]
        self.dis = [PlainDiscriminator(channels, width=width).to(device) for _ in range(domains)]
        adam = {"lr": 1e-4, "betas": (0.5, 0.999), "weight_decay": 1e-4, "foreach": False}
        self.gen_adam = torch.optim.Adam([p for gen in self.gens for p in gen.parameters()], **adam)
        self.dis_adam = torch.optim.Adam([p for dis in self.dis for p in dis.parameters()], **adam)

    def step(self, images: list[Tensor], draws: list[Tensor], others: list[Tensor] | None = None) -> dict[str, float]:
        """Images in [-1, 1] and styles (B, S) of each domain; `others` are the second update's styles."""
        return {**self.dis_update(images, draws), **self.gen_update(images, others or draws)}

    def _crossed(self, contents: list[Tensor], draws: list[Tensor]) -> list[Tensor]:
        """Each domain's generator decodes the content of the next one."""
        return [
            gen.decode(contents[(place + 1) % len(contents)], draw)
            for place, (gen, draw) in enumerate(zip(self.gens, draws, strict=True))
        ]

    def dis_update(self, images: list[Tensor], draws: list[Tensor]) -> dict[str, float]:
        self.dis_adam.zero_grad()
        contents = [gen.encode(own)[0] for gen, own in zip(self.gens, images, strict=True)]
        fakes = self._crossed(contents, draws)
        loss = sum(
            dis(fake.detach()).square().mean() + (dis(own) - 1).square().mean()
            for dis, fake, own in zip(self.dis, fakes, images, strict=True)
        )
        loss.backward()
        self.dis_adam.step()
        return {"discriminator": loss.item()}

    def gen_update(self, images: list[Tensor], draws: list[Tensor]) -> dict[str, float]:
        self.gen_adam.zero_grad()
        codes = [gen.encode(own) for gen, own in zip(self.gens, images, strict=True)]
        terms = dict.fromkeys(("image", "style", "content", "adversarial"), 0.0)
        fakes = self._crossed([content for content, _ in codes], draws)
        for place, (gen, dis) in enumerate(zip(self.gens, self.dis, strict=True)):
            same = gen.decode(*codes[place])
            content, style = gen.encode(fakes[place])
            terms["image"] += 10 * F.l1_loss(same, images[place])
            terms["style"] += F.l1_loss(style, draws[place])
            terms["content"] += F.l1_loss(content, codes[(place + 1) % len(codes)][0])
            terms["adversarial"] += (dis(fakes[place]) - 1).square().mean()
        sum(terms.values()).backward()
        self.gen_adam.step()
        return {name: term.item() for name, term in terms.items()}


# ---- the classifier and its measure


@torch.no_grad()
def generated_half(generator: PlainGenerator, images: Tensor) -> Tensor:
    """What the recipe's training step does: translate a whole second batch (style encoded as well), keep half of it."""
    content, _ = generator.encode(images)
    style = torch.randn(len(images), 8, device=images.device)
    return generator.decode(content, style)[: len(images) // 2]


def classifier_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Forward, loss, top-1 and top-5, backward, update; figures read at every step."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    best = logits.topk(5, dim=1).indices
    right = best == labels[:, None]
    shown = loss.item() + right[:, :1].float().sum().item() + right.float().sum().item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return shown


def divergence(model: nn.Module, images: Tensor, change: Callable, *, draws: int, gradients: bool = True) -> np.ndarray:
    """eKLD of each image, (N,), of uint8 (N, 1, H, W): every transformed image made alone and kept, then all asked for.

    As published the network runs with gradients; `gradients=False` is what a careful caller would do.
    """
    chain, device = transforms.ToTensor(), next(model.parameters()).device
    raw = images.squeeze(1).cpu().numpy()
    plain = torch.stack([chain(Image.fromarray(image)) for image in raw])
    moved = torch.stack([chain(Image.fromarray(change(image))) for image in raw for _ in range(draws)])
    with torch.set_grad_enabled(gradients):
        first = torch.cat([model(part.to(device)) for part in plain.split(128)])
        second = torch.cat([model(part.to(device)) for part in moved.split(128)])
        p = F.log_softmax(first.repeat_interleave(draws, 0), 1)
        q = F.log_softmax(second, 1)
        values = (p.exp() * (p - q)).sum(1).view(len(raw), draws).mean(1)
    return values.detach().cpu().numpy()
