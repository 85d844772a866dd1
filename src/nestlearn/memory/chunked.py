"""The fast engine: spans of tokens in closed form, inner gradients by hand.

Equal to `reference.scan` in outputs, final state and outer gradients. No inner autograd, so it runs under
``torch.inference_mode()`` and is differentiable for training; no host synchronisation on accelerators.

`run` is `nestlearn.memory.scan` without its checks, on rows of one dimension: what a layer calls that has made its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .algorithms import Descent
from .architectures import Linear, Matrix
from .associative import AssociativeMemory
from .clock import Clock, Rows, Span, choose, known_empty, span_length
from .kernels.delta_span import delta_span
from .kernels.products import limit_gradient, product, unit_norm
from .objectives import with_threshold
from .proximal import model_factors
from .retention import Delta, Oja, Retention, is_linear, is_per_channel
from .spans import Opened, Running, Update, has_closed_form, longest_span, open_span
from .spans.ahead import prepare
from .spans.base import Prepared
from .spans.delta import step_size
from .types import Factor, Gates, State, Tokens, Weights

PREPARED_TOKENS = 1024
"""Tokens prepared at once: enough to fill a machine, few next to the spans' own tensors."""

Solve = Callable[[AssociativeMemory, Running, Update], Opened]
"""How the tokens of a span are solved: `open_span`, or a kernel."""

LONGEST_WRITE = 64
"""Tokens that `absorb` writes at once: more would spend longer on the triangular systems than they save."""


def at_anchor(anchor: Weights, initial: Weights, reset: Tensor | None) -> tuple[Linear, Linear]:
    """``linear`` and ``adjoint`` at the anchor; tokens from a reset on see the initial weights instead."""
    if reset is None:
        return lambda name, x: product(x, anchor[name].mT), lambda name, e: product(e, anchor[name])
    after = reset.cummax(-1).values.unsqueeze(-1)

    def linear(name: str, x: Tensor) -> Tensor:
        return torch.where(after, product(x, initial[name].mT), product(x, anchor[name].mT))

    def adjoint(name: str, e: Tensor) -> Tensor:
        return torch.where(after, product(e, initial[name]), product(e, anchor[name]))

    return linear, adjoint


def seen_weights(memory: AssociativeMemory, anchor: Weights) -> Weights:
    """The weights that errors and chunk reads see, given the accumulators at the start of the chunk."""
    return {name: memory.retention.anchored(a) for name, a in anchor.items()}


def find_factors(
    memory: AssociativeMemory, linear: Linear, adjoint: Linear, k: Tensor, v: Tensor, threshold: Tensor | None
) -> dict[str, Factor]:
    """Input and error of every map at the anchor."""
    target = _target(memory, linear, k, v)
    objective = with_threshold(memory.objective, threshold)
    if memory.follows_weights:
        return model_factors(memory.architecture, linear, adjoint, k, target, objective)
    return memory.architecture.factors(linear, adjoint, k, target, objective)


def _target(memory: AssociativeMemory, linear: Linear, k: Tensor, v: Tensor) -> Tensor:
    """What the keys are associated with: ``AssociativeMemory.values``."""
    if memory.values == "given":
        return v
    if isinstance(memory.values, str):
        return unit_norm(memory.architecture(linear, v))
    return -memory.values.error(lambda: memory.architecture(linear, k), v)


def reset_nonfinite(state: State, initial: Weights, reset: Tensor | None) -> tuple[State, Tensor | None]:
    """Rows whose weights are not finite go back to initial where this call resets them, and are named.

    The closed form forgets by a factor 0, which does not clear NaN.
    """
    if reset is None:
        return state, None
    broken = reset.any(-1)
    broken = broken & torch.stack([~w.detach().sum((-2, -1)).isfinite() for w in state.params.values()]).any(0)
    if known_empty(broken):
        return state, None
    momentum = state.momentum
    if momentum is not None:
        momentum = choose(broken, {name: torch.zeros_like(s) for name, s in momentum.items()}, momentum)
    pending = None if state.pending is None else torch.where(broken, 0, state.pending)
    params, anchor = choose(broken, initial, state.params), choose(broken, initial, state.anchor)
    return state._replace(params=params, anchor=anchor, momentum=momentum, pending=pending), broken


