"""Levels whose initial weights belong to the next slower level (nested CMS, NL Eq. 72).

Level l learns in periods of C_l from initial weights theta_0. Every C_{l+1} tokens

    theta_0 <- theta_0 + rho (theta - theta_0),    theta <- theta_0                        (knowledge transfer)

so that theta_0 changes at the frequency of the slower level, and what the faster one has learned since is let go, but
for the part rho. The slowest level keeps its own initial weights, a parameter; a document's start puts all back to
their parameters.

The difference ``theta - theta_0`` is first order. With theta_c the weights at the start of chunk c, L the objective of
the level and w_t the weight with which the gradient of token t is in theta at the end (`influence`),

    J(theta_0) = sum_t w_t L(M(x_t; theta_c(t)), v_t),    theta - theta_0 = - sum_t w_t dL_t / d theta_c(t)

which is ``- dJ / d theta_0`` if every write counts as a constant. A transfer by the exact meta-gradient goes through
the writes instead (`meta_gradient`):

    theta_0 <- theta_0 - rho dJ / d theta_0
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nestlearn.memory import AssociativeMemory, Gates, State, scan
from nestlearn.memory.clock import compaction, known_empty
from nestlearn.memory.kernels.products import segment_products
from nestlearn.memory.types import Weights
from nestlearn.nn.state import record

from .tape import gradients, usable

TransferBy = Literal["difference", "gradient"]


@record("cms.window")
class Window(NamedTuple):
    """What a nested level has read since its initial weights last moved: tokens in the slots before ``position``."""

    x: Float[Tensor, "b c d"]
    value: Float[Tensor, "b c d"]
    gates: Gates


@record("cms.nested")
class NestedState(NamedTuple):
    """The fast weights of a nested level and the initial weights they start from, every tensor ``[B, ...]``.

    ``position`` counts tokens since the initial weights last moved; ``aligned`` is static, True where every row is
    known to stand at such a moment. ``window`` holds the tokens since, where a meta-gradient will need them.
    """

    fast: State
    initial: Weights
    position: Int[Tensor, "b"]
    aligned: bool
    window: Window | None = None


class Nest(NamedTuple):
    """What moves initial weights: every ``period`` tokens (of the slower level) by ``rho`` of what was learned, or of
    the meta-gradient; ``initial`` are the parameters that a reset goes back to."""

    period: int
    rho: float
    initial: Weights
    by: TransferBy = "difference"


class Running(NamedTuple):
    """A `State` with the ``initial`` weights that it goes back to, which move themselves."""

    params: Weights
    momentum: Weights | None
    anchor: Weights
    initial: Weights
    position: Int[Tensor, "*b"]
    pending: Float[Tensor, "*b"] | None = None
    aligned: bool = False

    @classmethod
    def of(cls, state: State, initial: Weights) -> Running:
        """A state that goes on from here."""
        params, momentum, anchor, position, pending, aligned = state
        return cls(params, momentum, anchor, initial, position, pending, aligned)

    def state(self) -> State:
        """What the next call needs."""
        return State(self.params, self.momentum, self.anchor, self.position, self.pending, self.aligned)


def unpack_nested(state: NestedState) -> Running:
    """The memory of a nested level with its own initial weights."""
    return Running.of(state.fast, state.initial)


def start_nested(memory: AssociativeMemory, rows: int, width: int, initial: Weights) -> NestedState:
    """A fresh level: its initial weights are the parameters."""
    first = next(iter(initial.values()))
    state = memory.init_state((rows,), width, width, initial, dtype=first.dtype, device=first.device)
    return NestedState(state, state.params, torch.zeros_like(state.position), True)


def transfer(state: Running, rho: float, rows: Bool[Tensor, "b"] | None = None) -> Running:
    """``theta_0 <- theta_0 + rho (theta - theta_0)``, ``theta <- theta_0`` in the given rows (None: in all).

    A period that is not over is flushed: theta holds what it has written so far.

    Example:
        >>> from nestlearn.memory import catalog
        >>> memory = catalog["ttt_linear"]
        >>> start = memory.init_state((1,), 1, 1)
        >>> state = Running.of(start._replace(params={"W": torch.ones(1, 1, 1)}), initial=start.params)
        >>> transfer(state, 0.5).params["W"].squeeze().tolist()
        0.5
    """
    moved = {n: w + rho * (state.params[n] - w) for n, w in state.initial.items()}
    return restart(state, moved, rows)


def influence(gates: Gates) -> Float[Tensor, "b t"]:
    """``w_t = eta_t sum_{s >= t} (beta_{t+1} ... beta_s) (alpha_{s+1} ... alpha_T)``: how much of the gradient of token
    t is in the weights after the last one.

    Example:
        >>> half = torch.full((1, 3), 0.5)
        >>> influence(Gates(torch.ones(1, 3), half)).tolist(), influence(Gates(torch.ones(1, 3), half, half)).tolist()
        ([[0.25, 0.5, 1.0]], [[0.75, 1.0, 1.0]])
    """
    kept = segment_products(gates.retain)[..., -1, :]
    if gates.momentum is not None:
        kept = (segment_products(gates.momentum).mT @ kept.unsqueeze(-1)).squeeze(-1)
    return gates.lr * kept


def meta_gradient(memory: AssociativeMemory, state: Running, window: Window) -> Weights:
    """``dJ / d theta_0`` through all writes of a window of tokens that a level begins at theta_0 = ``state.initial``.

    The window is read once more, and differentiated in any mode of autograd; under an outer gradient the result can be
    differentiated again. A row that a token has spoiled gets NaN.

    Example:
        >>> from nestlearn.memory import catalog
        >>> memory = catalog["ttt_linear"]
        >>> x = torch.ones(1, 1, 1)
        >>> window = Window(x, 3 * x, Gates(torch.full((1, 1), 0.5), torch.ones(1, 1)))
        >>> start = memory.init_state((1,), 1, 1)
        >>> meta_gradient(memory, Running.of(start, start.params), window)["W"].item()
        -1.5
    """
    outer = torch.is_grad_enabled()
    with gradients():
        initial, (x, value, gates) = usable((state.initial, window))
        start = {n: w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for n, w in initial.items()}
        fresh = restart(state, start, None)
        y, _ = scan(memory, fresh.state(), x, x, value, gates, initial=start, read="chunk", return_state=False)
        objective = (influence(gates) * memory.objective.loss(y, value)).sum()
        slopes = torch.autograd.grad(objective, list(start.values()), create_graph=outer)
    whole = y.detach().isfinite().all(-1).all(-1)[:, None, None]
    return {n: torch.where(whole, slope, torch.nan) for n, slope in zip(start, slopes, strict=True)}


def restart(state: Running, initial: Weights, rows: Tensor | None) -> Running:
    """Rows that start from ``initial`` with nothing written."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return new if rows is None else torch.where(rows.view(-1, *(1,) * (old.dim() - 1)), new, old)

    # In the order of the state: trees of states are compared by it.
    weights = {n: choose(initial[n], w) for n, w in state.initial.items()}
    momentum = state.momentum
    if momentum is not None:
        momentum = {n: choose(torch.zeros_like(s), s) for n, s in momentum.items()}
    return Running(
        {n: choose(w, state.params[n]) for n, w in weights.items()},
        momentum,
        {n: choose(w, state.anchor[n]) for n, w in weights.items()},
        weights,
        choose(torch.zeros_like(state.position), state.position),
        None if state.pending is None else choose(torch.zeros_like(state.pending), state.pending),
        aligned=rows is None or state.aligned,
    )


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
        state = start_nested(memory, x.shape[0], x.shape[-1], nest.initial)
        if nest.by == "gradient":
            state = state._replace(window=_empty(new, nest.period))
    if state.aligned and mask is None and reset is None:
        return _scan_aligned(memory, nest, state, new)
    return _scan_windows(memory, nest, state, new, mask, reset)


