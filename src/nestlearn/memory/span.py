"""The closed form of one span: many tokens of the recurrence at once, exactly.

A span is a run of tokens whose errors are taken at one anchor. With eta' the step of each token, the recurrence of
docs/equations.md unrolls into lower-triangular kernels ``D_a[t, s] = a_{s+1} ... a_t``:

    A = D_alpha,  Lambda = A D_beta                           (momentum off: Lambda = A)
    (I + diag(eta') [sh(A) * X X^T]) P = -diag(eta') (sh(A_t) * X W_0^T + sh(K_t) * X S_0^T + [sh(Lambda) * X X^T] G)
    y_t = A_t W_0 q_t + K_t S_0 q_t + sum_{s <= t} (x_s . q_t) (A[t,s] P_s + Lambda[t,s] G_s)

``sh`` shifts rows down by one (the weights a token erases from are those before it), ``G = -diag(eta') E``, P are the
delta rule's erasures (0 under decay). ``W_0, S_0`` are the weights and momentum that enter the span, or their
distance to the initial weights when retention pulls there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .clock import known_empty
from .kernels.fused import advanced, answered, erased
from .kernels.products import product, segment_products, solved_erasure


class Kernels(NamedTuple):
    """The scalar kernels of a span; all maps of a memory share them.

    Suffix ``_before`` marks the coefficients of the weights that a token erases from (delta retention only).
    """

    decay: Tensor  # [*b, c, c]  A
    entry: Tensor  # [*b, c]     coefficient of the entering weights
    impulse: Tensor | None  # [*b, c, c]  Lambda, None without momentum
    impulse_entry: Tensor | None  # [*b, c]  K
    momentum_exit: Tensor | None  # [*b, c]  products of beta from each token to the end of the span
    momentum_through: Tensor | None  # [*b]  product of beta over the span
    restart: Tensor | None  # [*b, c]  coefficient of the initial weights after a reset
    exit: Tensor  # [*b, c]  last row of A: what is left of each token's write at the end
    through: Tensor  # [*b]  what is left of the entering weights
    decay_before: Tensor | None = None
    entry_before: Tensor | None = None
    impulse_before: Tensor | None = None
    impulse_entry_before: Tensor | None = None
    restart_before: Tensor | None = None


def _shift(x: Tensor, dim: int, first: Tensor | None = None) -> Tensor:
    """Rows moved down by one; the first row becomes ``first`` (default 0)."""
    head = torch.zeros_like(x.narrow(dim, 0, 1)) if first is None else first
    return torch.cat([head, x.narrow(dim, 0, x.shape[dim] - 1)], dim)


def make_kernels(
    retain: Float[Tensor, "*b c"],
    beta: Float[Tensor, "*b c"] | None,
    valid: Tensor | None,
    reset: Tensor | None,
    *,
    delta: bool,
    gated: bool = False,
    restart: bool = False,
) -> Kernels:
    """Kernels of a span.

    ``retain`` and ``beta`` must be 1 where ``valid`` is False. ``restart``: a reset brings the initial weights back in
    (retention to zero); with retention to the initial weights it only clears, which zero gates do.
    """
    alpha = retain
    if reset is not None:
        alpha = torch.where(reset, 0, retain)
        beta = None if beta is None else torch.where(reset, 0, beta)
    decay = segment_products(alpha)
    entry = decay[..., 0] * alpha[..., :1]
    back = None
    if restart and reset is not None:
        back = (decay @ torch.where(reset, retain, 0).unsqueeze(-1)).squeeze(-1)
    impulse = impulse_entry = momentum_exit = momentum_through = None
    if beta is not None:
        carry = segment_products(beta)
        carry_entry = carry[..., 0] * beta[..., :1]
        momentum_exit, momentum_through = carry[..., -1, :], carry_entry[..., -1]
        if valid is not None:
            # An empty slot keeps the momentum but must not add it to the weights once more.
            carry, carry_entry = torch.where(valid.unsqueeze(-1), carry, 0), torch.where(valid, carry_entry, 0)
        impulse = product(decay, carry)
        impulse_entry = (decay @ carry_entry.unsqueeze(-1)).squeeze(-1)
    kernels = Kernels(
        decay,
        entry,
        impulse,
        impulse_entry,
        momentum_exit,
        momentum_through,
        back,
        decay[..., -1, :],
        entry[..., -1],
    )
    return _erasing(kernels, retain if gated else None, reset) if delta else kernels


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


class Entering(NamedTuple):
    """Weights of one map where a span begins: ``weights`` (or their distance to initial), momentum, and ``back``,
    the initial weights that a reset brings in."""

    weights: Tensor | None  # None: zero (a fresh span under retention to the initial weights)
    momentum: Tensor | None = None
    back: Tensor | None = None


class Writes(NamedTuple):
    """What a span writes into one map: ``sum_s (decay change_s + impulse kernel impulse_s) x_s^T``.

    Under decay the change is the raw error and ``gain = -eta'`` still to be applied (it costs less on the kernels);
    under delta retention it is P + G. With momentum the change is P and ``impulse`` is the error, to be scaled by gain.
    """

    inputs: Float[Tensor, "*b c in"]
    change: Float[Tensor, "*b c out"] | None
    impulse: Float[Tensor, "*b c out"] | None
    gain: Float[Tensor, "*b c"]
    lost: Bool[Tensor, "*b c"] | None = None  # tokens from which on the map is NaN: a write overflowed


def step_size(kind: str, lr: Tensor, retain: Tensor, x: Tensor) -> Float[Tensor, "*b c"]:
    """eta' of every token of one map with inputs x: ``raw``, ``proximal`` or ``normalized`` (see AssociativeMemory)."""
    if kind == "raw":
        return lr
    square = torch.linalg.vecdot(x, x)
    if kind == "proximal":
        return lr / (1 + lr * square)
    return torch.minimum(lr, 1 + retain) / (square + 1e-6)


