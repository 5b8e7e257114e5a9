"""Long-tailed images: learn the nuisance where data is plenty, give it to the tail, measure whether invariance arrived.

The public names below are imported when they are first used, so `import gen_invariance` is cheap. `__init__.pyi` says
the same to type checkers. Everything else in the package is private.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "GenInvarianceError": "errors",
    "ImageData": "data.images",
    "LongTailSampler": "data.loader",
    "ResidentLoader": "data.loader",
    "class_groups": "data.longtail",
    "load_source": "data.readers.registry",
    "make_long_tailed": "data.split",
    "Compose": "nuisance.compose",
    "Identity": "nuisance.compose",
    "RandAugment": "nuisance.generic",
    "TrivialAugment": "nuisance.generic",
    "Rotation": "nuisance.geometry",
    "Shear": "nuisance.geometry",
    "Translation": "nuisance.geometry",
    "Background": "nuisance.intensity",
    "Lighting": "nuisance.intensity",
    "Nuisance": "nuisance.protocol",
    "Thickness": "nuisance.thickness",
    "fit_translator": "translator.fit",
    "FitSettings": "translator.settings",
    "load_translator": "translator.io",
    "MunitTranslator": "translator.munit.model",
    "SpatialTranslator": "translator.spatial",
    "KorniaNuisance": "augment.kornia",
    "policy": "augment.policy",
    "NuisanceSampler": "augment.sampler",
    "TailAugment": "augment.stage",
    "open_format": "export.formats.base",
    "export_dataset": "export.runner",
    "ExportSettings": "export.settings",
    "WorkerSettings": "export.settings",
    "build_classifier": "classifier.backbones",
    "build_loss": "classifier.losses",
    "TrainSettings": "classifier.settings",
    "fit_classifier": "classifier.train",
    "TransferPlan": "classifier.transfer",
    "measure_accuracy": "measure.accuracy",
    "class_size_association": "measure.class_size",
    "compare_invariance": "measure.invariance",
    "measure_invariance": "measure.invariance",
    "ExpectedKL": "measure.metric",
    "Candidate": "referee.candidates",
    "read_candidate": "referee.candidates",
    "choose_augmentation": "referee.choose",
    "RefereeSettings": "referee.settings",
    "train_candidate": "referee.train",
    "load_records": "records",
    "ReportSettings": "report.settings",
    "write_report": "report.report_page",
    "summarise": "report.summary",
    "TrainedClassifier": "experiment.trained",
    "load_classifier": "experiment.trained",
    "InspectSettings": "experiment.settings",
    "inspect_translator": "experiment.inspect",
    "OrderRun": "experiment.settings",
    "OrderSettings": "order.settings",
    "run_order": "experiment.order",
    "BenchmarkRun": "benchmark.settings",
    "run_benchmark": "benchmark.run",
    "declare_missing_operators": "torchvision_guard",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gen_invariance' has no attribute {name!r}")
    return getattr(import_module(f"gen_invariance.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
