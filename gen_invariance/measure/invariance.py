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
from torch import Tensor

from gen_invariance.errors import SettingsError
from gen_invariance.measure.predict import as_predict
from gen_invariance.measure.rounds import Rounds
from gen_invariance.nuisance.protocol import Nuisance


@dataclass(frozen=True)
class InvarianceScores:
    """What `measure_invariance` found; all (K,), on the CPU.

    Attributes:
        ekld: float64, nats; NaN for a class without images.
        agreement: float64, share of draws under which the predicted class stays; NaN for a class without images.
        standard_error: float64, of `ekld`, over images; NaN for fewer than two images.
        count: int64, images of each class.
        draws: most transformations tried on each image.
        draws_by_class: int64, those tried on each image of the class; fewer where the class was precise before.
    """

    ekld: Tensor
    agreement: Tensor
    standard_error: Tensor
    count: Tensor
    draws: int
    draws_by_class: Tensor


@torch.no_grad()
def measure_invariance(
    model: Callable[[Tensor], Any],
    images: Tensor,
    labels: Tensor,
    nuisance: Nuisance,
    *,
    originals: Tensor | None = None,
    num_classes: int | None = None,
    draws: int = 20,
    standard_error: float | None = None,
    stratified: bool | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> InvarianceScores:
    """Expected KL divergence (eKLD) and agreement by class under any nuisance, hand-written or learned.

    Each of the `draws` rounds draws once for all images and then goes through them in batches, so the result does
    not depend on `batch_size`, and memory does not grow with the number of draws. Two models that are measured with
    equal generators meet the same draws; their difference is more precise than either (`compare_invariance`).

    Args:
        model: any torch model (measured in eval mode, on its own device) or callable, images to logits.
        images: float (N, C, H, W) in [0, 1], or uint8.
        labels: whole numbers (N,), also as a list or an array.
        nuisance: the transformations to be invariant to.
        originals: what the nuisance acts on, row for row `images` before they met it; None: `images` themselves.
        num_classes: K; None takes the number of logits.
        draws: rounds; the reference protocol takes 100.
        standard_error: nats; a class goes through no further rounds once its standard error is at most this, or once
            more draws could hardly lower it since its images differ so much (see `rounds`). None goes through all.
        stratified: spread an image's own draws over the nuisance's range, so that fewer of them do (see `stratified`).
            None does so where `standard_error` is given.
        batch_size: images at a time; None is 512, of small images on a GPU more.
        generator: CPU generator of the draws; None takes the same new one at each call.

    Returns:
        Figures by class. Under the identity nuisance eKLD is exactly 0 and agreement exactly 1.

    Raises:
        SettingsError: fewer than one draw, or a negative standard error.
        ShapeError: no images, or labels or originals that do not fit them.
        RangeError: a label that is no class, pixels that were normalised or are 0..255, or a model that answers NaN.

    Example:
        >>> import torch
        >>> from gen_invariance import Lighting, Rotation, measure_invariance
        >>> def model(images):  # dark images are of class 0
        ...     light = images.mean(dim=(1, 2, 3))
        ...     return torch.stack([1 - light, light], dim=1)
        >>> images, labels = torch.full((8, 1, 8, 8), 0.4), torch.zeros(8, dtype=torch.int64)
        >>> moved = measure_invariance(model, images, labels, Lighting(brightness=0.3), num_classes=2, draws=4)
        >>> bool(moved.ekld[0] > 0), moved.ekld[1].isnan().item()  # no image of class 1
        (True, True)
    """
    if standard_error is not None and not standard_error >= 0:
        raise SettingsError(f"measure: standard_error must be 0 or more nats, got {standard_error}")
    if stratified is None:
        stratified = standard_error is not None
    with as_predict(model, fuse=True) as predict:
        how: dict[str, Any] = {"originals": originals, "num_classes": num_classes, "batch_size": batch_size}
        rounds = Rounds([predict], images, labels, nuisance, **how)
        rounds.run(draws, standard_error=standard_error, stratified=stratified, generator=generator)
    return InvarianceScores(
        ekld=rounds.mean(rounds.divergence[0]),
        agreement=rounds.mean(rounds.same[0]),
        standard_error=rounds.standard_error(rounds.divergence[0]),
        count=rounds.count,
        draws=draws,
        draws_by_class=rounds.by_class,
    )


@dataclass(frozen=True)
class InvarianceDifference:
    """What `compare_invariance` found; all (K,), on the CPU; NaN as in `InvarianceScores`.

    Attributes:
        difference: float64, eKLD of the first model less that of the second, nats.
        standard_error: float64, of `difference`, over images.
        first, second: float64, eKLD of each, nats.
        count: int64, images of each class.
    """

    difference: Tensor
    standard_error: Tensor
    first: Tensor
    second: Tensor
    count: Tensor


@torch.no_grad()
def compare_invariance(
    first: Callable[[Tensor], Any],
    second: Callable[[Tensor], Any],
    images: Tensor,
    labels: Tensor,
    nuisance: Nuisance,
    *,
    originals: Tensor | None = None,
    num_classes: int | None = None,
    draws: int = 20,
    stratified: bool = True,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> InvarianceDifference:
    """Which of two models is less invariant, by class, under common random numbers.

    Both see the same transformed images, which are made once; what is hard about an image or a draw then falls on both,
    so the difference has a smaller standard error than two separate measurements of the same cost.

    Args, Raises: as `measure_invariance`.

    Example:
        >>> import torch
        >>> from gen_invariance import Lighting, compare_invariance
        >>> def model(images):  # dark images are of class 0
        ...     light = images.mean(dim=(1, 2, 3))
        ...     return torch.stack([1 - light, light], dim=1)
        >>> images, labels = torch.full((8, 1, 8, 8), 0.4), torch.zeros(8, dtype=torch.int64)
        >>> found = compare_invariance(model, lambda images: 9 * model(images), images, labels, Lighting(), draws=4)
        >>> bool(found.difference[0] < 0)  # sharper answers move further
        True
    """
    with as_predict(first, fuse=True) as one, as_predict(second, fuse=True) as two:
        how: dict[str, Any] = {"originals": originals, "num_classes": num_classes, "batch_size": batch_size}
        rounds = Rounds([one, two], images, labels, nuisance, **how)
        rounds.run(draws, stratified=stratified, generator=generator)
    a, b = rounds.divergence
    return InvarianceDifference(
        rounds.mean(a - b), rounds.standard_error(a - b), rounds.mean(a), rounds.mean(b), rounds.count
    )
