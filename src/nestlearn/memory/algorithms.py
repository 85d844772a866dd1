"""Algorithms: how the error of a token becomes a change of the weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Descent:
    """``S_t = -eta'_t e_t x_t^T``: gradient descent, one step a token."""


@dataclass(frozen=True)
class Momentum:
    """``S_t = beta_t S_{t-1} - eta'_t e_t x_t^T``: past surprise carries on (Titans Eq. 10; NL Eq. 33)."""


Algorithm = Descent | Momentum
