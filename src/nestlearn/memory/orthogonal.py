"""Spans of orthogonalized momentum: weights decay inside a chunk and are written when it ends.

With u the pending step sizes, ``u_t = alpha_t u_{t-1} + eta_t`` (0 at the start of a chunk), and c the last token of
the chunk:

    S_c = B_c S_0 - sum_s B[c, s] e_s x_s^T,     W_t = A_t W_0 + [t >= c] A[t, c] u_c NS(S_c)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .algorithms import OrthogonalizedMomentum
from .associative import AssociativeMemory
from .chunked import Tokens, entering
from .forms import Span, keep_empty
from .functions import segment_products
from .layout import nobody
from .newton_schulz import newton_schulz
from .span import Kernels, make_kernels
from .types import PENDING, Factor, State, Weights


def open_orthogonal(
    memory: AssociativeMemory,
    algorithm: OrthogonalizedMomentum,
    state: State,
    factors: dict[str, Factor],
    tokens: Tokens,
    closing: Bool[Tensor, "b c"] | None,
) -> Span:
    """A span of a memory with `OrthogonalizedMomentum`; at most one of its tokens is ``closing``."""
    gates = tokens.gates
    assert gates.momentum is not None and state.momentum is not None
    kernels = make_kernels(
        gates.retain, None, tokens.valid, tokens.reset, delta=False, restart=memory.retain_to == "zero"
    )
    beta = gates.momentum if tokens.reset is None else torch.where(tokens.reset, 0, gates.momentum)
    carry = segment_products(beta)
    through = carry[..., 0] * beta[..., :1]
    if tokens.valid is not None:
        carry = torch.where(tokens.valid.unsqueeze(-2), carry, 0)
    pending = kernels.entry * state.extra[PENDING].unsqueeze(-1) + (kernels.decay @ gates.lr.unsqueeze(-1)).squeeze(-1)
    starts = {name: entering(memory, state, name, tokens.reset) for name in factors}
    written: Weights = {}
    lost: dict[str, Bool[Tensor, "b c"]] = {}
    coefficient = torch.zeros_like(pending)
    if closing is not None:
        coefficient = (kernels.decay @ torch.where(closing, pending, 0).unsqueeze(-1)).squeeze(-1)
        for name in factors:
            at_end = momentum_at(closing.to(carry.dtype), carry, through, factors[name], state.momentum[name])
            broken = ~torch.isfinite(at_end.detach().sum((-2, -1)))
            if not nobody(broken):
                at_end = torch.where(broken[..., None, None], 0, at_end)
                lost[name] = broken.unsqueeze(-1) & closing.cummax(-1).values
            written[name] = newton_schulz(at_end, algorithm.steps)

    def read(name: str, x: Tensor) -> Tensor:
        y = _decayed(kernels, starts[name].weights, starts[name].back, x)
        if memory.retain_to == "initial":
            y = y + x @ state.initial[name].mT
        if name in written:
            y = y + (coefficient.unsqueeze(-1) * x) @ written[name].mT
        return torch.where(lost[name].unsqueeze(-1), torch.nan, y) if name in lost else y

    def advance() -> State:
        params: Weights = {}
        carried: Weights = {}
        last = torch.zeros_like(through)
        last[..., -1] = 1
        for name, start in starts.items():
            w = torch.zeros_like(state.params[name])
            for part, weights in ((kernels.entry, start.weights), (kernels.restart, start.back)):
                if part is not None and weights is not None:
                    w = w + part[..., -1, None, None] * weights
            w = w + state.initial[name] if memory.retain_to == "initial" else w
            if name in written:
                w = w + coefficient[..., -1, None, None] * written[name]
            if name in lost:
                w = torch.where(lost[name][..., -1, None, None], torch.nan, w)
            s = momentum_at(last, carry, through, factors[name], start.momentum)
            params[name] = keep_empty(tokens.valid, w, state.params[name])
            carried[name] = keep_empty(tokens.valid, s, start.momentum)
        rest = pending[..., -1] - coefficient[..., -1]
        if tokens.valid is not None:
            rest = torch.where(tokens.valid[..., 0], rest, state.extra[PENDING])
        return state._replace(params=params, momentum=carried, extra={PENDING: rest})

    return Span(read, advance)


def momentum_at(
    row: Float[Tensor, "b c"], carry: Tensor, through: Tensor, factor: Factor, entered: Tensor | None
) -> Float[Tensor, "b out in"]:
    """The momentum after the token that ``row`` marks with 1 (a row of zeros gives 0)."""
    kernel = (row.unsqueeze(-2) @ carry).squeeze(-2)
    momentum = -factor.error.mT @ (kernel.unsqueeze(-1) * factor.input)
    return momentum if entered is None else momentum + (row * through).sum(-1)[..., None, None] * entered


def _decayed(kernels: Kernels, weights: Tensor | None, back: Tensor | None, x: Tensor) -> Tensor:
    """What is left of the entering weights (and of the initial ones, after a reset), applied to every token."""
    y = 0
    for coefficient, w in ((kernels.entry, weights), (kernels.restart, back)):
        if coefficient is not None and w is not None:
            y = y + (coefficient.unsqueeze(-1) * x) @ w.mT
    return y  # type: ignore[return-value]
