"""Settings of what is done with a trained classifier: `predict` and `export`. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from pydantic import NonNegativeFloat

from gen_invariance.experiment.settings import Task
from gen_invariance.settings import PathText, Rows, settings_class


@settings_class("predict")
class PredictRun:
    """Settings of `run_predict`."""

    run: PathText
    """folder that train wrote"""
    out: PathText
    """file to write, .csv or .parquet"""
    data: Task = field(default_factory=lambda: Task(source="folder", profile="none"))
    """images: with data=folder all files below data.path, with or without class folders; else the test images"""
    prior: str | Mapping[str, NonNegativeFloat] = "trained"
    """how common classes are there: trained (as it is), uniform, training, estimate, or {class: share, ...}"""
    probabilities: bool = False
    """a column for each class as well"""
    page: bool = False
    """a folder OUT-mistakes with a page and a confusion matrix, where class folders say what is right"""
    batch_size: Rows = 256
    """images at a time"""
    device: str = "auto"
    """auto, cpu or cuda"""
    overwrite: bool = False
    """replace out where it exists"""
    progress: bool | None = None
    """true or false; null shows a bar on a terminal"""


@settings_class("export")
class ExportRun:
    """Settings of `run_export`."""

    run: PathText
    """folder that train wrote"""
    out: PathText
    """folder or .onnx file to write"""
    format: Literal["folder", "onnx"] = "folder"
    """folder (safetensors, JSON and a model card, as timm and torchvision load it) or onnx (extra onnx)"""
    overwrite: bool = False
    """replace out where it exists"""
