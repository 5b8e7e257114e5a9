"""One unit of work: a few images decoded, translated, judged, encoded and recorded.

What a unit writes is a function of its images and the settings, not of who computes it or when: draws are seeded by
source and number, and the images that share a batch are fixed by the plan.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gen_invariance.augment.reference import FrozenReference
from gen_invariance.data.images import round_levels, to_float
from gen_invariance.data.readers.pictures import UnusablePictureError
from gen_invariance.devices import send
from gen_invariance.errors import GenInvarianceError, RunError, first_line, is_device_failure, is_out_of_memory
from gen_invariance.export.encoding import Encoding
from gen_invariance.export.formats.base import Entry, Format, Output, Row, Stored
from gen_invariance.export.manifest import write_unit
from gen_invariance.export.native import translate_native, working_size
from gen_invariance.export.pictures import Picture, decode, decode_with_encoding, describe, prepare
from gen_invariance.export.settings import ExportSettings
from gen_invariance.nuisance.protocol import Draw, Nuisance
from gen_invariance.run import named_generator

_FLOOR = 0.05  # narrowest range of a statistic: originals that are all alike do not forbid every change

Predict = Callable[[Tensor], Tensor]
"""Images float (B, C, H, W) in [0, 1] to logits (B, K)."""

THREADS = 4
"""That decode and encode."""

UNIT_PIXELS = 48 * 2**20
"""Pixels of a unit of native results at most: their files are held in memory until the unit is written."""

_PIECE_PIXELS = 4 * 2**20  # translated at once, unless it is one picture

Item = tuple[Entry, int]
"""An image, and the number of the draw for it; -1 for an original."""


@dataclass(frozen=True)
class Unit:
    """Some images, and what to do with them.

    Names sort in manifest order. Kind "original" means to read, check and take over, "generated" to translate.
    `ranges`, (2, 3), are the lowest and highest brightness, contrast and sharpness of the originals, `pixels` how many
    each picture has, where known.
    """

    name: str
    kind: str
    items: tuple[Item, ...]
    ranges: np.ndarray | None = None
    pixels: tuple[int, ...] = ()

    def pieces(self) -> list[Unit]:
        """The unit in parts that are decoded and translated one after another, so that large pictures fit in memory."""
        if self.kind == "original":
            return [self]
        bounds = [0, *cut_by_pixels(self.pixels, most=_PIECE_PIXELS), len(self.items)]
        return [replace(self, items=self.items[start:end], pixels=()) for start, end in pairwise(bounds)]


def cut_by_pixels(pixels: Sequence[int], *, most: int) -> list[int]:
    """Where to cut a row of pictures, so that no part has more than `most` pixels, unless it is one picture."""
    cuts, total = [], 0
    for index, number in enumerate(pixels):
        total += number
        if total > most and index > (cuts[-1] if cuts else 0):
            cuts.append(index)
            total = number
    return cuts


class Decoded(NamedTuple):
    """The image of an item; or the reason why there is none. Of an original only what its manifest row says."""

    picture: Picture | None = None
    encoding: Encoding = Encoding()
    reason: str = ""
    facts: dict[str, Any] | None = None


class Result(NamedTuple):
    """What the translator made of an item, uint8 (C, H, W), None where it was rejected; and its manifest row."""

    pixels: np.ndarray | None
    row: Row


Finished = tuple[Stored | None, Row]
"""What is written of an item, and its manifest row."""


@dataclass(frozen=True)
class Job:
    """What all units share, and the steps of a unit; picklable, so that workers can have it.

    `token` is the SHA-256 of the translator, `predict` the classifier of the identity filter, where there is one.
    """

    data: Format
    output: Output
    settings: ExportSettings
    nuisance: Nuisance
    token: str
    predict: Predict | None = None
    device: str = "cpu"

    def on_device(self) -> Job:
        """The job with its translator in eval mode on its device."""
        return replace(self, nuisance=FrozenReference(self.nuisance).on(torch.device(self.device)))

    def record_path(self, unit: str) -> Path:
        """The file which says that a unit is done."""
        return self.output.state / "units" / f"{unit}.jsonl"

    @property
    def is_native(self) -> bool:
        """Whether results show all of their source, at its size."""
        return self.settings.results == "native" or self.data.keeps_size

    # ---- decode

    def decode(self, piece: Unit, pool: Executor) -> list[Decoded]:
        """Read and decode the piece's images, several at once."""
        step = self._look_at_original if piece.kind == "original" else self._decode
        return list(pool.map(step, (entry for entry, _ in piece.items)))

    def _decode(self, entry: Entry) -> Decoded:
        try:
            image, encoding = decode_with_encoding(self.data.read(entry))
            return Decoded(self._prepare(image), encoding)
        except (UnusablePictureError, OSError) as error:
            return Decoded(reason=explain(error))

    def _look_at_original(self, entry: Entry) -> Decoded:
        if entry.ignored or entry.problem:
            return Decoded(reason=entry.ignored or entry.problem)
        try:
            content = self.data.read(entry)
            picture = self._prepare(decode(content))
        except (UnusablePictureError, OSError) as error:
            return Decoded(reason=explain(error))
        width, height = picture.size
        facts = {"width": width, "height": height, "sha256": _digest(content), "statistics": describe(picture.pixels)}
        return Decoded(facts=facts)

    def _prepare(self, image: Image.Image) -> Picture:
        channels = getattr(getattr(self.nuisance, "config", None), "channels", None)  # None takes any
        return prepare(image, size=None if self.is_native else self.settings.image_size, channels=channels)

    # ---- translate

    def translate(self, piece: Unit, decoded: Sequence[Decoded]) -> list[Result]:
        """The results of a piece of new images, judged; none for originals.

        Raises:
            RunError: the device ran out of memory, or failed.
        """
        if piece.kind == "original":
            return []
        results, indices_of_shape = [], defaultdict(list)
        for index, (item, image) in enumerate(zip(piece.items, decoded, strict=True)):
            results.append(Result(None, self._row(piece, item, "unusable", image.reason)))
            if image.picture is not None:
                indices_of_shape[image.picture.pixels.shape].append(index)
        for indices in indices_of_shape.values():  # pictures of one size make a batch
            batch = replace(piece, items=tuple(piece.items[index] for index in indices))
            for index, result in zip(indices, self._translate_batch(batch, [decoded[i] for i in indices]), strict=True):
                results[index] = result
        return results

    def _translate_batch(self, unit: Unit, decoded: Sequence[Decoded]) -> list[Result]:
        """Translate the unit's images, which are of one size, and judge each; errors of a device end the work."""
        try:
            return self._translated_and_judged(unit, decoded)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                few = "lower batch_size" if len(unit.items) > 1 else "scale the picture down, or set results=square"
                reason = f"ran out of memory at a batch of {len(unit.items)}; {few}"
            elif is_device_failure(error):
                reason = f"failed ({first_line(error)[:120]}); the same command with resume=true goes on from there"
            else:
                raise
            raise RunError(f"{self.device} {reason}") from error

    @torch.no_grad()
    def _translated_and_judged(self, unit: Unit, decoded: Sequence[Decoded]) -> list[Result]:
        items, pixels = unit.items, np.stack([image.picture.pixels for image in decoded])
        images = to_float(send(torch.from_numpy(pixels), torch.device(self.device)))

        def translate(images: Tensor) -> Tensor:
            return self.nuisance.apply(images, self._draw(items, images.shape))

        try:
            size = working_size(self.nuisance, pixels.shape[2:], image_size=self.settings.image_size)
            moved, usable = translate_native(images, translate, size=size)
        except (RuntimeError, GenInvarianceError) as error:  # such as a picture smaller than a border
            if is_out_of_memory(error) or is_device_failure(error):
                raise  # the pictures may be as good as any
            reason = f"cannot be translated ({first_line(error)[:120]})"
            return [Result(None, self._row(unit, item, "rejected", reason)) for item in items]
        del images
        finite = torch.isfinite(moved).flatten(1).all(1).tolist()
        answers = [None] * len(items) if self.predict is None else self.predict(moved).argmax(1).tolist()
        new = round_levels(moved.nan_to_num_()).cpu().numpy()
        results = []
        for index, item in enumerate(items):
            if self.is_native and decoded[index].encoding.mode == "1":  # judged as it will be stored
                new[index] = np.where(new[index].mean(0) < 127.5, 0, 255)
            strength = mean_difference(new[index], pixels[index])
            quality = outside(describe(new[index]), unit.ranges)
            reason = self._fault(item[0], strength, quality, answers[index])
            if not usable[index]:
                reason = "moves or redraws shapes, which cannot be brought to its source's size"
            if not finite[index]:
                strength, reason = None, "pixels that are no numbers"
            row = self._row(unit, item, "rejected" if reason else "kept", reason)
            row |= {"strength": strength, "quality": quality}
            results.append(Result(None if reason else new[index], row))
        return results

    def _draw(self, items: Sequence[Item], shape: Sequence[int]) -> Draw:
        """Each image's own draw, from a generator named by source and number."""
        draws = []
        for entry, copy in items:
            generator = draw_generator(self.settings.seed, entry.key, copy)
            draws.append(self.nuisance.sample((1, *shape[1:]), generator=generator))
        return {name: torch.cat([draw[name] for draw in draws]) for name in draws[0]}

    def _fault(self, entry: Entry, strength: float, quality: float | None, answer: int | None) -> str:
        """Why a result is rejected; empty when it is not."""
        settings = self.settings
        if strength < settings.near_copy or strength == 0:
            return "near copy of its source"
        if settings.off_distribution is not None and quality is not None and quality > settings.off_distribution:
            return "brightness, contrast or sharpness unlike any original"
        if answer is not None and answer != entry.label:
            return f"the classifier takes it for {self.data.class_names[answer]!r}"
        return ""

    # ---- store

    def encode(
        self, piece: Unit, decoded: Sequence[Decoded], results: Sequence[Result], pool: Executor
    ) -> list[Finished]:
        """What is to be written of a piece, and its manifest rows."""
        if piece.kind == "original":
            return [self._take_over(piece, item, image) for item, image in zip(piece.items, decoded, strict=True)]
        return list(pool.map(self._encode, piece.items, decoded, results))

    def store(self, unit: Unit, finished: Sequence[Finished]) -> None:
        """Write what is kept of a whole unit, then record the unit as done."""
        kept = [stored for stored, _ in finished if stored is not None]
        if kept and unit.kind == "original":
            self.data.store_originals(self.output, kept)
        elif kept:
            self.data.store_new(self.output, unit.name, kept)
        write_unit(self.record_path(unit.name), [row for _, row in finished])

    def _take_over(self, unit: Unit, item: Item, image: Decoded) -> Finished:
        entry = item[0]
        if image.facts is None:
            return None, self._row(unit, item, "ignored" if entry.ignored else "unusable", image.reason)
        row = self._row(unit, item, "kept", "") | image.facts
        if self.settings.originals == "reference":
            return None, row
        row["file"] = self.data.file_name(entry, None)
        return Stored(entry, row["file"], b""), row

    def _encode(self, item: Item, image: Decoded, result: Result) -> Finished:
        (entry, copy), (pixels, row) = item, result
        if pixels is None:
            return None, row
        encoding = image.encoding if self.is_native else Encoding(mode="L" if len(pixels) == 1 else "RGB")
        content = np.ascontiguousarray(pixels) if self.data.keeps_size else encoding.encode(pixels)
        # The name says the number of the draw, and has a hash of all that made the image.
        words = "/".join((self.token, str(self.settings.seed), entry.key, str(copy)))
        digest = hashlib.sha256(words.encode("utf-8", "surrogateescape")).hexdigest()
        extension = self.data.extension(entry) if self.is_native and encoding.native else ""
        row["file"] = self.data.file_name(entry, f"__{copy:03d}-{digest[:10]}{extension or encoding.extension}")
        row |= {"width": pixels.shape[2], "height": pixels.shape[1], "sha256": _digest(content)}
        return Stored(entry, row["file"], content), row

    def _row(self, unit: Unit, item: Item, status: str, reason: str) -> Row:
        (entry, copy), generated = item, unit.kind == "generated"
        seed = draw_generator(self.settings.seed, entry.key, copy).initial_seed()
        return {
            "file": "",
            "source": entry.key,
            "class": self.data.class_names[entry.label] if entry.label >= 0 else "",
            "label": entry.label,
            "part": entry.part,
            "kind": unit.kind,
            "status": status,
            "reason": reason,
            "copy": copy,
            "draw_seed": f"{seed:016x}" if generated else "",
            "translator": self.token if generated else "",
            "unit": unit.name,
        }


