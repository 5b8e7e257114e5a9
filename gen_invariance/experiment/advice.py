"""May this translator be used on these images? Asked before anything is written.

What was said of it before is read where it lies beside its weights; otherwise it is judged here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError, SettingsError
from gen_invariance.experiment.launch import Say
from gen_invariance.experiment.settings import InspectSettings
from gen_invariance.translator.quality.verdict import Verdict

_MOST = 3000  # images that are judged on
UNASKED = "add force=true to use it all the same"


def judge_translator(
    translator: Path,
    images: ImageData,
    *,
    budget: str,
    seed: int,
    out: Path | None,
    about: Mapping[str, Any],
    say: Say,
) -> Verdict | None:
    """What is to be said of a saved translator on these training images; None where they are too few to tell.

    Args:
        translator: its folder.
        images: of the training set, all classes.
        budget: time for it, such as "10min".
        seed: of everything random.
        out: where the verdict is kept; None keeps it nowhere.
        about: facts about the images, for the page.
        say: gets a line for each thing done.
    """
    from gen_invariance.experiment.inspect import inspect_translator

    settings = InspectSettings(budget=budget)
    try:
        inspection = inspect_translator(
            translator, _thin_out(images), settings, out=out, about=about, seed=seed, say=say
        )
    except DataError as error:
        say(f"note: nobody can say whether this translator helps here ({error}); look at preview.html")
        return None
    return inspection.quality.verdict


def _thin_out(images: ImageData) -> ImageData:
    """At most `_MOST` images, the largest classes thinned out to one size; they come in a random order already."""
    counts, most = images.counts, len(images)
    while int(counts.clamp(max=most).sum()) > _MOST and most > 1:
        most = most * 9 // 10
    labels = images.labels.cpu()
    rank = torch.zeros(len(images), dtype=torch.int64)
    for label in range(images.num_classes):
        rows = (labels == label).nonzero()[:, 0]
        rank[rows] = torch.arange(len(rows))
    return images.subset((rank < most).nonzero()[:, 0])


def obey(verdict: Verdict | None, translator: Path | str, strength: float | str, say: Say) -> float:
    """The share of missing images to make: what is asked for, or what the verdict advises.

    Raises:
        SettingsError: the verdict is "do not use".
    """
    if verdict is not None and verdict.strength == 0:
        raise SettingsError(
            f"inspect says '{verdict.word}' of the translator in {translator}: {verdict.reasons[0].rstrip('.')}; fit a "
            f"better one, or {UNASKED}"
        )
    if strength != "auto":
        return float(strength)
    if verdict is None or verdict.strength == 1:
        return 1.0
    say(
        f"note: inspect says '{verdict.word}', so strength={verdict.strength:g}: classes get that share of the images "
        "they lack to the target"
    )
    return verdict.strength
