"""MUNIT inside one domain: an image is a content code times a style code, and the style is the nuisance.

After Huang, Liu, Belongie, Kautz: "Multimodal Unsupervised Image-to-Image Translation" (ECCV 2018, arXiv 1804.04732)
and its use by Zhou et al. (ICLR 2022): both domains are the long-tailed training set itself, so one encoder pair and
one decoder suffice, and the decoder is judged on exactly the path that is used later - an image's own content with a
style drawn from the prior.

    x' = decode(content(x), s),   s ~ N(0, I), or s = style(a real head image)
"""

from __future__ import annotations

import gen_invariance.torchvision_guard  # noqa: F401  (first: diffusers leads to torchvision)

# isort: split
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F

# diffusers reloads a model only if its module holds these very names.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from gen_invariance.data.images import check_images
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Draw, draw_to, normal, whole
from gen_invariance.settings import Count, Depth, Halvings, Width, settings_class
from gen_invariance.translator.munit.cpu_convolutions import narrow_convolve, upsample_convolve
from gen_invariance.translator.objective import PatchDiscriminator, check_side, convolution, least_squares


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(x)))), instance-normalised; no bias, since the normalisation removes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = convolution(width, width, 3, bias=False)
        self.second = convolution(width, width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, h, w) to the same shape."""
        hidden = F.relu(F.instance_norm(self.first(x)))
        return x + F.instance_norm(self.second(hidden))


class AdaptiveResidualBlock(ResidualBlock):
    """A residual block whose scale and shift come from the style (adaptive instance normalisation)."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:  # type: ignore[override]
        """(B, W, h, w) and style parameters (B, 4, W): scale and shift for each of the two convolutions."""
        hidden = F.relu(_modulate(self.first(x), style[:, 0], style[:, 1]))
        return x + _modulate(self.second(hidden), style[:, 2], style[:, 3])


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.instance_norm(x) * scale[..., None, None] + shift[..., None, None]


class UpsampleBlock(nn.Module):
    """Nearest upsampling by 2, a 5 x 5 convolution, layer normalisation over the whole image, relu."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = convolution(inputs, outputs, 5)
        self.scale = nn.Parameter(torch.ones(outputs, 1, 1))
        self.shift = nn.Parameter(torch.zeros(outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, h, w) to (B, W', 2h, 2w)."""
        x = upsample_convolve(x, self.convolution)
        return F.relu(F.layer_norm(x, x.shape[1:]) * self.scale + self.shift)


