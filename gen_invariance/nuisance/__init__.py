"""Hand-written nuisances: class-agnostic transformations, batched, behind one protocol."""

from gen_invariance.nuisance.compose import Compose, Identity
from gen_invariance.nuisance.geometry import CropFlip, Rotation, Shear, Translation
from gen_invariance.nuisance.intensity import Background, Lighting
from gen_invariance.nuisance.protocol import Draw, Nuisance, draw_to, select_rows
from gen_invariance.nuisance.thickness import Thickness, dilate, erode

__all__ = [
    "Background",
    "Compose",
    "CropFlip",
    "Draw",
    "Identity",
    "Lighting",
    "Nuisance",
    "Rotation",
    "Shear",
    "Thickness",
    "Translation",
    "dilate",
    "draw_to",
    "erode",
    "select_rows",
]
