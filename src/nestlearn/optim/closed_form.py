"""Adam and AdaGrad as the best memories of past gradients, in closed form (NL Appendix B).

A memory m of gradients g_i with the value P minimizes a ridge regression, element by element or with matrices:

    Σ_i w_i (m g_i - P)² + λ m²        m* = P M / (H + λ),      M = Σ w_i g_i, H = Σ w_i g_i²      (NL Eq. 101-103)
    Σ_i w_i ‖g_iᵀ m - I‖² + λ ‖m‖²     P m* = P (H + λ I)⁻¹ M,  M = Σ w_i g_i, H = Σ w_i g_i g_iᵀ  (NL Eq. 106-110)

The second is NL's with g transposed and the value P outside: as printed, ``m g`` and the [out, out] matrix P have no
common shape unless the layer is square.

These functions say which memories the optimizers of torch are. They are no optimizers of their own, which would be
slower copies of `torch.optim.Adam` and of `AssociativeMomentum` with `Whitening`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def adam_memory(
    first: Float[Tensor, "*s"], second: Float[Tensor, "*s"], value: Float[Tensor, "*s"], ridge: float | Tensor = 0.0
) -> Float[Tensor, "*s"]:
    """``m* = P M / (H + λ)``: the memory that maps each element's gradients best to P (NL Eq. 101-103).

    With averages M and H of weights ``(1 - β) β^(t-i) / (1 - β^t)``:

    - ``P = √H`` and ``λ = ε √H`` is the update of `torch.optim.Adam` with β1 = β2 = β: ``M / (√H + ε)``.
    - ``P = √H`` and a constant λ is Adam's where H is much larger than λ (NL Eq. 105, whose ε it is).
    - ``P = H`` and ``λ = 0`` is M: plain momentum (NL Eq. 104).

    Betas that differ give M and H weights of their own (NL Eq. 102): the same expression is then Adam's with these
    betas, but the minimizer of no one regression. With g itself for M and the sum of g² for H it is
    `torch.optim.Adagrad`.

    Args:
        first: M.
        second: H.
        value: P.
        ridge: λ, a number or one per element.

    Example:
        >>> gradients = torch.tensor([[1.0, 2.0], [3.0, -2.0]])  # two steps of two elements
        >>> first, second = gradients.mean(0), gradients.square().mean(0)
        >>> adam_memory(first, second, second.sqrt())
        tensor([0.8944, 0.0000])
    """
    return value * first / (second + ridge)


def adagrad_memory(
    first: Float[Tensor, "out in"],
    second: Float[Tensor, "out out"],
    value: Float[Tensor, "out out"],
    ridge: float = 0.0,
) -> Float[Tensor, "out in"]:
    """``P (H + λ I)⁻¹ M``: the same with matrices, as an update of the weights (NL Eq. 106-111).

    With H the sum of ``g gᵀ`` and ``P = H^(1/2)`` it is ``H^(-1/2) M``: AdaGrad with a full matrix and momentum, and
    for weights of one element `torch.optim.Adagrad`. `AssociativeMomentum` with ``Whitening("rows", beta=None)`` is
    this for ``M = g``; with momentum it divides each gradient before it is added, not their sum.

    Args:
        first: M.
        second: H.
        value: P.
        ridge: λ.

    Example:
        >>> second = torch.diag(torch.tensor([4.0, 9.0]))
        >>> adagrad_memory(torch.ones(2, 1), second, second.sqrt())
        tensor([[0.5000],
                [0.3333]])
    """
    damped = second + ridge * torch.eye(len(second), dtype=second.dtype, device=second.device)
    return value @ torch.linalg.solve(damped, first)
