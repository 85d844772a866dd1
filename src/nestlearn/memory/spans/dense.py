"""Spans of memories without a closed form: one token after another, every token's weights kept.

It runs the written rules themselves, `Algorithm.step` and `Retention.keep`, so that objects from outside the package
need nothing but these. It costs one set of weights per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithms import Momentum
from ..associative import AssociativeMemory
from ..proximal import LOOK_AHEAD
from ..retention import is_per_channel, slope_at
from ..types import Weights
from .base import Opened, Running, Update
from .delta import step_size


def gate_of_map(memory: AssociativeMemory, name: str, retain: Tensor) -> Tensor:
    """The retention gate of one token for one map, ``[b, 1, 1]``, or along its inputs or outputs."""
    if not is_per_channel(memory.retention):
        return retain[:, None, None]
    return retain.unsqueeze(-2 if name == memory.architecture.query_map else -1)


def open_dense(memory: AssociativeMemory, run: Running, update: Update) -> Opened:
    """A span of a memory whose algorithm or retention has no closed form."""
    tokens = update.gates.lr.shape[-1]
    now, path = run, []
    for t in range(tokens):
        now = _step(memory, now, update, t)
        path.append(now)

    def read(name: str, x: Tensor) -> Tensor:
        answers = []
        for t, after in enumerate(path):
            anchor = run.anchor[name]
            if update.reset is not None:
                fresh = update.reset[:, : t + 1].any(-1)[:, None, None]
                anchor = torch.where(fresh, run.initial[name], anchor)
            weights = memory.retention.weights(after.params()[name], anchor)
            answers.append((weights @ x[:, t].unsqueeze(-1)).squeeze(-1))
        return torch.stack(answers, 1)

    return Opened(read, lambda: now)


def _step(memory: AssociativeMemory, run: Running, update: Update, t: int) -> Running:
    """The memory after token ``t`` of the span."""
    gates, algorithm = update.gates, memory.algorithm
    valid = None if update.valid is None else update.valid[:, t, None, None]
    fresh = None if update.reset is None else update.reset[:, t, None, None]
    beta = None if gates.momentum is None else gates.momentum[:, t, None, None]
    pending = run.pending
    if pending is not None:
        pending = pending if fresh is None else torch.where(fresh[:, 0, 0], 0, pending)
        pending = gates.retain[:, t] * pending + gates.lr[:, t]
    weights: dict[str, Tensor | None] = {}
    momentum: Weights = {}
    for name, (inputs, errors) in update.factors.items():
        x, error = inputs[:, t], errors[:, t]
        names = memory.carried_names(name)
        w, carried = run.weights[name], tuple(run.momentum[n] for n in names) if run.momentum else ()
        assert w is not None
        before, held = w, carried
        if fresh is not None:
            w = torch.where(fresh, 0 if run.base is not None else run.initial[name], w)
            carried = tuple(torch.where(fresh, 0, s) for s in carried)
        eta = step_size(memory.step_size_of(name), gates.lr[:, t], gates.retain[:, t], x)[:, None, None]
        keep = gate_of_map(memory, name, gates.retain[:, t])
        if memory.follows_weights:
            anchor = run.anchor[name]
            if update.reset is not None:
                anchor = torch.where(update.reset[:, : t + 1].any(-1)[:, None, None], run.initial[name], anchor)
            place = memory.retention.keep(w, keep, eta, x)
            if isinstance(algorithm, Momentum) and beta is not None and carried:
                place = place + LOOK_AHEAD * beta * carried[0]
            moved = place - (anchor if run.base is None else anchor - run.base[name])
            slope = slope_at(memory.retention, anchor)
            slope = slope.squeeze(-1) if isinstance(slope, Tensor) else slope
            error = error / slope + (moved @ x.unsqueeze(-1)).squeeze(-1)
        gradient = error.unsqueeze(-1) * x.unsqueeze(-2)
        change, carried = algorithm.step(carried, gradient, eta, beta)
        w = memory.retention.keep(w, keep, eta, x) + change
        if algorithm.writes_at_close and update.closing is not None and pending is not None:
            closes = update.closing[:, t, None, None]
            w = w + torch.where(closes, algorithm.close(carried, pending[:, None, None]), 0)
        if valid is not None:
            w = torch.where(valid, w, before)
            carried = tuple(torch.where(valid, s, old) for s, old in zip(carried, held, strict=True))
        weights[name] = w
        momentum.update(zip(names, carried, strict=True))
    if pending is not None and run.pending is not None:
        if update.closing is not None:
            pending = torch.where(update.closing[:, t], 0, pending)
        pending = pending if valid is None else torch.where(valid[:, 0, 0], pending, run.pending)
    return run._replace(weights=weights, momentum=momentum or None, pending=pending)
