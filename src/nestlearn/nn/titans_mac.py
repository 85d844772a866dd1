"""Titans with memory as context: every segment attends to what the memory knew before it (Titans section 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.fields import Size
from nestlearn.memory import Decay, Descent, DotProduct, Gates, State, scan
from nestlearn.memory.clock import Clock, Span, choose
from nestlearn.memory.types import Weights
from nestlearn.nn.attention import PersistentTokens, persistent_heads, rotate
from nestlearn.nn.common import (
    Mixer,
    RMSNorm,
    admit,
    check_tokens,
    full_precision,
    largest_factor,
    poison,
    unit,
    wide_dtype,
)
from nestlearn.nn.config import register_mixer
from nestlearn.nn.conv import ShortConv
from nestlearn.nn.flops import scan_flops
from nestlearn.nn.mixer import MemoryMixer, MixerState
from nestlearn.nn.state import record
from nestlearn.nn.titans import TitansConfig


@record("titans.segment")
class SegmentTokens(NamedTuple):
    """Keys and values of tokens of one segment and of what the memory recalled for them, already rotated."""

    keys: Float[Tensor, "b h s e"]
    values: Float[Tensor, "b h s e"]
    recalled_keys: Float[Tensor, "b h s e"]
    recalled_values: Float[Tensor, "b h s e"]


@record("titans.context")
class ContextState(NamedTuple):
    """Streaming state of `MemoryAsContext`.

    ``start`` are the memory's weights at the start of the current segment, ``segment`` its tokens so far (slot i holds
    token i), ``position`` their number, ``conv`` the tail of the convolution. ``aligned`` is static: True where every
    row is known to stand at the start of a segment.
    """

    memory: MixerState
    start: Weights
    segment: SegmentTokens
    conv: Float[Tensor, "b w ch"] | None
    position: Int[Tensor, "b"]
    aligned: bool


class Projections(NamedTuple):
    """Question to the memory, query, key and value of every token, each ``[b, h, t, e]``."""

    ask: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


@register_mixer("titans_mac")
@dataclass(frozen=True)
class TitansMACConfig(TitansConfig):
    """Configuration of `MemoryAsContext`: the fields of `FastMemoryConfig`, and the following.

    Args:
        segment_length: tokens of a segment.
        persistent_tokens: learned tokens before every segment.
        rope_theta: base of the rotary frequencies.
    """

    segment_length: Size = 128

    def build(self, d_model: int, num_heads: int) -> MemoryAsContext:
        return MemoryAsContext(d_model, num_heads, self)

    @property
    def work_period(self) -> int:
        return math.lcm(super().work_period, self.segment_length)


class MemoryAsContext(Mixer):
    r"""Titans MAC: the sequence in segments, each with the memory's answers as context (Titans Eq. 21-25).

        h_t = M_start(W_q x_t)                      the memory as it was when the segment of t began
        y   = Attn([p] || h || x)                   causal within the segment; p and earlier h visible
        o_t = W_o( u_t * silu(norm(M_t(u_t))) ),    u = norm(y), and u is what the memory reads and learns

    Token t sees ``h_s`` and ``x_s`` of its segment for s <= t only, and reads the memory after its own write: the
    printed ``M(y)`` after the whole segment would answer with what later tokens wrote. Positions are those of the
    concatenation, so they stay below ``persistent_tokens + 2 segment_length`` in a text of any length.

    Args:
        d_model: width of input and output.
        num_heads: heads of the memory and of attention.
        config: the memory, the segments and the persistent tokens; `TitansMACConfig`.

    Raises:
        ValueError: for sizes that do not fit, with the fix.

    Example:
        >>> import torch
        >>> from nestlearn.nn import TitansMACConfig
        >>> layer = TitansMACConfig(segment_length=8, chunk_size=8).build(16, num_heads=2)
        >>> x = torch.randn(1, 20, 16)
        >>> y, state = layer(x[:, :13])
        >>> rest, state = layer(x[:, 13:], state)
        >>> torch.allclose(torch.cat([y, rest], 1), layer(x)[0], atol=1e-5)
        True
    """

    def __init__(self, d_model: int, num_heads: int, config: TitansMACConfig) -> None:
        super().__init__()
        config.check_sizes(d_model, num_heads)
        # The memory learns from what attention makes of the text, which has passed a convolution already.
        self.memory = MemoryMixer(d_model, num_heads, config.alone(conv_size=0, learn_initial=True))
        self.d_model, self.num_heads, self.d_head = d_model, num_heads, d_model // num_heads
        self.segment_length, self.persistent_tokens = config.segment_length, config.persistent_tokens
        self.rope_theta = config.rope_theta
        self.ask = nn.Linear(d_model, d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.conv = ShortConv(4 * d_model, config.conv_size) if config.conv_size else None
        self.persistent = PersistentTokens(config.persistent_tokens, d_model) if config.persistent_tokens else None
        self.recall_norm = RMSNorm(d_model, eps=config.norm_eps)
        self.attended = nn.Linear(d_model, d_model, bias=False)
        self.attention_norm = RMSNorm(d_model, eps=config.norm_eps)
        self.memory_norm = RMSNorm(d_model, eps=config.norm_eps)
        self.out = nn.Linear(d_model, d_model, bias=False)
        chunk = max(config.segment_length, self.memory.memory.chunk_size)
        # A read at fixed weights: neither the objective nor gates of the update matter, so it needs none.
        inside = self.memory.memory
        retention = Decay() if isinstance(inside.retention, Decay) else inside.retention
        self.reader = replace(
            inside, objective=DotProduct(), algorithm=Descent(), retention=retention, chunk_size=chunk, read="chunk"
        )

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: ContextState | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        *,
        writes: bool = True,
        return_state: bool = True,
    ) -> tuple[Float[Tensor, "b t d"], ContextState | None]:
        """Read tokens, answer each, and learn from them; the protocol of `nestlearn.nn.Mixer`."""
        check_tokens(x, self.d_model)
        x, bad = admit(x, mask, largest_factor(x))
        reset = reset if reset is None or mask is None else reset & mask
        made, tail = self._project(x, None if state is None else state.conv, mask, reset)
        y, new = self._read(made, bad, state, mask, reset, writes, return_state)
        y = y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)
        return y, new._replace(conv=tail) if new is not None and return_state else None

    def _project(
        self, x: Tensor, tail: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Projections, Tensor | None]:
        """Heads of every token, not yet rotated, and the tail of the convolution."""
        mixed = torch.cat((self.ask(x), self.qkv(x)), -1)
        if self.conv is not None:
            mixed, tail = self.conv(mixed, tail, mask, reset)
        ask, q, k, v = mixed.unflatten(-1, (4, self.num_heads, self.d_head)).permute(2, 0, 3, 1, 4)
        return Projections(unit(F.silu(ask).to(wide_dtype(x))), q, k, v), tail

    def recall(self, ask: Float[Tensor, "b h c e"], weights: Weights | None) -> Float[Tensor, "b h c e"]:
        """Answers of the memory at fixed weights (None: the initial ones); nothing is written."""
        full, rows = self._initial(ask), ask.shape[:2]
        held = full if weights is None else weights
        position = torch.zeros(rows, dtype=torch.long, device=ask.device)
        nothing = torch.zeros_like(ask[..., 0])
        state = State(held, None, held, position, aligned=True)
        with full_precision(ask):
            gates = Gates(nothing, torch.ones_like(nothing))
            blank = torch.zeros_like(ask)
            return scan(self.reader, state, ask, blank, blank, gates, initial=full, return_state=False)[0]

    def _recalled(self, made: Projections, start: Weights | None, after: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of what the memory recalls for a span; tokens ``after`` a reset ask a fresh memory."""
        h = self.recall(made.ask, start)
        if after is not None:
            h = torch.where(after[:, None, :, None], self.recall(made.ask, None), h)
        # A memory that a bad token destroyed must not reach earlier tokens through 0 * NaN.
        h = torch.where(torch.isfinite(h), h, 0).to(made.q.dtype)
        h = self.recall_norm(h.transpose(1, 2).flatten(2))
        # All of the projection, the query too: an adapter or a hook on it acts on the module's output.
        _, k, v = self.qkv(h).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def _attend(
        self, made: Projections, span: Span, start: Weights | None, past: SegmentTokens | None
    ) -> tuple[Tensor, SegmentTokens]:
        """Attention of the tokens of a span, ``[b, c, d]``, and their keys and values."""
        slots, offset = span.places(made.q.device).expand(len(made.q), -1), self.persistent_tokens
        later = offset + self.segment_length
        after = None if span.reset is None else span.reset.cummax(-1).values
        recalled, values = self._recalled(made, start, after)
        q = rotate(made.q, slots + later, self.rope_theta)
        new = SegmentTokens(
            rotate(made.k, slots + later, self.rope_theta), made.v.contiguous(),
            rotate(recalled, slots + offset, self.rope_theta), values,
        )  # fmt: skip
        groups = [new] if past is None else [past, new]
        keys = [x for group in groups for x in (group.recalled_keys, group.keys)]
        values = [x for group in groups for x in (group.recalled_values, group.values)]
        if self.persistent is not None:
            first, first_values = persistent_heads(self.persistent, self.qkv, self.num_heads, q.dtype)
            before = torch.arange(offset, device=slots.device)[None]
            batch = (q.shape[0], -1, -1, -1)
            keys.insert(0, rotate(first, before, self.rope_theta).expand(batch))
            values.insert(0, first_values.expand(batch))
        read = F.scaled_dot_product_attention(
            q, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=self._visible(span, past, len(q), q.device)
        )
        return self.attended(read.transpose(1, 2).flatten(2)), new

    def _visible(self, span: Span, past: SegmentTokens | None, rows: int, device: torch.device) -> Tensor:
        """Which keys each token sees, ``[b, 1, c, s]``, in the order of `_attend`."""
        column = torch.arange(span.length, device=device)
        new = (column <= column[:, None]).expand(rows, -1, -1)
        document = None if span.reset is None else span.reset.long().cumsum(1)
        if document is not None:
            new = new & (document[:, :, None] == document[:, None, :])
        if span.valid is not None:
            new = new & span.valid[:, None, :]
            # An empty slot sees itself: a query that sees nothing would give NaN.
            new = new | (column == column[:, None])
        seen = [new, new]
        if past is not None and isinstance(span.phase, Tensor):
            held = torch.arange(past.keys.shape[2], device=device) < span.phase[:, None]
            held = held[:, None, :].expand(-1, span.length, -1)
            held = held if document is None else held & (document == 0)[:, :, None]
            seen = [held, held, new, new]
        if self.persistent is not None:
            seen.insert(0, new.new_ones(rows, span.length, self.persistent_tokens))
        return torch.cat(seen, -1).unsqueeze(1)

    def _gate(
        self, y: Tensor, bad: Tensor, memory: MixerState | None, valid: Tensor | None, reset: Tensor | None,
        writes: bool, keep: bool,
    ) -> tuple[Tensor, MixerState | None]:  # fmt: skip
        """The memory reads attention's outputs, learns, and gates them."""
        u = self.attention_norm(y)
        m, memory = self.memory(poison(u, bad), memory, valid, reset, writes=writes, return_state=keep)
        return self.out(u * F.silu(self.memory_norm(m))), memory

    def _read(
        self, made: Projections, bad: Tensor, state: ContextState | None, mask: Tensor | None, reset: Tensor | None,
        writes: bool, return_state: bool,
    ) -> tuple[Tensor, ContextState | None]:  # fmt: skip
        """One segment after another: recall, attend, then let the memory read what attention gave."""
        (rows, tokens), length = bad.shape, self.segment_length
        memory, start, segment = (None, None, None) if state is None else (state.memory, state.start, state.segment)
        position = torch.zeros(rows, dtype=torch.long, device=bad.device) if state is None else state.position
        aligned = state is None or state.aligned
        clock = Clock.start(position, aligned, tokens, length, min(length, tokens), mask, reset)
        initial, outputs = self._initial(made.ask), []
        pieces = zip(clock.spans, *(clock.cut(x.transpose(1, 2)) for x in made), clock.cut(bad, False), strict=True)
        for i, (span, *parts, lost) in enumerate(pieces):
            if span.begins is not False and memory is not None:
                start = choose(span.begins, memory.memory.params, initial if start is None else start)
            past = None if span.begins is True else segment
            y, new = self._attend(Projections(*(x.transpose(1, 2) for x in parts)), span, start, past)
            keep = return_state or i + 1 < len(clock.spans)
            y, memory = self._gate(y, lost, memory, span.valid, span.reset, writes, keep)
            segment = _store(past, new, span, length)
            if span.reset is not None:
                start = choose(span.reset.any(-1), initial, initial if start is None else start)
            outputs.append(y)
        if not return_state or memory is None or segment is None:
            return clock.join(outputs), None
        ended = True if clock.aligned else clock.position == 0
        start = choose(ended, memory.memory.params, initial if start is None else start)
        return clock.join(outputs), ContextState(memory, start, segment, None, clock.position, clock.aligned)

    def _initial(self, like: Float[Tensor, "b h t e"]) -> Weights:
        """The memory's initial weights, ``[b, h, out, in]``."""
        initial = self.memory.initial_weights(like)
        return {name: w.expand(*like.shape[:2], *w.shape[-2:]) for name, w in initial.items()}

    def flops_per_token(self, context_length: int) -> int:
        """Forward FLOPs per token at this context length (multiply-add = 2), writes included."""
        d, tokens = self.d_model, min(self.segment_length, context_length)
        linear = 2 * (4 * d * d + 3 * d * d + 2 * d * d)  # ask, q, k, v; the same q, k, v of h; both outputs
        linear += 0 if self.conv is None else self.conv.flops_per_token(context_length)
        linear += 4 * self.persistent_tokens * d * d // tokens
        # Twice (tokens + 1) / 2 keys on average: the text's and the memory's.
        attention = 4 * d * (self.persistent_tokens + tokens + 1)
        recall = self.num_heads * scan_flops(self.reader, self.d_head, self.d_head, context_length, writes=False)
        return linear + attention + recall + self.memory.flops_per_token(context_length)


def _store(past: SegmentTokens | None, new: SegmentTokens, span: Span, length: int) -> SegmentTokens:
    """The tokens of the segment that a span ends in, at their places; ``past``: those before it (None: none)."""
    if isinstance(span.phase, int):
        # The next segment starts empty.
        kept = 0 if span.ends is True else span.length
        return SegmentTokens(*(F.pad(x[:, :, :kept], (0, 0, 0, length - kept)) for x in new))
    keep = torch.ones_like(span.places(new[0].device), dtype=torch.bool) if span.valid is None else span.valid
    if span.reset is not None:
        document = span.reset.long().cumsum(1)
        keep = keep & (document == document[:, -1:])
    target = torch.where(keep, span.places(keep.device), length)[:, None, :, None]
    held = past or SegmentTokens(*(x.new_zeros(*x.shape[:2], length, x.shape[-1]) for x in new))

    def put(old: Tensor, x: Tensor) -> Tensor:
        return F.pad(old, (0, 0, 0, 1)).scatter(2, target.expand_as(x), x.to(old.dtype))[:, :, :length]

    return SegmentTokens(*(put(old, x) for old, x in zip(held, new, strict=True)))
