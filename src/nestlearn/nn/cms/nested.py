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
from nestlearn.memory.clock import Rows, choose, compaction, known_empty
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
    """`nestlearn.memory.scan` with keys and queries x, and initial weights that move after every window of tokens."""
    new = Window(x, value, gates)
    if state is None:
        start = memory.init_state((x.shape[0],), x.shape[-1], x.shape[-1], nest.initial, dtype=x.dtype, device=x.device)
        state = NestedState(start, start.params, torch.zeros_like(start.position), True)
        if nest.by == "gradient":
            state = state._replace(window=_empty(new, nest.period))
    if state.aligned and mask is None and reset is None:
        return _scan_aligned(memory, nest, state, new)
    return _scan_windows(memory, nest, state, new, mask, reset)


def _empty(like: Window, slots: int) -> Window:
    """An empty window with this many slots."""

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], slots, *x.shape[2:])

    return Window(zeros(like.x), zeros(like.value), like.gates.map(zeros))


def _pick(new: Window, rows: Tensor | slice, tokens: Tensor | slice) -> Window:
    """The given tokens of the given rows."""
    return Window(new.x[rows, tokens], new.value[rows, tokens], new.gates.map(lambda gate: gate[rows, tokens]))


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


def _scan_aligned(memory: AssociativeMemory, nest: Nest, state: NestedState, new: Window) -> tuple[Tensor, NestedState]:
    """All rows at the start of a window, every token real."""
    now, initial, outputs, tokens, window = state.fast, state.initial, [], new.x.shape[1], state.window
    for first in range(0, tokens, nest.period):
        here = _pick(new, slice(None), slice(first, first + nest.period))
        y, now = scan(memory, now, here.x, here.x, here.value, here.gates, initial=initial)
        outputs.append(y)
        if y.shape[1] == nest.period:
            now, initial = _move(memory, nest, now, initial, here, True)
        else:
            everyone = torch.ones_like(here.gates.lr, dtype=torch.bool)
            window = _record(window, here, state.position, everyone)
    position = torch.full_like(state.position, tokens % nest.period)
    return torch.cat(outputs, 1), NestedState(now, initial, position, tokens % nest.period == 0, window)


class Windows(NamedTuple):
    """The real tokens of every row, moved to the front: the ``window`` and the ``place`` in it of each token,
    ``present`` False beyond the last, ``restart`` True where it resets the row, ``order`` its index in the input."""

    order: Int[Tensor, "b t"]
    present: Bool[Tensor, "b t"]
    restart: Bool[Tensor, "b t"]
    window: Int[Tensor, "b t"]
    place: Int[Tensor, "b t"]


def find_windows(
    position: Int[Tensor, "b"], tokens: int, outer: int, mask: Tensor | None, reset: Tensor | None
) -> Windows:
    """The windows of every row. A window ends after ``outer`` tokens, or before a reset."""
    slots = torch.arange(tokens, device=position.device)
    order, present = slots.expand(len(position), tokens), slots < torch.full_like(position, tokens)[:, None]
    if mask is not None:
        order, count = compaction(mask)
        present = slots < count[:, None]
    restart = torch.zeros_like(present) if reset is None else reset.gather(1, order) & present
    last = torch.where(restart, slots, -1).cummax(1).values
    phase = torch.where(last >= 0, slots - last, position[:, None] + slots) % outer
    begins = present & ((phase == 0) | restart | (slots == 0))
    first = torch.where(begins, slots, 0).cummax(1).values
    return Windows(order, present, restart, begins.long().cumsum(1) - 1, slots - first)


def _scan_windows(
    memory: AssociativeMemory,
    nest: Nest,
    state: NestedState,
    new: Window,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, NestedState]:
    """Rows of any phase, window by window: the tokens of a window are gathered into its slots."""
    rows, tokens, width = new.x.shape
    windows = find_windows(state.position, tokens, nest.period, mask, reset)
    now, initial, position, held = state.fast._replace(aligned=False), state.initial, state.position, state.window
    size, y = min(nest.period, tokens), new.x.new_zeros(rows, tokens + 1, width)
    row = torch.arange(rows, device=y.device)[:, None]
    full = {n: w.expand_as(initial[n]) for n, w in nest.initial.items()}
    bound = tokens if reset is not None else min(tokens, tokens // nest.period + 2)
    for w in range(bound):
        here = windows.present & (windows.window == w)
        if w and known_empty(here):
            break
        slot = torch.where(here, windows.place, size)
        index = torch.zeros(rows, size + 1, dtype=torch.long, device=y.device)
        index = index.scatter(1, slot, windows.order)[:, :size]
        valid = torch.zeros(rows, size + 1, dtype=torch.bool, device=y.device).scatter(1, slot, here)[:, :size]
        fresh = (windows.restart & here).any(1)
        now, initial = restart(now, full, fresh), choose(fresh, full, initial)
        position = torch.where(fresh, 0, position)
        k, v, g = _pick(new, row, index)
        k, v = (torch.where(valid[..., None], z, 0) for z in (k, v))
        read, now = scan(memory, now, k, k, v, g, initial=initial, mask=valid)
        target = torch.where(valid, index, tokens).unsqueeze(-1).expand(-1, -1, width)
        y = y.scatter(1, target, read.to(y.dtype))
        held = _record(held, Window(k, v, g), position, valid)
        position = (position + valid.sum(1)) % nest.period
        now, initial = _move(memory, nest, now, initial, held, (position == 0) & valid.any(1))
    return y[:, :tokens], NestedState(now, initial, position, False, held)
