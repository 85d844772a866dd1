"""The fast engine: spans of tokens in closed form, inner gradients by hand.

Equal to `reference.scan` in outputs, final state and outer gradients. No inner autograd, so it runs under
``torch.inference_mode()`` and is differentiable for training; no host synchronisation on accelerators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .associative import AssociativeMemory
from .clock import Grid, known_empty, place, scatter_outputs, span_length
from .kernels.products import product
from .objectives import with_threshold
from .retention import Delta
from .span import Entering, Erasure, Kernels, Writes, advance, contain, erase, make_kernels, read, write, write_kept
from .types import Factor, Gates, Running, Weights


class Prepared(NamedTuple):
    """What a span needs that depends on gates and keys alone; memories that share those share this too."""

    kernels: Kernels
    erasures: dict[str, Erasure]  # of the map that sees the keys; empty without delta retention

    def map(self, change: Callable[[Tensor], Tensor]) -> Prepared:
        """``change`` applied to every tensor."""
        kernels = Kernels(*(None if x is None else change(x) for x in self.kernels))  # type: ignore[arg-type]
        return Prepared(kernels, {n: Erasure(*map(change, e)) for n, e in self.erasures.items()})


class Tokens(NamedTuple):
    """The tokens of one span, rows flattened to one dimension."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    gates: Gates
    valid: Tensor | None = None
    reset: Tensor | None = None
    prepared: Prepared | None = None


PREPARED_TOKENS = 1024
"""Tokens prepared at once: enough to fill a machine, few beside the spans' own tensors."""


def dense(weights: Weights):
    """``linear(name, x) = x W^T`` with the same weights for all tokens."""
    return lambda name, x: product(x, weights[name].mT)


def anchored(anchor: Weights, initial: Weights, reset: Tensor | None):
    """``linear`` and ``adjoint`` at the anchor; tokens from a reset on see the initial weights instead."""
    if reset is None:
        return dense(anchor), lambda name, e: product(e, anchor[name])
    after = reset.cummax(-1).values.unsqueeze(-1)

    def linear(name: str, x: Tensor) -> Tensor:
        return torch.where(after, product(x, initial[name].mT), product(x, anchor[name].mT))

    def adjoint(name: str, e: Tensor) -> Tensor:
        return torch.where(after, product(e, initial[name]), product(e, anchor[name]))

    return linear, adjoint


def span_kernels(memory: AssociativeMemory, gates: Gates, valid: Tensor | None, reset: Tensor | None) -> Kernels:
    """The kernels of a span for this memory's retention and algorithm."""
    delta, gated = isinstance(memory.retention, Delta), False
    if isinstance(memory.retention, Delta):
        gated = memory.retention.gated
    return make_kernels(
        gates.retain,
        gates.momentum,
        valid,
        reset,
        delta=delta,
        gated=gated,
        restart=memory.retain_to == "zero",
    )


def prepare(memory: AssociativeMemory, keys: Sequence[Tensor], gates: Sequence[Gates]) -> list[Prepared]:
    """Kernels and erasures of several spans without masks or resets, computed together where lengths agree.

    ``keys[i]: [b, c, d]``, ``gates[i]``: each ``[b, c]``. One large operation costs less than many small ones.
    """
    if len({k.shape[1] for k in keys}) > 1:
        return prepare(memory, keys[:-1], gates[:-1]) + prepare(memory, keys[-1:], gates[-1:])
    together = Gates(*(None if g[0] is None else torch.stack(g, 1) for g in zip(*gates, strict=True)))  # type: ignore[arg-type]
    kernels = span_kernels(memory, together, None, None)
    erasures = {}
    if isinstance(memory.retention, Delta):
        name = memory.architecture.query_map
        kind = memory.step_size_of(name)
        erasures[name] = erase(kernels, torch.stack(list(keys), 1), kind, together.lr, together.retain)
    # One unbind a tensor: the gradient of a slice would be a full-size tensor of zeros.
    per_span = [Kernels(*x) for x in zip(*(_spans(x, len(keys)) for x in kernels), strict=True)]
    solved = {n: [Erasure(*x) for x in zip(*(y.unbind(1) for y in e), strict=True)] for n, e in erasures.items()}
    return [Prepared(here, {n: e[i] for n, e in solved.items()}) for i, here in enumerate(per_span)]


