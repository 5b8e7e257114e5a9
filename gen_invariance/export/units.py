"""One unit of work: a few images decoded, translated, judged, encoded and recorded.

What a unit writes is a function of its images and the settings, not of who computes it or when: draws are seeded by
source and number, and the images that share a batch are fixed by the plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gen_invariance.augment.reference import FrozenReference
from gen_invariance.data.images import to_float, to_uint8
from gen_invariance.errors import GenInvarianceError, RunError, first_line, is_out_of_memory
from gen_invariance.export.formats.base import Entry, Form, Row, Stored
from gen_invariance.export.manifest import write_unit
from gen_invariance.export.pictures import (
    Picture,
    UnusablePictureError,
    decode,
    describe,
    encode,
    prepare,
    scaled_back,
)
from gen_invariance.export.settings import ExportSettings
from gen_invariance.nuisance.protocol import Draw, Nuisance
from gen_invariance.run import named_generator

_FLOOR = 0.05  # narrowest range of a statistic: originals that are all alike do not forbid every change


@dataclass(frozen=True)
class Job:
    """What all units share; picklable, so that workers can have it.

    Attributes:
        form: of the input.
        out, state: output folder, and the working folder in it.
        settings: see `ExportSettings`.
        nuisance: the translator.
        token: SHA-256 of the translator.
        predict: images to logits, for the identity filter; None does without.
        device: where to translate.
    """

    form: Form
    out: Path
    state: Path
    settings: ExportSettings
    nuisance: Nuisance
    token: str
    predict: Predict | None = None
    device: str = "cpu"

    @property
    def channels(self) -> int | None:
        """Channels that the translator takes; None for any."""
        return getattr(getattr(self.nuisance, "config", None), "channels", None)


@dataclass(frozen=True)
class Unit:
    """Some images, and what to do with them.

    Attributes:
        name: unique, and in manifest order by sorting.
        kind: "original" (read, check, take over) or "generated" (translate).
        items: (entry, number of the draw for it); the number is -1 for originals.
        ranges: (2, 3) lowest and highest brightness, contrast and sharpness of the originals; None before they are
            known.
    """

    name: str
    kind: str
    items: tuple[tuple[Entry, int], ...]
    ranges: np.ndarray | None = None


def placed(job: Job) -> Job:
    """The job with its translator in eval mode on its device."""
    return replace(job, nuisance=FrozenReference(job.nuisance).on(torch.device(job.device)))


Predict = Callable[[Tensor], Tensor]
"""Images float (B, C, H, W) in [0, 1] to logits (B, K)."""

Loaded = list[tuple[bytes | np.ndarray | None, Picture | None, str]]
"""Content, picture, and why there is none, of each item of a unit."""


def load(job: Job, unit: Unit, pool: Executor) -> Loaded:
    """Read and decode the unit's images, several at once."""
    return list(pool.map(lambda item: _load(job, item[0]), unit.items))


def _load(job: Job, entry: Entry) -> tuple[bytes | np.ndarray | None, Picture | None, str]:
    if entry.ignored:
        return None, None, entry.ignored
    settings = job.settings
    try:
        content = job.form.read(entry)
        whole = settings.restore_size or job.form.keeps_size
        picture = prepare(decode(content), size=settings.image_size, whole=whole, channels=job.channels)
    except UnusablePictureError as error:
        return None, None, str(error)
    except OSError as error:
        return None, None, f"cannot be read ({error.strerror or error})"
    return content, picture, ""


