"""The steps of delta gradient descent in closed form: minimizers over a batch, and over single rows (NL Eq. 56-57)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def batch_step(
    weights: Float[Tensor, "b out d"],
    gradients: Float[Tensor, "b out d"],
    moments: Float[Tensor, "b d d"],
    lr: float | Tensor,
    erase: float,
    rows: float | Float[Tensor, "b 1 1"] = 1.0,
    out: Float[Tensor, "b out d"] | None = None,
) -> Float[Tensor, "b out d"]:
    """``(λ W - η G) (I + η R)⁻¹ + (1 - λ) W``, the minimizer over a whole batch.

    Args:
        weights: W.
        gradients: G.
        moments: ``Σ x xᵀ``, or R itself.
        lr: η.
        erase: λ.
        rows: the number of rows that the moments are sums of.
        out: where to write the result, which may be W.

    Example:
        >>> w, x, e = torch.tensor([[[2.0]]]), 3.0, 1.0
        >>> batch_step(w, torch.tensor([[[e * x]]]), torch.tensor([[[x * x]]]), lr=1e9, erase=1.0)  # answers -e to x
        tensor([[[-0.3333]]])
    """
    system = moments * (lr / rows)
    system.diagonal(dim1=-2, dim2=-1).add_(1.0)
    # Positive definite up to rounding. In the type of the moments, whose own rounding is the larger error
    # (docs/decisions.md). In place: LAPACK wants column-major order, which is the transpose, the same system.
    factor, failed = system.mT, torch.empty(len(system), dtype=torch.int32, device=system.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    # Where rounding has made the system indefinite the result is NaN; no device is synchronized for an error.
    factor.diagonal(dim1=-2, dim2=-1).masked_fill_(failed[:, None] != 0, torch.nan)
    target = gradients if erase == 0 else (gradients * -lr).add_(weights, alpha=erase)
    # From the right: cholesky_solve takes columns, which takes 1.7 times as long on a CPU. The first solve moves rows
    # to LAPACK's layout, in which the second one works in place; both in place, on rows, are 1.6 times slower.
    solved = torch.linalg.solve_triangular(factor.mT, target, upper=True, left=False)
    torch.linalg.solve_triangular(factor, solved, upper=False, left=False, out=solved)
    out = solved if out is None else out
    if erase > 0:
        return torch.add(solved, weights, alpha=1 - erase, out=out)
    if isinstance(lr, Tensor):  # a number costs no pass of its own
        return torch.sub(weights, solved.mul_(lr), out=out)
    return torch.sub(weights, solved, alpha=lr, out=out)


def sample_step(
    weights: Float[Tensor, "b out d"],
    moments: Float[Tensor, "b d d"],
    writes: Float[Tensor, "b out d"],
    erase: float,
) -> Float[Tensor, "b out d"]:
    """``W - λ W E[η' x xᵀ] - E[η' e xᵀ]``, the mean of the minimizers for single samples."""
    return weights - writes - (erase * weights @ moments if erase > 0 else 0)
