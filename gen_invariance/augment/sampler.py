"""Over-sampling by translated images as an imbalanced-learn sampler; needs the extra `imblearn`."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from imblearn.over_sampling.base import BaseOverSampler
from scipy import sparse
from sklearn.utils import check_random_state

from gen_invariance.errors import ShapeError
from gen_invariance.nuisance.intensity import Lighting
from gen_invariance.nuisance.protocol import Nuisance

_CHUNK = 1024  # images translated at once


class NuisanceSampler(BaseOverSampler):
    """Brings small classes up by translated copies of their own images, inside imblearn and scikit-learn pipelines.

        pipeline = make_pipeline(NuisanceSampler(translator, image_shape=(1, 8, 8)), LogisticRegression())

    Args:
        nuisance: a translator or a hand-written nuisance; None relights (`Lighting`).
        image_shape: (C, H, W) of a row; None takes a row as one line of grey pixels.
        sampling_strategy: as everywhere in imblearn.
        pixel_range: values that mean 0 and 1; None takes the smallest and largest value of the training rows.
        random_state: as everywhere in scikit-learn.

    Example:
        >>> import numpy as np
        >>> from gen_invariance import NuisanceSampler, Rotation
        >>> rows, labels = np.random.default_rng(0).random((12, 64)), np.arange(12) // 9
        >>> np.bincount(NuisanceSampler(Rotation(20), image_shape=(1, 8, 8)).fit_resample(rows, labels)[1])
        array([9, 9])
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BaseOverSampler._parameter_constraints,
        "nuisance": "no_validation",
        "image_shape": [tuple, list, None],
        "pixel_range": [tuple, list, None],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        nuisance: Nuisance | None = None,
        *,
        image_shape: tuple[int, int, int] | None = None,
        sampling_strategy: Any = "auto",
        pixel_range: tuple[Real, Real] | None = None,
        random_state: Any = None,
    ) -> None:
        super().__init__(sampling_strategy=sampling_strategy)
        self.nuisance, self.image_shape = nuisance, image_shape
        self.pixel_range, self.random_state = pixel_range, random_state

    def _fit_resample(self, X: np.ndarray, y: np.ndarray, **_: Any) -> tuple[np.ndarray, np.ndarray]:  # noqa: N803
        """The rows as they were, then the new ones by class.

        Raises:
            ShapeError: rows do not have the length of `image_shape`.
        """
        shape = tuple(self.image_shape) if self.image_shape is not None else (1, 1, X.shape[1])
        if len(shape) != 3 or math.prod(shape) != X.shape[1]:
            raise ShapeError(
                f"NuisanceSampler: rows of {X.shape[1]} values are no images {shape}; give image_shape=(C, H, W)"
            )
        state = check_random_state(self.random_state)
        drawn = [state.choice(np.flatnonzero(y == label), number) for label, number in self.sampling_strategy_.items()]
        rows = np.concatenate([np.arange(0), *drawn]).astype(np.int64)
        generator = torch.Generator().manual_seed(int(state.randint(np.iinfo(np.int32).max)))
        chosen = X[rows].toarray() if sparse.issparse(X) else X[rows]
        new = self._translated(chosen, shape, X, generator).astype(X.dtype)
        more = sparse.vstack([X, new], format=X.format) if sparse.issparse(X) else np.concatenate([X, new])
        return more, np.concatenate([y, y[rows]])

    @torch.no_grad()
    def _translated(
        self, rows: np.ndarray, shape: tuple[int, ...], everything: np.ndarray, generator: torch.Generator
    ) -> np.ndarray:
        """Rows (M, F) under one draw each, in the units they came in."""
        limits: tuple[Any, Any] = self.pixel_range or (everything.min(), everything.max())
        low, high = limits
        span = float(high - low) or 1.0
        nuisance = Lighting() if self.nuisance is None else self.nuisance
        images = ((torch.from_numpy(rows.astype(np.float32)) - float(low)) / span).clamp(0, 1).unflatten(1, shape)
        parts = [
            nuisance.apply(part, nuisance.sample(part.shape, generator=generator)) for part in images.split(_CHUNK)
        ]
        return (torch.cat(parts).flatten(1) * span + float(low)).numpy() if len(rows) else rows