def kaiming_init(module: nn.Module) -> None:
    """He initialisation of every convolution and linear layer, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class ContentEncoder(nn.Module):
    """What must stay: a map of 1 / 2**downsamples of the image's size, instance-normalised so it holds no style."""

    def __init__(self, channels: int, width: int, downsamples: int, residual_blocks: int) -> None:
        super().__init__()
        self.first = convolution(channels, width, 7, bias=False)
        self.down = nn.ModuleList(
            convolution(width * 2**level, width * 2 ** (level + 1), 4, stride=2, bias=False)
            for level in range(downsamples)
        )
        self.residual = nn.Sequential(*(ResidualBlock(width * 2**downsamples) for _ in range(residual_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to content codes (B, W', h, w)."""
        x = F.relu(F.instance_norm(self.first(x)))
        for layer in self.down:
            x = F.relu(F.instance_norm(layer(x)))
        return self.residual(x)


class StyleEncoder(nn.Module):
    """What may change: a short vector; no normalisation, which would remove the mean and variance it looks for."""

    def __init__(self, channels: int, width: int, downsamples: int, style_dim: int) -> None:
        super().__init__()
        # Width doubles twice and then stays, as in the paper.
        sizes = [width * 2 ** min(level, 2) for level in range(downsamples + 1)]
        self.first = convolution(channels, width, 7)
        self.down = nn.ModuleList(convolution(inputs, outputs, 4, stride=2) for inputs, outputs in pairwise(sizes))
        self.last = nn.Linear(sizes[-1], style_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to style codes (B, S)."""
        x = F.relu(self.first(x))
        for layer in self.down:
            x = F.relu(layer(x))
        return self.last(x.mean((2, 3)))


class Decoder(nn.Module):
    """Content and style to an image; the style sets scale and shift of the residual blocks through a small MLP."""

    def __init__(
        self, channels: int, width: int, downsamples: int, residual_blocks: int, style_dim: int, mlp_width: int
    ) -> None:
        super().__init__()
        deep = width * 2**downsamples
        self.blocks = nn.ModuleList(AdaptiveResidualBlock(deep) for _ in range(residual_blocks))
        self.up = nn.ModuleList(
            UpsampleBlock(width * 2 ** (level + 1), width * 2**level) for level in reversed(range(downsamples))
        )
        self.last = convolution(width, channels, 7)
        self.style = nn.Sequential(
            nn.Linear(style_dim, mlp_width),
            nn.ReLU(),
            nn.Linear(mlp_width, mlp_width),
            nn.ReLU(),
            nn.Linear(mlp_width, residual_blocks * 4 * deep),
        )

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """Content codes (B, W', h, w) and style codes (B, S) to images in [-1, 1]."""
        parameters = self.style(style).unflatten(1, (len(self.blocks), 4, -1))
        x = content
        for index, block in enumerate(self.blocks):
            x = block(x, parameters[:, index])
        for block in self.up:
            x = block(x)
        return torch.tanh(narrow_convolve(x, self.last))


class MunitTranslator(ModelMixin, ConfigMixin):
    """The translator; also a nuisance, so `sample` and `apply` are all that the other rooms use.

    Args:
        channels: 1 or 3.
        width: channels of the first layer (64 in the papers); cost grows with its square.
        downsamples: halvings between image and content map. Images whose sides are not multiples of
            2**downsamples are padded by reflection and cropped back.
        residual_blocks: in the content encoder, and again in the decoder.
        style_dim: length of the style code.
        style_downsamples: halvings in the style encoder.
        mlp_width: hidden units between style and AdaIN parameters.
        styles: where the style of a translation comes from: "prior" draws it from N(0, I), as fitting does; "bank"
            takes that of a real head image, which helps while a fit is young. `draw_from` changes it later.
        bank_size: styles of head images that are kept, filled after fitting; 0 keeps none.

    Raises:
        SettingsError: an unknown source of styles, or a bank of none to draw from.

    Example:
        >>> import torch
        >>> from gen_invariance import MunitTranslator
        >>> images, nuisance = torch.rand(2, 1, 8, 8), MunitTranslator(1, width=4, residual_blocks=1, mlp_width=8)
        >>> draw = nuisance.sample(images.shape, generator=torch.Generator().manual_seed(0))
        >>> nuisance.apply(images, draw).shape
        torch.Size([2, 1, 8, 8])
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 1,
        width: Width = 64,
        downsamples: Halvings = 2,
        residual_blocks: Depth = 4,
        style_dim: Width = 8,
        style_downsamples: Halvings = 4,
        mlp_width: Width = 256,
        styles: str = "prior",
        bank_size: Annotated[int, Field(ge=0, le=10**6)] = 0,
    ) -> None:
        super().__init__()
        _check_styles(styles, bank_size)
        self.content_encoder = ContentEncoder(channels, width, downsamples, residual_blocks)
        self.style_encoder = StyleEncoder(channels, width, style_downsamples, style_dim)
        self.decoder = Decoder(channels, width, downsamples, residual_blocks, style_dim, mlp_width)
        kaiming_init(self)
        # An empty bank is not written, so weights from before there were banks load as they are.
        self.register_buffer("bank", torch.zeros(bank_size, style_dim), persistent=bank_size > 0)
        self._bank_copy: tuple[tuple[int, int] | None, Tensor] | None = None

    def draw_from(self, styles: str) -> MunitTranslator:
        """Draw styles from the "prior" or the "bank" from now on; it is saved so, too. Returns the translator itself.

        Raises:
            SettingsError: neither of them, or this translator has no bank.
        """
        _check_styles(styles, self.config.bank_size)
        self.register_to_config(styles=styles)
        return self

    def content(self, images: Tensor) -> Tensor:
        """Content codes (B, W, h, w) of images (B, C, H, W) in [0, 1]."""
        return self.content_encoder(self._padded(images, levels=self.config.downsamples + 1) * 2 - 1)

    def style(self, images: Tensor) -> Tensor:
        """Style codes (B, S) of images (B, C, H, W) in [0, 1]."""
        return self.style_encoder(self._padded(images, levels=self.config.style_downsamples) * 2 - 1)

    def decode(self, content: Tensor, style: Tensor, size: tuple[int, int]) -> Tensor:
        """Images (B, C, *size) in [0, 1] from content codes and style codes (B, S)."""
        image = self.decoder(content, style) * 0.5 + 0.5
        return image[..., : size[0], : size[1]]

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`style`: float32 (B, S), standard normal, or uniformly from the bank; where the generator is."""
        if self.config.styles == "bank":
            rows = whole(self.config.bank_size, (shape[0],), generator=generator)
            return {"style": self._bank_here()[rows].float()}
        return self.sample_prior(shape, generator=generator)

    def _bank_here(self) -> Tensor:
        """The bank on the CPU, where draws are made; fetched from a GPU once, and when it has changed."""
        if self.bank.device.type == "cpu":
            return self.bank
        state = None if self.bank.is_inference() else (id(self.bank), self.bank._version)
        if self._bank_copy is None or state is None or self._bank_copy[0] != state:
            self._bank_copy = (state, self.bank.cpu())
        return self._bank_copy[1]

    def sample_prior(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`style`: float32 (B, S), standard normal, wherever `sample` draws from."""
        return {"style": normal(shape[0], self.config.style_dim, generator=generator)}

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Each image's content in the drawn style; same shape, dtype, device and range."""
        check_images(images, channels=self.config.channels, where="MUNIT translator")
        if not len(images):
            return images.clone()
        return self.render(self.encode(images), draw, images.shape[-2:]).to(images.dtype)

    def encode(self, images: Tensor) -> Tensor:
        """Content codes (B, W, h, w) in the network's dtype; with `render` the two halves of `apply`."""
        return self.content(images.to(self.dtype))

    def render(self, codes: Tensor, draw: Draw, size: tuple[int, int]) -> Tensor:
        """Images (B, C, *size) in [0, 1], in the network's dtype, from content codes in the drawn style."""
        style = draw_to(draw, codes)["style"].to(self.dtype)
        return self.decode(codes, style, size).clamp(0, 1)

    def _padded(self, images: Tensor, *, levels: int) -> Tensor:
        check_side(images, levels=levels, where="MUNIT translator")
        multiple = 2**self.config.downsamples
        height, width = (-size % multiple for size in images.shape[-2:])
        return F.pad(images, (0, width, 0, height), mode="reflect") if height or width else images


def _check_styles(styles: str, bank_size: int) -> None:
    if styles not in ("prior", "bank"):
        raise SettingsError(f"MUNIT translator: styles must be prior or bank, got {styles!r}")
    if styles == "bank" and bank_size < 1:
        raise SettingsError(
            "MUNIT translator: it keeps no bank of styles; use styles=prior, or fit with bank_size=1024"
        )


@settings_class("translator.objective.weights")
class MunitWeights:
    """Weights of the loss terms (protocol of Zhou et al. 2022): adversarial, and three L1 reconstructions."""

    adversarial: NonNegativeFloat = 1.0
    image: NonNegativeFloat = 10.0
    style: NonNegativeFloat = 1.0
    content: NonNegativeFloat = 1.0


@settings_class("translator.objective")
class MunitSettings:
    """What fitting minimises, and how fast."""

    learning_rate: PositiveFloat = 1e-4
    """Of Adam, for translator and discriminator."""
    weight_decay: NonNegativeFloat = 1e-4
    """Of Adam."""
    halve_every: Count = 100_000
    """Steps after which the learning rate is halved, again and again."""
    discriminator_width: Width | None = None
    """Channels of the discriminator's first layer; null takes the translator's width."""
    discriminator_layers: Halvings = 4
    """Stride-2 layers of the discriminator."""
    weights: MunitWeights = Field(default_factory=MunitWeights)
    """Weights of the loss terms."""


class MunitObjective:
    """What fitting minimises: LSGAN, and reconstruction of image, content and style (Huang et al. 2018, section 3).

    One forward pass (`forward`) serves both updates: the discriminator sees its fakes detached, the translator is
    judged on the same fakes. See `objective.Objective` for the methods.

    Args:
        translator: untrained.
        settings: None for the defaults.
    """

    average_decay = None

    def __init__(self, translator: MunitTranslator, settings: MunitSettings | None = None) -> None:
        self.translator, self.settings = translator, settings or MunitSettings()
        config = translator.config
        self.discriminator = PatchDiscriminator(
            config.channels,
            width=self.settings.discriminator_width or config.width,
            layers=self.settings.discriminator_layers,
        )
        self.optimizers = {
            name: torch.optim.Adam(
                module.parameters(),
                lr=self.settings.learning_rate,
                betas=(0.5, 0.999),
                weight_decay=self.settings.weight_decay,
                fused=True,
            )
            for name, module in (("translator", translator), ("discriminator", self.discriminator))
        }

    def compute_learning_rates(self, step: int, steps: int) -> dict[str, float]:
        """Halved every `halve_every` steps."""
        rate = self.settings.learning_rate * 0.5 ** (step // self.settings.halve_every)
        return dict.fromkeys(self.optimizers, rate)

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """Styles of the prior, which is what the decoder learns to understand."""
        return self.translator.sample_prior(shape, generator=generator)

    def forward(self, images: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Encode once, decode twice (own style, drawn style) in one batch."""
        translator, count, drawn = self.translator, len(images), draw["style"]
        content, style = translator.content(images), translator.style(images)
        both = translator.decode(content.repeat(2, 1, 1, 1), torch.cat([style, drawn]), images.shape[-2:])
        return {"real": images, "content": content, "drawn": drawn, "same": both[:count], "fake": both[count:]}

    def discriminator_terms(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """LSGAN, the discriminator's side."""
        return {"discriminator": self.discriminator.loss(out["real"], out["fake"])}

    def translator_terms(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fool the discriminator, and give back image, content and style."""
        weights, translator = self.settings.weights, self.translator
        return {
            "adversarial": weights.adversarial * least_squares(self.discriminator(out["fake"]), 1.0),
            "image": weights.image * F.l1_loss(out["same"], out["real"]) * 2,  # pixels span 2 in the paper's scale
            "style": weights.style * F.l1_loss(translator.style(out["fake"]), out["drawn"]),
            "content": weights.content * F.l1_loss(translator.content(out["fake"]), out["content"]),
        }