def _empty(like: Window, slots: int) -> Window:
    """A window of so many slots."""

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], slots, *x.shape[2:])

    return Window(zeros(like.x), zeros(like.value), like.gates.map(zeros))


def _pick(new: Window, rows: Tensor | slice, tokens: Tensor | slice) -> Window:
    """Some tokens."""
    return Window(new.x[rows, tokens], new.value[rows, tokens], new.gates.map(lambda gate: gate[rows, tokens]))


def _record(held: Window | None, new: Window, position: Int[Tensor, "b"], valid: Bool[Tensor, "b t"]) -> Window | None:
    """The window with the valid ones of new tokens after its first ``position``; valid ones come first."""
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


def _move(memory: AssociativeMemory, nest: Nest, state: Running, window: Window | None, rows: Tensor | None) -> Running:
    """The state of the given rows (None: all) after their initial weights have moved."""
    if nest.by == "difference" or window is None:
        return transfer(state, nest.rho, rows)
    if rows is not None and known_empty(rows):
        return state
    slopes = meta_gradient(memory, state, window)
    return restart(state, {n: w - nest.rho * slopes[n] for n, w in state.initial.items()}, rows)


def _scan_aligned(memory: AssociativeMemory, nest: Nest, state: NestedState, new: Window) -> tuple[Tensor, NestedState]:
    """All rows at the start of a window, every token real."""
    now, outputs, tokens, window = unpack_nested(state), [], new.x.shape[1], state.window
    for first in range(0, tokens, nest.period):
        here = _pick(new, slice(None), slice(first, first + nest.period))
        y, end = scan(memory, now.state(), here.x, here.x, here.value, here.gates, initial=now.initial)
        now = Running.of(end, now.initial)
        outputs.append(y)
        if y.shape[1] == nest.period:
            now = _move(memory, nest, now, here, None)
        else:
            everyone = torch.ones_like(here.gates.lr, dtype=torch.bool)
            window = _record(window, here, state.position, everyone)
    position = torch.full_like(state.position, tokens % nest.period)
    return torch.cat(outputs, 1), NestedState(now.state(), now.initial, position, tokens % nest.period == 0, window)