class Erasure(NamedTuple):
    """What the delta rule needs of one map's inputs: ``solved = (I + diag(eta') [sh(A) * X X^T])^-1 diag(gain)``."""

    solved: Float[Tensor, "*b c c"]
    gain: Float[Tensor, "*b c"]  # -eta'


def erase(kernels: Kernels, x: Tensor, kind: str, lr: Tensor, retain: Tensor) -> Erasure:
    """The triangular system of one map with inputs ``x: [*b, c, in]``, solved for all right-hand sides."""
    assert kernels.decay_before is not None
    eta = step_size(kind, lr, retain, x)
    return Erasure(solved_erasure(x, kernels.decay_before, eta), -eta)


def write(kernels: Kernels, x: Tensor, error: Tensor, erasure: Erasure, start: Entering) -> Writes:
    """The writes of one map under delta retention; ``x: [*b, c, in]``, ``error: [*b, c, out]``."""
    solved, gain = erasure
    if _is_plain(kernels, start) and start.weights is not None and kernels.entry_before is not None:
        return Writes(x, erased(error, solved, x, start.weights, kernels.entry_before), None, gain)
    change = None if kernels.impulse is not None else error
    for coefficient, weights in _sources(kernels, start, before=True):
        held, scale = product(x, weights.mT), coefficient.unsqueeze(-1)
        change = scale * held if change is None else torch.addcmul(change, scale, held)
    change = None if change is None else product(solved, change)
    if kernels.impulse is None:
        return Writes(x, change, None, gain)
    assert kernels.impulse_before is not None
    pushed = product(solved, kernels.impulse_before * product(x, x.mT) * gain.unsqueeze(-2))
    return Writes(x, _add_product(change, pushed, error.mT), error, gain)


def write_kept(kernels: Kernels, x: Tensor, error: Tensor, lr: Tensor) -> Writes:
    """The writes of one map under decay, where nothing has to be solved: the errors themselves."""
    return Writes(x, None, error, -lr) if kernels.impulse is not None else Writes(x, error, None, -lr)


def contain(writes: Writes) -> Writes:
    """Take writes that overflowed out of the products, where 0 * inf would carry them into the past."""
    parts = [x.detach() for x in (writes.change, writes.impulse) if x is not None]
    # The sum is the cheapest look at all entries; where only it overflows, the next product would.
    broken = [~torch.isfinite(x.sum(-1)) for x in parts]
    lost = torch.stack(broken).any(0) if len(broken) > 1 else broken[0]
    if known_empty(lost):
        return writes
    lost = lost.expand_as(writes.gain).cummax(-1).values

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(lost.unsqueeze(-1), 0, x)

    return writes._replace(change=cut(writes.change), impulse=cut(writes.impulse), lost=lost)


def _is_plain(kernels: Kernels, start: Entering) -> bool:
    """Whether the span follows the delta rule without momentum and without a reset that brings weights back."""
    return kernels.decay_before is not None and kernels.impulse is None and start.back is None


