"""What may be in the folder of a diffusers pipeline: looked at before diffusers and transformers read it.

Both libraries offer to run code that a config names ("Do you wish to run the custom code?"), start weights that a file
lacks at random, and build what a config describes before they look at the weights. Here all three are refused.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import gen_invariance.torchvision_guard  # noqa: F401

# isort: split
import diffusers
from diffusers import DiffusionPipeline, ModelMixin

from gen_invariance.errors import CheckpointError

_MOST_STEPS = 1_000_000
"""Whole numbers in the config of a part without weights; schedulers make tables of `num_train_timesteps` numbers."""


def check_configs(folder: Path) -> None:
    """Look through every JSON file below `folder`, whatever part it belongs to.

    Raises:
        CheckpointError: one names code to be run, or describes a part that its weights cannot be of; or something in
            the folder is no file that can be read.
    """
    for path in list_files(folder):
        if path.suffix != ".json":
            continue
        config = _read(path)
        for key, value in _entries(config):
            leaves = (
                key == "weight_map"
                and isinstance(value, dict)
                and any(Path(str(each)).name != each for each in value.values())
            )
            if leaves:
                raise CheckpointError(f"{path} names weights outside of its folder; copy the whole pipeline again")
            names_code = key == "auto_map" and value and not isinstance(value, int)  # a tokenizer may know the word
            names_kernel = key.endswith("attn_implementation") and "/" in str(value)
            if names_code or names_kernel:
                raise CheckpointError(
                    f"{path} names code to be run ({key}: {str(value)[:60]!r}); code that comes with a pipeline is not "
                    f"run, take {key} out or choose another pipeline"
                )
        if path.name.endswith("config.json") and not path.name.startswith(("tokenizer", "generation")):
            _check_sizes(path, config)


def list_files(folder: Path) -> list[Path]:
    """Every file below `folder`, once.

    Raises:
        CheckpointError: a pipe, a device or a broken link is among them; whoever reads those may wait for ever.
    """
    seen, found = set(), []
    for place, folders, names in os.walk(folder, followlinks=True):
        inode = os.stat(place).st_ino
        if inode in seen:  # a link back up
            folders.clear()
            continue
        seen.add(inode)
        for name in sorted(names):
            path = Path(place, name)
            if not path.is_file():
                raise CheckpointError(f"{path} is no file that can be read (a pipe, a device or a broken link)")
            found.append(path)
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({type(error).__name__}); it is damaged") from error


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of `config`, at every depth."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _check_sizes(path: Path, config: Any) -> None:
    """Raise where a part's config holds numbers that nothing of its size can have."""
    shapes = _shapes(path.parent)
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    for key, value in _entries(config):
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int):
                continue
            repeats = bool({"layer", "layers", "depth", "depths"} & set(key.split("_")))
            most = _MOST_STEPS if not shapes else len(shapes) if repeats else max(numbers, _MOST_STEPS)
            if number > most:
                raise CheckpointError(f"{path}: {key} is {number}, more than its weights can be of; it is damaged")


def _shapes(folder: Path) -> list[list[int]]:
    """Shapes of the weights in the folder of a part."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                found += [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error})") from error
    return found


def load_networks(folder: Path, index: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The networks that `index`, a `model_index.json`, names, by part; float32, on the CPU, each with all its weights.

    Raises:
        CheckpointError: a file lacks weights of its network, or a part is a pipeline of its own or of a kind that is
            found out only while it is loaded.
    """
    networks = {}
    for part, entry in index.items():
        kind = _kind(entry)
        if part.startswith("_") or kind is None:
            continue
        if issubclass(kind, DiffusionPipeline) or kind.__name__.startswith("AutoModel"):
            raise CheckpointError(
                f"{folder}: the part {part} is a {kind.__name__}, which says too little of what will be loaded; give a "
                "pipeline whose model_index.json names the kind of each part"
            )
        of_diffusers = issubclass(kind, ModelMixin)
        if not (of_diffusers or _is_of_transformers(kind)):
            continue
        dtype = {"torch_dtype" if of_diffusers else "dtype": torch.float32}
        network, found = kind.from_pretrained(
            folder / part, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=True,
            output_loading_info=True, **dtype,
        )  # fmt: skip
        lacking = sorted(found["missing_keys"])
        if lacking:
            raise CheckpointError(
                f"cannot load the pipeline in {folder}: {part} lacks {len(lacking)} of its weights ({lacking[0]}); "
                "copy the whole folder again"
            )
        networks[part] = network
    return networks


def _kind(entry: Any) -> Any:
    """The class that an entry of `model_index.json` names, [library, class]; None where it names none."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
        return None
    library, name = entry
    if library in ("diffusers", "transformers"):
        module = importlib.import_module(library)
    else:
        module = getattr(diffusers.pipelines, library, None)
    kind = getattr(module, name, None)
    return kind if inspect.isclass(kind) else None


def _is_of_transformers(kind: type) -> bool:
    from transformers import PreTrainedModel

    return issubclass(kind, PreTrainedModel)
