"""A translator that reads an image's own tone, stroke width, pose and place, takes them out, and draws them anew.

The new ones are those of a real head image, all of one image together, so limits and dependencies of the nuisance come
out as they are in the data, and an operation that the data do not show stays still. Which operations there are is given
by hand; what they do is read off the data.

    T(x) = tone_k( pose_k( stroke_k( content(x) ) ) ),   k uniform over a bank of head images

Tone, stroke width and place are read in closed form (`tone`, `shape`), the pose by a small network (`pose`).
Place and slant take part where they vary within classes by more than handwriting does of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gen_invariance.torchvision_guard  # noqa: F401  (diffusers may lead to torchvision)

# isort: split
# diffusers reloads a model only if its module holds these very names.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import PositiveInt

from gen_invariance.data.images import ImageData, check_images
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Draw, draw_to, whole
from gen_invariance.settings import Fraction, check_options
from gen_invariance.translator.redraw.congeal import move_by
from gen_invariance.translator.redraw.parts import find_shown_parts, pick_rows
from gen_invariance.translator.redraw.pose import PoseTranslator, describe_quantiles
from gen_invariance.translator.redraw.shape import match_width, move_to_centre, read_place, read_width
from gen_invariance.translator.redraw.tone import KINDS, Tone, extract_figure, guess_kind, put_in, read_tone, take_out

PARTS = ("tone", "stroke", "pose", "slant", "place")


class RedrawTranslator(ModelMixin, ConfigMixin):
    """The translator; also a nuisance.

    Args:
        channels: 1 or 3.
        parts: which of `PARTS` are read and redrawn; slant, a shear, is read together with the pose.
        kind: "figure" (on a plain ground) or "photo", see `tone`. A photo has tone only.
        width: channels of the pose estimator's first layer.
        bank_size: head images whose readings are kept.
        scale: whether size is part of the pose.
        strength: how far an image is moved from its own readings to the drawn ones, in [0, 1]; 0 returns the image.

    Raises:
        SettingsError: an unknown part or kind, no part, a part that the kind does not have, a strength out of range.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 1,
        parts: tuple[str, ...] = ("tone", "stroke", "pose"),
        kind: str = "figure",
        width: PositiveInt = 32,
        bank_size: PositiveInt = 1024,
        scale: bool = True,
        strength: Fraction = 1.0,
    ) -> None:
        super().__init__()
        if not parts or set(parts) - set(PARTS) or len(set(parts)) < len(parts):
            raise SettingsError(f"redraw translator: parts must be some of {', '.join(PARTS)}, each once, got {parts}")
        if kind not in KINDS:
            raise SettingsError(f"redraw translator: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "photo" and set(parts) != {"tone"}:
            raise SettingsError("redraw translator: photographs have no stroke, pose or place; set parts=[tone]")
        if "slant" in parts and "pose" not in parts:
            raise SettingsError("redraw translator: slant is read together with the pose; add pose to parts")
        if not 0 <= strength <= 1:
            raise SettingsError(f"redraw translator: strength must lie in [0, 1], got {strength}")
        self.pose = PoseTranslator(1, width, bank_size, scale, "slant" in parts) if "pose" in parts else None
        self.register_buffer("ground", torch.zeros(bank_size, channels))
        self.register_buffer("ink", torch.ones(bank_size, channels))
        self.register_buffer("base", torch.zeros(bank_size, channels))
        self.register_buffer("log_width", torch.zeros(bank_size))
        self.register_buffer("place", torch.zeros(bank_size, 2))

    @property
    def any_size(self) -> bool:
        """Whether images of other sizes than fitted are translated alike; stroke width is counted in pixels."""
        return "stroke" not in self.config.parts

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`row`: int64 (B,), rows of the bank."""
        return {"row": whole(self.config.bank_size, (shape[0],), generator=generator)}

    def read_parameters(self, draw: Draw) -> dict[str, Tensor]:
        """What a draw gives, in readable units, each (B,): pixel units, pixels, degrees, factor, shares of the side."""
        rows = draw["row"].to(self.ground.device)
        parameters: dict[str, Tensor] = {}
        if "tone" in self.config.parts:
            low, high = ("mean", "mean + deviation") if self.config.kind == "photo" else ("ground", "ink")
            parameters |= {low: self.ground[rows].mean(1), high: self.ink[rows].mean(1)}
        if "stroke" in self.config.parts:
            parameters["stroke width"] = self.log_width[rows].exp()
        if self.pose is not None:
            parameters |= self.pose.read_parameters({"pose": rows})
        if "place" in self.config.parts:
            parameters |= {"place across": self.place[rows, 0], "place down": self.place[rows, 1]}
        return parameters

    def describe(self) -> str:
        """The bank in words, a line for each parameter."""
        return describe_quantiles(self.read_parameters({"row": torch.arange(self.config.bank_size)}))

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Each image with the readings of a head image; same shape, dtype, device and range."""
        check_images(images, channels=self.config.channels, where="redraw translator")
        strength, kind = self.config.strength, self.config.kind
        if not len(images) or not strength:
            return images.clone()
        rows, source = draw_to(draw, images)["row"], images.float()
        tone = read_tone(source, kind=kind)
        content, figure = take_out(source, tone, kind=kind), partial(extract_figure, kind=kind)
        seen = figure(content)
        if "stroke" in self.config.parts:
            target = self.log_width[rows].float()
            if strength < 1:
                target = torch.lerp(read_width(seen), target, strength)
            content = match_width(content, target, extract_figure=figure)
        # The stroke first: dilating and eroding what a turn has blurred would change it more than the nuisance did.
        content = self._moved(content, seen, rows)
        if "tone" in self.config.parts:
            drawn = Tone(self.ground[rows].float(), self.base[rows].float(), self.ink[rows].float())
            tone = tone.toward(drawn, strength)
        return put_in(content, tone, kind=kind).to(images.dtype)

    def _moved(self, content: Tensor, seen: Tensor, rows: Tensor) -> Tensor:
        """Content in the drawn pose and place, all in one interpolation; pose and place are read off `seen`."""
        points = None
        if "place" in self.config.parts:
            here = read_place(seen)
            points = (here, torch.lerp(here, self.place[rows].float(), self.config.strength))
            seen = move_to_centre(seen, here)
        if self.pose is not None:
            target = self.pose.bank[rows].float()
            return self.pose.bring_to(content, target, strength=self.config.strength, seen=seen, points=points)
        if points is None:
            return content
        still = torch.eye(2, device=content.device).expand(len(content), 2, 2)
        return move_by(content, still, source=points[0], target=points[1], mode="bicubic")


def build_redraw(data: ImageData, network: Mapping[str, Any] | None = None) -> RedrawTranslator:
    """A new translator for the images of `data`; a kind "auto" and parts None are chosen by looking at large classes.

    Of photographs that is the tone, of figures tone and pose, and stroke, slant and place where the data show them
    (`parts`): an operation that the data do not show costs identity and gains nothing.
    """
    given = dict(network or {})
    parts, kind = given.pop("parts", None), given.pop("kind", "auto")
    options = check_options(RedrawTranslator, given, "translator.network")
    rows = pick_rows(data)
    images, labels = data.float_images(rows), data.labels[rows]
    if kind == "auto":
        kind = guess_kind(images)
    if parts is None:
        parts = ("tone",) if kind == "photo" else ("tone", "pose", *find_shown_parts(images, labels))
    return RedrawTranslator(data.images.shape[1], tuple(parts), kind, **options)