def _sources(kernels: Kernels, start: Entering, *, before: bool) -> list[tuple[Tensor, Tensor]]:
    """Coefficients and weights of what enters the span: W_0, what a reset brings back, S_0."""
    entry = kernels.entry_before if before else kernels.entry
    restart = kernels.restart_before if before else kernels.restart
    pushed = kernels.impulse_entry_before if before else kernels.impulse_entry
    pairs = ((entry, start.weights), (restart, start.back), (pushed, start.momentum))
    return [(coefficient, w) for coefficient, w in pairs if coefficient is not None and w is not None]


def _add_product(total: Tensor | None, x: Tensor, weights: Tensor) -> Tensor:
    """``total + x W^T`` in one call where the shapes allow it."""
    if total is None:
        return product(x, weights.mT)
    if x.dim() == 3 and weights.dim() == 3 and total.dim() == 3:
        return torch.baddbmm(total, x, weights.mT)
    return total + product(x, weights.mT)


def read(kernels: Kernels, writes: Writes, start: Entering, q: Tensor, base: Tensor | None) -> Tensor:
    """``W_t q_t`` for every token of the span; ``base`` are the initial weights if entering weights are distances."""
    y = _read(kernels, writes, start, q, base)
    return y if writes.lost is None else torch.where(writes.lost.unsqueeze(-1), torch.nan, y)


def _read(kernels: Kernels, writes: Writes, start: Entering, q: Tensor, base: Tensor | None) -> Tensor:
    # Which way is taken must not depend on values: it would change the last bits of the other rows.
    if _is_plain(kernels, start) and writes.change is not None:
        return answered(q, base, start.weights, kernels.entry, writes.inputs, kernels.decay, writes.change)
    y = None if base is None else product(q, base.mT)
    for coefficient, weights in _sources(kernels, start, before=False):
        if y is not None and q.shape[-1] > y.shape[-1]:
            y = torch.addcmul(y, coefficient.unsqueeze(-1), product(q, weights.mT))
        else:
            y = _add_product(y, coefficient.unsqueeze(-1) * q, weights)
    scores = product(q, writes.inputs.mT)
    for kernel, change, scaled in _changes(kernels, writes):
        if change is not None:
            weighted = scores * (kernel * writes.gain.unsqueeze(-2) if scaled else kernel)
            y = _add_product(y, weighted, change.mT)
    assert y is not None
    return y


def _changes(kernels: Kernels, writes: Writes) -> list[tuple[Tensor, Tensor | None, bool]]:
    """(kernel, change, whether gain is still to be applied) of the two kinds of writes."""
    changes = [(kernels.decay, writes.change, kernels.decay_before is None)]
    if kernels.impulse is not None:
        changes.append((kernels.impulse, writes.impulse, True))
    return changes


def advance(kernels: Kernels, writes: Writes, start: Entering) -> tuple[Tensor, Tensor | None]:
    """Weights (or distances) and momentum after the span."""
    weights = _advance(kernels, writes, start)
    if writes.lost is not None:
        weights = torch.where(writes.lost[..., -1:, None], torch.nan, weights)
    if kernels.impulse is None or writes.impulse is None:
        return weights, None
    assert kernels.momentum_exit is not None and kernels.momentum_through is not None
    momentum = None if start.momentum is None else kernels.momentum_through[..., None, None] * start.momentum
    return weights, _add_outer(momentum, writes.impulse, kernels.momentum_exit * writes.gain, writes.inputs)


def _advance(kernels: Kernels, writes: Writes, start: Entering) -> Tensor:
    if _is_plain(kernels, start) and writes.change is not None:
        return advanced(start.weights, kernels.through, writes.change, kernels.exit, writes.inputs)
    weights = None
    for coefficient, entering in _sources(kernels, start, before=False):
        part = coefficient[..., -1, None, None] * entering
        weights = part if weights is None else weights + part
    for kernel, change, scaled in _changes(kernels, writes):
        if change is not None:
            last = kernel[..., -1, :]
            weights = _add_outer(weights, change, last * writes.gain if scaled else last, writes.inputs)
    assert weights is not None
    return weights


def _add_outer(total: Tensor | None, left: Tensor, coefficient: Tensor, right: Tensor) -> Tensor:
    """``total + sum_s coefficient_s left_s right_s^T``; the coefficient goes to the narrower side."""
    if left.shape[-1] <= right.shape[-1]:
        left = left * coefficient.unsqueeze(-1)
    else:
        right = right * coefficient.unsqueeze(-1)
    return _add_product(total, left.mT, right.mT)
