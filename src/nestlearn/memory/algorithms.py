"""Algorithms: how the error of a token becomes a change of the weights."""

from __future__ import annotations

from dataclasses import dataclass

GRADIENT_LIMIT = 1e6
"""Largest norm of the outer gradient that passes through one orthogonalization of `OrthogonalizedMomentum`."""


@dataclass(frozen=True)
class Descent:
    """``S_t = -eta'_t e_t x_t^T``: gradient descent, one step a token."""


@dataclass(frozen=True)
class Momentum:
    """``S_t = beta_t S_{t-1} - eta'_t e_t x_t^T``: past surprise carries on (Titans Eq. 10; NL Eq. 33)."""


@dataclass(frozen=True)
class OrthogonalizedMomentum:
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

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"OrthogonalizedMomentum needs at least one Newton-Schulz step, got {self.steps!r}")


Algorithm = Descent | Momentum | OrthogonalizedMomentum


def has_momentum(algorithm: Algorithm) -> bool:
    """Whether the algorithm keeps a momentum and needs its gate."""
    return not isinstance(algorithm, Descent)
