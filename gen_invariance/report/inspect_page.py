"""The page that `inspect` writes: verdict, figures beside their reference levels, pictures, thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen_invariance.report.figures import distribution_histogram, image_grid
from gen_invariance.report.pages import Picture, write_page
from gen_invariance.translator.quality.assess import NEAR_COPY, Quality
from gen_invariance.translator.quality.inspection import Inspection, Parameter
from gen_invariance.translator.quality.verdict import LEAST_JUDGE_GAIN, RULES

_UNITS = {"rotation": "degrees", "scale": "factor", "gain": "factor", "contrast": "factor", "bias": "pixel units"}

ROWS = (
    ("accuracy_kept", "Class kept", "accuracy of the judge on translations, over its accuracy on untouched images"),
    ("accuracy", "Judge's accuracy", "share of images that the judge names right"),
    ("agreement", "Judge's answer stays", "share of translations judged to be what the image itself is judged to be"),
    ("precision", "Precision", "share of translations that lie among real images"),
    ("density", "Density", "how densely real images lie around translations; 1 is as dense as among themselves"),
    ("recall", "Recall", "share of real images that lie among translations"),
    ("coverage", "Coverage", "share of real images with a translation among their nearest neighbours"),
    ("kernel_distance", "Kernel distance", "distance of the two distributions of features; 0 is equal"),
    ("diversity", "Diversity, pixels", "distance of two draws of one image, over that of two images of a class"),
    ("feature_diversity", "Diversity, features", "the same in the judge's features"),
    ("near_copies", "Near copies", "share of translations that nearly are another training image"),
    (
        "class_share",
        "Difference of classes",
        "share of the variety of changes that lies between classes",
    ),
)
"""Figures in the order of the page: key, heading, meaning."""


def write_inspect_page(out: Path, inspection: Inspection, about: Mapping[str, Any], *, name: str) -> Path:
    """Write the page of an inspection to the file `out` and return its path.

    Args:
        out: path of the page.
        inspection: what is known.
        about: the JSON beside the page, for settings and versions.
        name: of the translator: the path that was given.
    """
    return write_page(
        "inspect.html.j2",
        out,
        name=name,
        verdict=inspection.quality.verdict,
        tone={"use": "good", "do not use": "bad"}.get(inspection.quality.verdict.word, "middling"),
        rows=_rows(inspection),
        oracle=inspection.oracle is not None,
        classes=_classes(inspection),
        figures=_figures(inspection),
        p_value=inspection.quality.class_p_value,
        images=len(inspection.held_out),
        all_images=len(inspection.head),
        data=about["data"],
        settings=about["settings"],
        seed=about["seed"],
        versions=about["versions"],
        rules=RULES,
        near_copy=NEAR_COPY,
        judge_gain=LEAST_JUDGE_GAIN,
    )


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _cell(quality: Quality, key: str) -> tuple[str, str]:
    """Value and interval."""
    estimate = quality.figures[key].estimate
    return _number(estimate.value), f"{_number(estimate.low)} to {_number(estimate.high)}"


def _rows(inspection: Inspection) -> list[dict[str, Any]]:
    return [
        {
            "heading": heading,
            "meaning": meaning,
            "cell": _cell(inspection.quality, key),
            "floor": _number(inspection.quality.figures[key].floor),
            "oracle": _cell(inspection.oracle, key) if inspection.oracle is not None else None,
        }
        for key, heading, meaning in ROWS
    ]


def _classes(inspection: Inspection) -> list[tuple[str, int, int, str, str]]:
    """Name, images in training, images looked at, answer kept, accuracy of each head class, largest class first."""
    quality, counts = inspection.quality, inspection.head.counts
    return [
        (
            inspection.head.class_names[label],
            int(counts[label]),
            int(quality.count_by_class[label]),
            _number(float(quality.agreement_by_class[label])),
            _number(float(quality.accuracy_by_class[label])),
        )
        for label in counts.argsort(descending=True, stable=True).tolist()
    ]


def _figures(inspection: Inspection) -> list[Picture]:
    names = inspection.head.class_names
    figures = [
        Picture(
            title="Translations",
            caption="Left: an image of a head class that the judge has not seen. Right: eight translations of it.",
            alt="Grid of images: each row shows one image and eight translations of it.",
            png=image_grid(
                list(inspection.examples.cpu()),
                row_labels=[names[label] for label in inspection.example_labels.tolist()],
                column_labels=["source"],
            ),
        )
    ]
    if len(inspection.quality.worst):
        figures.append(_failures(inspection))
    figures.extend(_histogram(parameter) for parameter in inspection.parameters)
    return figures


def _failures(inspection: Inspection) -> Picture:
    """Sources above their worst translations, the worst first."""
    quality, names = inspection.quality, inspection.head.class_names
    rows = inspection.held_out[quality.worst]
    labels = inspection.head.labels[rows.to(inspection.head.device)].tolist()
    pairs = zip(labels, quality.worst_judged.tolist(), strict=True)
    taken = "; ".join(f"{n}: {names[own]}, judged {names[judged]}" for n, (own, judged) in enumerate(pairs, start=1))
    return Picture(
        title="Worst translations",
        caption="Images that the judge names right, and below each the translation of it that it gives the least "
        "chance to be of its class, the worst first. Where a person would not know the class either, the "
        f"translator failed; where a person would, perhaps only the judge did. {taken}.",
        alt="Two rows of images: sources above, their worst translations below.",
        png=image_grid(
            [inspection.head.float_images(rows), quality.worst_images],
            row_labels=["source", "translation"],
            column_labels=[str(n + 1) for n in range(len(rows))],
        ),
    )


def _histogram(parameter: Parameter) -> Picture:
    notes = ["What the translator draws, over all images"]
    if parameter.distance is not None:
        distance, equal = parameter.distance
        notes.append(
            f"largest distance to the true distribution function {distance:.3f} (about {equal:.3f} if they were equal)"
        )
    if parameter.resultant is not None:
        around = 0.886 * len(parameter.drawn) ** -0.5  # mean of a Rayleigh law
        notes.append(
            f"mean resultant length of the {len(parameter.drawn)} angles drawn for one image {parameter.resultant} "
            f"(1 is frozen; angles all around the circle give about {around:.2f})"
        )
    text = "; ".join(notes) + "."
    return Picture(
        title=f"Drawn {parameter.name}",
        caption=text,
        alt=f"Histogram of {parameter.name}. {text}",
        png=distribution_histogram(
            parameter.drawn, parameter.true, name=parameter.name, unit=_UNITS.get(parameter.name, "")
        ),
    )
