"""Spans of proximal steps without delta retention: errors follow the weights within a chunk.

The vectors u that a span writes, ``S_t = beta_t S_{t-1} + u_t x_t^T``, depend on each other through the weights before
each token, ``alpha_t W_{t-1} + 2 beta_t S_{t-1}``. With the kernels of `base`, ``F = Lambda + D_beta`` (F = A without
momentum), ``B_t = beta_1 ... beta_t`` and d = e / c of `nestlearn.memory.proximal`:

    (I + diag(eta') [F * X X^T]_strict) U = -diag(eta') (D + A_t * X W_0^T + (K_t + B_t) * X S_0^T - X W_anchor^T)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..associative import AssociativeMemory
from ..kernels.products import product, segment_products
from ..retention import slope_at
from ..types import Gates
from .base import Entering, Kernels, Opened, Running, Update, Writes, make_kernels, open_scalar, sources
from .delta import erase


def open_proximal(memory: AssociativeMemory, run: Running, update: Update) -> Opened:
    """A span under `Decay`."""
    return open_scalar(run, update, *following(memory, run, update))


def following_kernels(gates: Gates, valid: Tensor | None, reset: Tensor | None, *, restart: bool = False) -> Kernels:
    """The kernels of a span from its gates; the ``_before`` coefficients are those of the weights before a token."""
    kernels = make_kernels(gates.retain, gates.momentum, valid, reset, restart=restart)
    before, pushed = kernels.decay, None
    if gates.momentum is not None and kernels.impulse is not None and kernels.impulse_entry is not None:
        beta = gates.momentum if reset is None else torch.where(reset, 0, gates.momentum)
        carry = segment_products(beta)
        before = kernels.impulse + carry
        pushed = kernels.impulse_entry + carry[..., 0] * beta[..., :1]
    return kernels._replace(
        decay_before=before.tril(-1),
        entry_before=kernels.entry,
        impulse_entry_before=pushed,
        restart_before=kernels.restart,
    )


def following(
    memory: AssociativeMemory, run: Running, update: Update
) -> tuple[Kernels, Callable[[str, Entering], Writes]]:
    """The kernels of a span, and a function of map and entering weights that gives the writes."""
    gates, reset = update.gates, update.reset
    if update.prepared is not None:
        kernels, erasures = update.prepared
    else:
        kernels, erasures = following_kernels(gates, update.valid, reset, restart=run.base is None), {}
    after = None if reset is None else reset.cummax(-1).values.unsqueeze(-1)

    def written(name: str, start: Entering) -> Writes:
        x, _ = update.factors[name]
        kind = memory.step_size_of(name)
        solved, _ = erasures.get(name) or erase(kernels, x, kind, gates.lr, gates.retain)
        change = wanted(memory, run, update, name, after)
        for coefficient, weights in sources(kernels, start, before=True):
            change = torch.addcmul(change, coefficient.unsqueeze(-1), product(x, weights.mT))
        change, ones = product(solved, change), torch.ones_like(gates.lr)
        return Writes(x, change, None, ones) if kernels.impulse is None else Writes(x, None, change, ones)

    return kernels, written


def wanted(memory: AssociativeMemory, run: Running, update: Update, name: str, after: Tensor | None) -> Tensor:
    """``e_t / c_t - (W_anchor - W_base) x_t`` of one map; ``after`` a reset the initial weights are the anchor."""
    x, error = update.factors[name]
    anchor, initial = run.anchor[name], run.initial[name]
    held = product(x, (anchor if run.base is None else anchor - run.base[name]).mT)
    slope = slope_at(memory.retention, anchor)
    if after is not None:
        held = torch.where(after, product(x, initial.mT) if run.base is None else 0, held)
        if isinstance(slope, Tensor):
            slope = torch.where(after, slope_at(memory.retention, initial), slope)
    return (error if isinstance(slope, float) and slope == 1 else error / slope) - held
