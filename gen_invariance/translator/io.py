"""Save a translator, and open a saved one of any kind."""

from __future__ import annotations

import gen_invariance.torchvision_guard  # noqa: F401  (diffusers leads to torchvision)

# isort: split
import inspect
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gen_invariance.devices import plain_defaults
from gen_invariance.errors import CheckpointError, SettingsError, first_line
from gen_invariance.files import cannot_write, open_regular, read_json
from gen_invariance.settings import check_options
from gen_invariance.translator.quality.verdict import translator_folder
from gen_invariance.translator.registry import kinds_by_class


@plain_defaults()
def load_translator(path: Path | str) -> nn.Module:
    """The translator saved in `path`, or in `path`/translator if `path` is a run folder; in eval mode, on the CPU.

    Reads JSON and safetensors only; nothing in the folder is executed.

    Raises:
        SettingsError: inside of a block in which modules get no weights.
        CheckpointError: no translator there, of an unknown kind, one that may not be read, truncated, or its weights do
            not fit its config.

    Example:
        >>> from gen_invariance import SpatialTranslator, load_translator
        >>> SpatialTranslator(1, start=0.3).save_pretrained("spatial")
        >>> type(load_translator("spatial")).__name__
        'SpatialTranslator'
    """
    folder, config = _read_config(Path(path).expanduser())
    name = config.get("_class_name") if isinstance(config, dict) else None
    kinds = kinds_by_class()
    if not isinstance(name, str) or name not in kinds:
        raise CheckpointError(
            f"{folder} holds a {name or 'nameless model'}, not a translator ({', '.join(sorted(kinds))}); choose "
            "another folder"
        )
    weights = sorted(folder.rglob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{folder} holds no weights (*.safetensors); copy the whole folder, or fit again")
    for file in weights:  # diffusers would call them damaged
        _check_readable(file)
    model = kinds[name].load("model")
    unknown = [key for key in config if key not in inspect.signature(model).parameters and not key.startswith("_")]
    if unknown:  # diffusers would pass over them
        raise CheckpointError(
            f"{folder / 'config.json'} has the setting {unknown[0]!r}, which a {name} does not know; it is damaged or "
            "of another version"
        )
    try:
        if name != "DiffusersTranslator":  # whose parts have configs of their own
            _check_sizes(model, config, folder, weights)
        with _quiet():  # what it warns of is refused below, in one line
            translator, loaded = model.from_pretrained(
                folder, low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True
            )
    except CheckpointError:
        raise
    except Exception as error:  # diffusers and safetensors raise many kinds for one cause: the folder is damaged
        raise CheckpointError(
            f"cannot load the translator in {folder}: {first_line(error)}; "
            "it is truncated or its weights do not fit its config"
        ) from error
    _check_loaded(folder, translator, loaded)
    return translator.eval().requires_grad_(False)


def _check_loaded(folder: Path, translator: nn.Module, loaded: dict[str, Any]) -> None:
    """Raise unless all weights of `translator`, and no others, came from its files, as numbers."""
    if loaded["missing_keys"] or loaded["unexpected_keys"]:  # diffusers would start the missing ones at random
        raise CheckpointError(
            f"cannot load the translator in {folder}: its weights are those of another model than its config describes"
        )
    if any(value.is_meta for value in translator.state_dict().values()):
        raise SettingsError(
            f"the translator in {folder} cannot be loaded where modules are made without weights (init_empty_weights); "
            "load it before"
        )
    if not all(bool(value.isfinite().all()) for value in translator.state_dict().values()):
        raise CheckpointError(f"the translator in {folder} holds NaN or infinite weights: its fit diverged; fit again")


def _check_sizes(model: type[nn.Module], config: dict[str, Any], folder: Path, weights: list[Path]) -> None:
    """Raise `CheckpointError` where `config` is none of `model`, or describes other weights than there are.

    A network is made without memory first, so that a config with absurd sizes costs neither memory nor time.
    """
    where, given = folder / "config.json", {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        given = check_options(model, given, str(where))
    except SettingsError as error:
        raise CheckpointError(f"{error}; it is damaged or of another version") from error
    shapes: dict[str, list[int]] = {}
    for file in weights:
        with safe_open(file, framework="pt") as opened:
            shapes |= {each: opened.get_slice(each).get_shape() for each in opened.keys()}  # noqa: SIM118
    for key in _REPEATED & given.keys():  # these have tensors of their own, so there cannot be more of them
        if given[key] > len(shapes):
            raise CheckpointError(f"{where}: {key} is {given[key]}, but there are {len(shapes)} weights; it is damaged")
    with torch.device("meta"):
        expected = {each: list(value.shape) for each, value in model(**given).state_dict().items()}
    for each in expected.keys() & shapes.keys():
        if expected[each] != shapes[each]:
            raise CheckpointError(
                f"cannot load the translator in {folder}: {each} has shape {shapes[each]}, but its config describes "
                f"{expected[each]}; the folder holds parts of two translators"
            )


_REPEATED = {"residual_blocks", "downsamples", "style_downsamples", "levels"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Diffusers' own log is off inside."""
    from diffusers.utils import logging  # who loads no translator need not wait for it

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _read_config(path: Path) -> tuple[Path, Any]:
    """The translator's own folder in or at `path`, and what its config.json says."""
    folder = path
    try:
        folder = translator_folder(path)
        return folder, read_json(folder / "config.json")
    except PermissionError as error:
        raise _not_allowed(error.filename) from error
    except OSError as error:
        raise CheckpointError(
            f"no translator in {path}: {folder / 'config.json'} cannot be read; give a folder that fit wrote"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON ({error}); the translator is damaged") from error


def _check_readable(file: Path) -> None:
    try:
        open_regular(file).close()
    except PermissionError as error:
        raise _not_allowed(file) from error
    except FileNotFoundError:
        return  # a broken link: the loader names it
    except OSError as error:  # a folder, or a pipe that the loader would wait for
        raise CheckpointError(f"cannot read {file}: {error.strerror}; copy the whole folder, or fit again") from error


def _not_allowed(file: Path | str) -> CheckpointError:
    return CheckpointError(f"cannot read {file}: permission denied; ask its owner for the right to read it")


def save_translator(translator: nn.Module, folder: Path) -> None:
    """Write `translator` (config and safetensors) into `folder`, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        translator.save_pretrained(temporary)
        for weights in temporary.rglob("*.safetensors"):  # their writer lets nobody else read them
            shutil.copymode(temporary / "config.json", weights)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
