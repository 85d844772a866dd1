"""Spans with one retention gate per channel: ``W_t = W_{t-1} Diag(alpha_t) + S_t`` or ``Diag(alpha_t) W_{t-1} + S_t``.

The kernels of `base` with one more dimension, the channel i:

    input side   y_t = (A_t * q_t) W_0^T + sum_s (sum_i q_ti A_i[t,s] x_si) G_s
    output side  y_t = A_t * (q_t W_0^T) + sum_s (x_s . q_t) (A[t,s] * G_s)

Products of gates, never ratios of products: gates of exactly 0 are legal. Their size limits the length of a span.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .base import Entering, Kernels, Opened, Running, Update, Writes, make_kernels, sources, write_kept


def channel_kernels(run: Running, update: Update) -> Kernels:
    """Kernels whose first dimension after the row is the channel: ``decay: [b, d, c, c]``, ``entry: [b, d, c]``."""

    def every_channel(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unsqueeze(1)

    flags = every_channel(update.valid), every_channel(update.reset)
    retain, beta = update.gates.retain.mT, every_channel(update.gates.momentum)
    return make_kernels(retain, beta, *flags, restart=run.base is None)


def open_channels(query_map: str, run: Running, update: Update) -> Opened:
    """A span of a memory with `Decay` per channel; the gates scale the input channels of ``query_map``."""
    kernels = channel_kernels(run, update)
    starts = {name: run.entering(name, update.reset) for name in update.factors}
    writes = {name: write_kept(kernels, *factor, update.gates.lr) for name, factor in update.factors.items()}

    def advance() -> Running:
        ends = {n: advance_channels(kernels, writes[n], starts[n], n == query_map) for n in writes}
        momentum = {name: s for name, (_, s) in ends.items() if s is not None}
        return run._replace(weights={name: w for name, (w, _) in ends.items()}, momentum=momentum or None)

    return Opened(lambda name, x: read_channels(kernels, writes[name], starts[name], x, name == query_map), advance)


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
    # Entering weights have one coefficient per channel: [b, d, c].
    for coefficient, weights in sources(kernels, start, before=False):
        scale = coefficient.mT
        y = y + ((scale * q) @ weights.mT if inner else scale * (q @ weights.mT))
    return y if start.base is None else y + q @ start.base.mT


def advance_channels(
    kernels: Kernels, writes: Writes, start: Entering, inner: bool
) -> tuple[Float[Tensor, "b out in"], Float[Tensor, "b out in"] | None]:
    """Weights (their distance to the base) and momentum after the span."""
    kernel, error = _written(kernels, writes)
    last = kernel[..., -1, :].mT
    scaled = writes.inputs * writes.gain.unsqueeze(-1)
    weights = error.mT @ (last * scaled) if inner else (last * error).mT @ scaled
    for coefficient, entered in sources(kernels, start, before=False):
        end = coefficient[..., -1]
        weights = weights + (end.unsqueeze(-2) if inner else end.unsqueeze(-1)) * entered
    if kernels.momentum_exit is None or kernels.momentum_through is None:
        return weights, None
    # The momentum has one gate a token: its kernels have a channel dimension of one.
    momentum = error.mT @ (kernels.momentum_exit.squeeze(1).unsqueeze(-1) * scaled)
    if start.momentum is not None:
        momentum = momentum + kernels.momentum_through.unsqueeze(-1) * start.momentum
    return weights, momentum