def enter(memory: AssociativeMemory, state: State, initial: Weights, *, fresh: bool = False) -> Running:
    """The state as spans hand it on: weights as their distance to what retention pulls toward.

    ``fresh``: the weights are the initial ones.
    """
    base = initial if memory.retain_to == "initial" else None
    weights: dict[str, Tensor | None] = dict(state.params)
    if base is not None:
        weights = {name: w - base[name] for name, w in state.params.items()}
        if fresh and _is_plain(memory):
            weights = dict.fromkeys(weights)
    return Running(weights, state.momentum, state.anchor, initial, base, state.pending)


def _is_plain(memory: AssociativeMemory) -> bool:
    """Whether one decay a token and weights that change at every token are all there is: the case worth preparing."""
    plain = has_closed_form(memory) and is_linear(memory.retention) and not memory.algorithm.writes_at_close
    return plain and not is_per_channel(memory.retention) and not isinstance(memory.retention, Oja)


def leave(running: Running, position: Tensor, aligned: bool) -> State:
    """The state after the last span; rows at the start of a chunk take their errors at the current weights."""
    params = running.params()
    anchor = choose(True if aligned else position == 0, params, running.anchor)
    return State(params, running.momentum, anchor, position, running.pending, aligned)


def run(
    memory: AssociativeMemory,
    state: State,
    tokens: Tokens,
    initial: Weights,
    *,
    read_mode: str | None = None,
    fresh: bool = False,
    return_state: bool = True,
    prepared: Sequence[Prepared] | None = None,
    solve: Solve = open_span,
    sizes: bool = False,
) -> tuple[Tensor, State]:
    """Read rows ``[b, t, d]`` of tokens, span by span.

    Args:
        memory: any.
        state: of the rows, before the first token.
        tokens: finite, of the dtype of the weights.
        initial: the weights ``{map: [b, out, in]}`` that resets and retention go back to.
        read_mode: ``token`` or ``chunk``; None is the memory's own.
        fresh: whether the state is known to hold the initial weights.
        return_state: False skips the state after the last token; the returned one is then unspecified.
        prepared: of every span, where a memory of the same gates and keys has it.
        solve: how the tokens of a span are solved. Any other than `open_span` gets whole chunks as spans.
        sizes: outputs have one more column, the norm of what each token wrote (`write_sizes`).
    """
    q, k, v, gates, mask, reset = tokens
    how = memory.read if read_mode is None else read_mode
    count, chunk = k.shape[1], memory.chunk_size
    own = solve is open_span
    length = longest_span(memory, count, how) if own else min(chunk, count)
    clock = Clock.start(state.position, state.aligned, count, chunk, length, mask, reset)
    pieces = cut_tokens(clock, q, k, v, gates)
    ready = prepared
    if ready is None:
        alone = how == "token" and is_plain_delta(memory) and not sizes
        ready = prepare_ahead(memory, clock, pieces) if own and not alone else [None] * len(pieces)
    now = enter(memory, state, initial, fresh=fresh)
    # Writes from this token on are never read: a chunk read sees only the chunks before it.
    needed = (count - 1) // chunk * chunk if how == "chunk" else (len(pieces) - 1) * length
    outputs = []
    for i, (span, (q_i, k_i, v_i, gates_i), ahead) in enumerate(zip(clock.spans, pieces, ready, strict=True)):
        now = begin(now, span)
        update = return_state or clock.grid is not None or i * length < needed
        y, now = run_span(memory, now, span, q_i, k_i, v_i, gates_i, how, update, ahead, solve, sizes)
        outputs.append(y)
    y = clock.join(outputs)
    if not return_state:
        return y, state
    return y, keep_untouched(leave(now, clock.position, clock.aligned), state, mask)


def keep_untouched(end: State, start: State, mask: Tensor | None) -> State:
    """Rows without a token keep their weights to the last bit."""
    if mask is None:
        return end
    return end._replace(params=choose(mask.any(-1), end.params, start.params))


