"""The closed forms of a span of tokens, one module per kind of memory; `open_span` takes the memory's own."""

from __future__ import annotations

from ..algorithms import Descent, Momentum, OrthogonalizedMomentum
from ..associative import AssociativeMemory
from ..clock import short_span, span_length
from ..retention import Decay, Delta, Lq, Oja, Retention, is_linear, is_mirror, is_per_channel
from .base import Opened, Running, Update, open_decay
from .channels import open_channels
from .delta import open_delta, open_oja
from .dense import open_dense
from .mirror import open_mirror
from .orthogonal import open_orthogonal
from .proximal import open_proximal

LONGEST_DENSE_SPAN = 16
"""Tokens of a span whose weights are computed one by one, or whose kernels have a channel dimension."""


def has_closed_form(memory: AssociativeMemory) -> bool:
    """Whether a span of this memory can be computed at once; otherwise it runs token by token."""
    known = type(memory.algorithm) in (Descent, Momentum, OrthogonalizedMomentum)
    return known and (is_linear(memory.retention) or is_mirror(memory.retention))


def is_dense(memory: AssociativeMemory, read_mode: str) -> bool:
    """Whether weights of single tokens are computed."""
    reads = is_mirror(memory.retention) and not isinstance(memory.retention, Lq) and read_mode == "token"
    return reads or not has_closed_form(memory)


def longest_span(memory: AssociativeMemory, tokens: int, read_mode: str) -> int:
    """Tokens processed at once: the chunk, or a part of a long one (its parts share one anchor)."""
    if is_dense(memory, read_mode) or is_per_channel(memory.retention):
        return short_span(memory.chunk_size, tokens, LONGEST_DENSE_SPAN)
    return span_length(memory.chunk_size, tokens)


def open_span(memory: AssociativeMemory, run: Running, update: Update) -> Opened:
    """A span of this memory, by its closed form if it has one."""
    retention, algorithm = memory.retention, memory.algorithm
    if not has_closed_form(memory):
        return open_dense(memory, run, update)
    if isinstance(algorithm, OrthogonalizedMomentum):
        return open_orthogonal(algorithm, run, update)
    if isinstance(retention, Delta):
        return open_delta(memory, retention, run, update)
    if isinstance(retention, Oja):
        return open_oja(memory, run, update)
    if isinstance(retention, Decay):
        if retention.per_channel:
            return open_channels(memory.architecture.query_map, run, update)
        return open_proximal(memory, run, update) if memory.follows_weights else open_decay(run, update)
    return open_mirror(memory, run, update)


def explain_span(memory: AssociativeMemory) -> list[str]:
    """What sets this memory's spans apart from those of a plain one, for `nestlearn.memory.explain`."""
    retention, name = memory.retention, type(memory.retention).__name__
    if not has_closed_form(memory):
        owner = name if type(retention).keep is not Retention.keep and not is_linear(retention) else ""
        return [f"{owner or type(memory.algorithm).__name__} has no closed form: its rule runs token by token"]
    if is_per_channel(retention):
        return [f"one retention gate per channel: kernels per channel, in spans of {LONGEST_DENSE_SPAN} tokens"]
    if isinstance(memory.algorithm, OrthogonalizedMomentum):
        return [
            "at chunk boundaries the momentum is orthogonalized (Newton-Schulz) and written; "
            "inside a chunk weights only decay"
        ]
    if isinstance(retention, Lq):
        return [f"{name} takes its norm at chunk boundaries; token reads are the closed form times one number"]
    if is_linear(retention):
        return []
    reasons = [f"{name} makes weights from accumulators; errors see those of chunk boundaries"]
    if memory.read == "token":
        reasons.append(
            f"a token reads its own weights, computed densely {LONGEST_DENSE_SPAN} tokens at a time; "
            "read='chunk' avoids it"
        )
    return reasons
