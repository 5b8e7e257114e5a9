"""A translator that reads an image's own tone, stroke width, pose and place, takes them out, and draws them anew.

The new ones are those of a real head image, all of one image together, so limits and dependencies of the nuisance come
out as they are in the data, and an operation that the data do not show stays still. Which operations there are is given
by hand; what they do is read off the data.

    T(x) = tone_k( pose_k( stroke_k( content(x) ) ) ),   k uniform over a bank of head images

Tone, stroke width and place are read in closed form (`tone`, `shape`), the pose by a small network (`pose`).
Place and slant take part where they vary within classes by more than handwriting does of itself.

A photograph has other parts (`photo`, `geometry`): where the object lies, sharpness, light, contrast, tone or colour,
noise, and whether it is mirrored. There the order is

    T(x) = noise_k( tone_k( contrast_k( light_k( sharpness_k( geometry_k(x) ) ) ) ) ).

A result that would be blank or burnt out goes a smaller step (`guard`).
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

from gen_invariance.data.images import ImageData, check_images
from gen_invariance.devices import check_network
from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.protocol import Draw, draw_to, select_rows, uniform, whole
from gen_invariance.settings import Fraction, Rows, Side, Width, check_options
from gen_invariance.translator.redraw import photo
from gen_invariance.translator.redraw.congeal import move_by
from gen_invariance.translator.redraw.geometry import NAMES, describe_poses, move_photo
from gen_invariance.translator.redraw.guard import measure_contrast, translate_safely
from gen_invariance.translator.redraw.parts import find_shown_parts, pick_rows
from gen_invariance.translator.redraw.photo_parts import photo_candidates
from gen_invariance.translator.redraw.pose import PoseTranslator, describe_quantiles
from gen_invariance.translator.redraw.shape import match_width, move_to_centre, read_place, read_width
from gen_invariance.translator.redraw.tone import KINDS, Tone, extract_figure, guess_kind, lay_out, read_tone, take_out

PARTS = ("tone", "stroke", "pose", "slant", "place")
"""Parts of figures."""
PHOTO_PARTS = ("tone", *photo.READINGS, "geometry", "flip")
"""Parts of photographs."""
_LOOKED_AT = 600  # images of up to 128 pixels; fewer larger ones
GEOMETRIES = ("auto", "read", "around")


class RedrawTranslator(ModelMixin, ConfigMixin):
    """The translator; also a nuisance.

    Args:
        channels: 1 or 3.
        parts: which of `PARTS` (of figures) or `PHOTO_PARTS` are read and redrawn. Slant, a shear, is read together
            with the pose; colour is the tone with the covariance of the channels; flip mirrors every other image.
        kind: "figure" (on a plain ground) or "photo", see `tone`.
        width: channels of the pose estimator's first layer.
        bank_size: head images whose readings are kept.
        scale: whether size is part of the pose.
        strength: how far an image is moved from its own readings to the drawn ones, in [0, 1]; 0 returns the image.
        geometry: of photographs, "read" by registering images of a class, drawn "around" the image within
            `geometry.AROUND`, or "auto", the first where it can be; a fit puts what it did in place of "auto".
        side: pixels of the shorter side of the photographs that were fitted on, a unit of sharpness; set by a fit.
        notes: why parts take part; written by a fit.

    Raises:
        SettingsError: an unknown part, kind or geometry, no part, a part that the kind does not have, a strength out of
            range.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 1,
        parts: tuple[str, ...] = ("tone", "stroke", "pose"),
        kind: str = "figure",
        width: Width = 32,
        bank_size: Rows = 1024,
        scale: bool = True,
        strength: Fraction = 1.0,
        geometry: str = "auto",
        side: Side = 32,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise SettingsError(f"redraw translator: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        _check_parts(parts, kind)
        if not 0 <= strength <= 1:
            raise SettingsError(f"redraw translator: strength must lie in [0, 1], got {strength}")
        if geometry not in GEOMETRIES:
            raise SettingsError(f"redraw translator: geometry must be one of {', '.join(GEOMETRIES)}, got {geometry!r}")
        self.pose = PoseTranslator(1, width, bank_size, scale, "slant" in parts) if "pose" in parts else None
        self.register_buffer("ground", torch.zeros(bank_size, channels))
        self.register_buffer("ink", torch.ones(bank_size, channels))
        self.register_buffer("base", torch.zeros(bank_size, channels))
        self.register_buffer("log_width", torch.zeros(bank_size))
        self.register_buffer("place", torch.zeros(bank_size, 2))
        for part in photo.READINGS:
            if part in parts:
                self.register_buffer(part, torch.zeros(bank_size, *photo.reading_shape(part, channels)))
        if "geometry" in parts:
            self.register_buffer("relative_pose", torch.zeros(bank_size, len(NAMES)))
        self.undecided = False

    @property
    def any_size(self) -> bool:
        """Whether images of other sizes than fitted are translated alike; stroke width is counted in pixels."""
        return "stroke" not in self.config.parts

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`row`: int64 (B,), rows of the bank.

        With noise among the parts `seed`, int64 (B,), decides it; with flip images whose `mirror`, float (B,), is
        below half of the strength are mirrored.
        """
        draw = {"row": whole(self.config.bank_size, (shape[0],), generator=generator)}
        if "noise" in self.config.parts:
            draw["seed"] = whole(2**31, (shape[0],), generator=generator)
        if "flip" in self.config.parts:
            draw["mirror"] = uniform(shape[0], 0, 1, generator=generator)
        return draw

    def settle(self, parts: tuple[str, ...], *, geometry: str, side: int, notes: tuple[str, ...]) -> None:
        """Keep these parts alone, and write down what a fit of photographs found; without parts nothing is done."""
        strength = self.config.strength if parts else 0.0
        kept = tuple(parts) or ("tone",)
        for part in set(self.config.parts) - set(kept):
            self._buffers.pop("relative_pose" if part == "geometry" else part, None)
        self.undecided = False
        self.register_to_config(parts=kept, geometry=geometry, side=side, notes=tuple(notes), strength=strength)

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
        if "sharpness" in self.config.parts:
            parameters["sharpness"] = self.sharpness[rows].exp()
        if "noise" in self.config.parts:
            parameters["noise"] = self.noise[rows]
        if "geometry" in self.config.parts:
            parameters |= describe_poses(self.relative_pose[rows])
        return parameters

    def describe(self) -> str:
        """The bank in words, a line for each parameter; of photographs also why parts take part."""
        quantiles = describe_quantiles(self.read_parameters({"row": torch.arange(self.config.bank_size)}))
        return "\n".join([quantiles, *self.config.notes])

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Each image with the readings of a head image; same shape, dtype, device and range."""
        check_images(images, channels=self.config.channels, where="redraw translator")
        strength = self.config.strength
        if not len(images) or not strength:
            return images.clone()
        draw = draw_to(draw, images)
        redraw = self._redraw_photo if self.config.kind == "photo" else self._redraw_figure

        def translate(source: Tensor, rows: Tensor, strength: float) -> tuple[Tensor, Tensor]:
            return redraw(source, select_rows(draw, rows), strength)

        return translate_safely(images.float(), translate, strength).to(images.dtype)

    def _redraw_figure(self, source: Tensor, draw: Draw, strength: float) -> tuple[Tensor, Tensor]:
        """Figures before they are clamped, and the contrast they should have."""
        rows, kind = draw["row"], "figure"
        tone = read_tone(source, kind=kind)
        content, figure = take_out(source, tone, kind=kind), partial(extract_figure, kind=kind)
        seen = figure(content)
        if "stroke" in self.config.parts:
            target = self.log_width[rows].float()
            if strength < 1:
                target = torch.lerp(read_width(seen), target, strength)
            content = match_width(content, target, extract_figure=figure)
        # The stroke first: dilating and eroding what a turn has blurred would change it more than the nuisance did.
        content = self._moved(content, seen, rows, strength)
        own = tone
        if "tone" in self.config.parts:
            tone = tone.toward(self._drawn_tone(rows), strength)
        # The contrast that the image has, in the drawn levels.
        reach, own_reach = ((each.ink - each.ground).abs().amax(1) for each in (tone, own))
        return lay_out(content, tone, kind=kind), measure_contrast(source) * reach / own_reach.clamp(min=0.03)

    def _redraw_photo(self, source: Tensor, draw: Draw, strength: float) -> tuple[Tensor, Tensor]:
        """Photographs before they are clamped, and the contrast they should have."""
        parts, rows, images = self.config.parts, draw["row"], source
        if "flip" in parts:
            images = torch.where((draw["mirror"] < strength / 2)[:, None, None, None], images.flip(3), images)
        if "geometry" in parts:
            images = move_photo(images, strength * self.relative_pose[rows].float())
        own = tone = read_tone(images, kind="photo")
        drawn = {part: getattr(self, part)[rows].float() for part in photo.READINGS if part in parts}
        images = photo.apply_readings(images, drawn, strength, blur=photo.blur_for(self.config.side))
        if "colour" in parts:
            images = photo.give_colour(images, self.ground[rows].float(), drawn["colour"], strength)
            contrast = drawn["colour"].diagonal(dim1=1, dim2=2).mean(1).sqrt()
            contrast = torch.lerp(measure_contrast(source), contrast, strength)
        else:
            if "tone" in parts:
                tone = own.toward(self._drawn_tone(rows), strength)
            if drawn.keys() & photo.CHANGE_TONE:
                images = photo.give_tone(images, tone)
            elif "tone" in parts:
                images = photo.give_tone(images, tone, own=own)
            contrast = (tone.ink - tone.base).square().mean(1).sqrt()
        if "noise" in parts:
            images = photo.give_noise(images, drawn["noise"], draw["seed"], strength)
        return images, contrast

    def _drawn_tone(self, rows: Tensor) -> Tone:
        return Tone(self.ground[rows].float(), self.base[rows].float(), self.ink[rows].float())

    def _moved(self, content: Tensor, seen: Tensor, rows: Tensor, strength: float) -> Tensor:
        """Content in the drawn pose and place, all in one interpolation; pose and place are read off `seen`."""
        points = None
        if "place" in self.config.parts:
            here = read_place(seen)
            points = (here, torch.lerp(here, self.place[rows].float(), strength))
            seen = move_to_centre(seen, here)
        if self.pose is not None:
            target = self.pose.bank[rows].float()
            return self.pose.bring_to(content, target, strength=strength, seen=seen, points=points)
        if points is None:
            return content
        still = torch.eye(2, device=content.device).expand(len(content), 2, 2)
        return move_by(content, still, source=points[0], target=points[1], mode="bicubic")


def _check_parts(parts: tuple[str, ...], kind: str) -> None:
    """Raise `SettingsError` unless `parts` are parts of that kind."""
    known = PHOTO_PARTS if kind == "photo" else PARTS
    if not parts or len(set(parts)) < len(parts) or set(parts) - {*PARTS, *PHOTO_PARTS}:
        raise SettingsError(f"redraw translator: parts must be some of {', '.join(known)}, each once, got {parts}")
    foreign = [part for part in parts if part not in known]
    if foreign:
        what = "photographs" if kind == "photo" else "figures"
        raise SettingsError(f"redraw translator: {what} have no {foreign[0]}; choose of {', '.join(known)}")
    if "slant" in parts and "pose" not in parts:
        raise SettingsError("redraw translator: slant is read together with the pose; add pose to parts")


def build_redraw(data: ImageData, network: Mapping[str, Any] | None = None) -> RedrawTranslator:
    """A new translator for the images of `data`; a kind "auto" and parts None are chosen by looking at large classes.

    Parts None of figures are tone and pose, and stroke, slant and place where the data show them (`parts`): an
    operation that the data do not show costs identity and gains nothing. Those of photographs are chosen by the fit,
    and are all that can be read until then.
    """
    given = dict(network or {})
    parts, kind = given.pop("parts", None), given.pop("kind", "auto")
    options = check_options(RedrawTranslator, given, "translator.network")
    height, width = data.images.shape[2:]
    rows = pick_rows(data, most=min(_LOOKED_AT, max(40, _LOOKED_AT * 128**2 // (height * width))))
    images, labels = data.float_images(rows), data.labels[rows]
    if kind == "auto":
        kind = guess_kind(images)
    chosen = parts
    if chosen is None:
        chosen = photo_candidates(data) if kind == "photo" else ("tone", "pose", *find_shown_parts(images, labels))
    make = partial(RedrawTranslator, data.images.shape[1], tuple(chosen), kind, **options)
    check_network(make, "a translator")
    translator = make()
    translator.undecided = parts is None and kind == "photo"
    return translator
