"""The chunked engine of the memories that are not plain: mirror maps, gates per channel, writes at chunk ends.

The same spans and the same order of work as in `chunked`; what differs is how a span is read and how it ends:

- a mirror map (`mirror`): accumulators evolve in closed form; a token reads a function of them, for `Lq` a multiple,
  for every other one computed token by token;
- one retention gate per channel (`channels`): kernels per channel;
- orthogonalized momentum (`orthogonal`): weights decay inside a chunk and are written when it ends.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from .algorithms import OrthogonalizedMomentum
from .associative import AssociativeMemory
from .channels import open_channels
from .chunked import Tokens, anchored, revive, split_tokens, spoil_before_reset
from .clock import Grid, known_empty, place, scatter_outputs, short_span, span_length
from .forms import Span
from .mirror import open_mirror
from .objectives import with_threshold
from .orthogonal import open_orthogonal
from .retention import Lq, Retention, is_linear, is_per_channel
from .types import Factor, Gates, Running, Weights

LONGEST_DENSE_SPAN = 16
"""Tokens whose weights are computed one by one share one set of entering weights."""


def longest_span(memory: AssociativeMemory, tokens: int, how: str) -> int:
    """Tokens processed at once."""
    token_by_token = not (is_linear(memory.retention) or isinstance(memory.retention, Lq)) and how == "token"
    if token_by_token or is_per_channel(memory.retention):
        return short_span(memory.chunk_size, tokens, LONGEST_DENSE_SPAN)
    return span_length(memory.chunk_size, tokens)


def open_span(
    memory: AssociativeMemory, state: Running, factors: dict[str, Factor], tokens: Tokens, closing: Tensor | None
) -> Span:
    """How this memory reads a span and goes on after it."""
    if is_per_channel(memory.retention):
        return open_channels(memory, state, factors, tokens)
    if isinstance(memory.algorithm, OrthogonalizedMomentum):
        return open_orthogonal(memory, memory.algorithm, state, factors, tokens, closing)
    return open_mirror(memory, state, factors, tokens)


def changes_at_chunk_end(retention: Retention) -> bool:
    """Whether the retention has a `close` of its own."""
    return type(retention).close is not Retention.close


def close_chunk(memory: AssociativeMemory, state: Running, closes: Tensor | None) -> Running:
    """The state with ``Retention.close`` applied where a row's chunk ends (None: everywhere)."""
    if not changes_at_chunk_end(memory.retention):
        return state
    ended = {name: memory.retention.close(a) for name, a in state.params.items()}
    if closes is not None:
        rows = closes[..., None, None]
        ended = {name: torch.where(rows, a, state.params[name]) for name, a in ended.items()}
    return state._replace(params=ended)


def run_span(
    memory: AssociativeMemory,
    state: Running,
    tokens: Tokens,
    how: str,
    closing: Bool[Tensor, "b c"] | None,
    update: bool = True,
) -> tuple[Tensor, Running]:
    """Outputs of one span and the state after it; ``closing`` marks the last tokens of chunks (None: none)."""
    assert tokens.q is not None
    lost = None
    if tokens.reset is not None:
        state, lost = revive(state, tokens.reset)
        state = state._replace(pending=None if state.pending is None else torch.where(lost, 0, state.pending))
    retention = memory.retention
    at_anchor = {name: retention.anchored(a) for name, a in state.anchor.items()}
    at_initial: Weights = {}
    if tokens.reset is not None:
        at_initial = {name: retention.anchored(a) for name, a in state.initial.items()}
    linear, adjoint = anchored(at_anchor, at_initial, tokens.reset)
    y = memory.architecture(linear, tokens.q) if how == "chunk" else None
    if y is None or update:
        objective = with_threshold(memory.objective, tokens.gates.threshold)
        factors = memory.architecture.factors(linear, adjoint, tokens.k, tokens.v, objective)
        span = open_span(memory, state, factors, tokens, closing)
        if y is None:
            y = memory.architecture(span.read, tokens.q)
        state = span.advance() if update else state
    if lost is not None and tokens.reset is not None:
        y = spoil_before_reset(y, lost, tokens.reset)
    return y, state


