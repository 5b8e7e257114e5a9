"""Write an augmented, balanced copy of a labelled image set, in the format it came in, with a manifest.

data = open_format("folder", "photos")
summary = export_dataset(data, load_translator("runs/fit"), "photos-balanced", ExportSettings(target="median"))
"""
