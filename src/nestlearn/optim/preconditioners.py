"""Preconditioners learned from gradients: memories that map a gradient to better coordinates (NL Eq. 46-47).

NL Eq. 38-41 describe such a memory in general. The rules here are known ones: the root mean square of each element, the
full matrix of AdaGrad, and recursive least squares.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.optim.checks import fractions, not_negative, one_of, positive, whole_number
from nestlearn.optim.matrices import Matrices, Stack, stack_shape, together, wide
from nestlearn.optim.matrix_optimizer import zeros
from nestlearn.optim.projection import ridge_projection

Side = Literal["columns", "rows"]


@dataclass(frozen=True)
class Diagonal:
    """Each element divided by its own root mean square: ``v ← β v + (1 - β) g²``, ``P g = g / (√v̂ + ε)``.

    With plain momentum and without the correction of v for its start at zero this is `torch.optim.RMSprop`. State: 4
    bytes per parameter.

    Args:
        beta: β.
        eps: ε.
        bias_correction: ``v̂ = v / (1 - β^t)`` instead of v.

    Raises:
        ValueError: a setting out of range.
    """

    beta: float = 0.999
    eps: float = 1e-8
    bias_correction: bool = True

    def __post_init__(self) -> None:
        fractions("beta", (self.beta,), 1)
        not_negative("eps", self.eps, "added to the root of the second moment")

    def new_state(self, like: Tensor, kernels: bool) -> dict[str, Tensor]:
        """One second moment per element."""
        return {"second_moment": zeros(like)}

    def apply(self, matrices: Matrices, gradients: list[Stack]) -> list[Stack]:
        """``g / (√v̂ + ε)``."""
        moments = matrices.state("second_moment")
        torch._foreach_mul_(moments, self.beta)
        torch._foreach_addcmul_(moments, gradients, gradients, value=1 - self.beta)
        roots = torch._foreach_sqrt(moments)
        if self.bias_correction:
            torch._foreach_mul_(roots, (1 - self.beta**matrices.step) ** -0.5)
        torch._foreach_add_(roots, self.eps)
        return list(torch._foreach_div(gradients, roots))


class _FullMatrix:
    """A full matrix on one side: sums ``R ← keep R + take gᵀg``, and P made from R where a period begins."""

    side: Side
    period: int

    @property
    def decay(self) -> tuple[float, float]:
        """``(keep, take)`` of the sums."""
        return 1.0, 1.0

    @abstractmethod
    def invert(self, gram: Float[Tensor, "b n n"], step: int) -> Float[Tensor, "b n n"]:
        """P of finite sums R at a step."""

    def new_state(self, like: Tensor, kernels: bool) -> dict[str, Tensor]:
        """R and the P in use, per matrix, complete on every process."""
        count, rows, columns = stack_shape(like.shape, kernels)
        size = columns if self.side == "columns" else rows
        shape, dtype = (count, size, size), wide(like.dtype)
        return {name: torch.zeros(shape, dtype=dtype, device=like.device) for name in ("gram", "preconditioner")}

    def apply(self, matrices: Matrices, gradients: list[Stack]) -> list[Stack]:
        """``g P``, or ``P g`` for rows, after R has learned g."""
        complete = matrices.whole(gradients)
        (keep, take), sums = self.decay, matrices.entries("gram")
        for gradient, gram in zip(complete, sums, strict=True):
            rows = gradient if self.side == "rows" else gradient.mT
            gram.baddbmm_(rows, rows.mT, beta=keep, alpha=take)
        applied = matrices.entries("preconditioner")
        if (matrices.step - 1) % self.period == 0:
            grams, counts = together(sums)
            inverse = where_finite(grams, lambda finite: self.invert(finite, matrices.step))
            for preconditioner, new in zip(applied, inverse.split(counts), strict=True):
                preconditioner.copy_(new)
        pairs = zip(complete, applied, strict=True)
        return matrices.own_parts([p @ x if self.side == "rows" else x @ p for x, p in pairs])


@dataclass(frozen=True)
class Whitening(_FullMatrix):
    """A full matrix on one side: ``R ← β R + (1 - β) gᵀg``, ``P g = g (R̂ + δ I)^(-power)``.

    δ is ``damping`` times the mean eigenvalue of R̂, so that P scales with the gradient only. With ``power=0.5`` the
    size of ``P g`` does not depend on the size of g: where R̂ holds g alone, ``P g`` is the polar factor of g. With
    ``beta=None`` it is AdaGrad's full matrix (NL Eq. 111). ``power=1`` is a Newton-like step of size ``1 / ‖g‖``.

    Cost: 4 n operations per element at every step, and one eigendecomposition in float64 (about 10 n³) every `period`
    steps; n is the width, or the height for ``side="rows"``. State: ``2 n²`` numbers per matrix, on every process.

    Args:
        side: ``"columns"`` as above, or ``"rows"``: ``R`` of ``g gᵀ`` and ``(R̂ + δ I)^(-power) g``.
        beta: β with ``R̂ = R / (1 - β^t)``; None: ``R ← R + gᵀg``, never forgotten.
        power: 0.5 or 1.
        damping: of the mean eigenvalue.
        period: steps between two decompositions; the first is at the first step. R learns at every step.

    Raises:
        ValueError: a setting out of range.
    """

    side: Side = "columns"
    beta: float | None = 0.99
    power: float = 0.5
    damping: float = 1e-3
    period: int = 10

    def __post_init__(self) -> None:
        one_of("side", self.side, Side)
        if self.beta is not None:
            fractions("beta", (self.beta,), 1)
        if self.power not in (0.5, 1):
            raise ValueError(f"power is {self.power}; it must be 0.5 (inverse root) or 1 (inverse).")
        positive("damping", self.damping, "directions without gradients are divided by it")
        whole_number("period", self.period, "steps between two decompositions")

    @property
    def decay(self) -> tuple[float, float]:
        """``(β, 1 - β)``."""
        return (1.0, 1.0) if self.beta is None else (self.beta, 1 - self.beta)

    def invert(self, gram: Float[Tensor, "b n n"], step: int) -> Float[Tensor, "b n n"]:
        """``(R̂ + δ I)^(-power)``."""
        scale = 1.0 if self.beta is None else 1 - self.beta**step
        return inverse_power(gram / scale, self.power, self.damping)


@dataclass(frozen=True)
class LeastSquares(_FullMatrix):
    """Recursive least squares of the gradients: ``P g = g (I + Σ gᵀg / α)⁻¹`` (`ridge_projection`).

    It closes directions of earlier gradients and leaves all others as they are; `InputProjection` does the same with
    inputs. The eigenvalues of P are in (0, 1]. Cost and state are those of `Whitening`.

    Args:
        side: of the gradient, as in `Whitening`.
        alpha: α, the sum of squares at which a direction is half closed.
        period: steps between two decompositions; the first is at the first step.

    Raises:
        ValueError: a setting out of range.
    """

    side: Side = "columns"
    alpha: float = 1.0
    period: int = 10

    def __post_init__(self) -> None:
        one_of("side", self.side, Side)
        positive("alpha", self.alpha, "the sum of squares that half closes a direction")
        whole_number("period", self.period, "steps between two decompositions")

    def invert(self, gram: Float[Tensor, "b n n"], step: int) -> Float[Tensor, "b n n"]:
        """``(I + Σ gᵀg / α)⁻¹``."""
        return ridge_projection(gram, self.alpha)


def inverse_power(gram: Float[Tensor, "b n n"], power: float, damping: float) -> Float[Tensor, "b n n"]:
    """``(R + δ I)^(-power)`` of a finite R, with δ = `damping` times the mean eigenvalue of R; 0 where R is 0.

    Example:
        >>> inverse_power(torch.diag(torch.tensor([4.0, 0.0]))[None], 0.5, damping=0.5).diagonal(dim1=-2, dim2=-1)
        tensor([[0.4472, 1.0000]])
    """
    values, vectors = torch.linalg.eigh(gram.double())
    mean = values.mean(-1, keepdim=True)
    values = values.clamp(min=0.0) + damping * mean
    # Without any gradient so far P has nothing to divide by, and nothing to multiply.
    powers = torch.where(mean > 0, values.clamp(min=torch.finfo(torch.float64).tiny) ** -power, 0.0)
    return ((vectors * powers[:, None]) @ vectors.mT).to(gram.dtype)


def where_finite(gram: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the finite matrices; NaN for the others, whose parameters become NaN too."""
    finite = gram.isfinite().all((-2, -1), keepdim=True)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.where(finite, function(torch.where(finite, gram, identity)), torch.nan)
