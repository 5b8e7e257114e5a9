"""What a classifier gets wrong, written beside its figures: a confusion matrix as CSV and a page to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.measure.accuracy import score_predictions
from gen_invariance.measure.calibration import calibration_by_group, calibration_error, confusion_matrix
from gen_invariance.records import write_csv
from gen_invariance.report.mistakes_page import WORST_IMAGES, Mistake, write_mistakes_page


def write_mistakes(
    folder: Path,
    data: ImageData,
    probabilities: Tensor,
    *,
    title: str,
    names: Sequence[str],
    counts: Sequence[int],
    groups: Mapping[str, Tensor],
) -> Path:
    """Write confusion.csv and mistakes.html into `folder`; returns the path of the page.

    Args:
        folder: where to.
        data: labelled images.
        probabilities: of each class, float (N, K).
        title: heading of the page.
        names: of the images, for the page.
        counts: training images of each class.
        groups: of each shot group its classes, bool (K,).
    """
    predicted, labels = probabilities.argmax(1), data.labels.cpu()
    confusion = confusion_matrix(predicted, labels, data.num_classes)
    # The prefix keeps a class that is called "class" apart from the first column.
    frame = pd.DataFrame(confusion.numpy(), columns=[f"as {name}" for name in data.class_names])
    frame.insert(0, "class", list(data.class_names))
    write_csv(frame, folder / "confusion.csv")

    scores = score_predictions(predicted, labels, data.num_classes)
    members = {name: classes for name, classes in groups.items() if classes.any()}
    figures = {"Balanced accuracy": f"{scores.balanced:.1%}"}
    figures |= {
        f"{name.capitalize()}-shot accuracy": f"{value:.1%}" for name, value in scores.group_means(members).items()
    }
    figures["Calibration error"] = f"{calibration_error(probabilities, labels):.1%}"
    by_group = calibration_by_group(probabilities, labels, members)
    figures |= {f"{name.capitalize()}-shot calibration error": f"{value:.1%}" for name, value in by_group.items()}
    return write_mistakes_page(
        folder / "mistakes.html",
        title=title,
        about=f"{len(data)} images of {data.name or 'the data'}, each named by the class that is likeliest.",
        class_names=data.class_names,
        counts=list(counts),
        confusion=confusion,
        mistakes=_find_worst(data, probabilities, names),
        figures=figures,
    )


def _find_worst(data: ImageData, probabilities: Tensor, names: Sequence[str]) -> list[Mistake]:
    """Images that are named wrong, those first whose wrong name is surest."""
    labels = data.labels.cpu()
    sure, predicted = probabilities.max(1)
    order = torch.where(predicted != labels, sure, -1.0).argsort(descending=True, stable=True)
    rows = [row for row in order[:WORST_IMAGES].tolist() if predicted[row] != labels[row]]
    return [
        Mistake(
            image=data.images[row],
            name=names[row],
            label=int(labels[row]),
            predicted=int(predicted[row]),
            probability=float(sure[row]),
            own=float(probabilities[row, labels[row]]),
        )
        for row in rows
    ]
