"""The closed form of one span: many tokens of the recurrence at once, exactly.

A span is a run of tokens whose errors are taken at one anchor. With eta' the step of each token, the recurrence of
docs/equations.md unrolls into lower-triangular kernels ``D_a[t, s] = a_{s+1} ... a_t``:

    A = D_alpha,  Lambda = A D_beta                           (momentum off: Lambda = A)
    y_t = A_t W_0 q_t + K_t S_0 q_t + sum_{s <= t} (x_s . q_t) (A[t,s] P_s + Lambda[t,s] G_s)

with ``G = -diag(eta') E`` and P what the delta rule erases (`delta`; 0 under decay). ``W_0, S_0`` are the weights and
the momentum that enter the span. All weights are taken as their distance to what retention pulls toward, the ``base``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..kernels.fused import advanced, answered
from ..kernels.products import product, segment_products
from ..types import Factor, Gates, Weights


class Entering(NamedTuple):
    """One map where a span begins, ``[*b, out, in]``.

    Args:
        weights: distance to the base (None: zero, a fresh map).
        momentum: None without momentum.
        back: distance of the initial weights to the base, which a reset brings back (None: zero, or no reset).
        base: what retention pulls toward (None: zero).
    """

    weights: Tensor | None
    momentum: Tensor | None = None
    back: Tensor | None = None
    base: Tensor | None = None


class Running(NamedTuple):
    """A memory between two spans.

    Args:
        weights: distance of the weights (accumulators) to ``base``, ``{map: [*b, out, in]}`` (None: zero).
        momentum: what the algorithm carries along (None: nothing).
        anchor: the accumulators where errors are taken.
        initial: the accumulators that a reset brings back.
        base: what retention pulls toward (None: zero).
        pending: step sizes of the chunk, summed up to now (algorithms that write when a chunk ends).
    """

    weights: dict[str, Tensor | None]
    momentum: Weights | None
    anchor: Weights
    initial: Weights
    base: Weights | None
    pending: Float[Tensor, "*b"] | None = None

    def entering(self, name: str, reset: Tensor | None) -> Entering:
        """One map; ``reset``: of the span's tokens."""
        momentum = None if self.momentum is None else self.momentum[name]
        if self.base is not None:
            return Entering(self.weights[name], momentum, None, self.base[name])
        return Entering(self.weights[name], momentum, None if reset is None else self.initial[name])

    def params(self) -> Weights:
        """The weights (accumulators) themselves."""
        made: Weights = {}
        for name, w in self.weights.items():
            if self.base is None:
                made[name] = torch.zeros_like(self.initial[name]) if w is None else w
            else:
                made[name] = self.base[name] if w is None else self.base[name] + w
        return made


class Update(NamedTuple):
    """What the tokens of one span write.

    Args:
        factors: input and error of every map.
        gates: neutral in slots without a token.
        valid: slots that hold a token (None: all).
        reset: tokens that reset their row (None: none).
        closing: the last token of a chunk, where something happens then (None: nowhere).
        prepared: what gates and keys alone decide, if it is at hand.
    """

    factors: dict[str, Factor]
    gates: Gates
    valid: Bool[Tensor, "*b c"] | None = None
    reset: Bool[Tensor, "*b c"] | None = None
    closing: Bool[Tensor, "*b c"] | None = None
    prepared: Prepared | None = None


class Opened(NamedTuple):
    """A span whose writes are known.

    ``read(name, x)`` applies one map with the weights of each token; ``advance()`` gives the memory after the span.
    ``written(name)`` is p_t of every token, where a token's write is ``p_t x_t^T`` (None: writes are not of this form).
    """

    read: Callable[[str, Tensor], Tensor]
    advance: Callable[[], Running]
    written: Callable[[str], Float[Tensor, "*b c out"]] | None = None


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


class Erasure(NamedTuple):
    """What the delta rule needs of one map's inputs: ``solved = (I + diag(eta') [sh(A) * X X^T])^-1 diag(gain)``."""

    solved: Float[Tensor, "*b c c"]
    gain: Float[Tensor, "*b c"]  # -eta'


class Prepared(NamedTuple):
    """What a span needs that gates and keys alone decide; memories that share those share this too.

    ``erasures`` holds the map that sees the keys, and nothing without delta retention.
    """

    kernels: Kernels
    erasures: dict[str, Erasure]

    def map(self, change: Callable[[Tensor], Tensor]) -> Prepared:
        """``change`` applied to every tensor."""
        kernels = Kernels(*(None if x is None else change(x) for x in self.kernels))  # type: ignore[arg-type]
        return Prepared(kernels, {n: Erasure(*map(change, e)) for n, e in self.erasures.items()})


class Writes(NamedTuple):
    """What a span writes into one map: ``sum_s (decay change_s + impulse kernel impulse_s) x_s^T``.

    Under decay the change is the raw error and ``gain = -eta'`` still to be applied (it costs less on the kernels);
    under delta retention it is P + G. With momentum the change is P and ``impulse`` is the error, to be scaled by gain.
    """

    inputs: Float[Tensor, "*b c in"]
    change: Float[Tensor, "*b c out"] | None
    impulse: Float[Tensor, "*b c out"] | None
    gain: Float[Tensor, "*b c"]


