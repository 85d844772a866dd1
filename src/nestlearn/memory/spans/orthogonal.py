"""Spans of orthogonalized momentum: weights decay inside a chunk and are written when it ends.

With u the pending step sizes, ``u_t = alpha_t u_{t-1} + eta_t`` (0 at the start of a chunk), and c the last token of
the chunk:

    S_c = B_c S_0 - sum_s B[c, s] e_s x_s^T,     W_t = A_t W_0 + [t >= c] A[t, c] u_c NS(S_c)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..algorithms import OrthogonalizedMomentum
from ..kernels.products import segment_products
from ..types import Factor, Weights
from .base import Entering, Opened, Running, Update, decay_kernels


class _Coefficients(NamedTuple):
    """The scalars of a span; all maps of a memory share them."""

    entry: Float[Tensor, "b c"]  # of the entering weights
    restart: Float[Tensor, "b c"] | None  # of the initial weights, after a reset
    carry: Float[Tensor, "b c c"]  # products of beta between two tokens
    through: Float[Tensor, "b c"]  # products of beta from the start of the span
    pending: Float[Tensor, "b c"]  # u
    written: Float[Tensor, "b c"]  # of NS(S_c): A[t, c] u_c


def _coefficients(run: Running, update: Update) -> _Coefficients:
    """The scalars of a span from its gates."""
    gates, valid, reset = update.gates, update.valid, update.reset
    assert gates.momentum is not None and run.pending is not None
    kernels = decay_kernels(run, update._replace(gates=gates._replace(momentum=None)))
    beta = gates.momentum if reset is None else torch.where(reset, 0, gates.momentum)
    carry = segment_products(beta)
    through = carry[..., 0] * beta[..., :1]
    if valid is not None:
        carry = torch.where(valid.unsqueeze(-2), carry, 0)
    pending = kernels.entry * run.pending.unsqueeze(-1) + (kernels.decay @ gates.lr.unsqueeze(-1)).squeeze(-1)
    written = torch.zeros_like(pending)
    if update.closing is not None:
        written = (kernels.decay @ torch.where(update.closing, pending, 0).unsqueeze(-1)).squeeze(-1)
    return _Coefficients(kernels.entry, kernels.restart, carry, through, pending, written)


def momentum_at(
    row: Float[Tensor, "b c"], scalars: _Coefficients, factor: Factor, entered: Tensor | None
) -> Float[Tensor, "b out in"]:
    """The momentum after the token that ``row`` marks with 1 (a row of zeros gives 0)."""
    kernel = (row.unsqueeze(-2) @ scalars.carry).squeeze(-2)
    momentum = -factor.error.mT @ (kernel.unsqueeze(-1) * factor.input)
    return momentum if entered is None else momentum + (row * scalars.through).sum(-1)[..., None, None] * entered


def open_orthogonal(algorithm: OrthogonalizedMomentum, run: Running, update: Update) -> Opened:
    """A span of a memory with `OrthogonalizedMomentum`; at most one of its tokens is the last of a chunk."""
    scalars = _coefficients(run, update)
    starts = {name: run.entering(name, update.reset) for name in update.factors}
    matrices: Weights = {}
    if update.closing is not None:
        row = update.closing.to(scalars.carry.dtype).expand_as(scalars.through)
        for name, factor in update.factors.items():
            matrices[name] = algorithm.orthogonalize(momentum_at(row, scalars, factor, starts[name].momentum))

    def advance() -> Running:
        last = torch.zeros_like(scalars.through)
        last[..., -1] = 1
        weights: dict[str, Tensor | None] = {}
        momentum: Weights = {}
        for name, factor in update.factors.items():
            w = torch.zeros_like(run.initial[name])
            for coefficient, part in _sources(scalars, starts[name], matrices.get(name)):
                w = w + coefficient[..., -1, None, None] * part
            weights[name] = w
            momentum[name] = momentum_at(last, scalars, factor, starts[name].momentum)
        return run._replace(
            weights=weights, momentum=momentum, pending=scalars.pending[..., -1] - scalars.written[..., -1]
        )

    return Opened(lambda name, x: read_decayed(scalars, starts[name], matrices.get(name), x), advance)


def _sources(scalars: _Coefficients, start: Entering, matrix: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(coefficient ``[b, c]``, weights) of everything that a token reads besides the base."""
    pairs = ((scalars.entry, start.weights), (scalars.restart, start.back), (scalars.written, matrix))
    return [(c, w) for c, w in pairs if c is not None and w is not None]


def read_decayed(
    scalars: _Coefficients, start: Entering, matrix: Tensor | None, x: Float[Tensor, "b c in"]
) -> Float[Tensor, "b c out"]:
    """``W_t x_t`` for every token of the span."""
    parts = [] if start.base is None else [x @ start.base.mT]
    parts += [(c.unsqueeze(-1) * x) @ w.mT for c, w in _sources(scalars, start, matrix)]
    return torch.stack(parts).sum(0)
