"""The recurrence of an associative memory once more, from the formulas alone: one row, one token, plain loops.

Nothing here comes from the package. The inner gradient is ``torch.autograd.grad`` of the objective as written, the
chunk clock is a Python integer, a reset and a masked token are ``if`` statements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


@dataclass
class Rule:
    """The choices of one memory, by name."""

    deep: bool
    activation: str
    objective: str
    retention: str
    step: dict[str, str]
    momentum: bool
    to_initial: bool
    chunk_size: int
    read: str


@dataclass
class Row:
    """Everything one row knows after a token."""

    weights: Weights
    anchor: Weights
    momentum: Weights
    position: int


def forward(rule: Rule, weights: Weights, x: Tensor) -> tuple[Tensor, Weights]:
    """M(x) for one vector, and the input of each linear map."""
    if not rule.deep:
        return weights["W"] @ x, {"W": x}
    act = {"gelu": F.gelu, "silu": F.silu}[rule.activation]
    h = act(weights["in"] @ x)
    return x + weights["out"] @ h, {"in": x, "out": h}


def objective(rule: Rule, prediction: Tensor, v: Tensor) -> Tensor:
    if rule.objective == "dot":
        return -torch.dot(prediction, v)
    return ((prediction - v) ** 2).sum() / 2


def effective_step(kind: str, lr: Tensor, retain: Tensor, x: Tensor) -> Tensor:
    if kind == "proximal":
        return lr / (1 + lr * torch.dot(x, x))
    if kind == "normalized":
        return torch.minimum(lr, 1 + retain) / (torch.dot(x, x) + 1e-6)
    return lr


def step(rule: Rule, row: Row, initial: Weights, k: Tensor, v: Tensor, lr: Tensor, retain: Tensor, beta) -> Row:
    """One write (the anchor and the clock are the caller's)."""
    prediction, inputs = forward(rule, row.anchor, k)
    names = list(row.anchor)
    if rule.retention == "decay" and "proximal" in rule.step.values():
        gradients = model_gradients(rule, row, initial, k, v, retain, beta, inputs)
    else:
        gradients = torch.autograd.grad(
            objective(rule, prediction, v), [row.anchor[n] for n in names], create_graph=True, materialize_grads=True
        )
    weights, momentum = {}, {}
    for name, gradient in zip(names, gradients, strict=True):
        x, w = inputs[name], row.weights[name]
        goal = initial[name] if rule.to_initial else torch.zeros_like(w)
        eta = effective_step(rule.step[name], lr, retain, x)
        written = -eta * gradient
        if rule.momentum:
            written = beta * row.momentum[name] + written
            momentum[name] = written
        eye = torch.eye(len(x), dtype=x.dtype)
        if rule.retention == "decay":
            keep = retain * eye
        elif rule.retention == "delta":
            keep = retain * eye - eta * torch.outer(x, x)
        else:
            keep = retain * (eye - eta * torch.outer(x, x))
        weights[name] = goal + (w - goal) @ keep + written
    return Row(weights, row.anchor, momentum, row.position)


def model_gradients(
    rule: Rule, row: Row, initial: Weights, k: Tensor, v: Tensor, retain: Tensor, beta, inputs: Weights
) -> list[Tensor]:
    """Gradients of the quadratic models of the maps, whose errors are backpropagated to their outputs."""
    outputs: Weights = {}

    def linear(name: str, x: Tensor) -> Tensor:
        # A leaf of its own: the error of the map's output, not of what made it.
        outputs[name] = row.anchor[name] @ x + torch.zeros(len(row.anchor[name]), dtype=x.dtype, requires_grad=True)
        return outputs[name]

    if not rule.deep:
        read = linear("W", k)
    else:
        read = k + linear("out", {"gelu": F.gelu, "silu": F.silu}[rule.activation](linear("in", k)))
    errors = torch.autograd.grad(
        objective(rule, read, v), [read, *(outputs[n] for n in row.anchor)], create_graph=True, materialize_grads=True
    )
    parts = 2 if rule.deep and rule.objective == "l2" else 1
    whole, gradients = errors[0] / parts, []
    for name, error in zip(row.anchor, errors[1:], strict=True):
        error = error / parts
        along = torch.dot(error, error) / (torch.dot(whole, whole) + 1e-6)
        goal = initial[name] if rule.to_initial else torch.zeros_like(row.weights[name])
        place = goal + retain * (row.weights[name] - goal)
        if rule.momentum:
            place = place + 2 * beta * row.momentum[name]
        moved = (place - row.anchor[name]) @ inputs[name]
        gradients.append(torch.outer(error / torch.clamp(along, min=1) + moved, inputs[name]))
    return gradients


def fresh(initial: Weights) -> Row:
    return Row(dict(initial), dict(initial), {name: torch.zeros_like(w) for name, w in initial.items()}, 0)


def scan_row(rule: Rule, initial: Weights, q, k, v, lr, retain, beta, mask, reset) -> tuple[Tensor, Row]:
    """All tokens of one row; ``beta``, ``mask`` and ``reset`` may be None."""
    row, outputs = fresh(initial), []
    for t in range(len(q)):
        if mask is not None and not mask[t]:
            outputs.append(torch.zeros_like(v[t]))
            continue
        if reset is not None and reset[t]:
            row = fresh(initial)
        if row.position == 0:
            row.anchor = dict(row.weights)
        before = row
        row = step(rule, row, initial, k[t], v[t], lr[t], retain[t], None if beta is None else beta[t])
        source = row.weights if rule.read == "token" else before.anchor
        outputs.append(forward(rule, source, q[t])[0])
        row.position = (row.position + 1) % rule.chunk_size
        if row.position == 0:
            row.anchor = dict(row.weights)
    return torch.stack(outputs), row
