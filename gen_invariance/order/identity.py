"""What the cells of a run depend on, so that a resumed run does not mix measurements of different things."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gen_invariance.nuisance.protocol import Nuisance

if TYPE_CHECKING:
    from gen_invariance.experiment.order_study import OrderSettings

_READING = {"analysis", "curriculum", "fewest_seeds", "device"}
_EACH_CELL = {"head", "choose", "subsets", "size", "count", "smallest", "largest", "sizes", "seeds"}


def cell_settings(settings: OrderSettings, nuisance: Nuisance | None) -> dict[str, Any]:
    """The settings behind every cell, JSON-able.

    Cells are kept by (subset, seed), so a run may be resumed with more subsets or seeds, or read again with another
    threshold or head. Modes other than "frozen" keep answers to chosen targets, so there all of these count.
    """
    left_out = _READING | _EACH_CELL if settings.mode == "frozen" else _READING
    config = {key: plain(value) for key, value in asdict(settings).items() if key not in left_out}
    return config | {"nuisance": nuisance_identity(nuisance)}


def nuisance_identity(nuisance: Nuisance | None) -> dict[str, Any] | None:
    """Class, settings and, of a learned one, weights of `nuisance`; equal for nuisances that act alike.

    >>> from gen_invariance.nuisance import Rotation
    >>> nuisance_identity(Rotation(30))
    {'class': 'Rotation', 'degrees': 30, 'mode': 'bicubic'}
    """
    return None if nuisance is None else plain(nuisance)


def plain(value: Any) -> Any:
    """`value` as what JSON can hold: tensors and modules as digests, objects as their class and attributes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=str)
    if isinstance(value, Tensor):
        return tensor_digest({"": value})
    name = {"class": type(value).__name__}
    if isinstance(value, nn.Module):
        # Translators keep their settings in a diffusers config, where names with an underscore are bookkeeping.
        config = {key: part for key, part in getattr(value, "config", {}).items() if not key.startswith("_")}
        return name | plain(config) | {"weights": tensor_digest(value.state_dict())}
    if hasattr(value, "__dict__") and not hasattr(value, "__qualname__"):
        return name | plain(vars(value))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # functions, arrays: without the place in memory


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, kinds, shapes and values, the same on every device."""
    found = hashlib.sha256()
    for key, tensor in tensors.items():
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
