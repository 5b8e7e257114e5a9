"""Any diffusers pipeline that turns images into images, as a translator: not fitted, the prompts say what changes.

For users with images large enough for such a pipeline. An image is scaled to the pipeline's size, changed under a drawn
prompt from a drawn seed, and scaled back. The pipeline is opened from a local folder and saved beside the translator's
config, so that a saved translator is whole; nothing is downloaded and no code in the folder is run.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from torch import Tensor, nn

import gen_invariance.torchvision_guard  # noqa: F401

# isort: split
# diffusers reloads a model only if its module holds these very names.
import diffusers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import is_transformers_available

from gen_invariance.contrib.folders import check_configs, list_files, load_networks
from gen_invariance.data.images import ImageData, check_images
from gen_invariance.errors import CheckpointError, DataNotFoundError, SettingsError, first_line
from gen_invariance.nuisance.protocol import Draw, whole
from gen_invariance.settings import check_options

_PIPELINE = "pipeline"
_OWN = ("image", "prompt", "strength", "num_inference_steps", "generator", "output_type", "num_images_per_prompt")
"""Arguments of a pipeline's call that are not the user's to give."""


class DiffusersTranslator(ModelMixin, ConfigMixin):
    """The translator; also a nuisance. `from_folder` makes one.

    Args:
        pipeline: an image-to-image pipeline; its call takes `image`.
        prompts: one is drawn for each image. They have to say what may change and leave the class alone ("a photo at
            night"), and to suit every class.
        strength: 0 leaves the image as it is, 1 keeps nothing of it; None for a pipeline that knows no strength
            (pipelines that follow instructions).
        steps: denoising steps from full noise; at strength s about s times as many are taken.
        size: side in pixels that the pipeline works at; None asks the pipeline.
        channels: 1 or 3, of the images.
        call_options: further arguments of the pipeline's call, such as `guidance_scale`.

    Raises:
        SettingsError: the pipeline takes no image, or does not know one of the settings; or one is out of its range.
    """

    ignore_for_config = [_PIPELINE]  # noqa: RUF012  (diffusers' own name and type)

    @register_to_config
    def __init__(
        self,
        *,
        pipeline: DiffusionPipeline,
        prompts: tuple[str, ...] = ("",),
        strength: float | None = 0.5,
        steps: int = 20,
        size: int | None = None,
        channels: int = 3,
        call_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.pipeline = pipeline
        self._known = frozenset(inspect.signature(pipeline.__call__).parameters)
        _check_call(type(pipeline).__name__, self._known, prompts, strength, call_options or {})
        _check_strength(strength)
        if steps < 1 or channels not in (1, 3):
            raise SettingsError(f"img2img: steps must be at least 1 and channels 1 or 3, got {steps} and {channels}")
        self._side = size or _own_size(pipeline)
        # Moves and casts of the translator reach the pipeline's networks, which are the same objects.
        networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        self.networks = nn.ModuleDict(networks)
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_folder(cls, folder: Path | str, **settings: Any) -> DiffusersTranslator:
        """The translator over the pipeline saved in `folder`; `settings` are those of the class.

        Raises:
            DataNotFoundError: no such folder.
            CheckpointError: it holds no pipeline, one with code or weights of its own kind, or a damaged one.
            SettingsError: see the class.
        """
        return cls(pipeline=open_pipeline(folder), **settings).eval()

    @property
    def largest_side(self) -> int:
        """Side of the pipeline's own images: larger pictures come back blurred."""
        return self._side

    def sample(self, shape: torch.Size | tuple[int, ...], *, generator: torch.Generator) -> Draw:
        """`prompt`: int64 (B,), position in the prompts; `seed`: int64 (B,), of the pipeline's own noise."""
        return {
            "prompt": whole(len(self.config.prompts), (shape[0],), generator=generator),
            "seed": whole(2**62, (shape[0],), generator=generator),
        }

    @torch.no_grad()
    def apply(self, images: Tensor, draw: Draw, *, strength: float | None = None) -> Tensor:
        """Each image under its prompt and seed; same shape, dtype, device and range.

        An image whose result the pipeline's safety checker withholds stays as it is.

        Args:
            images: float (B, C, H, W) in [0, 1].
            draw: of `sample`.
            strength: see the class; None takes the config's. 0 gives the image itself.

        Raises:
            SettingsError: a strength outside [0, 1], or one for a pipeline that knows none.
        """
        check_images(images, channels=self.config.channels, where="img2img translator")
        strength = self.config.strength if strength is None else strength
        _check_strength(strength)
        if not len(images) or strength == 0:
            return images.clone()
        if strength not in (None, 1) and "strength" not in self._known:
            raise SettingsError(f"img2img: {type(self.pipeline).__name__} knows no strength but 1; leave strength out")
        colour = images.float().expand(-1, 3, -1, -1)
        large = F.interpolate(colour, size=(self._side, self._side), mode="bicubic", antialias=True).clamp(0, 1)
        out = self.pipeline(**self._arguments(large, draw, strength))
        moved = out.images.to(images.device, torch.float32)
        small = F.interpolate(moved, size=images.shape[-2:], mode="bilinear", antialias=True).clamp(0, 1)
        small = rgb_to_grayscale(small) if self.config.channels == 1 else small
        withheld = getattr(out, "nsfw_content_detected", None)
        if withheld is not None:
            gone = torch.tensor([bool(each) for each in withheld], device=images.device).view(-1, 1, 1, 1)
            small = torch.where(gone, images.float(), small)
        return small.to(images.dtype)

    def _arguments(self, images: Tensor, draw: Draw, strength: float | None) -> dict[str, Any]:
        """The pipeline's arguments for one batch; of its own ones only those that its call knows."""
        # A generator for each image, as pipelines take them: no row depends on its batch.
        generators = [torch.Generator().manual_seed(seed) for seed in draw["seed"].tolist()]
        given = {
            "image": images,
            "prompt": [self.config.prompts[index] for index in draw["prompt"].tolist()],
            "strength": strength,
            # The pipeline takes int(steps * strength) steps; fewer than one would fail.
            "num_inference_steps": max(self.config.steps, math.ceil(1 / (strength or 1))),
            "generator": generators,
            "output_type": "pt",
        }
        known = {name: value for name, value in given.items() if name in self._known}
        return {**known, **(self.config.call_options or {})}

    def describe(self) -> str:
        """What is drawn, in words."""
        prompts = "\n".join(f"prompt: {prompt!r}" for prompt in self.config.prompts)
        return f"{type(self.pipeline).__name__} at {self._side} pixels, strength {self.config.strength}\n{prompts}"

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> None:
        """Write `config.json` and the whole pipeline, safetensors only, below `save_directory`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        self.pipeline.save_pretrained(folder / _PIPELINE, safe_serialization=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Path | str, **options: Any) -> Any:
        """What `save_pretrained` wrote; with `output_loading_info` in the form that diffusers gives it."""
        folder = Path(pretrained_model_name_or_path)
        config = cls.load_config(folder)
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        translator = cls.from_folder(folder / _PIPELINE, **given)
        info: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": []}  # `open_pipeline` has looked
        return (translator, info) if options.get("output_loading_info") else translator


def build_img2img(data: ImageData, settings: Mapping[str, Any]) -> DiffusersTranslator:
    """The translator of `settings`, as a config gives them, for images like those of `data`: `pipeline` is a folder,
    the rest are those of the class.

    Raises:
        SettingsError: no folder, or a setting that does not exist.
    """
    folder = settings.get("pipeline")
    if not folder:
        raise SettingsError("img2img needs translator.network.pipeline=FOLDER, one that holds a diffusers pipeline")
    given = {name: value for name, value in settings.items() if name != "pipeline"}
    options = check_options(DiffusersTranslator, given, "translator.network") | {"channels": data.images.shape[1]}
    return DiffusersTranslator.from_folder(str(folder), **options)


def open_pipeline(folder: Path | str) -> DiffusionPipeline:
    """The image-to-image pipeline saved in `folder`, on the CPU; one that makes images from text is opened as the
    image-to-image pipeline of its family, where there is one.

    Raises:
        DataNotFoundError: no such folder.
        CheckpointError: it holds no pipeline, one with code of its own or whose configs name some, weights that are no
            safetensors or too few, or damage.
        SettingsError: a pipeline that takes no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataNotFoundError(f"no folder {folder}; give one that holds a diffusers pipeline (model_index.json)")
    list_files(folder)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = index["_class_name"]
        libraries = {entry[0] for key, entry in index.items() if key[0] != "_" and isinstance(entry, list)}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} holds no diffusers pipeline: model_index.json cannot be read ({type(error).__name__}); "
            "give a folder that save_pretrained wrote"
        ) from error
    own_code = {lib for lib in libraries if lib not in (None, "diffusers", "transformers") and not _family(lib)}
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if own_code or not inspect.isclass(kind) or not issubclass(kind, DiffusionPipeline):
        what = f"parts of {', '.join(sorted(map(repr, own_code)))}" if own_code else f"a {name}"
        raise CheckpointError(
            f"{folder} holds {what}, not of diffusers or transformers; code that comes with a pipeline is not run"
        )
    if "transformers" in libraries and not is_transformers_available():
        raise SettingsError(f'the pipeline in {folder} needs transformers: pip install "gen_invariance[img2img]"')
    from diffusers import AutoPipelineForImage2Image  # imports every family

    check_configs(folder)
    takes_images = "image" in inspect.signature(kind.__call__).parameters
    try:
        loader: Any = kind if takes_images else AutoPipelineForImage2Image
        networks = load_networks(folder, index)
        return loader.from_pretrained(folder, local_files_only=True, use_safetensors=True, **networks)
    except CheckpointError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        reason = first_line(error)
        if not takes_images and "can't find a pipeline" in reason:
            raise SettingsError(f"a {name} takes no image; give the folder of an image-to-image pipeline") from error
        raise CheckpointError(f"cannot load the pipeline in {folder}: {reason}") from error


