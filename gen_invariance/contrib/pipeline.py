"""A translator as a diffusers pipeline: `TranslationPipeline.from_pretrained(folder)(images, num_draws=4)`.

Loading never imports or runs what a folder names: `translator.registry` lists the kinds of translators, weights are
safetensors.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import create_repo, snapshot_download
from PIL import Image
from torch import Tensor, nn

import gen_invariance.torchvision_guard  # noqa: F401

# isort: split
from diffusers import DiffusionPipeline

from gen_invariance.data.images import check_images, check_pixels, to_float
from gen_invariance.devices import plain_defaults
from gen_invariance.errors import CheckpointError, DataNotFoundError, SettingsError, ShapeError, first_line
from gen_invariance.files import cannot_write, write_json, write_text
from gen_invariance.nuisance.protocol import Draw, draw_to, select_rows
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.verdict import QUALITY_FILE, quality_files, translator_folder

# "*" takes in folders; .txt are the words of a tokenizer.
_HUB_FILES = [
    "model_index.json",
    "README.md",
    QUALITY_FILE,
    *(f"translator/*.{end}" for end in ("json", "safetensors", "txt")),
]


_CARD = """\
---
library_name: diffusers
tags: [gen_invariance, image-to-image, data-augmentation]
{license_line}---

# {kind}

A nuisance transformation learned from the large classes of a long-tailed image set: it changes what does not matter \
to the class, as real images differ in it. Made with `gen_invariance`.

```python
from gen_invariance.contrib.pipeline import TranslationPipeline

pipeline = TranslationPipeline.from_pretrained("FOLDER_OR_REPOSITORY")
moved = pipeline(images, num_draws=4)  # PIL images or float (B, C, H, W) in [0, 1] -> (B, 4, C, H, W)
```

