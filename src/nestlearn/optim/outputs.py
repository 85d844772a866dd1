"""Non-linear outputs of a momentum memory (NL Eq. 52)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nestlearn.memory.kernels.newton_schulz import Coefficients
from nestlearn.optim.matrices import Matrices, Stack
from nestlearn.optim.orthogonal import AdjustLr, Named, check_orthogonal, coefficients, lr_factor, orthogonalize


@dataclass(frozen=True)
class NewtonSchulz:
    """Orthogonalizes the momentum, which makes it Muon: by Muon's quintic, not by the iteration of NL Eq. 44.

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
class Sign:
    """The signs of the momentum: each element moves by the learning rate."""

    def apply(self, matrices: Matrices, momenta: list[Stack]) -> list[Stack]:
        """``sign(m)``."""
        # torch's sign of NaN is 0, which would hide the NaN: adding 0 m keeps it.
        return list(torch._foreach_add(torch._foreach_sign(momenta), torch._foreach_mul(momenta, 0.0)))

    def lr_factor(self, shape: Sequence[int]) -> float:
        """1."""
        return 1.0
