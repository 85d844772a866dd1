"""The leading directions of a stream of rows: a memory of inputs for layers that are too wide for a full matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def add_rows(sketch: Float[Tensor, "r d"], rows: Float[Tensor, "t d"]) -> Float[Tensor, "r d"]:
    """The r leading directions of all rows so far: orthogonal, ``BᵀB`` close to the sum of ``xᵀx``.

    Each time r new rows join the r directions, and the r leading ones of these 2r stay (incremental singular value
    decomposition, from an eigendecomposition of their 2r x 2r products in float64). It is exact while the rows have at
    most rank r; then the smallest directions are dropped, and the others keep their size (frequent directions would
    shrink them). Cost: about ``12 r d`` operations per row in float64 and an eigendecomposition per r rows, for which
    the host waits for a GPU. Rows that are not finite make the result NaN.

    Example:
        >>> rows = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
        >>> (lambda b: (b.T @ b).round(decimals=3))(add_rows(torch.zeros(2, 3), rows))
        tensor([[25.,  0.,  0.],
                [ 0.,  1.,  0.],
                [ 0.,  0.,  0.]])
    """
    rank, dtype = len(sketch), sketch.dtype
    kept = sketch.double()
    for part in rows.split(rank):
        both = torch.cat([kept, part.double()])
        products = both @ both.T
        finite = products.isfinite().all()
        values = torch.where(finite, products, torch.eye(len(both), dtype=both.dtype, device=both.device))
        leading = torch.linalg.eigh(values)[1][:, -rank:]
        kept = torch.where(finite, leading.T @ both, torch.nan)
    return kept.to(dtype)


def closing(sketch: Float[Tensor, "r d"], alpha: float | Tensor) -> Float[Tensor, "r d"]:
    """A with ``I - AᵀA = (I + BᵀB / α)⁻¹`` for a sketch B of orthogonal rows: the projection in r rows."""
    return sketch * (alpha + sketch.square().sum(1, keepdim=True)).rsqrt()