Piece = tuple[Tensor, Tensor, Tensor, Gates]
"""Queries, keys, values and gates of one span."""


def cut_tokens(
    clock: Clock, q: Tensor, k: Tensor, v: Tensor, gates: Gates
) -> list[tuple[Tensor, Tensor, Tensor, Gates]]:
    """Queries, keys, values and gates of every span; an empty slot writes nothing and keeps everything."""
    cut = [clock.cut(x) for x in (q, k, v)]
    neutral = zip(gates, (0, 1, 1, 0), strict=True)
    count = len(clock.spans)
    columns = [[None] * count if gate is None else clock.cut(gate, empty) for gate, empty in neutral]
    return list(zip(*cut, (Gates(*x) for x in zip(*columns, strict=True)), strict=True))  # type: ignore[arg-type]


def prepare_tokens(memory: AssociativeMemory, k: Tensor, gates: Gates) -> list[Prepared]:
    """What keys and gates decide, for every span of tokens from the start of a chunk on: see `run`."""
    size = longest_span(memory, k.shape[1], "token")
    columns = [None if gate is None else gate.split(size, 1) for gate in gates]
    keys = k.split(size, 1)
    cut = [Gates(*(None if column is None else column[i] for column in columns)) for i in range(len(keys))]  # type: ignore[arg-type]
    return prepare(memory, keys, cut)


