"""Objectives (attentional bias, Miras section 3): what a memory minimizes over its context.

Each objective has the written loss (`loss`, differentiated by the reference engine) and its hand-derived gradient
with respect to the memory's output (`error`, used by the chunked engine). Tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Objective(Protocol):
    """A per-token loss between the memory's output M(k) and the value v."""

    def loss(self, prediction: Float[Tensor, "*b d"], v: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """The written objective."""
        ...

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        """Its gradient with respect to M(k). ``predict()`` computes M(k); it is called only where it is needed."""
        ...


@dataclass(frozen=True)
class DotProduct:
    """``-<M(k), v>``, error ``-v``: Hebbian writing (linear attention; with delta retention, the delta rule)."""

    def loss(self, prediction: Tensor, v: Tensor) -> Tensor:
        return -(prediction * v).sum(-1)

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        return -v


@dataclass(frozen=True)
class L2:
    """``1/2 ||M(k) - v||^2``, error ``M(k) - v`` (Titans, TTT; the papers drop the 1/2)."""

    def loss(self, prediction: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (prediction - v).square().sum(-1)

    def error(self, predict: Callable[[], Tensor], v: Tensor) -> Tensor:
        return predict() - v