class Windows(NamedTuple):
    """The real tokens of every row by window: ``window`` and ``place`` (the slot in it) of each, ``present`` whether
    there is one, ``restart`` whether it resets the row, ``order`` where it stands among the given ones."""

    order: Int[Tensor, "b t"]
    present: Bool[Tensor, "b t"]
    restart: Bool[Tensor, "b t"]
    window: Int[Tensor, "b t"]
    place: Int[Tensor, "b t"]


def find_windows(
    position: Int[Tensor, "b"], tokens: int, outer: int, mask: Tensor | None, reset: Tensor | None
) -> Windows:
    """Windows end after ``outer`` tokens and before a reset."""
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
    """Rows of any phase: window by window, each brought to slots of its own."""
    rows, tokens, width = new.x.shape
    windows = find_windows(state.position, tokens, nest.period, mask, reset)
    now, position, held = unpack_nested(state)._replace(aligned=False), state.position, state.window
    size, y = min(nest.period, tokens), new.x.new_zeros(rows, tokens + 1, width)
    row = torch.arange(rows, device=y.device)[:, None]
    full = {n: w.expand_as(now.initial[n]) for n, w in nest.initial.items()}
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
        now, position = restart(now, full, fresh), torch.where(fresh, 0, position)
        k, v, g = _pick(new, row, index)
        k, v = (torch.where(valid[..., None], z, 0) for z in (k, v))
        read, end = scan(memory, now.state(), k, k, v, g, initial=now.initial, mask=valid)
        now = Running.of(end, now.initial)
        target = torch.where(valid, index, tokens).unsqueeze(-1).expand(-1, -1, width)
        y = y.scatter(1, target, read.to(y.dtype))
        held = _record(held, Window(k, v, g), position, valid)
        position = (position + valid.sum(1)) % nest.period
        now = _move(memory, nest, now, held, (position == 0) & valid.any(1))
    return y[:, :tokens], NestedState(now.state(), now.initial, position, False, held)
