"""Levels whose initial weights belong to the next slower level (nested CMS, NL Eq. 72).

Level l learns in periods of C_l from initial weights theta_0. Every C_{l+1} tokens knowledge is transferred:

    theta_0 <- theta_0 + rho (theta - theta_0),    theta <- theta_0

So theta_0 changes at the frequency of the slower level, and the faster level drops what it has learned since, except
for the fraction rho. The slowest level keeps its own initial weights, a parameter. The start of a document sets all
initial weights back to their parameters.

The difference ``theta - theta_0`` is a first-order step. Let theta_c be the weights at the start of chunk c, L the
objective of the level, and w_t the weight of the gradient of token t in theta at the end (`influence`):

    J(theta_0) = sum_t w_t L(M(x_t; theta_c(t)), v_t),    theta - theta_0 = - sum_t w_t dL_t / d theta_c(t)

This is ``- dJ / d theta_0`` if every write counts as a constant. A transfer by the exact meta-gradient goes through
the writes instead (`meta_gradient`):

    theta_0 <- theta_0 - rho dJ / d theta_0
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nestlearn.memory import AssociativeMemory, Gates, State, scan
from nestlearn.memory.clock import Clock, Rows, choose, known_empty
from nestlearn.memory.kernels.products import segment_products
from nestlearn.memory.types import Weights
from nestlearn.nn.state import record

from .tape import gradients, usable

TransferBy = Literal["difference", "gradient"]


@record("cms.window")
class Window(NamedTuple):
    """Tokens that a nested level has read since its initial weights last moved, in the slots before ``position``."""

    x: Float[Tensor, "b c d"]
    value: Float[Tensor, "b c d"]
    gates: Gates


@record("cms.nested")
class NestedState(NamedTuple):
    """The fast weights of a nested level and their initial weights, every tensor ``[B, ...]``.

    ``position`` counts tokens since the initial weights last moved. ``aligned`` is static: True where the position is
    known to be 0 in every row. ``window`` holds the tokens since then, if a meta-gradient will need them.
    """

    fast: State
    initial: Weights
    position: Int[Tensor, "b"]
    aligned: bool
    window: Window | None = None


class Nest(NamedTuple):
    """How initial weights move: every ``period`` tokens by the fraction ``rho`` of what was learned, or of the
    meta-gradient. ``initial`` are the parameters that a reset goes back to."""

    period: int
    rho: float
    initial: Weights
    by: TransferBy = "difference"


def transfer(state: State, initial: Weights, rho: float, rows: Rows = True) -> tuple[State, Weights]:
    """``theta_0 <- theta_0 + rho (theta - theta_0)``, ``theta <- theta_0`` in the flagged rows.

    theta includes the writes of an unfinished period. Returns the state and theta_0.

    Example:
        >>> from nestlearn.memory import catalog
        >>> start = catalog["ttt_linear"].init_state((1,), 1, 1)
        >>> state, initial = transfer(start._replace(params={"W": torch.ones(1, 1, 1)}), start.params, 0.5)
        >>> state.params["W"].item(), initial["W"].item()
        (0.5, 0.5)
    """
    moved = {n: w + rho * (state.params[n] - w) for n, w in initial.items()}
    return restart(state, moved, rows), choose(rows, moved, initial)


def influence(gates: Gates) -> Float[Tensor, "b t"]:
    """The weight of the gradient of token t in the weights after the last token T.

        w_t = eta_t sum_{s >= t} (beta_{t+1} ... beta_s) (alpha_{s+1} ... alpha_T)

    Example:
        >>> half = torch.full((1, 3), 0.5)
        >>> influence(Gates(torch.ones(1, 3), half)).tolist(), influence(Gates(torch.ones(1, 3), half, half)).tolist()
        ([[0.25, 0.5, 1.0]], [[0.75, 1.0, 1.0]])
    """
    kept = segment_products(gates.retain)[..., -1, :]
    if gates.momentum is not None:
        kept = (segment_products(gates.momentum).mT @ kept.unsqueeze(-1)).squeeze(-1)
    return gates.lr * kept


def meta_gradient(memory: AssociativeMemory, state: State, initial: Weights, window: Window) -> Weights:
    """``dJ / d theta_0`` through all writes of a window that starts at theta_0 = ``initial``.

    The window is read once more and differentiated, in any mode of autograd. Under an outer gradient the result can be
    differentiated again. A row with a non-finite output gets NaN.

    Example:
        >>> from nestlearn.memory import catalog
        >>> memory = catalog["ttt_linear"]
        >>> x = torch.ones(1, 1, 1)
        >>> window = Window(x, 3 * x, Gates(torch.full((1, 1), 0.5), torch.ones(1, 1)))
        >>> start = memory.init_state((1,), 1, 1)
        >>> meta_gradient(memory, start, start.params, window)["W"].item()
        -1.5
    """
    outer = torch.is_grad_enabled()
    with gradients():
        initial, (x, value, gates) = usable((initial, window))
        start = {n: w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for n, w in initial.items()}
        fresh = restart(state, start, True)
        y, _ = scan(memory, fresh, x, x, value, gates, initial=start, read="chunk", return_state=False)
        objective = (influence(gates) * memory.objective.loss(y, value)).sum()
        slopes = torch.autograd.grad(objective, list(start.values()), create_graph=outer)
    whole = y.detach().isfinite().all(-1).all(-1)[:, None, None]
    return {n: torch.where(whole, slope, torch.nan) for n, slope in zip(start, slopes, strict=True)}


def restart(state: State, initial: Weights, rows: Rows) -> State:
    """The flagged rows start from ``initial`` with nothing written."""

    def clear(x: Tensor) -> Tensor:
        return choose(rows, {"": torch.zeros_like(x)}, {"": x})[""]

    cleared = state._replace(params={}, anchor={}).map(clear)
    params, anchor = choose(rows, initial, state.params), choose(rows, initial, state.anchor)
    return cleared._replace(params=params, anchor=anchor, aligned=rows is True or state.aligned)


def scan_nested(
    memory: AssociativeMemory,
    nest: Nest,
    state: NestedState | None,
    x: Float[Tensor, "b t d"],
    value: Float[Tensor, "b t d"],
    gates: Gates,
    mask: Bool[Tensor, "b t"] | None,
    reset: Bool[Tensor, "b t"] | None,
) -> tuple[Float[Tensor, "b t d"], NestedState]:
    """`nestlearn.memory.scan` with keys and queries x, and initial weights that move after every window of tokens.

    A window ends after ``nest.period`` tokens, or before a reset.
    """
    if state is None:
        start = memory.init_state((x.shape[0],), x.shape[-1], x.shape[-1], nest.initial, dtype=x.dtype, device=x.device)
        state = NestedState(start, start.params, torch.zeros_like(start.position), True)
        if nest.by == "gradient":
            state = state._replace(window=_empty(Window(x, value, gates), nest.period))
    tokens, period = x.shape[1], nest.period
    clock = Clock.start(
        state.position, state.aligned, tokens, period, min(period, tokens), mask, reset, cut_resets=True
    )
    now, initial, position, held, outputs = state.fast, state.initial, state.position, state.window, []
    if clock.grid is not None:
        now = now._replace(aligned=False)
    for span, here in zip(clock.spans, _cut(clock, Window(x, value, gates)), strict=True):
        if span.reset is not None:
            fresh = span.reset.any(1)
            full = {n: w.expand_as(initial[n]) for n, w in nest.initial.items()}
            now, initial = restart(now, full, fresh), choose(fresh, full, initial)
            position = torch.where(fresh, 0, position)
        y, now = scan(memory, now, here.x, here.x, here.value, here.gates, initial=initial, mask=span.valid)
        outputs.append(y)
        ends = span.ends
        valid = torch.ones_like(here.gates.lr, dtype=torch.bool) if span.valid is None else span.valid
        # A window that one span holds needs no copy.
        held = here if ends is True and held is not None else _record(held, here, position, valid)
        position = span.after(position)
        now, initial = _move(memory, nest, now, initial, held, ends)
    window = state.window if clock.aligned else held
    return clock.join(outputs), NestedState(now, initial, clock.position, clock.aligned, window)


def _cut(clock: Clock, new: Window) -> list[Window]:
    """The tokens of every span; slots without a token hold zeros, and gates that change nothing."""
    gates = [
        [None] * len(clock.spans) if gate is None else clock.cut(gate, neutral)
        for gate, neutral in zip(new.gates, (0.0, 1.0, 0.0, 1.0), strict=True)
    ]
    columns = zip(clock.cut(new.x), clock.cut(new.value), *gates, strict=True)
    return [Window(x, value, Gates(*rest)) for x, value, *rest in columns]


def _empty(like: Window, slots: int) -> Window:
    """An empty window with this many slots."""

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], slots, *x.shape[2:])

    return Window(zeros(like.x), zeros(like.value), like.gates.map(zeros))


def _record(held: Window | None, new: Window, position: Int[Tensor, "b"], valid: Bool[Tensor, "b t"]) -> Window | None:
    """The window with the valid new tokens (which come first) put into the slots from ``position`` on."""
    if held is None:
        return None
    last = held.x.shape[1]
    slots = position[:, None] + torch.arange(valid.shape[1], device=valid.device)
    index = torch.where(valid, slots, last)

    def put(old: Tensor, x: Tensor) -> Tensor:
        where = index.view(*index.shape, *(1,) * (x.dim() - 2)).expand_as(x)
        return torch.cat([old, old[:, :1]], 1).scatter(1, where, x)[:, :last]

    pairs = zip(held.gates, new.gates, strict=True)
    gates = [None if old is None or gate is None else put(old, gate) for old, gate in pairs]
    return Window(put(held.x, new.x), put(held.value, new.value), Gates(*gates))  # type: ignore[arg-type]


def _move(
    memory: AssociativeMemory, nest: Nest, state: State, initial: Weights, window: Window | None, rows: Rows
) -> tuple[State, Weights]:
    """The state and the initial weights after those of the flagged rows have moved."""
    if nest.by == "difference" or window is None:
        return transfer(state, initial, nest.rho, rows)
    if isinstance(rows, Tensor) and known_empty(rows):
        return state, initial
    slopes = meta_gradient(memory, state, initial, window)
    moved = {n: w - nest.rho * slopes[n] for n, w in initial.items()}
    return restart(state, moved, rows), choose(rows, moved, initial)
