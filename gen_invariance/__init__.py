"""Long-tailed images: learn the nuisance where data is plenty, give it to the tail, measure whether invariance arrived.

The public names below are imported when they are first used, so `import gen_invariance` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "GenInvarianceError": "errors",
    "ImageData": "data.images",
    "load_source": "data.readers.registry",
    "make_long_tailed": "data.split",
    "LongTailSampler": "data.loader",
    "ResidentLoader": "data.loader",
    "Nuisance": "nuisance.protocol",
    "Background": "nuisance",
    "Compose": "nuisance",
    "Identity": "nuisance",
    "Lighting": "nuisance",
    "Rotation": "nuisance",
    "Shear": "nuisance",
    "Thickness": "nuisance",
    "Translation": "nuisance",
    "RandAugment": "nuisance.generic",
    "TrivialAugment": "nuisance.generic",
    "MunitTranslator": "translator.munit.model",
    "SpatialTranslator": "translator.spatial",
    "FitSettings": "translator.fit_settings",
    "fit_translator": "translator.fit",
    "load_translator": "translator.io",
    "KorniaNuisance": "augment.kornia",
    "TailAugment": "augment.stage",
    "policy": "augment.policy",
    "ExportSettings": "export.settings",
    "WorkerSettings": "export.settings",
    "export_dataset": "export.runner",
    "open_format": "export.formats.base",
    "TrainSettings": "classifier.settings",
    "TransferPlan": "classifier.transfer",
    "build_classifier": "classifier.backbones",
    "build_loss": "classifier.losses",
    "fit_classifier": "classifier.train",
    "measure_accuracy": "measure.accuracy",
    "measure_invariance": "measure.invariance",
    "OrderRun": "experiment.order",
    "OrderSettings": "experiment.order",
    "run_order": "experiment.order",
    "BenchmarkRun": "benchmark.run",
    "run_benchmark": "benchmark.run",
    "load_records": "records",
    "ReportSettings": "report.report_page",
    "write_report": "report.report_page",
    "InspectSettings": "experiment.inspect",
    "inspect_translator": "experiment.inspect",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gen_invariance' has no attribute {name!r}")
    return getattr(import_module(f"gen_invariance.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
