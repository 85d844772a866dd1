"""What one token costs a memory."""

from __future__ import annotations

from nestlearn.memory import AssociativeMemory, Delta, DotProduct, Lq, Matrix
from nestlearn.memory.general import longest_span
from nestlearn.memory.layout import span_length
from nestlearn.memory.retention import is_linear


def scan_flops(memory: AssociativeMemory, d_key: int, d_value: int, context_length: int, writes: bool = True) -> int:
    """Forward FLOPs per token of `nestlearn.memory.scan` for one row, a multiply-add counting 2.

    Counted as the chunked engine computes: matrix products over whole spans (both triangles), one triangular solve
    per map under delta retention. Pointwise work is left out. ``writes=False`` counts reads at fixed weights only.
    """
    shapes = memory.architecture.shapes(d_key, d_value)
    dense = {name: 2 * out * width for name, (out, width) in shapes.items()}
    if not writes:
        return sum(dense.values())
    span = span_length(memory.chunk_size, context_length)
    if not memory.is_plain:
        span = longest_span(memory, context_length, memory.read)
    dense_reads = memory.read == "token" and not (is_linear(memory.retention) or isinstance(memory.retention, Lq))
    delta, momentum = isinstance(memory.retention, Delta), memory.has_momentum
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
        if momentum:
            total += 2 * dense[name] + 2 * span * out * (2 if delta else 1) + 2 * span * span
    return total