def absorb_span(
    memory: AssociativeMemory,
    state: Running,
    factors: dict[str, Factor],
    gates: Gates,
    finished: Tensor,
    valid: Tensor | None = None,
) -> Running:
    """The state after tokens of one chunk whose factors are given; ``finished: [*b]`` marks rows whose chunk ends.

    Gates and factors of tokens that are not ``valid`` are neutral already.
    """
    empty = next(iter(factors.values())).input
    closing = None
    # On a CPU looking costs nothing, and what only the end of a chunk needs is left out inside it.
    if not known_empty(finished):
        last = torch.arange(gates.lr.shape[-1], device=finished.device) == gates.lr.shape[-1] - 1
        closing = finished.unsqueeze(-1) & last
    end = open_span(memory, state, factors, Tokens(None, empty, empty, gates, valid), closing).advance()
    return close_chunk(memory, end, finished)


def scan(
    memory: AssociativeMemory,
    state: Running,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    mask: Tensor | None,
    reset: Tensor | None,
    how: str,
    *,
    return_state: bool = True,
) -> tuple[Tensor, Running]:
    """Run the recurrence span by span over rows ``[b, t, d]``. Arguments are validated by `nestlearn.memory.scan`."""
    tokens = k.shape[1]
    span = longest_span(memory, tokens, how)
    whole = memory.chunk_size % span == 0 or span == tokens
    if state.aligned and mask is None and reset is None and whole:
        return _scan_aligned(memory, state, q, k, v, gates, how, span, return_state)
    grid = place(state.position, tokens, memory.chunk_size, span, mask, reset)
    return _scan_placed(memory, state, q, k, v, gates, how, grid)


def _scan_aligned(
    memory: AssociativeMemory,
    state: Running,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    how: str,
    span: int,
    return_state: bool,
) -> tuple[Tensor, Running]:
    """All rows at the start of a chunk, every token real: where chunks end is known without looking."""
    tokens, chunk = k.shape[1], memory.chunk_size
    outputs = []
    pieces = split_tokens((q, k, v, *gates), span)
    # Writes from this token on are never read: a chunk read sees only the chunks before it.
    needed = (tokens - 1) // chunk * chunk if how == "chunk" else (len(pieces) - 1) * span
    for i, (q_i, k_i, v_i, *here) in enumerate(pieces):
        begin, end = i * span, min((i + 1) * span, tokens)
        if begin % chunk == 0:
            state = state._replace(anchor=state.params)
        closing = None
        if end % chunk == 0:
            closing = (torch.arange(begin, end, device=k.device) == end - 1).expand(k.shape[0], -1)
        part = Tokens(q_i, k_i, v_i, Gates(*here))
        y, state = run_span(memory, state, part, how, closing, update=return_state or begin < needed)
        if end % chunk == 0:
            state = close_chunk(memory, state, None)
        outputs.append(y)
    if tokens % chunk == 0:
        state = state._replace(anchor=state.params)
    position = torch.full_like(state.position, tokens % chunk)
    return torch.cat(outputs, 1), state._replace(position=position, aligned=tokens % chunk == 0)


def closing_slots(grid: Grid, chunk_size: int) -> Bool[Tensor, "b n c"]:
    """Slots whose token is the last of its chunk. A span holds at most one: it is no longer than a chunk, and the
    only span that goes on beyond the end of a chunk is one whose next token resets the row."""
    slots = torch.arange(grid.index.shape[-1], device=grid.index.device)
    phase = grid.phase.unsqueeze(-1) + slots
    if grid.reset is not None:
        last = torch.where(grid.reset, slots, -1).cummax(-1).values
        phase = torch.where(last >= 0, slots - last, phase)
    return grid.valid & ((phase + 1) % chunk_size == 0)