def translate(job: Job, unit: Unit, loaded: Loaded) -> list[tuple[np.ndarray | None, Row]]:
    """The results of a unit of new images, uint8 (C, H, W), judged; None beside the row of one that was rejected.

    Raises:
        RunError: the device ran out of memory.
    """
    results: list[tuple[np.ndarray | None, Row]] = []
    shapes: dict[tuple[int, ...], list[int]] = {}
    for place, ((entry, copy), (_, picture, reason)) in enumerate(zip(unit.items, loaded, strict=True)):
        results.append((None, _row(job, unit, entry, copy, "unusable", reason)))
        if picture is not None:
            shapes.setdefault(picture.pixels.shape, []).append(place)
    for places in shapes.values():  # pictures of one size make a batch
        pixels = np.stack([loaded[place][1].pixels for place in places])
        items = [unit.items[place] for place in places]
        for place, result in zip(places, _judged(job, unit, items, pixels), strict=True):
            results[place] = result
    return results


@torch.no_grad()
def _judged(
    job: Job, unit: Unit, items: Sequence[tuple[Entry, int]], pixels: np.ndarray
) -> list[tuple[np.ndarray | None, Row]]:
    """Translate a batch uint8 (B, C, H, W) and judge each result."""
    device = torch.device(job.device)
    images = to_float(torch.from_numpy(pixels).to(device))
    try:
        moved = job.nuisance.apply(images, _draws(job, items, images.shape))
    except (MemoryError, RuntimeError, GenInvarianceError) as error:  # such as a picture smaller than a border
        if is_out_of_memory(error):
            raise RunError(f"{job.device} ran out of memory at a batch of {len(items)}; lower batch_size") from error
        reason = f"cannot be translated ({first_line(error)[:120]})"
        return [(None, _row(job, unit, entry, copy, "rejected", reason)) for entry, copy in items]
    finite = torch.isfinite(moved).flatten(1).all(1).tolist()
    strength = (moved - images).abs().double().mean((1, 2, 3)).tolist()
    answers = [None] * len(items) if job.predict is None else job.predict(moved).argmax(1).tolist()
    new = to_uint8(moved.nan_to_num().clamp(0, 1)).cpu().numpy()
    judged = []
    for place, (entry, copy) in enumerate(items):
        quality = outside(describe(new[place]), unit.ranges)
        reason = _fault(job, entry, finite[place], strength[place], quality, answers[place])
        row = _row(job, unit, entry, copy, "rejected" if reason else "kept", reason)
        row |= {"strength": strength[place] if finite[place] else None, "quality": quality}
        judged.append((None if reason else new[place], row))
    return judged


def _draws(job: Job, items: Sequence[tuple[Entry, int]], shape: Sequence[int]) -> Draw:
    """Each image's own draw, from a generator named by source and number."""
    drawn = [
        job.nuisance.sample((1, *shape[1:]), generator=draw_generator(job.settings.seed, entry.key, copy))
        for entry, copy in items
    ]
    return {name: torch.cat([draw[name] for draw in drawn]) for name in drawn[0]}


def draw_generator(seed: int, key: str, copy: int) -> torch.Generator:
    """The generator of the `copy`-th draw for the source called `key`."""
    return named_generator(seed, "augment", key, copy)


def _fault(job: Job, entry: Entry, finite: bool, strength: float, quality: float | None, answer: int | None) -> str:
    """Why a result is rejected; empty when it is not."""
    settings = job.settings
    if not finite:
        return "pixels that are no numbers"
    if strength < settings.near_copy or strength == 0:
        return "near copy of its source"
    if settings.off_distribution is not None and quality is not None and quality > settings.off_distribution:
        return "brightness, contrast or sharpness unlike any original"
    if answer is not None and answer != entry.label:
        return f"the classifier takes it for {job.form.class_names[answer]!r}"
    return ""


def outside(statistics: Sequence[float], ranges: np.ndarray | None) -> float | None:
    """Largest distance of `statistics` (3,) outside `ranges` (2, 3), in units of the range; None without ranges.

    Below the range the unit is the lower end where that is smaller: none of the three can fall below 0, so measured by
    a wide range even a black picture would lie near.
    """
    if ranges is None:
        return None
    low, high = ranges
    value, width = np.asarray(statistics), high - low
    above = (value - high) / np.maximum(width, _FLOOR)
    below = (low - value) / np.maximum(np.minimum(width, low), _FLOOR)
    return float(max(above.max(), below.max(), 0.0))


