"""With a pretrained backbone: features of augmented views are computed once, and each split trains heads on them.

Images are held back once for all splits, and translators are fitted once, on all other images: what a split cuts was
seen by the translator, what it is scored on was not. Splits then differ in what is cut, and a head takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gen_invariance.augment.policy import policy
from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.heads import fit_logistic, predict
from gen_invariance.classifier.model import Classifier, cache_features
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.data.images import ImageData
from gen_invariance.files import atomic_write
from gen_invariance.nuisance.protocol import draw_to
from gen_invariance.referee.candidates import Candidate
from gen_invariance.referee.settings import RefereeSettings
from gen_invariance.referee.train import Fitted, build_candidate_stage, build_every_row
from gen_invariance.run import named_generator

_CHUNK = 256
_STRENGTH = 0.01  # inverse of the penalty of heads: there are about as many features as images


def build_frozen(settings: RefereeSettings, data: ImageData) -> Classifier:
    """The pretrained backbone of the settings, frozen, in eval mode, on the device of `data`.

    Raises:
        SettingsError, DataNotFoundError, CheckpointError: see `build_classifier`.
    """
    model = build_classifier(
        settings.backbone,
        num_classes=max(data.num_classes, 1),
        channels=data.images.shape[1],
        weights=settings.weights,
    )
    TransferPlan("frozen").apply(model.eval())
    return model.to(data.device).eval()


@dataclass(frozen=True)
class Views:
    """Features of the images that may be trained on, in several views of a candidate.

    Attributes:
        plain: float (V, N, D), crops and what every row gets.
        staged: the same after what the stage gives; None without a stage.
    """

    plain: Tensor
    staged: Tensor | None

    def save(self, path: Path, *, held: Tensor) -> None:
        """Write them with features of the images to score on, float (M, D), in half precision."""
        arrays = {"plain": self.plain, "held": held} | ({} if self.staged is None else {"staged": self.staged})
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{name: value.half().numpy() for name, value in arrays.items()})

    @classmethod
    def load(cls, path: Path) -> tuple[Views, Tensor]:
        """What `save` wrote, in float32."""
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}
        return cls(found["plain"], found.get("staged")), found["held"]


def compute_views(
    model: Classifier,
    candidate: Candidate,
    data: ImageData,
    fitted: Fitted,
    settings: RefereeSettings,
    *,
    seed: int,
    flip_safe: bool,
) -> Views:
    """`settings.views` views of each image of `data`; candidates share crops where they draw nothing else before."""
    every_row = build_every_row(candidate, side=data.images.shape[-1], flip_safe=flip_safe)
    stage = build_candidate_stage(candidate, data, fitted)
    plain, staged = [], []
    for view in range(settings.views):
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, rows in enumerate(torch.arange(len(data)).split(_CHUNK)):
            images = data.float_images(rows)
            generator = named_generator(seed, "referee", "view", view, number)
            draw = draw_to(every_row.sample(images.shape, generator=generator), images)
            parts[0].append(cache_features(model, every_row.apply(images, draw)).cpu())
            if stage is not None:
                own = stage.nuisance.sample(images.shape, generator=generator)
                with torch.no_grad():
                    moved = stage.nuisance.apply(images, draw_to(own, images))
                parts[1].append(cache_features(model, every_row.apply(moved, draw)).cpu())
        plain.append(torch.cat(parts[0]))
        if stage is not None:
            staged.append(torch.cat(parts[1]))
    return Views(torch.stack(plain), torch.stack(staged) if staged else None)


def cache_held(model: Classifier, data: ImageData) -> Tensor:
    """Features of images as they are, float (M, D), on the CPU."""
    return cache_features(model, data.images).cpu()


def score_head(
    views: Views,
    candidate: Candidate,
    labels: Tensor,
    rows: Tensor,
    held: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    seed: int,
) -> np.ndarray:
    """Train a head on the images `rows` of the views; which of the `held` (features, labels) it names right, bool (M,).

    Args:
        views: of the images that may be trained on.
        candidate: its policy says which rows are translated.
        labels: int64 (N,), of these images.
        rows: int64 (R,), which of them a split leaves in training.
        held: features (M, D) and labels (M,) to score on.
        num_classes: K.
        seed: of the choice of rows that are translated, the same for all candidates.
    """
    chosen = views.plain[:, rows]
    if views.staged is not None:
        counts = torch.bincount(labels[rows], minlength=num_classes)
        probability = policy(candidate.policy, counts, **candidate.policy_options)
        generator = named_generator(seed, "referee", "rows")
        gates = torch.rand(len(views.plain), len(rows), generator=generator) < probability[labels[rows]]
        chosen = torch.where(gates[..., None], views.staged[:, rows], chosen)
    head = fit_logistic(chosen.flatten(0, 1), labels[rows].repeat(len(views.plain)), strength=_STRENGTH)
    return (predict(head, held[0]) == held[1]).numpy()
