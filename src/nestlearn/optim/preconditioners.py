"""Preconditioners learned from gradients: memories that map a gradient to better coordinates (NL Eq. 38-41, 46-47)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.optim.matrices import Matrices, Stack, stack_shape, together, wide
from nestlearn.optim.matrix_optimizer import fractions, not_negative, zeros
from nestlearn.optim.projection import ridge_projection
from nestlearn.optim.wrapper import whole_number

Side = Literal["columns", "rows"]


class Preconditioner(Protocol):
    """P, which learns from the gradients that it is applied to."""

    def new_state(self, like: Tensor, kernels: bool) -> dict[str, Tensor]:
        """What it remembers of a parameter before its first step."""
        ...

    def apply(self, matrices: Matrices, gradients: list[Stack]) -> list[Stack]:
        """``P g``, after P has learned g."""
        ...


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


@dataclass(frozen=True)
class Whitening:
    """A full matrix on one side: ``R ← β R + (1 - β) gᵀg``, ``P g = g (R̂ + δ I)^(-power)``.

    δ is ``damping`` times the mean eigenvalue of R̂, so that P scales with the gradient only. With ``power=0.5`` the
    size of ``P g`` does not depend on the gradient's: it is the polar factor of g where R̂ is of g alone, AdaGrad's full
    matrix (NL Eq. 111) for ``beta=None``. ``power=1`` is a Newton-like step of size ``1 / ‖g‖``.

    Cost: 4 n operations per element at every step, and one eigendecomposition in float64 (about 10 n³) every `period`
    steps; n is the width, or the height for ``side="rows"``. State: ``2 n²`` numbers per matrix, whole on every process
    where parameters are distributed.

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
        _check_side(self.side)
        if self.beta is not None:
            fractions("beta", (self.beta,), 1)
        if self.power not in (0.5, 1):
            raise ValueError(f"power is {self.power}; it must be 0.5 (inverse root) or 1 (inverse).")
        if not self.damping > 0:
            raise ValueError(
                f"damping is {self.damping}; it must be positive: directions without gradients divide by it."
            )
        whole_number("period", self.period, "steps between two decompositions")

    def new_state(self, like: Tensor, kernels: bool) -> dict[str, Tensor]:
        """R and the P in use, per matrix."""
        return square_states(like, kernels, self.side)

    def apply(self, matrices: Matrices, gradients: list[Stack]) -> list[Stack]:
        """``g (R̂ + δ I)^(-power)``."""
        keep, take = (1.0, 1.0) if self.beta is None else (self.beta, 1 - self.beta)
        scale = 1.0 if self.beta is None else 1 - self.beta**matrices.step

        def inverse(gram: Float[Tensor, "b n n"]) -> Float[Tensor, "b n n"]:
            return inverse_power(gram / scale, self.power, self.damping)

        complete = matrices.whole(gradients)
        learn(matrices, complete, self.side, (keep, take), self.period, inverse)
        return matrices.own_parts(multiply(matrices, complete, self.side))


@dataclass(frozen=True)
class LeastSquares:
    """Recursive least squares of the gradients: ``P g = g (I + Σ gᵀg / α)⁻¹`` (`ridge_projection`).

    Directions that many gradients had are closed, those that none had are left as they are: what `InputProjection` does
    with inputs. Eigenvalues of P are in (0, 1]. Cost and state as of `Whitening`.

    Args:
        side: of the gradient, as of `Whitening`.
        alpha: α, the sum of squares at which a direction is half closed.
        period: steps between two decompositions; the first is at the first step.

    Raises:
        ValueError: a setting out of range.
    """

    side: Side = "columns"
    alpha: float = 1.0
    period: int = 10

    def __post_init__(self) -> None:
        _check_side(self.side)
        if not self.alpha > 0:
            raise ValueError(
                f"alpha is {self.alpha}; it must be positive: the sum of squares that half closes a direction."
            )
        whole_number("period", self.period, "steps between two decompositions")

    def new_state(self, like: Tensor, kernels: bool) -> dict[str, Tensor]:
        """``Σ gᵀg`` and the P in use, per matrix."""
        return square_states(like, kernels, self.side)

    def apply(self, matrices: Matrices, gradients: list[Stack]) -> list[Stack]:
        """``g (I + Σ gᵀg / α)⁻¹``."""
        complete = matrices.whole(gradients)
        learn(matrices, complete, self.side, (1.0, 1.0), self.period, lambda gram: where_finite(gram, self._project))
        return matrices.own_parts(multiply(matrices, complete, self.side))

    def _project(self, gram: Float[Tensor, "b n n"]) -> Float[Tensor, "b n n"]:
        return ridge_projection(gram, self.alpha)


def inverse_power(gram: Float[Tensor, "b n n"], power: float, damping: float) -> Float[Tensor, "b n n"]:
    """``(R + δ I)^(-power)`` with δ = `damping` times the mean eigenvalue of R; 0 where R is 0.

    Example:
        >>> inverse_power(torch.diag(torch.tensor([4.0, 0.0]))[None], 0.5, damping=0.5).diagonal(dim1=-2, dim2=-1)
        tensor([[0.4472, 1.0000]])
    """

    def power_of(finite: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(finite.double())
        mean = values.mean(-1, keepdim=True)
        values = values.clamp(min=0.0) + damping * mean
        # Without any gradient so far P has nothing to divide by, and nothing to multiply.
        powers = torch.where(mean > 0, values.clamp(min=torch.finfo(torch.float64).tiny) ** -power, 0.0)
        return ((vectors * powers[:, None]) @ vectors.mT).to(finite.dtype)

    return where_finite(gram, power_of)


def where_finite(gram: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the matrices that are finite; the others become nan, as the parameters do that they belong to."""
    finite = gram.isfinite().all((-2, -1), keepdim=True)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.where(finite, function(torch.where(finite, gram, identity)), torch.nan)


def _check_side(side: str) -> None:
    if side not in get_args(Side):
        raise ValueError(f"side is {side!r}; it must be one of {', '.join(get_args(Side))}.")


def square_states(like: Tensor, kernels: bool, side: Side) -> dict[str, Tensor]:
    """A sum of products and the P in use of each matrix of a parameter, complete on every process."""
    count, rows, columns = stack_shape(like.shape, kernels)
    size = columns if side == "columns" else rows
    shape, dtype = (count, size, size), wide(like.dtype)
    return {name: torch.zeros(shape, dtype=dtype, device=like.device) for name in ("gram", "preconditioner")}


def learn(
    matrices: Matrices,
    gradients: Sequence[Stack],
    side: Side,
    weights: tuple[float, float],
    period: int,
    invert: Callable[[Float[Tensor, "b n n"]], Float[Tensor, "b n n"]],
) -> None:
    """Adds complete gradients to their sums ``R ← keep R + take gᵀg``, and makes P anew where a period begins."""
    keep, take = weights
    sums = matrices.entries("gram")
    for gradient, gram in zip(gradients, sums, strict=True):
        rows = gradient if side == "rows" else gradient.mT
        gram.baddbmm_(rows, rows.mT, beta=keep, alpha=take)
    if (matrices.step - 1) % period == 0:
        grams, counts = together(sums)
        for preconditioner, new in zip(matrices.entries("preconditioner"), invert(grams).split(counts), strict=True):
            preconditioner.copy_(new)


def multiply(matrices: Matrices, stacks: Sequence[Stack], side: Side) -> list[Stack]:
    """``g P``, or ``P g`` for rows, of complete matrices."""
    pairs = zip(stacks, matrices.entries("preconditioner"), strict=True)
    return [p @ x if side == "rows" else x @ p for x, p in pairs]
