"""Weights of a `Classifier` from .safetensors, .pt, .pth and .ckpt files and from run folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gen_invariance.classifier.model import Classifier
from gen_invariance.errors import CheckpointError, DataNotFoundError
from gen_invariance.files import load_checkpoint
from gen_invariance.run import list_checkpoints

FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt")


def is_local(weights: str | Path) -> bool:
    """Whether `weights` means a file or a run folder rather than a library's name for its weights."""
    path = Path(weights)
    return isinstance(weights, Path) or path.suffix in FILE_ENDINGS or len(path.parts) > 1 or path.is_dir()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pt, .pth or .ckpt file, or in the newest checkpoint of a run folder.

    Raises:
        DataNotFoundError: there is no such file, or the folder has no checkpoint.
        CheckpointError: the file is damaged, is of another kind, or would execute code when read.
    """
    path = Path(path)
    if path.is_dir():
        checkpoints = list_checkpoints(path)
        if not checkpoints:
            raise DataNotFoundError(f"{path} holds no checkpoint; give the folder of a finished run or a weights file")
        path = checkpoints[0]
    if not path.is_file():
        raise DataNotFoundError(f"no weights file {path}; check the path")
    try:
        state = _read_file(path)
    except CheckpointError:
        raise
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot read weights {path} ({reason}); give a state dict saved by torch") from error
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state, Mapping) and isinstance(state.get(key), Mapping) else state
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no model weights; give a state dict or a checkpoint with the key 'model'")
    return dict(state)


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".ckpt":
        return load_checkpoint(path)
    from pickle import UnpicklingError

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and reading it could run code; save a state_dict()"
        ) from error


def load_weights(model: Classifier, path: str | Path, *, keep_head: bool = False, name: str = "the model") -> None:
    """Load the backbone, and its normalisation when stored, from `path` into `model`; see `read_weights`.

    State dicts of a `Classifier` and those of the bare backbone (as torchvision publishes them, head included) fit.

    Raises:
        CheckpointError: some tensor is missing, left over or of another shape; nothing is loaded then.
    """
    state = read_weights(path)
    whole = any(key.startswith("backbone.") for key in state)
    current = model.state_dict()
    if whole:
        wanted = [key for key in current if keep_head or not key.startswith("head.")]
        left_over = [key for key in state if key not in current and not key.startswith("head.")]
    else:
        if keep_head:
            raise CheckpointError(f"{path} holds a bare backbone without our head; use keep_head=False")
        # Without a prefix: a published file. Its head goes by another name in each library, so extra keys are allowed.
        inner = "backbone.network." if any(key.startswith("backbone.network.") for key in current) else "backbone."
        state = {inner + key: value for key, value in state.items()}
        wanted, left_over = [key for key in current if key.startswith("backbone.")], []
    for key in wanted:
        if key not in state or state[key].shape != current[key].shape:
            got = f"has shape {tuple(state[key].shape)}" if key in state else "is missing"
            raise CheckpointError(
                f"weights {path} are of another architecture than {name}: {key} {got}, "
                f"expected {tuple(current[key].shape)}; build the model they were trained with"
            )
    if left_over:
        raise CheckpointError(
            f"weights {path} are of another architecture than {name}: it has no {left_over[0]}; "
            "build the model they were trained with"
        )
    model.load_state_dict({key: state[key] for key in wanted}, strict=False)
