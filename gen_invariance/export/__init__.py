"""Write an augmented, balanced copy of a labelled image set, in the format it came in, with a manifest.

data = open_format("folder", "photos")
summary = export_dataset(data, load_translator("runs/fit"), "photos-balanced", ExportSettings(target="median"))
"""

from gen_invariance.export.formats.base import FORMATS, open_format
from gen_invariance.export.runner import ExportSummary, export_dataset
from gen_invariance.export.settings import ExportSettings, WorkerSettings

__all__ = ["FORMATS", "ExportSettings", "ExportSummary", "WorkerSettings", "export_dataset", "open_format"]
