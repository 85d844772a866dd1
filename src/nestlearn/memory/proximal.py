"""Proximal steps on a quadratic model of the loss, for retentions without a delta rule.

Errors are taken at the anchor, the weights at the start of a chunk. Raw steps repeat such an error for every token of
the chunk, so that a key that comes twice is corrected twice. Here each map with input x has a model of the loss around
its output at the anchor, ``e . u + c/2 ||u||^2`` with ``u = (W - W_anchor) x``, and a token takes the proximal step of
that model:

    V_t = alpha_t W_{t-1},     eta' = eta / (1 + eta ||x_t||^2)
    W_t = V_t - eta' (e_t / c_t + (V_t - W_anchor) x_t) x_t^T

A chunk then moves no read by more than ``||e / c||``, whatever the step size. For `L2` on a matrix c is 1 and the model
exact: the error is that of the current weights. The curvature c bounds the true one as follows; N is the number of
maps, o the error of the memory's output and r its residual ``M(k) - v``:

    c = N s max(1, ||e||^2 / ||o||^2) max(1, ||o||^2 / (o . r))

- N: all maps move the output at once, so each makes one part of the correction. `DotProduct` has no residual that could
  be corrected twice: for it N and the last factor are 1.
- ``||e||^2 / ||o||^2``: how steeply the output follows this map, along the error (the Rayleigh quotient of ``J J^T``,
  as ``e = J^T o``).
- ``||o||^2 / (o . r)``: with an objective steeper than `L2`, a change of the output by ``-o / c`` ends where the
  residual is shortest along o. So no change by up to twice that makes the residual longer.
- s: the slope of a mirror map at the anchor. u is then the change of the accumulator.

With momentum the error is taken where the weights will be when it has run out, and the write passes through it:

    V_t = alpha_t W_{t-1} + 2 beta_t S_{t-1}
    S_t = beta_t S_{t-1} - eta' (...) x_t^T,     W_t = alpha_t W_{t-1} + S_t

For `L2` on a matrix no sequence of keys and gates then expands, if ``beta_t <= alpha_t / 2``. Let W be the distance to
the target and ``M = W + S``. Then ``M_t = V_t (I - 2 eta' x x^T)``, whose last factor is a contraction; V_t is a sum
of ``W_{t-1}`` and ``M_{t-1}`` with positive coefficients that add up to alpha_t; and
``W_t = (alpha_t W_{t-1} + M_t) / 2``. So neither norm passes the larger of both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .architectures import Architecture, Linear
from .objectives import L2, Objective
from .types import Factor

LOOK_AHEAD = 2.0
"""What momentum still writes, in units of ``beta_t S_{t-1}``, while its gates stay at one half."""
SMALL = 1e-6
"""Added to the squares that divide."""


class ModelObjective:
    """An objective whose error is divided by the part of the curvature that all maps share."""

    def __init__(self, objective: Objective, maps: int) -> None:
        self.objective, self.maps = objective, maps
        self.last: Tensor | None = None

    def loss(self, prediction: Tensor, v: Tensor) -> Tensor:
        return self.objective.loss(prediction, v)

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def predicted() -> Tensor:
            seen.append(predict())
            return seen[-1]

        error = self.objective.error(predicted, v)
        if seen and not isinstance(self.objective, L2):
            along = (error * (seen[-1] - v)).sum(-1, keepdim=True).clamp(min=0)
            error = error / steeper(square(error), along)
        self.last = error / self.maps if seen and self.maps > 1 else error
        return self.last


def square(x: Tensor) -> Tensor:
    """``||x||^2`` along the last dimension, which is kept."""
    return torch.linalg.vecdot(x, x).unsqueeze(-1)


def steeper(above: Tensor, below: Tensor) -> Tensor:
    """``max(1, above / below)`` of numbers that are not negative."""
    return (above / (below + SMALL)).clamp(min=1)


def model_factors(
    architecture: Architecture, linear: Linear, adjoint: Linear, k: Tensor, v: Tensor, objective: Objective
) -> dict[str, Factor]:
    """Input and ``e / c`` of every map, but for the slope of a mirror map."""
    shapes = architecture.shapes(k.shape[-1], v.shape[-1])
    model = ModelObjective(objective, len(shapes))
    factors = architecture.factors(linear, adjoint, k, v, model)
    output = model.last
    if output is None:
        return factors
    whole = square(output)
    # The map that makes the output has its error.
    return {
        n: f if f.error is output else Factor(f.input, f.error / steeper(square(f.error), whole))
        for n, f in factors.items()
    }
