"""Retention (Miras section 3): how the weights of a memory are kept from one token to the next."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decay:
    """``W_t = alpha_t W_{t-1} + S_t``: every direction decays alike (Titans Eq. 13). ``alpha = 1`` keeps everything."""


@dataclass(frozen=True)
class Delta:
    """``W_t = W_{t-1} (alpha_t I - eta'_t x_t x_t^T) + S_t``: what the key holds is erased first (NL Eq. 57, 88).

    ``gated=True`` is Gated DeltaNet's form, alpha on both terms:
    ``W_t = alpha_t W_{t-1} (I - eta'_t x_t x_t^T) + S_t`` (arXiv 2412.06464).
    """

    gated: bool = False


Retention = Decay | Delta
