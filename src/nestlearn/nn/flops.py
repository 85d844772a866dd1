"""What one token costs a memory."""

from __future__ import annotations

from dataclasses import replace

from nestlearn.memory import AssociativeMemory, Delta, DotProduct, Lq, Matrix
from nestlearn.memory.retention import erases, is_linear
from nestlearn.memory.spans import longest_span


def scan_flops(memory: AssociativeMemory, d_key: int, d_value: int, context_length: int, writes: bool = True) -> int:
    """Forward FLOPs per token of `nestlearn.memory.scan` for one row, a multiply-add counting 2.

    Counted as the chunked engine computes: matrix products over whole spans (both triangles), one triangular solve
    per map under delta retention and for proximal steps. Pointwise work is left out. ``writes=False`` counts reads at
    fixed weights only.
    """
    shapes = memory.architecture.shapes(d_key, d_value)
    dense = {name: 2 * out * width for name, (out, width) in shapes.items()}
    if not writes:
        return sum(dense.values())
    if memory.window > 1:
        alone = replace(memory, window=1)
        return memory.window * scan_flops(alone, d_key, d_value, context_length)
    span = longest_span(memory, context_length, memory.read)
    dense_reads = memory.read == "token" and not (is_linear(memory.retention) or isinstance(memory.retention, Lq))
    follows, momentum = memory.follows_weights, memory.has_momentum
    delta = erases(memory.retention) or follows
    total = 0
    last = list(shapes)[-1]
    for name, (out, width) in shapes.items():
        # Errors at the anchor: all maps but the last run forward, and are reached by an adjoint from behind.
        if not isinstance(memory.architecture, Matrix):
            total += dense[name]
        if name == last and not isinstance(memory.objective, DotProduct):
            total += dense[name]
        # Entering weights: read by the query, carried on by the span's writes.
        total += 2 * dense[name]
        if memory.read == "token":
            total += 2 * span * (width + out) + (dense[name] if memory.retain_to == "initial" else 0)
        if dense_reads:
            # The weights of every token: what enters, and the span's writes into each of its tokens.
            total += (1 + span) * dense[name]
        if delta:
            total += dense[name] + 2 * span * width + span * out
        if follows:
            total += dense[name]  # What the anchor reads.
        if momentum:
            twice = delta and not follows
            total += 2 * dense[name] + 2 * span * out * (2 if twice else 1) + 2 * span * span
    return total


def self_modifying_flops(
    memory: AssociativeMemory,
    width: int,
    projections: int,
    learning: float,
    span: int,
    context_length: int,
    *,
    self_values: bool = True,
) -> int:
    """Forward FLOPs per token and head of self-modifying Titans' memories, writes included.

    ``projections`` memories of head width ``width`` are read for every token and write ``learning`` of them, in spans
    of ``span`` tokens; the main memory writes every token and answers one query.
    """
    hidden = memory.architecture.shapes(width, width)["in"][0]
    unit = 2 * width * hidden  # one map applied to one token
    chunk, span = min(memory.chunk_size, context_length), min(span, context_length)
    delta = isinstance(memory.retention, Delta)
    write = (2 * self_values + 2 + 2 * delta) * unit  # target, errors, entering products
    solve = 4 * (width + hidden) if delta else 0  # per token of a span: both maps' triangular systems
    # A token read adds one query against the span's writes (both triangles computed) and the entering weights.
    read = 2 * unit if memory.read == "chunk" else 4 * unit + 4 * chunk * (width + hidden)
    main = write + 2 * unit + solve * chunk + read
    return round(main + projections * (2 * unit + learning * (write + 2 * unit + solve * span)))
