"""Which files of a folder are one Hugging Face data set: what its README.md says, or how the files lie.

A folder may hold several data sets ("configs"). Read as one, their rows would be added up.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gen_invariance.data.readers.tree import is_litter, name_part
from gen_invariance.errors import DataError, printable
from gen_invariance.export.formats.base import RESERVED

DataFiles = dict[str, list[str]]
"""Patterns of files, of each split."""


def find_data_files(path: Path) -> DataFiles | None:
    """The files of the one config that the README.md of folder `path` names; None where it names no files.

    Raises:
        DataError: several configs, by README.md or by folders.
    """
    configs = _read_configs(path)
    if len(configs) > 1:
        names = ", ".join(printable(config.get("config_name", "?")) for config in configs[:4])
        raise DataError(
            f"{printable(path)} holds {len(configs)} data sets (configs {names}); give the folder or file of one"
        )
    if configs and "data_files" in configs[0]:
        return _patterns(configs[0]["data_files"])
    found = (file for file in sorted(path.rglob("*.parquet")) if file.name not in RESERVED)  # the output of an export
    files = [file.relative_to(path) for file in found]
    folders = sorted({file.parent for file in files if not any(is_litter(part, folder=True) for part in file.parts)})
    parts = [all(name_part(name) or "=" in name for name in folder.parts[-1:]) for folder in folders]
    if len(folders) > 1 and not all(parts):
        named = ", ".join(printable(folder) for folder in folders[:4])
        raise DataError(
            f"{printable(path)} holds Parquet files in {len(folders)} folders ({named}), which may be several data "
            "sets; give one of them, or call the folders train and test"
        )
    return None


def describe_file(name: str) -> str:
    """A README.md by which `datasets.load_dataset` takes the file `name` for the training split, and no other file."""
    config = {"config_name": "default", "data_files": [{"split": "train", "path": glob.escape(name)}]}
    return f"---\nconfigs: {json.dumps([config])}\n---\nImages and labels, with new images behind the old ones.\n"


def _read_configs(path: Path) -> list[Mapping[str, Any]]:
    """What README.md lists between its first two lines of dashes."""
    try:
        text = (path / "README.md").read_text(encoding="utf-8")
        match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        about = yaml.safe_load(match[1]) if match else None
        configs = about.get("configs") if isinstance(about, dict) else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return []
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _patterns(files: Any) -> DataFiles:
    """Patterns by split, from any form in which a README.md may give them."""
    if isinstance(files, str):
        return {"train": [files]}
    entries = files if isinstance(files, list) else []
    patterns: DataFiles = {}
    for entry in entries:
        split, paths = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        patterns.setdefault(str(split), []).extend(map(str, paths if isinstance(paths, list) else [paths]))
    return patterns
