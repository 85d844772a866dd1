"""The definition: one loop over tokens, inner gradients by autograd of the written objective.

This file is the oracle of every faster engine and shares no arithmetic with them. It is slow on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .algorithms import Momentum
from .associative import AssociativeMemory
from .retention import Delta
from .types import Gates, State, Weights


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


def inner_gradient(memory: AssociativeMemory, weights: Weights, k: Tensor, v: Tensor) -> Weights:
    """``d loss(M(k), v) / d W`` of every map and row, by autograd; differentiable again."""
    return torch.func.grad(lambda w: memory.objective.loss(read_weights(memory, w, k), v).sum())(weights)


def effective_step(kind: str, lr: Tensor, retain: Tensor, x: Tensor) -> Tensor:
    """The step eta' of one map with input x (docs/decisions.md, "step size")."""
    square = x.square().sum(-1)
    if kind == "proximal":
        return lr / (1 + lr * square)
    if kind == "normalized":
        return torch.minimum(lr, 1 + retain) / (square + 1e-6)
    return lr


def token_step(
    memory: AssociativeMemory, state: State, k: Tensor, v: Tensor, lr: Tensor, retain: Tensor, beta: Tensor | None
) -> tuple[Weights, Weights | None]:
    """Weights and momentum after one token ``k, v: [*b, d]``; ``lr, retain, beta: [*b]``."""
    gradients = inner_gradient(memory, state.anchor, k, v)
    inputs = map_inputs(memory, state.anchor, k)
    weights: Weights = {}
    momentum: Weights = {}
    for name, gradient in gradients.items():
        x, w = inputs[name], state.params[name]
        target = state.initial[name] if memory.retain_to == "initial" else torch.zeros_like(w)
        eta = effective_step(memory.step_size_of(name), lr, retain, x)[..., None, None]
        keep = retain[..., None, None]
        change = -eta * gradient
        if isinstance(memory.algorithm, Momentum):
            assert beta is not None and state.momentum is not None
            change = beta[..., None, None] * state.momentum[name] + change
            momentum[name] = change
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
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    mask: Tensor | None,
    reset: Tensor | None,
    read: str,
) -> tuple[Tensor, State]:
    """Run the recurrence token by token. Arguments are validated by `nestlearn.memory.scan`."""
    outputs = []
    nobody = torch.zeros_like(gates.lr[..., 0], dtype=torch.bool)
    for t in range(q.shape[-2]):
        valid = ~nobody if mask is None else mask[..., t]
        fresh = nobody if reset is None else reset[..., t] & valid
        start = state._replace(
            params=select(fresh, state.initial, state.params),
            anchor=select(fresh, state.initial, state.anchor),
            position=torch.where(fresh, 0, state.position),
        )
        if state.momentum is not None:
            zeros = {name: torch.zeros_like(s) for name, s in state.momentum.items()}
            start = start._replace(momentum=select(fresh, zeros, state.momentum))
        start = start._replace(anchor=select(start.position == 0, start.params, start.anchor))
        # A masked token may hold anything, NaN included; it must reach neither values nor gradients.
        k_t, v_t, q_t = (torch.where(valid[..., None], x[..., t, :], 0) for x in (k, v, q))
        lr, retain = (torch.where(valid, gate[..., t], 0) for gate in (gates.lr, gates.retain))
        beta = None if gates.momentum is None else torch.where(valid, gates.momentum[..., t], 0)
        weights, momentum = token_step(memory, start, k_t, v_t, lr, retain, beta)
        y = read_weights(memory, weights if read == "token" else start.anchor, q_t)
        outputs.append(torch.where(valid[..., None], y, 0))
        position = torch.where(valid, (start.position + 1) % memory.chunk_size, state.position)
        weights = select(valid, weights, state.params)
        anchor = select(valid, start.anchor, state.anchor)
        if momentum is not None and state.momentum is not None:
            momentum = select(valid, momentum, state.momentum)
        anchor = select(valid & (position == 0), weights, anchor)
        state = state._replace(params=weights, momentum=momentum, anchor=anchor, position=position, aligned=False)
    return torch.stack(outputs, -2), state
