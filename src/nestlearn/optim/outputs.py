"""Non-linear outputs of a momentum memory (NL Eq. 52)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nestlearn.memory.kernels.newton_schulz import Coefficients, printed_iteration
from nestlearn.optim.checks import one_of, whole_number
from nestlearn.optim.matrices import Matrices, Stack
from nestlearn.optim.orthogonal import AdjustLr, Named, check_orthogonal, coefficients, lr_factor, orthogonalize


@dataclass(frozen=True)
class NewtonSchulz:
    """Orthogonalizes the momentum by Muon's quintic, which makes it Muon.

    `OrthogonalDescent` is the iteration of NL Eq. 44.

    Args:
        ns_steps: iterations.
        ns_coefficients: ``"quintic"`` (Muon's), ``"polar_express"``, or triples (a, b, c), one per iteration.
        adjust_lr: how the step depends on the matrix's shape (`nestlearn.optim.orthogonal.lr_factor`).

    Raises:
        ValueError: a setting that cannot work.
    """

    ns_steps: int = 5
    ns_coefficients: Named | Sequence[Coefficients] = "quintic"
    adjust_lr: AdjustLr | None = "match_rms_adamw"

    def __post_init__(self) -> None:
        check_orthogonal(vars(self))

    def apply(self, matrices: Matrices, momenta: list[Stack]) -> list[Stack]:
        """``NS(m)``."""
        directions = orthogonalize(matrices, momenta, self.ns_steps, coefficients(self.ns_coefficients))
        return [direction.to(weight) for direction, weight in zip(directions, matrices.weights, strict=True)]

    def lr_factor(self, shape: Sequence[int]) -> float:
        """The factor of the learning rate for a matrix of this shape."""
        return lr_factor(self.adjust_lr, shape)


@dataclass(frozen=True)
class OrthogonalDescent:
    """Orthogonalizes the momentum by the iteration that NL Eq. 44 prints, begun at ``g = m / ‖m‖_F``.

        O_0 = g,     O ← O - ζ (O - g + 2 O (Oᵀ O - I))

    It is gradient descent on ``1/2 ‖O - g‖² + 1/2 ‖Oᵀ O - I‖²`` (NL Eq. 42-43). Each singular value s of g moves by
    itself to the root σ of ``2 σ³ - σ = s``. On the bare momentum these limits differ as the cube roots of s do. After
    the division by the norm every s is at most 1, so that all limits are in [0.71, 1]. Small ones are
    ``2 (1 + ζ)^n - 1`` times as large after n steps: 46 times after 12 of 0.3. `NewtonSchulz` multiplies by 3.4 a step
    and needs fewer.

    Args:
        steps: iterations.
        step_size: ζ, at most 0.4, where the largest singular value begins to swing.
        adjust_lr: how the step depends on the matrix's shape (`nestlearn.optim.orthogonal.lr_factor`).

    Raises:
        ValueError: a setting that cannot work.
    """

    steps: int = 12
    step_size: float = 0.3
    adjust_lr: AdjustLr | None = "match_rms_adamw"

    def __post_init__(self) -> None:
        whole_number("steps", self.steps, "iterations")
        if not 0 < self.step_size <= 0.4:
            raise ValueError(
                f"step_size is {self.step_size!r}; it must be above 0 and at most 0.4: larger steps swing."
            )
        one_of("adjust_lr", self.adjust_lr or "original", AdjustLr)

    def apply(self, matrices: Matrices, momenta: list[Stack]) -> list[Stack]:
        """The iteration on ``m / ‖m‖_F``."""
        complete = momenta if matrices.undivided else matrices.whole(momenta)
        results = []
        for m in complete:
            norm = torch.linalg.vector_norm(m, 2, (-2, -1), keepdim=True)
            g = m / norm.clamp(min=torch.finfo(m.dtype).tiny)
            wide = g.shape[-1] > g.shape[-2]  # the smaller product, of the same result
            result = printed_iteration(g.mT if wide else g, self.steps, self.step_size)
            results.append(result.mT if wide else result)
        return results if matrices.undivided else matrices.own_parts(results)

    def lr_factor(self, shape: Sequence[int]) -> float:
        """The factor of the learning rate for a matrix of this shape."""
        return lr_factor(self.adjust_lr, shape)


@dataclass(frozen=True)
class Sign:
    """The signs of the momentum: each element moves by the learning rate."""

    def apply(self, matrices: Matrices, momenta: list[Stack]) -> list[Stack]:
        """``sign(m)``."""
        # torch's sign of NaN is 0, which would hide the NaN: adding 0 m keeps it.
        return list(torch._foreach_add(torch._foreach_sign(momenta), torch._foreach_mul(momenta, 0.0)))

    def lr_factor(self, shape: Sequence[int]) -> float:
        """1."""
        return 1.0
