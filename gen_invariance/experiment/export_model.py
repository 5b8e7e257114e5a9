"""`run_export`: a trained classifier as a folder that timm or torchvision load, or as an ONNX file."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from gen_invariance.classifier.library_names import LibraryNames, find_library_names, linearise, rename_state
from gen_invariance.classifier.model import Classifier, CosineHead
from gen_invariance.errors import OutputError, SettingsError, printable
from gen_invariance.experiment.model_card import write_card
from gen_invariance.experiment.trained import CONFIG_FILE, WEIGHTS_FILE, TrainedClassifier, load_classifier
from gen_invariance.experiment.use_settings import ExportRun
from gen_invariance.files import atomic_write, cannot_write, read_json


@dataclass(frozen=True)
class Exported:
    """What `run_export` wrote.

    Attributes:
        path: the folder or file.
        loads: how it is loaded, a line or more of Python.
    """

    path: Path
    loads: str


def run_export(settings: ExportRun) -> Exported:
    """Write the classifier of a training run in a form that needs nothing of this package.

    Raises:
        SettingsError: ONNX without its packages, or an ending other than .onnx.
        OutputError: `out` exists, or cannot be written.
        DataNotFoundError, CheckpointError: no trained classifier in the run folder.
    """
    out = Path(settings.out)
    if settings.format == "onnx":
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise SettingsError(f"format=onnx needs {missing[0]}; install it with: pip install 'gen_invariance[onnx]'")
        if out.suffix.lower() != ".onnx":
            raise SettingsError(f"out must end in .onnx for format=onnx, got {printable(out.name)!r}")
    if os.path.lexists(out) and not settings.overwrite:
        raise OutputError(f"{printable(out)} exists; choose another name, or add overwrite=true")
    classifier = load_classifier(settings.run)
    if settings.format == "onnx":
        return _export_onnx(classifier, out)
    return _export_folder(classifier, out, figures=_read_figures(Path(settings.run).expanduser()))


def input_side(classifier: TrainedClassifier) -> tuple[int, int]:
    """Height and width of what goes through the network, after its own resizing."""
    size = classifier.model.input_size
    return classifier.shape[1:] if size is None else (size, size)


# ---- folder


def _export_folder(classifier: TrainedClassifier, out: Path, *, figures: Mapping[str, Any]) -> Exported:
    classifier, is_exact = _with_linear_head(classifier)
    settings = classifier.about["config"]["classifier"]
    found = find_library_names(classifier.model, settings["backbone"], side=input_side(classifier))
    config = _make_config(classifier, found)
    loads = _describe_loading(found, len(classifier.class_names))
    with _new_folder(out) as folder:
        state = rename_state(classifier.model.state_dict(), found.names)
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_card(folder / "README.md", classifier, found, loads=loads, figures=figures, is_exact=is_exact)
    return Exported(out, loads.format(folder=out))


def _with_linear_head(classifier: TrainedClassifier) -> tuple[TrainedClassifier, bool]:
    """The classifier with a head that other libraries know, and whether its probabilities are those of the run."""
    norm = classifier.about["facts"].get("feature_norm")
    if norm is None or not isinstance(classifier.model.head, CosineHead):
        return classifier, True
    return replace(classifier, model=linearise(classifier.model, feature_norm=float(norm))), False


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends without an error."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        if out.is_dir() and not out.is_symlink():
            known = {WEIGHTS_FILE, CONFIG_FILE, "README.md"}
            foreign = sorted({entry.name for entry in out.iterdir()} - known)
            if foreign:
                raise OutputError(f"{printable(out)} holds {printable(foreign[0])}; choose another folder")
            shutil.rmtree(out)
        os.replace(folder, out)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_config(classifier: TrainedClassifier, found: LibraryNames) -> dict[str, Any]:
    """What timm reads of a model's folder, and what `load_classifier` reads under "gen_invariance"."""
    model, (height, width) = classifier.model, input_side(classifier)
    mean, std = model.mean.cpu().tolist(), model.std.cpu().tolist()
    names, count = list(classifier.class_names), len(classifier.class_names)
    config: dict[str, Any] = {
        "architecture": found.architecture,
        "num_classes": count,
        "num_features": model.num_features,
        "label_names": names,
        "pretrained_cfg": {
            "num_classes": count,
            "input_size": [len(mean), height, width],
            "mean": mean,
            "std": std,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
    }
    if found.library == "timm" and found.model is not None:
        known: Any = getattr(found.model, "pretrained_cfg", {})
        for key in ("first_conv", "classifier", "fixed_input_size"):
            if known.get(key) is not None:
                config["pretrained_cfg"][key] = known[key]
    settings = classifier.about["config"]["classifier"]
    config["gen_invariance"] = {
        "format": 1,
        "library": found.library,
        "backbone": settings["backbone"],
        "head": "cosine" if isinstance(model.head, CosineHead) else "linear",
        "image_shape": list(classifier.shape),
        "input_size": model.input_size,
        "counts": classifier.counts.tolist(),
        "prior": classifier.prior.tolist(),
        "names": {new: own for own, new in found.names.items() if new != own},
        "about": dict(classifier.about),
    }
    return config


def _describe_loading(found: LibraryNames, count: int) -> str:
    if found.library == "timm":
        return 'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()'
    if found.library == "torchvision":
        return (
            f'model = torchvision.models.get_model("{found.architecture}", num_classes={count}).eval()\n'
            'model.load_state_dict(safetensors.torch.load_file("{folder}/' + WEIGHTS_FILE + '"))'
        )
    return 'classifier = gen_invariance.load_classifier("{folder}")'


def _read_figures(run: Path) -> dict[str, Any]:
    """The figures of the newest measurement of a run; none where it was not measured."""
    files = sorted((run / "measures").glob("*/figures.json"), key=lambda file: file.stat().st_mtime)
    try:
        return dict(read_json(files[-1])) if files else {}
    except (OSError, ValueError, TypeError):
        return {}


# ---- ONNX


class _Plain(nn.Module):
    """The classifier without its checks: images in [0, 1], as large as goes through the network, to two outputs."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.register_buffer("mean", model.mean[:, None, None].clone())
        self.register_buffer("std", model.std[:, None, None].clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities (B, K)."""
        logits = self.head(self.backbone((images - self.mean) / self.std))
        return logits, logits.softmax(1)


def _export_onnx(classifier: TrainedClassifier, out: Path) -> Exported:
    import onnx

    channels, (height, width) = classifier.shape[0], input_side(classifier)
    example = torch.rand(2, channels, height, width)
    with torch.no_grad():
        program = torch.onnx.export(
            _Plain(classifier.model.cpu()).eval(),
            (example,),
            input_names=["images"],
            output_names=["logits", "probabilities"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    about = {
        "class_names": json.dumps(list(classifier.class_names)),
        "input": f"float32 in [0, 1], {channels} x {height} x {width}: the largest centred part of those proportions, "
        "scaled bilinearly with antialiasing",
        "training_counts": json.dumps(classifier.counts.tolist()),
    }
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    with atomic_write(out) as temporary:
        onnx.save(model, temporary)
    return Exported(out, f'session = onnxruntime.InferenceSession("{out}")')


def format_exported(exported: Exported) -> list[str]:
    """What was done, for a terminal."""
    return [*exported.loads.splitlines(), f"written: {exported.path}"]
