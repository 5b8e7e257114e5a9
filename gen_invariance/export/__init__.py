"""Write an augmented, balanced copy of a labelled image set, in the form it came in, with a manifest.

data = open_form("folder", "photos")
summary = export(data, load_translator("runs/fit"), "photos-balanced", ExportSettings(target="median"))
"""

from gen_invariance.export.formats.base import FORMS, open_form
from gen_invariance.export.runner import ExportSummary, export
from gen_invariance.export.settings import ExportSettings

__all__ = ["FORMS", "ExportSettings", "ExportSummary", "export", "open_form"]