def make_kernels(
    retain: Float[Tensor, "*b c"],
    beta: Float[Tensor, "*b c"] | None,
    valid: Tensor | None,
    reset: Tensor | None,
    *,
    restart: bool = False,
) -> Kernels:
    """Kernels of a span.

    ``retain`` and ``beta`` must be 1 where ``valid`` is False. ``restart``: a reset brings weights back in; otherwise
    it only clears, as a gate of zero does.
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
    return Kernels(
        decay, entry, impulse, impulse_entry, momentum_exit, momentum_through, back, decay[..., -1, :], entry[..., -1]
    )


def write_kept(kernels: Kernels, x: Tensor, error: Tensor, lr: Tensor) -> Writes:
    """The writes of one map under decay, where nothing has to be solved: the errors themselves."""
    return Writes(x, None, error, -lr) if kernels.impulse is not None else Writes(x, error, None, -lr)


def open_scalar(run: Running, update: Update, kernels: Kernels, write: Callable[[str, Entering], Writes]) -> Opened:
    """A span of scalar kernels; ``write(name, start)`` gives the writes of one map."""
    starts = {name: run.entering(name, update.reset) for name in update.factors}
    writes = {name: write(name, start) for name, start in starts.items()}

    def advance() -> Running:
        ends = {name: advance_map(kernels, writes[name], starts[name]) for name in writes}
        momentum = {name: s for name, (_, s) in ends.items() if s is not None}
        return run._replace(weights={name: w for name, (w, _) in ends.items()}, momentum=momentum or None)

    def written(name: str) -> Tensor:
        change = writes[name].change
        assert change is not None
        return change

    # Only under delta retention without momentum is the change all that a token writes, at its full size.
    single = kernels.decay_before is not None and kernels.impulse is None
    return Opened(
        lambda name, q: read_map(kernels, writes[name], starts[name], q), advance, written if single else None
    )


def open_decay(run: Running, update: Update) -> Opened:
    """A span under `Decay`."""
    kernels = update.prepared.kernels if update.prepared else decay_kernels(run, update)
    lr = update.gates.lr
    return open_scalar(run, update, kernels, lambda name, _: write_kept(kernels, *update.factors[name], lr))


def decay_kernels(run: Running, update: Update) -> Kernels:
    """The kernels of a span from its gates."""
    gates = update.gates
    return make_kernels(gates.retain, gates.momentum, update.valid, update.reset, restart=run.base is None)


def is_erasing(kernels: Kernels, start: Entering) -> bool:
    """Whether the span follows the delta rule without momentum and without a reset that brings weights back."""
    return kernels.decay_before is not None and kernels.impulse is None and start.back is None


def sources(kernels: Kernels, start: Entering, *, before: bool) -> list[tuple[Tensor, Tensor]]:
    """Coefficients and weights of what enters the span: W_0, what a reset brings back, S_0."""
    entry = kernels.entry_before if before else kernels.entry
    restart = kernels.restart_before if before else kernels.restart
    pushed = kernels.impulse_entry_before if before else kernels.impulse_entry
    pairs = ((entry, start.weights), (restart, start.back), (pushed, start.momentum))
    return [(coefficient, w) for coefficient, w in pairs if coefficient is not None and w is not None]


def add_product(total: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """``total + x y`` in one call where the shapes allow it."""
    if total is None:
        return product(x, y)
    if x.dim() == 3 and y.dim() == 3 and total.dim() == 3:
        return torch.baddbmm(total, x, y)
    return total + product(x, y)


def read_map(kernels: Kernels, writes: Writes, start: Entering, q: Tensor) -> Tensor:
    """``W_t q_t`` for every token of the span."""
    base = start.base
    # Which way is taken must not depend on values: it would change the last bits of the other rows.
    if is_erasing(kernels, start) and writes.change is not None:
        return answered(q, base, start.weights, kernels.entry, writes.inputs, kernels.decay, writes.change)
    y = None if base is None else product(q, base.mT)
    for coefficient, weights in sources(kernels, start, before=False):
        if y is not None and q.shape[-1] > y.shape[-1]:
            y = torch.addcmul(y, coefficient.unsqueeze(-1), product(q, weights.mT))
        else:
            y = add_product(y, coefficient.unsqueeze(-1) * q, weights.mT)
    scores = product(q, writes.inputs.mT)
    for kernel, change, scaled in _changes(kernels, writes):
        if change is not None:
            weighted = scores * (kernel * writes.gain.unsqueeze(-2) if scaled else kernel)
            y = add_product(y, weighted, change)
    assert y is not None
    return y


def _changes(kernels: Kernels, writes: Writes) -> list[tuple[Tensor, Tensor | None, bool]]:
    """(kernel, change, whether gain is still to be applied) of the two kinds of writes."""
    changes = [(kernels.decay, writes.change, kernels.decay_before is None)]
    if kernels.impulse is not None:
        changes.append((kernels.impulse, writes.impulse, True))
    return changes


def advance_map(kernels: Kernels, writes: Writes, start: Entering) -> tuple[Tensor, Tensor | None]:
    """Weights (their distance to the base) and momentum after the span."""
    weights = _advance(kernels, writes, start)
    if kernels.impulse is None or writes.impulse is None:
        return weights, None
    assert kernels.momentum_exit is not None and kernels.momentum_through is not None
    momentum = None if start.momentum is None else kernels.momentum_through[..., None, None] * start.momentum
    return weights, _add_outer(momentum, writes.impulse, kernels.momentum_exit * writes.gain, writes.inputs)


def _advance(kernels: Kernels, writes: Writes, start: Entering) -> Tensor:
    if is_erasing(kernels, start) and writes.change is not None:
        return advanced(start.weights, kernels.through, writes.change, kernels.exit, writes.inputs)
    weights = None
    for coefficient, entering in sources(kernels, start, before=False):
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
    return add_product(total, left.mT, right)
