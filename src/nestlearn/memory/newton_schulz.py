"""Newton-Schulz orthogonalization, used by memories and by optimizers."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The quintic of Muon: steep at 0, so that small singular values rise to about 1 within five steps."""

TINY = 1e-7
"""Matrices of a Frobenius norm below this go to zero instead of to an orthogonal matrix."""


def newton_schulz(
    x: Float[Tensor, "*b m n"], steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS
) -> Float[Tensor, "*b m n"]:
    """The matrix moved toward ``U V^T`` of its singular value decomposition ``U diag(s) V^T`` (NL Eq. 42-44).

        X_0 = X / ||X||_F,     X_{i+1} = a X_i + (b X_i X_i^T + c (X_i X_i^T)^2) X_i

    Each step applies ``a s + b s^3 + c s^5`` to every singular value; after five they lie in about [0.7, 1.2]. It runs
    in the dtype given (half precision loses the small ones). A zero matrix stays zero, with finite gradients.

    Args:
        x: matrices; the smaller of m and n sets the cost.
        steps: iterations; 0 only normalizes.
        coefficients: (a, b, c).

    Example:
        >>> import torch
        >>> x = torch.diag(torch.tensor([4.0, 1.0, 0.5]))
        >>> s = torch.linalg.svdvals(newton_schulz(x))
        >>> bool((s > 0.6).all() and (s < 1.3).all())
        True
    """
    a, b, c = coefficients
    # A large matrix first shrinks by its largest entry: its squares would not be finite.
    x = x / x.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x * (x.square().sum((-2, -1), keepdim=True) + TINY**2).rsqrt()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