def _scan_placed(
    memory: AssociativeMemory, state: Running, q: Tensor, k: Tensor, v: Tensor, gates: Gates, how: str, grid: Grid
) -> tuple[Tensor, Running]:
    """Rows of any phase, masks and resets: every token in the slot that the grid gives it."""
    rows, spans, _ = grid.index.shape
    tokens = k.shape[1]
    row = torch.arange(rows, device=k.device)[:, None, None]

    def placed(x: Tensor, empty: float) -> Tensor:
        x = x[row, grid.index]
        return torch.where(grid.valid if x.dim() == 3 else grid.valid.unsqueeze(-1), x, empty)

    q, k, v = (placed(x, 0) for x in (q, k, v))
    # An empty slot keeps everything.
    kept = zip(gates, (0, 1, 1, 0), strict=True)
    lr, retain, beta, threshold = (None if gate is None else placed(gate, empty) for gate, empty in kept)
    closing, outputs = closing_slots(grid, memory.chunk_size), []
    for i in range(spans):
        begins = (grid.phase[:, i] == 0)[:, None, None]
        anchor = {n: torch.where(begins, w, state.anchor[n]) for n, w in state.params.items()}
        state = state._replace(anchor=anchor)
        here = Gates(*(None if gate is None else gate[:, i] for gate in (lr, retain, beta, threshold)))  # type: ignore[arg-type]
        valid, reset = grid.valid[:, i], None if grid.reset is None else grid.reset[:, i]
        part = Tokens(q[:, i], k[:, i], v[:, i], here, valid, reset)
        y, state = run_span(memory, state, part, how, closing[:, i])
        state = close_chunk(memory, state, _ends(closing[:, i], valid))
        if reset is not None:
            # What follows a reset in the same chunk still takes its errors at the initial weights.
            restarted = reset.any(-1)[:, None, None]
            state = state._replace(anchor={n: torch.where(restarted, state.initial[n], w) for n, w in anchor.items()})
        outputs.append(y)
    y = torch.stack(outputs, 1)
    ended = (grid.end == 0)[:, None, None]
    anchor = {n: torch.where(ended, w, state.anchor[n]) for n, w in state.params.items()}
    return scatter_outputs(y, grid, tokens), state._replace(anchor=anchor, position=grid.end, aligned=False)


def _ends(closing: Bool[Tensor, "b c"], valid: Bool[Tensor, "b c"]) -> Bool[Tensor, "b"]:
    """Rows whose last token of the span is the last of its chunk."""
    last = valid & ~torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], 1)
    return (closing & last).any(-1)


def explain_general(memory: AssociativeMemory) -> list[str]:
    """What differs from a plain memory, for `nestlearn.memory.explain`."""
    retention, name = memory.retention, type(memory.retention).__name__
    reasons = []
    if is_per_channel(retention):
        reasons.append(f"one retention gate per channel: kernels per channel, in spans of {LONGEST_DENSE_SPAN} tokens")
    elif isinstance(memory.algorithm, OrthogonalizedMomentum):
        reasons.append(
            "at chunk boundaries the momentum is orthogonalized (Newton-Schulz) and written; "
            "inside a chunk weights only decay"
        )
    elif isinstance(retention, Lq):
        reasons.append(f"{name} takes its norm at chunk boundaries; token reads are the closed form times one number")
    elif not is_linear(retention):
        reasons.append(f"{name} makes weights from accumulators; errors see those of chunk boundaries")
        if memory.read == "token":
            reasons.append(
                f"a token reads its own weights, computed densely {LONGEST_DENSE_SPAN} tokens at a time; "
                "read='chunk' avoids it"
            )
    if changes_at_chunk_end(retention):
        reasons.append(f"{name} changes the accumulators when a chunk ends")
    return reasons
