"""Invariance by class: does a classifier's answer stay when the nuisance acts on the image?

    eKLD_c = E over x of class c, E over T, of KL( p(.|x) || p(.|T x) ),  in nats (Zhou et al. 2022)

0 is perfect invariance. Original and transformed image are always the same image. In a benchmark the images carry a
draw of the nuisance already; there T acts on the image as it was before (`originals`), so that both sides are draws
of the nuisance and none carries two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.measure.accuracy import Predict, as_float, logits_of, mean_by_class, refuse_nan
from gen_invariance.measure.any_model import as_predict
from gen_invariance.nuisance.protocol import Nuisance, draw_to, select_rows
from gen_invariance.run import named_generator


@dataclass(frozen=True)
class InvarianceScores:
    """What `measure_invariance` found; all (K,), on the CPU.

    Attributes:
        ekld: float64, nats; NaN for a class without images.
        agreement: float64, share of draws under which the predicted class stays; NaN for a class without images.
        standard_error: float64, of `ekld`, over images; NaN for fewer than two images.
        count: int64, images of each class.
        draws: transformations tried on each image.
    """

    ekld: Tensor
    agreement: Tensor
    standard_error: Tensor
    count: Tensor
    draws: int


@torch.no_grad()
def measure_invariance(
    predict: Callable[[Tensor], Any],
    images: Tensor,
    labels: Tensor,
    nuisance: Nuisance,
    *,
    originals: Tensor | None = None,
    num_classes: int | None = None,
    draws: int = 20,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
) -> InvarianceScores:
    """Expected KL divergence (eKLD) and agreement by class under any nuisance, hand-written or learned.

    Each of the `draws` rounds draws once for all images and then goes through them in batches, so the result does
    not depend on `batch_size`, and memory does not grow with the number of draws.

    Args:
        predict: any torch model (measured in eval mode, on its own device) or callable, images to logits.
        images: float (N, C, H, W) in [0, 1], or uint8.
        labels: int64 (N,).
        nuisance: the transformations to be invariant to.
        originals: what the nuisance acts on, row for row `images` before they met it; None: `images` themselves.
        num_classes: K; None takes the number of logits.
        draws: rounds; the reference protocol takes 100.
        batch_size: images at a time.
        generator: CPU generator of the draws; None takes the same new one at each call.

    Returns:
        Figures by class. Under the identity nuisance eKLD is exactly 0 and agreement exactly 1.

    Raises:
        SettingsError: fewer than one draw.
        ShapeError: no images, or labels or originals that do not fit them.
        RangeError: a label that is no class, or a model that answers NaN.
    """
    if draws < 1:
        raise SettingsError(f"measure: draws must be at least 1, got {draws}")
    if labels.shape != images.shape[:1]:
        raise ShapeError(f"measure: {len(images)} images but labels of shape {tuple(labels.shape)}")
    if originals is not None and originals.shape != images.shape:
        raise ShapeError(f"measure: images {tuple(images.shape)} but originals {tuple(originals.shape)}")
    generator = named_generator(0, "measure") if generator is None else generator
    with as_predict(predict) as ask:
        divergence, same, classes = _by_image(
            ask, images, nuisance, originals=originals, draws=draws, batch_size=batch_size, generator=generator
        )
    num_classes = classes if num_classes is None else num_classes
    ekld, count = mean_by_class(divergence, labels, num_classes)
    agreement, _ = mean_by_class(same, labels, num_classes)
    square, _ = mean_by_class(divergence**2, labels, num_classes)
    variance = (square - ekld**2).clamp(min=0) * count / (count - 1).clamp(min=0)
    return InvarianceScores(ekld, agreement, (variance / count).sqrt(), count, draws)


def _by_image(
    predict: Predict,
    images: Tensor,
    nuisance: Nuisance,
    *,
    originals: Tensor | None,
    draws: int,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, int]:
    """Mean divergence and share of kept answers of each image, float64 (N,), and the number of logits."""
    original = F.log_softmax(logits_of(predict, images, batch_size=batch_size), dim=1)
    sources = images if originals is None else originals
    divergence = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    same = torch.zeros_like(divergence)
    for _ in range(draws):
        draw = nuisance.sample(images.shape, generator=generator)
        for rows in torch.arange(len(images)).split(batch_size):
            chunk = as_float(sources[rows.to(sources.device)])
            moved = nuisance.apply(chunk, draw_to(select_rows(draw, rows), chunk))
            moved = F.log_softmax(refuse_nan(predict(moved).float()), dim=1)
            own = original[rows.to(images.device)]
            divergence[rows] += kl_divergence(own, moved)
            same[rows] += own.argmax(1) == moved.argmax(1)
    return divergence / draws, same / draws, original.shape[1]


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row in nats, float64 (B,), from log-probabilities (B, K); exactly 0 for equal rows.

    A class to which p gives no probability adds nothing, whatever q says.
    """
    log_p, log_q = log_p.double(), log_q.double()
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1).clamp(min=0)
