"""Spans of the delta rule: what a key holds is erased before it is written.

With the kernels of `base` and sh() a shift down by one row (a token erases from the weights before it):

    (I + diag(eta') [sh(A) * X X^T]) P = -diag(eta') (sh(A_t) * X W_0^T + sh(K_t) * X S_0^T + [sh(Lambda) * X X^T] G)

Oja's rule is the delta rule of ``W^T``, whose inputs are the values (the errors E) and whose errors are the keys.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..associative import AssociativeMemory
from ..kernels.fused import erased
from ..kernels.products import product, solved_erasure
from ..retention import Delta
from ..types import Gates
from .base import (
    Entering,
    Erasure,
    Kernels,
    Opened,
    Running,
    Update,
    Writes,
    add_product,
    is_erasing,
    make_kernels,
    open_scalar,
    sources,
)


def delta_kernels(
    retention: Delta, gates: Gates, valid: Tensor | None, reset: Tensor | None, *, restart: bool = False
) -> Kernels:
    """The kernels of a span from its gates, with the coefficients of the weights that each token erases from."""
    kernels = make_kernels(gates.retain, gates.momentum, valid, reset, restart=restart)
    return _erasing(kernels, gates.retain if retention.gated else None, reset)


def _shift(x: Tensor, dim: int, first: Tensor | None = None) -> Tensor:
    """Rows moved down by one; the first row becomes ``first`` (default 0)."""
    head = torch.zeros_like(x.narrow(dim, 0, 1)) if first is None else first
    return torch.cat([head, x.narrow(dim, 0, x.shape[dim] - 1)], dim)


def _erasing(kernels: Kernels, gate: Tensor | None, reset: Tensor | None) -> Kernels:
    """Add the ``_before`` coefficients: shifted by one token, cut at resets, times alpha for gated delta."""
    live = None if reset is None else ~reset

    def cut(x: Tensor) -> Tensor:
        extra = (1,) * (x.dim() - kernels.entry.dim())
        if live is not None:
            x = x * live.view(*live.shape, *extra)
        return x if gate is None else x * gate.view(*gate.shape, *extra)

    entry = kernels.entry
    restart = kernels.restart
    if restart is not None:
        restart = cut(_shift(restart, -1))
        assert reset is not None
        restart = restart + (reset if gate is None else reset * gate)
    return kernels._replace(
        decay_before=cut(_shift(kernels.decay, -2)),
        entry_before=cut(_shift(entry, -1, torch.ones_like(entry[..., :1]))),
        impulse_before=None if kernels.impulse is None else cut(_shift(kernels.impulse, -2)),
        impulse_entry_before=None if kernels.impulse_entry is None else cut(_shift(kernels.impulse_entry, -1)),
        restart_before=restart,
    )


def step_size(kind: str, lr: Tensor, retain: Tensor, x: Tensor) -> Float[Tensor, "*b c"]:
    """eta' of every token of one map with inputs x: ``raw``, ``proximal`` or ``normalized`` (see AssociativeMemory)."""
    if kind == "raw":
        return lr
    square = torch.linalg.vecdot(x, x)
    if kind == "proximal":
        return lr / (1 + lr * square)
    return torch.minimum(lr, 1 + retain) / (square + 1e-6)


def erase(kernels: Kernels, x: Tensor, kind: str, lr: Tensor, retain: Tensor) -> Erasure:
    """The triangular system of one map with inputs ``x: [*b, c, in]``, solved for all right-hand sides."""
    assert kernels.decay_before is not None
    eta = step_size(kind, lr, retain, x)
    return Erasure(solved_erasure(x, kernels.decay_before, eta), -eta)


def write_delta(kernels: Kernels, x: Tensor, error: Tensor, erasure: Erasure, start: Entering) -> Writes:
    """The writes of one map; ``x: [*b, c, in]``, ``error: [*b, c, out]``."""
    solved, gain = erasure
    if is_erasing(kernels, start) and start.weights is not None and kernels.entry_before is not None:
        return Writes(x, erased(error, solved, x, start.weights, kernels.entry_before), None, gain)
    change = None if kernels.impulse is not None else error
    for coefficient, weights in sources(kernels, start, before=True):
        held, scale = product(x, weights.mT), coefficient.unsqueeze(-1)
        change = scale * held if change is None else torch.addcmul(change, scale, held)
    change = None if change is None else product(solved, change)
    if kernels.impulse is None:
        return Writes(x, change, None, gain)
    assert kernels.impulse_before is not None
    pushed = product(solved, kernels.impulse_before * product(x, x.mT) * gain.unsqueeze(-2))
    return Writes(x, add_product(change, pushed, error), error, gain)


def open_delta(memory: AssociativeMemory, retention: Delta, run: Running, update: Update) -> Opened:
    """A span under `Delta`."""
    gates, erasures = update.gates, {}
    if update.prepared is not None:
        kernels, erasures = update.prepared
    else:
        kernels = delta_kernels(retention, gates, update.valid, update.reset, restart=run.base is None)

    def written(name: str, start: Entering) -> Writes:
        x, error = update.factors[name]
        erasure = erasures.get(name) or erase(kernels, x, memory.step_size_of(name), gates.lr, gates.retain)
        return write_delta(kernels, x, error, erasure, start)

    return open_scalar(run, update, kernels, written)


def open_oja(memory: AssociativeMemory, run: Running, update: Update) -> Opened:
    """A span under `Oja`: what the delta rule writes into ``W^T``, turned round."""
    gates = update.gates
    kernels = delta_kernels(Delta(), gates, update.valid, update.reset, restart=run.base is None)

    def written(name: str, start: Entering) -> Writes:
        k, error = update.factors[name]
        erasure = erase(kernels, error, memory.step_size_of(name), gates.lr, gates.retain)
        turned = Entering(*(None if w is None else w.mT for w in start))
        writes = write_delta(kernels, error, k, erasure, turned)
        assert writes.change is not None
        return Writes(writes.change, error, None, writes.gain)

    return open_scalar(run, update, kernels, written)