def prepare_ahead(memory: AssociativeMemory, clock: Clock, pieces: Sequence[Piece]) -> Iterator[Prepared | None]:
    """What gates and keys alone decide, for many spans at once where that is possible."""
    if clock.grid is not None or not _is_plain(memory):
        yield from [None] * len(pieces)
        return
    group = max(1, PREPARED_TOKENS // clock.spans[0].length)
    for first in range(0, len(pieces), group):
        here = pieces[first : first + group]
        yield from prepare(memory, [k for _, k, _, _ in here], [gates for *_, gates in here])


def begin(running: Running, span: Span) -> Running:
    """The memory at the start of a span: where a chunk begins, errors are taken at the current weights."""
    if span.begins is False:
        return running
    return running._replace(anchor=choose(span.begins, running.params(), running.anchor))


def run_span(
    memory: AssociativeMemory,
    running: Running,
    span: Span,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    read_mode: str,
    update: bool,
    prepared: Prepared | None,
    solve: Solve = open_span,
    sizes: bool = False,
) -> tuple[Tensor, Running]:
    """Outputs of one span and the memory after it; ``update=False`` skips the latter.

    ``sizes``: outputs have one more column, as in `run`.
    """
    initial = seen_weights(memory, running.initial) if span.reset is not None else {}
    linear, adjoint = at_anchor(seen_weights(memory, running.anchor), initial, span.reset)
    y = memory.architecture(linear, q) if read_mode == "chunk" else None
    if y is not None and not update and not sizes:
        return y, running
    factors = find_factors(memory, linear, adjoint, k, v, gates.threshold)
    kernel = solve is open_span and not sizes and y is None and span.valid is None and span.reset is None
    if kernel and is_plain_delta(memory):
        return read_delta(memory, running, span, q, k, factors, gates)
    asked = Update(factors, gates, span.valid, span.reset, find_closing(memory, span, gates), prepared)
    opened = solve(memory, running, asked)
    if y is None:
        y = memory.architecture(opened.read, q)
    if sizes:
        y = torch.cat([y, write_sizes(memory, opened).to(y)], -1)
    if update:
        running = finish(memory, opened.advance(), span.ends, span.reset)
    return y, running


def is_plain_delta(memory: AssociativeMemory) -> bool:
    """Whether a span is that of one matrix under the delta rule, which has a kernel of its own."""
    one = isinstance(memory.architecture, Matrix) and isinstance(memory.retention, Delta)
    return one and type(memory.algorithm) is Descent


def read_delta(
    memory: AssociativeMemory,
    running: Running,
    span: Span,
    q: Tensor,
    k: Tensor,
    factors: dict[str, Factor],
    gates: Gates,
) -> tuple[Tensor, Running]:
    """`run_span` of such a span."""
    ((name, (_, error)),) = factors.items()
    step = step_size(memory.step_size_of(name), gates.lr, gates.retain, k)
    gated = isinstance(memory.retention, Delta) and memory.retention.gated
    y, weights = delta_span(q, k, -error, step, gates.retain, running.weights[name], gated=gated)
    if running.base is not None:
        y = y + product(q, running.base[name].mT)
    return y, finish(memory, running._replace(weights={name: weights}), span.ends, None)


@torch.no_grad()
def write_sizes(memory: AssociativeMemory, opened: Opened) -> Float[Tensor, "*b c 1"]:
    """``‖p_t‖`` of every token of a span, where its write into the map that sees keys is ``p_t k_t^T``."""
    assert opened.written is not None
    return torch.linalg.vector_norm(opened.written(memory.architecture.query_map), dim=-1, keepdim=True)


def finish(memory: AssociativeMemory, running: Running, ends: Rows, reset: Tensor | None) -> Running:
    """The memory after a span: what happens when a chunk ends, and errors at the initial weights after a reset."""
    if ends is not False and changes_at_close(memory.retention):
        params = running.params()
        closed = choose(ends, {name: memory.retention.close(a) for name, a in params.items()}, params)
        base = running.base
        running = running._replace(weights={n: w if base is None else w - base[n] for n, w in closed.items()})
    limit = memory.gradient_limit
    if limit is not None:
        limited = {n: None if w is None else limit_gradient(w, limit) for n, w in running.weights.items()}
        running = running._replace(weights=limited)
    if reset is not None:
        running = running._replace(anchor=choose(reset.any(-1), running.initial, running.anchor))
    return running


def find_closing(memory: AssociativeMemory, span: Span, gates: Gates) -> Tensor | None:
    """The last tokens of chunks, for an algorithm that writes there; None where there is none, if looking is free."""
    if not memory.algorithm.writes_at_close or span.ends is False:
        return None
    closing = span.closing(gates.lr.device)
    return None if known_empty(closing) else closing.expand_as(gates.lr)


def changes_at_close(retention: Retention) -> bool:
    """Whether the retention has a `close` of its own."""
    return type(retention).close is not Retention.close


def write_rows(
    memory: AssociativeMemory,
    state: State,
    factors: dict[str, Factor],
    gates: Gates,
    initial: Weights,
    *,
    span: Span,
    prepared: Sequence[Prepared] | None = None,
    fresh: bool = False,
) -> State:
    """`nestlearn.memory.absorb` without its checks: the tokens of one ``span`` written, all at one anchor.

    Leading dimensions of factors and gates may broadcast to those of the weights. Tokens that do not count have
    factors of zero and neutral gates.
    """
    running = enter(memory, state, initial, fresh=fresh)
    for update in _pieces(memory, factors, gates, span, prepared):
        running = open_span(memory, running, update).advance()
    running = finish(memory, running, span.ends, span.reset)
    return leave(running, span.after(state.position), state.aligned and span.ends is True)


def _pieces(
    memory: AssociativeMemory,
    factors: dict[str, Factor],
    gates: Gates,
    span: Span,
    prepared: Sequence[Prepared] | None,
) -> Iterator[Update]:
    """The tokens in pieces short enough for their triangular systems, where all of them count."""
    if span.valid is not None or span.reset is not None or not _is_plain(memory):
        yield Update(factors, gates, span.valid, span.reset, find_closing(memory, span, gates))
        return
    size = span_length(memory.chunk_size, span.length, longest=LONGEST_WRITE)
    parts = {name: (f.input.split(size, -2), f.error.split(size, -2)) for name, f in factors.items()}
    columns = [None if gate is None else gate.split(size, -1) for gate in gates]
    for i in range(-(-span.length // size)):
        here = {name: Factor(x[i], e[i]) for name, (x, e) in parts.items()}
        now = Gates(*(None if column is None else column[i] for column in columns))  # type: ignore[arg-type]
        yield Update(here, now, prepared=None if prepared is None else prepared[i])
