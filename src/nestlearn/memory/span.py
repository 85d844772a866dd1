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

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


class SegmentProducts(torch.autograd.Function):
    """``D[t, s] = a_{s+1} ... a_t`` for s <= t, else 0. Products, not exponentials of log differences: ``a = 0`` is legal.

    Gradient: ``d a_u = sum_{s < u <= t} g[t, s] D[t, u] D[u-1, s]``, exact at zeros as well.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        c = a.shape[-1]
        strict = torch.ones(c, c, dtype=torch.bool, device=a.device).tril(-1)
        factors = torch.where(strict, a.unsqueeze(-1), 1)
        products = torch.cumprod(factors, -2).tril()
        ctx.save_for_backward(products)
        return products

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (products,) = ctx.saved_tensors
        through = products.mT @ grad.tril()
        inner = (through[..., 1:, :] * products[..., :-1, :]).tril().sum(-1)
        return F.pad(inner, (1, 0))


def segment_products(a: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c c"]:
    """Lower-triangular products ``D[t, s] = a_{s+1} ... a_t`` with ones on the diagonal."""
    return SegmentProducts.apply(a)  # type: ignore[return-value]


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
        impulse = decay @ carry
        impulse_entry = (decay @ carry_entry.unsqueeze(-1)).squeeze(-1)
    kernels = Kernels(decay, entry, impulse, impulse_entry, momentum_exit, momentum_through, back)
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
    """What a span writes into one map. Without momentum ``change`` is P + G; with it P, and ``impulse`` is G."""

    inputs: Float[Tensor, "*b c in"]
    change: Float[Tensor, "*b c out"] | None
    impulse: Float[Tensor, "*b c out"] | None


def step_size(kind: str, lr: Tensor, retain: Tensor, x: Tensor) -> Float[Tensor, "*b c"]:
    """eta' of every token of one map with inputs x: ``raw``, ``proximal`` or ``normalized`` (see AssociativeMemory)."""
    if kind == "raw":
        return lr
    square = torch.linalg.vecdot(x, x)
    if kind == "proximal":
        return lr / (1 + lr * square)
    return torch.minimum(lr, 1 + retain) / (square + 1e-6)


def _entering_product(x: Tensor, entry: Tensor, back: Tensor | None, start: Entering) -> Tensor | None:
    """``entry_t W_0 x_t`` (and the initial weights' part after a reset)."""
    product = None if start.weights is None else entry.unsqueeze(-1) * (x @ start.weights.mT)
    if back is not None and start.back is not None:
        returned = back.unsqueeze(-1) * (x @ start.back.mT)
        product = returned if product is None else product + returned
    return product


def write(kernels: Kernels, x: Tensor, error: Tensor, eta: Tensor, start: Entering) -> Writes:
    """Solve for the writes of one map; ``x: [*b, c, in]``, ``error: [*b, c, out]``, ``eta: [*b, c]`` (eta')."""
    gradient = -eta.unsqueeze(-1) * error
    momentum = kernels.impulse is not None
    if kernels.decay_before is None:
        return Writes(x, None, gradient) if momentum else Writes(x, gradient, None)
    gram = (x @ x.mT).tril(-1)
    erased = _entering_product(x, kernels.entry_before, kernels.restart_before, start)  # type: ignore[arg-type]
    system = eta.unsqueeze(-1) * (kernels.decay_before * gram)
    if not momentum:
        right = gradient if erased is None else torch.addcmul(gradient, eta.unsqueeze(-1), erased, value=-1)
        return Writes(x, _solve(system, right), None)
    assert kernels.impulse_before is not None and kernels.impulse_entry_before is not None
    pushed = (kernels.impulse_before * gram) @ gradient
    erased = pushed if erased is None else erased + pushed
    if start.momentum is not None:
        erased = erased + kernels.impulse_entry_before.unsqueeze(-1) * (x @ start.momentum.mT)
    return Writes(x, _solve(system, -eta.unsqueeze(-1) * erased), gradient)


def _solve(strict: Tensor, right: Tensor) -> Tensor:
    """``(I + strict)^-1 right``."""
    return torch.linalg.solve_triangular(strict, right, upper=False, unitriangular=True)


def read(kernels: Kernels, writes: Writes, start: Entering, q: Tensor, base: Tensor | None) -> Tensor:
    """``W_t q_t`` for every token of the span; ``base`` are the initial weights if entering weights are distances."""
    scores = (q @ writes.inputs.mT).tril()
    y = None if base is None else q @ base.mT
    entering = _entering_product(q, kernels.entry, kernels.restart, start)
    if entering is not None:
        y = entering if y is None else y + entering
    if kernels.impulse is not None and writes.impulse is not None:
        assert kernels.impulse_entry is not None
        pushed = (scores * kernels.impulse) @ writes.impulse
        if start.momentum is not None:
            pushed = pushed + kernels.impulse_entry.unsqueeze(-1) * (q @ start.momentum.mT)
        y = pushed if y is None else y + pushed
    if writes.change is not None:
        change = (scores * kernels.decay) @ writes.change
        y = change if y is None else y + change
    assert y is not None
    return y


def advance(kernels: Kernels, writes: Writes, start: Entering) -> tuple[Tensor, Tensor | None]:
    """Weights (or distances) and momentum after the span."""
    weights = None if start.weights is None else kernels.entry[..., -1, None, None] * start.weights
    parts = []
    if kernels.restart is not None and start.back is not None:
        parts.append(kernels.restart[..., -1, None, None] * start.back)
    if writes.change is not None:
        parts.append(_sum_outer(writes.change, kernels.decay[..., -1, :], writes.inputs))
    momentum = None
    if kernels.impulse is not None and writes.impulse is not None:
        assert kernels.impulse_entry is not None and kernels.momentum_exit is not None
        assert kernels.momentum_through is not None
        parts.append(_sum_outer(writes.impulse, kernels.impulse[..., -1, :], writes.inputs))
        momentum = _sum_outer(writes.impulse, kernels.momentum_exit, writes.inputs)
        if start.momentum is not None:
            parts.append(kernels.impulse_entry[..., -1, None, None] * start.momentum)
            momentum = kernels.momentum_through[..., None, None] * start.momentum + momentum
    for part in parts:
        weights = part if weights is None else weights + part
    assert weights is not None
    return weights, momentum


def _sum_outer(left: Tensor, coefficient: Tensor, right: Tensor) -> Tensor:
    """``sum_s coefficient_s left_s right_s^T``; the coefficient goes to the narrower side."""
    if left.shape[-1] <= right.shape[-1]:
        return (left * coefficient.unsqueeze(-1)).mT @ right
    return left.mT @ (right * coefficient.unsqueeze(-1))