def store(
    job: Job, unit: Unit, loaded: Loaded, results: list[tuple[np.ndarray | None, Row]] | None, pool: Executor
) -> None:
    """Encode and write what is kept, then record the unit as done."""
    if unit.kind == "original":
        done = [_original(job, unit, item, found) for item, found in zip(unit.items, loaded, strict=True)]
    else:
        done = list(
            pool.map(
                lambda part: _generated(job, part[0][0], part[1], part[2]),
                zip(unit.items, (picture for _, picture, _ in loaded), results, strict=True),
            )
        )
    kept = [item for item, _ in done if item is not None]
    job.form.store(job.out, job.state, unit.name, kept, originals=job.settings.originals)
    write_unit(job.state / "units" / f"{unit.name}.jsonl", [row for _, row in done])


def _original(
    job: Job, unit: Unit, item: tuple[Entry, int], found: tuple[Any, Picture | None, str]
) -> tuple[Stored | None, Row]:
    entry, (content, picture, reason) = item[0], found
    if picture is None:
        status = "ignored" if entry.ignored else "unusable"
        return None, _row(job, unit, entry, -1, status, reason)
    row = _row(job, unit, entry, -1, "kept", "")
    row |= {"width": picture.size[0], "height": picture.size[1], "sha256": _digest(content)}
    row["statistics"] = describe(picture.pixels)
    if job.settings.originals == "reference":
        return None, row
    file = job.form.file_of(entry, None)
    return Stored(entry, file, content, generated=False), row | {"file": file}


def _generated(
    job: Job, entry: Entry, picture: Picture | None, result: tuple[np.ndarray | None, Row]
) -> tuple[Stored | None, Row]:
    pixels, row = result
    if pixels is None or picture is None:
        return None, row
    if job.settings.restore_size or job.form.keeps_size:
        pixels = scaled_back(pixels, picture.size)
    content = pixels if job.form.keeps_size else encode(pixels)
    row |= {"width": pixels.shape[2], "height": pixels.shape[1], "sha256": _digest(content)}
    file = job.form.file_of(entry, _stem(job, entry, row["copy"]))
    return Stored(entry, file, content, generated=True), row | {"file": file}


def _stem(job: Job, entry: Entry, copy: int) -> str:
    """What is added to the source's name: the number of the draw, and a hash of all that made the image."""
    words = "/".join((job.token, str(job.settings.seed), entry.key, str(copy)))
    return f"__{copy:03d}-{hashlib.sha256(words.encode('utf-8', 'surrogateescape')).hexdigest()[:10]}"


def _digest(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else np.ascontiguousarray(content)).hexdigest()


def _row(job: Job, unit: Unit, entry: Entry, copy: int, status: str, reason: str) -> Row:
    generated = unit.kind == "generated"
    seed = draw_generator(job.settings.seed, entry.key, copy).initial_seed() if generated else None
    return {
        "file": "",
        "source": entry.key,
        "class": job.form.class_names[entry.label] if entry.label >= 0 else "",
        "label": entry.label,
        "part": entry.part,
        "kind": unit.kind,
        "status": status,
        "reason": reason,
        "copy": copy,
        "draw_seed": f"{seed:016x}" if generated else "",
        "translator": job.token if generated else "",
        "unit": unit.name,
    }


def token_of(nuisance: Nuisance) -> str:
    """SHA-256 of a translator's settings and weights, or of a hand-written nuisance's kind and settings."""
    digest = hashlib.sha256(type(nuisance).__name__.encode())
    if isinstance(nuisance, nn.Module):
        config = {name: value for name, value in dict(getattr(nuisance, "config", {})).items() if name[:1] != "_"}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in sorted(nuisance.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        parts = {k: [token_of(part) for part in v] if k == "nuisances" else v for k, v in vars(nuisance).items()}
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()
