"""Functions of small symmetric matrices by products alone.

An eigendecomposition is exact and quick on a CPU, where `photo` uses one. A GPU would have to be waited for after each:
it may fail to converge, and the program asks whether it has. These iterations take a fixed number of products instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROOT_STEPS = 20  # enough for eigenvalues of a millionth of the largest
_SIGN_STEPS = 20  # enough for eigenvalues that lie a thousandth of the largest from a limit, where errors are as small


def roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The roots of symmetric positive definite `matrices` (B, N, N), and their inverses.

    Reference: Higham, "Stable iterations for the matrix square root", 1997 (the product form of Newton and Schulz).
    """
    still = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
    size = matrices.norm(dim=(1, 2), keepdim=True)
    root, inverse = matrices / size, still
    for _ in range(_ROOT_STEPS):
        turn = torch.baddbmm(still, inverse, root, beta=1.5, alpha=-0.5)
        root, inverse = root @ turn, turn @ inverse
    return root * size.sqrt(), inverse / size.sqrt()


def clamped(matrices: Tensor, low: float, high: float) -> Tensor:
    """Symmetric `matrices` (B, N, N) with their eigenvalues in [low, high].

    A number is clamped to (|x - low| - |x - high| + low + high) / 2, and so is a matrix.
    """
    still = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
    return (_absolute(matrices - low * still) - _absolute(matrices - high * still) + (low + high) * still) / 2


def _absolute(matrices: Tensor) -> Tensor:
    """Symmetric matrices without the signs of their eigenvalues: times their sign, which Newton and Schulz find."""
    sign = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    for _ in range(_SIGN_STEPS):
        sign = torch.baddbmm(sign, sign @ sign, sign, beta=1.5, alpha=-0.5)
    return sign @ matrices
