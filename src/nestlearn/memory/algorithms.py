"""Algorithms: how the gradient of a token becomes a change of the weights.

An algorithm of your own is an instance of a subclass of `Algorithm` that defines `step`, and `steepness` if a layer is
to use it. It runs token by token; the three below have closed forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .kernels.newton_schulz import newton_schulz
from .kernels.products import limit_gradient

GRADIENT_LIMIT = 1e6
"""Largest norm of an outer gradient through one orthogonalization, and from span to span where it can be chaotic."""

_Matrix = Float[Tensor, "*b out in"]
Scalar = Float[Tensor, "*b 1 1"]


@runtime_checkable
class Algorithm(Protocol):
    """One step of an update rule, for one linear map. Subclass it and define `step`; the rest has defaults.

    ``has_momentum`` says whether every token needs ``Gates.momentum``. ``carries`` is the number of matrices that the
    algorithm carries from token to token; they start at zero. ``writes_at_close`` says whether `close` writes.
    """

    has_momentum: bool = False
    carries: int = 0
    writes_at_close: bool = False

    def step(
        self, carried: tuple[_Matrix, ...], gradient: _Matrix, eta: Scalar, beta: Scalar | None
    ) -> tuple[_Matrix, tuple[_Matrix, ...]]:
        """The change of the weights at one token, and what is carried on.

        Args:
            carried: ``carries`` matrices.
            gradient: of the objective with respect to the map.
            eta: the effective step size of the token.
            beta: its momentum gate (None without ``has_momentum``).
        """
        ...

    def close(self, carried: tuple[_Matrix, ...], pending: Scalar) -> _Matrix:
        """What is written when a chunk ends. ``pending`` are the chunk's step sizes, decayed and summed up."""
        raise TypeError(f"{type(self).__name__} has writes_at_close=True but does not define close()")


@runtime_checkable
class SteepAlgorithm(Protocol):
    """An algorithm that states its steepness, as the layers' bounds of the step size need it."""

    def steepness(self, beta: float) -> float:
        """How many times larger than under `Descent` the whole effect of one gradient can be.

        ``beta`` is the largest momentum gate.
        """
        ...


@dataclass(frozen=True)
class Descent(Algorithm):
    """``S_t = -eta'_t e_t x_t^T``: gradient descent, one step a token."""

    def step(
        self, carried: tuple[_Matrix, ...], gradient: _Matrix, eta: Scalar, beta: Scalar | None
    ) -> tuple[_Matrix, tuple[_Matrix, ...]]:
        return -eta * gradient, ()

    def steepness(self, beta: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Momentum(Algorithm):
    """``S_t = beta_t S_{t-1} - eta'_t e_t x_t^T``: past surprise carries on (Titans Eq. 10; NL Eq. 33)."""

    has_momentum = True
    carries = 1

    def step(
        self, carried: tuple[_Matrix, ...], gradient: _Matrix, eta: Scalar, beta: Scalar | None
    ) -> tuple[_Matrix, tuple[_Matrix, ...]]:
        assert beta is not None
        change = beta * carried[0] - eta * gradient
        return change, (change,)

    def steepness(self, beta: float) -> float:
        """The sum of a geometric series."""
        return 1 / (1 - beta)


@dataclass(frozen=True)
class OrthogonalizedMomentum(Algorithm):
    """Momentum whose Newton-Schulz orthogonalization is written when a chunk ends (NL Eq. 44, 52; Muon).

        S_t = beta_t S_{t-1} - e_t x_t^T                                     at every token
        W_t = alpha_t W_{t-1}                                                inside a chunk
        W_C = alpha_C W_{C-1} + (sum_s alpha_{s+1} ... alpha_C eta_s) NS(S_C)      at its last token C

    With chunks of one token, ``W_t = alpha_t W_{t-1} + eta_t NS(S_t)``. It needs `Decay` retention with one gate a
    token. The outer gradient that passes through an orthogonalization is scaled down to norm 1e6 where it is larger:
    near a minimum the step keeps its size while the momentum vanishes, and gradients through that mean nothing.

    Args:
        steps: Newton-Schulz iterations (`nestlearn.memory.newton_schulz`).

    Raises:
        ValueError: a number of steps below 1.
    """

    steps: int = 5
    has_momentum = True
    carries = 1
    writes_at_close = True

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"OrthogonalizedMomentum needs at least one Newton-Schulz step, got {self.steps!r}")

    def step(
        self, carried: tuple[_Matrix, ...], gradient: _Matrix, eta: Scalar, beta: Scalar | None
    ) -> tuple[_Matrix, tuple[_Matrix, ...]]:
        assert beta is not None
        return torch.zeros_like(gradient), (beta * carried[0] - gradient,)

    def orthogonalize(self, momentum: _Matrix) -> _Matrix:
        """``NS(S)``, with a bounded outer gradient."""
        return newton_schulz(limit_gradient(momentum, GRADIENT_LIMIT), self.steps)

    def close(self, carried: tuple[_Matrix, ...], pending: Scalar) -> _Matrix:
        return pending * self.orthogonalize(carried[0])

    def steepness(self, beta: float) -> float:
        """What is written has norm 1, whatever the gradient."""
        return 1 / (1 - beta)
