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

from gen_invariance.devices import plain_defaults
from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.nuisance.intensity import Lighting
from gen_invariance.nuisance.protocol import Nuisance

_CHUNK = 1024  # images translated at once
_SLACK = 0.1  # of the range, that values may lie outside of it


class NuisanceSampler(BaseOverSampler):
    """Brings small classes up by translated copies of their own images, inside imblearn and scikit-learn pipelines.

        pipeline = make_pipeline(NuisanceSampler(translator, image_shape=(1, 8, 8)), LogisticRegression())

    Args:
        nuisance: a translator or a hand-written nuisance; None relights (`Lighting`).
        image_shape: (C, H, W) of a row, channels first; None takes a row as one line of grey pixels.
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
        """The rows as they were, then the new ones by class; whole numbers are rounded.

        Raises:
            ShapeError: rows do not have the length of `image_shape`, or it lies channels last.
            RangeError: values far outside `pixel_range`.
            SettingsError: a `pixel_range` that is none.
        """
        shape = tuple(self.image_shape) if self.image_shape is not None else (1, 1, X.shape[1])
        if len(shape) != 3 or math.prod(shape) != X.shape[1]:
            raise ShapeError(
                f"NuisanceSampler: rows of {X.shape[1]} values are no images {shape}; give image_shape=(C, H, W)"
            )
        if shape[0] not in (1, 3) and shape[2] in (1, 3):
            raise ShapeError(
                f"NuisanceSampler: image_shape {shape} seems to lie channels last; give (C, H, W) and rows so ordered "
                "(images.transpose(0, 3, 1, 2).reshape(len(images), -1))"
            )
        state = check_random_state(self.random_state)
        drawn = [state.choice(np.flatnonzero(y == label), number) for label, number in self.sampling_strategy_.items()]
        rows = np.concatenate([np.arange(0), *drawn]).astype(np.int64)
        generator = torch.Generator().manual_seed(int(state.randint(np.iinfo(np.int32).max)))
        chosen = X[rows].toarray() if sparse.issparse(X) else X[rows]
        new = _as_type(self._translated(chosen, shape, X, generator), X.dtype)
        more = sparse.vstack([X, new], format=X.format) if sparse.issparse(X) else np.concatenate([X, new])
        return more, np.concatenate([y, y[rows]])

    @torch.no_grad()
    @plain_defaults()
    def _translated(
        self, rows: np.ndarray, shape: tuple[int, ...], everything: np.ndarray, generator: torch.Generator
    ) -> np.ndarray:
        """Rows (M, F) under one draw each, in the units they came in."""
        least, most = float(everything.min()), float(everything.max())
        low, high = map(float, (least, most) if self.pixel_range is None else self.pixel_range)
        if self.pixel_range is not None and not low < high:
            raise SettingsError(f"NuisanceSampler: pixel_range must be two ascending numbers, got {self.pixel_range}")
        span = high - low or 1.0
        if not (least >= low - _SLACK * span and most <= high + _SLACK * span):
            raise RangeError(
                f"NuisanceSampler: values lie in [{least:.4g}, {most:.4g}], far outside of pixel_range "
                f"[{low:.4g}, {high:.4g}]; give the values that mean 0 and 1"
            )
        nuisance = Lighting() if self.nuisance is None else self.nuisance
        images = ((torch.from_numpy(rows.astype(np.float64)) - low) / span).clamp(0, 1).float().unflatten(1, shape)
        parts = [
            nuisance.apply(part, nuisance.sample(part.shape, generator=generator)) for part in images.split(_CHUNK)
        ]
        return (torch.cat(parts).flatten(1).double() * span + low).numpy() if len(rows) else rows


def _as_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` in `dtype`; whole numbers are the nearest ones, never beyond what the type holds."""
    if dtype.kind not in "iub":
        return values.astype(dtype)
    least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return np.rint(values).clip(least, most).astype(dtype)