def _spans(x: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if x is None else x.unbind(1)


def entering(memory: AssociativeMemory, state: Running, name: str, reset: Tensor | None) -> Entering:
    """The entering weights of one map, as the distance to initial if retention pulls there."""
    momentum = None if state.momentum is None else state.momentum[name]
    if memory.retain_to == "initial":
        known = state.displacement
        if known is not None:
            return Entering(known[name], momentum)
        # The very same tensor: a fresh memory, known without looking, has distance 0.
        fresh = state.params[name] is state.initial[name]
        return Entering(None if fresh else state.params[name] - state.initial[name], momentum)
    return Entering(state.params[name], momentum, None if reset is None else state.initial[name])


def absorb_span(
    memory: AssociativeMemory, state: Running, factors: dict[str, Factor], tokens: Tokens, *, guard: bool = True
) -> tuple[Kernels, dict[str, Entering], dict[str, Writes]]:
    """Kernels, entering weights and writes of every map for one span.

    ``guard=False``: the caller's bounds rule out a write that overflows, which need not be looked for.
    """
    kernels, erasures = tokens.prepared or (span_kernels(memory, tokens.gates, tokens.valid, tokens.reset), {})
    starts = {name: entering(memory, state, name, tokens.reset) for name in factors}
    writes = {}
    for name, (x, error) in factors.items():
        lr, retain = tokens.gates.lr, tokens.gates.retain
        if isinstance(memory.retention, Delta):
            erasure = erasures.get(name) or erase(kernels, x, memory.step_size_of(name), lr, retain)
            written = write(kernels, x, error, erasure, starts[name])
        else:
            written = write_kept(kernels, x, error, lr)
        writes[name] = contain(written) if guard else written
    return kernels, starts, writes


def advance_span(
    memory: AssociativeMemory,
    state: Running,
    kernels: Kernels,
    starts: dict[str, Entering],
    writes: dict[str, Writes],
    valid: Tensor | None,
    *,
    settle: bool = True,
) -> Running:
    """The state after a span; rows without a valid token keep theirs to the last bit.

    ``settle=False``: the next span has the same anchor, so that the distance to the initial weights is all it needs.
    """
    params: Weights = {}
    momentum: Weights = {}
    distance: Weights = {}
    for name in writes:
        w, s = advance(kernels, writes[name], starts[name])
        if memory.retain_to == "initial":
            distance[name] = w
            w = state.initial[name] + w if settle or valid is not None else state.params[name]
        if valid is not None:
            some = valid.any(-1)[..., None, None]
            w = torch.where(some, w, state.params[name])
            s = None if s is None or state.momentum is None else torch.where(some, s, state.momentum[name])
        params[name] = w
        if s is not None:
            momentum[name] = s
    # Where a row keeps its weights to the bit, the distance must follow the weights.
    kept = distance if distance and valid is None else None
    return state._replace(params=params, momentum=momentum or None, displacement=kept)


def revive(state: Running, reset: Tensor) -> tuple[Running, Tensor]:
    """Rows whose weights are not finite go back to initial if this span resets them, and are named.

    The closed form forgets by a factor 0, which does not clear NaN.
    """
    lost = torch.zeros_like(reset[..., 0])
    for w in state.params.values():
        lost = lost | ~torch.isfinite(w.detach().sum((-2, -1)))
    lost = lost & reset.any(-1)
    if known_empty(lost):
        return state, lost
    rows = lost[..., None, None]

    def back(weights: Weights) -> Weights:
        return {name: torch.where(rows, state.initial[name], w) for name, w in weights.items()}

    momentum = state.momentum
    if momentum is not None:
        momentum = {name: torch.where(rows, 0, s) for name, s in momentum.items()}
    return state._replace(params=back(state.params), anchor=back(state.anchor), momentum=momentum), lost


def spoil_before_reset(y: Tensor, lost: Tensor, reset: Tensor) -> Tensor:
    """Outputs ``[*b, c, d]`` of a span, NaN where a row that `revive` named had not been reset yet."""
    if known_empty(lost):
        return y
    return torch.where((lost[..., None] & ~reset.cummax(-1).values)[..., None], torch.nan, y)


def run_span(
    memory: AssociativeMemory, state: Running, tokens: Tokens, how: str, *, update: bool = True, guard: bool = True
) -> tuple[Tensor | None, Running]:
    """Outputs of one span and the state after it. ``update=False`` skips the new state where it is not needed."""
    if tokens.reset is not None:
        state, lost = revive(state, tokens.reset)
        y, state = _run_span(memory, state, tokens, how, update, guard)
        return None if y is None else spoil_before_reset(y, lost, tokens.reset), state
    return _run_span(memory, state, tokens, how, update, guard)


def _run_span(
    memory: AssociativeMemory, state: Running, tokens: Tokens, how: str, update: bool, guard: bool
) -> tuple[Tensor | None, Running]:
    linear, adjoint = anchored(state.anchor, state.initial, tokens.reset)
    y = None
    if how == "chunk" and tokens.q is not None:
        y = memory.architecture(linear, tokens.q)
        if not update:
            return y, state
    objective = with_threshold(memory.objective, tokens.gates.threshold)
    factors = memory.architecture.factors(linear, adjoint, tokens.k, tokens.v, objective)
    kernels, starts, writes = absorb_span(memory, state, factors, tokens, guard=guard)
    if how == "token" and tokens.q is not None:

        def token_linear(name: str, x: Tensor) -> Tensor:
            base = state.initial[name] if memory.retain_to == "initial" else None
            return read(kernels, writes[name], starts[name], x, base)

        y = memory.architecture(token_linear, tokens.q)
    if update:
        state = advance_span(memory, state, kernels, starts, writes, tokens.valid)
    return y, state


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
    if state.aligned and mask is None and reset is None:
        return _scan_aligned(memory, state, q, k, v, gates, how, return_state)
    tokens = k.shape[1]
    span = span_length(memory.chunk_size, tokens)
    grid = place(state.position, tokens, memory.chunk_size, span, mask, reset)
    return _scan_placed(memory, state, q, k, v, gates, how, grid)


def split_tokens(tensors: tuple[Tensor | None, ...], size: int) -> list[tuple[Any, ...]]:
    """Cut tensors ``[b, t, ...]`` along t into pieces of ``size``, grouped by piece.

    One split, not slices: the gradient of a slice is a full-size tensor of zeros.
    """
    first = next(x for x in tensors if x is not None)
    count = -(-first.shape[1] // size)
    columns = [[None] * count if x is None else list(x.split(size, 1)) for x in tensors]
    return list(zip(*columns, strict=True))


def _scan_aligned(
    memory: AssociativeMemory,
    state: Running,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    how: str,
    return_state: bool,
) -> tuple[Tensor, Running]:
    tokens, chunk = k.shape[1], memory.chunk_size
    span = span_length(chunk, tokens)
    outputs = []
    pieces = split_tokens((q, k, v, *gates), span)
    # Writes from this token on are never read: a chunk read sees only the chunks before it.
    needed = (tokens - 1) // chunk * chunk if how == "chunk" else (len(pieces) - 1) * span
    group = max(1, PREPARED_TOKENS // span)
    prepared: list[Prepared] = []
    for i, (q_i, k_i, v_i, *here) in enumerate(pieces):
        if i * span % chunk == 0:
            state = state._replace(anchor=state.params)
        if i % group == 0:
            ahead = pieces[i : i + group]
            prepared = prepare(memory, [k for _, k, *_ in ahead], [Gates(*gates) for _, _, _, *gates in ahead])
        update = return_state or i * span < needed
        tokens_i = Tokens(q_i, k_i, v_i, Gates(*here), prepared=prepared[i % group])
        y, state = run_span(memory, state, tokens_i, how, update=update)
        outputs.append(y)
    if tokens % chunk == 0:
        state = state._replace(anchor=state.params)
    position = torch.full_like(state.position, tokens % chunk)
    return torch.cat(outputs, 1), state._replace(position=position, displacement=None, aligned=tokens % chunk == 0)


def _scan_placed(
    memory: AssociativeMemory, state: Running, q: Tensor, k: Tensor, v: Tensor, gates: Gates, how: str, grid: Grid
) -> tuple[Tensor, Running]:
    rows, spans, _ = grid.index.shape
    row = torch.arange(rows, device=k.device)[:, None, None]
    q_s, k_s, v_s = (torch.where(grid.valid[..., None], x[row, grid.index], 0) for x in (q, k, v))
    lr = torch.where(grid.valid, gates.lr[row, grid.index], 0)
    retain = torch.where(grid.valid, gates.retain[row, grid.index], 1)
    beta = None if gates.momentum is None else torch.where(grid.valid, gates.momentum[row, grid.index], 1)
    threshold = None if gates.threshold is None else torch.where(grid.valid, gates.threshold[row, grid.index], 0)
    outputs = []
    for i in range(spans):
        begins = (grid.phase[:, i] == 0)[:, None, None]
        anchor = {n: torch.where(begins, w, state.anchor[n]) for n, w in state.params.items()}
        state = state._replace(anchor=anchor)
        at_i = (None if gate is None else gate[:, i] for gate in (beta, threshold))
        here = Gates(lr[:, i], retain[:, i], *at_i)
        valid, reset = grid.valid[:, i], None if grid.reset is None else grid.reset[:, i]
        y, state = run_span(memory, state, Tokens(q_s[:, i], k_s[:, i], v_s[:, i], here, valid, reset), how)
        if reset is not None:
            # What follows a reset in the same chunk still takes its errors at the initial weights.
            restarted = reset.any(-1)[:, None, None]
            state = state._replace(anchor={n: torch.where(restarted, state.initial[n], w) for n, w in anchor.items()})
        outputs.append(y)
    y = torch.stack(outputs, 1)
    ended = (grid.end == 0)[:, None, None]
    anchor = {n: torch.where(ended, w, state.anchor[n]) for n, w in state.params.items()}
    return scatter_outputs(y, grid, k.shape[1]), state._replace(anchor=anchor, position=grid.end, aligned=False)