def _family(library: Any) -> bool:
    """Whether it is a sub-package of `diffusers.pipelines`, which keep classes of their own."""
    return isinstance(library, str) and inspect.ismodule(getattr(diffusers.pipelines, library, None))


def _check_strength(strength: float | None) -> None:
    if strength is not None and not 0 <= strength <= 1:
        raise SettingsError(f"img2img: strength must be in [0, 1], got {strength}")


def _check_call(
    name: str, known: frozenset[str], prompts: tuple[str, ...], strength: float | None, options: Mapping[str, Any]
) -> None:
    """Raise unless a pipeline whose call knows these arguments can do what is asked."""
    if "image" not in known:
        raise SettingsError(f"img2img: a {name} takes no image; give an image-to-image pipeline")
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise SettingsError(f"img2img: prompts must be a list of at least one text, got {prompts!r}")
    if strength not in (None, 1) and "strength" not in known:
        raise SettingsError(f"img2img: a {name} knows no strength; set strength to null")
    unknown = [key for key in options if key not in known or key in _OWN]
    if unknown:
        raise SettingsError(f"img2img: {name} has no call option {unknown[0]!r} to give; see its __call__")


def _own_size(pipeline: DiffusionPipeline) -> int:
    """The side in pixels that the pipeline was trained at."""
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    latent = getattr(getattr(denoiser, "config", None), "sample_size", None)
    scale = getattr(pipeline, "vae_scale_factor", 1)
    if not isinstance(latent, int):
        raise SettingsError(f"img2img: {type(pipeline).__name__} does not tell its size; give size, in pixels")
    return latent * scale
