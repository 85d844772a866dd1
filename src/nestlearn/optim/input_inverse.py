"""Muon behind the inverse second moment of a map's inputs: the rule of `DGD` with ``precondition="inverse"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.optim.matrices import Matrices, take_step
from nestlearn.optim.orthogonal import average, coefficients, lr_factor, orthogonalize
from nestlearn.optim.preconditioners import inverse_power, where_finite

STEPS, COEFFICIENTS, ADJUST_LR = 5, coefficients("quintic"), "match_rms_adamw"
"""Newton-Schulz as Muon has it."""


def refresh(
    inverses: Sequence[Float[Tensor, "1 d d"]],
    rows: Float[Tensor, " b"],
    moments: Float[Tensor, "b d d"],
    damping: float,
) -> None:
    """``P ← (R + δ I)⁻¹`` in place, with δ = `damping` times the mean eigenvalue of R; P stays where there are no rows.

    Args:
        inverses: P of each map.
        rows: how many inputs each map has seen.
        moments: ``Σ x xᵀ`` over them, so that R is their mean.
        damping: of the mean eigenvalue.
    """
    means = moments / rows.clamp(min=1)[:, None, None]
    fresh = where_finite(means, lambda finite: inverse_power(finite, 1, damping))
    for inverse, new, count in zip(inverses, fresh, rows, strict=True):
        inverse.copy_(torch.where(count > 0, new, inverse))


def orthogonal_step(group: Mapping[str, Any], matrices: Matrices, transposed: Sequence[bool]) -> None:
    """``M ← β M + (1 - β) G P``, then a step along NS of ``β M + (1 - β) G P``.

    Args:
        group: the settings.
        matrices: with the states "inverse" and "momentum_buffer".
        transposed: of each matrix, whether it is [in, out]; then it is ``P G``.
    """
    given = zip(matrices.gradients, matrices.state("inverse"), transposed, strict=True)
    gradients = [p @ gradient if turned else gradient @ p for gradient, p, turned in given]
    momenta = average(matrices.state("momentum_buffer"), gradients, group["momentum"], nesterov=True)
    directions = orthogonalize(matrices, momenta, STEPS, COEFFICIENTS)
    updates = [direction.to(weight) for direction, weight in zip(directions, matrices.weights, strict=True)]
    take_step(matrices.weights, updates, group, lr_factor(ADJUST_LR, matrices.shape))
