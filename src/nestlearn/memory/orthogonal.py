"""Spans of orthogonalized momentum: weights decay inside a chunk and are written when it ends.

With u the pending step sizes, ``u_t = alpha_t u_{t-1} + eta_t`` (0 at the start of a chunk), and c the last token of
the chunk:

    S_c = B_c S_0 - sum_s B[c, s] e_s x_s^T,     W_t = A_t W_0 + [t >= c] A[t, c] u_c NS(S_c)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .algorithms import GRADIENT_LIMIT, OrthogonalizedMomentum
from .associative import AssociativeMemory
from .chunked import Tokens, entering
from .clock import known_empty
from .forms import Span, keep_empty
from .kernels.newton_schulz import newton_schulz
from .kernels.products import limit_gradient, segment_products
from .span import Entering, make_kernels
from .types import Factor, Running, Weights


class Coefficients(NamedTuple):
    """The scalars of a span; all maps of a memory share them."""

    entry: Float[Tensor, "b c"]  # of the entering weights
    restart: Float[Tensor, "b c"] | None  # of the initial weights, after a reset
    carry: Float[Tensor, "b c c"]  # products of beta between two tokens
    through: Float[Tensor, "b c"]  # products of beta from the start of the span
    pending: Float[Tensor, "b c"]  # u
    closing: Bool[Tensor, "b c"] | None  # the last token of the chunk
    written: Float[Tensor, "b c"]  # of NS(S_c): A[t, c] u_c


class Written(NamedTuple):
    """What the end of a chunk writes into one map; ``lost`` tokens see a momentum that is not finite (None: none)."""

    matrix: Float[Tensor, "b out in"]
    lost: Bool[Tensor, "b c"] | None


def coefficients(memory: AssociativeMemory, state: Running, tokens: Tokens, closing: Tensor | None) -> Coefficients:
    """The scalars of a span from its gates."""
    gates, valid, reset = tokens.gates, tokens.valid, tokens.reset
    assert gates.momentum is not None and state.pending is not None
    kernels = make_kernels(gates.retain, None, valid, reset, delta=False, restart=memory.retain_to == "zero")
    beta = gates.momentum if reset is None else torch.where(reset, 0, gates.momentum)
    carry = segment_products(beta)
    through = carry[..., 0] * beta[..., :1]
    if valid is not None:
        carry = torch.where(valid.unsqueeze(-2), carry, 0)
    pending = kernels.entry * state.pending.unsqueeze(-1) + (kernels.decay @ gates.lr.unsqueeze(-1)).squeeze(-1)
    written = torch.zeros_like(pending)
    if closing is not None:
        written = (kernels.decay @ torch.where(closing, pending, 0).unsqueeze(-1)).squeeze(-1)
    return Coefficients(kernels.entry, kernels.restart, carry, through, pending, closing, written)


def momentum_at(
    row: Float[Tensor, "b c"], scalars: Coefficients, factor: Factor, entered: Tensor | None
) -> Float[Tensor, "b out in"]:
    """The momentum after the token that ``row`` marks with 1 (a row of zeros gives 0)."""
    kernel = (row.unsqueeze(-2) @ scalars.carry).squeeze(-2)
    momentum = -factor.error.mT @ (kernel.unsqueeze(-1) * factor.input)
    return momentum if entered is None else momentum + (row * scalars.through).sum(-1)[..., None, None] * entered


def write_at_end(
    algorithm: OrthogonalizedMomentum, scalars: Coefficients, factor: Factor, entered: Tensor | None
) -> Written | None:
    """``NS(S_c)`` of one map; None if no chunk ends in the span."""
    if scalars.closing is None:
        return None
    momentum = momentum_at(scalars.closing.to(scalars.carry.dtype), scalars, factor, entered)
    broken, lost = ~torch.isfinite(momentum.detach().sum((-2, -1))), None
    if not known_empty(broken):
        # 0 * inf would carry an overflow to the tokens before the end of the chunk.
        momentum = torch.where(broken[..., None, None], 0, momentum)
        lost = broken.unsqueeze(-1) & scalars.closing.cummax(-1).values
    return Written(newton_schulz(limit_gradient(momentum, GRADIENT_LIMIT), algorithm.steps), lost)


def open_orthogonal(
    memory: AssociativeMemory,
    algorithm: OrthogonalizedMomentum,
    state: Running,
    factors: dict[str, Factor],
    tokens: Tokens,
    closing: Bool[Tensor, "b c"] | None,
) -> Span:
    """A span of a memory with `OrthogonalizedMomentum`; at most one of its tokens is ``closing``."""
    scalars = coefficients(memory, state, tokens, closing)
    starts = {name: entering(memory, state, name, tokens.reset) for name in factors}
    written = {name: write_at_end(algorithm, scalars, factors[name], starts[name].momentum) for name in factors}

    def base(name: str) -> Tensor | None:
        return state.initial[name] if memory.retain_to == "initial" else None

    def advance() -> Running:
        params: Weights = {}
        carried: Weights = {}
        last = torch.zeros_like(scalars.through)
        last[..., -1] = 1
        for name, factor in factors.items():
            w = end_weights(scalars, starts[name], written[name], base(name), state.params[name])
            s = momentum_at(last, scalars, factor, starts[name].momentum)
            params[name] = keep_empty(tokens.valid, w, state.params[name])
            carried[name] = keep_empty(tokens.valid, s, s if state.momentum is None else state.momentum[name])
        assert state.pending is not None
        rest = scalars.pending[..., -1] - scalars.written[..., -1]
        if tokens.valid is not None:
            rest = torch.where(tokens.valid.any(-1), rest, state.pending)
        return state._replace(params=params, momentum=carried, pending=rest)

    return Span(lambda name, x: read_decayed(scalars, starts[name], written[name], base(name), x), advance)


def sources(scalars: Coefficients, start: Entering, written: Written | None) -> list[tuple[Tensor, Tensor]]:
    """(coefficient ``[b, c]``, weights) of everything that a token reads, beside the base."""
    matrix = None if written is None else written.matrix
    pairs = ((scalars.entry, start.weights), (scalars.restart, start.back), (scalars.written, matrix))
    return [(c, w) for c, w in pairs if c is not None and w is not None]


def read_decayed(
    scalars: Coefficients, start: Entering, written: Written | None, base: Tensor | None, x: Float[Tensor, "b c in"]
) -> Float[Tensor, "b c out"]:
    """``W_t x_t`` for every token of the span."""
    parts = [] if base is None else [x @ base.mT]
    parts += [(c.unsqueeze(-1) * x) @ w.mT for c, w in sources(scalars, start, written)]
    y = torch.stack(parts).sum(0)
    return y if written is None or written.lost is None else torch.where(written.lost.unsqueeze(-1), torch.nan, y)


def end_weights(
    scalars: Coefficients, start: Entering, written: Written | None, base: Tensor | None, like: Tensor
) -> Float[Tensor, "b out in"]:
    """The weights after the span."""
    w = torch.zeros_like(like) if base is None else base
    for c, part in sources(scalars, start, written):
        w = w + c[..., -1, None, None] * part
    if written is None or written.lost is None:
        return w
    return torch.where(written.lost[..., -1, None, None], torch.nan, w)
