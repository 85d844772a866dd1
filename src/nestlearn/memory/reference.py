"""The definition: one loop over tokens, inner gradients by autograd of the written objective.

This file is the oracle of every faster engine and shares no arithmetic with them. It is slow on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .algorithms import GRADIENT_LIMIT, Algorithm, Momentum, OrthogonalizedMomentum
from .associative import AssociativeMemory
from .objectives import DotProduct, Objective, with_threshold
from .retention import Delta, Oja, slope_at
from .types import Gates, State, Tokens, Weights


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


def model_gradients(
    memory: AssociativeMemory,
    anchor: Weights,
    state: State,
    initial: Weights,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    objective: Objective,
    inputs: Weights,
) -> Weights:
    """Gradients of the quadratic model of the loss (docs/decisions.md, "proximal steps without a delta rule")."""

    def shifted(shift: Weights) -> Tensor:
        def moved(name: str, u: Tensor) -> Tensor:
            return (anchor[name] @ u.unsqueeze(-1)).squeeze(-1) + shift[name]

        return memory.architecture(moved, k)

    still = {name: torch.zeros_like(w[..., 0]) for name, w in anchor.items()}
    read = shifted(still)
    output = torch.func.grad(lambda y: objective.loss(y, v).sum())(read)
    errors = torch.func.grad(lambda shift: objective.loss(shifted(shift), v).sum())(still)
    common = torch.ones_like(output[..., :1])
    if not isinstance(objective, DotProduct):
        common = common * len(anchor)
        along = (output * (read - v)).sum(-1, keepdim=True)
        steeper = output.square().sum(-1, keepdim=True) / (torch.where(along > 0, along, 0) + 1e-6)
        common = common * torch.where(steeper > 1, steeper, 1)
    size = (output / common).square().sum(-1, keepdim=True)
    gradients = {}
    for name, error in errors.items():
        error = error / common
        along = error.square().sum(-1, keepdim=True) / (size + 1e-6)
        slope = slope_at(memory.retention, state.anchor[name])
        slope = slope.squeeze(-1) if isinstance(slope, Tensor) else slope
        target = initial[name] if memory.retain_to == "initial" else 0
        place = target + gates.retain[..., None, None] * (state.params[name] - target)
        if gates.momentum is not None and state.momentum and isinstance(memory.algorithm, Momentum):
            place = place + 2 * gates.momentum[..., None, None] * state.momentum[name]
        moved = ((place - state.anchor[name]) @ inputs[name].unsqueeze(-1)).squeeze(-1)
        error = error / (torch.where(along > 1, along, 1) * slope) + moved
        gradients[name] = error.unsqueeze(-1) * inputs[name].unsqueeze(-2)
    return gradients


def value_gradient(weights: Tensor, v: Tensor) -> Tensor:
    """The gradient of the second term of Oja's objective, ``1/2 ||W^T v||^2`` (NL Eq. 67)."""
    return torch.func.grad(lambda w: 0.5 * (w.mT @ v.unsqueeze(-1)).square().sum())(weights)


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
    state: State,
    initial: Weights,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    closes: Tensor | None = None,
) -> State:
    """The state after one token ``k, v: [*b, d]`` with its gates ``[*b]``; its clock does not move.

    ``closes: [*b]`` marks rows whose chunk ends with the token.
    """
    anchor = {name: memory.retention.anchored(a) for name, a in state.anchor.items()}
    if memory.values == "own":
        v = read_weights(memory, anchor, v)
        v = v / (v.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    elif not isinstance(memory.values, str):
        generates, given = memory.values, v
        v = -torch.func.grad(lambda y: generates.loss(y, given).sum())(read_weights(memory, anchor, k))
    objective, algorithm = with_threshold(memory.objective, gates.threshold), memory.algorithm
    inputs = map_inputs(memory, anchor, k)
    if memory.follows_weights:
        gradients = model_gradients(memory, anchor, state, initial, k, v, gates, objective, inputs)
    else:
        # d loss(M(k), v) / d W of every map and row, by autograd; differentiable again.
        gradients = torch.func.grad(lambda w: objective.loss(read_weights(memory, w, k), v).sum())(anchor)
    lr, retain, beta, _ = gates
    beta = None if beta is None else beta[..., None, None]
    pending = state.pending
    if pending is not None:
        pending = retain * pending + lr
    params, momentum = {}, {}
    for name, gradient in gradients.items():
        x, w = inputs[name], state.params[name]
        target = initial[name] if memory.retain_to == "initial" else torch.zeros_like(w)
        oja = isinstance(memory.retention, Oja)
        eta = effective_step(memory.step_size_of(name), lr, retain, v if oja else x)[..., None, None]
        keep = retain if retain.dim() > lr.dim() else retain[..., None]
        keep = keep.unsqueeze(-2 if name == memory.architecture.query_map else -1)
        names = memory.carried_names(name)
        carried = tuple(state.momentum[n] for n in names) if state.momentum else ()
        change, carried = algorithm.step(carried, gradient, eta, beta)
        kept = memory.retention.keep(w - target, keep, eta, x)
        if isinstance(memory.retention, Delta):
            erased = (w - target) @ (x.unsqueeze(-1) * x.unsqueeze(-2))
            kept = keep * (w - target) - (keep if memory.retention.gated else 1) * eta * erased
        if oja:
            kept = keep * (w - target) - eta * value_gradient(w - target, v)
        if pending is not None and closes is not None:
            change = change + torch.where(closes[..., None, None], _close(algorithm, carried, pending), 0)
        params[name] = target + kept + change
        momentum.update(zip(names, carried, strict=True))
    if pending is not None and closes is not None:
        pending = torch.where(closes, 0, pending)
    return state._replace(params=params, momentum=momentum or None, pending=pending)


def _close(algorithm: Algorithm, carried: tuple[Tensor, ...], pending: Tensor) -> Tensor:
    """What is written when a chunk ends."""
    pending = pending[..., None, None]
    if isinstance(algorithm, OrthogonalizedMomentum):
        return pending * orthogonalized(limited(carried[0]), algorithm.steps)
    return algorithm.close(carried, pending)


def select(condition: Tensor, yes: Weights | None, no: Weights) -> Weights:
    """Row-wise choice between two sets of weights (None: zeros)."""
    return {name: torch.where(condition[..., None, None], 0 if yes is None else yes[name], no[name]) for name in no}


def scan(
    memory: AssociativeMemory, state: State, tokens: Tokens, initial: Weights, read_mode: str
) -> tuple[Tensor, State]:
    """Run the recurrence token by token. Arguments are validated by `nestlearn.memory.scan`."""
    q, k, v, gates, mask, reset = tokens
    outputs, retention = [], memory.retention
    none = torch.zeros_like(gates.lr[..., 0], dtype=torch.bool)
    aligned = state.aligned and mask is None and reset is None and q.shape[-2] % memory.chunk_size == 0
    for t in range(q.shape[-2]):
        valid = ~none if mask is None else mask[..., t]
        fresh = none if reset is None else reset[..., t] & valid
        start = state._replace(
            params=select(fresh, initial, state.params),
            momentum=None if state.momentum is None else select(fresh, None, state.momentum),
            anchor=select(fresh, initial, state.anchor),
            position=torch.where(fresh, 0, state.position),
            pending=None if state.pending is None else torch.where(fresh, 0, state.pending),
        )
        start = start._replace(anchor=select(start.position == 0, start.params, start.anchor))
        position = (start.position + 1) % memory.chunk_size
        closes = valid & (position == 0)
        # A masked token may hold anything, NaN included; it must reach neither values nor gradients.
        k_t, v_t, q_t = (torch.where(valid[..., None], x[..., t, :], 0) for x in (k, v, q))
        end = token_step(memory, start, initial, k_t, v_t, gates.at(t, valid), closes)
        seen = {name: retention.anchored(a) for name, a in start.anchor.items()}
        if read_mode == "token":
            seen = {name: retention.weights(a, start.anchor[name]) for name, a in end.params.items()}
        outputs.append(torch.where(valid[..., None], read_weights(memory, seen, q_t), 0))
        params = select(closes, {name: retention.close(a) for name, a in end.params.items()}, end.params)
        anchor = select(closes, params, start.anchor)
        state = State(
            select(valid, params, state.params),
            None if end.momentum is None or state.momentum is None else select(valid, end.momentum, state.momentum),
            select(valid, anchor, state.anchor),
            torch.where(valid, position, state.position),
            None if end.pending is None or state.pending is None else torch.where(valid, end.pending, state.pending),
        )
    return torch.stack(outputs, -2), state._replace(aligned=aligned)
