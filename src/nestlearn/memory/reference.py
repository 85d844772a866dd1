"""The definition: one loop over tokens, inner gradients by autograd of the written objective.

This file is the oracle of every faster engine and shares no arithmetic with them. It is slow on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .algorithms import GRADIENT_LIMIT, OrthogonalizedMomentum
from .associative import AssociativeMemory
from .objectives import with_threshold
from .retention import Delta
from .types import Gates, Running, Weights


def read_weights(memory: AssociativeMemory, weights: Weights, x: Tensor) -> Tensor:
    """M(x) under dense weights, ``x: [*b, d]``."""
    return memory.architecture(lambda name, u: (weights[name] @ u.unsqueeze(-1)).squeeze(-1), x)


def map_inputs(memory: AssociativeMemory, weights: Weights, k: Tensor) -> Weights:
    """The input that each map sees while the memory computes M(k)."""
    inputs: Weights = {}

    def tapped(name: str, u: Tensor) -> Tensor:
        inputs[name] = u
        return (weights[name] @ u.unsqueeze(-1)).squeeze(-1)

    memory.architecture(tapped, k)
    return inputs


def effective_step(kind: str, lr: Tensor, retain: Tensor, x: Tensor) -> Tensor:
    """The step eta' of one map with input x (docs/decisions.md, "step size")."""
    square = x.square().sum(-1)
    if kind == "proximal":
        return lr / (1 + lr * square)
    if kind == "normalized":
        return torch.minimum(lr, 1 + retain) / (square + 1e-6)
    return lr


def orthogonalized(x: Tensor, steps: int) -> Tensor:
    """Muon's quintic, ``a X + b X X^T X + c (X X^T)^2 X``, from ``X / ||X||_F`` on (NL Eq. 43)."""
    x = x / (x.square().sum((-2, -1), keepdim=True) + 1e-14).sqrt()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def limited(x: Tensor) -> Tensor:
    """``x``; its outer gradient has a norm of at most `GRADIENT_LIMIT` per matrix, and is 0 where it is not finite."""
    if x.requires_grad:
        x = x.clone()

        def limit(gradient: Tensor) -> Tensor:
            norm = gradient.square().sum((-2, -1), keepdim=True).sqrt()
            return torch.where(norm.isfinite(), gradient * (GRADIENT_LIMIT / norm).clamp(max=1), 0)

        x.register_hook(limit)
    return x


def token_step(
    memory: AssociativeMemory,
    state: Running,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    retain: Tensor,
    beta: Tensor | None = None,
    threshold: Tensor | None = None,
    written: Tensor | None = None,
) -> tuple[Weights, Weights | None]:
    """Weights (or accumulators) and momentum after one token ``k, v: [*b, d]`` and its gates ``[*b]``.

    ``written: [*b]`` are the step sizes with which orthogonalized momentum is written after it (0 inside a chunk).
    """
    anchor = {name: memory.retention.anchored(a) for name, a in state.anchor.items()}
    objective = with_threshold(memory.objective, threshold)
    inputs = map_inputs(memory, anchor, k)
    # d loss(M(k), v) / d W of every map and row, by autograd; differentiable again.
    gradients = torch.func.grad(lambda w: objective.loss(read_weights(memory, w, k), v).sum())(anchor)
    weights, momentum = {}, {}
    for name, gradient in gradients.items():
        x, w = inputs[name], state.params[name]
        target = state.initial[name] if memory.retain_to == "initial" else torch.zeros_like(w)
        eta = effective_step(memory.step_size_of(name), lr, retain, x)[..., None, None]
        keep = retain if retain.dim() > lr.dim() else retain[..., None]
        keep = keep.unsqueeze(-2 if name == memory.architecture.query_map else -1)
        change = -eta * gradient
        if state.momentum is not None and beta is not None:
            pushed = -gradient if isinstance(memory.algorithm, OrthogonalizedMomentum) else change
            momentum[name] = change = beta[..., None, None] * state.momentum[name] + pushed
        if isinstance(memory.algorithm, OrthogonalizedMomentum) and written is not None:
            change = orthogonalized(limited(change), memory.algorithm.steps)
            change = written[..., None, None] * change
        kept = keep * (w - target)
        if isinstance(memory.retention, Delta):
            erased = (w - target) @ (x.unsqueeze(-1) * x.unsqueeze(-2))
            kept = kept - (keep if memory.retention.gated else 1) * eta * erased
        weights[name] = target + kept + change
    return weights, momentum or None


def select(condition: Tensor, yes: Weights, no: Weights) -> Weights:
    """Row-wise choice between two sets of weights."""
    return {name: torch.where(condition[..., None, None], yes[name], no[name]) for name in no}


def scan(
    memory: AssociativeMemory,
    state: Running,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    mask: Tensor | None,
    reset: Tensor | None,
    read: str,
) -> tuple[Tensor, Running]:
    """Run the recurrence token by token. Arguments are validated by `nestlearn.memory.scan`."""
    outputs = []
    none = torch.zeros_like(gates.lr[..., 0], dtype=torch.bool)
    for t in range(q.shape[-2]):
        valid = ~none if mask is None else mask[..., t]
        fresh = none if reset is None else reset[..., t] & valid
        start = state._replace(
            params=select(fresh, state.initial, state.params),
            anchor=select(fresh, state.initial, state.anchor),
            position=torch.where(fresh, 0, state.position),
            pending=None if state.pending is None else torch.where(fresh, 0, state.pending),
        )
        if state.momentum is not None:
            zeros = {name: torch.zeros_like(s) for name, s in state.momentum.items()}
            start = start._replace(momentum=select(fresh, zeros, state.momentum))
        start = start._replace(anchor=select(start.position == 0, start.params, start.anchor))
        position = (start.position + 1) % memory.chunk_size
        closes = valid & (position == 0)
        # A masked token may hold anything, NaN included; it must reach neither values nor gradients.
        k_t, v_t, q_t = (torch.where(valid[..., None], x[..., t, :], 0) for x in (k, v, q))
        here = gates.at(t, valid)
        pending, written = start.pending, None
        if pending is not None:
            pending = here.retain * pending + here.lr
            pending, written = torch.where(closes, 0, pending), torch.where(closes, pending, 0)
        weights, momentum = token_step(memory, start, k_t, v_t, *here, written)
        retention = memory.retention
        if read == "token":
            seen = {name: retention.weights(a, start.anchor[name]) for name, a in weights.items()}
        else:
            seen = {name: retention.anchored(a) for name, a in start.anchor.items()}
        outputs.append(torch.where(valid[..., None], read_weights(memory, seen, q_t), 0))
        ended = select(closes, {name: retention.close(a) for name, a in weights.items()}, weights)
        weights = select(valid, ended, state.params)
        anchor = select(closes, weights, select(valid, start.anchor, state.anchor))
        if momentum is not None and state.momentum is not None:
            momentum = select(valid, momentum, state.momentum)
        if pending is not None and state.pending is not None:
            pending = torch.where(valid, pending, state.pending)
        position = torch.where(valid, position, state.position)
        state = Running(weights, momentum, anchor, state.initial, position, pending)
    return torch.stack(outputs, -2), state
