"""Spans with one retention gate per channel: ``W_t = W_{t-1} Diag(alpha_t) + S_t`` or ``Diag(alpha_t) W_{t-1} + S_t``.

The kernels of `span` with one more dimension, the channel i:

    input side   y_t = (A_t * q_t) W_0^T + sum_s (sum_i q_ti A_i[t,s] x_si) G_s
    output side  y_t = A_t * (q_t W_0^T) + sum_s (x_s . q_t) (A[t,s] * G_s)

Products of gates, never ratios of products: gates of exactly 0 are legal. Their size limits the length of a span.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .associative import AssociativeMemory
from .chunked import Tokens, entering
from .forms import Span, keep_empty
from .span import Entering, Kernels, Writes, contain, make_kernels
from .types import Factor, Running, Weights


def channel_kernels(memory: AssociativeMemory, tokens: Tokens) -> Kernels:
    """Kernels whose first dimension after the row is the channel: ``decay: [b, d, c, c]``, ``entry: [b, d, c]``."""

    def every_channel(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unsqueeze(1)

    return make_kernels(
        tokens.gates.retain.mT,
        every_channel(tokens.gates.momentum),
        every_channel(tokens.valid),
        every_channel(tokens.reset),
        delta=False,
        restart=memory.retain_to == "zero",
    )


def open_channels(memory: AssociativeMemory, state: Running, factors: dict[str, Factor], tokens: Tokens) -> Span:
    """A span of a memory with `Decay` per channel."""
    kernels = channel_kernels(memory, tokens)
    momentum = kernels.impulse is not None
    starts: dict[str, Entering] = {}
    writes: dict[str, Writes] = {}
    for name, (x, error) in factors.items():
        starts[name] = entering(memory, state, name, tokens.reset)
        gain = -tokens.gates.lr
        change, impulse = (None, error) if momentum else (error, None)
        writes[name] = contain(Writes(x, change, impulse, gain))

    def read(name: str, x: Tensor) -> Tensor:
        y = read_channels(kernels, writes[name], starts[name], x, name == memory.architecture.query_map)
        lost = writes[name].lost
        y = y if lost is None else torch.where(lost.unsqueeze(-1), torch.nan, y)
        return y + x @ state.initial[name].mT if memory.retain_to == "initial" else y

    def advance() -> Running:
        params: Weights = {}
        carried: Weights = {}
        for name in writes:
            inner = name == memory.architecture.query_map
            w, s = advance_channels(kernels, writes[name], starts[name], inner)
            w = state.initial[name] + w if memory.retain_to == "initial" else w
            params[name] = keep_empty(tokens.valid, w, state.params[name])
            if s is not None and state.momentum is not None:
                carried[name] = keep_empty(tokens.valid, s, state.momentum[name])
        return state._replace(params=params, momentum=carried or None)

    return Span(read, advance)


def _sources(kernels: Kernels, start: Entering) -> list[tuple[Tensor, Tensor]]:
    """(coefficient ``[b, d, c]``, weights) of everything that enters the span."""
    pairs = ((kernels.entry, start.weights), (kernels.restart, start.back), (kernels.impulse_entry, start.momentum))
    return [(coefficient, w) for coefficient, w in pairs if coefficient is not None and w is not None]


def _written(kernels: Kernels, writes: Writes) -> tuple[Tensor, Tensor]:
    """The kernel ``[b, d, c, c]`` of a span's writes, and their errors."""
    kernel, error = (kernels.decay, writes.change) if kernels.impulse is None else (kernels.impulse, writes.impulse)
    assert error is not None
    return kernel, error


def read_channels(
    kernels: Kernels, writes: Writes, start: Entering, q: Float[Tensor, "b c in"], inner: bool
) -> Float[Tensor, "b c out"]:
    """``W_t q_t`` of every token; ``inner``: the gates scale input channels."""
    kernel, error = _written(kernels, writes)
    gain = writes.gain.unsqueeze(-2)
    if inner:
        scores = torch.einsum("bti,bits,bsi->bts", q, kernel, writes.inputs) * gain
        y = scores @ error
    else:
        scores = (q @ writes.inputs.mT) * gain
        y = torch.einsum("bts,bots,bso->bto", scores, kernel, error)
    for coefficient, weights in _sources(kernels, start):
        scale = coefficient.mT
        y = y + ((scale * q) @ weights.mT if inner else scale * (q @ weights.mT))
    return y


def advance_channels(
    kernels: Kernels, writes: Writes, start: Entering, inner: bool
) -> tuple[Float[Tensor, "b out in"], Float[Tensor, "b out in"] | None]:
    """Weights (or distances) and momentum after the span."""
    kernel, error = _written(kernels, writes)
    last = kernel[..., -1, :].mT
    scaled = writes.inputs * writes.gain.unsqueeze(-1)
    weights = error.mT @ (last * scaled) if inner else (last * error).mT @ scaled
    for coefficient, entered in _sources(kernels, start):
        end = coefficient[..., -1]
        weights = weights + (end.unsqueeze(-2) if inner else end.unsqueeze(-1)) * entered
    if writes.lost is not None:
        weights = torch.where(writes.lost[..., -1:, None], torch.nan, weights)
    if kernels.momentum_exit is None or kernels.momentum_through is None:
        return weights, None
    # The momentum has one gate a token: its kernels have a channel dimension of one.
    momentum = error.mT @ (kernels.momentum_exit.squeeze(1).unsqueeze(-1) * scaled)
    if start.momentum is not None:
        momentum = momentum + kernels.momentum_through.unsqueeze(-1) * start.momentum
    return weights, momentum