_worker_job: Job | None = None  # a worker process serves one job all its life


def start_worker(job: Job) -> None:
    """What a worker process does first."""
    global _worker_job
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="PIL")  # this process does nothing else
    _worker_job = job.on_device()


def run_unit(unit: Unit) -> str:
    """What a worker process does for a unit: the same steps as in one process, one after another; its name."""
    finished: list[Finished] = []
    with ThreadPoolExecutor(THREADS) as pictures:
        for piece in unit.pieces():
            decoded = _worker_job.decode(piece, pictures)
            finished += _worker_job.encode(piece, decoded, _worker_job.translate(piece, decoded), pictures)
        _worker_job.store(unit, finished)
    return unit.name


RunUnits = Callable[[Iterable[Unit]], Iterator[str]]
"""Carries out units; yields the name of each when it is recorded. Raises RunError when a worker died."""


def draw_generator(seed: int, key: str, copy: int) -> torch.Generator:
    """The generator of the `copy`-th draw for the source called `key`."""
    return named_generator(seed, "augment", key, copy)


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


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of uint8 arrays in units of [0, 1]; exact, so the same on every machine."""
    difference = np.maximum(first, second) - np.minimum(first, second)
    return int(difference.sum(dtype=np.int64)) / (255 * difference.size)


def translator_token(nuisance: Nuisance) -> str:
    """SHA-256 of a translator's settings and weights, or of a hand-written nuisance's kind and settings."""
    digest = hashlib.sha256(type(nuisance).__name__.encode())
    if isinstance(nuisance, nn.Module):
        config = {name: value for name, value in dict(getattr(nuisance, "config", {})).items() if name[:1] != "_"}
        if config.get("not_identified", "") is None:  # added later: translators without it are the same
            del config["not_identified"]
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in sorted(nuisance.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        parts = {
            k: [translator_token(part) for part in v] if k == "nuisances" else v for k, v in vars(nuisance).items()
        }
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def explain(error: Exception) -> str:
    """Why a picture cannot be used, for the manifest."""
    return f"cannot be read ({error.strerror or error})" if isinstance(error, OSError) else str(error)


def _digest(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content).hexdigest()
