"""Fit a redraw translator of photographs: read head images, decide which parts they show, fill the bank.

Closed form but for the registration of a thousand pairs at 32 pixels, so it takes seconds. Images are read a few at a
time and only their readings and small copies are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.run import Run
from gen_invariance.translator.redraw import photo
from gen_invariance.translator.redraw.geometry import draw_around
from gen_invariance.translator.redraw.photo_parts import LEAST_ALIGNED, Evidence, weigh_parts
from gen_invariance.translator.redraw.register import SIDES, Aligned, read_geometry
from gen_invariance.translator.redraw.tone import Tone, read_tone
from gen_invariance.translator.samples import draw_balanced_rows, find_class_members
from gen_invariance.translator.settings import FitSettings

if TYPE_CHECKING:
    from gen_invariance.translator.redraw.model import RedrawTranslator

_LEAST_READ = 1000  # images that the choice of parts looks at, where the bank is smaller
_CHUNK = 2_000_000  # pixels read at once
_LEAST_FOUND = 16  # aligned pairs without which there is no distribution of poses


def fit_photo(translator: RedrawTranslator, data: ImageData, settings: FitSettings, *, run: Run) -> RedrawTranslator:
    """Fill the bank, and choose the parts if nobody did; arguments and errors of `fit.fit_redraw`."""
    run.load_latest()  # drops metrics of a stopped fit
    members, size = find_class_members(data, settings), translator.config.bank_size
    banked = draw_balanced_rows(members, size, generator=run.generator("bank"))
    more = max(0, _LEAST_READ - size) if translator.undecided else 0
    rows, number = torch.unique(
        torch.cat([banked, draw_balanced_rows(members, more, generator=run.generator("looked at"))]),
        return_inverse=True,
    )
    number = number[:size]
    side = min(data.images.shape[2:])
    tone, readings, small = _read(translator, data, rows, side)
    labels = data.labels.cpu()[rows]
    groups = None if data.groups is None else data.groups.cpu()[rows]
    evidence = weigh_parts(tone, readings, labels, groups) if translator.undecided else []
    poses, geometry = None, translator.config.geometry
    if "geometry" in translator.config.parts:
        aligned = None
        if geometry != "around":
            aligned = read_geometry(small, labels, groups, rows=number, generator=run.generator("pairs"))
        poses, geometry, found = _choose_geometry(translator, aligned, run.generator("around"))
        evidence += found
    translator.to(data.device)
    for name in ("ground", "base", "ink"):
        getattr(translator, name).copy_(getattr(tone, name)[number])
    for part, values in readings.items():
        getattr(translator, part).copy_(values[number])
    if poses is not None:
        translator.relative_pose.copy_(poses)
    parts = translator.config.parts
    if translator.undecided:
        parts = choose_parts(evidence, flip=bool(settings.flip))
    notes = tuple(each.note for each in evidence)
    if not parts:
        notes += ("the images show no part: they are left as they are (strength 0)",)
    translator.settle(parts, geometry=geometry, side=side, notes=notes)
    run.note(parts=list(parts), geometry=geometry, notes=list(notes))
    return translator.eval()


def choose_parts(evidence: list[Evidence], *, flip: bool) -> tuple[str, ...]:
    """The parts that are kept, and flips where they keep the label."""
    parts = [each.part for each in evidence if each.kept]
    if "colour" in parts and "tone" in parts:
        parts.remove("tone")  # colour is the tone and more
    elif "colour" in parts:
        parts.remove("colour")
    return tuple(parts + ["flip"] * flip)


def _choose_geometry(
    translator: RedrawTranslator, aligned: Aligned | None, generator: torch.Generator
) -> tuple[Tensor, str, list[Evidence]]:
    """The bank of poses, how it came to be, and the evidence."""
    asked, size = translator.config.geometry, translator.config.bank_size
    if aligned is None:
        around = Evidence("geometry", not translator.undecided, {"drawn around the image, pairs aligned": 0.0})
        return draw_around(size, generator=generator), "around", [around]
    shown = aligned.share >= LEAST_ALIGNED and aligned.found >= _LEAST_FOUND
    if asked == "read" and not translator.undecided and aligned.found < _LEAST_FOUND:
        raise SettingsError(
            f"redraw translator: {aligned.found} pairs of images of a class can be aligned, too few to read the "
            "geometry off them; set translator.network.geometry=around"
        )
    numbers = {"pairs aligned": aligned.share, "by chance": 0.05, **aligned.gains}
    evidence = [Evidence("geometry", shown or not translator.undecided, numbers)]
    if shown or (asked == "read" and not translator.undecided):
        return aligned.poses, "read", evidence
    return draw_around(size, generator=generator), "around", evidence


def _read(
    translator: RedrawTranslator, data: ImageData, rows: Tensor, side: int
) -> tuple[Tone, dict[str, Tensor], Tensor]:
    """Tone and readings of the images `rows`, on the CPU, and small copies where the geometry is to be read."""
    parts, blur = translator.config.parts, photo.blur_for(side)
    tones: list[Tone] = []
    readings: dict[str, list[Tensor]] = {part: [] for part in photo.READINGS if part in parts}
    small: list[Tensor] = []
    for images in _chunks(data, rows):
        tone = read_tone(images, kind="photo")
        tones.append(Tone(tone.ground.cpu(), tone.base.cpu(), tone.ink.cpu()))
        for part, values in readings.items():
            values.append(photo.read_part(images, part, blur=blur).cpu())
        if "geometry" in parts and translator.config.geometry != "around":
            small.append(_shrink(images).cpu())
    tone = Tone(*(torch.cat([getattr(each, name) for each in tones]) for name in ("ground", "base", "ink")))
    stacked = {part: torch.cat(values) for part, values in readings.items()}
    return tone, stacked, torch.cat(small) if small else torch.zeros(0)


def _chunks(data: ImageData, rows: Tensor) -> Iterator[Tensor]:
    height, width = data.images.shape[2:]
    for part in rows.split(max(1, _CHUNK // (height * width))):
        yield data.float_images(part)


def _shrink(images: Tensor) -> Tensor:
    """Images whose shorter side has as many pixels as pairs are registered at."""
    height, width = images.shape[2:]
    scale = SIDES[-1] / min(height, width)
    if scale >= 1:
        return images
    size = (max(SIDES[-1], round(height * scale)), max(SIDES[-1], round(width * scale)))
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
