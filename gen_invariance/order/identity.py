"""What a nuisance is, as JSON, so that a resumed run does not mix measurements under different ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def describe_value(value: Any) -> Any:
    """`value` as what JSON can hold: tensors and modules as digests, objects as their class and attributes.

    Equal for nuisances that act alike, the weights of a learned one included.

    >>> from gen_invariance import Rotation
    >>> describe_value(Rotation(30))
    {'class': 'Rotation', 'degrees': 30.0, 'mode': 'bicubic'}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [describe_value(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(describe_value, value), key=str)
    if isinstance(value, Tensor):
        return digest_tensors({"": value})
    name = {"class": type(value).__name__}
    if isinstance(value, nn.Module):
        # Translators keep their settings in a diffusers config, where names with an underscore are bookkeeping.
        config = {key: part for key, part in getattr(value, "config", {}).items() if not key.startswith("_")}
        return name | describe_value(config) | {"weights": digest_tensors(value.state_dict())}
    if hasattr(value, "__dict__") and not hasattr(value, "__qualname__"):
        return name | describe_value(vars(value))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # functions, arrays: without the address in memory


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, kinds, shapes and values, the same on every device."""
    digest = hashlib.sha256()
    for key, tensor in tensors.items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