Images have {channels} channel(s). License: {license}; that of the training images applies to what is made of them.
"""


class TranslationPipeline(DiffusionPipeline):
    """Draws translations of images.

    Args:
        translator: a fitted one of any kind.
    """

    model_cpu_offload_seq = "translator"

    def __init__(self, translator: nn.Module) -> None:
        super().__init__()
        self.register_modules(translator=translator)
        self.quality: dict[str, Any] | None = None
        self.fitted_on: dict[str, Any] | None = None
        self._card: str | None = None

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, revision: str | None = None) -> TranslationPipeline:
        """The pipeline saved in `folder`, or one over the translator in a run folder that `fit` wrote; on the CPU.

        Args:
            folder: of a pipeline, a translator or a run; a name such as "owner/name" that is no folder is looked up on
                the hub.
            revision: of a repository on the hub.

        Raises:
            CheckpointError: damaged, truncated, or something else than a translator.
            DataNotFoundError: neither a folder nor a repository that can be reached.
        """
        path = Path(folder) if Path(folder).is_dir() else _downloaded(str(folder), revision)
        index = path / "model_index.json"
        if index.is_file():
            kind = _read_json(index).get("_class_name")
            if kind != cls.__name__:
                raise CheckpointError(f"{path} holds a {kind}, not a {cls.__name__}; choose another folder")
        pipeline = cls(load_translator(path))
        inner = translator_folder(path)
        quality = next((file for file in quality_files(inner) if file.is_file()), None)
        pipeline.quality = _read_json(quality) if quality else None
        run = inner.parent / "run.json"
        pipeline.fitted_on = _read_json(run).get("config", {}).get("data") if run.is_file() else None
        card = path / "README.md"
        pipeline._card = card.read_text(encoding="utf-8") if index.is_file() and card.is_file() else None
        return pipeline

    @torch.no_grad()
    @plain_defaults()
    def __call__(
        self,
        images: Tensor | Image.Image | Sequence[Image.Image],
        *,
        num_draws: int = 1,
        strength: float = 1.0,
        generator: torch.Generator | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Translations of each image: float32 (B, num_draws, C, H, W) in [0, 1], on the pipeline's device.

        Args:
            images: PIL images of one size, converted to the translator's channels; or float (B, C, H, W) in [0, 1]; or
                uint8 (B, C, H, W).
            num_draws: translations of each image.
            strength: 1 translates fully, 0 least. Widths of learned parameters shrink by it; a style moves from the
                image's own towards the drawn one.
            generator: CPU generator of the draws; None draws afresh each time. The result does not depend on
                `batch_size` (up to float rounding).
            batch_size: images at a time.

        Raises:
            SettingsError: no draw or batch, a strength outside [0, 1] or one the translator does not know.
            ShapeError: images of several sizes, or of other channels than the translator's.
            RangeError: pixels that were normalised or are 0..255.
        """
        if num_draws < 1 or batch_size < 1 or not 0 <= strength <= 1:
            raise SettingsError(
                "translation: num_draws and batch_size must be at least 1 and strength in [0, 1], got "
                f"{num_draws}, {batch_size}, {strength}"
            )
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        if generator.device.type != "cpu":
            raise SettingsError(f"translation: give a CPU generator, got one on {generator.device}")
        source = self._tensor(images)
        count = len(source)
        draws = [self.translator.sample(source.shape, generator=generator) for _ in range(num_draws)]
        result = torch.empty(count, num_draws, *source.shape[1:], device=source.device)
        with self.progress_bar(total=count * num_draws) as bar:
            for index, draw in enumerate(draws):
                for rows in torch.arange(count).split(batch_size):
                    chosen = rows.to(source.device)
                    result[chosen, index] = self._translate(source[chosen], select_rows(draw, rows), strength)
                    bar.update(len(rows))
        return result

    def _tensor(self, images: Tensor | Image.Image | Sequence[Image.Image]) -> Tensor:
        """Images as float32 (B, C, H, W) on the pipeline's device."""
        channels = self.translator.config.channels
        if not isinstance(images, Tensor):
            listed = [images] if isinstance(images, Image.Image) else list(images)
            if not listed or not all(isinstance(image, Image.Image) for image in listed):
                raise ShapeError("translation: give a tensor (B, C, H, W) or a list of at least one PIL image")
            if len({image.size for image in listed}) > 1:
                sizes = sorted({f"{width}x{height}" for width, height in (image.size for image in listed)})
                raise ShapeError(f"translation: all images must have one size, got {', '.join(sizes[:3])}; resize them")
            mode = "L" if channels == 1 else "RGB"
            pixels = torch.from_numpy(np.stack([np.asarray(image.convert(mode)) for image in listed]))
            images = pixels[:, None] if channels == 1 else pixels.permute(0, 3, 1, 2)
        images = to_float(images)
        check_images(images, channels=channels, where="translation")
        check_pixels(images, where="translation")
        return images.to(self._execution_device, torch.float32)

    def _translate(self, images: Tensor, draw: Draw, strength: float) -> Tensor:
        """`images` under `draw`, weakened to `strength` in the way the translator knows."""
        translator, draw = self.translator, draw_to(draw, images)
        if strength == 1:
            return translator.apply(images, draw).float()
        if "strength" in inspect.signature(translator.apply).parameters:
            return translator.apply(images, draw, strength=strength).float()
        if set(draw) == {"u"}:
            return translator.apply(images, {"u": draw["u"] * strength}).float()
        if set(draw) == {"style"} and hasattr(translator, "style"):
            own = translator.style(images.to(translator.dtype)).to(draw["style"])
            return translator.apply(images, {"style": torch.lerp(own, draw["style"], strength)}).float()
        raise SettingsError(f"a {type(translator).__name__} has no strength but 1; leave strength out")

    def save_pretrained(
        self,
        save_directory: Path | str,
        *,
        license: str | None = None,  # noqa: A002  (the name that model cards use)
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write `model_index.json`, `translator/` (config and safetensors), `README.md`, and `quality.json` if known.

        Args:
            save_directory: created when missing.
            license: of the weights, for the card; ask whoever owns the training images.
            push_to_hub: upload as well; `options` are then those of `push_to_hub`.
            options: `repo_id`, by default the folder's name, and others of `push_to_hub`.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder = Path(save_directory)
        known = {name: options.pop(name) for name in ("safe_serialization", "variant") if name in options}
        if known.get("safe_serialization") is False:
            raise SettingsError("weights are saved as safetensors only; leave safe_serialization out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            super().save_pretrained(str(folder))
        except OSError as error:
            raise cannot_write(folder, error) from error
        if self.quality is not None:
            data = {name: value for name, value in self.quality.get("data", {}).items() if name != "path"}
            write_json(folder / QUALITY_FILE, {**self.quality, "data": data})  # a path says more than others need
        if self._card is None or license is not None:
            self._card = self.card(license=license)
        write_text(folder / "README.md", self._card)
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", folder.name), **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        license: str | None = None,  # noqa: A002
    ) -> str:
        """Upload what `save_pretrained` writes, own model card included; returns the address of the commit.

        Args:
            repo_id: "owner/name"; made when missing.
            commit_message: as the three below, as in diffusers' `PushToHubMixin`.
            private: whether a new repository is private.
            token: of the account; None takes the stored one.
            create_pr: open a pull request instead of committing.
            license: see `save_pretrained`.
        """
        repo = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, license=license)
            return self._upload_folder(folder, repo, token=token, commit_message=commit_message, create_pr=create_pr)

    def card(self, *, license: str | None = None) -> str:  # noqa: A002
        """The model card as Markdown."""
        text = _CARD.format(
            license_line=f"license: {json.dumps(license)}\n" if license else "",
            kind=type(self.translator).__name__,
            channels=self.translator.config.channels,
            license=license or "not stated",
        )
        data = self.fitted_on or (self.quality or {}).get("data")
        return "\n".join([text, *_data_lines(data), *_quality_lines(self.quality)])


def _data_lines(data: dict[str, Any] | None) -> list[str]:
    shown = {name: value for name, value in (data or {}).items() if name != "path" and value not in (None, {}, "")}
    if not shown:
        return ["## Training data", "", "Not recorded.", ""]
    return ["## Training data", "", *(f"* {name}: `{_plain(value)}`" for name, value in shown.items()), ""]


def _quality_lines(quality: dict[str, Any] | None) -> list[str]:
    if quality is None:
        return ["## Quality", "", "Not inspected; `gen-invariance inspect translator=FOLDER data=...` does.", ""]
    lines = ["## Quality", "", f"Verdict of `gen-invariance inspect`: **{_plain(quality.get('verdict'))}**.", ""]
    lines += [f"* {_plain(reason)}" for reason in quality.get("reasons", [])]
    lines += ["", "| figure | value | 95 % interval | untouched images |", "|---|---|---|---|"]
    for name, entry in quality.get("figures", {}).items():
        value, low, high, floor = (_number(entry.get(key)) for key in ("value", "low", "high", "untouched"))
        lines.append(f"| {_plain(name)} | {value} | {low} to {high} | {floor} |")
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _plain(text: object) -> str:
    """`text` on one line, without signs that Markdown or HTML would act on."""
    return "".join("'" if letter in "`<>|" else letter for letter in " ".join(str(text).split()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); it is damaged") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a mapping; it is damaged")
    return found


def _downloaded(name: str, revision: str | None) -> Path:
    """The repository `name` of the hub, only the files that a translator needs."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client raises many kinds: no network, no such name, no right
        raise DataNotFoundError(
            f"{name} is neither a folder nor a repository that can be reached ({first_line(error)}); check the path"
        ) from error
